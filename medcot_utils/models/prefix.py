"""Read the common beginning of prompts or rows once for all of them: the template is a third of a row and half of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig, PreTrainedModel


class TokenizedRow(TypedDict):
    """Hold the token ids of a row, and its labels: the same ids, or -100 for tokens without a loss."""

    input_ids: list[int]
    labels: list[int]


def count_shared(rows: Sequence[Sequence[int]]) -> int:
    """Return how many token ids all rows share at the beginning, so that each row has at least two more; 0 for a single row."""
    if len(rows) < 2:
        return 0
    most = min(map(len, rows)) - 2
    return next((place for place in range(most) if len({row[place] for row in rows}) > 1), max(0, most))


def attends_to_all(config: PretrainedConfig) -> bool:
    """Return whether each layer attends to all earlier tokens: it has no sliding window, and no state in place of keys."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def read_prefix(model: PreTrainedModel, ids: Sequence[int]) -> DynamicCache | None:
    """Return the keys and values of one row of token ids. Return None without ids, or unless `attends_to_all`.

    A sliding window counts positions, and padding between the prefix and the rest of a row would take some of them."""
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
    """Fill `cache`, which is empty, with the prefix's keys and values for `rows` rows, and return it."""
    for layer, held in zip(cache.layers, prefix.layers, strict=True):
        layer.update(*(states.expand(rows, -1, -1, -1) for states in (held.keys, held.values)))
    return cache
