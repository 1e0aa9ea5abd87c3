"""What the mixtures of all adapters have in common: experts of a bank, each with its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from t2ray.config.files import nearest
from t2ray.core import ExpertError, Mixture, UnknownExpert


def terms(mixture: Mixture, bank: Mapping[str, Tensor], layer_of_P: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight and the vector, (P,), of each expert of a mixture; with weights by layer, one weight per number.

    Args:
        layer_of_P: the decoder layer that each number belongs to.

    Raises:
        UnknownExpert: the mixture names an expert that is not in the bank.
        ExpertError: it has weights by layer, and not one for each layer.
    """
    for name, alpha in mixture.weights:
        if name not in bank:
            raise UnknownExpert(f"unknown expert {name!r}{nearest(name, bank)}")
        weight = bank[name].new_tensor(alpha)
        if len(alpha) > 1:
            layers = int(layer_of_P.max()) + 1
            if len(alpha) != layers:
                raise ExpertError(f"expert {name!r} has {len(alpha)} weights by layer; the model has {layers} layers")
            weight = weight[layer_of_P]
        yield weight, bank[name]
