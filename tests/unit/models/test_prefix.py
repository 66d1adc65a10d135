"""The beginning that prompts share: how long it is, and that it counts as if each row had been run whole."""

from __future__ import annotations

import pytest

from medcot_utils.models.prefix import begin_with, count_shared, read_prefix


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[1, 2, 3, 4, 5], [1, 2, 3, 9, 9]], 3),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], 3),  # two of each are left over: one to read, one for generate to begin with
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4]], 2),
        ([[1, 2], [1, 2]], 0),
        ([[1], [1, 2, 3, 4]], 0),
        ([[9, 2, 3], [1, 2, 3]], 0),
        ([[1, 2, 3, 4]], 0),  # nothing is gained
        ([], 0),
    ],
)
def test_the_shared_beginning_leaves_two_tokens_of_each_row(rows, shared):
    assert count_shared(rows) == shared


@pytest.mark.model
def test_rows_after_a_prefix_have_the_logits_of_whole_rows():
    import torch
    from transformers import DynamicCache

    from medcot_utils.config import load_config
    from medcot_utils.models.engine import get_engine

    settings = load_config("smoke", ["model.load_in_4bit=false"]).model
    model, _ = get_engine(settings).load(settings)
    rows = torch.tensor([[*range(40, 52), *end] for end in ((300, 310, 320), (900, 70, 5))])
    shared = count_shared(rows.tolist())
    assert shared == 12
    cache = begin_with(read_prefix(model, rows[0, :shared].tolist()), 2, DynamicCache(config=model.config))
    with torch.inference_mode():
        whole = model(input_ids=rows).logits[:, shared:]
        after = model(input_ids=rows[:, shared:], past_key_values=cache).logits
    assert after.shape == whole.shape and torch.allclose(after, whole, atol=1e-4)
    assert not torch.allclose(whole[0], whole[1], atol=1e-2), "rows that are alike would hide a row taken for another"


@pytest.mark.model
def test_there_is_no_prefix_without_tokens_or_with_windows(monkeypatch):
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    from transformers.cache_utils import DynamicSlidingWindowLayer

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    model = LlamaForCausalLM(LlamaConfig(**size))
    assert read_prefix(model, []) is None and read_prefix(model, [1, 2]).get_seq_length() == 2
    init = DynamicCache.__init__

    def windowed(self, *args, **named):
        init(self, *args, **named)
        self.layers = [DynamicSlidingWindowLayer(sliding_window=8)]

    monkeypatch.setattr(DynamicCache, "__init__", windowed)
    assert read_prefix(model, [1, 2]) is None
