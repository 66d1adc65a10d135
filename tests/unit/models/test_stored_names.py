"""Weights whose names in a model's files differ from the model's own, and a merge that finds them."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_families import FAMILIES
from transformers import AutoConfig

from medcot_utils.config import load_config
from medcot_utils.models import transformers_engine
from medcot_utils.models.losses import row_losses
from medcot_utils.models.merging import load_unquantized, merge
from medcot_utils.models.stored_names import find_stored_names

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def composite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("composite")
    FAMILIES["gemma3"].make(folder)
    return folder


def test_names_are_those_of_the_files(composite):
    config = AutoConfig.from_pretrained(composite)
    stored = ["language_model.model.layers.0.mlp.up_proj.weight", "vision_tower.post_layernorm.weight"]
    expected = {
        "model.language_model.layers.0.mlp.up_proj.weight": stored[0],
        "model.vision_tower.post_layernorm.weight": stored[1],
        "model.of_another_model.weight": "model.of_another_model.weight",
    }
    assert find_stored_names(config, expected, stored) == expected
    assert find_stored_names(config, stored, stored) == {name: name for name in stored}


def test_a_text_model_inside_a_larger_one_is_merged(composite, tmp_path):
    config = load_config("smoke", [f"model.name={json.dumps(str(composite))}", "model.load_in_4bit=false"])
    model, _ = transformers_engine.load(config.model)
    model = transformers_engine.add_lora(model, config.lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(config.model, tmp_path / "adapter", tmp_path / "merged", "float16")
    merged, _ = load_unquantized(tmp_path / "merged", "float32")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=0.05)
        base = model.get_base_model()
        with model.disable_adapter():
            assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=0.5)


def test_the_loss_of_a_text_model_inside_a_larger_one(composite):
    from datasets import Dataset

    model, _ = load_unquantized(composite, "float32")
    rows = Dataset.from_list([{"id": "a", "input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    assert row_losses(model, rows, 2, "base")[0]["tokens"] == 2
