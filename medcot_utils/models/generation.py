"""Answer questions: in batches for scoring, streamed for reading. Each answer is one record."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from medcot_utils.config import GenerationSettings
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.errors import MedcotError
from medcot_utils.machine.gpu import available_gpu_memory
from medcot_utils.models.records import AnswerRecord, make_record

MAX_BATCH = 64  # more gains little on a GPU: the step is then bound by arithmetic
CPU_BATCH = 8
# Compiling takes about a minute; a step of 64 answers in 4 bits about 40 ms more than a compiled one (benchmarks/).
STEPS_WORTH_COMPILING = 1000

# A checkpoint's own generation_config.json is in force for every argument that is left out: a repetition penalty of 1.3 or
# `top_k` 1 would change the answers of one model unseen. These are the values without any effect.
NEUTRAL_ARGUMENTS: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,  # of a decoder's prompt too
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "token_healing": False,
    "use_mtp": False,
    **dict.fromkeys(("min_new_tokens", "max_time", "stop_strings", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "force_words_ids")),
    **dict.fromkeys(("exponential_decay_length_penalty", "guidance_scale", "watermarking_config", "constraints")),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit")),
    **dict.fromkeys(("cache_implementation", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")),
}
SAMPLED_TOP_K = 50  # transformers' own default: what a checkpoint that sets nothing samples from

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from medcot_utils.data.rows import AskedQuestion


class GenerationError(MedcotError):
    """Say why answers cannot be made as asked, and what to set."""


def generate_arguments(settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the keyword arguments of `model.generate`, those included that keep a checkpoint's own settings out of force.

    Sampling settings are passed only if sampling is on."""
    arguments = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.do_sample,
        "use_cache": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # None, not left out: a model's own generation_config would put its temperature back in and warn.
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": SAMPLED_TOP_K}
    return NEUTRAL_ARGUMENTS | arguments | (sampling if settings.do_sample else {"temperature": None, "top_p": None})


