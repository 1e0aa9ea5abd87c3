"""Cost models: seconds as a sum of terms, each a physical quantity times a fitted price that is not negative.

They are fitted by least squares of relative errors, so that one millisecond of ten counts as much as one second of ten,
and are checked at points that were held out. Not here: what is measured (`steps`, `engines`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.harness import Figures, measure

HELD_OUT = 0.15
"""The largest relative error that a model may have at points that were held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPoint:
    """A measurement: `FitPoint(name="16 rows", terms={"step": 1, "row": 16}, seconds=0.02)`.

    The model is not fitted to points that are `held` out; it predicts them.
    """

    name: str
    terms: Mapping[str, float]
    seconds: float
    held: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted model: the price of each term in seconds, and the points that it was fitted to and checked at."""

    prices: Mapping[str, float]
    points: Sequence[FitPoint]

    def seconds(self, terms: Mapping[str, float]) -> float:
        """Returns the model's prediction."""
        return sum(price * terms[name] for name, price in self.prices.items())

    def errors(self, *, held: bool) -> list[float]:
        """Returns the relative errors of the model, at the points that were held out or at those it was fitted to."""
        return [abs(self.seconds(p.terms) / p.seconds - 1) for p in self.points if p.held is held]

    def figures(self, prefix: str = "") -> Figures:
        """Returns the largest errors, and the prices in microseconds."""
        return {
            f"{prefix}fit_error": measure([max(self.errors(held=False))]),
            f"{prefix}held_out_error": measure([max(self.errors(held=True))], HELD_OUT, at_most=True),
            **{f"{prefix}us_a_{name}": measure([1e6 * price]) for name, price in self.prices.items()},
        }

    def as_json(self) -> dict[str, Any]:
        """Returns the prices in seconds, and every point with the model's prediction."""
        rows = [asdict(point) | {"predicted": self.seconds(point.terms)} for point in self.points]
        return {"prices_s": dict(self.prices), "points": rows}


def fitted(points: Sequence[FitPoint]) -> Fit:
    """Fits prices to the points. A term whose price would be negative is left out."""
    shown = [point for point in points if not point.held]
    names = list(shown[0].terms)
    while True:
        relative_PT = np.array([[point.terms[name] / point.seconds for name in names] for point in shown])
        scale_T = np.abs(relative_PT).max(0)
        solved_T, *_ = np.linalg.lstsq(relative_PT / scale_T, np.ones(len(shown)), rcond=None)
        prices_T = solved_T / scale_T
        if prices_T.min() >= 0:
            return Fit(prices=dict(zip(names, prices_T.tolist(), strict=True)), points=tuple(points))
        del names[int(solved_T.argmin())]
