"""The seam of all adapters: an expert is one flat vector, whatever it does to the model.

An adapter sits in the layers of one model. The engine binds vectors to the rows of a batch, the trainer differentiates
one vector, and a file holds the vector in named parts. Nothing outside this package knows what a vector means.

Shapes: P numbers of an expert, R vectors, B rows of a batch or tokens of a packed one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from t2ray.core import Mixture
from t2ray.models.targets import Target


class Adapter(Protocol):
    """What the engine and the trainer ask of an adapter.

    `layout` names the adapted matrices in order, `size` is P, and `neutral` is the vector, (P,), float32, that leaves
    the model as it is. `bank` holds the experts by name, each (P,), float32, on the model's device. `by_row` says
    whether rows of one batch may have vectors of their own; pictures that go through matrices `in_tower` are bound by
    themselves (`Model.featured`).
    """

    by_row: bool
    layout: tuple[Target, ...]
    size: int
    neutral: Tensor
    bank: dict[str, Tensor]

    def mix(self, mixture: Mixture) -> Tensor:
        """The vector of a mixture of the bank's experts, (P,), float32.

        Raises:
            UnknownExpert: the mixture names an expert that is not in the bank.
            ExpertError: it has weights per layer, and not one for each layer.
        """
        ...

    def set_experts(self, changed: Mapping[str, Tensor], gone: Collection[str] = ()) -> None:
        """Replaces the bank by one with some experts changed and others gone; who reads the old one is undisturbed."""
        ...

    def rows(self, v_RP: Tensor, row_index: Tensor | None = None) -> AbstractContextManager[None]:
        """In this thread, row (or packed token) i of the next forwards uses `v_RP[row_index[i]]`; differentiable in
        `v_RP`. Without `row_index`, R is 1 and all rows use that vector."""
        ...

    def each(self, v: Sequence[Tensor | None]) -> AbstractContextManager[None]:
        """As `rows`: row (or packed token) i uses `v[i]`, where None is the base model. Not differentiable."""
        ...

    def folded(self, v_P: Tensor) -> AbstractContextManager[None]:
        """In this thread, all rows of the next forwards use `v_P`, through dense weights that are made once."""
        ...

    def is_folded(self, v_P: Tensor) -> bool:
        """Whether `folded(v_P)` finds its weights ready."""
        ...

    def tokens_to_fold(self) -> int:
        """From how many tokens on a fold and dense passes cost less than passes by row."""
        ...

    def table(self, v: Sequence[Tensor | None]) -> Tensor:
        """Several vectors as rows, (R, P); None is the base model."""
        ...

    def split(self, v_P: Tensor) -> Mapping[str, Tensor]:
        """The vector in the named parts that a file holds."""
        ...

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The vector, (P,), float32, of named parts; neutral where a part is missing."""
        ...

    def changes(self, v_P: Tensor) -> Iterator[tuple[Target, Tensor, Tensor]]:
        """What the vector adds to each target's weight, as a product `left_MR right_RN`, both float32.

        The first k columns of `left` and rows of `right` are the best approximation of rank k.
        """
        ...

    def initial(self, kind: str, noise_P: Tensor, start_P: Tensor | None = None) -> Tensor:
        """The parameters, (P,), that training starts from: those of the base model, or of `start_P`, plus `noise_P`.

        Raises:
            ExpertError: no parameters of this `kind` have the vector `start_P`.
        """
        ...

    def vector(self, kind: str, p_P: Tensor) -> Tensor:
        """The vector, (P,), of trained parameters; differentiable. `kind` is `rl.init`."""
        ...
