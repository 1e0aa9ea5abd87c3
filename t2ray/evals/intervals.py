"""Confidence intervals of accuracies, over examples and seeds; and whether two accuracies differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def wilson(k: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of k successes in n trials (95 % at z = 1.96), within [0, 1]; (0, 1) if n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """An accuracy over seeds and examples with its 95 % interval: `Mean(acc=0.5, low=0.4, high=0.6, n=99, seeds=3)`."""

    acc: float
    low: float
    high: float
    n: int
    seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much one mean is above another, with its 95 % interval, and how likely chance alone comes as far."""

    gain: float
    low: float
    high: float
    p: float


def over_seeds(correct: Sequence[Sequence[bool]]) -> Mean:
    """Returns the accuracy of a method that was trained with several seeds and asked the same examples each time.

    The examples and the seeds are both samples: the variance of the mean is that of the examples' means over n, plus
    that of the seeds' means over their number. The interval is Wilson's for as many independent answers as have that
    variance. With one seed it is Wilson's own. Two or three seeds tell little of how much seeds vary.

    Args:
        correct: for each seed whether each example was answered right, in the same order.
    """
    right_SN = np.array(correct, dtype=float)
    seeds, n = right_SN.shape
    acc, variance = float(right_SN.mean()), _variance(right_SN)
    answers = acc * (1 - acc) / variance if seeds > 1 and variance > 0 else n
    low, high = wilson(acc * answers, answers)
    return Mean(acc=acc, low=low, high=high, n=n, seeds=seeds)


def spread(values: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Returns a mean over seeds and examples with its 95 % interval, by the normal one: `(mean, low, high)`."""
    values_SN = np.array(values, dtype=float)
    mean, half = float(values_SN.mean()), 1.96 * math.sqrt(_variance(values_SN))
    return mean, mean - half, mean + half


def paired(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    most: float = 1.0,
    *,
    alike: bool = False,
    draws: int = 10_000,
) -> Difference:
    """Compares two methods example by example, each by its mean over its seeds.

    p is that of the paired randomisation test (Fisher 1935): the share of random exchanges of the two methods' results,
    example by example, that differ at least as much. With one seed each that is McNemar's test. It is about other
    examples and these experts; the interval is also about other seeds, as in `over_seeds`. It is the normal one within
    what is possible. Where all n examples gain the same, it has room for the share of others that Wilson's interval
    leaves to what was seen n times of n.

    Args:
        first, second: for each seed what each example came to, such as 1 for a right answer; the same examples in the
            same order.
        most: greatest gain that an example can have: 1 of accuracies, infinite of losses.
        alike: whether a seed has the same experts on both sides, as two strategies have: then what counts in the
            interval is how much the seeds' gains differ, and not how much their experts do.
        draws: number of random exchanges; the least p is 1 / (draws + 1).
    """
    ours_SN, theirs_SN = np.array(first, dtype=float), np.array(second, dtype=float)
    assert ours_SN.shape[1] == theirs_SN.shape[1], (ours_SN.shape, theirs_SN.shape)
    gains_N = ours_SN.mean(0) - theirs_SN.mean(0)
    gain = float(gains_N.mean())
    moved = gains_N[gains_N != 0]
    signs = np.random.default_rng(0).integers(0, 2, (draws, len(moved)), dtype=np.int8) * 2 - 1
    as_far = np.abs(signs @ moved) >= abs(moved.sum()) - 1e-9
    of_seeds = _of_seeds(ours_SN - theirs_SN) if alike else _of_seeds(ours_SN) + _of_seeds(theirs_SN)
    of_examples = float(gains_N.var(ddof=1)) / len(gains_N) if len(gains_N) > 1 else 0.0
    half = 1.96 * math.sqrt(of_examples + of_seeds)
    low, high = gain - half, gain + half
    if of_examples == 0 and most < math.inf:
        others = 1 - wilson(len(gains_N), len(gains_N))[0]
        low, high = min(low, gain - others * (most + gain)), max(high, gain + others * (most - gain))
    p = (1 + int(as_far.sum())) / (1 + draws)
    return Difference(gain=gain, low=max(-most, low), high=min(most, high), p=p)


def _variance(right_SN: NDArray[np.float64]) -> float:
    """The variance of the mean of a table of seeds by examples, of which both are samples."""
    n = right_SN.shape[1]
    return (float(right_SN.mean(0).var(ddof=1)) / n if n > 1 else 0.0) + _of_seeds(right_SN)


def _of_seeds(right_SN: NDArray[np.float64]) -> float:
    seeds = right_SN.shape[0]
    return float(right_SN.mean(1).var(ddof=1)) / seeds if seeds > 1 else 0.0
