"""Cost models: seconds as a sum of terms, each a physical quantity times a fitted price, never a negative one.

Fitted by least squares of relative errors, so that a millisecond of ten counts as much as a second of ten, and held
against points that the fit has not seen. Not here: what is measured (`steps`, `engines`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.harness import Figures, measure

HELD_OUT = 0.15
"""How far a model may be off where it was not fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPoint:
    """A measurement: `FitPoint(name="16 rows", terms={"step": 1, "row": 16}, seconds=0.02)`.

    One that is `held` out is predicted, and not fitted.
    """

    name: str
    terms: Mapping[str, float]
    seconds: float
    held: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The price of each term in seconds, and the points it came from."""

    prices: Mapping[str, float]
    points: Sequence[FitPoint]

    def seconds(self, terms: Mapping[str, float]) -> float:
        """What the model says."""
        return sum(price * terms[name] for name, price in self.prices.items())

    def errors(self, *, held: bool) -> list[float]:
        """How far the model is off, relative to what was measured, at the points held out or at those fitted."""
        return [abs(self.seconds(p.terms) / p.seconds - 1) for p in self.points if p.held is held]

    def figures(self, prefix: str = "") -> Figures:
        """The largest errors, and the prices in microseconds."""
        return {
            f"{prefix}fit_error": measure([max(self.errors(held=False))]),
            f"{prefix}held_out_error": measure([max(self.errors(held=True))], HELD_OUT, at_most=True),
            **{f"{prefix}us_a_{name}": measure([1e6 * price]) for name, price in self.prices.items()},
        }

    def as_json(self) -> dict[str, Any]:
        """Prices, and every point with what the model says."""
        rows = [asdict(point) | {"predicted": self.seconds(point.terms)} for point in self.points]
        return {"prices_s": dict(self.prices), "points": rows}


def fitted(points: Sequence[FitPoint]) -> Fit:
    """The prices that miss the points least. A term whose price would be negative costs nothing."""
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
