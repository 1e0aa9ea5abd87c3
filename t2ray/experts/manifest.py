"""What a registry says of an expert and of a saved mixture, beside their numbers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from t2ray.config.adapter import AdapterConfig
from t2ray.core import ExpertError, Mixture, __version__
from t2ray.prompts import OTHERS


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class ExpertManifest(BaseModel):
    """What an expert is and where it comes from.

    `targets` has (name, rank) of each adapted matrix. `adapter` is empty for SVF, else the `AdapterConfig` that gives
    the numbers their meaning. The parametrisation `scale` says that z itself is stored, of
    which 1 is the base model. `rescaled` says that the factor `sum(s) / sum(s * z)` of each matrix is part of its z.
    `digest` is that of z, which every load compares; experts of earlier versions have none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: Literal[1] = 1
    name: str
    version: int = Field(ge=1)
    base_digest: str
    digest: str | None = None
    targets: tuple[tuple[str, int], ...]
    adapter: dict[str, Any] = {}
    parametrisation: Literal["scale"] = "scale"
    rescaled: bool = False
    domain: str | None = None
    config: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    seed: int | None = None
    t2ray: str = __version__
    created: str = Field(default_factory=_now)

    @property
    def method(self) -> AdapterConfig:
        """What was trained.

        Raises:
            ExpertError: this t2ray does not know it.
        """
        try:
            return AdapterConfig.model_validate(self.adapter)
        except ValidationError as error:
            raise ExpertError(
                f"expert {self.name!r}: its manifest has an adapter unknown here: {first_mistake(error)}"
            ) from None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that a classification expert was trained to tell apart, "others" last; empty for other experts."""
        labels = self.config.get("labels")
        return tuple(map(str, labels)) if isinstance(labels, list) and labels[-1:] == [OTHERS] else ()


class MixtureRecord(BaseModel):
    """A saved mixture: `weights={"math": (0.7,)}`, and in `meta` how it was found."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: Literal[1] = 1
    name: str
    weights: dict[str, tuple[float, ...]]
    meta: dict[str, Any] = {}
    created: str = Field(default_factory=_now)

    @property
    def mixture(self) -> Mixture:
        return Mixture.of(self.weights)


def first_mistake(error: ValidationError) -> str:
    """What is wrong first with a file: the key, and why."""
    detail = error.errors()[0]
    return f"{'.'.join(map(str, detail['loc'])) or 'file'}: {detail['msg']}"
