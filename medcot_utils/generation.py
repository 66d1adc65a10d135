"""Answers: batched for scoring, streamed for reading. Each answer is one record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medcot_utils.config import GenerationSettings
from medcot_utils.prompts import inference_prompt, parse_completion

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[dict[str, Any]],
    settings: GenerationSettings,
    newline_after_think: bool,
    seed: int,
) -> list[dict[str, Any]]:
    """One record per question, in the questions' order. Prompts are sorted by length and padded on the left.

    A record: id, prompt, completion, thinking, answer, completion_tokens, thinking_tokens, answer_tokens, closed
    (`</think>` tags), well_formed (closed once, text on both sides), finished (ended by EOS, not cut at max_new_tokens),
    seconds (its share of its batch's time)."""
    import torch
    from tqdm.auto import tqdm

    prompts = [inference_prompt(question["Question"], newline_after_think) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    arguments, records = generate_arguments(settings, tokenizer), [None] * len(prompts)
    torch.manual_seed(seed)
    for start in tqdm(range(0, len(order), settings.batch_size), desc="answers", unit="batch"):
        chosen = order[start : start + settings.batch_size]
        began = time.perf_counter()
        batch = _pad_left(tokenizer, [prompts[i] for i in chosen]).to(model.device)
        with torch.inference_mode():
            sequences = model.generate(**batch, **arguments)
        seconds = (time.perf_counter() - began) / len(chosen)
        for i, row in zip(chosen, sequences[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            records[i] = {"id": questions[i]["id"], **make_record(tokenizer, prompts[i], row, seconds)}
    return records


def _pad_left(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Any:
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        return tokenizer(prompts, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = side  # training pads on the right


def make_record(tokenizer: PreTrainedTokenizerBase, prompt: str, token_ids: list[int], seconds: float) -> dict[str, Any]:
    """The record of one completion from its token ids (padding after EOS allowed)."""
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
) -> dict[str, Any]:
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
