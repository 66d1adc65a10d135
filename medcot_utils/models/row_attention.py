"""Attend within each of several rows that are joined into one, for GPUs whose torch has no attention over unequal lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def attend_in_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the attention output (1, tokens, heads, width) of rows that are joined into one.

    All rows are split off together, so that the backward pass joins their gradients once. If each row is a slice, the backward
    pass fills a gradient of the whole length with zeros for each row.

    Args:
        query: (1, heads, tokens, width); `key` and `value` may have fewer heads.
        lengths: the tokens of each row; their sum is the number of tokens.
        attend: the attention of one row, from and to (1, heads, tokens of the row, width)."""
    split = [states.squeeze(0).split(list(lengths), dim=1) for states in (query, key, value)]
    written = [attend(*(states.unsqueeze(0) for states in row)) for row in zip(*split, strict=True)]
    return torch.cat(written, dim=2).transpose(1, 2)
