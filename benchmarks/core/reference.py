"""The algorithm of the paper's code, written from its description: its costs of a mixture, an update and a search.

A mixture is composed as `U @ diag(s z) @ V^T` with a dense diagonal, for every matrix, and copied into the model. Rows
of different mixtures run one mixture after the other. An update goes sample by sample, computes every full weight
gradient, and computes that of z from it. If the description leaves a choice, the faster one is taken: the base for the
KL is a second model, and a composed matrix serves all samples of an update.
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
    """A copy of a plain model; the weights of its targets are overwritten by each mixture."""

    def __init__(self, base: Any, factors: Factors) -> None:
        self.base, self.hf = base, copy.deepcopy(base)
        self.layout = factors.layout
        self.factors = [factors.load(target.name) for target in self.layout]
        self.weights: list[Tensor] = [self.hf.get_submodule(target.name).weight for target in self.layout]

    def compose(self, z_K: Tensor) -> list[Tensor]:
        """Returns `W' = U @ diag(s z) @ V^T` of every target, differentiable in z."""
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
        """Returns greedy answers, (B, new), computed mixture by mixture; row i has the mixture `z_RK[row_index[i]]`."""
        index_B, out_BT = torch.tensor(row_index), torch.empty(len(ids_BT), new, dtype=torch.long)
        for row, z_K in enumerate(z_RK):
            self.load(self.compose(z_K))
            mine = index_B == row
            out_BT[mine] = greedy(self.hf, ids_BT[mine], new)
        return out_BT

    def gradient(
        self, z_K: Tensor, rows: Sequence[tuple[Sequence[int], Sequence[int]]], advantage: Sequence[float], lam: float
    ) -> Tensor:
        """Returns the gradient of z, (K,): of the REINFORCE + KL loss, summed over tokens, as a mean over the rows.

        Args:
            rows: (prompt ids, answer ids) of each rollout.
            lam: the weight of the KL.
        """
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
            loss_N, *_ = token_losses(logits_NV, base_NV, token_N, torch.full((len(answer),), value), lam, 1.0)
            (loss_N.sum() / len(rows)).backward()
        torch.autograd.backward(composed, [weight.grad for weight in self.weights])
        for weight in self.weights:
            weight.requires_grad_(False).grad = None
        assert z_K.grad is not None
        return z_K.grad


def greedy(hf: Any, ids_BT: Tensor, new: int) -> Tensor:
    """Returns the greedy answers of a plain model's own `generate`, (B, new)."""
    out_BT: Tensor = hf.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return out_BT[:, ids_BT.shape[1] :]
