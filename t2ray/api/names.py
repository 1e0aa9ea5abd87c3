"""From a request's model name to what answers: a strategy, which decides in pass 1, or a mixture.

| name | what answers |
| --- | --- |
| `t2ray` | the endpoint's default strategy |
| `t2ray:prompt`, `t2ray:cls` | the mixture that this strategy decides for |
| `t2ray:base` | the base model |
| `t2ray:fewshot/NAME` | a saved mixture |
| `t2ray:NAME`, `t2ray:a:0.7,b:0.3` | an expert, a mixture |

If an expert has one of the names above, `t2ray:NAME:1` reaches it. Not here: pass 1 itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from t2ray.adapt.strategies import FEWSHOT
from t2ray.api.backend import Catalog, ExpertInfo
from t2ray.api.errors import SERVER, Refusal
from t2ray.config.files import nearest
from t2ray.core import ConfigError, Mixture

STRATEGIES = ("prompt", "cls")
RESERVED = {*STRATEGIES, "base"}
HEAVIEST = 16.0  # weights far above any that a search finds make the model's numbers overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What a model name means. `mixture` is None if pass 1 decides; the answer reports `strategy`."""

    kind: Literal["strategy", "base", "expert", "mixture"]
    strategy: str
    mixture: Mixture | None = None


def resolve(model: str, catalog: Catalog, *, broken: bool = False) -> Route:
    """Returns what the name `model` means.

    Args:
        broken: resolve a name although an expert is damaged, and a saved mixture although an expert is missing.

    Raises:
        Refusal: 404 for an unknown name, with the nearest known one; 400 for a weight that is no number or too large;
            503 for an expert that exists and cannot be used.
    """
    prefix, colon, name = model.partition(":")
    if model == "t2ray":
        name = catalog.default
    elif prefix != "t2ray" or not colon:
        raise unknown(model, catalog)
    if name in STRATEGIES:
        if name not in catalog.strategies:
            if name == "cls":  # one that is damaged is named
                usable(Mixture.of({info.name: 1.0 for info in catalog.experts.values() if info.classifies}), catalog)
            raise unknown(model, catalog, why="there is no classification expert" if name == "cls" else "")
        return Route(kind="strategy", strategy=name)
    if name == "base":
        return Route(kind="base", strategy="base", mixture=Mixture.base())
    if name.startswith(FEWSHOT):
        mixture = catalog.mixtures.get(name.removeprefix(FEWSHOT))
        if mixture is None:
            raise unknown(model, catalog)
        return Route(kind="mixture", strategy="fewshot", mixture=mixture if broken else usable(mixture, catalog))
    if not all(part.strip().partition(":")[0] in catalog.experts for part in name.split(",")):
        raise unknown(model, catalog)
    mixture = _parse(name)
    return Route(
        kind="expert" if name in catalog.experts else "mixture",
        strategy="fixed",
        mixture=mixture if broken else usable(mixture, catalog),
    )


def usable(mixture: Mixture, catalog: Catalog) -> Mixture:
    """Returns `mixture` itself if all its experts exist and can be used.

    Raises:
        Refusal: 404 for a missing expert, 503 for a damaged one.
    """
    for name in mixture.names:
        expert = known_expert(name, catalog, param="model")
        if expert.problem is not None:
            raise Refusal(
                status=503,
                message=f"expert {name!r} cannot be used: {expert.problem}",
                type=SERVER,
                param="model",
                code="expert_unavailable",
                retry_after=5,
            )
    return mixture


def known_expert(name: str, catalog: Catalog, param: str | None = None) -> ExpertInfo:
    """Returns the expert of that name.

    Raises:
        Refusal: 404, there is none.
    """
    if name not in catalog.experts:
        message = f"there is no expert {name[:80]!r}{nearest(name[:80], catalog.experts)}"
        raise Refusal(status=404, message=message, param=param, code="expert_not_found")
    return catalog.experts[name]


def names(catalog: Catalog) -> Iterable[str]:
    """Yields all model names except mixtures in the form `t2ray:a:0.7,b:0.3`, of which there is no end."""
    if catalog.default in (*catalog.strategies, "base"):
        yield "t2ray"
    yield from (f"t2ray:{name}" for name in STRATEGIES if name in catalog.strategies)
    yield "t2ray:base"
    yield from (f"t2ray:{name}:1" if name in RESERVED else f"t2ray:{name}" for name in catalog.experts)
    yield from (f"t2ray:{FEWSHOT}{name}" for name in catalog.mixtures)


def unknown(model: str, catalog: Catalog, why: str = "") -> Refusal:
    """The refusal of an unknown model name: 404, with the nearest known name."""
    message = f"the model {model[:200]!r} does not exist{f' ({why})' if why else ''}"
    return Refusal(
        status=404, message=message + nearest(model[:80], names(catalog)), param="model", code="model_not_found"
    )


def _parse(text: str) -> Mixture:
    try:
        mixture = Mixture.parse(text)
    except ConfigError as error:
        raise Refusal(status=400, message=str(error), param="model", code="invalid_value") from None
    for name, alpha in mixture.weights:
        if max(map(abs, alpha)) > HEAVIEST:
            raise Refusal(
                status=400,
                message=f"the weight of expert {name!r} is {alpha[0]:g}; it must lie in -{HEAVIEST:g}..{HEAVIEST:g}",
                param="model",
                code="invalid_value",
            )
    return mixture
