"""A checkpoint's tensors as the matrices of the model that transformers loads from them, read one at a time.

The names of a checkpoint are not always those of the modules: transformers renames some as it loads, adds or takes off
a prefix, and stacks the matrices of MoE experts. Its own mapping is used here.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from t2ray.core import ModelError
from t2ray.models.skeleton import skeleton
from t2ray.models.targets import Target, is_transposed
from t2ray.models.weights import Weights, open_weights


class ModelCheckpoint:
    """The tensors of a model folder under the names of the loaded model's parameters.

    `hf` is that model on the meta device.
    """

    def __init__(self, weights: Weights) -> None:
        """
        Raises:
            ModelError: transformers knows no model of the folder's configuration.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.weights, self.hf = weights, skeleton(str(weights.folder))
        mapping = get_model_conversion_mapping(self.hf)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converters = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        parameters, prefix = self.hf.state_dict(), self.hf.base_model_prefix
        # parameter -> the converter's pattern, or "" -> its tensors in the checkpoint, experts in the order of numbers
        self._sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key in sorted(weights.entries, key=_natural):
            name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
            if name not in parameters and key in parameters:  # as transformers does: a name that needs no change
                name, pattern = rename_source_key(key, [], [], prefix, parameters)
            for part in self._made_of(name, pattern):
                self._sources[part][pattern or ""].append(key)

    def _made_of(self, name: str, pattern: str | None) -> list[str]:
        """The parameters that a tensor, renamed so, is a part of: a fused one is cut into several."""
        if pattern is None:
            return [name]
        first, *others = self._converters[pattern].target_patterns
        return [name, *(name.replace(first, other) for other in others)]

    def sources(self, target: Target) -> list[str]:
        """The names of the checkpoint's tensors that a target is made of.

        Raises:
            ModelError: there are none.
        """
        keys = [key for keys in self._keys(target).values() for key in keys]
        if not keys:
            raise ModelError(
                f"{self.weights.folder} has no weight for {target.name} of {type(self.hf).__name__} (a quantised model "
                "has other tensors); use the model before quantisation, or choose other matrices by targets"
            )
        return keys

    def matrix(self, target: Target) -> Tensor:
        """A target's weight, (m, n); of stacked MoE experts only this one's tensors are read.

        Raises:
            ModelError: the checkpoint has it in another shape, or not at all.
        """
        self.sources(target)
        weight = self._converted(target, {name: self.weights.read(name) for name in self.sources(target)})
        return self._checked(target, weight)

    def check(self, target: Target) -> None:
        """Raises as `matrix` does, from the headers alone."""
        shapes = self.weights.shapes
        self._checked(
            target, self._converted(target, {n: torch.empty(shapes[n], device="meta") for n in self.sources(target)})
        )

    def _keys(self, target: Target) -> dict[str, list[str]]:
        found = self._sources.get(target.parameter, {})
        if target.expert is None or all(len(keys) == 1 for keys in found.values()):
            return found
        return {pattern: keys[target.expert : target.expert + 1] for pattern, keys in found.items()}

    def _converted(self, target: Target, tensors: dict[str, Tensor]) -> Tensor:
        """The parameter that the tensors make, of which a target of an MoE expert is one slice."""
        keys = self._keys(target)
        if "" in keys:
            weight = next(iter(tensors.values()))
        else:
            converter = deepcopy(self._converters[next(iter(keys))])
            for pattern, names in keys.items():
                for name in names:
                    converter.add_tensor(target.parameter, name, pattern, tensors[name])
            weight = converter.convert(target.parameter, model=self.hf, config=self.hf.config)[target.parameter]
        if target.expert is not None:  # the one that was read, or one of all that are stored together
            weight = weight[target.expert if len(weight) == len(self.hf.get_parameter(target.parameter)) else 0]
        owner = self.hf.get_submodule(target.parameter.rpartition(".")[0])
        return weight.t() if is_transposed(owner) else weight

    def _checked(self, target: Target, weight: Tensor) -> Tensor:
        if weight.shape != (target.m, target.n):
            raise ModelError(
                f"{self.weights.folder}: {target.name} has the shape {tuple(weight.shape)}, and its config.json says "
                f"({target.m}, {target.n}); the two are of different models"
            )
        return weight


def open_checkpoint(folder: Path) -> ModelCheckpoint:
    """The checkpoint of a model folder, opened once per process; raises as `ModelCheckpoint` and `open_weights` do."""
    return _opened(open_weights(folder))


@lru_cache(maxsize=2)
def _opened(weights: Weights) -> ModelCheckpoint:
    return ModelCheckpoint(weights)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
