"""Answers in the slots of one cache: rows that come and go, memory that runs out, and what is left of it on the model."""

from __future__ import annotations

import random

import pytest
import torch

from medcot_utils.config import load_config
from medcot_utils.models import slot_writer
from medcot_utils.models.batches import count_read_at_once, split
from medcot_utils.models.engine import get_engine
from medcot_utils.models.generation import Asked, answer_prompts
from medcot_utils.models.slots import Slots, fits_slots
from medcot_utils.run.journal import Journal

pytestmark = pytest.mark.model

BUDGET = 40
CONFIG = load_config("smoke", ["model.load_in_4bit=false", f"generation.max_new_tokens={BUDGET}"])
WORDS = ["fever", "neck", "a", "the", "doctor", "stiff", "asks", "which", "valve", "murmur", "first", "why", "dose", "child"]


@pytest.fixture(scope="module")
def loaded():
    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    return engine.for_inference(model), tokenizer


def make_asked(count, template="Think before you answer the question below. "):
    lengths = random.Random(4)
    prompts = [template + " ".join(lengths.choices(WORDS, k=lengths.randint(1, 30))) for _ in range(count)]
    return [Asked(str(place), prompt, seed=place if place % 3 == 0 else None) for place, prompt in enumerate(prompts)]


def answers(loaded, asked, batch_size=8, cache="static", answer_tokens=None, **given):
    settings = CONFIG.generation.model_copy(update={"batch_size": batch_size, "cache_implementation": cache})
    return answer_prompts(*loaded, asked, settings, answer_tokens, **given)


def untimed(records):
    return [{field: value for field, value in record.items() if field != "seconds"} for record in records]


# --- the records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["Think before you answer the question below. ", ""], ids=["one beginning", "none"])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 23])
def test_slots_write_what_a_growing_cache_writes(loaded, template, batch_size):
    asked = make_asked(23, template)
    expected = untimed(answers(loaded, asked, cache="dynamic", answer_tokens=9))
    assert len({record["completion"] for record in expected}) > 15
    assert untimed(answers(loaded, asked, batch_size, answer_tokens=9)) == expected


def test_slots_read_the_letters_that_a_growing_cache_reads(loaded):
    asked = [Asked(one.id, one.prompt, letters="ABCDE"[: 3 + place % 3]) for place, one in enumerate(make_asked(9))]
    expected = untimed(answers(loaded, asked, cache="dynamic", answer_tokens=0))
    assert len({record["letter"] for record in expected}) > 1
    assert untimed(answers(loaded, asked, 4, answer_tokens=0)) == expected


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3", "olmo2"])
def test_slots_write_what_other_families_write(loaded, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=len(loaded[1]), num_key_value_heads=2, **sizes)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    assert fits_slots(model)
    asked = make_asked(9)
    expected = untimed(answers((model, loaded[1]), asked, cache="dynamic"))
    assert len({record["completion"] for record in expected}) > 5
    assert untimed(answers((model, loaded[1]), asked, 4)) == expected


def test_a_prompt_of_one_token_is_answered(loaded):
    asked = [Asked("one", ""), Asked("another", "a")]
    assert len(loaded[1]("")["input_ids"]) == 1
    assert untimed(answers(loaded, asked)) == untimed(answers(loaded, asked, cache="dynamic"))
    assert untimed(answers(loaded, asked[:1])) == untimed(answers(loaded, asked[:1], cache="dynamic"))


def test_answers_kept_from_before_change_no_other(loaded, tmp_path):
    asked = make_asked(23)
    whole = answers(loaded, asked)
    journal = Journal(tmp_path / "answers.jsonl.part", "this")
    journal.add([record for place, record in enumerate(whole) if place % 5 in (1, 2)])
    assert untimed(answers(loaded, asked, journal=journal)) == untimed(whole)


def test_an_interrupted_call_goes_on_with_what_is_missing(loaded, tmp_path, monkeypatch):
    asked = make_asked(23)
    whole, journal, turns = answers(loaded, asked), Journal(tmp_path / "answers.jsonl.part", "this"), []
    begin = slot_writer._Board.begin_turn

    def begin_or_stop(board):
        turns.append(board)
        if len(turns) == 8:
            raise KeyboardInterrupt
        begin(board)

    with monkeypatch.context() as patched:
        patched.setattr(slot_writer._Board, "begin_turn", begin_or_stop)
        with pytest.raises(KeyboardInterrupt):
            answers(loaded, asked, journal=journal)
    kept = journal.read()
    assert 0 < len(kept) < 23 and all(record in untimed(whole) for record in untimed(kept))
    records = answers(loaded, asked, journal=journal)
    assert untimed(records) == untimed(whole) and all(record in records for record in kept)


