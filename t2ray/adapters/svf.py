"""SVF: layers in place of a model's linear layers, which z a forward uses, and the mixing of experts.

Not here: where factors and experts come from (`factors`, `t2ray.experts`), and who decides which rows run (the engine).

Shapes: R mixtures, K singular values of all targets in a row, B rows of a batch, T tokens, N inputs, M outputs, r rank.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from t2ray.adapters.factors import Factors, Target
from t2ray.adapters.layer import Bound, SVFLinear, is_half
from t2ray.adapters.moe import SVFExperts
from t2ray.adapters.sparse import check_support, joined, support_of
from t2ray.adapters.trained import Few, parametrise
from t2ray.config.adapter import AdapterConfig
from t2ray.config.files import nearest
from t2ray.core import ExpertError, Mixture, UnknownExpert
from t2ray.models.targets import matrix

WHOLE = AdapterConfig()


class SVF:
    """The adapted matrices of one model: what z the next forward uses, and the experts that mixtures are made of.

    `layout` names the targets in order; a z is one vector of K numbers, the targets' in that order.
    """

    by_row = True

    def __init__(self, model: nn.Module, factors: Factors, config: AdapterConfig = WHOLE) -> None:
        """Replaces the targets' layers in `model` by SVF layers.

        Args:
            config: which numbers of z are trained.

        Raises:
            ExpertError: a target of the decomposition that `model` lacks or holds in another shape.
        """
        self.layout: tuple[Target, ...] = factors.layout
        self.bound = Bound()
        self.layers: list[SVFLinear] = []
        self.bank: dict[str, Tensor] = {}
        self.support_S = support_of(factors)
        self._folded_K: Tensor | None = None
        self._each: tuple[tuple[Tensor | None, ...], Tensor | None] = (), None
        singular: list[Tensor] = []
        experts: dict[str, dict[tuple[int, str], SVFLinear]] = defaultdict(dict)
        start = width = 0
        for target in self.layout:
            weight_MN, bias_M = _found(model, target)
            U_Mr, s_r, Vh_rN = (part.to(weight_MN.device) for part in factors.load(target.name))
            singular.append(s_r.to(torch.promote_types(weight_MN.dtype, torch.float32)))
            span = slice(width, width + len(Vh_rN))
            layer = SVFLinear(
                weight_MN, bias_M, U_Mr, Vh_rN, span, self.bound, sparse=self.support_S is not None,
                in_tower=target.in_tower,
            )  # fmt: skip
            if target.expert is None:
                model.set_submodule(target.name, layer)
            else:
                module, _, attribute = target.parameter.rpartition(".")
                experts[module][target.expert, attribute] = layer
            self.layers.append(layer)
            start, width = start + target.rank, width + len(Vh_rN)
        if experts:  # one by one also where nothing is bound, so that z = 1 is the base model in half precision
            model.set_experts_implementation("eager")  # type: ignore[operator]  # of transformers' models
        for name, matrices in experts.items():
            model.set_submodule(name, SVFExperts(model.get_submodule(name), matrices, self.bound))
        self.size = start
        self.s_K = torch.cat([s_r.to(singular[0].device) for s_r in singular])
        self.neutral = torch.ones(self.size, device=self.s_K.device)
        if self.support_S is not None:
            self.support_S = self.support_S.to(self.s_K.device)
        self.ranks = [target.rank for target in self.layout]
        self.few = Few(self.layout, config, self.s_K.device) if config.numbers or config.tied else None
        self.layer_of_K = torch.repeat_interleave(
            torch.tensor([t.depth for t in self.layout]), torch.tensor(self.ranks)
        ).to(self.s_K.device)

    def tokens_to_fold(self) -> int:
        """From how many tokens on one fold and dense passes cost less than factored passes, in multiply-adds.

        Of tokens as the decoder has them: a fold is made of a vision tower, too, and saves a text nothing there.
        In half precision there is no such number: a fold would lose small changes (see `is_half`).
        """
        if is_half(self.layers[0].weight.dtype):
            return sys.maxsize
        ranks = [len(layer.Vh_rN) for layer in self.layers]
        fold = sum(t.m * t.n * rank for t, rank in zip(self.layout, ranks, strict=True))
        read = [(t, rank) for t, rank in zip(self.layout, ranks, strict=True) if not t.in_tower]
        saved = sum(rank * (t.m + t.n) for t, rank in read)
        if self.support_S is None:  # the factors take the dense product's place
            saved -= sum(t.m * t.n for t, _ in read)
        return fold // max(saved, 1)

    # ------------------------------------------------------------------------------------------------ z of a forward

    @contextmanager
    def rows(self, z_RK: Tensor, row_index: Tensor | None = None) -> Iterator[None]:
        """In this thread, forwards use z by row: row (or packed token) i of the batch uses `z_RK[row_index[i]]`.

        Without `row_index`, R must be 1 and all rows use that z. Differentiable in `z_RK`.
        """
        assert not self._busy(), "rows are bound already: bindings do not nest"
        assert z_RK.shape[-1] == self.size and (row_index is not None or len(z_RK) == 1), (z_RK.shape, self.size)
        gain_RK = self._gains(z_RK)
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
            gain_BK = self._gains(self.table(z))
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
            change_K = self._supported(self.s_K * (z_K.to(self.s_K.dtype) - 1))
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

    def _gains(self, z_RK: Tensor) -> Tensor:
        """What the layers multiply by: s z, or s (z - 1) where they add to the dense weight."""
        return self._supported((z_RK - 1) * self.s_K) if self.layers[0].additive else z_RK * self.s_K

    def _supported(self, change_K: Tensor) -> Tensor:
        """Of numbers of all K components, (..., K), those that the layers have vectors of."""
        return change_K if self.support_S is None else change_K[..., self.support_S]

    def _busy(self) -> bool:
        return self.bound.gain_RK is not None or self.bound.folded

    # -------------------------------------------------------------------------------------------------------- experts

    def set_experts(self, changed: Mapping[str, Tensor], gone: Collection[str] = ()) -> None:
        """See `Adapter.set_experts`; raises as `check_support`."""
        for z_K in changed.values():
            check_support(z_K.to(self.s_K.device), self.support_S)
        bank = {name: z_K.to(self.s_K.device) for name, z_K in changed.items()}
        self.bank = {name: z_K for name, z_K in {**self.bank, **bank}.items() if name not in gone}

    def mix(self, mixture: Mixture) -> Tensor:
        """`z' = 1 + sum_k alpha_k (z_k - 1)`, (K,), float32 (paper section 3.2).

        Raises:
            UnknownExpert: the mixture names an expert that is not in the bank.
            ExpertError: it has weights by layer, and not one for each layer.
        """
        return mixed(mixture, self.bank, self.layer_of_K)

    def split(self, z_K: Tensor) -> Mapping[str, Tensor]:
        """z as one vector per target, by the target's name: what an expert's file holds."""
        return dict(zip((t.name for t in self.layout), z_K.split(self.ranks), strict=True))

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The z, (K,), float32, of one vector per target; 1, which changes nothing, for a target without one."""
        return joined(self.layout, parts).to(self.s_K.device)

    def changes(self, z_K: Tensor) -> Iterator[tuple[Target, Tensor, Tensor]]:
        """`U diag(s (z - 1)) V^T` of each target: U and V are orthonormal, so that |s (z - 1)| are its singular values.

        The product's two factors share each singular value evenly; components that z leaves alone are left out.
        """
        change_K = self._supported(self.s_K * (z_K.to(self.s_K.dtype) - 1))
        for target, layer in zip(self.layout, self.layers, strict=True):
            change_r = change_K[layer.span].to(layer.U_Mr.device).float()
            kept = change_r.abs().argsort(descending=True)[: int(change_r.count_nonzero())]
            half_R = change_r[kept].abs().sqrt()
            left_MR = layer.U_Mr[:, kept].float() * half_R * change_r[kept].sign()
            yield target, left_MR, half_R[:, None] * layer.Vh_rN[kept].float()

    # ------------------------------------------------------------------------------------------------------- training

    def initial(self, kind: str, noise_K: Tensor, start_K: Tensor | None = None) -> Tensor:
        """The parameters that training starts from: `scale` starts at z = 1, `sigmoid` at p = 0.1 (Table 6).

        They are (K,), or those of `few`. With `start_K` they are those whose `vector` is that z.

        Raises:
            ExpertError: no parameters have it: `sigmoid` keeps each matrix's sum of s z, and few numbers move few
                singular values. Or there are few numbers, and `sigmoid` or sparse factors.
        """
        if self.few is not None and (kind != "scale" or self.support_S is not None):
            raise ExpertError("adapter.numbers and adapter.tied need init: scale and whole factors")
        noise_K = noise_K.to(self.s_K.device)
        if start_K is None:
            return self._trained((1.0 if kind == "scale" else 0.1) + noise_K)
        start_K = self._sparse(start_K.to(self.s_K.device))
        p_K = start_K if kind == "scale" else torch.logit(start_K / (2 * start_K.max().clamp(min=1.0)))
        if not torch.allclose(self.vector(kind, self._trained(p_K)), start_K, rtol=1e-4, atol=1e-5):
            remedy = "use init: scale" if self.few is None else "leave out adapter.numbers and adapter.tied"
            raise ExpertError(f"init: {kind} cannot start from an expert that was trained otherwise; {remedy}")
        return self._trained(p_K + noise_K)

    def vector(self, kind: str, p_K: Tensor) -> Tensor:
        """z of trained parameters, (K,); see `parametrise` and `few`. Outside of a support it is 1."""
        if self.few is not None:
            return self.few.spread(p_K)
        return self._sparse(parametrise(p_K, kind, self.s_K, self.ranks))

    def _trained(self, values_K: Tensor) -> Tensor:
        return values_K if self.few is None else self.few.of(values_K)

    def _sparse(self, z_K: Tensor) -> Tensor:
        if self.support_S is None:
            return z_K
        return self.neutral.index_copy(0, self.support_S, z_K[self.support_S])


