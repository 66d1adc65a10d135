"""Answers: batches against single ones, the order of records, what a record says, sampling, streaming."""

from __future__ import annotations

import pytest

from medcot_utils.config import load_config
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.models.engine import get_engine
from medcot_utils.models.generation import _pad_left, answer_questions, by_sample, generate_arguments, make_record, stream_answer

pytestmark = pytest.mark.model

CONFIG = load_config("smoke", ["model.load_in_4bit=false", "generation.max_new_tokens=12"])
QUESTIONS = [
    {"id": "short", "Question": "Why fever?"},
    {"id": "long", "Question": "Which valve is most often affected in acute rheumatic fever, and which murmur is heard? " * 4},
    {"id": "middle", "Question": "What does a wide splitting of the second heart sound suggest in a child?"},
    {"id": "tiny", "Question": "Dose?"},
    {"id": "last", "Question": "A patient with a stiff neck: what comes first, the lumbar puncture or the antibiotic?"},
]


@pytest.fixture(scope="module")
def loaded():
    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    return engine.for_inference(model), tokenizer


def settings(**changes):
    return CONFIG.generation.model_copy(update=changes)


def answers(loaded, seed=1, questions=QUESTIONS, **changes):
    return answer_questions(*loaded, questions, settings(**changes), True, seed)


def greedy_ids(loaded, question):
    """The new tokens of one question asked alone, without this package's generation."""
    model, tokenizer = loaded
    inputs = tokenizer(inference_prompt(question["Question"]), return_tensors="pt")
    sequence = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return sequence[0, inputs["input_ids"].shape[1] :].tolist()


def test_batched_answers_equal_those_given_one_at_a_time(loaded):
    alone = [loaded[1].decode(greedy_ids(loaded, question), skip_special_tokens=True) for question in QUESTIONS]
    assert len(set(alone)) == len(alone), "equal answers could not tell rows apart"
    for batch_size in (2, 5):
        assert [record["completion"] for record in answers(loaded, batch_size=batch_size)] == alone


def test_records_come_in_the_order_of_the_questions(loaded):
    records = answers(loaded, batch_size=2)
    assert [record["id"] for record in records] == [question["id"] for question in QUESTIONS]
    assert all(question["Question"] in record["prompt"] for question, record in zip(QUESTIONS, records, strict=True))


def test_an_answer_cut_at_the_limit_is_not_finished(loaded):
    records = answers(loaded)
    assert [(record["finished"], record["completion_tokens"]) for record in records] == [(False, 12)] * len(QUESTIONS)


def test_an_early_answer_is_finished_without_its_padding(loaded):
    _, tokenizer = loaded
    made = {question["id"]: greedy_ids(loaded, question) for question in QUESTIONS}
    # A token in the middle of some answers and in none of the others stands for the EOS, which random weights never give.
    token = next(t for t in made["short"][1:] if t != made["short"][0] and any(t not in ids for ids in made.values()))
    real_eos, tokenizer.eos_token_id = tokenizer.eos_token_id, token
    try:
        records = answers(loaded, batch_size=5)
    finally:
        tokenizer.eos_token_id = real_eos
    expected = [(token in ids, ids.index(token) + 1 if token in ids else 12) for ids in made.values()]
    assert [(record["finished"], record["completion_tokens"]) for record in records] == expected
    assert 1 < expected[0][1] < 12


# --- records from hand-made ids ------------------------------------------------------------------------------------


@pytest.fixture
def ids(loaded):
    _, tokenizer = loaded
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_finished_record_counts_the_eos_and_not_the_padding(loaded, ids):
    _, tokenizer = loaded
    thinking, answer = ids("It hurts on breathing.\n"), ids("\nPleurisy.")
    body = [*thinking, *ids("</think>"), *answer]
    padded = [*body, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * 4]
    record = make_record(tokenizer, "prompt", padded, 1.23456)
    assert record["finished"] and record["well_formed"] and record["closed"] == 1
    assert record["completion_tokens"] == len(body) + 1
    assert (record["thinking"], record["answer"]) == ("It hurts on breathing.", "Pleurisy.")
    assert record["thinking_tokens"] == len(ids("It hurts on breathing.")) > 1
    assert record["answer_tokens"] == len(ids("Pleurisy.")) > 1
    assert record["seconds"] == 1.235


