"""Interleaved timing and what is made of it: ratios with their spread, held against targets. Standard library only.

Not here: what is timed (the benches), and the table that the terminal shows (`commands.bench`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Work = Callable[[], object]
Times = dict[str, list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A figure: the median of the rounds, their lowest and highest, and the target where there is one.

    `Measure(value=0.99, low=0.97, high=1.01, target=0.97, at_most=False)` asks for at least 0.97.
    """

    value: float
    low: float
    high: float
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None where there is none."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def as_json(self) -> dict[str, Any]:
        """What the report's file holds."""
        return {"value": self.value, "low": self.low, "high": self.high, "target": self.target, "met": self.met}


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A measure that could not be taken, and why."""

    reason: str

    def as_json(self) -> dict[str, Any]:
        """The same keys as a measure's, without values, and the reason."""
        return {"value": None, "low": None, "high": None, "target": None, "met": None, "skipped": self.reason}


Figures = dict[str, Measure | Skipped]


def measure(rounds: Sequence[float], target: float | None = None, *, at_most: bool = False) -> Measure:
    """The median of `rounds` with their spread."""
    return Measure(value=statistics.median(rounds), low=min(rounds), high=max(rounds), target=target, at_most=at_most)


def interleaved(sides: Mapping[str, Work], repeats: int) -> Times:
    """Seconds of each side in each of `repeats` rounds: A B C A B C ..., after one round that is not counted.

    What slows the machine down for a while slows all sides of a round, so that a round's ratios hold.
    """
    times: Times = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Times, above: str, below: str, factor: float = 1.0) -> list[float]:
    """`factor * above / below` in each round."""
    return [factor * a / b for a, b in zip(times[above], times[below], strict=True)]
