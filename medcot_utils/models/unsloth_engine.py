"""The fast engine: Unsloth's kernels on a CUDA GPU. Imported before trl, transformers and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import unsloth  # noqa: F401 - patches the libraries below, so it comes first
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from unsloth import FastLanguageModel

from medcot_utils.config import LoraSettings, ModelSettings, TrainingSettings
from medcot_utils.machine.gpu import release_gpu_memory
from medcot_utils.models.embedded import model_source
from medcot_utils.models.engine import local_rank
from medcot_utils.models.merging import merge

__all__ = ["add_lora", "for_inference", "load", "merge", "set_checkpointing", "trainer_arguments"]

WHOLE_LOGITS = False  # its loss is taken in pieces

# Compute capabilities from which padded batches, which Unsloth compiles block by block, beat its unpadded ones, which it
# does not compile: 13,446 against 10,650 tokens/s of an 8B Llama on an H200. Below, Unsloth's own choice is kept.
_PADDED_FROM = (9, 0)


def load(settings: ModelSettings, adapter: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As the article: `FastLanguageModel.from_pretrained`, from the pinned pre-quantized copy where there is one."""
    release_gpu_memory()
    quantized = settings.load_in_4bit and settings.quantized_name is not None
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=settings.quantized_name if quantized else model_source(settings.name),
        revision=settings.quantized_revision if quantized else settings.revision,
        max_seq_length=settings.max_seq_length,
        dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        load_in_4bit=settings.load_in_4bit,
        use_exact_model_name=True,
        device_map={"": local_rank()},
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


def set_checkpointing(model: PreTrainedModel, checkpointing: Literal["unsloth"] | bool) -> None:
    """Switch gradient checkpointing on or off, as a batch plan asks, before a trainer is made."""
    model._unsloth_gradient_checkpointing = checkpointing  # what its trainer looks at
    FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)


def trainer_arguments(settings: TrainingSettings) -> dict[str, Any]:
    """What this engine adds to the trainer's arguments: how rows of unequal length share a batch.

    Unpadded batches need Unsloth's look at the rows' lengths, which `skip_prepare_dataset` would suppress."""
    padding = settings.padding
    if padding == "auto":
        padding = "padded" if torch.cuda.get_device_capability() >= _PADDED_FROM else None
    if padding == "padded":
        return {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "padding_free": False}
    return {"dataset_kwargs": {}, "max_length": None, "padding_free": True if padding else None}


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Unsloth's own switch to its fast generation."""
    return FastLanguageModel.for_inference(model)
