"""The algorithm of the paper's code, written from its description: what a mixture, an update and a search cost there.

A mixture is composed as `U @ diag(s z) @ V^T` with a dense diagonal, for every matrix, and copied into the model; rows
of different mixtures run one mixture after the other. An update goes sample by sample, forms every full weight gradient
and takes z's from it. Where the description leaves a choice, the faster one is taken: the base for the KL is a second
model, and a composed matrix serves all samples of an update. Not here: the timing (the benches). Called by them alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from t2ray.adapters.factors import Factors
from t2ray.training.loss import token_losses


class Reference:
    """A model of its own whose targets' weights are overwritten."""

    def __init__(self, base: Any, factors: Factors) -> None:
        self.base, self.hf = base, copy.deepcopy(base)
        self.layout = factors.layout
        self.factors = [factors.load(target.name) for target in self.layout]
        self.weights: list[Tensor] = [self.hf.get_submodule(target.name).weight for target in self.layout]

    def compose(self, z_K: Tensor) -> list[Tensor]:
        """`W' = U @ diag(s z) @ V^T` of every target; differentiable in z."""
        parts = z_K.split([target.rank for target in self.layout])
        return [
            U_Mr @ torch.diag(s_r * z_r) @ Vh_rN for (U_Mr, s_r, Vh_rN), z_r in zip(self.factors, parts, strict=True)
        ]

    def load(self, weights: Sequence[Tensor]) -> None:
        """Copies composed weights into the model."""
        with torch.no_grad():
            for parameter, weight in zip(self.weights, weights, strict=True):
                parameter.copy_(weight)

    def generate(self, ids_BT: Tensor, z_RK: Tensor, row_index: Sequence[int], new: int) -> Tensor:
        """Greedy answers, (B, new), mixture by mixture."""
        index_B, out_BT = torch.tensor(row_index), torch.empty(len(ids_BT), new, dtype=torch.long)
        for row, z_K in enumerate(z_RK):
            self.load(self.compose(z_K))
            mine = index_B == row
            out_BT[mine] = greedy(self.hf, ids_BT[mine], new)
        return out_BT

    def gradient(
        self, z_K: Tensor, rows: Sequence[tuple[Sequence[int], Sequence[int]]], advantage: Sequence[float], lam: float
    ) -> Tensor:
        """Of the REINFORCE + KL loss of (prompt, answer) rows, summed over tokens, a mean over rows; (K,)."""
        z_K = z_K.detach().requires_grad_()
        composed = self.compose(z_K)
        self.load(composed)
        for weight in self.weights:
            weight.requires_grad_().grad = None
        for (prompt, answer), value in zip(rows, advantage, strict=True):
            ids_1T, token_N = torch.tensor([[*prompt, *answer]]), torch.tensor(answer)
            at = slice(len(prompt) - 1, ids_1T.shape[1] - 1)
            with torch.no_grad():
                base_NV = self.base(input_ids=ids_1T).logits[0, at]
            logits_NV = self.hf(input_ids=ids_1T).logits[0, at]
            loss_N, _ = token_losses(logits_NV, base_NV, token_N, torch.full((len(answer),), value), lam, 1.0)
            (loss_N.sum() / len(rows)).backward()
        torch.autograd.backward(composed, [weight.grad for weight in self.weights])
        for weight in self.weights:
            weight.requires_grad_(False).grad = None
        assert z_K.grad is not None
        return z_K.grad


def greedy(hf: Any, ids_BT: Tensor, new: int) -> Tensor:
    """The answers of a plain model's own `generate`, (B, new)."""
    out_BT: Tensor = hf.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return out_BT[:, ids_BT.shape[1] :]
