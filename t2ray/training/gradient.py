"""The gradient of a share of a batch in z, micro-batch by micro-batch.

Shapes: B rollouts of the share, K numbers of the expert's vector.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.config.rl import RLConfig
from t2ray.grades import Rollout
from t2ray.training.loss import backward, repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A share of a batch as the loss takes it: rollouts, their advantages, and what their losses are multiplied by.

    `before` has, after the first update of a step, the log-probabilities of a rollout's tokens before it.
    """

    rollouts: list[Rollout]
    advantage_B: list[float]
    share_B: list[float]
    before: dict[int, Tensor] = field(default_factory=dict)


def gradient(
    model: Model, z_K: Tensor, part: Part, rl: RLConfig, *, batch: int, truncate: float | None
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
