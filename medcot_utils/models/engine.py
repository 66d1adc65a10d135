"""Choose between two engines that load and train a model, `transformers` and `unsloth`. Both have the interface `Engine`.

Nothing outside this room asks which engine runs."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, cast

from medcot_utils.config import LoraSettings, ModelSettings, TrainingSettings
from medcot_utils.errors import PlatformError
from medcot_utils.machine.environment import forget_process_group

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase

    from medcot_utils.models.merging import MergeBase


class TrainerArguments(TypedDict, total=False):
    """Hold the arguments that an engine adds to those of trl's SFTConfig. They leave the rows of notebook 03 as they are."""

    dataset_kwargs: dict[str, bool]
    max_length: int | None
    padding_free: bool | None
    dataset_num_proc: int
    loss_type: str


class Engine(Protocol):
    """Declare what every engine module has. `WHOLE_LOGITS`: whether to plan memory for all logits of a micro-batch at once."""

    WHOLE_LOGITS: bool

    def load(self, settings: ModelSettings, adapter: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model, in 4 bits if set, and its tokenizer. Add a trained adapter if one is given."""

    def add_lora(self, model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
        """Return the model with fresh LoRA matrices, ready to train."""

    def set_checkpointing(self, model: PreTrainedModel, checkpointing: Literal["unsloth"] | bool) -> None:
        """Turn gradient checkpointing on or off, as a batch plan asks."""

    def trainer_arguments(self, settings: TrainingSettings, model: PreTrainedModel) -> TrainerArguments:
        """Return the arguments that the engine adds to the trainer's, for this model."""

    def data_collator(self, model: PreTrainedModel) -> DataCollator | None:
        """Return the collator that makes a batch of tokenized rows; None for the trainer's own."""

    def for_inference(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model in eval mode, with the key-value cache on and checkpointing off."""

    def open_dequantized(self, settings: ModelSettings) -> MergeBase:
        """Return the base with the values that its 4-bit layers compute with, to merge an adapter into."""


def quiet_start(seed: int = 3407) -> None:
    """Set what torch and transformers read on import: switches for determinism, and for fewer messages in a notebook."""
    forget_process_group(empty_only=True)  # accelerate cannot read an empty `LOCAL_RANK=` as a number
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("PYTHONHASHSEED", str(seed))
    # Without this, micro-batches of many sizes leave gaps in GPU memory: an 8B model held 66 GiB and used 35.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait by spinning take cores from those that work. With one other busy process on two cores, generation and
    # training on the CPU ran five times slower. A short spin keeps the speed of a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # If the package `kernels` is installed, bitsandbytes loads compiled code from a hub on import, and so does transformers for
    # some models. Their own code is fast enough. To use the hub's code, set transformers' variable USE_HUB_KERNELS to 1.
    if os.environ.setdefault("USE_HUB_KERNELS", "0").upper() not in ("1", "ON", "YES", "TRUE"):
        sys.modules.setdefault("kernels", cast(ModuleType, None))  # importing it fails, as if it were not installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on every import, it would warn that `kernels` is missing


def get_local_rank() -> int:
    """Return the index of this process's GPU: 0, unless torchrun started several processes.

    Raises PlatformError if LOCAL_RANK is not a number, or if there are GPUs but none with this index."""
    import torch

    text, gpus = os.environ.get("LOCAL_RANK") or "0", torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not text.isdecimal() or 0 < gpus <= int(text):
        raise PlatformError(
            f"LOCAL_RANK is {text}, but {gpus} GPUs can be seen: each process needs its own GPU. Start as many processes as "
            f"there are GPUs (torchrun --nproc-per-node {gpus or 1}), or unset LOCAL_RANK if another job left it"
        )
    return int(text)


def compute_dtype(settings: ModelSettings) -> torch.dtype:
    """Return the dtype of activations. `auto`: bfloat16 on GPUs that have it, float16 on others, float32 on a CPU."""
    import torch

    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def loads_copy(settings: ModelSettings) -> bool:
    """Return whether the pre-quantized copy is loaded. This does not depend on the engine that runs, so that answers come from
    the same weights as training.

    If `model.engine` is set to `transformers`, the base is quantized on load instead."""
    return settings.load_in_4bit and settings.quantized_name is not None and settings.engine != "transformers"


def get_engine(settings: ModelSettings, fast_answers: bool = False) -> Engine:
    """Return the engine module to use. `auto` means unsloth if it is installed and a CUDA GPU is visible, else transformers.

    With `fast_answers` (in notebooks that only generate answers), `auto` means transformers: a compiled step over a cache of
    fixed size cannot run in a process that unsloth has patched.

    Call this first in a notebook, because unsloth patches trl, transformers, and peft and must be imported before them. Raises
    PlatformError if unsloth is set and cannot run, or as `get_local_rank` does."""
    quiet_start()
    import torch

    name, has_gpu = settings.engine, torch.cuda.is_available()
    has_unsloth = importlib.util.find_spec("unsloth") is not None
    if has_gpu:
        torch.cuda.set_device(get_local_rank())
        if settings.gpu_memory_gib:
            for index in range(torch.cuda.device_count()):  # 16-bit weights are spread over all GPUs
                total = torch.cuda.get_device_properties(index).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, settings.gpu_memory_gib * 2**30 / total), index)
    if name == "auto":
        name = "unsloth" if has_gpu and has_unsloth and not fast_answers else "transformers"
    if name == "unsloth" and not (has_gpu and has_unsloth):
        missing = "a CUDA GPU is not visible" if has_unsloth else "the package unsloth is not installed"
        raise PlatformError(f"model.engine unsloth: {missing}. Use --set model.engine=transformers")
    return cast(Engine, importlib.import_module(f"medcot_utils.models.{name}_engine"))


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Return only the model's tokenizer, for notebooks that need no weights. Raises ModelError as `load_tokenizer_from` does."""
    from medcot_utils.models.embedded import find_model_source
    from medcot_utils.models.tokenizer import load_tokenizer_from

    return load_tokenizer_from(find_model_source(settings.name), settings.revision)
