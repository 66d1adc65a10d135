"""The weights that 4-bit layers compute with: bit for bit those of the loaded model, and a merge into them."""

from __future__ import annotations

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from tiny_families import FAMILIES

from medcot_utils.config import load_config
from medcot_utils.models import transformers_engine
from medcot_utils.models.dequantized import four_bit_config, open_quantized_copy
from medcot_utils.models.embedded import find_model_source
from medcot_utils.models.merge_check import compare_weights, find_weight_fault
from medcot_utils.models.merging import load_unquantized, merge, open_16bit_base
from medcot_utils.models.tokenizer import load_tokenizer_from

pytestmark = pytest.mark.model

TINY = "embedded:tiny-random-llama"
DTYPES = ["float32", "bfloat16", "float16"]
UP = "model.layers.0.mlp.up_proj.weight"


def settings(name, *more):
    return load_config("smoke", [f"model.name={json.dumps(str(name))}", *more]).model


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A layer as wide as SmolLM2's, whose blocks of 64 do not end where rows of scales do."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = load_tokenizer_from(find_model_source(TINY))
    torch.manual_seed(5)
    heads = {"num_hidden_layers": 1, "num_attention_heads": 9, "num_key_value_heads": 3}
    shape = {"vocab_size": len(tokenizer), "hidden_size": 576, "intermediate_size": 1536, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**heads, **shape)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights_in_use(model):
    """What each 4-bit layer of a loaded model multiplies with."""
    layers = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    return {f"{name}.weight": dequantize_4bit(weight.data, weight.quant_state) for name, weight in layers.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["tiny", "wide"])
def test_dequantized_weights_are_those_of_the_loaded_model(model, dtype, request):
    base = settings(TINY if model == "tiny" else request.getfixturevalue("wide"), f"model.dtype={dtype}")
    used = weights_in_use(transformers_engine.load(base)[0])
    published, found = open_16bit_base(base).weights, transformers_engine.open_dequantized(base).weights
    assert found.keys() == published.keys() and len(used) == (14 if model == "tiny" else 7)
    for name in found:
        assert found[name].get_shape() == list(found[name][:].shape) == published[name].get_shape()
        if name in used:
            assert found[name][:].dtype == used[name].dtype and torch.equal(found[name][:], used[name])
            assert torch.equal(found[name][3:5], used[name][3:5])
            assert not torch.equal(found[name][:].float(), published[name][:].float())
        else:
            assert torch.equal(found[name][:], published[name][:]), "only 4-bit layers are rounded"


@pytest.mark.parametrize("skipped", [None, ["lm_head", "model.layers.0.mlp"]])
def test_a_quantized_copy_gives_the_values_of_its_own_files(tmp_path, skipped):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    made = AutoModelForCausalLM.from_pretrained(
        find_model_source(TINY),
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(**how, llm_int8_skip_modules=skipped),
    )
    made.save_pretrained(tmp_path)
    used = weights_in_use(made)
    assert len(used) == (11 if skipped else 14)
    copied = settings(TINY, f"model.quantized_name={json.dumps(str(tmp_path))}")
    found, published = open_quantized_copy(copied, torch.bfloat16), open_16bit_base(copied)
    assert found.folder == tmp_path and found.weights.keys() == published.weights.keys()
    for name, stored in found.weights.items():
        assert stored.get_shape() == published.weights[name].get_shape()
        assert torch.equal(stored[:], used[name] if name in used else published.weights[name][:])
    assert open_quantized_copy(copied, torch.float16).weights[UP][:].dtype == (torch.bfloat16 if skipped else torch.float16)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_quantized_copy_is_loaded_whichever_engine_runs(tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    source = find_model_source(TINY)
    how = four_bit_config(torch.bfloat16)
    how.llm_int8_skip_modules = ["lm_head", "model.layers.0.mlp"]
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=how).save_pretrained(tmp_path)
    load_tokenizer_from(source).save_pretrained(tmp_path)
    copy = f"model.quantized_name={json.dumps(str(tmp_path))}"
    copied = settings(TINY, copy, "model.engine=auto", f"model.dtype={dtype}")
    model, tokenizer = transformers_engine.load(copied)
    used, found = weights_in_use(model), transformers_engine.open_dequantized(copied).weights
    assert len(used) == 11 and len(tokenizer) == len(load_tokenizer_from(source))
    for name, weight in used.items():
        assert weight.dtype == getattr(torch, dtype), "not in that of the copy's files"
        assert torch.equal(found[name][:], weight)
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {getattr(torch, dtype)}
    with torch.inference_mode():
        assert model(torch.tensor([[5, 9, 40]])).logits.isfinite().all()
    by_name = transformers_engine.load(settings(TINY, copy, "model.engine=transformers"))[0]
    assert len(weights_in_use(by_name)) == 14, "that engine quantizes the base when it is loaded"


