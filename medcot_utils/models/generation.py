"""Answers: batched for scoring, streamed for reading. Each answer is one record."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from medcot_utils.config import GenerationSettings
from medcot_utils.data.prompts import inference_prompt, parse_completion
from medcot_utils.errors import MedcotError
from medcot_utils.machine.gpu import free_gpu_memory

MAX_BATCH = 64  # more gains little on a GPU: the step is then bound by arithmetic
CPU_BATCH = 8
# The compilation takes about a minute; a step of 64 answers in 4 bits about 40 ms more than a compiled one (benchmarks/).
STEPS_WORTH_COMPILING = 1000

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class AnswerRecord(TypedDict):
    """Hold an answer of one model to one question: a line of base_answers.jsonl or tuned_answers.jsonl."""

    id: NotRequired[str]  # the question's; absent from an answer outside a run's questions
    sample: NotRequired[int]  # 0: greedy; k: the k-th sampled one. Absent where `id` is
    prompt: str
    completion: str  # all that was written, without special tokens
    thinking: str  # what stands before the first `</think>`, stripped; all of it if the tag was never closed
    answer: str  # what stands after it, stripped
    completion_tokens: int  # EOS included
    thinking_tokens: int
    answer_tokens: int
    closed: int  # how many `</think>` tags were written
    well_formed: bool  # closed exactly once, with text on both sides
    finished: bool  # ended by EOS, not cut off at max_new_tokens
    seconds: float  # its share of its batch's time


class GenerationError(MedcotError):
    """Answers cannot be made as asked; the message says why and what to set."""


def generate_arguments(settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The keyword arguments of `model.generate`. Sampling settings are passed only when sampling is on."""
    arguments = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.do_sample,
        "use_cache": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # None, not left out: a model's own generation_config would put its temperature back in and warn.
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.do_sample else {}
    return arguments | {"temperature": None, "top_p": None} | sampling


def resolve(
    model: PreTrainedModel, settings: GenerationSettings, questions: int, prompt_tokens: int
) -> tuple[PreTrainedModel, GenerationSettings]:
    """(model, settings) for many answers, with every `auto` decided; says what was decided.

    Where a GPU has room and there are enough steps to repay the compilation, the cache is static: the model is dequantized
    to its compute dtype, adapter merged (`engines.fast`), and each step runs compiled. Else the model stays as it is.
    `prompt_tokens`: the longest prompt's."""
    import torch

    on_gpu, cache = torch.cuda.is_available(), settings.cache_implementation
    size = model.config.get_text_config()
    head = getattr(size, "head_dim", None) or size.hidden_size // size.num_attention_heads
    row = 4 * size.num_hidden_layers * size.num_key_value_heads * head * (prompt_tokens + settings.max_new_tokens)
    patched = "unsloth" in sys.modules
    if cache == "auto":
        batches = -(-questions // MAX_BATCH)
        weights = 2 * model.num_parameters()
        room = on_gpu and free_gpu_memory() > 1.3 * weights + 1.5 * row * min(questions, MAX_BATCH)
        long = batches * settings.max_new_tokens >= STEPS_WORTH_COMPILING
        cache = "static" if room and long and not patched else "dynamic"
    if cache == "static":
        if patched:
            raise GenerationError(
                "generation.cache_implementation static: Unsloth's patches allow no static cache. Set model.engine=transformers, "
                "or leave the cache to auto"
            )
        from medcot_utils.models.static_cache import dequantized, use_grouped_decode

        model = dequantized(model)
        use_grouped_decode(model)
    batch_size = settings.batch_size
    if batch_size == "auto":
        # A cache that grows is copied as it does; one of fixed size is there once.
        fits = int(free_gpu_memory() / (row * (1.2 if cache == "static" else 2.5))) if on_gpu else CPU_BATCH
        batches = -(-questions // max(1, min(MAX_BATCH, fits, questions)))
        batch_size = -(-questions // batches)
    static = "a static cache, weights dequantized" + (", compiled steps" if on_gpu else "")
    how = static if cache == "static" else "a cache that grows, weights as loaded"
    print(f"{questions} questions in batches of {batch_size}: {how}")
    return model, settings.model_copy(update={"batch_size": batch_size, "cache_implementation": cache})


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[dict[str, Any]],
    settings: GenerationSettings,
    newline_after_think: bool,
    seed: int,
    n_samples: int = 0,
) -> list[AnswerRecord]:
    """One greedy record per question, in the questions' order, then `n_samples` times one sampled record per question.

    Sampling is at the settings' temperature and top_p, sample k from seed + k, whatever `do_sample` says (that is for the
    one question of notebook 02). The model may be used up (see `resolve`); a batch that the GPU's memory does not hold is
    halved. Raises GenerationError for a static cache in a process that
    unsloth has patched."""
    import torch

    prompts = [inference_prompt(question["Question"], newline_after_think) for question in questions]
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    model, settings = resolve(model, settings, len(prompts), longest)
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


def by_sample(records: Sequence[AnswerRecord]) -> list[list[AnswerRecord]]:
    """Split records of `answer_questions` into one list per sample; the first is the greedy one."""
    samples: dict[int, list[AnswerRecord]] = {}
    for record in records:
        samples.setdefault(record["sample"], []).append(record)
    return [samples[sample] for sample in sorted(samples)]


def _answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    settings: GenerationSettings,
    longest: int,
    label: str,
) -> list[tuple[list[int], float]]:
    """(token ids, seconds) for each prompt, longest prompts first so that a batch has little padding."""
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
    """Token ids after each prompt, all answered in one batch. A static cache needs `batch_size` and `longest` (tokens of the
    longest prompt of any batch): the one shape that it is compiled for."""
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


def make_record(tokenizer: PreTrainedTokenizerBase, prompt: str, token_ids: list[int], seconds: float) -> AnswerRecord:
    """Return the record of one completion, without id and sample, from its token ids (padding after EOS allowed)."""
    finished = tokenizer.eos_token_id in token_ids
    if finished:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id)]
    completion = tokenizer.decode(token_ids, skip_special_tokens=True)
    parsed = parse_completion(completion)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return {
        "prompt": prompt,
        "completion": completion,
        "thinking": parsed.thinking,
        "answer": parsed.answer,
        "completion_tokens": len(token_ids) + finished,
        "thinking_tokens": count(parsed.thinking),
        "answer_tokens": count(parsed.answer),
        "closed": parsed.closed,
        "well_formed": parsed.well_formed,
        "finished": finished,
        "seconds": round(seconds, 3),
    }


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    settings: GenerationSettings,
    newline_after_think: bool,
    seed: int,
) -> AnswerRecord:
    """Answer one question, printing the text as it is made; returns its record (without `id`)."""
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
