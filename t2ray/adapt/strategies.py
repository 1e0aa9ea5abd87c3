"""Pass 1: from a request to the mixture that answers it (paper section 3.2). Standard library only.

A strategy is an async function of the messages alone. If it needs a model, it has been given a `Score` or a `Generate`.
Not here: the search for a task's mixture (`fewshot`).

| strategy | made by |
| --- | --- |
| `fixed` | `fixed(mixture)` |
| `prompt` | `classify(score, labels, Mixture.base())`: the base model classifies |
| `cls` | `classify(score, labels, Mixture.parse("dispatch"), name="cls")`: the classification expert does |
| `soft/T` | as `cls` with `temperature=T`, or as `prompt`: each expert has its label's probability as its weight |
| `fewshot` | `fixed(registry.load_mixture(name), name="fewshot")` |
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from t2ray.core import (
    ConfigError,
    ContextExceeded,
    Generate,
    Message,
    Mixture,
    SamplingParams,
    Score,
    UnknownExpert,
)
from t2ray.prompts import OTHERS, question, requests

FEWSHOT = "fewshot/"
"""The prefix of a saved mixture's name in the place of a strategy's: `fewshot/sums`."""
SOFT = re.compile(r"soft(?:/(\d*\.?\d+))?")
"""The strategy `soft`, or `soft/T` with a temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """The result of pass 1.

    `Dispatch(mixture=Mixture.parse("math"), strategy="cls", label="math", probabilities={"math": 0.98, "others": 0.02},
    seconds=0.004)`. If nothing was classified, `label` is None and `probabilities` is empty; a generated label has no
    probabilities. `cached` says that an earlier request had decided it.
    """

    mixture: Mixture
    strategy: str
    label: str | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False


T = TypeVar("T")

Strategy = Callable[[tuple[Message, ...]], Awaitable[Dispatch]]
"""From a conversation to the mixture that answers it."""


def dispatch_labels(
    strategy: str, experts: Sequence[str], classifiers: Mapping[str, Sequence[str]], where: str
) -> tuple[str, ...]:
    """Returns the labels from which `prompt` or `cls` chooses, "others" last.

    They are those of the classification expert, if there is one. For `prompt`, experts that it does not know are added.

    Args:
        experts: the names of the experts that answer.
        classifiers: the classification experts, each with the labels that it was trained on, in that order.
        where: the registry's name, for error messages.

    Raises:
        ConfigError: there are no experts, or `cls` does not have exactly one classification expert.
        UnknownExpert: the classification expert was trained to name an expert that does not exist.
    """
    if not experts:
        raise ConfigError(
            f"strategy {strategy!r} needs experts to choose from, and there are none ({where}); name them by --run "
            "or --experts, train some by `t2ray demo` or `t2ray train`, or use the strategy base"
        )
    trained = tuple(next(iter(classifiers.values()), (*experts, OTHERS)))
    if strategy != "cls":
        known = [label for label in trained if label in experts]
        return (*known, *(name for name in experts if name not in known), OTHERS)
    if len(classifiers) != 1:
        there = f"there are {', '.join(classifiers)}" if classifiers else "there is none"
        remedy = "delete the others" if classifiers else "train a domain that has `others`"
        raise ConfigError(
            f"strategy 'cls' needs one classification expert, and {there} in {where}; {remedy}, or use the "
            "strategy prompt"
        )
    for label in trained[:-1]:
        if label not in experts:
            raise UnknownExpert(
                f"the classification expert {next(iter(classifiers))!r} names {label!r}, an expert not in "
                f"{where}; import it again, or use the strategy prompt"
            )
    return trained


def fixed(mixture: Mixture, *, name: str = "fixed") -> Strategy:
    """A strategy that takes one mixture for every request: the base, an expert, the result of a few-shot search."""
    dispatch = Dispatch(mixture=mixture, strategy=name)

    async def strategy(messages: tuple[Message, ...]) -> Dispatch:
        return dispatch

    return strategy


