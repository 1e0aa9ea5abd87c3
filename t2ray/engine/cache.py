"""Keys and values of a static batch: buffers with room for its answers, filled prompt by prompt, and rows that leave.

Shapes: B rows, U prompts, T tokens, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer whose keys and values, (B, heads, T, D), are the filled part of buffers for `capacity` tokens.

    A step writes its own token. transformers' own cache grows by concatenation, which copies all tokens at every step.
    """

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

    def place(self, read: DynamicLayer, source_B: Tensor, row_B: Tensor, batch: int, end: int) -> None:
        """Makes what was `read` of some prompts, (U, heads, T, D), the tokens before `end` of rows of a whole batch.

        Row `row_B[i]` gets prompt `source_B[i]`. What no row was given is 0.
        """
        states = (read.keys, read.values)
        if not self.is_initialized:
            super().lazy_initialization(*states)
            self.rooms = tuple(one.new_zeros(batch, one.shape[1], self.capacity, one.shape[-1]) for one in states)
        for room, one in zip(self.rooms, states, strict=True):
            room[row_B, :, end - one.shape[2] : end] = one[source_B]
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the rows `beam_idx`, in their order."""
        end = self.get_seq_length()
        self.rooms = tuple(room[beam_idx.to(room.device)] for room in self.rooms)
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)


def roomy_cache(config: Any, capacity: int) -> DynamicCache:
    """The cache that `config`'s model asks for, its plain layers with room for `capacity` tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def repeat(cache: DynamicCache, rows: int, times: int) -> None:
    """Each of a cache's rows so many times, side by side; recurrent states can be reordered alone."""
    cache.reorder_cache(torch.arange(rows).repeat_interleave(times))


def like_lengths(
    groups: Sequence[list[int]], lengths: Sequence[int], pays: Callable[[int], bool]
) -> list[list[list[int]]]:
    """Groups of rows in the order of their rising lengths, cut where the padding up to a longer one is worth a pass.

    `pays` says whether so many tokens are.
    """
    pieces: list[list[list[int]]] = []
    tokens = 0
    for group, length in zip(groups, lengths, strict=True):
        if not pieces or pays(len(pieces[-1]) * length - tokens):
            pieces.append([])
            tokens = 0
        pieces[-1].append(group)
        tokens += length
    return pieces
