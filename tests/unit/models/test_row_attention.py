"""Attention within rows that are joined into one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from medcot_utils.models.row_attention import attend_in_rows

LENGTHS = [3, 5, 1, 5]


@pytest.fixture
def states():
    """Queries with 4 heads, and keys and values with 2, of all rows: (1, heads, tokens, width)."""
    torch.manual_seed(0)
    return [torch.randn(1, heads, sum(LENGTHS), 8, requires_grad=True) for heads in (4, 2, 2)]


def attend_with_mask(states):
    """What `attend_in_rows` must return, from one call with a mask that keeps the rows apart."""
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    allowed = (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return scaled_dot_product_attention(*states, attn_mask=allowed, enable_gqa=True).transpose(1, 2)


def test_rows_attend_only_to_themselves_with_the_same_gradients(states):
    attend = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    found, expected = attend_in_rows(*states, LENGTHS, attend), attend_with_mask(states)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * weights).sum(), states) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_backward_pass_fills_no_gradient_of_the_whole_length(states):
    out = attend_in_rows(*states, LENGTHS, lambda query, key, value: query * key.mean() + value.mean())
    with torch.profiler.profile(record_shapes=True) as profile:
        out.sum().backward()
    filled = [event.input_shapes[0] for event in profile.events() if event.name == "aten::zero_" and event.input_shapes[0]]
    assert not [shape for shape in filled if sum(LENGTHS) in shape], filled
