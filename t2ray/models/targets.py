"""Which of a model's matrices are adapted (the targets): chosen by the names and shapes of its tensors alone."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2ray.core import ConfigError

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
PROJECTION = re.compile(r"(?:^|\.)(?:\w*attn|\w*attention|mlp|feed_forward|ffn)\.")
OTHER_TOWER = re.compile(r"vision|visual|audio|encoder")
NEVER = re.compile(r"(?:^|[._])(?:embed\w*|wte|wpe|lm_head|\w*norm|ln_\w+|router)(?:$|\.)|\.gate$")
ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One adapted matrix, m x n: `Target(name="model.layers.0.self_attn.q_proj", layer=0, m=64, n=64, rank=64)`.

    An expert has `rank` numbers for it, and `method` says what they mean (`AdapterConfig.method`).
    """

    name: str
    layer: int
    m: int
    n: int
    rank: int
    method: str = "svf"


def select_targets(
    shapes: Mapping[str, tuple[int, ...]], patterns: Sequence[str] | None = None, layers: str | None = None
) -> list[Target]:
    """Returns the matrices to adapt, in the order of the model. Embeddings, head, norms and routers are never targets.

    Args:
        shapes: the shape of each of the model's tensors by name.
        patterns: globs over the names without ".weight", such as "*.mlp.*". By default all attention and MLP
            projections of the numbered decoder layers are chosen.
        layers: the numbers of the layers to choose from, such as "0-3,8"; by default all.

    Raises:
        ConfigError: a pattern matches no matrix, or the model does not have these layers.
    """
    found = []
    for name, shape in shapes.items():
        place = LAYER.search(name)
        if len(shape) == 2 and name.endswith(".weight") and place:
            target = name.removesuffix(".weight")
            if not NEVER.search(target):
                m, n = shape
                found.append(Target(name=target, layer=int(place[1]), m=m, n=n, rank=min(m, n)))
    found.sort(key=_order)
    if patterns is None:
        chosen = [t for t in found if PROJECTION.search(t.name) and not OTHER_TOWER.search(t.name)]
        if not chosen:
            raise ConfigError(f"the model has no attention or MLP projections in numbered layers; {_names(shapes)}")
    else:
        patterns = [pattern.removesuffix(".weight") for pattern in patterns]
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(t.name, pattern) for t in found):
                raise ConfigError(
                    f"the target pattern {pattern!r} matches no matrix; {_names([t.name for t in found])}"
                )
        chosen = [t for t in found if any(fnmatch.fnmatchcase(t.name, pattern) for pattern in patterns)]
    if layers is None:
        return chosen
    wanted, there = parse_layers(layers), {t.layer for t in chosen}
    if not wanted <= there:
        raise ConfigError(
            f"layers {layers!r}: the model has no targets in layer {min(wanted - there)}; it has them in layers "
            f"{min(there)} to {max(there)}"
        )
    return [t for t in chosen if t.layer in wanted]


def _order(target: Target) -> tuple[str, int, int, list[tuple[int, str]]]:
    """Sort key: by stack of layers, by layer, then q k v o gate up down, then by name with numbers as numbers."""
    prefix, last = target.name[: target.name.index(f".{target.layer}.")], target.name.rpartition(".")[2]
    natural = [(int(part), "") if part.isdigit() else (-1, part) for part in target.name.split(".")]
    return prefix, target.layer, ORDER.index(last) if last in ORDER else len(ORDER), natural


def _names(names: Sequence[str] | Mapping[str, Any]) -> str:
    return "its names look like " + ", ".join(repr(name) for name in list(names)[:3])


def parse_layers(text: str) -> set[int]:
    """Returns `{0, 1, 2, 3, 8}` for "0-3,8".

    Raises:
        ConfigError: `text` is no list of numbers and ranges.
    """
    layers: set[int] = set()
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if span is None or int(span[2] or span[1]) < int(span[1]):
            raise ConfigError(f"layers {text!r}: {part!r} is neither a number nor a range; write for example 0-3,8")
        layers.update(range(int(span[1]), int(span[2] or span[1]) + 1))
    return layers
