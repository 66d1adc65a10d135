"""A key-value cache for a CPU that grows by pages: transformers' own copies all keys and values for each token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_PAGE = 64  # tokens


class PagedLayer(DynamicLayer):
    """Extend transformers' layer of keys and values, (rows, heads, tokens, width), by room for the tokens to come."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Take the arguments of DynamicLayer."""
        super().__init__(*arguments, **named)
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the new tokens' keys and values; return those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        end = held + key_states.shape[-2]
        if self._room is None or not self._is_in_room() or end > self._room[0].shape[-2]:
            shape = (*key_states.shape[:2], end + _PAGE, key_states.shape[-1])
            room = key_states.new_empty(shape), value_states.new_empty((*shape[:-1], value_states.shape[-1]))
            for new, old in zip(room, (self.keys, self.values), strict=True):
                new[:, :, :held] = old if held else 0
            self._room = room
        for new, states in zip(self._room, (key_states, value_states), strict=True):
            new[:, :, held:end] = states
        self.keys, self.values = (whole[:, :, :end] for whole in self._room)
        return self.keys, self.values

    def _is_in_room(self) -> bool:
        # Rows may have been chosen or reordered since: then `keys` is another tensor.
        return self.get_seq_length() == 0 or self.keys.data_ptr() == self._room[0].data_ptr()


def make_growing_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for one `generate` call. Layers of other kinds, such as sliding windows, stay transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PagedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
