"""A batch in shares, and their sums over the workers.

As many shares give the same sum, bit for bit, on any number of workers.

Shapes: S shares of a batch, X any shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


class Shares:
    """A batch in `total` shares, of which this worker has `own`. Without torch.distributed the worker is alone."""

    def __init__(self, at_least: int = 1) -> None:
        """`total` is `at_least`, or one per worker where there are more workers."""
        together = distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world = distributed.get_world_size() if together else 1
        self.total = max(at_least, self.world)
        self.own = range(self.rank, self.total, self.world)

    def sum(self, own: Sequence[Tensor]) -> Tensor:
        """Returns the sum over all shares in their order, (X), of which this worker has `own`, each (X).

        The shares of other workers arrive as zeros that are added in between, which change no bit of a sum.
        """
        all_SX = own[0].new_zeros(self.total, *own[0].shape)
        all_SX[list(self.own)] = torch.stack(list(own))
        if self.world > 1:
            distributed.all_reduce(all_SX)
        return all_SX.sum(0)
