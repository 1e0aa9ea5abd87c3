"""SVF layers: `y = ((x V) * (s * z_row)) U^T + b` in place of a model's linear layers, and the mixing of experts.

Not here: where factors and experts come from (`factors`, `t2ray.experts`), and who decides which rows run (the engine).

Shapes: R mixtures, K singular values of all targets in a row, B rows of a batch, T tokens, N inputs, M outputs, r rank.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2ray.adapters.factors import Factors, Target
from t2ray.config.files import nearest
from t2ray.core import ExpertError, Mixture, UnknownExpert

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
    its own z. Folded, it uses one mixture's dense weight.
    """

    U_Mr: Tensor
    Vh_rN: Tensor

    def __init__(self, linear: nn.Linear, U_Mr: Tensor, Vh_rN: Tensor, span: slice, bound: Bound) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias if linear.bias is None else linear.bias.requires_grad_(False)
        self.register_buffer("U_Mr", U_Mr.to(self.weight.dtype), persistent=False)
        self.register_buffer("Vh_rN", Vh_rN.to(self.weight.dtype), persistent=False)
        self.packed_factors: tuple[Tensor, Tensor] | None = None
        self.folded_MN: Tensor | None = None
        self.span, self.bound = span, bound

    def forward(self, x: Tensor) -> Tensor:
        bound = self.bound
        if bound.gain_RK is None:
            if bound.folded:
                assert self.folded_MN is not None
                return linear(x, self.folded_MN, self.bias)
            return F.linear(x, self.weight, self.bias)
        gain = bound.gain_RK[:, self.span]
        if bound.row_index is not None:
            gain = gain[bound.row_index]
        if len(gain) > 1:  # one for each row of (B, T, N), or for each token of a packed (1, T, N)
            gain = gain[:, None] if x.shape[0] == len(gain) else gain[None]
        gain = gain.to(x.device)  # a base that is divided over GPUs has its layers on several
        # The product is taken in the gain's float32: bfloat16 has no number between 1 and 1.0078 for a z.
        if torch.is_grad_enabled():
            return F.linear((F.linear(x, self.Vh_rN) * gain).to(x.dtype), self.U_Mr, self.bias)
        if self.packed_factors is None:
            self.packed_factors = packed(self.U_Mr), packed(self.Vh_rN)
        U_Mr, Vh_rN = self.packed_factors
        return linear((linear(x, Vh_rN, None) * gain).to(x.dtype), U_Mr, self.bias)

    def fold(self, change_r: Tensor) -> None:
        """Sets the folded weight to `W + U diag(s (z - 1)) V^T`; `change_r` is `s (z - 1)`, exact 0 where z is 1."""
        self.folded_MN = packed(torch.addmm(self.weight, self.U_Mr * change_r.to(self.U_Mr), self.Vh_rN))


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


