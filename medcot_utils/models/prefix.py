"""Read the beginning that prompts or rows share once for all of them: the template is a third of a row, half of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig, PreTrainedModel


class TokenizedRow(TypedDict):
    """Hold the token ids of a row, and its labels: the same ids, or -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]


def count_shared(rows: Sequence[Sequence[int]]) -> int:
    """Return how many token ids all rows begin with, with at least two of each row left over; 0 for a single row."""
    if len(rows) < 2:
        return 0
    most = min(map(len, rows)) - 2
    return next((place for place in range(most) if len({row[place] for row in rows}) > 1), max(0, most))


def attends_to_all(config: PretrainedConfig) -> bool:
    """Return whether each layer of a model attends to all tokens before: no sliding window, no state in place of keys."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def read_prefix(model: PreTrainedModel, ids: Sequence[int]) -> DynamicCache | None:
    """Return the keys and values of token ids, for one row; None without ids, or if a layer attends to less than all before.

    Such a layer, of a sliding window, counts places: padding between the prefix and what follows it would take some."""
    import torch
    from transformers import DynamicCache

    if not ids or not attends_to_all(model.config):
        return None
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        row = torch.tensor([list(ids)], device=model.device)
        model(input_ids=row, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def begin_with(prefix: DynamicCache, rows: int, cache: DynamicCache) -> DynamicCache:
    """Return `cache`, an empty one, with the prefix's keys and values for so many rows."""
    for layer, held in zip(cache.layers, prefix.layers, strict=True):
        layer.update(*(states.expand(rows, -1, -1, -1) for states in (held.keys, held.values)))
    return cache
