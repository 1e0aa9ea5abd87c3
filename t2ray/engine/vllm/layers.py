"""vLLM's linear layers with SVF on top: what a layer does with its weight, and the product as an operator.

vLLM builds its layers, loads and divides its weights as ever; a layer with an adapted matrix also gets its factors,
divided as its weight is. Fused matrices are one product with all their V, the gains, and one U for each.

Shapes: S slots of requests, K singular values of this worker's layers, T packed tokens, M outputs, N inputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from t2ray.core import ModelError
from t2ray.engine.vllm import seams
from t2ray.engine.vllm.bank import Bank, FusedPart


@torch.library.custom_op("t2ray::svf_linear", mutates_args=())
def svf_linear(
    x_TN: Tensor,
    weight_MN: Tensor,
    bias_M: Tensor | None,
    Vh_rN: Tensor,
    U: list[Tensor],
    rows: list[int],
    gain_Sr: Tensor,
    slot_T: Tensor,
) -> Tensor:
    """`W x + b + U (gain * V^T x)`, where each token has the gains of its slot; rounded once, as `adapters.layer` does.

    Matrix i of the fused ones makes the outputs from `rows[i]` on. An operator, since compilers must not look inside:
    the batch's number of requests changes with every step.
    """
    change_Tr = (torch.nn.functional.linear(x_TN, Vh_rN) * gain_Sr[slot_T[: len(x_TN)]]).to(x_TN.dtype)
    change_TM = x_TN.new_zeros(len(x_TN), len(weight_MN))
    start = 0
    for U_Mr, row in zip(U, rows, strict=True):
        rank = U_Mr.shape[1]
        change_TM[:, row : row + len(U_Mr)] = change_Tr[:, start : start + rank] @ U_Mr.t()
        start += rank
    if bias_M is not None:
        change_TM += bias_M
    return torch.addmm(change_TM, x_TN, weight_MN.t())


@svf_linear.register_fake
def _(x_TN: Tensor, weight_MN: Tensor, *others: object) -> Tensor:
    return x_TN.new_empty(len(x_TN), len(weight_MN))


@seams.register_weight_loader_v2_supported_method
class SVFMethod(seams.UnquantizedLinearMethod):
    """What a linear layer with adapted matrices does with its weight."""

    def __init__(self, bank: Bank, prefix: str, names: list[str | None]) -> None:
        super().__init__()
        self.bank, self.prefix, self.names = bank, prefix, names

    def process_weights_after_loading(self, layer: Any) -> None:
        """Loads the factors beside the weight, which stays as it is: on a CPU vLLM would pack it and drop it."""
        parts, singular = [], []
        for i, name in enumerate(self.names):
            if name is not None:
                U_Mr, s_r, Vh_rN = self.bank.factors.load(name)
                U_Mr, Vh_rN = (part.to(layer.weight) for part in _divided(layer, i, len(self.names), U_Mr, Vh_rN))
                start = sum(layer.output_partition_sizes[:i])
                parts.append(FusedPart(name, slice(start, start + len(U_Mr)), self.bank.spans[name], U_Mr, Vh_rN))
                singular.append(s_r)
        layer.t2ray = factors = self.bank.add(self.prefix, layer, parts, singular)
        if self.bank.mode == "one":
            factors.base_MN = layer.weight.detach().clone()
        if seams.current_platform.is_cpu():
            layer.cpu_linear = torch.nn.functional.linear

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output; which way it takes is fixed at the start, since CUDA graphs would freeze it anyway."""
        if self.bank.mode == "one":
            folded: Tensor = super().apply(layer, x, bias)
            return folded
        bank, factors = self.bank, layer.t2ray
        U, rows = [part.U_Mr for part in factors.parts], [part.at.start for part in factors.parts]
        y_TM: Tensor = svf_linear(
            x.flatten(0, -2), layer.weight, bias, factors.Vh_rN, U, rows, bank.gain_SK[:, factors.gains], bank.slot_T
        )
        return y_TM.view(*x.shape[:-1], -1)


def _divided(layer: Any, i: int, matrices: int, U_Mr: Tensor, Vh_rN: Tensor) -> tuple[Tensor, Tensor]:
    """This worker's part of U and V^T of matrix i, as vLLM divides the weight over tensor parallel ranks."""
    if layer.tp_size == 1:
        return U_Mr, Vh_rN
    if isinstance(layer, seams.RowParallelLinear):
        inputs = layer.input_size_per_partition
        return U_Mr, Vh_rN[:, layer.tp_rank * inputs : (layer.tp_rank + 1) * inputs]
    if matrices != len(layer.output_partition_sizes):
        raise ModelError(f"{layer.prefix}: a matrix that is fused in the checkpoint cannot be divided over GPUs")
    replicas = layer.num_kv_head_replicas if isinstance(layer, seams.QKVParallelLinear) and i else 1
    outputs = layer.output_partition_sizes[i]
    start = layer.tp_rank // replicas * outputs
    return U_Mr[start : start + outputs], Vh_rN
