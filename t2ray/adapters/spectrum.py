"""How much of a model's matrices their largest singular values hold (the paper's figure of the top r components)."""

from __future__ import annotations

from collections import defaultdict

import torch

from t2ray.adapters.factors import Factors

_LEAST = 1e-300  # a matrix of zeros has no variance to share


def variance(factors: Factors) -> dict[str, list[list[float]]]:
    """Returns, for each kind of matrix, [r, share] for r = 1, 2, 4 and so on, and for all singular values.

    The share is `sum of the r largest s^2 / sum of all s^2`, the mean over the matrices of the kind; of shapes that
    differ within a kind, r goes as far as the smallest.

    Raises:
        ModelError: a file of the factors is missing or damaged.
    """
    shares = defaultdict(list)
    for target in factors.layout:
        _, s_R, _ = factors.load(target.name)  # mapped: the vectors beside it are not read
        squares_R = s_R.double().square()
        shares[target.name.rpartition(".")[2]].append(squares_R.cumsum(0) / squares_R.sum().clamp_min(_LEAST))
    found: dict[str, list[list[float]]] = {}
    for kind, rows in shares.items():
        most = min(map(len, rows))
        mean_R = torch.stack([row_R[:most] for row_R in rows]).mean(0)
        ranks = sorted({*(2**power for power in range(most.bit_length())), most})
        found[kind] = [[rank, float(mean_R[rank - 1])] for rank in ranks]
    return found
