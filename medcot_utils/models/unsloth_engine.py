"""The fast engine: Unsloth's kernels on a CUDA GPU. Import this before trl, transformers, and peft."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import unsloth  # noqa: F401 - it patches the libraries below, so it comes first
from peft import PeftModel
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase
from unsloth import FastLanguageModel, FastModel

from medcot_utils.config import LoraSettings, ModelSettings, TrainingSettings
from medcot_utils.machine.gpu import release_gpu_memory
from medcot_utils.models.dequantized import open_quantized
from medcot_utils.models.embedded import find_model_source
from medcot_utils.models.engine import TrainerArguments, compute_dtype, get_local_rank, loads_copy
from medcot_utils.models.merging import MergeBase
from medcot_utils.models.row_attention import attend_in_rows
from medcot_utils.models.targets import check_targets
from medcot_utils.models.tokenizer import own_code_refused, prepare_tokenizer

__all__ = [
    "WHOLE_LOGITS",
    "add_lora",
    "data_collator",
    "for_inference",
    "load",
    "open_dequantized",
    "set_checkpointing",
    "trainer_arguments",
]

WHOLE_LOGITS = False  # Unsloth computes the loss in pieces

# From this compute capability on, torch has attention over rows of unequal lengths. Joined rows then stay in compiled blocks if
# the layers are transformers' own, as with `FastModel`. `FastLanguageModel` leaves its compiled blocks to run them.
_JOINED_FROM = (8, 0)


def load(settings: ModelSettings, adapter: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load as the article does, from the pre-quantized copy if there is one; see `_loader` for the class.

    Raises ModelError as `prepare_tokenizer` does, and if the model needs its own code."""
    release_gpu_memory()
    quantized, loader = loads_copy(settings), _loader(compute_dtype(settings))
    with own_code_refused(settings.quantized_name if quantized else settings.name):
        model, tokenizer = loader.from_pretrained(
            model_name=settings.quantized_name if quantized else find_model_source(settings.name),
            revision=settings.quantized_revision if quantized else settings.revision,
            max_seq_length=settings.max_seq_length,  # the longest row, in tokens
            dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),  # None: what the GPU computes fastest
            load_in_4bit=settings.load_in_4bit,
            use_exact_model_name=True,  # not a copy that Unsloth would choose
            trust_remote_code=False,  # no code comes with a model
            device_map={"": get_local_rank()},  # all of it on this process's GPU
        )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a model that sees images has a processor around the tokenizer
    return model, prepare_tokenizer(tokenizer, model.config.get_text_config().vocab_size)


def _loader(dtype: torch.dtype) -> type[FastLanguageModel | FastModel]:
    """Return Unsloth's class for a model that computes in `dtype`: the article's, or the one that trains joined rows faster."""
    joins = dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= _JOINED_FROM
    return FastModel if joins else FastLanguageModel


