"""Tests that need a CUDA GPU: skipped with that reason elsewhere. A model of random weights, wide enough for real kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from medcot_utils import data
from medcot_utils.config import load_config

GPU_TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if GPU_TESTS in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU is visible"))


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a Llama of 8 layers, hidden size 1024, and the tiny model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from medcot_utils.models.embedded import find_model_source
    from medcot_utils.models.tokenizer import load_tokenizer_from

    folder = tmp_path_factory.mktemp("wide-llama")
    tokenizer = load_tokenizer_from(find_model_source("embedded:tiny-random-llama"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_config(wide_llama: str):
    """`make_config("training.max_steps=6")`: profile smoke on the wide model, 8 rows to a step, with these settings over it."""

    def make(*overrides: str):
        settings = [
            f"model.name={wide_llama}",
            "model.engine=auto",
            "model.dtype=auto",
            "dataset.num_rows=48",
            "training.per_device_train_batch_size=2",
            "training.gradient_accumulation_steps=4",
            "training.max_steps=8",
            "training.warmup_steps=2",
            "training.learning_rate=1e-3",
            "training.optim=adamw_8bit",
            "training.eval_steps=null",
            "training.save_steps=4",
            "lora.use_gradient_checkpointing=unsloth",
        ]
        names = {pair.partition("=")[0] for pair in overrides}
        return load_config("smoke", [*(pair for pair in settings if pair.partition("=")[0] not in names), *overrides])

    return make


@pytest.fixture(scope="session")
def tokenized():
    """`tokenized(config, tokenizer)`: (train rows, held-out rows) as notebook 03 leaves them."""

    def make(config, tokenizer):
        train, held_out = data.split_rows(data.load_rows(config.dataset), config.dataset, config.seed)
        rows = []
        for split in (train, held_out):
            text = data.add_text_column(split, tokenizer.eos_token)
            rows.append(data.tokenize_rows(text, tokenizer, config.dataset, config.model.max_seq_length, True)[0])
        return rows

    return make