def test_a_cut_record_is_not_finished_and_counts_every_token(loaded, ids):
    _, tokenizer = loaded
    body = ids("It hurts, so I think of")
    record = make_record(tokenizer, "prompt", body, 0)
    assert not record["finished"] and not record["well_formed"]
    assert record["completion_tokens"] == len(body)
    assert (record["thinking"], record["answer"], record["answer_tokens"]) == ("It hurts, so I think of", "", 0)


def test_text_after_the_eos_is_no_part_of_the_answer(loaded, ids):
    _, tokenizer = loaded
    record = make_record(tokenizer, "prompt", [*ids("so</think>yes"), tokenizer.eos_token_id, *ids("and more")], 0)
    assert record["answer"] == "yes" and record["completion"] == "so</think>yes"


def test_an_eos_at_once_is_an_empty_finished_answer_of_one_token(loaded):
    _, tokenizer = loaded
    record = make_record(tokenizer, "prompt", [tokenizer.eos_token_id, tokenizer.pad_token_id], 0)
    assert (record["completion"], record["completion_tokens"], record["finished"]) == ("", 1, True)
    assert (record["thinking_tokens"], record["answer_tokens"], record["well_formed"]) == (0, 0, False)


# --- sampling and streaming ----------------------------------------------------------------------------------------


def test_sampling_depends_on_the_seed_alone(loaded):
    def completions(seed):
        records = answer_questions(*loaded, QUESTIONS, settings(), True, seed, n_samples=2)
        assert [record["id"] for record in records] == [question["id"] for question in QUESTIONS] * 3
        return [[record["completion"] for record in sample] for sample in by_sample(records)]

    first, again, other = completions(11), completions(11), completions(20)
    assert first == again
    assert first[0] == other[0] == [record["completion"] for record in answers(loaded)], "sample 0 is the greedy answer"
    assert first[1] != other[1] and first[1] != first[2] and first[1] != first[0]


def test_greedy_answers_do_not_depend_on_the_seed(loaded):
    assert [r["completion"] for r in answers(loaded, seed=1)] == [r["completion"] for r in answers(loaded, seed=2)]


def test_sampling_settings_reach_generate_only_if_sampling_is_on(loaded):
    _, tokenizer = loaded
    assert generate_arguments(settings(do_sample=False), tokenizer)["temperature"] is None
    sampled = generate_arguments(settings(do_sample=True, temperature=0.7, top_p=0.9), tokenizer)
    assert (sampled["temperature"], sampled["top_p"]) == (0.7, 0.9)


def test_a_streamed_answer_is_printed_and_is_the_batched_one(loaded, capsys):
    record = stream_answer(*loaded, QUESTIONS[2]["Question"], settings(), True, 1)
    printed = capsys.readouterr().out
    assert record["completion"].strip() and record["completion"].strip() in printed
    assert "### Question" not in printed, "the prompt is not to be repeated"
    batched = answers(loaded, questions=QUESTIONS[2:3])[0]
    assert {key: value for key, value in batched.items() if key not in ("id", "sample", "seconds")} == {
        key: value for key, value in record.items() if key != "seconds"
    }


def test_the_padding_side_is_restored_even_after_an_error(loaded):
    _, tokenizer = loaded
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = _pad_left(tokenizer, ["a", "a much longer text than the other one"])
        assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][0, -1] == 1, "padded on the left"
        assert tokenizer.padding_side == side
    tokenizer.padding_side = "right"
    with pytest.raises((TypeError, ValueError)):
        _pad_left(tokenizer, [None])
    assert tokenizer.padding_side == "right"
