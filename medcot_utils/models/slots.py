"""Decode many rows at once in the slots of one cache of fixed size, each row at its own position.

transformers' static cache has one position for all rows. They are padded to it, wait for the slowest row, and read the cache's
whole length at every step. Here a row begins as soon as a slot is free, and a step reads only the tokens that the row has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medcot_utils.models.plain_weights import GROUPED, grouped_attention
from medcot_utils.models.prefix import attends_to_all

_SLOTS = "slots"
# Rotary embeddings that do not depend on the longest position, because a recorded graph cannot look it up.
_STEADY_ROTARY = {"default", "linear", "llama3", "yarn"}
_KERNEL_FROM = (8, 0)  # compute capability; the kernel has not run below


def fits_slots(model: PreTrainedModel) -> bool:
    """Return whether a model can be decoded in slots.

    It must be on one device and have torch's own attention to all earlier tokens, with rotary embeddings in `_STEADY_ROTARY`."""
    base = _without_adapter(model)
    if len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        return False
    config = base.config.get_text_config()
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    usable = base._can_compile_fullgraph and base._supports_attention_backend and hasattr(base.get_decoder(), "layers")
    attention = config._attn_implementation in ("sdpa", GROUPED)
    return usable and attention and rotary in _STEADY_ROTARY and attends_to_all(config)


def slot_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of the keys and values of one row of `tokens` tokens, in 16 bits."""
    config = model.config.get_text_config()
    heads, width = _heads(config)
    return 4 * config.num_hidden_layers * heads * width * tokens


def _heads(config: Any) -> tuple[int, int]:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "peft_config") else model


class _Reading:
    """Stand in for a layer's cache while prompts are read. Their common beginning is already in the slots."""

    def __init__(self, states: Sequence[torch.Tensor], prefix: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        self._states, self._prefix, self._slots, self._rows = states, prefix, slots, rows

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        whole, begin = [], self._prefix
        for held, new in zip(self._states, (keys, values), strict=True):
            held[self._slots, begin : begin + new.shape[2]] = new[self._rows].transpose(1, 2)
            before = held[:1, :begin].transpose(1, 2).expand(len(new), -1, -1, -1)
            whole.append(torch.cat([before, new], dim=2))
        return tuple(whole)


class _Writing:
    """Stand in for a layer's cache while rows write: keep a token in each slot, and return all tokens that the slots hold."""

    def __init__(self, states: Sequence[torch.Tensor], rows: torch.Tensor, places: torch.Tensor) -> None:
        self._states, self._rows, self._places = states, rows, places

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        for held, new in zip(self._states, (keys, values), strict=True):
            held[self._rows, self._places] = new[:, :, 0]
        return tuple(held.transpose(1, 2) for held in self._states)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    held: torch.Tensor | None = None,
    with_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as SDPA does. While rows write, each attends to the first `held` (rows,) tokens of its slot."""
    if held is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if with_kernel:
        from medcot_utils.models.slot_attention import attend_to_slots

        return attend_to_slots(query, key, value, held, scaling or query.shape[-1] ** -0.5), None
    within = torch.arange(key.shape[2], device=key.device) < held[:, None]
    return grouped_attention(query, key, value, within[:, None, None], scaling), None


def _fits_kernel(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    if device.type != "cuda" or dtype.itemsize != 2 or torch.cuda.get_device_capability(device) < _KERNEL_FROM:
        return False
    return width >= 16 and width.bit_count() == 1  # Triton's tiles


def _write_with(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    rows: torch.Tensor,
    places: torch.Tensor,
    **given,
) -> torch.Tensor:
    return type(layer).forward(layer, hidden, past_key_values=_Writing(states, rows, places), **given)


class Slots:
    """Hold the keys and values of up to `rows` rows, and take steps with them.

    `tokens` (rows,) is the token that each row feeds at the next step; `places` (rows,) is its position in the slot."""

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int, prefix: Sequence[int]) -> None:
        """Allocate the memory. Use the other methods only inside `installed`.

        Args:
            model: a model for which `fits_slots` is true.
            rows: the number of slots.
            capacity: the tokens that a slot can hold.
            prefix: the token ids that all prompts begin with."""
        self._model = _without_adapter(model)
        self._layers, config = list(self._model.get_decoder().layers), self._model.config.get_text_config()
        device, dtype = self._model.device, self._model.dtype
        self.rows, self.capacity, self._prefix = rows, capacity, list(prefix)
        shape = rows, capacity, *_heads(config)
        self._states = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)) for _ in self._layers]
        self.tokens, self.places = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        self._rows = torch.arange(rows, device=device)
        self._reads: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._with_kernel = _fits_kernel(device, dtype, shape[-1])
        self._write = torch.compile(_write_with, dynamic=False) if device.type == "cuda" else _write_with

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make the model's layers keep their keys and values in the slots. Restore the layers at the end."""
        ALL_ATTENTION_FUNCTIONS.register(_SLOTS, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_SLOTS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        attention = self._model.config.get_text_config()._attn_implementation
        indices = [layer.self_attn.layer_idx for layer in self._layers]
        self._model.set_attn_implementation(_SLOTS)
        for layer, states in zip(self._layers, self._states, strict=True):
            layer.forward = partial(self._forward, layer, states)
            layer.self_attn.layer_idx = 0  # with different numbers, each layer would be compiled separately
        try:
            yield
        finally:
            for layer, index in zip(self._layers, indices, strict=True):
                del layer.forward
                layer.self_attn.layer_idx = index
            self._model.set_attn_implementation(attention)

    def _forward(
        self,
        layer: torch.nn.Module,
        states: tuple[torch.Tensor, ...],
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: None = None,
        **given: Any,
    ) -> torch.Tensor:
        if self._reads is not None:
            cache = _Reading(states, *self._reads)
            return type(layer).forward(layer, hidden, attention_mask=attention_mask, past_key_values=cache, **given)
        attention_mask = attention_mask.flatten()
        given |= {"held": attention_mask, "with_kernel": self._with_kernel}
        return self._write(layer, hidden, states, self._rows, self.places, **given)

    def read_prefix(self) -> None:
        """Read the common beginning of all prompts into every slot."""
        if not self._prefix:
            return
        first = torch.zeros(1, dtype=torch.long, device=self.tokens.device)
        self._read(torch.tensor([self._prefix], device=first.device), 0, first, first)
        for held in (held for states in self._states for held in states):
            held[1:, : len(self._prefix)] = held[:1, : len(self._prefix)]

    def read(self, prompts: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Read token ids (prompts, tokens) that follow the prefix, and keep those of `rows` (n,) in `slots` (n,).

        Padding on the right is overwritten when the row writes."""
        self._read(prompts, len(self._prefix), slots, rows)

    def _read(self, prompts: torch.Tensor, begin: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        self._reads, tokens = (begin, slots, rows), prompts.shape[1]
        positions = torch.arange(begin, begin + tokens, device=prompts.device)[None]
        looks = torch.arange(begin + tokens, device=prompts.device) <= positions[..., None]  # (1, tokens, all before)
        self._model(input_ids=prompts, position_ids=positions, attention_mask=looks[None], use_cache=False, logits_to_keep=1)
        self._reads = None

    def step(self) -> torch.Tensor:
        """Feed `tokens` at `places`, and return the logits of the next tokens (rows, vocabulary)."""
        held = (self.places + 1).int()[:, None, None, None]  # transformers passes on a mask of four dimensions unchanged
        return self._model(
            input_ids=self.tokens[:, None], position_ids=self.places[:, None], attention_mask=held, use_cache=False
        ).logits[:, -1]