class SVF:
    """The adapted matrices of one model: what z the next forward uses, and the experts that mixtures are made of.

    `layout` names the targets in order; a z is one vector of K numbers, the targets' in that order.
    """

    def __init__(self, model: nn.Module, factors: Factors) -> None:
        """Replaces the targets' linear layers in `model` by SVF layers.

        Raises:
            ExpertError: a target of the decomposition that `model` lacks or holds in another shape.
        """
        self.layout: tuple[Target, ...] = factors.layout
        self.bound = Bound()
        self.layers: list[SVFLinear] = []
        self.bank: dict[str, Tensor] = {}
        self._folded_K: Tensor | None = None
        self._each: tuple[tuple[Tensor | None, ...], Tensor | None] = (), None
        modules = dict(model.named_modules())
        singular: list[Tensor] = []
        start = 0
        for target in self.layout:
            linear = modules.get(target.name)
            if not isinstance(linear, nn.Linear) or linear.weight.shape != (target.m, target.n):
                raise ExpertError(
                    f"the decomposition has {target.name} ({target.m} x {target.n}), the model has {linear}"
                )
            U_Mr, s_r, Vh_rN = (part.to(linear.weight.device) for part in factors.load(target.name))
            singular.append(s_r.to(torch.promote_types(linear.weight.dtype, torch.float32)))
            layer = SVFLinear(linear, U_Mr, Vh_rN, slice(start, start + target.rank), self.bound)
            parent, _, child = target.name.rpartition(".")
            setattr(modules[parent], child, layer)
            self.layers.append(layer)
            start += target.rank
        self.size = start
        self.s_K = torch.cat([s_r.to(singular[0].device) for s_r in singular])
        self.neutral = torch.ones(self.size, device=self.s_K.device)
        self.ranks = [target.rank for target in self.layout]
        self.layer_of_K = torch.repeat_interleave(
            torch.tensor([t.layer for t in self.layout]), torch.tensor(self.ranks)
        ).to(self.s_K.device)

    def tokens_to_fold(self) -> int:
        """From how many tokens on one fold and dense passes cost less than factored passes, in multiply-adds."""
        fold = sum(t.m * t.n * t.rank for t in self.layout)
        saved = sum(t.rank * (t.m + t.n) - t.m * t.n for t in self.layout)
        return fold // max(saved, 1)

    # ------------------------------------------------------------------------------------------------ z of a forward

    @contextmanager
    def rows(self, z_RK: Tensor, row_index: Tensor | None = None) -> Iterator[None]:
        """In this thread, forwards use z by row: row (or packed token) i of the batch uses `z_RK[row_index[i]]`.

        Without `row_index`, R must be 1 and all rows use that z. Differentiable in `z_RK`.
        """
        assert not self._busy(), "rows are bound already: bindings do not nest"
        assert z_RK.shape[-1] == self.size and (row_index is not None or len(z_RK) == 1), (z_RK.shape, self.size)
        gain_RK = z_RK * self.s_K
        if row_index is not None and len(row_index) <= 2 * len(z_RK):
            # Decoding: gathered once rather than by every matrix. Of many tokens this would be too large.
            gain_RK, row_index = gain_RK[row_index], None
        self.bound.gain_RK, self.bound.row_index = gain_RK, row_index
        try:
            yield
        finally:
            self.bound.gain_RK = self.bound.row_index = None

    @contextmanager
    def each(self, z: Sequence[Tensor | None]) -> Iterator[None]:
        """As `rows`, row (or packed token) i with `z[i]`; None is the base. Not differentiable.

        The last gains are kept: decoding binds the same rows for many steps.
        """
        assert not self._busy(), "rows are bound already: bindings do not nest"
        before, gain_BK = self._each
        if len(before) != len(z) or any(a is not b for a, b in zip(before, z, strict=True)):
            gain_BK = self.table(z) * self.s_K
            self._each = tuple(z), gain_BK
        self.bound.gain_RK = gain_BK
        try:
            yield
        finally:
            self.bound.gain_RK = None

    @contextmanager
    def folded(self, z_K: Tensor) -> Iterator[None]:
        """In this thread, forwards use the dense weights of `z_K`, folded anew when it differs from the last."""
        assert not self._busy(), "rows are bound already: bindings do not nest"
        if not self.is_folded(z_K):
            change_K = self.s_K * (z_K.to(self.s_K.dtype) - 1)
            with torch.no_grad():
                for layer in self.layers:
                    layer.fold(change_K[layer.span])
            self._folded_K = z_K.clone()
        self.bound.folded = True
        try:
            yield
        finally:
            self.bound.folded = False

    def is_folded(self, z_K: Tensor) -> bool:
        """Whether `folded(z_K)` would find its weights ready."""
        return self._folded_K is not None and torch.equal(self._folded_K, z_K)

    def table(self, z: Sequence[Tensor | None]) -> Tensor:
        """The rows of several requests' z, (R, K); None is the base model."""
        return torch.stack([self.neutral if z_K is None else z_K for z_K in z])

    def _busy(self) -> bool:
        return self.bound.gain_RK is not None or self.bound.folded

    # -------------------------------------------------------------------------------------------------------- experts

    def set_experts(self, changed: Mapping[str, Tensor], gone: Collection[str] = ()) -> None:
        """See `Adapter.set_experts`."""
        bank = {name: z_K.to(self.s_K.device) for name, z_K in changed.items()}
        self.bank = {name: z_K for name, z_K in {**self.bank, **bank}.items() if name not in gone}

    def mix(self, mixture: Mixture) -> Tensor:
        """`z' = 1 + sum_k alpha_k (z_k - 1)`, (K,), float32 (paper section 3.2).

        Raises:
            UnknownExpert: the mixture names an expert that is not in the bank.
            ExpertError: it has weights by layer, and not one for each layer.
        """
        z_K = self.neutral.clone()
        for name, alpha in mixture.weights:
            if name not in self.bank:
                raise UnknownExpert(f"unknown expert {name!r}{nearest(name, self.bank)}")
            weight = torch.tensor(alpha, device=z_K.device)
            if len(alpha) > 1:
                layers = int(self.layer_of_K.max()) + 1
                if len(alpha) != layers:
                    raise ExpertError(
                        f"expert {name!r} has {len(alpha)} weights by layer; the model has {layers} layers"
                    )
                weight = weight[self.layer_of_K]
            z_K = z_K + weight * (self.bank[name] - 1)
        return z_K

    def split(self, z_K: Tensor) -> Mapping[str, Tensor]:
        """z as one vector per target, by the target's name: what an expert's file holds."""
        return dict(zip((t.name for t in self.layout), z_K.split(self.ranks), strict=True))

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The z, (K,), float32, of one vector per target; 1, which changes nothing, for a target without one."""
        ones = (torch.ones(target.rank) for target in self.layout)
        vectors = [parts.get(target.name, one) for target, one in zip(self.layout, ones, strict=True)]
        return torch.cat([z_r.to(self.s_K.device, torch.float32) for z_r in vectors])

    # ------------------------------------------------------------------------------------------------------- training

    def initial(self, kind: str, noise_K: Tensor) -> Tensor:
        """The parameters, (K,), that training starts from: `scale` starts at z = 1, `sigmoid` at p = 0.1 (Table 6)."""
        return (1.0 if kind == "scale" else 0.1) + noise_K.to(self.s_K.device)

    def vector(self, kind: str, p_K: Tensor) -> Tensor:
        """z of trained parameters, (K,); see `parametrise`."""
        return parametrise(p_K, kind, self.s_K, self.ranks)


def parametrise(p_K: Tensor, kind: str, s_K: Tensor, ranks: Sequence[int]) -> Tensor:
    """z of trained parameters, (K,); differentiable. `ranks` are the numbers of singular values of the matrices.

    `scale`: z = p. `sigmoid`: the reference code's `z = sigmoid(p)`, each matrix rescaled by `sum(s) / sum(s z)`, so
    that equal parameters are the base model.
    """
    if kind == "scale":
        return p_K
    parts = zip(torch.sigmoid(p_K).split(list(ranks)), s_K.split(list(ranks)), strict=True)
    return torch.cat([z_r * (s_r.sum() / (s_r * z_r).sum()) for z_r, s_r in parts])