def mixed(mixture: Mixture, bank: Mapping[str, Tensor], layer_of_K: Tensor) -> Tensor:
    """`z' = 1 + sum_k alpha_k (z_k - 1)`, (K,), float32 (paper section 3.2), of experts in `bank`.

    Arguments and errors are those of `terms`.
    """
    z_K = torch.ones(len(layer_of_K), device=layer_of_K.device)
    for alpha, expert_K in terms(mixture, bank, layer_of_K):
        z_K = z_K + alpha * (expert_K - 1)
    return z_K


def _found(model: nn.Module, target: Target) -> tuple[Tensor, Tensor | None]:
    """A target's weight and bias in the model; raises ExpertError where it has none, or one of another shape."""
    try:
        weight_MN, bias_M = matrix(model, target)
    except (AttributeError, IndexError):
        weight_MN = None
    if weight_MN is None or weight_MN.shape != (target.m, target.n):
        found = "none of that name" if weight_MN is None else f"one of {' x '.join(map(str, weight_MN.shape))}"
        raise ExpertError(
            f"the decomposition has {target.name} ({target.m} x {target.n}), the model has {found}; decompose it anew"
        )
    return weight_MN, bias_M


def terms(mixture: Mixture, bank: Mapping[str, Tensor], layer_of_P: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight and the vector, (P,), of each expert of a mixture; with weights by layer, one weight per number.

    Args:
        layer_of_P: the decoder layer that each number belongs to.

    Raises:
        UnknownExpert: the mixture names an expert that is not in the bank.
        ExpertError: it has weights by layer, and not one for each layer.
    """
    for name, alpha in mixture.weights:
        if name not in bank:
            raise UnknownExpert(f"unknown expert {name!r}{nearest(name, bank)}")
        weight = bank[name].new_tensor(alpha)
        if len(alpha) > 1:
            layers = int(layer_of_P.max()) + 1
            if len(alpha) != layers:
                raise ExpertError(f"expert {name!r} has {len(alpha)} weights by layer; the model has {layers} layers")
            weight = weight[layer_of_P]
        yield weight, bank[name]
