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


def test_the_loss_of_a_model_larger_than_the_gpu_goes_layer_by_layer(wide_llama, small_gpu):
    import torch
    from datasets import Dataset

    from medcot_utils.models import layerwise
    from medcot_utils.models.losses import row_losses
    from medcot_utils.models.merging import load_unquantized

    torch.manual_seed(1)
    texts = [torch.randint(5, 1000, (length,)).tolist() for length in (200, 37, 80, 5, 120)]
    rows = Dataset.from_list([{"id": i, "input_ids": ids, "labels": ids} for i, ids in enumerate(texts)])
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = layerwise.unquantized_losses(wide_llama, None, "bfloat16", rows, 2, "base")
    weights = sum(file.stat().st_size for file in Path(wide_llama).glob("*.safetensors"))
    assert torch.cuda.max_memory_allocated() - held < 0.7 * weights
    torch.cuda.set_per_process_memory_fraction(1.0)
    expected = row_losses(load_unquantized(wide_llama, "bfloat16")[0], rows, 2, "base")
    assert [one["nll"] for one in found] == pytest.approx([one["nll"] for one in expected], rel=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dequantized_weights_are_those_of_the_loaded_model_on_a_gpu(dtype, make_config):
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from medcot_utils.models import transformers_engine

    settings = make_config(f"model.dtype={dtype}").model
    model, base = transformers_engine.load(settings)[0], transformers_engine.open_dequantized(settings)
    layers = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    assert len(layers) == 56
    for name, weight in layers.items():
        assert torch.equal(base.weights[f"{name}.weight"][:], dequantize_4bit(weight.data, weight.quant_state).cpu())


def test_two_gpus_share_a_model_that_one_does_not_hold(wide_llama, small_gpu):
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from medcot_utils.models.merging import load_unquantized

    weights = sum(file.stat().st_size for file in Path(wide_llama).glob("*.safetensors"))
    total = torch.cuda.get_device_properties(1).total_memory
    torch.cuda.set_per_process_memory_fraction(weights / total, 1)
    try:
        model, tokenizer = load_unquantized(wide_llama, "bfloat16")
        assert set(model.hf_device_map.values()) == {0, 1}
        inputs = tokenizer(["A man with chest pain and"], return_tensors="pt").to("cuda")
        assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 1)
