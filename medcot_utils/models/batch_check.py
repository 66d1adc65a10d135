"""Whether a batch's logits are those of its rows alone: looked at before hours are spent with kernels that only a T4 runs."""

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

# Largest difference allowed, as a share of the logits' scale. float16 with padding, of 12 prompts on an H100, gave up to
# 0.06 on a scale of 6.5: a hundredth. A kernel that reads a wrong weight or scale is off by the scale itself.
TOLERANCE = 0.05


@dataclass(frozen=True)
class BatchCheck:
    """Hold how far the logits of one decoding step in a batch are from those of the same rows alone.

    difference: the largest, absolute. scale: the largest distance of a logit alone from its row's mean. finite: no logit is
    infinite or no number."""

    rows: int
    difference: float
    scale: float
    finite: bool

    @property
    def agrees(self) -> bool:
        """Whether all logits are finite and within TOLERANCE of the scale."""
        return self.finite and self.difference <= TOLERANCE * self.scale

    def __str__(self) -> str:
        if not self.finite:
            return f"logits of {self.rows} rows in a batch or alone are not finite"
        allowed = f"allowed {TOLERANCE * self.scale:.2f}, on a scale of {self.scale:.1f}"
        return f"logits of {self.rows} rows in a batch and alone differ by at most {self.difference:.3f} ({allowed})"


def check_batches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings) -> None:
    """On a T4, compare a batch's logits with those of its rows alone, and say how far they differ; elsewhere do nothing.

    If they differ too much, Unsloth's product with packed 4-bit weights is switched off for this process and those it starts.

    Raises:
        GenerationError: if they differ too much without that product as well."""
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
    return [inference_prompt(" ".join(words[row:])) for row in range(PACKED_ROWS)]  # of unequal lengths, so most are padded


def compare_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], settings: GenerationSettings
) -> BatchCheck:
    """Compare the logits after one and the same first token of each prompt: in one batch, and each prompt alone.

    That token goes through the model by itself, as every further one does. The prompts take other kernels."""
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
    """Have Unsloth unpack 4-bit weights before it multiplies, in this process and those it starts."""
    os.environ[PACKED_SWITCH] = "0"
    if kernels := sys.modules.get("unsloth.kernels.utils"):
        kernels._BNB_GEMM_4BIT = False  # it reads the environment once, at the first step
