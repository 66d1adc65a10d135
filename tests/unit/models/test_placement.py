"""Where weights go that are not quantized: one GPU, several, or RAM for the rest."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from medcot_utils.models import placement
from medcot_utils.models.embedded import find_model_source
from medcot_utils.models.placement import count_weight_bytes, fits_in_memory, place_weights

pytestmark = pytest.mark.model

TINY = "embedded:tiny-random-llama"
RAM = 10**9


@pytest.fixture
def memory(monkeypatch):
    """`memory(*free)`: bytes free on each GPU."""
    monkeypatch.setattr(placement, "virtual_memory", lambda: SimpleNamespace(available=RAM))
    return lambda *free: monkeypatch.setattr(placement, "available_memory_of_gpus", lambda: list(free))


def test_the_bytes_of_weights_are_counted_without_loading_them():
    from medcot_utils.models.merging import load_unquantized

    folder = find_model_source(TINY)
    assert count_weight_bytes(folder, "float16") == 2 * load_unquantized(folder, "float32")[0].num_parameters()


@pytest.mark.parametrize(("free", "fits"), [((126,), True), ((124,), False), ((63, 63), True), ((63, 61), False), ((), True)])
def test_weights_fit_with_a_quarter_of_room(memory, free, fits):
    memory(*free)
    assert fits_in_memory(100) is fits
    assert not fits_in_memory(RAM)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((1.3,), {"device_map": {"": 0}}),
        ((1.3, 9), {"device_map": {"": 0}}),
        ((1.0,), {"device_map": "auto", "max_memory": {0: 0.75, "cpu": RAM}}),
        ((0.7, 0.8), {"device_map": "auto", "max_memory": {0: 0.575, 1: 0.675, "cpu": RAM}}),
        ((0.1, 0.1), {"device_map": "auto", "max_memory": {0: 0, 1: 0, "cpu": RAM}}),
        ((), {}),
    ],
)
def test_weights_go_to_one_gpu_then_to_all_of_them(memory, shares, expected):
    weights = count_weight_bytes(find_model_source(TINY), "float16")
    memory(*(share * weights for share in shares))
    placed = place_weights(find_model_source(TINY), "float16")
    if "max_memory" in expected:
        room = {gpu: there if gpu == "cpu" else there * weights for gpu, there in expected["max_memory"].items()}
        assert placed.pop("max_memory") == pytest.approx(room, abs=1)
        del expected["max_memory"]
    assert placed == expected


@pytest.mark.parametrize(("gpus", "places"), [(2, {0, 1}), (1, {0, "cpu"})])
def test_two_t4s_hold_an_8b_model_that_one_does_not(memory, monkeypatch, tmp_path, gpus, places):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.integrations.accelerate import _get_device_map

    t4 = 14.3 * 2**30  # of 14.7 GiB, less what CUDA itself takes
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    memory(*[t4] * gpus)
    monkeypatch.setattr(placement, "virtual_memory", lambda: SimpleNamespace(available=28 * 2**30))
    assert fits_in_memory(count_weight_bytes(tmp_path, "float16")) is (gpus == 2)
    placed = place_weights(tmp_path, "float16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    found = _get_device_map(model, placed["device_map"], placed["max_memory"], None)
    assert set(found.values()) == places
    if gpus == 2:
        layers = [place for name, place in found.items() if ".layers." in name]
        assert 14 <= layers.count(0) <= 18, "about half each, so that both have room to compute"
