"""The z of SVF's trained numbers: one number per singular value, or few that singular values have in common.

An expert has a z for every singular value, however few numbers it was trained by: it is stored, mixed and served alike.

Shapes: K singular values of all targets in a row, r of a matrix, P trained numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from t2ray.config.adapter import AdapterConfig
from t2ray.models.targets import Target


class Few:
    """Which trained number each singular value has; z is 1 where it has none.

    `config.numbers` of a matrix's largest singular values have one each, and matrices that are `config.tied` have them
    in common: those of one kind in all layers of the decoder, and in all of a vision tower, or all.
    """

    def __init__(self, layout: Sequence[Target], config: AdapterConfig, device: torch.device) -> None:
        places: dict[tuple[str, int], int] = {}
        place, first = list[int](), list[int]()
        for target in layout:
            kind = f"{'tower.' * target.in_tower}{target.name.rpartition('.')[2]}"
            group = {None: target.name, "layers": kind, "all": ""}[config.tied]
            few = min(config.numbers or target.rank, target.rank)
            for i in range(few):
                if (group, i) not in places:
                    places[group, i] = len(first)
                    first.append(len(place) + i)
            place += [*(places[group, i] for i in range(few)), *[-1] * (target.rank - few)]
        self.place_K = torch.tensor(place, device=device)
        self.first_P = torch.tensor(first, device=device)

    def of(self, values_K: Tensor) -> Tensor:
        """The trained numbers, (P,), of values of all singular values: each that of the first one that has it."""
        return values_K[self.first_P]

    def spread(self, p_P: Tensor) -> Tensor:
        """z, (K,), of the trained numbers; differentiable."""
        return torch.cat([p_P, p_P.new_ones(1)])[self.place_K]  # the last is what a place of -1 names


def parametrise(p_K: Tensor, kind: str, s_K: Tensor, ranks: Sequence[int]) -> Tensor:
    """z of trained parameters, (K,); differentiable. `ranks` are the numbers of singular values of the matrices.

    `scale`: z = p. `sigmoid`: the reference code's `z = sigmoid(p)`, each matrix rescaled by `sum(s) / sum(s z)`, so
    that equal parameters are the base model.
    """
    if kind == "scale":
        return p_K
    parts = zip(torch.sigmoid(p_K).split(list(ranks)), s_K.split(list(ranks)), strict=True)
    return torch.cat([z_r * (s_r.sum() / (s_r * z_r).sum()) for z_r, s_r in parts])
