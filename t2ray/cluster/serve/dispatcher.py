"""The `Dispatcher`: pass 1, from a conversation to the mixture that answers it.

It holds no model: pass 1 is a scoring in some `Generator`'s batch. Not here: the strategies themselves (`t2ray.adapt`).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from t2ray.adapt.strategies import Dispatch, classify, dispatch_labels
from t2ray.cluster.serve.catalog import Watch
from t2ray.cluster.serve.handles import asked, told
from t2ray.config.files import nearest
from t2ray.config.serve import ServeConfig
from t2ray.core import ConfigError, Message, Mixture, Prompt
from t2ray.prompts import requests

CACHED = 4096
"""Decisions kept: each is a few hundred bytes."""


class Dispatcher:
    """Decides, and remembers what it decided about a conversation for as long as the experts stay the same."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: dict[str, Any], generator: Any
    ) -> None:
        self.config = ServeConfig.model_validate(config)
        self.generator = generator
        self.watch = Watch(generator, self.config.poll_s)
        self._decided: OrderedDict[tuple[object, ...], Dispatch] = OrderedDict()
        await self.watch.start()

    def check_health(self) -> None:
        """Raises where the catalog is followed no longer; Serve then replaces us."""
        self.watch.looking.check()

    @told
    async def decide(self, strategy: str, messages: tuple[Message, ...]) -> Dispatch:
        """Pass 1 by `prompt` or `cls`.

        The labels stay those that the classification expert was trained on, although an expert that they name is
        damaged or gone: only a request that is dispatched to that one is refused, or answered by the base model
        (`on_damaged`).

        Raises:
            ConfigError: no such strategy, or no experts to choose from.
        """
        if strategy not in ("prompt", "cls"):
            raise ConfigError(f"unknown strategy {strategy!r}{nearest(strategy, ('prompt', 'cls'))}")
        experts = self.watch.catalog.experts
        classifiers = {info.name: info.labels for info in experts.values() if info.classifies and info.problem is None}
        named = [label for labels in classifiers.values() for label in labels[:-1]]
        answering = [info.name for info in experts.values() if info.answers or info.name in named]
        if strategy == "cls":
            answering += [name for name in named if name not in answering]
        labels = dispatch_labels(strategy, answering, classifiers, "the registry")
        classifier = next(iter(classifiers)) if strategy == "cls" else None
        version = experts[classifier].version if classifier else 0
        key = (strategy, labels, classifier, version, *map(_known_by, requests(messages)))
        if key in self._decided:
            self._decided.move_to_end(key)
            return self._served(replace(self._decided[key], seconds=0.0, cached=True))
        mixture = Mixture.of({classifier: 1.0}) if classifier else Mixture.base()
        decide = classify(self._score, labels, mixture, name=strategy, threshold=self.config.threshold)
        decided = await decide(messages)
        self._decided[key] = decided
        if len(self._decided) > CACHED:
            self._decided.popitem(last=False)
        return self._served(decided)

    def _served(self, decided: Dispatch) -> Dispatch:
        """The decision, with the base model in the place of an expert that cannot be used where that is wanted."""
        experts = self.watch.catalog.experts
        usable = all(name in experts and experts[name].problem is None for name in decided.mixture.names)
        return decided if usable or self.config.on_damaged == "error" else replace(decided, mixture=Mixture.base())

    async def _score(self, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture) -> tuple[float, ...]:
        scores: tuple[float, ...] = await asked(self.generator.score, prompt, labels, mixture)
        return scores


def _known_by(turn: Message) -> tuple[object, ...]:
    """A turn's words and the digests of its pictures, whose bytes would be too many to keep."""
    return turn.text, *(hashlib.blake2b(image.data, digest_size=16).digest() for image in turn.images)
