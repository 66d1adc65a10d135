"""Batches: how many answers at once, with which cache, and whether they fit the model's context."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from transformers import AutoConfig

from medcot_utils.config import load_config
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.models import batches, generation
from medcot_utils.models.batches import (
    MAX_BATCH,
    GenerationError,
    check_context,
    choose_batch_size,
    choose_cache,
    count_new_tokens,
    describe_batches,
)
from medcot_utils.models.engine import get_engine
from medcot_utils.models.generation import answer_questions
from medcot_utils.models.slots import slot_bytes

on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, what is decided depends on its memory")

CONFIG = load_config("smoke", ["model.load_in_4bit=false", "generation.max_new_tokens=12"])
QUESTIONS = [{"id": str(count), "Question": "Why fever? " * count} for count in (1, 40, 3, 7, 2)]


@pytest.fixture(scope="module")
def loaded():
    """(model, tokenizer), read only."""
    model, tokenizer = get_engine(CONFIG.model).load(CONFIG.model)
    return model.eval(), tokenizer


def settings(**changes):
    return CONFIG.generation.model_copy(update={"batch_size": 2, "cache_implementation": "dynamic"} | changes)


# --- what auto decides ---------------------------------------------------------------------------------------------


@pytest.mark.model
@on_the_cpu
@pytest.mark.parametrize(
    ("questions", "batch_size"),
    [(1, 1), (5, 5), (8, 8), (9, 5), (16, 8), (17, 6), (24, 8), (100, 8)],  # as few batches as 8 allow, and even ones
)
def test_on_a_cpu_auto_is_a_growing_cache_and_at_most_8_at_once(loaded, questions, batch_size):
    model, auto = loaded[0], settings(batch_size="auto", cache_implementation="auto")
    assert choose_cache(model, auto, questions, prompt_tokens=100, new_tokens=12) == "dynamic"
    decided = settings(batch_size="auto", cache_implementation="dynamic")
    assert choose_batch_size(model, decided, questions, prompt_tokens=100, new_tokens=12) == batch_size <= 8


@pytest.mark.model
@on_the_cpu
def test_a_batch_size_and_a_cache_as_set_are_kept(loaded):
    for cache in ("auto", "dynamic", "static"):
        asked = settings(batch_size=3, cache_implementation=cache)
        assert choose_cache(loaded[0], asked, 100, 100, 12) == ("static" if cache == "static" else "dynamic")
        assert choose_batch_size(loaded[0], asked, 100, 100, 12) == 3
        assert choose_batch_size(loaded[0], asked, 2, 100, 12) == 2
    assert MAX_BATCH > 8


@pytest.mark.model
@pytest.mark.parametrize(
    ("free_gib", "new_tokens", "cache", "batch_size"),
    # The tiny Llama's cache takes 256 bytes a token (2 layers, 2 heads of 16).
    [(8, 1200, "static", 100), (8, 149, "dynamic", 100), (0.02, 1200, "static", 50), (0.02, 149, "dynamic", 100)],
)
def test_a_simulated_gpu_gets_what_its_memory_holds(loaded, monkeypatch, free_gib, new_tokens, cache, batch_size):
    model = loaded[0]
    monkeypatch.setattr(batches, "available_gpu_memory", lambda: free_gib * 2**30)
    asked = settings(batch_size="auto", cache_implementation="auto")
    assert choose_cache(model, asked, 100, prompt_tokens=100, new_tokens=new_tokens) == cache
    decided = asked.model_copy(update={"cache_implementation": cache})
    assert choose_batch_size(model, decided, 100, prompt_tokens=100, new_tokens=new_tokens) == batch_size


def test_how_questions_are_answered_is_said_in_one_line():
    dynamic, static = (settings(batch_size=4, cache_implementation=cache) for cache in ("dynamic", "static"))
    assert describe_batches(dynamic, 9) == "9 answers, 4 at once"
    assert describe_batches(dynamic, 4) == "4 answers, all at once"
    assert describe_batches(static, 9) == "9 answers, 4 at once; the next one begins when one ends"
    assert describe_batches(dynamic, 4, gpus=2) == "4 answers, 4 at once on each of 2 GPUs"
    assert describe_batches(dynamic, 9, gpus=2) == "9 answers, 4 at once on each of 2 GPUs"


@pytest.mark.model
def test_a_static_cache_beside_a_simulated_unsloth_is_refused(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    with pytest.raises(GenerationError, match=r"Unsloth's patches allow no static cache\. Set model\.engine=transformers"):
        answer_questions(*loaded, QUESTIONS, settings(cache_implementation="static"), True, 1)
    assert loaded[0].config._attn_implementation == "sdpa", "refused before anything was changed"
    assert choose_cache(loaded[0], settings(cache_implementation="auto"), 1000, 100, 12) == "dynamic"


@on_the_cpu
def test_a_batch_is_sized_for_a_family_without_grouped_heads():
    model = types.SimpleNamespace(config=AutoConfig.for_model("gpt2"))
    assert slot_bytes(model, 10) == 4 * 12 * 12 * 64 * 10
    assert choose_batch_size(model, settings(batch_size="auto"), 3, 10, 12) == 3


# --- the context ---------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_forced_closing_lengthens_what_an_answer_may_get(loaded):
    _, tokenizer = loaded
    closing = len(tokenizer("\n</think>\n", add_special_tokens=False)["input_ids"])
    assert 3 <= closing <= 5
    assert count_new_tokens(tokenizer, 12, None) == count_new_tokens(tokenizer, 12, 0) == 12
    assert count_new_tokens(tokenizer, 12, 30) == 42 + closing


@pytest.mark.model
def test_cache_and_batches_are_sized_for_all_answers_and_tokens(loaded, monkeypatch):
    model, tokenizer = loaded
    sizes = {}
    for name, chosen in {"choose_cache": "dynamic", "choose_batch_size": 15}.items():
        told = lambda model, settings, *size, name=name, chosen=chosen: sizes.update({name: size}) or chosen  # noqa: E731
        monkeypatch.setattr(generation, name, told)
    answer_questions(model, tokenizer, QUESTIONS, settings(), True, 1, n_samples=2, answer_tokens=3)
    longest = max(len(tokenizer(inference_prompt(question["Question"]))["input_ids"]) for question in QUESTIONS)
    expected = (3 * len(QUESTIONS), longest, count_new_tokens(tokenizer, 12, 3))
    assert sizes == {"choose_cache": expected, "choose_batch_size": expected}


@pytest.mark.model
def test_answers_that_do_not_fit_the_context_are_one_line(loaded):
    model, tokenizer = loaded
    closing = count_new_tokens(tokenizer, 0, 100) - 100
    prompt = "Why? " * 300
    length = len(tokenizer(prompt)["input_ids"])
    room = 2048 - length - closing - 100

    def check(*arguments, tokenizer=tokenizer):
        return check_context(model.config, tokenizer, ["Why?", prompt, "Why?"], *arguments)

    assert check(room, 100) == "answers take up to 2048 of the model's 2048 tokens"
    with pytest.raises(GenerationError) as refused:
        check(room + 1, 100)
    assert str(refused.value) == (
        f"answers do not fit the model's context of 2048 tokens: the longest prompt has {length}, "
        f"generation.max_new_tokens {room + 1}, {closing} to close the thinking, evaluation.answer_tokens 100: 2049 in all. "
        f"Lower evaluation.answer_tokens or generation.max_new_tokens"
    )
    most = 2048 - length
    with pytest.raises(GenerationError, match=rf"tokens {most + 1}: 2049 in all. Lower evaluation.mcq_max_new_tokens$"):
        check(most + 1, 0, "evaluation.mcq_max_new_tokens")
    # Without a tokenizer: 300 words.
    assert check(1648, 100, tokenizer=None) == "answers take up to 2048 of the model's 2048 tokens"
    with pytest.raises(GenerationError, match=r"the longest prompt has 300, .* 0 to close the thinking"):
        check(1649, 100, tokenizer=None)


def test_a_family_that_counts_no_positions_has_no_limit():
    mamba = AutoConfig.for_model("mamba")
    assert check_context(mamba, None, ["Why?"] * 2, 10**6, 100) == "answers take up to 1000101 of any number of tokens"


@pytest.mark.model
def test_answers_that_do_not_fit_are_refused_before_the_first(loaded, monkeypatch):
    monkeypatch.setattr(loaded[0], "generate", lambda **arguments: pytest.fail("asked"))
    with pytest.raises(
        GenerationError, match=r"answers do not fit the model's context of 2048 tokens: .* evaluation.answer_tokens 2000: "
    ):
        answer_questions(*loaded, QUESTIONS, settings(), True, 1, answer_tokens=2000)
