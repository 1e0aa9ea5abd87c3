"""Interleaved timing, and ratios of times with their spread and their targets. Standard library only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Work = Callable[[], object]
Times = dict[str, list[float]]
"""Seconds of each side in each round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A figure: the median of its rounds, the lowest and the highest of them, and a target, if it has one.

    `Measure(value=0.99, low=0.97, high=1.01, target=0.97, at_most=False)` asks for at least 0.97.
    """

    value: float
    low: float
    high: float
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None if there is no target."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def as_json(self) -> dict[str, Any]:
        """Returns the figure as the JSON file shows it."""
        return {"value": self.value, "low": self.low, "high": self.high, "target": self.target, "met": self.met}


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A figure that could not be measured, and why."""

    reason: str

    def as_json(self) -> dict[str, Any]:
        """Returns the keys of a measure, without values, and the reason."""
        return {"value": None, "low": None, "high": None, "target": None, "met": None, "skipped": self.reason}


Figures = dict[str, Measure | Skipped]


def measure(rounds: Sequence[float], target: float | None = None, *, at_most: bool = False) -> Measure:
    """Returns the median of `rounds` with their spread."""
    return Measure(value=statistics.median(rounds), low=min(rounds), high=max(rounds), target=target, at_most=at_most)


def interleaved(sides: Mapping[str, Work], repeats: int) -> Times:
    """Times all sides in turn, A B C A B C ..., for `repeats` rounds, after one round that does not count.

    Other load on the machine slows down all sides of a round, so that the ratios within a round remain right.
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
    """Returns `factor * above / below` of each round."""
    return [factor * a / b for a, b in zip(times[above], times[below], strict=True)]
