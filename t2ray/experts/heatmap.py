"""How far an expert is from the base model, by decoder layer and kind of matrix. Loads no torch.

The base model's z is 1 everywhere. Two quantities are of interest: `mean_shift` keeps the sign (does the expert make
these singular values larger or smaller?), `mean_distance` does not (how much does it change them?).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from t2ray.models.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """One number per decoder layer and kind of matrix: `values[i][j]` is that of `layers[i]` and `kinds[j]`.

    `HeatMap(layers=(0, 1), kinds=("q_proj", "v_proj"), values=((0.01, 0.0), (0.02, 0.04)))`. A kind is the last part of
    a matrix' name. A layer without a matrix of some kind has 0 there. Layer -1 is all that pictures go through before
    the decoder.
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


def mean_shift(layout: Sequence[Target], z_K: Tensor) -> HeatMap:
    """The mean of `z - 1`, signed, over the singular values of each layer and kind of matrix.

    Args:
        layout: the adapted matrices in the order in which `z_K` holds their singular values.
    """
    return _means(layout, z_K.double() - 1)


def mean_distance(layout: Sequence[Target], z_K: Tensor) -> HeatMap:
    """The mean of `|z - 1|` over the singular values of each layer and kind of matrix; arguments as `mean_shift`."""
    return _means(layout, (z_K.double() - 1).abs())


def _means(layout: Sequence[Target], values_K: Tensor) -> HeatMap:
    sums: dict[tuple[int, str], float] = defaultdict(float)
    counts: dict[tuple[int, str], int] = defaultdict(int)
    for target, values_R in zip(layout, values_K.split([target.rank for target in layout]), strict=True):
        place = target.layer, target.name.rpartition(".")[2]
        sums[place] += float(values_R.sum())
        counts[place] += target.rank
    layers = tuple(sorted({layer for layer, _ in sums}))
    kinds = tuple(dict.fromkeys(kind for _, kind in sums))
    values = tuple(
        tuple(sums[layer, kind] / counts[layer, kind] if (layer, kind) in counts else 0.0 for kind in kinds)
        for layer in layers
    )
    return HeatMap(layers=layers, kinds=kinds, values=values)
