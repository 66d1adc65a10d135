"""Decide how many answers are generated at once, with which cache, and whether they fit the model's context."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from medcot_utils.config import GenerationSettings
from medcot_utils.errors import MedcotError
from medcot_utils.machine.gpu import available_gpu_memory
from medcot_utils.models.records import ASK_LETTER, CLOSING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from medcot_utils.models.deal import Asked

# With an 8B model on an H100, 128 answers at once make 1.6 times the tokens per second of 64, and 192 make 1.9 times. More were
# not measured.
MAX_BATCH = 192
# 16-bit weights are worth their memory only if they leave room for this many answers. On a T4, bitsandbytes multiplies this many
# by packed 4-bit weights (`_gemm_4bit_use_custom_cuda` in its backends/cuda/ops.py). For more, it unpacks all weights at each
# step.
ENOUGH = 64
CPU_BATCH = 8
READ_AT_ONCE = 16  # prompts, if each row has a slot
# On compute capability 7.5, Unsloth 2026.10.9 multiplies up to this many rows with packed 4-bit weights
# (`_BNB_GEMM_4BIT_MAX_ROWS` in its kernels/utils.py). For more rows, it unpacks all weights at each step, which moves 30 GB and
# takes about 115 ms on a T4.
PACKED_ROWS, PACKED_CAPABILITY, PACKED_SWITCH = 16, (7, 5), "UNSLOTH_BNB_GEMM_4BIT"
# Compiling takes about 10 s. A compiled step of 16 answers takes 18 ms instead of 70 ms (in 4 bits on an H100).
STEPS_WORTH_COMPILING = 150


class GenerationError(MedcotError):
    """Say why answers cannot be generated as asked, and what to set."""


def count_new_tokens(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, answer_tokens: int | None, asks_letter: bool = False
) -> int:
    """Return the most tokens that an answer may get: its own and, with forced closing, the closing and the tokens after it."""
    if asks_letter:
        return max_new_tokens + len(closing_tokens(tokenizer, asks_letter)) + 1
    return max_new_tokens + (len(closing_tokens(tokenizer)) + answer_tokens if answer_tokens else 0)


def closing_tokens(tokenizer: PreTrainedTokenizerBase, asks_letter: bool = False) -> list[int]:
    """Return the token ids of `CLOSING`, followed by those of `ASK_LETTER` if a letter is asked for."""
    return tokenizer(CLOSING + ASK_LETTER if asks_letter else CLOSING, add_special_tokens=False)["input_ids"]


def check_context(
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Collection[str],
    max_new_tokens: int,
    answer_tokens: int,
    budget: str = "generation.max_new_tokens",
) -> str:
    """Check that the longest prompt and the longest answer to it fit the model's context, and return one line that says so.

    Args:
        tokenizer: None if it is not available. Then a word counts as one token and the closing as none. This never refuses
            prompts that would fit.
        max_new_tokens, answer_tokens: the most tokens of an answer, and of an answer after forced closing.
        budget: the name of the setting that gives `max_new_tokens`.

    Raises:
        GenerationError: if they do not fit."""
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(tokenizer(prompt)["input_ids"]) if tokenizer else len(prompt.split()) for prompt in prompts)
    closing = len(closing_tokens(tokenizer)) if tokenizer and answer_tokens else 0
    needed = longest + max_new_tokens + closing + answer_tokens
    if context is not None and needed > context:
        after = f", {closing} to close the thinking, evaluation.answer_tokens {answer_tokens}" if answer_tokens else ""
        raise GenerationError(
            f"answers do not fit the model's context of {context} tokens: the longest prompt has {longest}, {budget} "
            f"{max_new_tokens}{after}: {needed} in all. Lower {'evaluation.answer_tokens or ' if answer_tokens else ''}{budget}"
        )
    return f"answers take up to {needed} of " + (f"the model's {context} tokens" if context else "any number of tokens")


def choose_cache(
    model: PreTrainedModel, settings: GenerationSettings, answers: int, prompt_tokens: int, new_tokens: int
) -> Literal["static", "dynamic"]:
    """Return the kind of key-value cache for many answers: the setting or, with `auto`, the one that is faster here.

    `auto` chooses a static cache on a GPU, if the model fits its slots, Unsloth has not patched the process, and there are
    enough steps to repay the compilation.

    Args:
        answers: how many answers are generated.
        prompt_tokens: the tokens of the longest prompt.
        new_tokens: the most tokens that an answer may get; see `count_new_tokens`.

    Raises:
        GenerationError: if a static cache is set, and Unsloth has patched the process or the model does not fit the slots."""
    from medcot_utils.models.slots import fits_slots

    if settings.cache_implementation == "dynamic":
        return "dynamic"
    patched = "unsloth" in sys.modules
    if settings.cache_implementation == "static":
        why = "not every layer of this model attends to all tokens before, or its positions depend on the longest row."
        if patched:
            why = "Unsloth's patches allow no static cache. Set model.engine=transformers, or"
        if patched or not fits_slots(model):
            raise GenerationError(f"generation.cache_implementation static: {why} leave the cache to auto")
        return "static"
    at_once = MAX_BATCH if settings.batch_size == "auto" else settings.batch_size
    too_few = -(-answers // at_once) * new_tokens < STEPS_WORTH_COMPILING
    return "dynamic" if patched or too_few or math.isinf(available_gpu_memory()) or not fits_slots(model) else "static"


def has_room_for_16_bits(model: PreTrainedModel, answers: int, prompt_tokens: int, new_tokens: int) -> bool:
    """Return whether to unpack 4-bit weights once for all steps: on a CPU, or if the GPU has room for them.

    The arguments are those of `choose_cache`."""
    from medcot_utils.models.slots import slot_bytes

    weights, row = 2 * model.num_parameters(), slot_bytes(model, prompt_tokens + new_tokens)
    return available_gpu_memory() > 1.3 * weights + 1.5 * row * min(answers, ENOUGH)


def choose_batch_size(
    model: PreTrainedModel, settings: GenerationSettings, answers: int, prompt_tokens: int, new_tokens: int
) -> int:
    """Return how many answers to generate at once: the setting or, with `auto`, as many as fit the GPU, in batches of equal size.

    A T4 generates at most 16 with Unsloth (`PACKED_ROWS`). `settings.cache_implementation` must be decided already, and the model
    converted for it (`generation.convert_to_write`)."""
    from medcot_utils.models.slots import slot_bytes

    if settings.batch_size != "auto":
        return min(settings.batch_size, answers)
    # A cache that grows is copied each time. A cache of fixed size exists once.
    copies = 1.2 if settings.cache_implementation == "static" else 2.5
    row, free = slot_bytes(model, prompt_tokens + new_tokens), available_gpu_memory()
    fits = CPU_BATCH if math.isinf(free) else int(free / (row * copies))
    in_4_bits = any(getattr(model, name, False) for name in ("is_loaded_in_4bit", "is_quantized"))
    most = PACKED_ROWS if multiplies_packed(model) else ENOUGH if in_4_bits else MAX_BATCH
    batches = -(-answers // max(1, min(most, fits, answers)))
    return -(-answers // batches)


def count_read_at_once(at_once: int) -> int:
    """Return how many prompts are read together if `at_once` answers are generated at once: a quarter, at most READ_AT_ONCE."""
    return max(1, min(READ_AT_ONCE, at_once // 4))


def split(asked: Sequence[Asked], size: int) -> list[list[Asked]]:
    """Split `asked` into parts of `size`; the last part may be smaller."""
    return [list(asked[start : start + size]) for start in range(0, len(asked), size)]


def multiplies_packed(model: PreTrainedModel) -> bool:
    """Return whether Unsloth multiplies small batches with the model's packed 4-bit weights: on a T4, unless it is turned off."""
    import torch

    if "unsloth" not in sys.modules or os.environ.get(PACKED_SWITCH) == "0" or not getattr(model, "is_loaded_in_4bit", False):
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == PACKED_CAPABILITY


def describe_batches(settings: GenerationSettings, answers: int, gpus: int = 1) -> str:
    """Return one line on how many answers are generated at once, how, and on how many GPUs if there are several."""
    at_once = "all at once" if settings.batch_size == answers and gpus == 1 else f"{settings.batch_size} at once"
    shared = f" on each of {gpus} GPUs" if gpus > 1 else ""
    how = "; the next one begins when one ends" if settings.cache_implementation == "static" else ""
    return f"{answers} answers, {at_once}{shared}{how}"