def open_dequantized(settings: ModelSettings) -> MergeBase:
    """Return the base with the values that its 4-bit layers compute with, from the pre-quantized copy if there is one."""
    return open_quantized(settings, compute_dtype(settings))


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Add LoRA as the article does: `get_peft_model` with all its arguments.

    Raises ModelError as `check_targets` does."""
    check_targets(model, settings)
    loader = _loader(model.dtype)
    return loader.get_peft_model(
        model,
        r=settings.r,  # the rank: rows of A and columns of B
        lora_alpha=settings.lora_alpha,  # the correction is multiplied by alpha / r
        lora_dropout=settings.lora_dropout,  # 0: Unsloth's fast path
        bias=settings.bias,  # "none": biases stay as they are
        target_modules=list(settings.target_modules),  # the projections that get matrices
        use_rslora=settings.use_rslora,  # True: alpha / sqrt(r) instead
        use_gradient_checkpointing=settings.use_gradient_checkpointing,  # "unsloth": a layer's input waits in RAM
        random_state=settings.random_state,  # seeds A; B begins as zeros
        loftq_config=None,  # no other start for A and B
    )


def set_checkpointing(model: PreTrainedModel, checkpointing: Literal["unsloth"] | bool) -> None:
    """Turn gradient checkpointing on or off, as a batch plan asks. Call it before a trainer is made."""
    model._unsloth_gradient_checkpointing = checkpointing  # Unsloth's trainer reads this
    _loader(model.dtype).for_training(model, use_gradient_checkpointing=checkpointing)


def trainer_arguments(settings: TrainingSettings, model: PreTrainedModel) -> TrainerArguments:
    """Return the arguments that say how rows of unequal length share a batch: padded, or joined without padding.

    For joined rows, Unsloth must see their lengths, which `skip_prepare_dataset` would prevent. The rows are already tokenized,
    so one process prepares them; Unsloth would start one for every core."""
    joins = settings.padding == "padding_free" or (settings.padding == "auto" and _loader(model.dtype) is FastModel)
    if settings.padding == "padded":
        return {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "padding_free": False}
    if joins:
        _split_rows_together()
        _check_masks_once()
    return {"dataset_kwargs": {}, "max_length": None, "padding_free": True if joins else None, "dataset_num_proc": 1}


def _split_rows_together() -> None:
    """Make `FastLanguageModel` use `attend_in_rows` for the rows of a joined batch, with the kernel that Unsloth chooses."""
    from unsloth.utils import attention_dispatch as unsloths

    attend_in_slices = unsloths._sdpa_packed_segments
    if isinstance(attend_in_slices, partial):  # replaced already
        return

    def attend(
        otherwise: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Sequence[int],
        *,
        n_groups: int,
        is_causal: bool,
        sliding_window: int | None,
        sdpa_kwargs: dict[str, Any],
        training: bool = False,
    ) -> torch.Tensor | None:
        lengths = [length for length in lengths if length > 0]
        if not training or sliding_window is not None or sum(lengths) != query.shape[-2]:
            groups = {"n_groups": n_groups, "is_causal": is_causal, "sliding_window": sliding_window}
            return otherwise(query, key, value, lengths, **groups, sdpa_kwargs=sdpa_kwargs, training=training)
        shared = n_groups > 1 and unsloths._sdpa_takes_gqa(
            *(states[:, :, : max(lengths)] for states in (query, key)),
            is_causal,
            False,
            value[:, :, : max(lengths)],
            sdpa_kwargs.get("dropout_p", 0.0),
            no_cudnn=unsloths._avoids_cudnn(query, training),
        )
        if n_groups > 1 and not shared:
            key, value = (states.repeat_interleave(n_groups, dim=1) for states in (key, value))
        given = {**sdpa_kwargs, "is_causal": is_causal} | ({"enable_gqa": True} if shared else {})
        return attend_in_rows(query, key, value, lengths, partial(unsloths._training_sdpa, **given))

    unsloths._sdpa_packed_segments = partial(attend, attend_in_slices)


def _check_masks_once() -> None:
    """Make `FastModel` check only the first joined batch's mask: each check waits for the GPU, and all masks are made alike."""
    from unsloth.utils import hf_packed_attention as unsloths

    check = unsloths._mask_is_block_causal
    if isinstance(check, partial):  # replaced already
        return
    trusted: set[int | None] = set()

    def check_first(check: Any, mask: Any, ends: torch.Tensor, total: int, window: int | None = None) -> bool:
        whole = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == (1, 1, total, total)
        if whole and window in trusted:
            return True
        if found := check(mask, ends, total, window):
            trusted.add(window)
        return found

    unsloths._mask_is_block_causal = partial(check_first, check)


def data_collator(model: PreTrainedModel) -> DataCollator | None:
    """Return None: Unsloth's trainer chooses its own collator, depending on how rows share a batch."""


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare the model for Unsloth's fast generation, and return it."""
    return _loader(model.dtype).for_inference(model)
