"""Check that a batch's logits equal those of its rows alone, before a T4 spends hours on kernels that only a T4 runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medcot_utils.config import GenerationSettings
from medcot_utils.data.prompts import ARTICLE_QUESTION, inference_prompt
from medcot_utils.models.batches import (
    PACKED_CAPABILITY,
    PACKED_ROWS,
    PACKED_SWITCH,
    GenerationError,
    multiplies_packed,
)
from medcot_utils.models.generation import generate_arguments, pad_left
from medcot_utils.plain_text import say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Largest difference allowed, as a share of the logits' scale. With float16 and padding, 12 prompts on an H100 differed by up to
# 0.06 on a scale of 6.5: a hundredth. A kernel that reads a wrong weight or scale is off by the scale itself.
TOLERANCE = 0.05


@dataclass(frozen=True)
class BatchCheck:
    """Hold how far the logits of one decoding step in a batch are from those of the same rows alone.

    rows: the number of rows. difference: the largest absolute difference. scale: the largest distance of a row's logit from
    the row's mean, alone. finite: whether no logit is infinite or NaN."""

    rows: int
    difference: float
    scale: float
    finite: bool

    @property
    def agrees(self) -> bool:
        """Return whether all logits are finite and differ by at most TOLERANCE times the scale."""
        return self.finite and self.difference <= TOLERANCE * self.scale

    def __str__(self) -> str:
        if not self.finite:
            return f"logits of {self.rows} rows in a batch or alone are not finite"
        allowed = f"allowed {TOLERANCE * self.scale:.2f}, on a scale of {self.scale:.1f}"
        return f"logits of {self.rows} rows in a batch and alone differ by at most {self.difference:.3f} ({allowed})"


def check_batches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings) -> None:
    """Compare a batch's logits with those of its rows alone, on a T4, and say how much they differ. Do nothing on other devices.

    If they differ too much, Unsloth's product with packed 4-bit weights is turned off for this process and those it starts.

    Raises:
        GenerationError: if they still differ too much without that product."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != PACKED_CAPABILITY or settings.batch_size == 1:
        return
    found = compare_batch(model, tokenizer, _make_prompts(), settings)
    if not found.agrees and multiplies_packed(model):
        say(f"{found}: Unsloth's product of small batches with packed 4-bit weights is switched off ({PACKED_SWITCH}=0)")
        switch_off_packed()
        found = compare_batch(model, tokenizer, _make_prompts(), settings)
    if not found.agrees:
        raise GenerationError(
            f"{found}: answers in batches would not be the model's own. Set generation.batch_size=1, which is slow, or "
            f"another model.engine"
        )
    say(found)


def _make_prompts() -> list[str]:
    words = ARTICLE_QUESTION.split()
    return [inference_prompt(" ".join(words[row:])) for row in range(PACKED_ROWS)]  # lengths differ, so most are padded


def compare_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], settings: GenerationSettings
) -> BatchCheck:
    """Compare the logits that follow the same first new token of each prompt, in one batch and for each prompt alone.

    That token goes through the model on its own, as every later token does. Prompts go through other kernels."""
    together = _take_step(model, tokenizer, prompts, settings)
    alone = together.new_empty(together.shape)
    for row, prompt in enumerate(prompts):
        alone[row] = _take_step(model, tokenizer, [prompt], settings)[0]
    finite = bool(together.isfinite().all() and alone.isfinite().all())
    scale = (alone - alone.mean(dim=-1, keepdim=True)).abs().max()
    return BatchCheck(len(prompts), float((together - alone).abs().max()), float(scale), finite)


def _take_step(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], settings: GenerationSettings
) -> torch.Tensor:
    """Return the logits (prompts, vocabulary) of the second new token, in float32 on the CPU."""
    import torch
    from transformers import LogitsProcessorList, SequenceBiasLogitsProcessor

    first = tokenizer("The", add_special_tokens=False)["input_ids"][-1]
    forced = LogitsProcessorList([SequenceBiasLogitsProcessor([[[first], 1e9]])])
    inputs = pad_left(tokenizer, list(prompts)).to(model.device)
    greedy = settings.model_copy(update={"do_sample": False, "max_new_tokens": 2})
    arguments = generate_arguments(greedy, tokenizer) | {"return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode():
        return model.generate(**inputs, **arguments, logits_processor=forced).logits[1].float().cpu()


def switch_off_packed() -> None:
    """Make Unsloth unpack 4-bit weights before it multiplies, in this process and those it starts."""
    os.environ[PACKED_SWITCH] = "0"
    if kernels := sys.modules.get("unsloth.kernels.utils"):
        kernels._BNB_GEMM_4BIT = False  # Unsloth reads the environment only once, at the first step
