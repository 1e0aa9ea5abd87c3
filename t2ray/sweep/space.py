"""The points of a sweep's space: grid, random or quasi-random, the same for a seed.

Not here: how a sweep is configured (`config.search`), running trials (`cluster.tune`), and Optuna, which proposes its
own points from the same dimensions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t2ray.config.search import SweepConfig, job_at, value_at
from t2ray.core import ConfigError

Point = dict[str, Any]
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def own_point(config: SweepConfig) -> Point:
    """Where the job stands as it was written: the first trial, which the others have to beat.

    A key that the job leaves open has None, the default of its own; Optuna is not told of such a point.
    """
    job = job_at(config, {})
    return {key: value_at(job, key) for key in config.space}


def points(config: SweepConfig) -> list[Point]:
    """The points to try, each once. A grid's are all of them; else the job's own comes first.

    Quasi-random points are Halton's, shifted by the seed: they fill the space more evenly than random ones.
    """
    keys, dimensions = list(config.space), list(config.space.values())
    if config.sampler == "grid":
        lists = [d.values for d in dimensions if d.values is not None]
        return _once([dict(zip(keys, values, strict=True)) for values in itertools.product(*lists)])
    rng = np.random.default_rng(config.seed)
    if config.sampler == "quasi":
        if len(keys) > len(_PRIMES):
            raise ConfigError(f"sampler quasi takes at most {len(_PRIMES)} keys; use random")
        bases = _PRIMES[: len(keys)]
        shift = rng.random(len(keys))
        grid = (np.array([[_halton(i, base) for base in bases] for i in range(1, config.trials + 1)]) + shift) % 1.0
    else:
        grid = rng.random((config.trials, len(keys)))
    drawn = [dict(zip(keys, (d.at(u) for d, u in zip(dimensions, row, strict=True)), strict=True)) for row in grid]
    return _once([own_point(config), *drawn])[: config.trials]


def trial_id(point: Mapping[str, Any], seed: int) -> str:
    """Eight digits that name a trial, and its folder, in whatever order trials run."""
    return hashlib.blake2b(json.dumps([dict(point), seed], sort_keys=True).encode(), digest_size=4).hexdigest()


def _once(candidates: Sequence[Point]) -> list[Point]:
    return list({trial_id(point, 0): point for point in candidates}.values())


def _halton(index: int, base: int) -> float:
    value, share = 0.0, 1.0
    while index:
        share /= base
        index, digit = divmod(index, base)
        value += share * digit
    return value
