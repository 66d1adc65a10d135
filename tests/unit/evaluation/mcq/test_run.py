"""Multiple choice: what is read and what is not, and lm-eval over real models."""

from __future__ import annotations

import logging
import sys

import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.mcq.run import (
    TASKS,
    McqError,
    judge_row,
    load_questions,
    prompt,
    read_answer,
    run_mcq,
)

pytest_plugins = ("mcq_fixtures",)

CONFIG = load_config("smoke", ["model.load_in_4bit=false"])
SETTINGS = CONFIG.evaluation  # 95 %, 500 resamples
OPTIONS = {"A": "Chloride", "B": "Vitamin A", "C": "C. difficile", "D": "HLA_B27"}
LETTERS = {"A": "Sodium", "B": "Potassium", "C": "Calcium"}


# --- the reader ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after_thinking", "expected"),
    [
        # the asked form
        ("Answer: B", "B"),
        ("It carries sodium inwards.\n\nAnswer: C", "C"),
        ("answer: b", "B"),
        ("ANSWER : D", "D"),
        ("Answer:A", "A"),
        ("  Answer: A  ", "A"),
        ("Answer: B.", "B"),
        ("Answer: (B)", "B"),
        # emphasis is how a line looks, not what it says
        ("**Answer: B**", "B"),
        ("**Answer:** B", "B"),
        ("### Answer: `B`", "B"),
        # followed by that option's own text
        ("Answer: A. Chloride", "A"),
        ("Answer: B) vitamin a.", "B"),
        ("Answer: C. C. difficile", "C"),
        ("Answer: **D** (HLA_B27)", "D"),
        # a full-width colon, bracket, letter or stop is the same mark
        ("Answer：B。", "B"),
        ("Answer：（Ｂ）", "B"),
        ("Answer: A、Chloride", "A"),
        ("Answer：B，C", None),
        # the last line of the form decides, whatever comes after it
        ("Answer: B\nThat is because of the receptor.", "B"),
        ("Answer: B\nOn reflection:\nAnswer: C", "C"),
        ("Answer: B\nAnswer: none of them", None),
        ("Answer: B\nAnswer: B or C", None),
        # more than one letter, or something else than this option's text
        ("Answer: B or C", None),
        ("Answer: A, B", None),
        ("Answer: B (not C)", None),
        ("Answer: A. Vitamin A", None),
        ("Answer: C. difficile", None),
        ("Answer: C difficile colitis", None),
        ("Answer: B-cell lymphoma", None),
        ("Answer: D-dimer", None),
        ("Answer: A patient like this needs rest", None),
        ("Answer: Chloride", None),
        # not the asked form
        ("The answer is B", None),
        ("Final answer: B", None),
        ("B", None),
        ("\\boxed{B}", None),
        ("My Answer: B", None),
        ("Answer B", None),
        # no option, no answer
        ("Answer: E", None),
        ("Answer: X", None),
        ("Answer:", None),
        ("Answer: \nB", None),
        ("", None),
    ],
)
def test_an_answer_is_read_only_in_the_requested_form(after_thinking, expected):
    assert read_answer(f"Sodium rushes in.\n</think>\n{after_thinking}", OPTIONS) == expected


@pytest.mark.parametrize(
    "completion",
    [
        "Answer: B",
        "I think.\nAnswer: B\n",
        "I think.\nAnswer: B\n</think>\n",
        "I think.\nAnswer: B\n</think>\nIt is sodium.",
        "I think.</think>Answer: B</think>",
        "I think.</think>So</think>\nAnswer: B",
        "I think.</think>\n<think>More.\nAnswer: B",
        "",
    ],
)
def test_unfinished_or_twice_closed_thinking_has_no_answer(completion):
    assert read_answer(completion, OPTIONS) is None


def test_what_was_thought_does_not_count_against_the_answer():
    assert read_answer("Answer: A. No, wait.\nAnswer: C</think>Answer: D", OPTIONS) == "D"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("so</think>Answer: B", {"correct": 1, "abstained": 0}),
        ("so</think>Answer: A", {"correct": 0, "abstained": 0}),
        ("so</think>Perhaps B", {"correct": 0, "abstained": 1}),
    ],
)
def test_what_cannot_be_read_is_abstained_and_not_wrong(completion, expected):
    assert judge_row({"options": ["x", "y"], "answer": "B"}, [completion]) == expected


# --- lm-eval over a model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    from medcot_utils.models.engine import get_engine

    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    return engine.for_inference(model), tokenizer


