"""Attend from one new token per row to the tokens that the row's slot holds, in one Triton kernel. Import this only on a GPU.

torch's own attention gives a row's few queries a whole tile of 128 and reaches half of the GPU's bandwidth here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_QUERIES = 16  # the smallest tile of a matrix product; the rest of it is masked
# The fastest of 81 choices on an H100 with 64 rows of 300 tokens, where reading the cache takes the most time.
_TOKENS, _WARPS, _STAGES = 32, 2, 3  # keys that a program reads at once, its warps, and the stages of its loop
_PROGRAMS = 512  # enough to use the whole bandwidth of a large GPU


@triton.jit
def _attend_to_part(
    query,
    key,
    value,
    held,
    out,
    sums,
    query_row,
    query_head,
    key_row,
    key_head,
    key_token,
    SCALE: tl.constexpr,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Attend from the SHARE queries of one key head to a part of one slot, with a running maximum (Dao et al. 2022)."""
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    queries, columns = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    exists = queries < SHARE
    asking = query + row * query_row + (head * SHARE + queries)[:, None] * query_head + columns[None, :]
    asked = tl.load(asking, mask=exists[:, None], other=0.0)
    count = tl.load(held + row)
    share = tl.cdiv(tl.cdiv(count, PARTS), TOKENS) * TOKENS
    end = tl.minimum(count, (part + 1) * share)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    for begin in range(part * share, end, TOKENS):
        tokens = begin + tl.arange(0, TOKENS)
        inside = tokens < end
        places = row * key_row + head * key_head + tokens[:, None] * key_token + columns[None, :]
        keys = tl.load(key + places, mask=inside[:, None], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(asked, tl.trans(keys)) * SCALE, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights, factor = tl.exp(scores - higher[:, None]), tl.exp(highest - higher)
        values = tl.load(value + places, mask=inside[:, None], other=0.0)
        mixed = mixed * factor[:, None] + tl.dot(weights.to(values.dtype), values)
        total, highest = total * factor + tl.sum(weights, 1), higher
    # A part beyond the slot's last token has a sum of 0. It must not become a division by 0.
    mixed = mixed / tl.maximum(total, 1e-30)[:, None]
    place = (row * PARTS + part) * tl.num_programs(1) * SHARE + head * SHARE + queries
    tl.store(out + place[:, None] * WIDTH + columns[None, :], mixed, mask=exists[:, None])
    if PARTS > 1:
        tl.store(sums + place, highest + tl.log(total), mask=exists)


def attend_to_slots(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, held: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the attention output (rows, 1, heads, width) of one new token per row.

    Args:
        query: (rows, heads, 1, width).
        key, value: (rows, key heads, capacity, width), with equal strides and a last stride of 1. In 16 bits.
        held: (rows,), how many tokens of its slot a row attends to, at least 1."""
    rows, heads, _, width = query.shape
    groups = key.shape[1]
    parts = max(1, min(8, _PROGRAMS // (rows * groups)))
    kept = query.dtype if parts == 1 else torch.float32
    out = torch.empty(rows, parts, heads, width, dtype=kept, device=query.device)
    sums = torch.empty(rows, parts, heads, dtype=torch.float32, device=query.device)
    _attend_to_part[(rows, groups, parts)](
        query,
        key,
        value,
        held,
        out,
        sums,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        key.stride(2),
        SCALE=scale,  # as an argument, it would be a double in compiled code
        SHARE=heads // groups,
        WIDTH=width,
        PARTS=parts,
        QUERIES=_QUERIES,
        TOKENS=_TOKENS,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    if parts == 1:
        return out
    return (out * sums.softmax(dim=1)[..., None]).sum(dim=1, keepdim=True).to(query.dtype)
