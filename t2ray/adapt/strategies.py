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
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from t2ray.core import Generate, Message, Mixture, SamplingParams, Score
from t2ray.prompts import OTHERS, dispatch_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """What pass 1 decided.

    `Dispatch(mixture=Mixture.parse("math"), strategy="cls", label="math", probabilities={"math": 0.98, "others": 0.02},
    seconds=0.004)`. `label` is None and `probabilities` empty where nothing was classified; a generated label has no
    probabilities.
    """

    mixture: Mixture
    strategy: str
    label: str | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


Strategy = Callable[[tuple[Message, ...]], Awaitable[Dispatch]]


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
