"""What a training job is configured by: pydantic models, and YAML with `key=value` overrides. No torch, no ray.

Precedence: defaults < preset < YAML < `key=value` on the command line. The resolved configuration is written into the
run folder as `config.json`; a file that a person wrote is YAML, one that the program wrote is JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from t2ray.config.files import Strict, nearest, override, read_yaml, validate
from t2ray.core import ConfigError, check_name


class RLConfig(Strict):
    """REINFORCE with a KL penalty on z (paper section 3.1). Defaults for small models; `preset: paper` is Table 6."""

    steps: int = Field(30, ge=1, description="optimiser steps")
    prompts: int = Field(24, ge=1, description="prompts a step")
    samples: int = Field(4, ge=1, description="rollouts a prompt")
    baseline: Literal["none", "mean", "loo"] = Field(
        "mean", description="subtracted from the reward: 0, the batch's mean, or the prompt's other samples' mean"
    )
    temperature: float = Field(1.0, gt=0, description="of the rollouts")
    max_tokens: int = Field(48, ge=1, description="of a rollout, where the task does not say")
    lr: float = Field(2e-2, gt=0, description="AdamW's, at its highest")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of lr, down to a tenth")
    kl: float = Field(0.02, ge=0, description="lambda, the weight of KL(policy || base), nats a token")
    clip: float = Field(1.0, gt=0, description="the gradient's greatest norm")
    init: Literal["scale", "sigmoid"] = Field(
        "scale", description="z = 1 + N(0, sigma^2), or the reference code's z = sigmoid(p)"
    )
    sigma: float = Field(0.0, ge=0, description="standard deviation of the initial parameters")
    micro_batch: int = Field(32, ge=1, description="sequences differentiated at once: bounds the memory")
    eval_every: int = Field(10, ge=1, description="steps between greedy validations and checkpoints")
    eval_prompts: int = Field(128, ge=1, description="validation prompts")
    patience: int = Field(0, ge=0, description="validations without a better one before the run stops early; 0: never")

    @model_validator(mode="after")
    def _loo_needs_siblings(self) -> RLConfig:
        if self.baseline == "loo" and self.samples < 2:
            raise ValueError("baseline: loo (leave-one-out) needs samples >= 2; use baseline: mean, or more samples")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Table 6 and the reference code: one sample a prompt, no baseline, batch 256.
    "paper": {
        "prompts": 256, "samples": 1, "baseline": "none", "lr": 2e-3, "schedule": "constant", "kl": 0.2, "clip": 1e-3,
        "init": "sigmoid", "sigma": 1e-3**0.5, "max_tokens": 512, "micro_batch": 8,
    },
}  # fmt: skip


class DomainConfig(Strict):
    """One domain: a built-in `task`; `data`, `prompt` and `reward` of one's own; or, with `others`, the classifier."""

    task: str | None = Field(None, description="a built-in task: math, code, pick, gsm8k, arc_easy, mbpp, ...")
    data: str | None = Field(None, description="a JSONL, CSV or Parquet file, or a hub data set's id")
    split: str = Field("train", description="of a hub data set")
    validation: str | None = Field(None, description="a file or a hub split; else every 10th row of `data` is held out")
    prompt: str | None = Field(
        None, description='a template such as "Q: {question}", or the name of a column of messages'
    )
    reward: str | None = Field(None, description='"module:function", (completion, example) -> float in [-1, 1]')
    gold: str | None = Field(None, description="the column of right answers, for `t2ray verify` and few-shot ties")
    max_tokens: int | None = Field(None, ge=1, description="of a completion")
    others: str | None = Field(
        None, description="makes this the classification domain: the task or file of prompts that fit none"
    )
    rl: dict[str, Any] = Field(default_factory=dict, description="RL settings of this domain alone")

    @model_validator(mode="after")
    def _one_kind(self) -> DomainConfig:
        kinds = [kind for kind in ("task", "data", "others") if getattr(self, kind) is not None]
        if not kinds or (len(kinds) > 1 and set(kinds) != {"task", "data"}):
            raise ValueError(
                "a domain needs one of task (a built-in), data (with prompt and reward), or others (the classifier)"
            )
        if kinds == ["data"] and not (self.prompt and self.reward):
            missing = [key for key in ("prompt", "reward") if not getattr(self, key)]
            raise ValueError(f"a domain with data also needs {' and '.join(missing)}")
        return self


# What does not change the z that a training job ends with.
FREE = frozenset(
    {"run", "out", "experts", "factors", "workers", "cpus", "gpus", "verifiers", "code", "track", "fail_fast"}
)


