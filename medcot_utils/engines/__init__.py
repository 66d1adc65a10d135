"""Two engines with one interface: `load`, `add_lora`, `for_inference`, `merge`.

    load(settings, adapter=None)           -> (model, tokenizer)   4-bit or not; with a trained adapter on it if given
    add_lora(model, settings)              -> PeftModel            fresh LoRA matrices, ready to train
    for_inference(model)                   -> model                cache on, checkpointing off, eval mode
    merge(settings, adapter, out, dtype)   -> None                 16-bit base + adapter, saved as safetensors

Nothing outside this package asks which engine runs."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from types import ModuleType

from medcot_utils.config import ModelSettings
from medcot_utils.platforms import PlatformError


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


def get_engine(settings: ModelSettings) -> ModuleType:
    """The engine module to use. `auto`: unsloth where it is installed and a CUDA card is visible, else transformers.

    Import order is a fact of this field: unsloth patches trl, transformers and peft and must come before them, so this
    call comes first in a notebook. Raises PlatformError if unsloth is asked for and cannot run."""
    quiet_start()
    import torch

    name, has_card = settings.engine, torch.cuda.is_available()
    has_unsloth = importlib.util.find_spec("unsloth") is not None
    if name == "auto":
        name = "unsloth" if has_card and has_unsloth else "transformers"
    if name == "unsloth" and not (has_card and has_unsloth):
        missing = "a CUDA card is not visible" if has_unsloth else "the package unsloth is not installed"
        raise PlatformError(f"model.engine unsloth: {missing}. Use --set model.engine=transformers")
    return importlib.import_module(f"medcot_utils.engines.{name}")


def load_tokenizer(settings: ModelSettings):
    """The model's tokenizer alone, for notebooks that need no weights."""
    from medcot_utils.engines import embedded

    return embedded.load_tokenizer(embedded.model_source(settings.name), settings.revision)
