"""Turn 4-bit weights and an adapter into plain weights, so that a step unpacks nothing, and attend over grouped heads.

The 4-bit weights are dequantized once, to exactly the values that the 4-bit layers compute with, and the adapter is added."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GROUPED = "grouped_decode"


def make_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return the dequantized model, with attention that reads the cache once per step. The model passed in becomes unusable."""
    model = dequantize(model)
    use_grouped_decode(model)
    return model


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with plain linear layers in its compute dtype: 4-bit weights dequantized, and a LoRA adapter merged.

    W + (alpha/r) B A is summed in float32 and rounded once. The model passed in, a PeftModel if it has an adapter, becomes
    unusable."""
    adapted = {}
    if hasattr(model, "peft_config"):
        from peft.tuners.lora import LoraLayer

        base = model.get_base_model()
        adapted = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
        model = model.unload()
        for layer in adapted.values():
            del layer.base_layer  # only the matrices A and B are needed, and quantized weights must not stay in memory
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    for name, layer in adapted.items():
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(weight.float() + layer.get_delta_weight("default").float().to(weight.device))
    return model.eval()


def _grouped_decode(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if query.shape[2] != 1:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return grouped_attention(query, key, value, attention_mask, scaling), None


def grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Return the attention output of one new token per row, from queries (rows, heads, 1, width).

    Keys and values are (rows, groups, tokens, width); the output is (rows, 1, heads, width). The query heads that share a key
    head are multiplied with it together. SDPA with a mask would first copy the whole cache once per query head. With 64 rows,
    this takes longer than all products with weights."""
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    scores = query.reshape(batch, groups, heads // groups, width) @ key.transpose(2, 3)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).reshape(batch, 1, heads, width)


def use_grouped_decode(model: PreTrainedModel) -> None:
    """Make a decoding step's attention read each key and value once (grouped-query attention, Ainslie et al. 2023).

    A model whose attention is not torch's own (SDPA) keeps it, because it may do more, such as attention sinks."""
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return
    ALL_ATTENTION_FUNCTIONS.register(GROUPED, _grouped_decode)
    ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(GROUPED)