def own_generation_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return what the checkpoint's generation_config.json would set and `generate_arguments` keeps out of force."""
    neutral = {**NEUTRAL_ARGUMENTS, "do_sample": False, "use_cache": True, "top_k": SAMPLED_TOP_K}
    neutral |= {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    given = {name: getattr(model.generation_config, name, None) for name in neutral}
    return {name: value for name, value in given.items() if value not in (None, neutral[name])}


def choose_cache(
    model: PreTrainedModel, settings: GenerationSettings, questions: int, prompt_tokens: int
) -> Literal["static", "dynamic"]:
    """Return the kind of key-value cache for many answers: as set, or with `auto` the one that is faster here.

    A static cache needs a GPU with room for 16-bit weights and enough steps to repay the compilation. `prompt_tokens` is the
    length of the longest prompt. Raises GenerationError for a static cache in a process that unsloth has patched."""
    patched = "unsloth" in sys.modules
    if settings.cache_implementation == "static" and patched:
        raise GenerationError(
            "generation.cache_implementation static: Unsloth's patches allow no static cache. Set model.engine=transformers, "
            "or leave the cache to auto"
        )
    if settings.cache_implementation != "auto":
        return settings.cache_implementation
    steps = -(-questions // MAX_BATCH) * settings.max_new_tokens
    if patched or steps < STEPS_WORTH_COMPILING or math.isinf(free := available_gpu_memory()):
        return "dynamic"
    weights, row = 2 * model.num_parameters(), _cache_bytes(model, prompt_tokens + settings.max_new_tokens)
    return "static" if free > 1.3 * weights + 1.5 * row * min(questions, MAX_BATCH) else "dynamic"


def choose_batch_size(model: PreTrainedModel, settings: GenerationSettings, questions: int, prompt_tokens: int) -> int:
    """Return how many questions to answer at once: as set, or with `auto` what the GPU's free memory holds, in even batches.

    `settings.cache_implementation` is decided already, and the model converted for it (see `convert_for_static_cache`)."""
    if settings.batch_size != "auto":
        return settings.batch_size
    # A cache that grows is copied when it does. One of fixed size exists once.
    copies = 1.2 if settings.cache_implementation == "static" else 2.5
    row, free = _cache_bytes(model, prompt_tokens + settings.max_new_tokens), available_gpu_memory()
    fits = CPU_BATCH if math.isinf(free) else int(free / (row * copies))
    batches = -(-questions // max(1, min(MAX_BATCH, fits, questions)))
    return -(-questions // batches)


def _cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of one answer's keys and values, in 16 bits."""
    size = model.config.get_text_config()
    head = getattr(size, "head_dim", None) or size.hidden_size // size.num_attention_heads
    heads = getattr(size, "num_key_value_heads", None) or size.num_attention_heads
    return 4 * size.num_hidden_layers * heads * head * tokens


def describe_batches(settings: GenerationSettings, questions: int) -> str:
    """Return one line that says how many questions are answered at once, and how."""
    import torch

    how = "a cache that grows"
    if settings.cache_implementation == "static":
        how = "a static cache" + (", compiled steps" if torch.cuda.is_available() else "")
    return f"{questions} questions in batches of {settings.batch_size}: {how}"


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[AskedQuestion],
    settings: GenerationSettings,
    newline_after_think: bool,
    seed: int,
    n_samples: int = 0,
) -> list[AnswerRecord]:
    """Return one greedy record per question, in the questions' order, then `n_samples` times one sampled record per question.

    Sampling takes the settings' temperature and top_p, and seed + k for sample k, whatever `do_sample` says (that is for the
    one question of notebook 02). A static cache converts the given model (see `convert_for_static_cache`). A batch that runs
    out of memory is halved. Raises GenerationError as `choose_cache` does."""
    import torch

    prompts = [inference_prompt(question["Question"], newline_after_think) for question in questions]
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    settings = settings.model_copy(update={"cache_implementation": choose_cache(model, settings, len(prompts), longest)})
    if settings.cache_implementation == "static":
        from medcot_utils.models.static_cache import convert_for_static_cache

        model = convert_for_static_cache(model)
    settings = settings.model_copy(update={"batch_size": choose_batch_size(model, settings, len(prompts), longest)})
    print(describe_batches(settings, len(prompts)))
    records = []
    for sample in range(n_samples + 1):
        torch.manual_seed(seed + sample)
        how = settings.model_copy(update={"do_sample": sample > 0})
        label = f"answers, sample {sample} of {n_samples}" if sample else "answers"
        completions = _answer_all(model, tokenizer, prompts, how, longest, label)
        for question, prompt, (row, seconds) in zip(questions, prompts, completions, strict=True):
            record = make_record(tokenizer, prompt, row, seconds)
            records.append({"id": question["id"], "sample": sample, **record})
    return records


def _answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    settings: GenerationSettings,
    longest: int,
    label: str,
) -> list[tuple[list[int], float]]:
    """Return (token ids, seconds) for each prompt. The longest come first, so that a batch has little padding."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size
    from tqdm.auto import tqdm

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers, batch_size = [None] * len(prompts), settings.batch_size
    with tqdm(total=len(order), desc=label, unit="answer") as bar:
        while order:
            chosen = order[:batch_size]
            began = time.perf_counter()
            try:
                completions = complete(model, tokenizer, [prompts[i] for i in chosen], settings, batch_size, longest)
            except RuntimeError as error:
                if len(chosen) == 1 or not should_reduce_batch_size(error):
                    raise
                completions = None
            if completions is None:  # out of the except block: its traceback would keep the cache alive
                batch_size = len(chosen) // 2
                print(f"out of memory: batches of {batch_size} from here on")
                torch.cuda.empty_cache()
                continue
            seconds = (time.perf_counter() - began) / len(chosen)
            for i, row in zip(chosen, completions, strict=True):
                answers[i] = (row, seconds)
            order = order[batch_size:]
            bar.update(len(chosen))
    return answers


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    settings: GenerationSettings,
    batch_size: int | None = None,
    longest: int | None = None,
) -> list[list[int]]:
    """Return the token ids after each prompt, all answered in one batch.

    A static cache is compiled for one shape: it needs `batch_size`, and `longest`, the tokens of the longest prompt of any
    batch."""
    import torch

    arguments, length = generate_arguments(settings, tokenizer), None
    if settings.cache_implementation == "static":
        # One shape for all batches: another one would be compiled anew.
        arguments["cache_implementation"], length = "static", longest
        padded = prompts + prompts[-1:] * (batch_size - len(prompts))
    else:
        padded = prompts
    batch = _pad_left(tokenizer, padded, length).to(model.device)
    with torch.inference_mode():
        sequences = model.generate(**batch, **arguments)
    return sequences[: len(prompts), batch["input_ids"].shape[1] :].tolist()


def _pad_left(tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int | None = None) -> Any:
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        return tokenizer(prompts, return_tensors="pt", padding="max_length" if length else True, max_length=length)
    finally:
        tokenizer.padding_side = side  # training pads on the right


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    settings: GenerationSettings,
    newline_after_think: bool,
    seed: int,
) -> AnswerRecord:
    """Answer one question and print the text as it is made. Returns its record, without `id`."""
    import torch
    from transformers import TextStreamer

    prompt = inference_prompt(question, newline_after_think)
    inputs = tokenizer([prompt], return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    began = time.perf_counter()
    with torch.inference_mode():
        sequences = model.generate(**inputs, **generate_arguments(settings, tokenizer), streamer=streamer)
    new_tokens: torch.Tensor = sequences[0, inputs["input_ids"].shape[1] :]
    return make_record(tokenizer, prompt, new_tokens.tolist(), time.perf_counter() - began)
