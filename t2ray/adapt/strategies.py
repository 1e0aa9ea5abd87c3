"""Pass 1: from a request to the mixture that answers it (paper section 3.2). Standard library only.

A strategy is an async function of the messages alone; whatever it needs of a model it was given as a `Score` or a
`Generate`. Not here: the search for a task's mixture (`fewshot`), whose result is served by `fixed`, and the answer
itself (pass 2). Called by `evaluate`, `t2ray chat` and the dispatcher.

| strategy | made by |
| --- | --- |
| `fixed` | `fixed(mixture)` |
| `prompt` | `classify(score, labels, Mixture.base())`: the base model classifies |
| `cls` | `classify(score, labels, Mixture.parse("dispatch"), name="cls")`: the classification expert does |
| `fewshot` | `fixed(registry.load_mixture(name), name="fewshot")` |
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from t2ray.core import ConfigError, Generate, Message, Mixture, SamplingParams, Score, UnknownExpert
from t2ray.prompts import OTHERS, dispatch_prompt

FEWSHOT = "fewshot/"
"""What stands before a saved mixture's name where a strategy is asked for: `fewshot/sums`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """What pass 1 decided.

    `Dispatch(mixture=Mixture.parse("math"), strategy="cls", label="math", probabilities={"math": 0.98, "others": 0.02},
    seconds=0.004)`. `label` is None and `probabilities` empty where nothing was classified; a generated label has no
    probabilities. `cached`: an earlier turn of the same conversation had decided it.
    """

    mixture: Mixture
    strategy: str
    label: str | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False


Strategy = Callable[[tuple[Message, ...]], Awaitable[Dispatch]]


def dispatch_labels(
    strategy: str, experts: Sequence[str], classifiers: Mapping[str, Sequence[str]], where: str
) -> tuple[str, ...]:
    """What `prompt` or `cls` chooses from, "others" last; the base model is also asked about experts that came later.

    Args:
        experts: those that answer.
        classifiers: the classification experts, each with the labels that it was trained on, in that order.
        where: the registry's name, for the errors.

    Raises:
        ConfigError: there are no experts, or for `cls` not one classification expert.
        UnknownExpert: an expert that the classification expert was trained to name is gone.
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
    """The same mixture for every request: the base, one expert, or what a few-shot search has found."""
    dispatch = Dispatch(mixture=mixture, strategy=name)

    async def strategy(messages: tuple[Message, ...]) -> Dispatch:
        return dispatch

    return strategy


def classify(score: Score, labels: tuple[str, ...], mixture: Mixture, *, name: str = "prompt") -> Strategy:
    """Asks the model with `mixture` for the kind of request and takes the likeliest label (paper section 3.2, a and b).

    Args:
        labels: the K experts' names and `"others"`, in the order in which the classification expert was trained on
            them. `"others"` means the base model.
        mixture: what classifies: the base model (`prompt`) or the classification expert (`cls`).
    """

    async def strategy(messages: tuple[Message, ...]) -> Dispatch:
        start = time.perf_counter()
        scores = await score(dispatch_prompt(messages, labels), labels, mixture)
        top = max(scores)
        weights = [math.exp(s - top) for s in scores]
        probabilities = {label: w / sum(weights) for label, w in zip(labels, weights, strict=True)}
        label = max(labels, key=probabilities.__getitem__)
        return Dispatch(
            mixture=_expert(label),
            strategy=name,
            label=label,
            probabilities=probabilities,
            seconds=time.perf_counter() - start,
        )

    return strategy


def classify_by_generation(
    generate: Generate, labels: tuple[str, ...], mixture: Mixture, *, name: str = "prompt"
) -> Strategy:
    """As `classify`, but the model writes the label, as in the paper.

    An answer that holds none of the labels as a word, or more than one of them, means `"others"`.
    """
    sampling = SamplingParams(max_tokens=16, temperature=0.0)

    async def strategy(messages: tuple[Message, ...]) -> Dispatch:
        start = time.perf_counter()
        completion = await generate(dispatch_prompt(messages, labels), mixture, sampling)
        # Not \b: a name may hold '-' and '.', and "code-long" must not be read as "code".
        found = [
            x for x in labels if re.search(rf"(?<![\w.-]){re.escape(x)}(?![\w-]|\.\w)", completion.text, re.IGNORECASE)
        ]
        label = found[0] if len(found) == 1 else OTHERS
        return Dispatch(mixture=_expert(label), strategy=name, label=label, seconds=time.perf_counter() - start)

    return strategy


def _expert(label: str) -> Mixture:
    return Mixture.base() if label == OTHERS else Mixture.of({label: 1.0})
