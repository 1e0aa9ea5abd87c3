"""The continuous engine by itself, in this process: what an endpoint's figures are held against.

Not here: the figures (`serving`, `many`).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from t2ray.adapters.model import Model, load_model
from t2ray.config.serve import EngineConfig
from t2ray.core import Mixture, SamplingParams, user
from t2ray.engine.loop import Loop
from t2ray.engine.online import OnlineEngine
from t2ray.evals.load import closed_loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured: rounds of `single` requests one after the other, or of `rows` workers with `each` requests
    one after the other; answers of `tokens`; `open_s` seconds of arrivals; so many `experts`."""

    rounds: int = 5
    single: int = 12
    rows: int = 16
    each: int = 2
    tokens: int = 64
    open_s: float = 20.0
    experts: int = 1000


class _Forgetful(Loop):
    """Forgets at each step for how long the rows have had one mixture; counts the turns that score."""

    scored = 0

    def before_step(self) -> None:
        self.scored += not self.scorings.empty()
        super().before_step()

    def bound(self, requests: list[tuple[str, int]]) -> AbstractContextManager[None]:
        self._alone = (None, 0)
        return super().bound(requests)


class Unfolded(OnlineEngine):
    """An engine that never folds for its rows; scorings of many prompts do, and rows of their mixture then profit.

    All else is as in the engine, also the shorter way of a step whose rows share one mixture.
    """

    def __init__(self, model: Model, config: EngineConfig | None = None) -> None:
        super().__init__(model, config)
        self._loop.__class__ = _Forgetful  # the product has no other loop, and needs no way to name one

    @property
    def turns(self) -> int:
        """How often it has scored, all that waited at a time."""
        return cast(_Forgetful, self._loop).scored


@contextmanager
def started(factors: Path, kind: type[OnlineEngine] = OnlineEngine) -> Iterator[OnlineEngine]:
    """An engine of the tiny model, as a replica has one; a model of its own, so that nobody else's fold is found."""
    engine = kind(load_model("tiny", factors, device="cpu"))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def burst(
    engine: OnlineEngine, mixtures: Iterator[Mixture], prompts: Iterator[str], *, rows: int, each: int, tokens: int
) -> None:
    """`rows` workers with `each` requests, which take the next mixture and prompt; every answer has `tokens` tokens."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)

    async def one(_: int) -> None:
        await engine.generate(user(next(prompts)), next(mixtures), sampling)

    await closed_loop(one, rows, each)


def sums() -> Iterator[str]:
    """Prompts of the tiny model's task `math`, 2,500 different ones."""
    return itertools.cycle(f"{a}+{b}" for a in range(50) for b in range(50))


def by_round(values: Sequence[float], rounds: int) -> list[float]:
    """The median of each of `rounds` equal parts of `values`."""
    size = len(values) // rounds
    return [statistics.median(values[start : start + size]) for start in range(0, size * rounds, size)]
