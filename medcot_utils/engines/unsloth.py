"""The fast engine: Unsloth's kernels on a CUDA card. Imported before trl, transformers and peft."""

from __future__ import annotations

from pathlib import Path

import torch
import unsloth  # noqa: F401 - patches the libraries below, so it comes first
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from unsloth import FastLanguageModel

from medcot_utils.config import LoraSettings, ModelSettings
from medcot_utils.engines.embedded import model_source
from medcot_utils.engines.merging import merge

__all__ = ["add_lora", "for_inference", "load", "merge"]


def load(settings: ModelSettings, adapter: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As the article: `FastLanguageModel.from_pretrained`, from the pinned pre-quantized copy where there is one."""
    quantized = settings.load_in_4bit and settings.quantized_name is not None
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=settings.quantized_name if quantized else model_source(settings.name),
        revision=settings.quantized_revision if quantized else settings.revision,
        max_seq_length=settings.max_seq_length,
        dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        load_in_4bit=settings.load_in_4bit,
        use_exact_model_name=True,
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model, tokenizer


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """As the article: `FastLanguageModel.get_peft_model` with all its arguments."""
    return FastLanguageModel.get_peft_model(
        model,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias=settings.bias,
        target_modules=list(settings.target_modules),
        use_rslora=settings.use_rslora,
        use_gradient_checkpointing=settings.use_gradient_checkpointing,
        random_state=settings.random_state,
        loftq_config=None,
    )


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Unsloth's own switch to its fast generation."""
    return FastLanguageModel.for_inference(model)
