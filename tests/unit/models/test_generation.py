"""Answers: batches against single ones, the order of records, sampling, what is kept of an interrupted call, streaming."""

from __future__ import annotations

import pytest

from medcot_utils.config import load_config
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.models.engine import get_engine
from medcot_utils.models.generation import answer_questions, generate_arguments, make_streamer, own_generation_settings, pad_left
from medcot_utils.models.records import by_sample, make_record
from medcot_utils.run.clock import SessionClock, TimeBudgetReached
from medcot_utils.run.journal import Journal

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


# --- sampling ------------------------------------------------------------------------------------------------------


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


# What a checkpoint's generation_config.json may hold, each with a value that would change these answers or how they come.
OWN = {
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "num_beams": 3,
    "num_beam_groups": 3,
    "num_return_sequences": 2,
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.99,
    "top_h": 0.01,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "max_new_tokens": 2,
    "max_length": 3,
    "min_length": 10_000,
    "min_new_tokens": 20,
    "max_time": 1e-9,
    "do_sample": True,
    "use_cache": False,
    "bad_words_ids": [[token] for token in range(5, 250)],
    "suppress_tokens": [*range(5, 250)],
    "begin_suppress_tokens": [*range(5, 250)],
    "sequence_bias": [[[token], 90.0] for token in range(7, 9)],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (1, 99.0),
    "guidance_scale": 5.0,
    "stop_strings": ["a", "e"],
    "eos_token_id": [*range(5, 250)],
    "pad_token_id": 7,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_mtp": True,
    "return_dict_in_generate": True,
    "cache_implementation": "quantized",
    "token_healing": True,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 90.0},
    "constraints": ["x"],
    "force_words_ids": [[7]],
}
# No effect on one answer of a decoder alone, in one beam and without an assistant model.
IDLE = {"bos_token_id", "decoder_start_token_id", "length_penalty", "early_stopping", "diversity_penalty", "low_memory"}
IDLE |= {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"}
IDLE |= {"assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "max_matching_ngram_size"}
# What is returned beside the answer, how it is computed, and checks of the numbers.
IDLE |= {"output_attentions", "output_hidden_states", "output_scores", "output_logits", "remove_invalid_values"}
IDLE |= {"cache_config", "max_cache_len", "compile_config", "disable_compile", "continuous_batching_config"}
IDLE |= {"renormalize_logits", "prefill_chunk_size", "transformers_version"}


@pytest.fixture(scope="module")
def asked_plainly(loaded):
    return [record["completion"] for record in answer_questions(*loaded, QUESTIONS[:2], settings(), True, 3, n_samples=1)]


@pytest.mark.parametrize("name", OWN)
def test_a_checkpoints_own_settings_change_no_answer(loaded, asked_plainly, monkeypatch, name, recwarn):
    for key, value in {"do_sample": True, name: OWN[name]}.items():
        monkeypatch.setattr(loaded[0].generation_config, key, value)
    found = answer_questions(*loaded, QUESTIONS[:2], settings(), True, 3, n_samples=1)
    assert [record["completion"] for record in found] == asked_plainly
    assert not [warning for warning in recwarn if "generation" in str(warning.message)]


def test_every_setting_of_a_checkpoint_is_passed_or_idle(loaded):
    from transformers import GenerationConfig

    passed = set(generate_arguments(settings(), loaded[1]))
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} - passed - IDLE == {"max_length"}


def test_the_checkpoints_own_settings_are_told(loaded, monkeypatch):
    assert own_generation_settings(loaded[0]) == {}
    for name, value in {"repetition_penalty": 1.3, "top_k": 1, "do_sample": True, "eos_token_id": 2, "num_beams": 1}.items():
        monkeypatch.setattr(loaded[0].generation_config, name, value)
    assert own_generation_settings(loaded[0]) == {"repetition_penalty": 1.3, "top_k": 1, "do_sample": True}


# --- what is kept of an interrupted call ---------------------------------------------------------------------------

KEEPING = {"n_samples": 1, "answer_tokens": 5}


@pytest.fixture
def interrupt(loaded, monkeypatch):
    """`interrupt(journal, after)`: (sizes of the batches that were asked, 3 at most, before it failed; records, or None)."""
    generate = loaded[0].generate

    def run(journal, after, **changes):
        sizes = []

        def generate_or_stop(**arguments):
            if len(sizes) == after:
                raise KeyboardInterrupt
            sizes.append(len(arguments["input_ids"]))
            return generate(**arguments)

        monkeypatch.setattr(loaded[0], "generate", generate_or_stop)
        try:
            records = answer_questions(*loaded, QUESTIONS, settings(batch_size=3, **changes), True, 4, **KEEPING, journal=journal)
        except KeyboardInterrupt:
            return sizes, None
        return sizes, records

    return run


def untimed(records):
    return [{field: value for field, value in record.items() if field != "seconds"} for record in records]


def test_an_interrupted_call_goes_on_with_what_is_missing(interrupt, tmp_path, capsys):
    sizes, expected = interrupt(None, 99)
    assert len(expected) == 10 and sizes == [3, 3, 3, 1]
    journal = Journal(tmp_path / "answers.jsonl.part", "this")
    assert interrupt(journal, 2) == ([3, 3], None)
    kept = journal.read()
    assert len(kept) == 6 and all(record in untimed(expected) for record in untimed(kept))
    capsys.readouterr()
    assert interrupt(journal, 1)[0] == [3]
    assert "6 of 10 answers were made before and are kept" in capsys.readouterr().out
    rest, records = interrupt(journal, 99)
    assert len(rest) == 1 and untimed(records) == untimed(expected)
    assert journal.read()[:6] == kept and all(record in records for record in kept), "seconds too are those of the first time"


def test_questions_that_share_an_id_get_an_answer_each(loaded):
    twice = [{**question, "id": "same"} for question in QUESTIONS]
    expected = [record["completion"] for record in answers(loaded)]
    assert [record["completion"] for record in answers(loaded, questions=twice)] == expected


def test_an_answered_journal_asks_nothing(interrupt, tmp_path):
    journal = Journal(tmp_path / "answers.jsonl.part", "this")
    _, records = interrupt(journal, 99)
    assert interrupt(journal, 0) == ([], records)
    other = Journal(journal.path, "other settings")
    sizes, again = interrupt(other, 99)
    assert sizes == [3, 3, 3, 1] and untimed(again) == untimed(records)


def test_spent_sessions_make_a_batch_each_and_reach_the_end(interrupt, tmp_path):
    (_, whole), stopped = interrupt(None, 99), []
    while True:
        journal = Journal(tmp_path / "part", "this", SessionClock(1e-6))
        try:
            _, records = interrupt(journal, 99)
            break
        except TimeBudgetReached as pause:
            stopped.append(str(pause).partition(", before")[0])
    assert stopped == [f"answers: stopped after {made} of 10" for made in (3, 6, 9)]
    assert untimed(records) == untimed(whole)


def test_of_a_batch_kept_in_part_only_the_rest_is_asked(interrupt, tmp_path):
    _, expected = interrupt(None, 99)
    journal = Journal(tmp_path / "answers.jsonl.part", "this")
    journal.add(expected[1:2])  # the longest prompt's: of the first batch
    journal.add(expected[8:9])  # the sampled answer to the shortest: of the last
    sizes, records = interrupt(journal, 99)
    assert sizes == [2, 3, 3] and untimed(records) == untimed(expected)


# --- streaming -----------------------------------------------------------------------------------------------------


def test_a_streamed_answer_is_printed_and_is_the_batched_one(loaded, capsys):
    model, tokenizer = loaded
    prompt = inference_prompt(QUESTIONS[2]["Question"], True)
    inputs = tokenizer([prompt], return_tensors="pt")
    arguments = generate_arguments(settings(), tokenizer)
    tokens = model.generate(**inputs, **arguments, streamer=make_streamer(tokenizer))
    record = make_record(tokenizer, prompt, tokens[0, inputs["input_ids"].shape[1] :].tolist(), 1.0)
    printed = capsys.readouterr().out
    assert record["completion"].strip() and record["completion"].strip() in printed
    assert "### Question" not in printed, "the prompt is not to be repeated"
    batched = answers(loaded, questions=QUESTIONS[2:3])[0]
    assert {key: value for key, value in batched.items() if key not in ("id", "sample", "seconds")} == {
        key: value for key, value in record.items() if key != "seconds"
    }


def test_a_streamed_answer_cannot_command_the_terminal(loaded, capsys):
    _, tokenizer = loaded
    streamer = make_streamer(tokenizer)
    streamer.put(tokenizer("Which valve?", return_tensors="pt")["input_ids"])
    for token in tokenizer("\x1b[2J mitral\n\x9b valve", return_tensors="pt")["input_ids"][0]:
        streamer.put(token[None])
    streamer.end()
    assert r"\x1b[2J mitral" in (said := capsys.readouterr().out) and r"\x9b valve" in said
    assert not {"\x1b", "\x9b"} & set(said)


def test_the_padding_side_is_restored_even_after_an_error(loaded):
    _, tokenizer = loaded
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = pad_left(tokenizer, ["a", "a much longer text than the other one"])
        assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][0, -1] == 1, "padded on the left"
        assert tokenizer.padding_side == side
    tokenizer.padding_side = "right"
    with pytest.raises((TypeError, ValueError)):
        pad_left(tokenizer, [None])
    assert tokenizer.padding_side == "right"
