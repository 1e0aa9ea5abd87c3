"""What searches are configured by: the few-shot search's settings, and sweeps with the space around a job.

Not here: the searches themselves (`adapt.cem`, `adapt.fewshot`), and the points of a space (`sweep.space`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from t2ray.config.files import FilePath, Strict, expanded, nearest, override, read_yaml, validate
from t2ray.config.resume import FREE
from t2ray.config.train import TrainConfig, resolve
from t2ray.core import ConfigError, check_name

_RESERVED = FREE | {"seed", "preset"}

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # The paper's: the weight of the KL penalty, with everything else as in its Table 6 (the job's own preset: paper).
    "paper": {"sampler": "grid", "space": {"rl.kl": [0.0, 0.1, 0.2, 0.3]}},
}


class CEMConfig(Strict):
    """Settings of the few-shot search; the defaults are the paper's: population 32, elite 0.2, alpha in [0, 1].

    The search also ends after a round that leaves no spread to search.
    """

    population: int = Field(32, ge=2, description="Number of mixtures per round.")
    elite: float = Field(
        0.2,
        description="Share of a round's mixtures, above 0 and at most 1: the best ones, around which the next round is "
        "drawn; 0.2 of a population of 32 are 6.",
    )
    iterations: int = Field(50, ge=1, description="Greatest number of rounds.")
    low: float = Field(0.0, description="Least weight of an expert.")
    high: float = Field(1.0, description="Greatest weight of an expert.")
    mean: float | None = Field(
        None, description="Mean weight of the first round; without one, 1 / (number of experts), plain averaging."
    )
    sigma: float = Field(0.3, gt=0.0, description="Standard deviation of the weights of the first round.")
    seed: int = Field(0, description="Seed of the drawn weights.")
    budget_prompts: int | None = Field(
        None, ge=1, description="Greatest number of answers to generate; a round that would exceed it does not begin."
    )
    budget_s: float | None = Field(
        None,
        gt=0.0,
        description="Greatest duration in seconds; a round that would exceed it, judged by the slowest so far, does "
        "not begin.",
    )

    @field_validator("elite")
    @classmethod
    def _share(cls, elite: float) -> float:
        if not 0.0 < elite <= 1.0:
            raise ValueError(
                f"a share of the population, above 0 and at most 1, such as 0.2 for a fifth; not {elite:g}"
            )
        return elite

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; low must be below high")
        return self


class Dimension(Strict):
    """What one key may be: `[0.0, 0.1]` (values), `{uniform: [a, b]}`, `{log: [a, b]}` or `{integers: [a, b]}`."""

    values: tuple[Any, ...] | None = Field(
        None, min_length=1, description="The values to choose from; a list by itself means the same."
    )
    uniform: tuple[float, float] | None = Field(
        None, description="Least and greatest number, between which all are equally likely."
    )
    log: tuple[float, float] | None = Field(
        None, description="Least and greatest number, between which all magnitudes are equally likely."
    )
    integers: tuple[int, int] | None = Field(
        None, description="Least and greatest whole number, between which all are equally likely."
    )

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

    run: FilePath | None = Field(None, description="Folder of a training run, which has the model and the experts.")
    model: FilePath | None = Field(
        None,
        description='Model, where no run is named: "tiny", "tiny-vision", a local Hugging Face folder, or a hub id.',
    )
    factors: FilePath | None = Field(
        None, description="Folder of the model's decomposition; without one, the run's, or one in runs/factors."
    )
    experts: FilePath | None = Field(None, description="Registry of the experts; without one, the run's.")
    tasks: tuple[str, ...] = Field(
        min_length=1, description="Built-in tasks, or domains of the run; the score is the mean over them."
    )
    only: str | None = Field(
        None, description="Experts to mix, separated by commas; without any, all but the classifier."
    )
    shots: int = Field(10, ge=1, description="Number of labelled prompts per task that the search uses.")
    per_layer: bool = Field(False, description="Whether an expert has a weight for each layer, and not one for all.")
    max_tokens: int | None = Field(
        None, ge=1, description="Greatest number of tokens of an answer; without one, the task's own."
    )
    held_out: int = Field(
        64, ge=1, description="Number of prompts of the validation split that the mixture is scored on."
    )
    settings: CEMConfig = Field(CEMConfig(), description="Settings of the search.")
    seed: int = Field(0, description="Seed of every trial; the further seeds of the finalists follow it.")

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_task(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given


class SweepConfig(Strict):
    """A sweep: a job, the space around it, and how much may be spent."""

    kind: Literal["rl", "cem"] = Field(description="What is swept: a training job (rl), or the few-shot search (cem).")
    run: str = Field("sweep", description="Name of the sweep, and of its folder under `out`.")
    out: FilePath = Field(
        "runs", description="Folder that receives the sweeps: a local one, or a URI that all nodes share."
    )
    preset: Literal["none", "paper"] = Field(
        "none",
        description="Values that are laid under the file's: none, or the paper's grid of rl.kl (paper).",
    )
    job: dict[str, Any] = Field(
        description="The job that is swept: the name of its file, or its keys; of kind rl they are those of a training "
        "job, of kind cem those that are listed here."
    )
    space: dict[str, Dimension] = Field(
        min_length=1, description="Keys of the job, such as rl.lr, each with what it may be: a list, or one of these."
    )
    sampler: Literal["random", "grid", "quasi", "optuna"] = Field(
        "random",
        description="How points are chosen: at random, all of a grid, evenly spread (quasi), or by Optuna, which is "
        "an extra.",
    )
    trials: int = Field(16, ge=1, description="Number of points to try; a grid tries all of its points.")
    stop_early: bool = Field(
        True, description="Whether trials of a training job that fall behind are ended early, by ASHA."
    )
    finalists: int = Field(3, ge=1, description="Number of the best points that are tried again with further seeds.")
    seeds: int = Field(2, ge=2, description="Number of further seeds of each finalist.")
    seed: int = Field(0, description="Seed of the points that are drawn.")
    at_once: int | None = Field(
        None, ge=1, description="Greatest number of trials at the same time; without one, as many as the cluster fits."
    )
    cpus: float = Field(1.0, gt=0, description="CPUs per trial of a few-shot search; a training job says its own.")
    gpus: float = Field(0.0, ge=0, description="GPUs per trial of a few-shot search; a training job says its own.")

    @field_validator("space")
    @classmethod
    def _may_vary(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        for key in space:
            if key.partition(".")[0] in _RESERVED:
                raise ValueError(f"{key!r} cannot be swept: it says where or with what a job runs, not what it learns")
        return space


# --------------------------------------------------------------------------------------------------------------- files


def load(path: str | Path, overrides: Iterable[str] = ()) -> SweepConfig:
    """The sweep in a YAML file, with `trials=4 job.rl.steps=10`-like overrides; every corner of its space is checked.

    A `job` that is text names a training job's file, beside the sweep's own or in the working folder.

    Raises:
        ConfigError: the file, a key, a value or a place of the space is wrong.
    """
    path = Path(expanded(str(path)))
    values = read_yaml(path)
    if isinstance(values.get("job"), str):
        beside = path.parent / values["job"]
        values["job"] = read_yaml(beside if beside.is_file() else Path(expanded(values["job"])))
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
