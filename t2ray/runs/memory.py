"""What a model takes of each GPU's memory, from its config.json alone: weights, factors, activations, keys and values.

Not here: disks, and the memory that CUDA and its libraries take for themselves (1 to 2 GiB), which `RESERVE` leaves.
Called by `t2ray plan`. The formulas count what this code stores: a dense weight beside its factors (svf.py), a folded
weight while rollouts run, one micro-batch's saved tensors (rl/loss.py), a cache with room for the whole answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from t2ray.core import ConfigError, ResourceError
from t2ray.models.skeleton import skeleton
from t2ray.models.targets import LAYER, Target, select_targets
from t2ray.training.loss import CHUNK_ELEMENTS

GIB = 2**30
RESERVE = 0.9  # of a GPU's memory that a plan fills
MOST_GPUS = 64
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_LOGITS = 6  # float32 copies of a chunk of the vocabulary: both models', their log-softmaxes and a gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """The bytes on one GPU.

    `folded`: the weight of the mixture that rollouts run with. `activations`: what a micro-batch keeps for a gradient.
    `kv`: keys and values. `z`: the experts, and in training AdamW's moments, in serving each row's own. `working`:
    logits and the like.
    """

    weights: int
    factors: int
    folded: int
    activations: int
    kv: int
    z: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        """The most at one time: the rollouts' keys and values are gone before a gradient is computed."""
        lasting = self.weights + self.factors + self.folded + self.z + self.working
        return lasting + max(self.activations, self.kv)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model as a plan sees it; `weight_bytes` by layer, with None for the embeddings and -1 for norm and head."""

    parameters: int
    layers: int
    weight_bytes: Mapping[int | None, int]
    targets: tuple[Target, ...]
    size: int
    kv_token_layer: int
    hidden: int
    heads_width: int
    intermediate: int
    vocabulary: int

    @property
    def K(self) -> int:
        return sum(target.rank for target in self.targets)


def shape_of(ref: str, targets: Sequence[str] | None = None, layers: str | None = None) -> ModelShape:
    """Reads a model's config.json; no weight is needed.

    Raises:
        ModelError: no such model.
        ConfigError: targets or layers that it does not have.
    """
    shapes, config = skeleton(ref)
    text = config.get_text_config()
    dtype = str(getattr(text, "dtype", None) or getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    size = _BYTES.get(dtype, 4)
    weight_bytes: dict[int | None, int] = {}
    for name, dimensions in shapes.items():
        place = LAYER.search(name)
        where = int(place[1]) if place else (None if "embed" in name or "wte" in name else -1)
        count = size
        for dimension in dimensions:
            count *= dimension
        weight_bytes[where] = weight_bytes.get(where, 0) + count
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return ModelShape(
        parameters=sum(weight_bytes.values()) // size,
        layers=int(text.num_hidden_layers),
        weight_bytes=weight_bytes,
        targets=tuple(select_targets(shapes, targets, layers)),
        size=size,
        kv_token_layer=2 * kv_heads * width * size,
        hidden=int(text.hidden_size),
        heads_width=heads * width,
        intermediate=int(getattr(text, "intermediate_size", 4 * text.hidden_size)),
        vocabulary=int(text.vocab_size),
    )


def training(shape: ModelShape, gpus: int, *, micro_batch: int, tokens: int, rows: int) -> list[GpuMemory]:
    """The load of each GPU of a training worker that holds the layers in order.

    Args:
        tokens: of the longest prompt with its answer.
        rows: rollouts that are generated at once.
    """
    first = min(target.layer for target in shape.targets)

    def one(layer: int) -> GpuMemory:
        mine = [target for target in shape.targets if target.layer == layer]
        # The gradient goes from the head down to the lowest target: below it nothing is kept for it.
        kept = _saved(shape, mine) * micro_batch * tokens if layer >= first else 0
        return _layer(shape, layer, mine, kv=shape.kv_token_layer * tokens * rows, activations=kept, folded=True)

    logits = min(micro_batch * tokens * shape.vocabulary, CHUNK_ELEMENTS) * 4 * _LOGITS
    return _spread(shape, gpus, [one(layer) for layer in range(shape.layers)], last=logits, z=shape.K * 4 * 5)


def serving(shape: ModelShape, gpus: int, *, kv_tokens: int, rows: int, experts: int) -> list[GpuMemory]:
    """The load of each GPU of a serving replica with room for `kv_tokens` and so many rows in a batch."""

    def one(layer: int) -> GpuMemory:
        mine = [target for target in shape.targets if target.layer == layer]
        return _layer(shape, layer, mine, kv=shape.kv_token_layer * kv_tokens, activations=0, folded=False)

    working = rows * 4 * (shape.vocabulary + 4 * shape.intermediate)
    z = shape.K * 4 * (experts + 3 * rows)  # each row's, and what becomes of it in a step, twice
    return _spread(shape, gpus, [one(layer) for layer in range(shape.layers)], last=working, z=z)


def least_gpus(loads: Any, memory: int, what: str) -> int:
    """The smallest number of GPUs, each of `memory` bytes, for which `loads(gpus)` fits.

    Raises:
        ResourceError: not even `MOST_GPUS` are enough.
    """
    gpus = 1
    while max(load.total for load in loads(gpus)) > RESERVE * memory:
        gpus += 1
        if gpus > MOST_GPUS:
            least = max(load.total for load in loads(MOST_GPUS))
            raise ResourceError(
                f"{what} does not fit on {MOST_GPUS} GPUs of {memory / GIB:.0f} GiB: the fullest would hold "
                f"{least / GIB:.1f} GiB; lower micro_batch or tokens, or adapt fewer layers"
            )
    return gpus


def _layer(
    shape: ModelShape, layer: int, mine: Sequence[Target], *, kv: int, activations: int, folded: bool
) -> GpuMemory:
    dense = sum(target.m * target.n for target in mine) * shape.size
    return GpuMemory(
        weights=shape.weight_bytes.get(layer, 0),
        factors=sum((target.m + target.n) * target.rank for target in mine) * shape.size,
        folded=dense if folded else 0,
        activations=activations,
        kv=kv,
    )


def _saved(shape: ModelShape, mine: Sequence[Target]) -> int:
    """Bytes that one layer keeps for one token's gradient.

    `x V` of each target; queries, keys (repeated for their groups), values and the attention's output; the gate, its
    activation and the up projection; and the two norms' inputs in float32.
    """
    inner = sum(target.rank for target in mine) + 4 * shape.heads_width + 3 * shape.intermediate
    return inner * shape.size + 2 * shape.hidden * 4


def _spread(shape: ModelShape, gpus: int, layers: Sequence[GpuMemory], *, last: int, z: int) -> list[GpuMemory]:
    """Layers in order over the GPUs, about evenly; the embeddings on the first, norm, head and logits on the last."""
    if not 1 <= gpus <= len(layers):
        raise ConfigError(f"gpus is {gpus}; a model of {len(layers)} layers spreads over 1 to {len(layers)}")
    ends = (shape.weight_bytes.get(None, 0), shape.weight_bytes.get(-1, 0))
    whole = sum(load.total for load in layers) + sum(ends) + last
    groups: list[list[GpuMemory]] = [[]]
    filled, done = ends[0], 0.0
    for i, load in enumerate(layers):
        share = (whole - done) / (gpus - len(groups) + 1)
        full = filled + load.total / 2 > share or len(layers) - i <= gpus - len(groups)
        if groups[-1] and full and len(groups) < gpus:
            done += filled
            groups.append([])
            filled = 0
        groups[-1].append(load)
        filled += load.total
    parts = [[sum(getattr(load, field.name) for load in group) for field in fields(GpuMemory)] for group in groups]
    sums = [dict(zip((field.name for field in fields(GpuMemory)), part, strict=True)) for part in parts]
    sums[0]["weights"] += ends[0]
    sums[-1]["weights"] += ends[1]
    sums[-1]["working"] += last
    return [GpuMemory(**{**part, "z": part["z"] + z}) for part in sums]
