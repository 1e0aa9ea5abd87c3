"""What a training job is configured by: pydantic models, and YAML with `key=value` overrides. No torch, no ray.

The resolved configuration is written into the run folder as `config.json`. Not here: reading YAML (`files`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from t2ray.config.adapter import AdapterConfig
from t2ray.config.domain import DomainConfig
from t2ray.config.files import FilePath, Strict, expanded, nearest, override, read_yaml, validate
from t2ray.config.resume import digest_of, lasting
from t2ray.config.rl import PRESETS, RLConfig
from t2ray.core import ConfigError, check_name


class TrainConfig(Strict):
    """A training job: one expert per domain that it trains."""

    model_config = ConfigDict(serialize_by_alias=True)

    model: FilePath = Field(
        "tiny", description='Model to adapt: "tiny", "tiny-vision", a local folder, or a Hugging Face hub id.'
    )
    run: str = Field("train", description="Name of the run, and of its folder under `out`.")
    source: FilePath | None = Field(
        None,
        alias="from",
        description="Folder of a run from whose experts of the same names the domains go on, in place of the base.",
    )
    out: FilePath = Field("runs", description="Folder that receives the runs: a local one, or a URI that all share.")
    experts: FilePath | None = Field(
        None, description="Registry that receives the experts; without one, the run's own."
    )
    factors: FilePath | None = Field(
        None,
        description="Folder of the model's decomposition, which is made when it is missing; without one, "
        "a folder in factors, under `out`.",
    )
    domains: dict[str, DomainConfig] = Field(
        min_length=1, description="Domains by their names; one expert is trained for each."
    )
    adapter: AdapterConfig = Field(AdapterConfig(), description="What is trained: SVF, or a baseline beside it.")
    preset: Literal["default", "paper"] = Field(
        "default", description="Values that are laid under `rl`: none (default), or Table 6 of the paper (paper)."
    )
    rl: RLConfig = Field(RLConfig(), description="RL settings that all domains share.")
    targets: tuple[str, ...] | None = Field(
        None, min_length=1,
        description='Patterns of matrices to adapt, such as "*.mlp.*"; else all linear layers of the decoder and '
        'no routed MoE expert. One without a match there, such as "*vision_tower*", chooses what pictures go through.',
    )  # fmt: skip
    layers: str | None = Field(
        None, coerce_numbers_to_str=True, description='Decoder layers to adapt, such as "0-3,8"; else all of them.'
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description='What the model\'s chat template gets besides the messages, such as {"enable_thinking": false}.'
    )
    date: str | None = Field(
        None, pattern=r"^\d{4}-\d{2}-\d{2}$",
        description='The day that chat templates are told, as "2026-01-31"; without one, that of the run\'s start.',
    )  # fmt: skip
    seed: int = Field(0, description="Seed of all randomness of the job: the prompts, the rollouts and the initial z.")
    workers: int | str = Field(
        1, description="Number of Ray Train workers per domain, or 1-4 for what fits; 0 trains in this process."
    )
    domains_per_worker: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="Number of domains that a worker trains in lockstep on one copy of the model, or auto for as "
        "many as would else have to wait; more than 1 needs workers: 1 or 0.",
    )  # fmt: skip
    cpus: float | None = Field(
        None, gt=0, description="CPUs per worker, and its number of threads, rounded down; without a number, its share "
        "of the cluster less one core.",
    )  # fmt: skip
    gpus: float = Field(
        0.0, ge=0, description="GPUs per worker; with 2 or more, the worker's model is divided over them."
    )
    verifiers: int = Field(
        1, ge=0, description="Number of verifier processes per worker; 0 verifies in the worker itself."
    )
    verify_timeout_s: float = Field(
        10.0, gt=0, description="Time limit of one call of a reward function, in seconds; one that is late scores -1."
    )
    unsafe_code: bool = Field(
        False, description="Whether model-written code may run on a machine that cannot isolate it."
    )
    code: FilePath = Field(
        "",
        description="Folder that holds the modules of the reward functions; without one, that of the YAML file.",
    )
    fail_fast: bool = Field(
        False, description="Whether a domain that fails ends the others at once; else they train to their end."
    )
    track: tuple[Literal["wandb", "mlflow"], ...] = Field(
        (), description="Trackers that are told of each step beside TensorBoard; each needs the extra of its name."
    )

    @field_validator("domains")
    @classmethod
    def _names(cls, domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        for name in domains:
            check_name(name, "domain")
        if not any(domain.train for domain in domains.values()):
            raise ValueError("no domain is left to train; leave out train: false of one")
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

    @property
    def trains(self) -> tuple[str, ...]:
        """The domains that the job trains, in its order: all but those with `train: false`."""
        return tuple(name for name, domain in self.domains.items() if domain.train)

    @property
    def labels(self) -> tuple[str, ...]:
        """The domains that a classification domain tells apart: all that are none themselves, trained here or not."""
        return tuple(name for name, domain in self.domains.items() if domain.others is None)

    @property
    def trained(self) -> AdapterConfig:
        """The adapter, with the job's `targets` and `layers` where it has none of its own."""
        return self.adapter.within(self.targets, self.layers, {rl.init for rl in self.domain_settings.values()})

    @model_validator(mode="after")
    def _settings_of_domains(self) -> TrainConfig:
        _ = self.domain_settings, self.trained  # a wrong key of a domain's `rl` is refused here
        if (several := self.domains_per_worker) not in (1, "auto") and self.span[1] > 1:
            raise ValueError(f"domains_per_worker: {several} needs workers: 1 or 0, not {self.workers!r}")
        return self

    @cached_property
    def domain_settings(self) -> Mapping[str, RLConfig]:
        """Every domain's RL settings by its name: `rl` with the domain's own `rl` over it."""
        shared = self.rl.model_dump()
        return {
            name: validate(RLConfig, shared | domain.rl, where=f"domains.{name}.rl")
            for name, domain in self.domains.items()
        }

    def domain_rl(self, domain: str) -> RLConfig:
        """The RL settings of one domain."""
        return self.domain_settings[domain]

    @cached_property
    def digest(self) -> str:
        """Equal for configurations that come to the same z step by step: as `digest_of`."""
        return digest_of(self.resume_fields())

    def resume_fields(self) -> dict[str, Any]:
        """What a resume must not change, as plain values: everything that changes what a step does to z."""
        return lasting(self.model_dump(mode="json"))


def load(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """The training job in a YAML file, with overrides; paths in it are relative to the working folder.

    Raises:
        ConfigError: the file, a key or a value is wrong.
    """
    path = Path(expanded(str(path)))
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
    return config
