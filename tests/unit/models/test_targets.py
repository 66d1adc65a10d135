"""LoRA's target modules: names that match nothing or what cannot be merged are refused, and only the text model is trained."""

from __future__ import annotations

import pytest
import torch
from tiny_families import make_distilled_qwen
from transformers import AutoConfig, AutoModelForCausalLM

from medcot_utils.config import load_config
from medcot_utils.data.rows import load_rows, validate_rows
from medcot_utils.data.tokens import add_text_column, check_labels, tokenize_rows
from medcot_utils.errors import MedcotError
from medcot_utils.models import transformers_engine
from medcot_utils.models.tokenizer import load_tokenizer_from

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


# --- profile small -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    make_distilled_qwen(folder)
    return folder


def test_small_trains_all_seven_projections_of_a_distilled_qwen(distilled):
    model = transformers_engine.add_lora(AutoModelForCausalLM.from_pretrained(distilled), load_config("small").lora)
    trained = {name.split(".")[-4] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2 * 2 * 7, "A and B in two layers"


def test_smalls_prompt_begins_every_text_of_a_distilled_qwen(distilled):
    config, tokenizer = load_config("small", ["dataset.name=shipped", "dataset.num_rows=20"]), load_tokenizer_from(distilled)
    rows = validate_rows(load_rows(config.dataset), tokenizer.all_special_tokens)[0].select(range(20))
    rows = add_text_column(rows, tokenizer.eos_token)
    tokens, lengths = tokenize_rows(rows, tokenizer, config.dataset, 2048, config.prompt.newline_after_think)
    assert (lengths.prompt_is_prefix, lengths.dropped) == (20, 0)
    assert check_labels(tokens, tokenizer, 0) == {"rows": 20, "one_bos": 20, "eos_in_labels": 20, "cot_in_labels": 20}
    first = [next(token for token in labels if token != -100) for labels in tokens["labels"]]
    assert len(set(first)) > 1, "the loss begins with the reasoning, not with the tag"
