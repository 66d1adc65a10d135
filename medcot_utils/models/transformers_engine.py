"""The engine that runs anywhere: transformers, bitsandbytes 4-bit (also on a CPU), and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, DataCollator, PreTrainedModel, PreTrainedTokenizerBase

from medcot_utils.config import LoraSettings, ModelSettings, TrainingSettings
from medcot_utils.machine.gpu import release_gpu_memory
from medcot_utils.models.dequantized import four_bit_config, open_quantized
from medcot_utils.models.embedded import find_model_source
from medcot_utils.models.engine import TrainerArguments, compute_dtype, get_local_rank, loads_copy
from medcot_utils.models.joined_rows import JoinedRows, can_join
from medcot_utils.models.merging import MergeBase
from medcot_utils.models.plain_weights import use_grouped_decode
from medcot_utils.models.targets import check_targets, find_excluded
from medcot_utils.models.tokenizer import load_tokenizer_from, own_code_refused
from medcot_utils.plain_text import say

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

WHOLE_LOGITS = True  # an upper bound: TRL's loss "nll" keeps all logits at once, and its default those of 256 tokens


def load(settings: ModelSettings, adapter: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model and its tokenizer. Quantize it to 4 bits (nf4, double quantization) if set; add an adapter if given.

    Raises ModelError as `load_tokenizer_from` does."""
    release_gpu_memory()
    source, revision, dtype = find_model_source(settings.name), settings.revision, compute_dtype(settings)
    quantization = {"quantization_config": four_bit_config(dtype)} if settings.load_in_4bit else {}
    if loads_copy(settings):  # the copy's files say how it is quantized
        source, revision, quantization = settings.quantized_name, settings.quantized_revision, {}
    with own_code_refused(source):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,  # a commit, so that the files stay the same
            trust_remote_code=False,  # no code comes with a model
            dtype=dtype,  # of all that is not quantized, and of the activations
            **quantization,  # the object above, if the model is to have 4 bits and its files do not say so
            device_map={"": get_local_rank()} if torch.cuda.is_available() else None,  # all of it on this process's GPU
        )
    tokenizer = load_tokenizer_from(source, revision)
    compute_in(model, dtype)
    forbid_cpu_packing(model)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model, tokenizer


def open_dequantized(settings: ModelSettings) -> MergeBase:
    """Return the base with the values that its 4-bit layers compute with, to merge an adapter into."""
    return open_quantized(settings, compute_dtype(settings))


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Return the model with fresh LoRA matrices on the configured projections and a frozen base. `random_state` seeds A.

    Raises ModelError as `check_targets` does."""
    check_targets(model, settings)
    if not torch.cuda.is_available():
        dequantize_on_cpu(model)
    checkpointing = bool(settings.use_gradient_checkpointing)
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.enable_input_require_grads()
    torch.manual_seed(settings.random_state)
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.r,  # the rank: rows of A and columns of B
            lora_alpha=settings.lora_alpha,  # the correction is multiplied by alpha / r
            lora_dropout=settings.lora_dropout,  # the share of a layer's inputs that is left out in a training step
            bias=settings.bias,  # "none": biases stay as they are
            target_modules=list(settings.target_modules),  # the projections that get matrices
            exclude_modules=find_excluded(model),  # those of parts that read no text, such as a vision tower
            use_rslora=settings.use_rslora,  # True: alpha / sqrt(r) instead
            task_type="CAUSAL_LM",  # the model predicts the next token
        ),
    )


def set_checkpointing(model: PreTrainedModel, checkpointing: Literal["unsloth"] | bool) -> None:
    """Turn gradient checkpointing on or off, as a batch plan asks. "unsloth" means plain checkpointing here."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    elif model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()


def trainer_arguments(settings: TrainingSettings, model: PreTrainedModel) -> TrainerArguments:
    """Return arguments that leave the rows of notebook 03 as they are.

    Rows are padded on a GPU. On a CPU they are joined if `can_join`."""
    if settings.padding == "padding_free":
        say("training.padding=padding_free has no effect with the transformers engine")
    # TRL's default loss computes the logits of 256 tokens at a time.
    loss: TrainerArguments = {"loss_type": "nll"} if can_join(model) else {}
    return {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None} | loss


def data_collator(model: PreTrainedModel) -> DataCollator | None:
    """Return the collator that joins a micro-batch's rows, on a CPU if possible; else None, for TRL's own, which pads them."""
    return JoinedRows() if can_join(model) else None


def for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare the model for generation: eval mode, key-value cache on, checkpointing off, and `dequantize_on_cpu` on a CPU."""
    model.eval()
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.config.use_cache = True
    if not torch.cuda.is_available():
        dequantize_on_cpu(model)
    return model


def dequantize_on_cpu(model: PreTrainedModel) -> None:
    """Replace the 4-bit layers of a model on a CPU with plain layers that hold the same values, if they fit in half the free RAM.

    A CPU unpacks every 4-bit weight at every step, and twice in training. SmolLM2 answers 2.2 times as fast from plain float32
    weights (12 rows at 350 tokens on two AVX2 cores: 153 ms per step instead of 342, including attention over grouped heads). A
    LoRA adapter stays as it is and can still be turned off."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    needed = base.num_parameters() * base.dtype.itemsize
    if getattr(base, "is_quantized", False) and needed < psutil.virtual_memory().available / 2:
        base.dequantize()
        use_grouped_decode(base)


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make 4-bit layers compute in `dtype`, as Unsloth does. A copy's files name another dtype, which a T4 may not have."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit) and layer.weight.quant_state is not None:
            layer.compute_dtype = layer.weight.quant_state.dtype = dtype


def forbid_cpu_packing(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a CPU. That layout rounds to bfloat16 and has no backward pass.

    On processors with AVX512-BF16, bitsandbytes 0.50 packs each layer at its first forward pass in eval mode and never
    unpacks it. An evaluation before or during training would then cut off the gradients of earlier layers, and the loss would
    fall slowly for no visible reason."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
