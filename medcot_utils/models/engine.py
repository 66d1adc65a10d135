"""Two engines with one interface.

    load(settings, adapter=None)           -> (model, tokenizer)   4-bit or not; with a trained adapter on it if given
    add_lora(model, settings)              -> PeftModel            fresh LoRA matrices, ready to train
    set_checkpointing(model, checkpointing)-> None                 gradient checkpointing as a batch plan asks
    trainer_arguments(settings)            -> dict                 what the engine adds to the trainer's arguments
    for_inference(model)                   -> model                cache on, checkpointing off, eval mode
    merge(settings, adapter, out, dtype)   -> None                 16-bit base + adapter, saved as safetensors
    WHOLE_LOGITS                              bool                 whether training keeps all logits of a micro-batch

Nothing outside this package asks which engine runs."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
from types import ModuleType
from typing import TYPE_CHECKING

from medcot_utils.config import ModelSettings
from medcot_utils.errors import PlatformError

if TYPE_CHECKING:
    import torch


# The 8B model in 16 bits (16 GB), the cache of 64 answers of 1,200 tokens (12 GB), and room to work.
FAST_ANSWERS_GIB = 36


def quiet_start(seed: int = 3407) -> None:
    """What must happen before torch and transformers are imported: determinism switches, and less chatter in a notebook."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("PYTHONHASHSEED", str(seed))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait by spinning take the cores from those that work: with one other busy process on two cores,
    # generation and training on the CPU ran five times slower. A short spin keeps the speed of a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # bitsandbytes offers an optional CPU kernel from a hub at every import; its own kernel is used and is fast enough.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def local_rank() -> int:
    """The GPU of this process: 0 but where torchrun started several."""
    return int(os.environ.get("LOCAL_RANK", 0))


def compute_dtype(settings: ModelSettings) -> torch.dtype:
    """The dtype of activations: as set, or with `auto` bfloat16 on GPUs that have it, float16 on others, float32 on a CPU."""
    import torch

    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def get_engine(settings: ModelSettings, fast_answers: bool = False) -> ModuleType:
    """The engine module to use. `auto`: unsloth where it is installed and a CUDA GPU is visible, else transformers.

    With `fast_answers` (the notebooks that only ask) it is transformers, too, on a GPU with room for the 16-bit weights:
    what makes its generation fast, a compiled step over a static cache, cannot run in a process that unsloth has patched.

    Import order is a fact of this field: unsloth patches trl, transformers and peft and must come before them, so this
    call comes first in a notebook. Raises PlatformError if unsloth is asked for and cannot run."""
    quiet_start()
    import torch

    name, has_gpu = settings.engine, torch.cuda.is_available()
    has_unsloth = importlib.util.find_spec("unsloth") is not None
    if has_gpu:
        torch.cuda.set_device(local_rank())
        if settings.gpu_memory_gib:
            total = torch.cuda.get_device_properties(local_rank()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, settings.gpu_memory_gib * 2**30 / total))
        fast_answers = fast_answers and torch.cuda.mem_get_info()[0] >= FAST_ANSWERS_GIB * 2**30
        fast_answers = fast_answers and (settings.gpu_memory_gib or math.inf) >= FAST_ANSWERS_GIB
    if name == "auto":
        name = "unsloth" if has_gpu and has_unsloth and not fast_answers else "transformers"
    if name == "unsloth" and not (has_gpu and has_unsloth):
        missing = "a CUDA GPU is not visible" if has_unsloth else "the package unsloth is not installed"
        raise PlatformError(f"model.engine unsloth: {missing}. Use --set model.engine=transformers")
    return importlib.import_module(f"medcot_utils.models.{name}_engine")


def load_tokenizer(settings: ModelSettings):
    """The model's tokenizer alone, for notebooks that need no weights."""
    from medcot_utils.models import embedded

    return embedded.load_tokenizer(embedded.model_source(settings.name), settings.revision)
