"""What a job trains in place of a model's weights: SVF, or a baseline to compare it with. No torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from t2ray.config.files import Strict

# The settings that each kind has, with their defaults.
_SETTINGS: dict[str, dict[str, Any]] = {
    "svf": {"numbers": None, "tied": None},
    "lora": {"rank": 16, "alpha": 32},
    "dora": {"rank": 16, "alpha": 32},
    "ia3": {},
    "tinylora": {"rank": 2, "numbers": 64, "tying": 0.0},
}


class AdapterConfig(Strict):
    """What is trained in place of the weights. `svf` is t2ray's own; the others are baselines, and need `peft`."""

    kind: Literal["svf", "lora", "dora", "ia3", "tinylora"] = Field(
        "svf",
        description="SVF (svf); or, through PEFT, LoRA (lora), DoRA (dora), IA3 (ia3) or TinyLoRA (tinylora).",
    )
    rank: int | None = Field(
        None, ge=1, description="Rank of LoRA and DoRA, 16 without one; of TinyLoRA's frozen factors, 2 without one."
    )
    alpha: float | None = Field(
        None, gt=0, description="LoRA's and DoRA's alpha: the change is scaled by alpha / rank; 32 without one."
    )
    numbers: int | None = Field(
        None,
        ge=1,
        description="Trained numbers for each group of matrices that share them, or for each matrix. SVF's scale the "
        "largest singular values, and all of them without one; TinyLoRA has 64 without one.",
    )
    tied: Literal["layers", "all"] | None = Field(
        None,
        description="Matrices with SVF's numbers in common: those of one kind in all layers (layers), or all (all); "
        "without one, each matrix has its own.",
    )
    tying: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of TinyLoRA's matrices with numbers in common, from none (0) to all (1); 0 without one.",
    )
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="Patterns of the matrices to adapt; without any, the job's `targets`."
    )
    layers: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        description='Decoder layers to adapt, such as "0-3,8"; without any, the job\'s `layers`.',
    )

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> AdapterConfig:
        known = _SETTINGS[self.kind]
        for name in {name for settings in _SETTINGS.values() for name in settings} - known.keys():
            if getattr(self, name) is not None:
                raise ValueError(f"{self.kind} has no {name}; it has {', '.join(known) or 'no settings'}")
        return self

    def within(self, targets: tuple[str, ...] | None, layers: str | None, inits: Collection[str]) -> AdapterConfig:
        """The adapter of a job with these targets and layers, which it has where it names none, and these `rl.init`.

        Raises:
            ValueError: both name some, or SVF's few numbers would begin as a sigmoid.
        """
        if self.kind == "svf" and (self.numbers or self.tied) and "sigmoid" in inits:
            raise ValueError("adapter.numbers and adapter.tied need rl.init: scale, not sigmoid")
        for key, of_job in (("targets", targets), ("layers", layers)):
            if None not in (of_job, getattr(self, key)):
                raise ValueError(f"{key} and adapter.{key} say the same; leave one out")
        return self.model_copy(update={"targets": self.targets or targets, "layers": self.layers or layers})

    @model_serializer(mode="wrap")
    def _as_before(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out the key that came later where it says nothing, so that digests of older files stand."""
        return {key: value for key, value in values(self).items() if key != "tied" or value is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of this kind, with defaults where none were given."""
        given = {name: getattr(self, name) for name in _SETTINGS[self.kind]}
        return {name: default if given[name] is None else given[name] for name, default in _SETTINGS[self.kind].items()}

    @property
    def method(self) -> str:
        """What an expert's numbers mean: `"svf"`, `"lora rank=16 alpha=32"`. Equal for those that can be mixed.

        An expert of SVF has the z of all singular values, whichever of them were trained.
        """
        settings = {} if self.kind == "svf" else self.settings
        return " ".join([self.kind, *(f"{name}={value:g}" for name, value in settings.items())])
