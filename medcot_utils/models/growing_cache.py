"""Write a batch on a CPU without waste: finished rows leave it, and the cache grows by pages.

transformers' own cache copies all keys and values for each token, and its `generate` keeps every row until the last one ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchEncoding, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from medcot_utils.models.prefix import begin_with, count_shared, read_prefix

if TYPE_CHECKING:
    from medcot_utils.models.decoding import ForcedClosing

_PAGE = 64  # tokens
_TURN = 32  # tokens after which finished rows leave the batch
_READ_AT_ONCE = 8  # prompts; 60 at once do not fit the processor's cache and take twice as long


class PagedLayer(DynamicLayer):
    """Extend transformers' layer of keys and values, (rows, heads, tokens, width), with room for later tokens."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Take the arguments of DynamicLayer."""
        super().__init__(*arguments, **named)
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of new tokens, and return those of all tokens so far."""
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
        # If rows were selected or reordered since, `keys` is another tensor.
        return self.get_seq_length() == 0 or self.keys.data_ptr() == self._room[0].data_ptr()


def make_growing_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for one `generate` call. Other kinds of layers, such as sliding windows, stay transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PagedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def generate_in_turns(model: PreTrainedModel, inputs: BatchEncoding, closing: ForcedClosing, arguments: dict[str, Any]) -> None:
    """Call `generate` for some tokens at a time, and remove finished rows from the batch between calls.

    `closing.rows` then holds the text. It is what one call would write, up to rounding, because fewer rows are multiplied at
    once.

    Args:
        inputs: token ids and mask (rows, tokens), padded on the left.
        arguments: the arguments of one call of `generate`, with `closing` among the logits processors."""
    ids, mask, left = inputs["input_ids"], inputs["attention_mask"], arguments["max_new_tokens"]
    rows = [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]
    shared = count_shared(rows)
    with torch.inference_mode():
        prefix = read_prefix(model, rows[0][:shared])
        if prefix is not None:
            _move_padding(ids, mask, shared)
        cache = _read_prompts(model, ids[:, :-1], mask[:, :-1], prefix)
        while left > 0 and not all(closing.done):
            rows = [row for row, done in enumerate(closing.done) if not done]
            if len(rows) < len(ids):
                ids, mask = ids[rows], mask[rows]
                cache.batch_select_indices(torch.tensor(rows))
                for processor in arguments["logits_processor"]:
                    processor.keep(rows)
            turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "max_new_tokens": min(_TURN, left)}
            before = ids.shape[1]
            ids = model.generate(**arguments | turn)
            written = ids.shape[1] - before
            mask = torch.cat([mask, mask.new_ones(len(ids), written)], dim=1)
            left -= written


def _move_padding(ids: torch.Tensor, mask: torch.Tensor, shared: int) -> None:
    """Move each row's padding from its left end to the place after its first `shared` tokens, in place."""
    for row, real in zip(ids, mask, strict=True):
        padding = int((real == 0).sum())
        for tensor in (row, real):
            tensor[: padding + shared] = tensor[: padding + shared].roll(shared)


def _read_prompts(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, prefix: DynamicCache | None) -> DynamicCache:
    """Return the cache of the prompts. Some rows are read at a time, from the end of the prefix that they share."""
    shared = 0 if prefix is None else prefix.get_seq_length()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    can_join = all(isinstance(layer, DynamicLayer) for layer in make_growing_cache(model).layers)
    parts, size = [], _READ_AT_ONCE if can_join else len(ids)
    for start in range(0, len(ids), size):
        rows, cache = slice(start, start + size), make_growing_cache(model)
        if prefix is not None:
            begin_with(prefix, len(ids[rows]), cache)
        given = {"input_ids": ids[rows, shared:], "attention_mask": mask[rows], "position_ids": positions[rows, shared:]}
        model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        parts.append(cache)
    whole = parts[0]
    if len(parts) == 1:
        return whole
    for layer, *others in zip(*(part.layers for part in parts), strict=True):
        layer.keys, layer.values = (torch.cat([getattr(one, name) for one in (layer, *others)]) for name in ("keys", "values"))
    return whole
