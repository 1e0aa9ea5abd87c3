"""REINFORCE with an exact KL to the base, differentiated in z alone (paper section 3.1, equation 2), and its kin.

Shapes: B rollouts, U prompts, T tokens, N answer tokens of all rollouts, D features, V vocabulary, K singular values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.config.rl import RLConfig
from t2ray.grades import Rollout
from t2ray.prompts import pictured

ROUNDING = 1e-9
"""An advantage below this is the rounding of a mean: AdamW would turn it into a step of full size."""

CHUNK_ELEMENTS = 1 << 23
"""Logits that are in memory at once (32 MiB in float32): answer tokens go through the vocabulary in chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Sums over a batch of rollouts: `loss` (of the objective, each rollout counted once), `kl` (nats) and `tokens`.

    `ratio` is the sum of the tokens' importance weights before they are cut, and `cut` the number of those that are.
    `chosen_N` has the log-probability of each answer token at the sampling temperature, without gradients.
    """

    loss: float
    kl: float
    tokens: int
    chosen_N: Tensor
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
    (RLOO, arXiv 2402.14740, equation 3). `group`: the mean of the prompt's samples, and the rest is divided by their
    standard deviation (GRPO, arXiv 2402.03300, section 4.1.2; that of a sample, plus 1e-4, as in TRL). A group without
    variance, which is the batch for `mean` and else a prompt's samples, carries nothing: its advantages are 0, not the
    rounding of a mean.

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
        off, others = groups - groups.nanmean(1, keepdim=True), (number - 1).clamp(min=1)
        if baseline == "loo":
            found = off * number / others
        else:
            found = off / ((off.nan_to_num().square().sum(1, keepdim=True) / others).sqrt() + 1e-4)
    return found.masked_fill(found.isnan() | (found.abs() < ROUNDING), 0.0).flatten()


def shares_of_tokens(lengths: Sequence[int], how: str, mean: float, limit: int) -> list[float]:
    """Returns what each rollout's summed loss is multiplied by.

    `sum`: 1, the paper's. `mean`: 1 over its own length (GRPO). `batch`: 1 over the `mean` length of the batch, so that
    each token of the batch counts alike (DAPO, arXiv 2503.14476, equation 8). `limit`: 1 over the greatest length
    (Dr. GRPO, arXiv 2503.20783).
    """
    divisor = {"sum": 1.0, "batch": mean, "limit": float(limit)}
    return [1 / max(1.0, divisor.get(how, length)) for length in lengths]


def surrogate(chosen_N: Tensor, before_N: Tensor, advantage_N: Tensor, clip: float) -> Tensor:
    """Returns PPO's clipped objective per token, (N,) (arXiv 1707.06347, equation 7): min(r A, clip(r) A).

    r is the probability of the token over that `before` the step's first update, whose logarithms are given.
    """
    ratio_N = (chosen_N - before_N).exp()
    return torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip, 1 + clip) * advantage_N)


def token_losses(
    logits_NV: Tensor, base_NV: Tensor, token_N: Tensor, advantage_N: Tensor, lam: float, temperature: float,
    before_N: Tensor | None = None, clip: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns per answer token its share of the loss, KL(policy || base) over the whole vocabulary, and log p: (N,).

    `loss = -advantage * log p(token) + lam * KL`, in nats; with `before_N`, the `surrogate` in the place of log p. The
    policy's probability is that of the distribution it was sampled from (`temperature`); the KL compares the models
    themselves.
    """
    logp_NV = logits_NV.log_softmax(-1)
    kl_N = (logp_NV.exp() * (logp_NV - base_NV.log_softmax(-1))).sum(-1)
    sampled_NV = logp_NV if temperature == 1.0 else (logits_NV / temperature).log_softmax(-1)
    chosen_N = sampled_NV.gather(-1, token_N[:, None])[:, 0]
    gain_N = advantage_N * chosen_N if before_N is None else surrogate(chosen_N, before_N, advantage_N, clip)
    return lam * kl_N - gain_N, kl_N, chosen_N.detach()


