"""Merge an adapter into its 16-bit base: the same for both engines."""

from __future__ import annotations

import gc
from pathlib import Path

from medcot_utils.config import ModelSettings
from medcot_utils.engines.embedded import load_tokenizer, model_source


def load_unquantized(source: str | Path, dtype: str, revision: str | None = None):
    """(model, tokenizer) in `dtype`, never quantized; on the card where it has room, and a quarter more, else on a CPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, device_map = getattr(torch, dtype), None
    if torch.cuda.is_available():
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, revision=revision))
        need = 1.25 * kind.itemsize * sum(parameter.numel() for parameter in shapes.parameters())
        gc.collect()  # what an earlier model held is free only after this
        torch.cuda.empty_cache()
        device_map = {"": 0} if torch.cuda.mem_get_info()[0] > need else None
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=kind, device_map=device_map)
    return model, load_tokenizer(source, revision)


def load_base(settings: ModelSettings, dtype: str):
    """(base model, tokenizer) of a configuration, not quantized."""
    return load_unquantized(model_source(settings.name), dtype, settings.revision)


def merge(settings: ModelSettings, adapter: Path, out: Path, dtype: str) -> None:
    """Add the adapter to the 16-bit base (not to the dequantized 4-bit one, whose rounding would be baked in) and save
    model and tokenizer to `out` as safetensors in `dtype`."""
    from peft import PeftModel

    base, tokenizer = load_base(settings, dtype)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.generation_config.eos_token_id = tokenizer.eos_token_id
    merged.generation_config.pad_token_id = tokenizer.pad_token_id
    merged.save_pretrained(out, max_shard_size="4GB")
    tokenizer.save_pretrained(out)
