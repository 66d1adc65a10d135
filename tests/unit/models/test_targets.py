"""LoRA's target modules: names that match nothing or what cannot be merged are refused, and only the text model is trained."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError
from medcot_utils.models import transformers_engine

pytestmark = pytest.mark.model

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


def add_lora(kind, targets=None, **changes):
    config = AutoConfig.for_model(kind, **SIZES | changes)
    overrides = [] if targets is None else [f"lora.target_modules={targets}"]
    return transformers_engine.add_lora(AutoModelForCausalLM.from_config(config), load_config("smoke", overrides).lora)


REFUSED = {
    "in part": (
        "phi3",
        None,
        {},
        "q_proj, k_proj, v_proj, gate_proj, up_proj match nothing; this Phi3ForCausalLM has down_proj, ",
    ),
    "nothing": ("llama", "[all-linear]", {}, "all-linear match nothing; this LlamaForCausalLM has down_proj, gate_proj, k_proj"),
    "one misspelled": ("qwen2", "[q_proj, k_porj]", {}, "k_porj match nothing; this Qwen2ForCausalLM has"),
    "tied output": (
        "qwen2",
        "[q_proj, lm_head]",
        {"tie_word_embeddings": True},
        "lm_head shares its weights with the embeddings",
    ),
    "tied embedding": ("llama", "[q_proj, embed_tokens]", {"tie_word_embeddings": True}, "embed_tokens is a Embedding, and only"),
    "no projection": ("gpt2", "[c_attn]", {"n_head": 2, "n_embd": 16}, "c_attn is a Conv1D, and only linear projections"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_targets_that_cannot_be_trained_and_merged_are_refused(case):
    kind, targets, changes, expected = REFUSED[case]
    with pytest.raises(MedcotError) as caught:
        add_lora(kind, targets, **changes)
    assert expected in str(caught.value) and str(caught.value).startswith("lora.target_modules: ")


def test_an_untied_output_layer_can_be_trained():
    model = add_lora("llama", "[q_proj, lm_head]", tie_word_embeddings=False)
    assert sum("lm_head" in name for name, weight in model.named_parameters() if weight.requires_grad) == 2


def test_a_model_of_text_alone_excludes_nothing():
    assert add_lora("llama").peft_config["default"].exclude_modules is None


def test_of_a_model_that_sees_only_the_text_part_is_trained():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=SIZES | {"head_dim": 8},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = transformers_engine.add_lora(AutoModelForCausalLM.from_config(config), load_config("smoke").lora)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 14 and all(".language_model." in name for name in trained)
    loss = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