def classify(
    score: Score,
    labels: tuple[str, ...],
    mixture: Mixture,
    *,
    name: str = "prompt",
    threshold: float = 0.0,
    temperature: float | None = None,
) -> Strategy:
    """A strategy that takes the likeliest label as the kind of a request (paper section 3.2, a and b).

    It reads the user's last turn: its words, and where they are of no kind, with its pictures. Of a short one that is
    of no kind, the kind is that of the turn before it.

    Args:
        labels: the names of the experts and "others", in the order in which the classification expert was trained on
            them. "others" means the base model.
        mixture: the mixture that classifies: the base model (`prompt`) or the classification expert (`cls`).
        threshold: the least probability of the likeliest label; below it the kind is "others".
        temperature: with one, above 0, the request's mixture has every expert with its label's probability p as its
            weight, as p^(1/T) and normalised; without one, it is the likeliest label's expert alone.
    """

    async def strategy(messages: tuple[Message, ...]) -> Dispatch:
        start = time.perf_counter()
        for turn in requests(messages):
            scores = await _asked(lambda prompt: score(prompt, labels, mixture), turn, labels)
            top = max(scores)
            weights = [math.exp(s - top) for s in scores]
            probabilities = {label: w / sum(weights) for label, w in zip(labels, weights, strict=True)}
            label = max(labels, key=probabilities.__getitem__)
            label = label if probabilities[label] >= threshold else OTHERS
            if label != OTHERS:
                break
        return Dispatch(
            mixture=_expert(label) if temperature is None else weighted(probabilities, temperature),
            strategy=name,
            label=label,
            probabilities=probabilities,
            seconds=time.perf_counter() - start,
        )

    return strategy


def classify_by_generation(
    generate: Generate, labels: tuple[str, ...], mixture: Mixture, *, name: str = "prompt"
) -> Strategy:
    """A strategy like `classify`, except that the model writes the label, as in the paper.

    An answer that has none of the labels as a word, or several of them, means "others".
    """
    sampling = SamplingParams(max_tokens=16, temperature=0.0)

    async def strategy(messages: tuple[Message, ...]) -> Dispatch:
        start = time.perf_counter()
        for turn in requests(messages):
            answer = (await _asked(lambda prompt: generate(prompt, mixture, sampling), turn, labels)).text
            # Not \b: a name may have '-' and '.', and "code-long" must not be read as "code".
            words = [rf"(?<![\w.-]){re.escape(label)}(?![\w-]|\.\w)" for label in labels]
            found = [x for x, word in zip(labels, words, strict=True) if re.search(word, answer, re.IGNORECASE)]
            label = found[0] if len(found) == 1 else OTHERS
            if label != OTHERS:
                break
        return Dispatch(mixture=_expert(label), strategy=name, label=label, seconds=time.perf_counter() - start)

    return strategy


async def _asked(ask: Callable[[tuple[Message, ...]], Awaitable[T]], turn: Message, labels: tuple[str, ...]) -> T:
    """The reply to the question about a turn, without what the model's context has no room for: as much of the middle
    of its text, or all pictures."""
    text, images = turn.text, turn.images
    while True:
        try:
            return await ask(question(Message(role="user", content=(*images, text) if images else text), labels))
        except ContextExceeded as error:
            if not text and not images:
                raise ConfigError(
                    f"pass 1 asks about {len(labels)} labels, which exceed the model's context; name an expert"
                ) from error
            if not text:
                text, images = turn.text, ()
                continue
            prompt, answer, context = error.args[1:]
            keep = int(len(text) * 0.9 * max(context - answer, 0) / prompt)
            text = text[: keep - keep // 2] + text[len(text) - keep // 2 :]


def _expert(label: str) -> Mixture:
    return Mixture.base() if label == OTHERS else Mixture.of({label: 1.0})


def weighted(probabilities: Mapping[str, float], temperature: float) -> Mixture:
    """The experts' mixture with p^(1/temperature), normalised, as weights; that of "others" is the base's.

    Weights are rounded to hundredths, so that requests which hardly differ have one mixture.
    """
    top = max(probabilities.values())
    tempered = {label: (p / top) ** (1 / temperature) for label, p in probabilities.items()}
    total = sum(tempered.values())
    alphas = {label: round(p / total, 2) for label, p in tempered.items() if label != OTHERS}
    return Mixture.of({label: alpha for label, alpha in alphas.items() if alpha})
