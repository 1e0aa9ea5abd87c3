"""The SVF layer: `y = ((x V) * (s * z_row)) U^T + b` in place of a linear layer.

Shapes: R mixtures, K singular values of all targets in a row, B rows of a batch, T tokens, N inputs, M outputs, r rank.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED_FOR_ROWS = 16
"""The number of rows that packed weights are laid out for: from 4 rows on the layout is the same for any number."""


class Bound(threading.local):
    """What the next forward of this thread uses: nothing (the base), gains by row, or the folded weights.

    Without `row_index`, row (or packed token) i has gain i, or all have the only one.
    """

    gain_RK: Tensor | None = None
    row_index: Tensor | None = None
    folded: bool = False


class SVFLinear(nn.Module):
    """A linear layer that holds its dense weight and its singular vectors, and never a weight that is trained.

    With nothing bound it is the base layer, bit for bit. Bound rows go through the factors, each row (or token) with
    its own z; in half precision, and with the vectors of a support alone (`additive`), on top of the dense weight.
    Folded, it uses one mixture's dense weight. A layer `in_tower` gets pictures in place of rows, all of one mixture.
    """

    U_Mr: Tensor
    Vh_rN: Tensor

    def __init__(
        self,
        weight_MN: Tensor,
        bias_M: Tensor | None,
        U_Mr: Tensor,
        Vh_rN: Tensor,
        span: slice,
        bound: Bound,
        *,
        sparse: bool = False,
        in_tower: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_MN, requires_grad=False)
        self.bias = bias_M if bias_M is None else nn.Parameter(bias_M, requires_grad=False)
        self.register_buffer("U_Mr", U_Mr.to(self.weight.dtype), persistent=False)
        self.register_buffer("Vh_rN", Vh_rN.to(self.weight.dtype), persistent=False)
        self.packed_factors: tuple[Tensor, Tensor] | None = None
        self.packed_weight: Tensor | None = None
        self.folded_MN: Tensor | None = None
        self.span, self.bound, self.in_tower = span, bound, in_tower
        self.additive = sparse or is_half(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        bound = self.bound
        if bound.gain_RK is None:
            if bound.folded:
                assert self.folded_MN is not None
                return linear(x, self.folded_MN, self.bias)
            return F.linear(x, self.weight, self.bias)
        gain = self._gain(bound.gain_RK[:, self.span], bound.row_index, x)
        # The product is taken in the gain's float32: bfloat16 has no number between 1 and 1.0078 for a z.
        if self.additive:
            return self._on_top(x, (F.linear(x, self.Vh_rN) * gain).to(x.dtype))
        if torch.is_grad_enabled():
            return F.linear((F.linear(x, self.Vh_rN) * gain).to(x.dtype), self.U_Mr, self.bias)
        if self.packed_factors is None:
            self.packed_factors = packed(self.U_Mr), packed(self.Vh_rN)
        U_Mr, Vh_rN = self.packed_factors
        return linear((linear(x, Vh_rN, None) * gain).to(x.dtype), U_Mr, self.bias)

    def _on_top(self, x: Tensor, change: Tensor) -> Tensor:
        """`W x + b + U change`, where `change` is `diag(s (z - 1)) V^T x`.

        In half precision the sum is rounded once: a change of 0.001 that is added to a rounded `W x` is lost in
        bfloat16. Where the change is 0, it is the base layer's output bit for bit (decision 15).
        """
        if is_half(self.weight.dtype):
            y = F.linear(change, self.U_Mr, None)
            y = y if self.bias is None else y + self.bias
            return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), self.weight.t()).view(y.shape)
        if torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias) + F.linear(change, self.U_Mr)
        if self.packed_weight is None:
            self.packed_weight = packed(self.weight)
        y = linear(x, self.packed_weight, self.bias)
        y.view(-1, y.shape[-1]).addmm_(change.flatten(0, -2), self.U_Mr.t())
        return y

    def _gain(self, gain_Rr: Tensor, row_index: Tensor | None, x: Tensor) -> Tensor:
        """The gain of each vector of `x`, whose leading shape may be any in which rows come before their tokens."""
        if row_index is not None:
            gain_Rr = gain_Rr[row_index]
        gain_Rr = gain_Rr.to(x.device)  # a base that is divided over GPUs has its layers on several
        if len(gain_Rr) == 1:
            return gain_Rr
        if self.in_tower:
            raise RuntimeError("pictures of several mixtures in one batch: nothing says which row a patch is of")
        if x.ndim == 3 and x.shape[0] == len(gain_Rr):  # (B, T, N): a gain for each row
            return gain_Rr[:, None]
        vectors = x.shape[:-1].numel()  # (1, T, N) of packed tokens, (B * T, N), (B, 1, T, N), ...
        assert vectors % len(gain_Rr) == 0, f"{tuple(x.shape)} holds no whole number of vectors for {len(gain_Rr)} rows"
        each = gain_Rr[:, None].expand(-1, vectors // len(gain_Rr), -1)
        return each.reshape(*x.shape[:-1], gain_Rr.shape[-1])

    def fold(self, change_r: Tensor) -> None:
        """Sets the folded weight to `W + U diag(s (z - 1)) V^T`; `change_r` is `s (z - 1)`, exact 0 where z is 1."""
        self.folded_MN = packed(torch.addmm(self.weight, self.U_Mr * change_r.to(self.U_Mr), self.Vh_rN))


def is_half(dtype: torch.dtype) -> bool:
    """Whether weights of this type are rounded so much that `U diag(s) V^T` is not the weight itself.

    Rows then take `W x + U diag(s (z - 1)) V^T x`, which is the base model bit for bit where z is 1; and no mixture is
    folded, since a bfloat16 weight keeps half of a change of |z - 1| = 0.001.
    """
    return torch.finfo(dtype).bits < 32


def packed(weight_MN: Tensor) -> Tensor:
    """A copy in the blocks that oneDNN multiplies by, for `linear`; the weight itself where there is no such layout.

    For float32 on CPU: a product with 16 rows then takes 0.6 of its time, one with 300 rows 0.9.
    """
    if weight_MN.dtype != torch.float32 or weight_MN.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return weight_MN
    blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_MN, PACKED_FOR_ROWS)
    return blocks


def linear(x: Tensor, weight_MN: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` with a weight that may be packed, and is not differentiated."""
    if not weight_MN.is_mkldnn:
        return F.linear(x, weight_MN, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_MN, bias, "none", [], "")
    return product
