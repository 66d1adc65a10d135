"""Merge an adapter into its 16-bit base: the same for both engines."""

from __future__ import annotations

from pathlib import Path

from medcot_utils.config import ModelSettings
from medcot_utils.engines.embedded import model_source


def load_16bit(settings: ModelSettings, dtype: str):
    """(base model, tokenizer) at 16 bits or float32 on the CPU, never quantized."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_source(settings.name)
    model = AutoModelForCausalLM.from_pretrained(
        source, revision=settings.revision, dtype=getattr(torch, dtype), low_cpu_mem_usage=True
    )
    return model, AutoTokenizer.from_pretrained(source, revision=settings.revision)


def merge(settings: ModelSettings, adapter: Path, out: Path, dtype: str) -> None:
    """Add the adapter to the 16-bit base (not to the dequantized 4-bit one, whose rounding would be baked in) and save
    model and tokenizer to `out` as safetensors in `dtype`."""
    from peft import PeftModel

    base, tokenizer = load_16bit(settings, dtype)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.generation_config.eos_token_id = tokenizer.eos_token_id
    merged.generation_config.pad_token_id = tokenizer.pad_token_id
    merged.save_pretrained(out, max_shard_size="4GB")
    tokenizer.save_pretrained(out)