@pytest.fixture
def spy(monkeypatch):
    """The arguments of every call of a model's generate, and the token ids it made."""

    def watch(model):
        calls, generate = [], model.generate

        def watched(**arguments):
            sequences = generate(**arguments)
            calls.append(arguments | {"sequences": sequences})
            return sequences

        monkeypatch.setattr(model, "generate", watched, raising=False)
        return calls

    return watch


def prompts_of(call, tokenizer):
    """The prompts' token ids without padding, checked to be padded on the left."""
    for ids, mask in zip(call["input_ids"], call["attention_mask"], strict=True):
        real = mask.bool()
        assert bool(real[-1]) and not bool((real[:-1] & ~real[1:]).any()), "padding inside or on the right"
        yield ids[real].tolist()


@pytest.mark.model
@pytest.mark.parametrize("newline", [True, False])
def test_lm_eval_asks_the_tiny_model_exactly_what_was_meant(tiny, spy, newline, capsys):
    model, tokenizer = tiny
    calls, side, tune = spy(model), tokenizer.padding_side, dict(max_new_tokens=9, batch_size=2)
    records = run_mcq(model, tokenizer, "shipped", limit=5, newline_after_think=newline, seed=2, label="base", **tune)
    questions = load_questions("shipped", 5, seed=2)
    assert [record["id"] for record in records] == [question["id"] for question in questions]
    asked = [ids for call in calls for ids in prompts_of(call, tokenizer)]
    assert [len(call["input_ids"]) for call in calls] == [2, 2, 1]
    assert sorted(asked) == sorted(tokenizer(prompt(question, newline))["input_ids"] for question in questions)
    assert all(ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id for ids in asked)
    for call in calls:
        assert call["do_sample"] is False and call["eos_token_id"] == tokenizer.eos_token_id
        assert [criterion.sequence for criterion in call["stopping_criteria"]] == [tokenizer.eos_token], "only EOS may stop it"
        assert call["max_length"] == call["input_ids"].shape[1] + 9
    keys = {"model", "task", "id", "question", "options", "answer", "specialty", "completion", "read", "correct", "abstained"}
    for record, question in zip(records, questions, strict=True):
        assert set(record) == keys and question.items() <= record.items()
        assert (record["model"], record["task"]) == ("base", "shipped")
        assert (record["read"], record["correct"], record["abstained"]) == (None, False, True), "random weights answer nothing"
    assert tokenizer.padding_side == side
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") <= 1 and "multiple choice, base: 100%" in shown.err and "5/5" in shown.err


@pytest.mark.model
@pytest.mark.parametrize("own", [{}, {"do_sample": True, "repetition_penalty": 5.0, "min_new_tokens": 30, "num_beams": 2}])
def test_completions_equal_the_projects_own_generation(tiny, own):
    from medcot_utils.models.generation import answer_questions

    model, tokenizer = tiny
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():  # what a checkpoint may bring, and what nobody asked for
            patch.setattr(model.generation_config, name, value)
        records = run_mcq(model, tokenizer, "shipped", limit=6, max_new_tokens=16, batch_size=4, seed=5)
    blocks = [prompt(question, False).partition("### Question:\n")[2] for question in load_questions("shipped", 6, seed=5)]
    asked = [{"id": str(i), "Question": block.partition("\n\n### Response:")[0]} for i, block in enumerate(blocks)]
    settings = CONFIG.generation.model_copy(update={"max_new_tokens": 16, "batch_size": 3})
    answers = answer_questions(model, tokenizer, asked, settings, True, 1)
    assert [record["completion"] for record in records] == [answer["completion"] for answer in answers]
    assert len({record["completion"] for record in records}) > 1


@pytest.mark.model
def test_the_callers_rng_streams_and_log_levels_stay_untouched(tiny):
    import numpy as np
    import torch

    def state():
        return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), logging.root.manager.disable

    # Values that no library would set by itself.
    np.random.seed(81)
    torch.manual_seed(82)
    logging.disable(logging.DEBUG)
    before = state(), sys.stdout, sys.stderr
    run_mcq(*tiny, "shipped", limit=1, max_new_tokens=2)
    assert (state(), sys.stdout, sys.stderr) == before
    with pytest.raises(McqError):
        run_mcq(*tiny, "shipped", limit=1, max_new_tokens=5000)
    after = state(), sys.stdout, sys.stderr
    logging.disable(logging.NOTSET)
    assert after == before


