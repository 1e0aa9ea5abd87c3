"""The KL of a policy to its base on given rollouts, for whatever gives logits. Torch only.

Shapes: B rows, T tokens of prompt and answer, V vocabulary, N answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.learn.turns import Rows

Logits = Callable[[Tensor], Tensor]
"""From ids, (B, T), to logits, (B, T, V)."""

BATCH = 8


@torch.no_grad()
def mean_kl(policy: Logits, base: Logits, rows: Rows) -> float:
    """Returns KL(policy || base) over the whole vocabulary, in nats per answer token.

    Rows are padded on the right, where a causal model's earlier tokens do not see it.
    """
    total, tokens = 0.0, 0
    for i in range(0, len(rows), BATCH):
        part = rows[i : i + BATCH]
        longest = max(len(prompt) + len(answer) for prompt, answer in part)
        ids_BT = torch.tensor([[*row[0], *row[1]] + [0] * (longest - len(row[0]) - len(row[1])) for row in part])
        at = [(b, t) for b, (p, a) in enumerate(part) for t in range(len(p) - 1, len(p) + len(a) - 1)]
        row_N, place_N = torch.tensor(at).T
        logp_NV = policy(ids_BT)[row_N, place_N].float().log_softmax(-1)
        base_NV = base(ids_BT)[row_N, place_N].float().log_softmax(-1)
        total += float((logp_NV.exp() * (logp_NV - base_NV)).sum())
        tokens += len(at)
    return total / tokens
