"""The memory that a model needs on each GPU, computed from its config.json alone.

The formulas count what t2ray stores: the dense weights beside their factors (`adapters.svf`), a folded weight while
rollouts run, the tensors that one micro-batch saves for its gradient (`training.loss`), and a cache with room for whole
answers. They leave out what CUDA and its libraries take (1 to 2 GiB), for which `RESERVE` leaves room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from t2ray.core import ConfigError, ResourceError
from t2ray.engine.batches import MAX_ROWS, MAX_TOKENS
from t2ray.models.families import layer_of, layers_prefix
from t2ray.models.skeleton import skeleton
from t2ray.models.targets import Selection, Target, select_targets
from t2ray.training.loss import CHUNK_ELEMENTS

GIB = 2**30
RESERVE = 0.9  # the share of a GPU's memory that a plan may fill
MOST_GPUS = 64
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_LOGITS = 6  # float32 copies of a chunk of logits: of both models, their log-softmaxes, a gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """The bytes on one GPU, by purpose.

    `folded` are the weights of the mixture with which rollouts run. `activations` are what a micro-batch saves for its
    gradient. `kv` are keys and values. `z` are the experts, and AdamW's moments (training) or the z of each row
    (serving). `working` are logits and other short-lived tensors.
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
        """The most bytes at one time: keys and values of the rollouts are freed before a gradient is computed."""
        lasting = self.weights + self.factors + self.folded + self.z + self.working
        return lasting + max(self.activations, self.kv)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that a plan needs.

    `weight_bytes` has the bytes per layer, of what comes before the layers (a vision tower, embeddings) under None, of
    what comes after them (the last norm, the head) under -1. `size` is that of one number in bytes, `kv_token_layer`
    the bytes of keys and values per token and layer. `heads_width` is the width of all attention heads together.
    """

    parameters: int
    layers: int
    weight_bytes: Mapping[int | None, int]
    selection: Selection
    size: int
    kv_token_layer: int
    hidden: int
    heads_width: int
    intermediate: int
    vocabulary: int
    keep: float = 1.0

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.selection.targets

    @property
    def K(self) -> int:
        return sum(target.rank for target in self.targets)

    def factors(self, targets: Sequence[Target]) -> int:
        """Returns the bytes of the singular vectors of some targets: of sparse factors, of the share `keep`."""
        return int(self.keep * sum((target.m + target.n) * target.rank for target in targets) * self.size)


def shape_of(ref: str, targets: Sequence[str] | None = None, layers: str | None = None) -> ModelShape:
    """Returns the sizes of a model from its config.json; the weights are not needed.

    Raises:
        ModelError: there is no such model.
        ConfigError: the model does not have these targets or layers.
    """
    hf = skeleton(ref)
    text, prefix = hf.config.get_text_config(decoder=True), layers_prefix(hf)
    dtype = str(getattr(text, "dtype", None) or getattr(hf.config, "dtype", None) or "float32").removeprefix("torch.")
    size = _BYTES.get(dtype, 4)
    weight_bytes: dict[int | None, int] = {}
    before = None  # in this order the modules are divided over GPUs
    for name, parameter in hf.named_parameters():
        layer = layer_of(name, prefix)
        before = before if layer is None else -1
        where = before if layer is None else layer
        weight_bytes[where] = weight_bytes.get(where, 0) + size * parameter.numel()
    heads, width, kv_heads = _attention(text)
    return ModelShape(
        parameters=sum(weight_bytes.values()) // size,
        layers=int(text.num_hidden_layers),
        weight_bytes=weight_bytes,
        selection=select_targets(hf, targets, layers),
        size=size,
        kv_token_layer=2 * kv_heads * width * size,
        hidden=int(text.hidden_size),
        heads_width=heads * width,
        intermediate=_largest(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        vocabulary=int(text.vocab_size),
    )


def _attention(text: Any) -> tuple[int, int, int]:
    """The number of attention heads, their width, and the number of those with keys and values: of the widest layer."""
    sizes = []
    for layer in getattr(text, "per_layer_config", [text]):  # Gemma 4's layers differ
        heads = _largest(layer.num_attention_heads)
        width = int(getattr(layer, "head_dim", None) or layer.hidden_size // heads)
        sizes.append((heads, width, _largest(getattr(layer, "num_key_value_heads", None) or heads)))
    return max(sizes, key=lambda size: size[0] * size[1])


def _largest(value: int | Sequence[int]) -> int:
    """A size of a configuration, of which some have one per layer."""
    return int(value) if isinstance(value, int) else max(value)


def training(
    shape: ModelShape, gpus: int, *, micro_batch: int, tokens: int, rows: int, domains: int = 1
) -> list[GpuMemory]:
    """Returns the memory on each GPU of a training worker, over which the layers are spread in order.

    Args:
        tokens: number of tokens of the longest prompt with its answer.
        rows: number of rollouts of a domain that are generated at once.
        domains: number of domains on the model; their rollouts are generated at once as far as one batch takes them.
    """
    batch = max(rows, min(rows * domains, MAX_ROWS, MAX_TOKENS // tokens))
    first = min(target.depth for target in shape.targets)

    def one(layer: int) -> GpuMemory:
        mine = [target for target in shape.targets if target.depth == layer]
        # The gradient goes from the head down to the lowest target; layers below it save nothing.
        kept = _saved(shape, mine) * micro_batch * tokens if layer >= first else 0
        return _layer(
            shape, layer, mine, kv=shape.kv_token_layer * tokens * batch, activations=kept, folded=shape.size >= 4
        )

    logits = min(micro_batch * tokens * shape.vocabulary, CHUNK_ELEMENTS) * 4 * _LOGITS
    return _spread(shape, gpus, [one(layer) for layer in range(shape.layers)], last=logits, z=shape.K * 4 * 5 * domains)


def serving(shape: ModelShape, gpus: int, *, kv_tokens: int, rows: int, experts: int) -> list[GpuMemory]:
    """Returns the memory on each GPU of a serving replica.

    Args:
        kv_tokens: number of tokens for whose keys and values there is room.
        rows: number of rows in a batch.
        experts: number of experts in memory.
    """

    def one(layer: int) -> GpuMemory:
        mine = [target for target in shape.targets if target.depth == layer]
        return _layer(shape, layer, mine, kv=shape.kv_token_layer * kv_tokens, activations=0, folded=False)

    working = rows * 4 * (shape.vocabulary + 4 * shape.intermediate)
    z = shape.K * 4 * (experts + 3 * rows)  # per row: its own z, and two more of that size in a step
    return _spread(shape, gpus, [one(layer) for layer in range(shape.layers)], last=working, z=z)


def least_gpus(needs: Callable[[int], Sequence[GpuMemory]], memory: int, what: str) -> int:
    """Returns the smallest number of GPUs, each of `memory` bytes, on which a model fits.

    Args:
        needs: number of GPUs -> the memory needed on each.
        what: the model or job, for the error message.

    Raises:
        ResourceError: `MOST_GPUS` are not enough.
    """
    gpus = 1
    while max(gpu.total for gpu in needs(gpus)) > RESERVE * memory:
        gpus += 1
        if gpus > MOST_GPUS:
            least = max(gpu.total for gpu in needs(MOST_GPUS))
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
        factors=shape.factors(mine),
        folded=dense if folded else 0,
        activations=activations,
        kv=kv,
    )


def _saved(shape: ModelShape, mine: Sequence[Target]) -> int:
    """Returns the bytes that one layer saves for one token's gradient.

    These are `x V` of each target; queries, keys (repeated for their groups), values and the attention's output; the
    gate, its activation and the up projection; and the inputs of the two norms in float32.
    """
    inner = sum(target.rank for target in mine) + 4 * shape.heads_width + 3 * shape.intermediate
    return inner * shape.size + 2 * shape.hidden * 4


def _spread(shape: ModelShape, gpus: int, layers: Sequence[GpuMemory], *, last: int, z: int) -> list[GpuMemory]:
    """Spreads the layers in order over the GPUs, about evenly. The first also has what comes before the layers, the
    last what comes after them, and the logits.
    """
    if not 1 <= gpus <= len(layers):
        raise ConfigError(f"gpus is {gpus}; a model of {len(layers)} layers spreads over 1 to {len(layers)}")
    ends = (shape.weight_bytes.get(None, 0), shape.weight_bytes.get(-1, 0))
    whole = sum(layer.total for layer in layers) + sum(ends) + last
    groups: list[list[GpuMemory]] = [[]]
    filled, done = ends[0], 0.0
    for i, layer in enumerate(layers):
        share = (whole - done) / (gpus - len(groups) + 1)
        full = filled + layer.total / 2 > share or len(layers) - i <= gpus - len(groups)
        if groups[-1] and full and len(groups) < gpus:
            done += filled
            groups.append([])
            filled = 0
        groups[-1].append(layer)
        filled += layer.total
    parts = [[sum(getattr(layer, field.name) for layer in group) for field in fields(GpuMemory)] for group in groups]
    sums = [dict(zip((field.name for field in fields(GpuMemory)), part, strict=True)) for part in parts]
    sums[0]["weights"] += ends[0]
    sums[-1]["weights"] += ends[1]
    sums[-1]["working"] += last
    return [GpuMemory(**{**part, "z": part["z"] + z}) for part in sums]
