"""What each worker of vLLM holds of SVF: the factors of its layers, the experts, and which token has which gains.

All tensors that a forward reads stand where they were allocated, so that a captured CUDA graph reads today's numbers.
Not here: who calls it when (`runner`), and the layers' product (`layers`).

Shapes: S slots of requests, K singular values of this worker's layers, T packed tokens, M outputs, N inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from t2ray.adapters.factors import Factors
from t2ray.adapters.svf import mixed
from t2ray.core import ConfigError, Mixture

Mode = Literal["mixtures", "one"]

ARGUMENT = "t2ray"
"""The key of a request's mixture in `SamplingParams.extra_args`, which is `vllm_xargs` over HTTP."""


@dataclass(slots=True, eq=False)
class FusedPart:
    """One adapted matrix on this worker: rows `at` of its layer's output, singular values `span` of the expert."""

    name: str
    at: slice
    span: slice
    U_Mr: Tensor
    Vh_rN: Tensor


@dataclass(slots=True, eq=False)
class LayerFactors:
    """The adapted matrices of one of vLLM's layers, which may be several fused ones, and where its gains stand."""

    parts: list[FusedPart]
    gains: slice
    Vh_rN: Tensor
    base_MN: Tensor | None = None


class Bank:
    """The factors, the experts and the gains of one worker.

    `gain_SK[slot_T[t]]` are the gains `s (z - 1)` of token t; they are 0 for the base, whose layers' change is 0.
    """

    def __init__(self, factors: str, mode: Mode, slots: int, tokens: int, device: torch.device) -> None:
        self.factors = Factors.open(factors)
        if self.factors.manifest.support is not None:
            raise ConfigError(f"vLLM runs whole factors alone, and {factors} holds sparse ones; use the whole ones")
        self.mode: Mode = mode
        self.slots = slots
        self.slot_T = torch.zeros(tokens, dtype=torch.long, device=device)
        self.experts: dict[str, Tensor] = {}
        self.layers: dict[str, tuple[Any, LayerFactors]] = {}
        spans, start = {}, 0
        for target in self.factors.layout:
            spans[target.name] = slice(start, start + target.rank)
            start += target.rank
        self.spans = spans
        ranks = torch.tensor([target.rank for target in self.factors.layout])
        layers = torch.tensor([target.layer for target in self.factors.layout])
        self.layer_of_K = torch.repeat_interleave(layers, ranks).to(device)
        self.s_K = torch.zeros(start, device=device)
        self.gain_SK = torch.zeros(slots if mode == "mixtures" else 1, start, device=device)
        self.taken: dict[str, int] = {}
        self._used = 0

    def add(self, name: str, layer: Any, parts: Sequence[FusedPart], s: Sequence[Tensor]) -> LayerFactors:
        """Takes a layer's factors; a layer's gains stand side by side, in the order of its parts."""
        start = self._used
        for part, s_r in zip(parts, s, strict=True):
            self.s_K[part.span] = s_r.to(self.s_K)
            self._used += len(s_r)
        factors = LayerFactors(list(parts), slice(start, self._used), torch.cat([part.Vh_rN for part in parts]))
        self.layers[name] = layer, factors
        return factors

    def missing(self) -> list[str]:
        """The adapted matrices that no layer has: vLLM lays this model out in a way that t2ray does not know."""
        there = {part.name for _, factors in self.layers.values() for part in factors.parts}
        return [target.name for target in self.factors.layout if target.name not in there]

    # -------------------------------------------------------------------------------------------------------- experts

    def set_experts(self, changed: Mapping[str, Tensor], gone: Collection[str] = ()) -> None:
        """Adds experts, each (K,), float32, and forgets others. What requests began with stands in their slots."""
        self.experts |= {name: z_K.to(self.s_K) for name, z_K in changed.items()}
        for name in gone:
            self.experts.pop(name, None)

    def change(self, mixture: Mixture) -> Tensor:
        """`s (z - 1)` of a mixture, (K,), in the order of the expert; exactly 0 where z is 1."""
        return self.s_K * (mixed(mixture, self.experts, self.layer_of_K) - 1)

    def _in_layers(self, change_K: Tensor) -> Tensor:
        """The same numbers in the order of this worker's layers."""
        parts = [part.span for _, factors in self.layers.values() for part in factors.parts]
        return torch.cat([change_K[span] for span in parts])

    # ----------------------------------------------------------------------------------------------- a step's mixtures

    def begin(self, slot: int, mixture: Mixture) -> None:
        """A request with this mixture takes a slot."""
        if mixture.weights:
            self.gain_SK[slot, : self._used] = self._in_layers(self.change(mixture))
        else:
            self.gain_SK[slot] = 0.0

    def bind(self, slots_T: Tensor) -> None:
        """The slot of each token of the next forward, (T,); what is behind them is padding, and may be any slot."""
        self.slot_T[: len(slots_T)] = slots_T

    # ------------------------------------------------------------------------------------------------- one mixture

    def fold(self, mixture: Mixture) -> float:
        """Writes `W + U diag(s (z - 1)) V^T` into the dense weights, in place.

        Returns:
            The norm of what rounding took of the change, as a share of the change: 0 for the base, about 1e-7 in
            float32; in bfloat16 0.9 where |z - 1| is 0.0005, and 0.3 where it is 0.005.
        """
        change_K, lost, whole = self.change(mixture), 0.0, 0.0
        for layer, factors in self.layers.values():
            assert factors.base_MN is not None
            for part in factors.parts:
                base_MN = factors.base_MN[part.at]
                scaled_Mr = part.U_Mr.float() * change_K[part.span]
                wanted_MN = scaled_Mr @ part.Vh_rN.float()
                folded_MN = (base_MN.float() + wanted_MN).to(base_MN.dtype)
                layer.weight.data[part.at].copy_(folded_MN)
                lost += float((folded_MN.float() - base_MN.float() - wanted_MN).square().sum())
                whole += float(wanted_MN.square().sum())
        return (lost / whole) ** 0.5 if whole else 0.0


def mixture_of(argument: object) -> Mixture:
    """A request's mixture: text such as "math:0.7,code:0.3", or pairs of an expert's key and its weights.

    Raises:
        ConfigError: text that is no mixture.
    """
    if argument is None or isinstance(argument, str):
        return Mixture.parse(argument or "base")
    assert isinstance(argument, list | tuple), argument
    return Mixture(weights=tuple((str(key), tuple(map(float, weights))) for key, weights in argument))
