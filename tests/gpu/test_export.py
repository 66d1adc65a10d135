"""The merge and its check where the 16-bit model is larger than the GPU: on a T4 an 8B model is."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def adapter(wide_llama, tmp_path) -> Path:
    """A LoRA of random weights, large enough that a forgotten one shows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(wide_llama, dtype=torch.bfloat16)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def small_gpu(wide_llama):
    """The process may use 0.7 of what the 16-bit weights take."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    weights = sum(file.stat().st_size for file in Path(wide_llama).glob("*.safetensors"))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.7 * weights) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_model_larger_than_the_gpu_is_merged_as_on_a_large_one(wide_llama, adapter, tmp_path, small_gpu, make_config):
    import torch
    from safetensors.torch import load_file

    from medcot_utils.models.merging import load_base, load_unquantized, merge

    settings = make_config().model
    merge(settings, adapter, tmp_path / "small", "bfloat16")
    merged, tokenizer = load_unquantized(tmp_path / "small", "bfloat16")
    assert set(merged.hf_device_map.values()) == {0, "cpu"}
    inputs = tokenizer(["A man with chest pain and"], return_tensors="pt").to("cuda")
    logits = {}
    with torch.inference_mode():
        logits["merged"] = merged(**inputs).logits.float()
        del merged
        for name, with_adapter in (("plain", None), ("expected", adapter)):
            model, _ = load_base(settings, "bfloat16", with_adapter)
            logits[name] = model(**inputs).logits.float()
            del model
    plain, expected, found = logits["plain"], logits["expected"], logits["merged"]
    assert (plain - expected).abs().max() > 0.5
    assert (found - expected).abs().max() < 0.1 * (plain - expected).abs().max()

    torch.cuda.set_per_process_memory_fraction(1.0)
    merge(settings, adapter, tmp_path / "large", "bfloat16")
    small, large = (
        {name: tensor for file in (tmp_path / folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in ("small", "large")
    )
    assert small.keys() == large.keys()
    for name, tensor in large.items():
        assert torch.allclose(small[name].float(), tensor.float(), rtol=0.01, atol=1e-3), name


def test_a_model_that_filled_the_gpu_makes_room_for_the_next(wide_llama, adapter, small_gpu, make_config):
    import torch

    from medcot_utils.models.engine import get_engine
    from medcot_utils.models.merging import load_base

    settings = make_config().model
    engine = get_engine(settings)
    base, tokenizer = load_base(settings, "bfloat16", adapter)
    assert set(base.hf_device_map.values()) == {0, "cpu"}
    inputs = tokenizer(["A man with chest pain and"], return_tensors="pt").to("cuda")
    with torch.inference_mode():
        base(**inputs)
    held = torch.cuda.memory_allocated()
    del base
    trained, _ = engine.load(settings, adapter)
    assert torch.cuda.memory_allocated() < held
    with torch.inference_mode():
        engine.for_inference(trained)(**inputs)
