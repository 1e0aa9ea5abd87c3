"""A key-value cache with room for the whole answer: a step writes its own token, and copies none of the earlier ones.

transformers' own cache grows by concatenation, which copies all of it at every step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values, (B, heads, T, D), are the filled part of buffers for `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the buffers when the first keys show their sizes."""
        super().lazy_initialization(key_states, value_states)
        self.rooms = tuple(
            states.new_empty(*states.shape[:2], self.capacity, states.shape[-1])
            for states in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new tokens; the keys and values of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)
        return self.keys, self.values


def roomy_cache(config: Any, capacity: int) -> DynamicCache:
    """The cache that `config`'s model asks for, its plain layers with room for `capacity` tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