def importance(logp_N: Tensor, sampled_N: Tensor, at_most: float) -> tuple[Tensor, Tensor]:
    """Returns per answer token `p / q` cut at `at_most`, and as it is, both (N,), without gradients.

    q is the probability with which the sampler drew the token, and p the trainer's for the same z: they differ where
    the sampler is another program, which adds in another order or rounds a fold. Both are at the sampling temperature:
    a mean over tokens drawn from q becomes the one over p by p / q of these two distributions, and of no others.
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
    share_B: Sequence[float] | None = None,
    before: Sequence[Tensor] | None = None,
    clip: float = 0.2,
) -> LossTerms:
    """Adds the gradient of one micro-batch to `z_1K.grad`: loss summed over tokens, divided by `batch` rollouts.

    With `truncate`, a token's advantage is multiplied by its importance weight, which is at most that (`importance`);
    the completions' log-probabilities are then the sampler's at `temperature`, and the weight stays what it was at the
    step's first update, from where the `surrogate` goes on.
    With `share_B`, a rollout's loss is multiplied by its share; with `before`, the log-probabilities of each rollout's
    tokens before the step's first update, `clip` bounds how far an update goes from there (`surrogate`).
    The policy runs factored with `z_1K`, the reference is the same weights unbound. No gradient but z's is allocated:
    the vocabulary's part is differentiated in chunks of tokens, before the network's.
    """
    read, token_N = _reader(model, rollouts)
    lengths = torch.tensor([len(r.completion.token_ids) for r in rollouts])
    advantage_N = torch.tensor(advantage_B).repeat_interleave(lengths).to(model.device)
    share_N = torch.tensor(share_B or [1.0] * len(rollouts)).repeat_interleave(lengths).to(model.device)
    before_N = None if before is None else torch.cat(list(before)).to(model.device)
    chosen: list[Tensor] = []
    with torch.no_grad():
        base_ND = read()
    with model.adapter.rows(z_1K):
        hidden_ND = read()
    leaf_ND = hidden_ND.detach().requires_grad_()
    sampled_N = torch.tensor([p for r in rollouts for p in r.completion.logprobs]).to(model.device)
    loss = kl = ratio = cut = 0.0
    for part in torch.arange(len(token_N), device=model.device).split(
        max(1, CHUNK_ELEMENTS // model.family.vocabulary)
    ):
        with torch.no_grad():
            base_NV = model.logits(base_ND[part])
        logits_NV, weighted_N = model.logits(leaf_ND[part]), advantage_N[part]
        start_N = None if before_N is None else before_N[part]
        if truncate is not None:
            logp_NV = (logits_NV.detach() / temperature).log_softmax(-1)
            logp_N = logp_NV.gather(-1, token_N[part, None])[:, 0] if start_N is None else start_N
            weight_N, ratio_N = importance(logp_N, sampled_N[part], truncate)
            weighted_N = weighted_N * weight_N
            ratio, cut = ratio + float(ratio_N.sum()), cut + float((ratio_N > truncate).sum())
        loss_N, kl_N, chosen_N = token_losses(
            logits_NV, base_NV, token_N[part], weighted_N, lam, temperature, start_N, clip
        )
        loss_N = loss_N * share_N[part]
        (loss_N.sum() / batch).backward()
        loss += float(loss_N.detach().sum()) / batch
        kl += float(kl_N.detach().sum())
        chosen.append(chosen_N)
    hidden_ND.backward(leaf_ND.grad)
    return LossTerms(loss=loss, kl=kl, tokens=len(token_N), ratio=ratio, cut=cut, chosen_N=torch.cat(chosen))


def repeats(model: Model, rollouts: Sequence[Rollout]) -> bool:
    """Whether prompts come up so often that to read each of them once is worth a pass of its own."""
    tokens = {r.completion.prompt_ids: len(r.completion.prompt_ids) - 1 for r in rollouts}
    saved = sum(len(r.completion.prompt_ids) - 1 for r in rollouts) - sum(tokens.values())
    if any(pictured(r.example.messages) for r in rollouts):
        return False
    return saved > 0 and model.family.shares_prefixes and model.family.pays(saved)


def _reader(model: Model, rollouts: Sequence[Rollout]) -> tuple[Callable[[], Tensor], Tensor]:
    """Returns what reads the hidden states that predict the answers' tokens, (N, D), by the z that is bound; and those
    tokens, (N,).

    Where samples have their prompt in common, all of it but its last token is read once, unless it has pictures.
    """
    device = model.device
    tokens = [token for r in rollouts for token in r.completion.token_ids]
    lengths = [len(r.completion.token_ids) for r in rollouts]
    shared = repeats(model, rollouts)
    prefixes = list(dict.fromkeys(r.completion.prompt_ids[:-1] for r in rollouts if shared))
    own = [[*r.completion.prompt_ids, *r.completion.token_ids] for r in rollouts]
    if shared:
        own = [[r.completion.prompt_ids[-1], *r.completion.token_ids[:-1]] for r in rollouts]
    longest, deepest = max(map(len, own)), max(map(len, prefixes), default=0)
    pad = model.chat.pad_id
    ids_BT = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in own], device=device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in own], device=device)
    first = [0 if shared else len(r.completion.prompt_ids) - 1 for r in rollouts]
    at = [i * longest + first[i] + j for i, length in enumerate(lengths) for j in range(length)]
    at_N = torch.tensor(at, device=device)
    if not shared:
        seen = model.seen([pictured(r.example.messages) for r in rollouts], [0] * len(rollouts), longest)
        return lambda: model.hidden(ids_BT, mask_BT, seen).flatten(0, 1)[at_N], torch.tensor(tokens, device=device)
    prefix_UP = torch.tensor([[*[pad] * (deepest - len(row)), *row] for row in prefixes], device=device)
    real_UP = torch.tensor([[0] * (deepest - len(row)) + [1] * len(row) for row in prefixes], device=device)
    prefix_of_B = torch.tensor([prefixes.index(r.completion.prompt_ids[:-1]) for r in rollouts], device=device)

    def read() -> Tensor:
        return model.hidden_behind(prefix_UP, real_UP, prefix_of_B, ids_BT, mask_BT).flatten(0, 1)[at_N]

    return read, torch.tensor(tokens, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """A share of a batch as the loss takes it: rollouts, their advantages, and what their losses are multiplied by.

    `before` has, after the first update of a step, the log-probabilities of a rollout's tokens before it.
    """

    rollouts: list[Rollout]
    advantage_B: list[float]
    share_B: list[float]
    before: dict[int, Tensor] = field(default_factory=dict)


def gradient(
    model: Model, z_K: Tensor, part: Weighed, rl: RLConfig, *, batch: int, truncate: float | None
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of a share, (K,), and its sums: loss, KL, tokens, advantages that are not 0, weights.

    Args:
        batch: the number of rollouts of the whole batch.
    """
    leaf_1K = z_K.detach()[None].requires_grad_()
    leaf_1K.grad = torch.zeros_like(leaf_1K)
    graded = [i for i, rollout in enumerate(part.rollouts) if rollout.reward is not None]
    made = [rollout.completion for rollout in part.rollouts]
    order = sorted(graded, key=lambda i: len(made[i].prompt_ids) + len(made[i].tokens))  # like lengths pad little
    if repeats(model, part.rollouts):  # and a prompt's samples stay together
        order = sorted(graded, key=lambda i: (len(made[i].prompt_ids), made[i].prompt_ids))
    first = not part.before
    sums = torch.tensor([0.0, 0.0, 0.0, sum(map(bool, part.advantage_B)), 0.0, 0.0], dtype=torch.float64)
    for at in _micro_batches(order, [len(one.prompt_ids) + len(one.tokens) for one in made], rl):
        terms = backward(
            model, leaf_1K, [part.rollouts[i] for i in at], [part.advantage_B[i] for i in at],
            lam=rl.kl, temperature=rl.temperature, batch=batch, truncate=truncate,
            share_B=[part.share_B[i] for i in at],
            before=None if first else [part.before[i] for i in at], clip=rl.ratio_clip,
        )  # fmt: skip
        if rl.updates > 1 and first:
            part.before.update(zip(at, terms.chosen_N.split([len(made[i].tokens) for i in at]), strict=True))
        own = [terms.loss, terms.kl, terms.tokens, 0.0, terms.ratio, terms.cut]
        sums += torch.tensor(own, dtype=torch.float64)
    return leaf_1K.grad[0], sums


def _micro_batches(order: list[int], lengths: list[int], rl: RLConfig) -> list[list[int]]:
    """Returns the rollouts `order`, each of so many tokens, in parts that are within the bounds of a micro-batch."""
    parts: list[list[int]] = []
    for i in order:
        last = parts[-1] if parts else []
        tokens = (len(last) + 1) * max(lengths[j] for j in [*last, i])
        if not last or len(last) == rl.micro_batch or tokens > (rl.micro_tokens or tokens):
            parts.append([])
        parts[-1].append(i)
    return parts