def test_only_the_weight_that_is_read_is_made(monkeypatch):
    from medcot_utils.models import dequantized

    made, really = [], dequantized._round
    monkeypatch.setattr(dequantized, "_round", lambda *what: made.append(what) or really(*what))
    base = transformers_engine.open_dequantized(settings(TINY))
    assert [weight.get_shape() for weight in base.weights.values()] and made == []
    weight = base.weights[UP]
    assert torch.equal(torch.cat([weight[:7], weight[7:]]), weight[:]) and len(made) == 1


# --- merge ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(wide, tmp_path_factory):
    """(settings, the 4-bit model with an adapter that changes it, the adapter's folder)"""
    folder = tmp_path_factory.mktemp("adapter")
    config = load_config("smoke", [f"model.name={json.dumps(str(wide))}", "lora.r=4"])
    model = transformers_engine.add_lora(transformers_engine.load(config.model)[0], config.lora)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder, save_embedding_layers=False)
    return config.model, model, folder


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    """{target: the folder of a merge into it}"""
    base, _, adapter = trained
    folders = {target: tmp_path_factory.mktemp(target) for target in ("base_16bit", "dequantized_4bit")}
    merge(base, adapter, folders["base_16bit"], "float16")
    merge(base, adapter, folders["dequantized_4bit"], "float16", transformers_engine.open_dequantized(base))
    return folders


def test_the_merge_is_the_dequantized_sum_rounded_once(trained, merged):
    _, model, _ = trained
    found = load_file(merged["dequantized_4bit"] / "model.safetensors")
    used = weights_in_use(model.get_base_model())
    for name, weight in used.items():
        layer = model.get_base_model().get_submodule(name.removesuffix(".base_layer.weight"))
        expected = (weight.float() + layer.get_delta_weight("default").detach()).half()
        assert torch.equal(found[name.replace(".base_layer.", ".")], expected)


@pytest.mark.parametrize("target", ["base_16bit", "dequantized_4bit"])
def test_a_merge_into_the_other_base_is_found(trained, merged, target):
    base, _, adapter = trained
    bases = {"base_16bit": open_16bit_base(base), "dequantized_4bit": transformers_engine.open_dequantized(base)}
    for other, folder in merged.items():
        found = compare_weights(base, adapter, folder, bases[target])
        assert len(found["wrong"]) == (0 if other == target else 7)
        assert (find_weight_fault(found) is None) is (other == target)


def test_a_dequantized_merge_answers_as_the_trained_model(trained, merged):
    _, model, _ = trained
    ids = torch.tensor([[5, 9, 40, 41, 7]])
    with torch.inference_mode():
        expected = model.eval()(ids).logits
        gaps = {
            target: float((load_unquantized(folder, "float32")[0](ids).logits - expected).abs().max())
            for target, folder in merged.items()
        }
    assert gaps["dequantized_4bit"] < 0.01 < 0.1 < gaps["base_16bit"]


def test_a_merge_into_a_quantized_copy_is_not_called_quantized(trained, tmp_path):
    base, model, adapter = trained
    transformers_engine.load(base)[0].save_pretrained(tmp_path / "copy")
    load_tokenizer_from(base.name).save_pretrained(tmp_path / "copy")
    copied = settings(base.name, f"model.quantized_name={json.dumps(str(tmp_path / 'copy'))}")
    copy = open_quantized_copy(copied, torch.float32)
    merge(copied, adapter, tmp_path / "merged", "float16", copy)
    assert compare_weights(copied, adapter, tmp_path / "merged", copy)["wrong"] == []
    loaded, _ = load_unquantized(tmp_path / "merged", "float32")
    assert not getattr(loaded, "is_quantized", False)
    ids = torch.tensor([[5, 9, 40, 41, 7]])
    with torch.inference_mode():
        assert torch.allclose(loaded(ids).logits, model.eval()(ids).logits, atol=0.01)


@pytest.mark.parametrize("family", ["gemma3", "phi3", "qwen3"])
def test_each_familys_dequantized_merge_is_the_trained_model(family, tmp_path):
    FAMILIES[family].make(tmp_path / "base")
    config = load_config("smoke", [f"model.name={json.dumps(str(tmp_path / 'base'))}", *FAMILIES[family].settings])
    model = transformers_engine.add_lora(transformers_engine.load(config.model)[0], config.lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    base = transformers_engine.open_dequantized(config.model)
    merge(config.model, tmp_path / "adapter", tmp_path / "merged", "float16", base)
    assert compare_weights(config.model, tmp_path / "adapter", tmp_path / "merged", base)["wrong"] == []
    loaded, _ = load_unquantized(tmp_path / "merged", "float32")
    ids = torch.tensor([[5, 9, 40, 41, 7]])
    with torch.inference_mode():
        assert torch.allclose(loaded(ids).logits, model.eval()(ids).logits, atol=0.02)
