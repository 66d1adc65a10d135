"""Generate answers: in batches for scoring, streamed for reading. Each answer is one record."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from medcot_utils.config import GenerationSettings
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.models.batches import (
    check_context,
    choose_batch_size,
    choose_cache,
    count_new_tokens,
    count_read_at_once,
    describe_batches,
    has_room_for_16_bits,
    split,
)
from medcot_utils.models.deal import SAMPLED_TOP_K, Asked, Batch, Deal, HowToWrite
from medcot_utils.models.prefix import count_shared
from medcot_utils.models.records import AnswerRecord, record_answer
from medcot_utils.plain_text import say, show_controls

# A checkpoint's own generation_config.json applies to every argument that is left out. A repetition penalty of 1.3 or `top_k` 1
# would change the answers of one model unnoticed. These values have no effect.
NEUTRAL_ARGUMENTS: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,  # it also applies to the prompt of a decoder
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

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

    from medcot_utils.data.rows import AskedQuestion
    from medcot_utils.models.decoding import WrittenRow
    from medcot_utils.models.other_gpus import OtherGpus
    from medcot_utils.models.slot_writer import SlotWriter
    from medcot_utils.run.journal import Journal


def generate_arguments(settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the keyword arguments of `model.generate`, including those that override a checkpoint's own settings.

    Sampling settings are passed only if sampling is on."""
    arguments = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.do_sample,
        "use_cache": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # They are None, not left out, or a model's own generation_config would put its temperature back and warn.
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": SAMPLED_TOP_K}
    return NEUTRAL_ARGUMENTS | arguments | (sampling if settings.do_sample else {"temperature": None, "top_p": None})


def own_generation_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings of the checkpoint's generation_config.json that `generate_arguments` overrides."""
    neutral = {**NEUTRAL_ARGUMENTS, "do_sample": False, "use_cache": True, "top_k": SAMPLED_TOP_K}
    neutral |= {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    given = {name: getattr(model.generation_config, name, None) for name in neutral}
    return {name: value for name, value in given.items() if value not in (None, neutral[name])}


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[AskedQuestion],
    settings: GenerationSettings,
    newline_after_think: bool,
    seed: int,
    n_samples: int = 0,
    answer_tokens: int | None = None,
    journal: Journal | None = None,
    others: OtherGpus | None = None,
) -> list[AnswerRecord]:
    """Return one greedy record per question, in the questions' order, then `n_samples` times one sampled record per question.

    Sampling uses the settings' temperature and top_p. `do_sample` does not matter here; it is for the one question of notebook
    02. Each sampled answer has its own seed, made from `seed`, the question's id, and the sample's number. All else is as in
    `answer_prompts`."""
    prompts = [inference_prompt(question["Question"], newline_after_think) for question in questions]
    asked = [
        Asked(question["id"], prompt, sample, _seed_of(seed, question["id"], sample) if sample else None)
        for sample in range(n_samples + 1)
        for question, prompt in zip(questions, prompts, strict=True)
    ]
    return answer_prompts(model, tokenizer, asked, settings, answer_tokens, journal, others=others)