def test_seconds_of_all_answers_add_up_to_the_time_taken(loaded):
    import time

    began = time.perf_counter()
    records = answers(loaded, make_asked(12))
    assert 0.5 < sum(record["seconds"] for record in records) / (time.perf_counter() - began) <= 1


# --- rows that come and go -------------------------------------------------------------------------------------------


def count_steps(monkeypatch, loaded, asked, lengths, batch_size, cache="static"):
    """The steps of answers that end after these tokens; in batches, each step of which every row of the batch is in."""
    if cache == "dynamic":
        ordered = sorted(asked, key=lambda one: len(one.prompt), reverse=True)
        return sum(max(lengths[one.id] for one in batch) for batch in split(ordered, batch_size))
    steps, writers = [], []
    make, step = slot_writer.SlotWriter.__init__, Slots.step

    def watched(writer, *given):
        make(writer, *given)
        writers.append(writer)

    def scripted(slots):
        steps.append(len(writers[-1]._active))
        logits = step(slots)
        for slot, row in writers[-1]._active.items():
            made = int(slots.places[slot]) - row.prompt_tokens + 2
            logits[slot, loaded[1].eos_token_id] = 1e9 if made == lengths[row.asked.id] else -1e9
        return logits

    monkeypatch.setattr(slot_writer.SlotWriter, "__init__", watched)
    monkeypatch.setattr(Slots, "step", scripted)
    records = answers(loaded, asked, batch_size)
    assert [record["completion_tokens"] for record in records] == [lengths[one.id] for one in asked]
    return len(steps)


def test_a_row_that_is_done_makes_room_at_once(loaded, monkeypatch):
    asked = [Asked(one.id, one.prompt) for one in make_asked(100)]
    drawn = random.Random(7)
    lengths = {one.id: min(BUDGET, max(2, int(drawn.expovariate(1 / 12)))) for one in asked}
    in_batches = count_steps(monkeypatch, loaded, asked, lengths, 16, "dynamic")
    in_slots = count_steps(monkeypatch, loaded, asked, lengths, 16)
    fewest = sum(lengths.values()) / 16
    assert fewest < in_slots < 0.8 * in_batches


# --- memory that runs out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["taking the memory", "writing"])
def test_simulated_out_of_memory_halves_the_slots(loaded, monkeypatch, capsys, moment):
    asked = make_asked(23)
    expected = untimed(answers(loaded, asked, 8))
    make, step, sizes = Slots.__init__, Slots.step, []

    def make_or_raise(slots, model, rows, *given):
        sizes.append(rows)
        make(slots, model, rows, *given)
        if moment == "taking the memory" and rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def step_or_raise(slots):
        if slots.rows > 3 and int(slots.places.max()) > 60:  # in the midst of a turn, with some answers done
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(slots)

    monkeypatch.setattr(Slots, "__init__", make_or_raise)
    if moment == "writing":
        monkeypatch.setattr(Slots, "step", step_or_raise)
    assert untimed(answers(loaded, asked, 8)) == expected
    assert sizes == [8, 4, 2]
    assert "out of memory: 2 answers at once from here on" in capsys.readouterr().out


def test_simulated_out_of_memory_with_one_slot_is_raised(loaded, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Slots, "step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        answers(loaded, make_asked(5), 2)


# --- the model -------------------------------------------------------------------------------------------------------


def test_afterwards_the_model_is_as_it_was(loaded, monkeypatch):
    model = loaded[0]
    layers = model.get_decoder().layers
    ids = torch.arange(20)[None]
    before = model(ids).logits, [layer.self_attn.layer_idx for layer in layers], model.config._attn_implementation
    answers(loaded, make_asked(3))
    monkeypatch.setattr(Slots, "step", lambda slots: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(loaded, make_asked(3))
    assert torch.equal(model(ids).logits, before[0])
    assert [layer.self_attn.layer_idx for layer in layers] == before[1] and model.config._attn_implementation == before[2]
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"model_type": "qwen2"}, True),
        ({"model_type": "mistral", "sliding_window": 8}, False),
        ({"model_type": "gemma2"}, False),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, False),
        ({"attn_implementation": "eager"}, False),
        ({"model_type": "gpt2"}, False),
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else " ".join(map(str, value.values())) or "llama",
)
def test_models_that_fit_slots(change, fits):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    change = {"model_type": "llama", "attn_implementation": "sdpa"} | change
    config = AutoConfig.for_model(change.pop("model_type"), **sizes, **{k: v for k, v in change.items() if "attn" not in k})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=change["attn_implementation"])
    assert fits_slots(model) is fits


def test_prompts_are_read_when_a_quarter_of_the_slots_is_free():
    assert [count_read_at_once(rows) for rows in (1, 3, 8, 32, 64, 192)] == [1, 1, 2, 8, 16, 16]