class TrainConfig(Strict):
    """A training job: one expert a domain."""

    model: str = Field("tiny", description='"tiny", a local Hugging Face folder, or a hub id')
    run: str = Field("train", description="the run's name: its folder under `out`")
    out: str = Field("runs", description="where runs are written: a local folder or a URI that all nodes share")
    experts: str | None = Field(None, description="registry that receives the experts; default <out>/<run>/experts")
    factors: str | None = Field(
        None, description="the decomposition; default <out>/factors/<digest>, made when missing"
    )
    domains: dict[str, DomainConfig] = Field(min_length=1)
    preset: Literal["default", "paper"] = "default"
    rl: RLConfig = RLConfig()
    targets: tuple[str, ...] | None = Field(
        None, description='patterns of matrices, e.g. "*.mlp.*"; default all projections'
    )
    layers: str | None = Field(
        None, coerce_numbers_to_str=True, description='decoder layers, e.g. "0-3,8"; default all'
    )
    seed: int = 0
    workers: int | str = Field(1, description="Ray Train workers a domain, 1-4 for what fits; 0 runs in this process")
    cpus: float | None = Field(
        None,
        gt=0,
        description="CPUs a worker, and its threads, rounded down; default: its share of the cluster less one core",
    )
    gpus: float = Field(0.0, ge=0, description="GPUs a worker; with 2 or more its model is divided over them")
    verifiers: int = Field(1, ge=0, description="verifier processes a worker; 0 verifies in the worker")
    verify_timeout_s: float = Field(10.0, gt=0, description="time limit of one verification")
    unsafe_code: bool = Field(False, description="run model-written code where no isolation can be had")
    code: str = Field("", description="folder that holds the reward modules; default: the YAML's own")
    fail_fast: bool = Field(
        False, description="whether a domain that fails ends the others at once; otherwise they train to their end"
    )
    track: tuple[Literal["wandb", "mlflow"], ...] = Field(
        (), description="trackers that are told each step beside TensorBoard, e.g. [wandb]; each is an extra"
    )

    @field_validator("domains")
    @classmethod
    def _names(cls, domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        for name in domains:
            check_name(name, "domain")
        return domains

    @field_validator("workers", mode="before")
    @classmethod
    def _range(cls, workers: object) -> object:
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", str(workers))
        if not numbers or (numbers[2] and not 0 < int(numbers[1]) <= int(numbers[2])):
            raise ValueError(f"a number of workers, or a range such as 1-4 that begins with 1 or more, not {workers!r}")
        return str(workers) if numbers[2] else int(numbers[1])

    @field_validator("gpus")
    @classmethod
    def _whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"a worker has a part of one GPU or whole ones, not {gpus:g}: 0.5, 1, 2, ...")
        return gpus

    @property
    def span(self) -> tuple[int, int]:
        """The fewest and the most workers of a domain: `(2, 2)` for 2, `(1, 4)` for "1-4"."""
        least, _, most = str(self.workers).partition("-")
        return int(least), int(most or least)

    def domain_rl(self, domain: str) -> RLConfig:
        """The RL settings of one domain: `rl` with the domain's own `rl` over it.

        Raises:
            ConfigError: the domain's `rl` has an unknown key or a value out of range.
        """
        return validate(RLConfig, self.rl.model_dump() | self.domains[domain].rl, where=f"domains.{domain}.rl")

    @property
    def digest(self) -> str:
        """Equal for configurations that train the same z: what a resume must not change."""
        return hashlib.blake2b(json.dumps(self.resume_fields(), sort_keys=True).encode(), digest_size=8).hexdigest()

    def resume_fields(self) -> dict[str, Any]:
        """Everything but where things lie and how many processes do the work."""
        fixed = {key: value for key, value in self.model_dump(mode="json").items() if key not in FREE}
        # Ray unpacks a submitted job's files into a folder whose name changes with any of them.
        text = re.sub(r'[^"]*/working_dir_files/_ray_pkg_[0-9a-f]+/', "", json.dumps(fixed))
        return dict(json.loads(text))


def load(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """The training job in a YAML file, with overrides; paths in it are relative to the working folder.

    Raises:
        ConfigError: the file, a key or a value is wrong.
    """
    path = Path(path)
    return resolve(override(read_yaml(path), overrides), where=str(path), code=str(path.resolve().parent))


def resolve(values: dict[str, Any], *, where: str, code: str = "") -> TrainConfig:
    """A `TrainConfig` from plain values: the preset is laid under `rl`, every domain's settings are checked."""
    preset = values.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"{where}: unknown preset {preset!r}{nearest(str(preset), PRESETS)}")
    rl = values.get("rl", {})
    if isinstance(rl, dict):
        values = values | {"rl": PRESETS[preset] | rl}
    if code and not values.get("code"):
        values = values | {"code": code}
    config = validate(TrainConfig, values, where=where)
    check_name(config.run, "run")
    for domain in config.domains:
        config.domain_rl(domain)
    return config
