"""REINFORCE with an exact KL to the base, differentiated in z alone (paper section 3.1, equation 2).

Shapes: B rollouts, T tokens, N answer tokens of all rollouts, D features, V vocabulary, K singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.grades import Rollout

ROUNDING = 1e-9
"""An advantage below this is the rounding of a mean: AdamW would turn it into a step of full size."""

CHUNK_ELEMENTS = 1 << 23
"""Logits that are in memory at once (32 MiB in float32): answer tokens go through the vocabulary in chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Sums over a batch of rollouts: `loss` (of the objective, each rollout counted once), `kl` (nats) and `tokens`.

    `ratio` is the sum of the tokens' importance weights before they are cut, and `cut` the number of those that are.
    """

    loss: float
    kl: float
    tokens: int
    ratio: float = 0.0
    cut: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What a batch says of z: the `loss` per rollout, `kl` in nats over `tokens`, and the gradient's norm.

    z has `moved` unless no rollout had an advantage: what is left of such a gradient is rounding and the penalty.
    `ratio` and `cut` are those of `LossTerms`, 0 where the sampler is the trainer's own program.
    """

    loss: float
    kl: float
    tokens: int
    grad_norm: float
    moved: bool
    ratio: float
    cut: float

    @property
    def weights(self) -> dict[str, Any]:
        """The mean importance weight and the share of tokens whose weight is cut; nothing without weights."""
        return {"importance": self.ratio / self.tokens, "importance_cut": self.cut / self.tokens} if self.ratio else {}


def advantages(rewards: Tensor, samples: int, baseline: str, mean: float) -> Tensor:
    """Returns what multiplies the log-likelihood of each rollout, (B,): its reward less the baseline.

    `none`: 0, as in the paper. `mean`: the batch's mean reward. `loo`: the mean of the prompt's other samples
    (RLOO, arXiv 2402.14740, equation 3). A group without variance, which is the batch for `mean` and a prompt's samples
    for `loo`, carries nothing: its advantages are 0, not the rounding of a mean.

    Args:
        rewards: (B,), float64; the samples of a prompt lie side by side. NaN stands for a rollout without a reward,
            whose advantage is 0.
    """
    if baseline == "none":
        return rewards.nan_to_num(0.0)
    groups = rewards.view(len(rewards) // samples, samples)
    if baseline == "mean":
        found = groups - mean
    else:
        number = (~groups.isnan()).sum(1, keepdim=True)
        found = (groups - groups.nanmean(1, keepdim=True)) * number / (number - 1).clamp(min=1)
    return found.masked_fill(found.isnan() | (found.abs() < ROUNDING), 0.0).flatten()


def token_losses(
    logits_NV: Tensor, base_NV: Tensor, token_N: Tensor, advantage_N: Tensor, lam: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns per answer token its share of the loss, and KL(policy || base) over the whole vocabulary: (N,), nats.

    `loss = -advantage * log p(token) + lam * KL`. The policy's probability is that of the distribution it was sampled
    from (`temperature`); the KL compares the models themselves.
    """
    logp_NV = logits_NV.log_softmax(-1)
    kl_N = (logp_NV.exp() * (logp_NV - base_NV.log_softmax(-1))).sum(-1)
    sampled_NV = logp_NV if temperature == 1.0 else (logits_NV / temperature).log_softmax(-1)
    chosen_N = sampled_NV.gather(-1, token_N[:, None])[:, 0]
    return lam * kl_N - advantage_N * chosen_N, kl_N


def importance(logp_N: Tensor, sampled_N: Tensor, at_most: float) -> tuple[Tensor, Tensor]:
    """Returns per answer token `p / q` cut at `at_most`, and as it is, both (N,), without gradients.

    q is the probability with which the sampler drew the token, and p the trainer's for the same z: they differ where
    the sampler is another program, which adds in another order or rounds a fold. Both are at temperature 1.
    """
    ratio_N = (logp_N - sampled_N).detach().exp()
    return ratio_N.clamp(max=at_most), ratio_N


def backward(
    model: Model,
    z_1K: Tensor,
    rollouts: Sequence[Rollout],
    advantage_B: Sequence[float],
    *,
    lam: float,
    temperature: float,
    batch: int,
    truncate: float | None = None,
) -> LossTerms:
    """Adds the gradient of one micro-batch to `z_1K.grad`: loss summed over tokens, divided by `batch` rollouts.

    With `truncate`, a token's advantage is multiplied by its importance weight, which is at most that (`importance`).
    The policy runs factored with `z_1K`, the reference is the same weights unbound. No gradient but z's is allocated:
    the vocabulary's part is differentiated in chunks of tokens, before the network's.
    """
    ids_BT, mask_BT, at_N, token_N = _packed(model, rollouts)
    lengths = torch.tensor([len(r.completion.token_ids) for r in rollouts])
    advantage_N = torch.tensor(advantage_B).repeat_interleave(lengths).to(model.device)
    with torch.no_grad():
        base_ND = model.hidden(ids_BT, mask_BT).flatten(0, 1)[at_N]
    with model.adapter.rows(z_1K):
        hidden_ND = model.hidden(ids_BT, mask_BT).flatten(0, 1)[at_N]
    leaf_ND = hidden_ND.detach().requires_grad_()
    sampled_N = torch.tensor([p for r in rollouts for p in r.completion.logprobs]).to(model.device)
    loss = kl = ratio = cut = 0.0
    for part in torch.arange(len(at_N), device=model.device).split(max(1, CHUNK_ELEMENTS // model.family.vocabulary)):
        with torch.no_grad():
            base_NV = model.logits(base_ND[part])
        logits_NV, weighted_N = model.logits(leaf_ND[part]), advantage_N[part]
        if truncate is not None:
            logp_N = logits_NV.detach().log_softmax(-1).gather(-1, token_N[part, None])[:, 0]
            weight_N, ratio_N = importance(logp_N, sampled_N[part], truncate)
            weighted_N = weighted_N * weight_N
            ratio, cut = ratio + float(ratio_N.sum()), cut + float((ratio_N > truncate).sum())
        loss_N, kl_N = token_losses(logits_NV, base_NV, token_N[part], weighted_N, lam, temperature)
        (loss_N.sum() / batch).backward()
        loss += float(loss_N.detach().sum()) / batch
        kl += float(kl_N.detach().sum())
    hidden_ND.backward(leaf_ND.grad)
    return LossTerms(loss=loss, kl=kl, tokens=len(at_N), ratio=ratio, cut=cut)


def _packed(model: Model, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Right-padded ids and mask, (B, T); the flat positions that predict the answers' tokens; those tokens, (N,)."""
    rows = [[*r.completion.prompt_ids, *r.completion.token_ids] for r in rollouts]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[model.chat.pad_id] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    at = [
        i * longest + position - 1
        for i, r in enumerate(rollouts)
        for position in range(len(r.completion.prompt_ids), len(rows[i]))
    ]
    tokens = [token for r in rollouts for token in r.completion.token_ids]
    device = model.device
    return ids.to(device), mask.to(device), torch.tensor(at, device=device), torch.tensor(tokens, device=device)
