"""The weights of a merged model, one by one: right at every dtype, and every way in which an adapter gets lost."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from medcot_utils.config import load_config
from medcot_utils.models.merge_check import compare_weights, find_weight_fault
from medcot_utils.models.merging import merge
from medcot_utils.models.tokenizer import load_tokenizer_from

pytestmark = pytest.mark.model

Q = "model.layers.1.self_attn.q_proj.weight"
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(settings, adapter, {weight: its change}) of a small base, and a LoRA as small as 60 steps make it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from medcot_utils.models.embedded import find_model_source

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = load_tokenizer_from(find_model_source("embedded:tiny-random-llama"))
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    tuned = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2e-3)
    tuned.save_pretrained(folder / "adapter")
    layers = {name: layer for name, layer in tuned.named_modules() if name.endswith(("q_proj", "down_proj"))}
    changes = {
        name.removeprefix("base_model.model.") + ".weight": layer.get_delta_weight("default").detach()
        for name, layer in layers.items()
    }
    assert len(changes) == 4
    return load_config("smoke", [f"model.name={folder / 'base'}"]).model, folder / "adapter", changes


@pytest.fixture(scope="module")
def merged(made, tmp_path_factory):
    """`merged(dtype)`: the weights of a right merge, and what `check(dtype, weights)` says of others in their place."""
    settings, adapter, _ = made
    folders = {}

    def right(dtype):
        if dtype not in folders:
            folders[dtype] = tmp_path_factory.mktemp(dtype) / "merged"
            merge(settings, adapter, folders[dtype], dtype)
        return folders[dtype]

    return right


@pytest.fixture
def check(made, merged, tmp_path):
    settings, adapter, _ = made

    def of(weights):
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return compare_weights(settings, adapter, tmp_path)

    return of


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_merge_has_every_weight_right(made, merged, dtype):
    settings, adapter, changes = made
    found = compare_weights(settings, adapter, merged(dtype))
    assert find_weight_fault(found) is None
    assert found["wrong"] == [] and found["changed"] == len(changes) and found["weights"] == 21
    assert found["kept"] == pytest.approx(1, abs=0.05)


def test_an_adapter_that_names_its_base_otherwise_is_no_warning(made, merged, tmp_path):
    settings, adapter, _ = made
    renamed = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((renamed / "adapter_config.json").read_text())
    (renamed / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "embedded:another"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare_weights(settings, renamed, merged("float16"))["wrong"] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("times", "lost"), [(0, ...), (2, ...), (-1, ...), (0, [Q]), (2, [Q])])
def test_an_adapter_lost_or_added_twice_is_found(made, merged, check, dtype, times, lost):
    weights, base = load_file(merged(dtype) / "model.safetensors"), load_file(f"{made[0].name}/model.safetensors")
    names = list(made[2]) if lost is ... else lost
    for name in names:
        weights[name] = (base[name].float() + times * made[2][name]).to(weights[name].dtype)
    found = check(weights)
    assert len(found["wrong"]) == len(names)
    assert any(line.startswith(f"{Q} holds {times:.2f} times the change") for line in found["wrong"]) or dtype == "bfloat16"
    assert f"{len(names)} of 21 weights are not base + adapter" in find_weight_fault(found)


def _one_number(weights):
    weights[Q][17, 4] *= 1.01


def _another_layer(weights):
    weights[Q] = weights[Q.replace("layers.1", "layers.0")].clone()


FAULTS = {
    "one number": (_one_number, f"{Q} holds"),
    "a layer twice": (_another_layer, f"{Q} holds"),
    "a norm": (lambda weights: weights["model.norm.weight"].mul_(1.01), "model.norm.weight is not what the base has"),
    "missing": (lambda weights: weights.pop(Q), f"{Q} is missing"),
    "too many": (lambda weights: weights.update(more=torch.ones(2)), "more is not in the base"),
    "shape": (lambda weights: weights.update({Q: weights[Q][:3].clone()}), rf"{Q} has shape \[3, 256\] instead of \[256, 256\]"),
    "infinite": (lambda weights: weights["lm_head.weight"][0].fill_(float("inf")), "lm_head.weight is not what"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_weight_that_is_not_the_sum_is_named(merged, check, fault):
    spoil, expected = FAULTS[fault]
    weights = load_file(merged("float16") / "model.safetensors")
    spoil(weights)
    (line,) = check(weights)["wrong"]
    assert line.startswith(expected.replace("\\", ""))


def test_a_change_that_rounding_swallows_is_a_lost_adapter(made, tmp_path):
    settings, adapter, _ = made
    small = tmp_path / "adapter"
    small.mkdir()
    (small / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text(encoding="utf-8"), encoding="utf-8")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: weight * 0.2 for name, weight in weights.items()}, small / "adapter_model.safetensors")
    found = {}
    for dtype in ("bfloat16", "float32"):
        merge(settings, small, tmp_path / dtype, dtype)
        found[dtype] = compare_weights(settings, small, tmp_path / dtype)
    assert [one["wrong"] for one in found.values()] == [[], []]
    assert find_weight_fault(found["float32"]) is None
    assert "set export.dtype=float16" in find_weight_fault(found["bfloat16"])


def test_an_adapter_that_changes_nothing_is_no_fault(made, tmp_path):
    found = {"weights": 21, "changed": 4, "wrong": [], "kept": None}
    assert find_weight_fault(found) is None


def test_weights_are_compared_in_pieces(made, merged, monkeypatch):
    from medcot_utils.models import merge_check

    sizes = []
    whole = merge_check._is_rounded_sum

    def seen(base, found, added):
        sizes.append(base.numel())
        return whole(base, found, added)

    monkeypatch.setattr(merge_check, "_is_rounded_sum", seen)
    monkeypatch.setattr(merge_check, "PIECE", 2**20)
    assert compare_weights(made[0], made[1], merged("bfloat16"))["wrong"] == []
    assert max(sizes) <= 2**20