def _seed_of(seed: int, question: str, sample: int) -> int:
    digest = hashlib.sha256(json.dumps([seed, question, sample]).encode()).digest()
    return int.from_bytes(digest[:4])  # torch's CPU generator uses no more bytes of a seed


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    settings: GenerationSettings,
    answer_tokens: int | None = None,
    journal: Journal | None = None,
    label: str = "answers",
    others: OtherGpus | None = None,
) -> list[AnswerRecord]:
    """Return the record of each answer, in the order given. Prompts of similar length are read together, sampled or not.

    A static cache has slots (`SlotWriter`); a cache that grows has batches (`BatchWriter`). The model passed in cannot be used
    afterward if its 4-bit weights are unpacked for the slots, or if the adapter is merged into float32 weights on a CPU, where
    the adapter's products take a third of a step. If memory runs out, half as many answers are generated at once.

    Args:
        settings: `max_new_tokens` is the token budget for what a model writes by itself.
        answer_tokens: the most tokens of an answer after forced closing (`ForcedClosing`). This answer is recorded as `forced`
            and does not change the record of what the model wrote by itself. 0: only how the thinking was closed is recorded.
            Nothing is written then, except `Answer:` if there are letters to choose from; the likeliest letter is recorded as
            `letter` if all letters are single tokens. None: no forced closing.
        journal: keeps records as soon as they are made, and stops in time. Answers that it holds are not generated again. Records
            equal those of an uninterrupted call, except for `seconds`: always with slots, and with batches if whole batches were
            kept, as they are after a kill. If the number of answers at once changed in between, they are equal up to rounding.
        label: names the progress bar.
        others: the processes on the other GPUs, which generate answers too. The records equal those of one GPU.

    Raises:
        GenerationError: as `choose_cache` and `check_context` do, and if a process on another GPU fails.
        TimeBudgetReached: if training.max_hours is nearly over; the journal keeps what was made."""
    from tqdm.auto import tqdm

    kept = {(record["id"], record["sample"], record["prompt"]): record for record in (journal.read() if journal else [])}
    made = {one.key: kept[one.key] for one in asked if one.key in kept}
    if made:
        say(f"{len(made)} of {len(asked)} answers were made before and are kept")
    if len(made) == len(asked):
        return [made[one.key] for one in asked]
    prompts = {one.prompt for one in asked}
    if answer_tokens:
        check_context(model.config, tokenizer, prompts, settings.max_new_tokens, answer_tokens)
    how = decide(model, tokenizer, asked, settings, answer_tokens)
    model = convert_to_write(model, how)
    at_once = choose_batch_size(model, how.settings, len(asked), how.longest, how.new_tokens)
    how = replace(how, settings=how.settings.model_copy(update={"batch_size": at_once}))
    # The longest prompts come first, so that a batch has little padding and the last batch is the fastest.
    together = at_once if how.settings.cache_implementation == "dynamic" else count_read_at_once(at_once)
    parts = split(sorted(asked, key=lambda one: len(one.prompt), reverse=True), together)
    batches = [Batch(part, left) for part in parts if (left := [one for one in part if one.key not in made])]
    elsewhere = others.count_for(-(-(len(asked) - len(made)) // at_once)) if others else 0
    say(describe_batches(how.settings, len(asked), 1 + elsewhere))
    with tqdm(total=len(asked), initial=len(made), desc=label, unit="answer") as bar:

        def keep(records: list[AnswerRecord]) -> None:
            if journal:
                journal.add(records)
            made.update({(record["id"], record["sample"], record["prompt"]): record for record in records})
            bar.update(len(records))

        def require_time() -> None:
            if journal:
                journal.require_time(label, len(made), len(asked))

        deal = Deal(batches, keep, require_time)
        with others.taking_part(deal, how, elsewhere) if others else nullcontext():
            for records in make_writer(model, tokenizer, how).write(deal.take):
                deal.keep(records)
        if deal.error:
            raise deal.error
    return [made[one.key] for one in asked]


def decide(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    settings: GenerationSettings,
    answer_tokens: int | None,
) -> HowToWrite:
    """Decide how answers are written, except how many at once.

    The decision depends on all answers that are asked for, so it stays the same if some are already made."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in {one.prompt for one in asked}]
    letters = "".join(sorted(set("".join(one.letters for one in asked)))) if answer_tokens == 0 else ""
    new_tokens = count_new_tokens(tokenizer, settings.max_new_tokens, answer_tokens, bool(letters))
    size = len(asked), max(map(len, ids)), new_tokens
    settings = settings.model_copy(update={"do_sample": False, "cache_implementation": choose_cache(model, settings, *size)})
    in_16_bits = settings.cache_implementation == "static" and has_room_for_16_bits(model, *size)
    return HowToWrite(
        settings,
        answer_tokens,
        letters,
        new_tokens=new_tokens,
        longest=size[1],
        prefix=tuple(ids[0][: count_shared(ids)]),
        sampled=any(one.seed is not None for one in asked),
        in_16_bits=in_16_bits,
    )


def make_writer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: HowToWrite) -> BatchWriter | SlotWriter:
    """Return the writer of answers for this decision. Args: model: what `convert_to_write` returns."""
    if how.settings.cache_implementation == "dynamic":
        return BatchWriter(model, tokenizer, how)
    from medcot_utils.models.slot_writer import SlotWriter

    return SlotWriter(model, tokenizer, how)


def convert_to_write(model: PreTrainedModel, how: HowToWrite) -> PreTrainedModel:
    """Return the model in the form that writes fastest with the chosen cache. The model passed in may become unusable."""
    from medcot_utils.models.joined_projections import join_projections
    from medcot_utils.models.plain_weights import dequantize, make_plain

    if how.settings.cache_implementation == "static":
        return join_projections(dequantize(model)) if how.in_16_bits else model.eval()
    return make_plain(model) if _can_merge_here(model) else model


def _can_merge_here(model: PreTrainedModel) -> bool:
    import torch

    # In 16 bits, the sum of weights and adapter would be rounded, which makes another model.
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return base.device.type == "cpu" and base.dtype == torch.float32 and not getattr(base, "is_quantized", False)


class BatchWriter:
    """Write batches with one model. If a batch runs out of memory, this and later batches are halved."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: HowToWrite) -> None:
        """Args: model: what `convert_to_write` returns."""
        self._model, self._tokenizer, self.how = model, tokenizer, how
        self._size = how.settings.batch_size

    def write(self, take: Callable[[], Batch | None]) -> Iterator[list[AnswerRecord]]:
        """Yield the records of each batch that `take` returns, until it returns None. A batch that does not fit is split."""
        while batch := take():
            yield from self._write(batch.missing)

    def _write(self, batch: list[Asked]) -> Iterator[list[AnswerRecord]]:
        import torch
        from accelerate.utils.memory import should_reduce_batch_size

        parts = split(batch, self._size)
        while parts:
            part, began = parts.pop(0), time.perf_counter()
            try:
                written = _write_batch(self._model, self._tokenizer, part, self.how)
            except RuntimeError as error:
                if len(part) == 1 or not should_reduce_batch_size(error):
                    raise
                written = None
            if written is None:  # outside the except block, whose traceback would keep the cache alive
                self._size = len(part) // 2
                say(f"out of memory: from here on, batches of {self._size}")
                torch.cuda.empty_cache()
                parts = split([*part, *itertools.chain(*parts)], self._size)
                continue
            seconds = (time.perf_counter() - began) / len(part)
            yield [record_answer(self._tokenizer, one, row, seconds) for one, row in zip(part, written, strict=True)]


def _write_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Asked], how: HowToWrite
) -> list[WrittenRow]:
    """Return what each row wrote, all in one call of `generate`."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    from medcot_utils.models.decoding import ForcedClosing, RowRules, RowSampler, Sampling, StopDoneRows, WrittenRow

    settings, answer_tokens = how.settings, how.answer_tokens
    letters = [one.letters if how.letters else "" for one in batch]
    steps = count_new_tokens(tokenizer, settings.max_new_tokens, answer_tokens, any(letters))
    processors, criteria, closing = LogitsProcessorList(), StoppingCriteriaList(), None
    seeds = [one.seed for one in batch]
    if any(seed is not None for seed in seeds):
        sampling = Sampling(settings.temperature, SAMPLED_TOP_K, settings.top_p)
        processors.append(RowSampler(seeds, sampling, steps, model.device))
    if answer_tokens is not None:
        rules = RowRules(tokenizer, settings.max_new_tokens, answer_tokens, "".join(letters))
        closing = ForcedClosing(rules, letters)
        processors.append(closing)
        criteria.append(StopDoneRows(closing))
    hooks = {"max_new_tokens": steps, "logits_processor": processors, "stopping_criteria": criteria}
    prompts = [one.prompt for one in batch]
    if closing and model.device.type == "cpu":
        from medcot_utils.models.growing_cache import generate_in_turns

        inputs = pad_left(tokenizer, prompts)
        generate_in_turns(model, inputs, closing, generate_arguments(settings, tokenizer) | hooks)
        return closing.rows
    written = complete(model, tokenizer, prompts, settings, **hooks)
    return closing.rows if closing else [WrittenRow(own) for own in written]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: GenerationSettings,
    **arguments: Any,
) -> list[list[int]]:
    """Return the token ids generated after each prompt, in one batch. `arguments` of `generate` override those of `settings`."""
    import torch

    arguments = generate_arguments(settings, tokenizer) | arguments
    batch = pad_left(tokenizer, list(prompts)).to(model.device)
    with torch.inference_mode():
        sequences = model.generate(**batch, **arguments)
    return sequences[:, batch["input_ids"].shape[1] :].tolist()


def pad_left(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> BatchEncoding:
    """Return prompts as one batch (rows, tokens), padded on the left to the longest."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        return tokenizer(prompts, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = side  # training pads on the right


def make_streamer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    """Return a streamer for `model.generate` that prints an answer as it is written. It leaves out the prompt and makes control
    characters visible."""
    from transformers import TextStreamer

    class PlainStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(show_controls(text), stream_end)

    return PlainStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
