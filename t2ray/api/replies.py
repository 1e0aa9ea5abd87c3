"""What the API answers about models, experts and adaptations.

The dataclasses are also the response schemas of `/openapi.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from t2ray.api.backend import Adaptation, Catalog, ExpertInfo
from t2ray.api.names import resolve
from t2ray.api.shapes import MixtureWeights, weights


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReply:
    """One model in OpenAI's list; `created` is in seconds since 1970, `t2ray` says what answers to the name."""

    id: str
    created: int
    t2ray: ModelExtension
    object: Literal["model"] = "model"
    owned_by: str = "t2ray"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelExtension:
    """What answers to a model name; `mixture` is None for a strategy, which decides per request."""

    kind: Literal["strategy", "base", "expert", "mixture"]
    strategy: str
    mixture: MixtureWeights | None
    base: str
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsReply:
    """OpenAI's list of models."""

    data: list[ModelReply]
    object: Literal["list"] = "list"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsReply:
    """The list of all experts, and what is wrong in the registry (`Catalog.problems`)."""

    data: list[ExpertInfo]
    problems: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatReply:
    """The mean of |z - 1| per decoder layer (rows) and kind of matrix (columns)."""

    layers: list[int]
    kinds: list[str]
    values: list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertReply:
    """One expert; `heat` is None if it cannot be read."""

    name: str
    version: int
    domain: str | None
    accuracy: float | None
    created: str
    classifies: bool
    labels: list[str]
    problem: str | None
    heat: HeatReply | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedReply:
    """The version of an expert that has been saved."""

    name: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedReply:
    """The name of an expert that has been deleted with all its versions."""

    name: str
    deleted: Literal[True] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptationReply:
    """The state of a few-shot search; `model` is the model name of its mixture, once it has succeeded."""

    id: str
    name: str
    status: Literal["queued", "running", "succeeded", "failed"]
    progress: float
    accuracy: float | None
    seconds: float
    mixture: MixtureWeights | None
    error: str | None
    created: str
    model: str | None

    @classmethod
    def of(cls, adaptation: Adaptation) -> AdaptationReply:
        return cls(
            id=adaptation.id,
            name=adaptation.name,
            status=adaptation.status,
            progress=adaptation.progress,
            accuracy=adaptation.accuracy,
            seconds=adaptation.seconds,
            mixture=None if adaptation.mixture is None else weights(adaptation.mixture),
            error=adaptation.error,
            created=adaptation.created,
            model=f"t2ray:fewshot/{adaptation.name}" if adaptation.status == "succeeded" else None,
        )


def model_reply(model: str, catalog: Catalog) -> ModelReply:
    """Describes a model name.

    Raises:
        Refusal: 404 or 400, the name means nothing.
    """
    route = resolve(model, catalog, broken=True)
    names = route.mixture.names if route.mixture else ()
    experts = [catalog.experts[name] for name in names if name in catalog.experts]
    problems = [f"expert {expert.name!r}: {expert.problem}" for expert in experts if expert.problem]
    problems += [f"there is no expert {name!r}" for name in names if name not in catalog.experts]
    try:
        created = int(datetime.fromisoformat(max((expert.created for expert in experts), default="")).timestamp())
    except (ValueError, OverflowError):  # none, or what a manifest from elsewhere says
        created = 0
    return ModelReply(
        id=model,
        created=created,
        t2ray=ModelExtension(
            kind=route.kind,
            strategy=route.strategy,
            mixture=None if route.mixture is None else weights(route.mixture),
            base=catalog.base,
            problem="; ".join(problems) or None,
        ),
    )