@pytest.mark.model
def test_a_scripted_model_gets_the_score_its_outputs_deserve(tiny, monkeypatch, write):
    # Real lm-eval, real tokenizer, made-up token ids in place of the model's: only so is a right answer known beforehand.
    import torch

    model, tokenizer = tiny
    replies = {
        "first": "So.\n\nLet me see.\n\n</think>\n\nIt is sodium.\n\nIn short:\n\nAnswer: A",
        "second": "So.</think>Answer: C",
        "third": "So.</think>The answer is A",
        "fourth": "So.\nAnswer: A",
    }
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def scripted(input_ids, **arguments):
        made = []
        for ids in input_ids:
            text = tokenizer.decode(ids)
            reply = next(reply for name, reply in replies.items() if f"The {name} ion?" in text)
            made.append([*tokenizer(reply, add_special_tokens=False)["input_ids"], eos])
        longest = max(map(len, made))
        return torch.cat([input_ids, torch.tensor([ids + [pad] * (longest - len(ids)) for ids in made])], dim=1)

    monkeypatch.setattr(model, "generate", scripted, raising=False)
    path = write(*({"id": name, "question": f"The {name} ion?", "options": LETTERS, "answer": "A"} for name in replies))
    records = run_mcq(model, tokenizer, path, batch_size=3, max_new_tokens=64, label="tuned")
    assert [record["completion"] for record in records] == list(replies.values()), "cut at a newline, or not at EOS"
    assert [record["read"] for record in records] == ["A", "C", None, None]
    assert [record["correct"] for record in records] == [True, False, False, False]
    assert [record["abstained"] for record in records] == [False, False, True, True]
    assert {record["task"] for record in records} == {"own.jsonl"}


@pytest.mark.model
def test_a_question_that_would_lose_its_beginning_is_refused(tiny):
    with pytest.raises(McqError, match=r"takes \d+ tokens: with max_new_tokens \(1900\) more than the model's 2048"):
        run_mcq(*tiny, "shipped", limit=2, max_new_tokens=1900)


@pytest.mark.model
def test_lm_eval_itself_can_run_the_task_files(tiny, write):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    path = write(*({"question": f"Which ion {i}?", "options": list(LETTERS.values()), "answer": 0} for i in range(3)))
    for name, metadata in (("medcot_shipped", {"limit": 2, "seed": 3}), ("medcot_file", {"limit": 2, "path": path})):
        manager = TaskManager(include_path=TASKS, include_defaults=False, metadata=metadata)
        harness = HFLM(pretrained=tiny[0], tokenizer=tiny[1])
        found = simple_evaluate(harness, tasks=[name], task_manager=manager, gen_kwargs={"max_gen_toks": 3})
        assert found["results"][name]["sample_len"] == 2 and found["results"][name]["abstained,none"] == 1.0
        assert "correct_stderr,none" in found["results"][name]
        assert found["higher_is_better"][name] == {"correct": True, "abstained": False}


@pytest.mark.embedded
def test_smollm2_is_prompted_with_one_bos_and_consistent_records(spy, capsys):
    from medcot_utils.models.engine import get_engine

    config = load_config("demo", ["model.load_in_4bit=false"])
    assert config.model.name == "embedded:smollm2-135m-instruct"
    engine = get_engine(config.model)
    model, tokenizer = engine.load(config.model)
    calls = spy(engine.for_inference(model))
    records = run_mcq(model, tokenizer, "shipped", limit=4, max_new_tokens=48, batch_size=4, label="base")
    assert len(records) == len({record["id"] for record in records}) == len({record["specialty"] for record in records}) == 4
    (call,) = calls
    for ids in prompts_of(call, tokenizer):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids).endswith("### Response:\n<think>\n")
    made = call["sequences"][:, call["input_ids"].shape[1] :]
    assert made.shape[1] <= 48 and any("\n" in record["completion"] for record in records), "a newline must end nothing"
    for record in records:
        assert record["completion"].strip() and record["abstained"] == (record["read"] is None)
        assert record["correct"] == (record["read"] == record["answer"])
        assert record["read"] == read_answer(record["completion"], record["options"])
    assert len(records) == 4


def test_the_module_imports_without_lm_eval_torch_or_pandas():
    import subprocess

    heavy = ("lm_eval", "torch", "pandas", "datasets")
    code = f"import sys, medcot_utils.evaluation.mcq.run; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
