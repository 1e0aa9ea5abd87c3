"""Which of a model's matrices are adapted (the targets): chosen by the kinds of its modules, under their names there.

Targets lie in the numbered layers of the language decoder: the weight of every linear layer (`torch.nn.Linear`, and
`Conv1D`, as GPT-2 calls it), and each matrix of the MoE experts, which are stored together. Embeddings, head, norms and
what chooses between MoE experts are never targets. By name alone, linear layers are that pictures go through before.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from t2ray.core import ConfigError, ModelError
from t2ray.models.families import layer_of, layers_prefix, sees_by

ROUTERS = {"router", "gate", "shared_expert_gate"}
"""What modules are called that choose between MoE experts, where they are linear layers."""

MOE_MATRICES = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers calls the parameters in which a layer's MoE experts are stored together, (experts, ., .)."""

ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One adapted matrix, m x n: `Target(name="model.layers.0.self_attn.q_proj", layer=0, m=64, n=64, rank=64)`.

    `m` are its outputs, `n` its inputs, however it is stored. `layer` is the decoder's, and -1 of one that pictures
    go through before it: in the vision tower, or behind. A matrix of an MoE expert has that one's number in its name,
    `model.layers.0.mlp.experts.3.down_proj`, and as `expert`. A domain's expert has `rank` numbers for a matrix;
    `method` says what they mean (`AdapterConfig.method`).
    """

    name: str
    layer: int
    m: int
    n: int
    rank: int
    expert: int | None = None
    method: str = "svf"

    @property
    def in_tower(self) -> bool:
        """Whether it is a matrix that pictures go through before the decoder."""
        return self.layer < 0

    @property
    def depth(self) -> int:
        """The decoder's layer that it counts with, where a mixture has weights by layer: of the tower the first."""
        return max(self.layer, 0)

    @property
    def parameter(self) -> str:
        """The name of the parameter that it is, or is part of."""
        if self.expert is None:
            return f"{self.name}.weight"
        module, _, matrix = self.name.rpartition(".")
        return f"{module.rpartition('.')[0]}.{matrix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The chosen targets, in the order of the model, and what of the decoder's layers they leave out.

    `share` is that of the numbers in the layers' matrices which are adapted, 0 to 1. `left_out` are the kinds of
    matrices that are not, in some layer or in all, such as "mlp.experts.down_proj".
    """

    targets: tuple[Target, ...]
    share: float
    left_out: tuple[str, ...]


def adapted(share: float, left_out: Sequence[str], targets: Sequence[Target]) -> str:
    """What is adapted and what is not, as a sentence; arguments as in `Selection`."""
    percent = f"{100 * share:.0f} %" if share in (0, 1) or 0.01 < share < 0.995 else f"{100 * share:.2f} %"
    tower = sum(target.in_tower for target in targets)
    seen = f" and {tower} matrices of the vision tower and its projector" if tower else ""
    rest = f"; left out: {', '.join(left_out)} (choose by targets and layers)" if left_out else ""
    return f"adapted: {percent} of the decoder layers' weights{seen}{rest}"


def select_targets(hf: Any, patterns: Sequence[str] | None = None, layers: str | None = None) -> Selection:
    """Chooses the matrices to adapt.

    Args:
        hf: the transformers module, which may be on the meta device.
        patterns: globs over the names, such as "*.mlp.*" or "*.experts.*". By default all linear layers are chosen,
            and no matrix of a routed MoE expert. A pattern that no matrix of the decoder matches, such as
            "*vision_tower*", chooses among those that pictures go through before it.
        layers: the numbers of the decoder's layers to choose from, such as "0-3,8"; by default all. Of a vision tower
            they choose nothing.

    Raises:
        ConfigError: a pattern matches no matrix, or the model does not have these layers.
        ModelError: the model has no linear layers where they are looked for.
    """
    found = sorted(_candidates(hf), key=_order)
    decoder = [target for target in found if not target.in_tower]
    if not decoder:
        names = [name for name, module in hf.named_modules() if isinstance(module, nn.Linear)]
        raise ModelError(f"{type(hf).__name__} has no linear layers in a numbered layer of its decoder; {_some(names)}")
    if patterns is None:
        chosen = [target for target in decoder if target.expert is None]
    else:
        matched = {target for pattern in patterns for target in _matched(found, pattern)}
        chosen = [target for target in found if target in matched]
    if layers is not None:
        wanted, there = parse_layers(layers), {target.layer for target in chosen if not target.in_tower}
        if not there:
            raise ConfigError(f"layers {layers!r}: the targets are none of the decoder's; leave layers out")
        if not wanted <= there:
            raise ConfigError(
                f"layers {layers!r}: the model has no targets in layer {min(wanted - there)}; it has them in layers "
                f"{min(there)} to {max(there)}"
            )
        chosen = [target for target in chosen if target.in_tower or target.layer in wanted]
    return _selection(hf, chosen)


def matrix(hf: Any, target: Target) -> tuple[Tensor, Tensor | None]:
    """A target's weight, (m, n), and bias, (m,), as views of the parameters of a module of transformers.

    Raises:
        AttributeError: the module has no such parameter.
    """
    module, _, attribute = target.parameter.rpartition(".")
    return stored(hf.get_submodule(module), attribute, target.expert)


def stored(module: nn.Module, attribute: str, expert: int | None) -> tuple[Tensor, Tensor | None]:
    """As `matrix`, of the module's parameter of this name, or of one expert's part of it."""
    weight: Tensor = getattr(module, attribute)
    bias: Tensor | None = getattr(module, "bias" if expert is None else f"{attribute}_bias", None)
    if expert is not None:
        weight, bias = weight[expert], None if bias is None else bias[expert]
    return (weight.t() if is_transposed(module) else weight), bias


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores (inputs, outputs): `Conv1D`, and MoE experts of which transformers' interface says so."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return False
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", True))  # Llama 4's experts do not say


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


def _matched(found: Sequence[Target], pattern: str) -> list[Target]:
    """The targets that a pattern means: the decoder's where it matches any, so that the tower's are named as such.

    Raises:
        ConfigError: it matches none.
    """
    matched = [target for target in found if fnmatch.fnmatchcase(target.name, pattern.removesuffix(".weight"))]
    if not matched:
        names = [[target.name for target in found if target.in_tower is tower] for tower in (False, True)]
        seen = f", and in its vision tower like {names[1][0]!r}" if names[1] else ""
        raise ConfigError(f"the target pattern {pattern!r} matches no matrix; {_some(names[0])}{seen}")
    return [target for target in matched if not target.in_tower] or matched


def _candidates(hf: Any) -> list[Target]:
    """Every matrix that may be adapted."""
    from transformers.pytorch_utils import Conv1D

    prefix, found = layers_prefix(hf), list[Target]()
    for name, module in sees_by(hf).items():
        if isinstance(module, nn.Linear):
            m, n = module.weight.shape
            found.append(Target(name=name, layer=-1, m=m, n=n, rank=min(m, n)))
    for name, module in hf.named_modules():
        layer = layer_of(name, prefix)
        if layer is None:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            m, n = _sizes(module, module.weight)
            if m > 1 and not ROUTERS & set(name.split(".")):
                found.append(Target(name=name, layer=layer, m=m, n=n, rank=min(m, n)))
            continue
        for attribute in MOE_MATRICES:
            stored = getattr(module, attribute, None)
            if isinstance(stored, nn.Parameter) and stored.ndim == 3:
                m, n = _sizes(module, stored)
                found += [
                    Target(name=f"{name}.{i}.{attribute}", layer=layer, m=m, n=n, rank=min(m, n), expert=i)
                    for i in range(len(stored))
                ]
    return found


def _sizes(module: nn.Module, stored: Tensor) -> tuple[int, int]:
    """Outputs and inputs of a matrix, or of each one of a stack."""
    first, second = stored.shape[-2:]
    return (second, first) if is_transposed(module) else (first, second)


def _selection(hf: Any, chosen: Sequence[Target]) -> Selection:
    prefix = layers_prefix(hf)
    matrices = {name: p.numel() for name, p in hf.named_parameters() if p.ndim > 1 and not name.endswith("bias")}
    parts = {name: numbers for name, numbers in matrices.items() if layer_of(name, prefix) is not None}
    whole = sum(parts.values())
    for target in chosen:
        if not target.in_tower:
            parts[target.parameter] -= target.m * target.n
    kinds = dict.fromkeys(_kind(name.removeprefix(prefix)) for name, numbers in parts.items() if numbers)
    return Selection(targets=tuple(chosen), share=1 - sum(parts.values()) / whole, left_out=tuple(kinds))


def _kind(name: str) -> str:
    """`mlp.down_proj` of `3.mlp.down_proj.weight`."""
    return name.partition(".")[2].removesuffix(".weight")


def _order(target: Target) -> tuple[int, int, list[tuple[int, str]]]:
    """Sort key: by layer, then q k v o gate up down, then by name with numbers as numbers; a tower's as they are."""
    if target.in_tower:
        return target.layer, 0, []
    last = target.name.rpartition(".")[2]
    natural = [(int(part), "") if part.isdigit() else (-1, part) for part in target.name.split(".")]
    return target.layer, ORDER.index(last) if last in ORDER else len(ORDER), natural


def _some(names: Sequence[str]) -> str:
    return "its names look like " + ", ".join(repr(name) for name in names[:3])
