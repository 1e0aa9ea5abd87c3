"""The online engine alone, in this process, with which an endpoint is compared.

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
    """How much is measured.

    A round has `single` requests one after the other, or `rows` workers with `each` requests one after the other.
    Answers have `tokens` tokens. Random arrivals last `open_s` seconds. The registry has so many `experts`.
    """

    rounds: int = 5
    single: int = 12
    rows: int = 16
    each: int = 2
    tokens: int = 64
    open_s: float = 20.0
    experts: int = 1000


class _Forgetful(Loop):
    """A loop that forgets at each step how long its rows have had one mixture; counts the turns with scorings."""

    scored = 0

    def before_step(self) -> bool:
        self.scored += not self.scorings.empty()
        return super().before_step()

    def bound(self, requests: list[tuple[str, int]]) -> AbstractContextManager[None]:
        self._alone = (None, 0)
        return super().bound(requests)


class Unfolded(OnlineEngine):
    """An engine that never folds for its rows. Everything else is as in the engine.

    Scorings of many prompts do fold, and rows of their mixture then use that fold. A step whose rows share one mixture
    takes the same shorter way as in the engine.
    """

    def __init__(self, model: Model, config: EngineConfig | None = None) -> None:
        super().__init__(model, config)
        self._loop.__class__ = _Forgetful  # the engine has no option for another loop

    @property
    def turns(self) -> int:
        """The number of turns in which it has scored whatever waited."""
        return cast(_Forgetful, self._loop).scored


@contextmanager
def started(factors: Path, kind: type[OnlineEngine] = OnlineEngine, *, model: str = "tiny") -> Iterator[OnlineEngine]:
    """Yields a started engine of a model, as in a replica. Its model is its own, so that it shares no fold."""
    engine = kind(load_model(model, factors, device="cpu"))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def burst(
    engine: OnlineEngine, mixtures: Iterator[Mixture], prompts: Iterator[str], *, rows: int, each: int, tokens: int
) -> None:
    """Runs `rows` workers of `each` requests, which take the next mixture and prompt; answers have `tokens` tokens."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)

    async def one(_: int) -> None:
        await engine.generate(user(next(prompts)), next(mixtures), sampling)

    await closed_loop(one, rows, each)


def sums() -> Iterator[str]:
    """Yields prompts of the tiny model's task `math`: 2,500 different ones, again and again."""
    return itertools.cycle(f"{a}+{b}" for a in range(50) for b in range(50))


def by_round(values: Sequence[float], rounds: int) -> list[float]:
    """Returns the median of each of `rounds` equal parts of `values`."""
    size = len(values) // rounds
    return [statistics.median(values[start : start + size]) for start in range(0, size * rounds, size)]
