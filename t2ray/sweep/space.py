"""What a sweep is configured by, and the points of its space: grid, random or quasi-random, the same for a seed.

Not here: running trials (`cluster.tune`), and Optuna, which proposes its own points from the same dimensions.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from t2ray.adapt.cem import CEMConfig
from t2ray.config.files import Strict, nearest, override, read_yaml, validate
from t2ray.config.train import FREE, TrainConfig, resolve
from t2ray.core import ConfigError, check_name

Point = dict[str, Any]
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
_RESERVED = FREE | {"seed", "preset"}

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # The paper's: the weight of the KL penalty, with everything else as in its Table 6 (the job's own preset: paper).
    "paper": {"sampler": "grid", "space": {"rl.kl": [0.0, 0.1, 0.2, 0.3]}},
}


class Dimension(Strict):
    """What one key may be: `[0.0, 0.1]` (values), `{uniform: [a, b]}`, `{log: [a, b]}` or `{integers: [a, b]}`."""

    values: tuple[Any, ...] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None
    log: tuple[float, float] | None = None
    integers: tuple[int, int] | None = None

    @model_validator(mode="before")
    @classmethod
    def _list(cls, given: Any) -> Any:
        return {"values": given} if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _one(self) -> Dimension:
        given = [key for key in type(self).model_fields if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("give a list of values, or one of uniform, log and integers with [low, high]")
        if self.values is None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"{given[0]}: low {self.bounds[0]} must be below high {self.bounds[1]}")
        if self.log and self.log[0] <= 0:
            raise ValueError(f"log: low {self.log[0]} must be above 0")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Low and high of a range."""
        bounds = self.uniform or self.log or self.integers
        assert bounds is not None
        return bounds

    @property
    def corners(self) -> tuple[Any, ...]:
        """The values that tell whether the whole dimension is allowed: all of a list, the ends of a range."""
        return self.values if self.values is not None else self.bounds

    def at(self, u: float) -> Any:
        """The value at u in [0, 1); numbers have four digits, so that a table shows what was run."""
        if self.values is not None:
            return self.values[int(u * len(self.values))]
        low, high = self.bounds
        if self.integers:
            return int(low + math.floor(u * (high - low + 1)))
        value = low * (high / low) ** u if self.log else low + u * (high - low)
        return min(max(float(f"{value:.4g}"), low), high)


class CEMJob(Strict):
    """A few-shot search as a sweep varies it: `t2ray adapt` on frozen experts, scored on prompts it has not seen."""

    run: str | None = Field(None, description="a training run's folder")
    model: str | None = Field(None, description='without a run: "tiny", a folder or a hub id')
    factors: str | None = None
    experts: str | None = Field(None, description="without a run: the registry")
    tasks: tuple[str, ...] = Field(min_length=1, description="built-in tasks; the score is the mean over them")
    only: str | None = Field(None, description="the experts to mix, separated by commas")
    shots: int = Field(10, ge=1)
    per_layer: bool = False
    max_tokens: int | None = Field(None, ge=1)
    held_out: int = Field(64, ge=1, description="prompts of the validation split that the mixture is scored on")
    settings: CEMConfig = CEMConfig()
    seed: int = 0

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_task(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given


class SweepConfig(Strict):
    """A sweep: a job, the space around it, and how much may be spent."""

    kind: Literal["rl", "cem"] = Field(description="rl: a training job's settings; cem: the few-shot search's")
    run: str = Field("sweep", description="the sweep's name: its folder under `out`")
    out: str = Field("runs", description="a local folder or a URI that all nodes share")
    preset: Literal["none", "paper"] = "none"
    job: dict[str, Any] = Field(description="what is swept: a file, or its keys")
    space: dict[str, Dimension] = Field(min_length=1, description="job keys, such as rl.lr, and what they may be")
    sampler: Literal["random", "grid", "quasi", "optuna"] = "random"
    trials: int = Field(16, ge=1, description="points to try; a grid tries all of its points")
    stop_early: bool = Field(True, description="kind rl: end trials that fall behind (ASHA)")
    finalists: int = Field(3, ge=1, description="best trials that are run again with further seeds")
    seeds: int = Field(2, ge=2, description="further seeds of each finalist")
    seed: int = Field(0, description="of the points")
    at_once: int | None = Field(None, ge=1, description="trials at once; default: as many as the cluster fits")
    cpus: float = Field(1.0, gt=0, description="CPUs a trial; kind rl: a worker's are the job's own")
    gpus: float = Field(0.0, ge=0, description="GPUs a trial; kind rl: a worker's are the job's own")

    @field_validator("space")
    @classmethod
    def _may_vary(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        for key in space:
            if key.partition(".")[0] in _RESERVED:
                raise ValueError(f"{key!r} cannot be swept: it says where or with what a job runs, not what it learns")
        return space


# --------------------------------------------------------------------------------------------------------------- files


def load(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep in a YAML file, with `trials=4 job.rl.steps=10`-like overrides; every corner of its space is checked.

    A `job` that is text names a training job's file, beside the sweep's own or in the working folder.

    Raises:
        ConfigError: the file, a key, a value or a place of the space is wrong.
    """
    path = Path(path)
    values = read_yaml(path)
    if isinstance(values.get("job"), str):
        beside = path.parent / values["job"]
        values["job"] = read_yaml(beside if beside.is_file() else Path(values["job"]))
    values = override(values, overrides)
    preset = values.get("preset", "none")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"{path}: unknown preset {preset!r}{nearest(str(preset), PRESETS)}")
    if isinstance(values.get("job"), dict) and values.get("kind") == "rl" and not values["job"].get("code"):
        values["job"] = values["job"] | {"code": str(path.resolve().parent)}
    config = validate(SweepConfig, PRESETS[preset] | values, where=str(path))
    check_name(config.run, "sweep")
    if config.sampler == "grid" and (ranges := [key for key, d in config.space.items() if d.values is None]):
        raise ConfigError(f"{path}: sampler grid needs lists of values; {', '.join(ranges)} is a range")
    job_at(config, {}, where=f"{path}: job")
    for key, dimension in config.space.items():
        for value in dimension.corners:
            job_at(config, {key: value}, where=f"{path}: space")
    return config


def job_at(config: SweepConfig, point: Mapping[str, Any], *, where: str = "the sweep's job") -> TrainConfig | CEMJob:
    """The job at one point of the space.

    Raises:
        ConfigError: a key that the job does not have, with the nearest, or a value out of range.
    """
    values = laid_over(config.job, point)
    if config.kind == "cem":
        return validate(CEMJob, values, where=where)
    return resolve(values, where=where)


def laid_over(job: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """The job's values with a point's in their places: `{"rl.lr": 0.01}` is `{"rl": {"lr": 0.01}}`."""
    values = copy.deepcopy(dict(job))
    for key, value in point.items():
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"space: {key!r}: {parent!r} holds no keys")
        place[last] = list(value) if isinstance(value, tuple) else value
    return values


def value_at(job: TrainConfig | CEMJob, key: str) -> Any:
    """What a job has at a key such as `rl.lr`; None where it leaves it open."""
    place: Any = job.model_dump(mode="json")
    for part in key.split("."):
        place = place.get(part) if isinstance(place, dict) else None
    return place


# -------------------------------------------------------------------------------------------------------------- points


def own_point(config: SweepConfig) -> Point:
    """Where the job stands as it was written: the first trial, which the others have to beat."""
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
