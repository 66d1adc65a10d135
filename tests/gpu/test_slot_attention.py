"""The Triton kernel that attends to slots gives what plain attention over grouped heads gives."""

from __future__ import annotations

import pytest
import torch

from medcot_utils.models.plain_weights import grouped_attention


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, heads, groups, width", [(1, 14, 2, 64), (3, 32, 8, 128), (200, 8, 8, 128)])
def test_the_kernel_gives_the_grouped_attention(rows, heads, groups, width, dtype, compiled):
    from medcot_utils.models.slot_attention import attend_to_slots

    torch.manual_seed(0)
    capacity = 300
    query = torch.randn(rows, heads, 1, width, device="cuda", dtype=dtype)
    key, value = (torch.randn(rows, capacity, groups, width, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(2))
    held = torch.randint(1, capacity + 1, (rows,), device="cuda", dtype=torch.int32)
    held[0], held[-1] = 1, capacity
    within = (torch.arange(capacity, device="cuda") < held[:, None])[:, None, None]
    expected = grouped_attention(query.float(), key.float(), value.float(), within, 0.1)
    key[~within[:, 0, :, :, None].expand_as(key)] = torch.nan  # what is beyond a row's last token must not count
    attend = torch.compile(attend_to_slots, dynamic=False) if compiled else attend_to_slots
    found = attend(query, key, value, held, 0.1)
    assert found.shape == (rows, 1, heads, width) and found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=0)
