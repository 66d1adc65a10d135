"""Multiple choice: what is read and what is not, every shape of a file, lm-eval over real models, numbers done by hand."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import yaml

from medcot_utils import mcq
from medcot_utils.config import load_config
from medcot_utils.mcq import (
    ASK,
    TASK_NAMES,
    TASKS,
    McqError,
    choose,
    load_questions,
    prompt,
    read_answer,
    run_mcq,
    score,
    task_rows,
)
from medcot_utils.tasks.utils import read_questions

CONFIG = load_config("smoke", ["model.load_in_4bit=false"])
SETTINGS = CONFIG.evaluation  # 95 %, 500 resamples
OPTIONS = {"A": "Chloride", "B": "Vitamin A", "C": "C. difficile", "D": "HLA_B27"}


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
def test_an_answer_after_the_thinking_is_read_in_the_asked_form_alone(after_thinking, expected):
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
def test_thinking_that_is_unfinished_or_closed_twice_has_no_answer(completion):
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
    assert score({"options": ["x", "y"], "answer": "B"}, [completion]) == expected


# --- the questions -------------------------------------------------------------------------------------------------


def test_every_shipped_question_has_its_answer_among_its_options():
    questions = load_questions("shipped")
    assert len(questions) == 60 and len({question["specialty"] for question in questions}) == 20
    for question in questions:
        assert question["answer"] in question["options"] and list(question["options"]) == list("ABCD")
        assert set(question) == {"id", "question", "options", "answer", "specialty"}
        reply = f"so</think>{question['options'][question['answer']]}\nAnswer: {question['answer']}"
        assert read_answer(reply, question["options"]) == question["answer"]


@pytest.fixture
def write(tmp_path):
    def make(*rows):
        path = tmp_path / "own.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return str(path)

    return make


TEXTS = ["Sodium", "Potassium", "Calcium"]
LETTERS = dict(zip("ABC", TEXTS, strict=True))


@pytest.mark.parametrize(
    "row",
    [
        {"options": LETTERS, "answer_idx": "B"},
        {"options": LETTERS, "answer_idx": "B", "answer": "Potassium"},  # MedQA's own files
        {"options": LETTERS, "answer": "B"},
        {"options": LETTERS, "answer": "Potassium"},
        {"options": dict(reversed(LETTERS.items())), "answer": "b"},
        {"options": {"a": "Sodium", "b": "Potassium", "c": "Calcium"}, "answer_idx": 1},
        {"options": TEXTS, "answer_idx": 1},
        {"options": TEXTS, "answer_idx": "B"},
        {"options": TEXTS, "answer": "Potassium"},
        {"options": TEXTS, "answer": 1, "answer_idx": None},
    ],
)
def test_every_usual_shape_of_a_file_gives_the_same_question(write, row):
    path = write({"question": "Which ion?"} | row)
    expected = {"id": "row-1", "question": "Which ion?", "options": LETTERS, "answer": "B", "specialty": ""}
    assert load_questions(path) == [expected]
    assert [*load_questions(path)[0]["options"]] == ["A", "B", "C"], "the prompt shows them in this order"


def test_id_and_specialty_are_used_where_a_file_has_them_and_options_may_differ_in_number(write):
    rows = [{"id": 7, "question": "q", "options": [1, 0], "answer": 1, "specialty": "toxicology"}]
    rows += [{"id": "x", "question": "r", "options": list("pqrst"), "answer": "E"}]
    first, second = load_questions(write(*rows))
    assert (first["id"], first["specialty"], first["answer"]) == ("7", "toxicology", "B")
    assert first["options"] == {"A": "1", "B": "0"} and second["options"]["E"] == "t"
    dataset = task_rows(questions=[first, second])["test"]
    assert dataset["options"] == [["1", "0"], list("pqrst")], "Arrow gave a row options of another"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": TEXTS, "answer": "A"}, "row 2: no question; expected question, options and answer_idx or answer"),
        ({"question": "q", "answer": "A"}, r"no options; .*\(it has question, answer\)"),
        ({"question": "q", "options": TEXTS}, "no answer; expected"),
        ({"question": "q", "options": [], "answer": 0}, "no options"),
        ({"question": "q", "options": TEXTS, "answer": "D"}, "the answer 'D' is no option; expected A, B, C, an index from 0"),
        ({"question": "q", "options": TEXTS, "answer": 3}, "the answer 3 is no option"),
        ({"question": "q", "options": TEXTS, "answer": -1}, "the answer -1 is no option"),
        ({"question": "q", "options": ["x", " ", "z"], "answer": 0}, "option B is ' '; expected a text for every option"),
        ({"question": "q", "options": {"A": "x", "B": ""}, "answer": "A"}, "option B is empty"),
        ({"question": "q", "options": {"A": "x", "B": None}, "answer": "A"}, "option B is empty"),
        ({"question": "q", "options": [{"key": "A", "value": "x"}], "answer": "A"}, "option A is {'key'"),
        ({"question": "q", "options": "A) x B) y", "answer": "A"}, "expected a list, or an object of letters and texts"),
        ({"question": "q", "options": {"A": "x", "C": "y"}, "answer": "A"}, "options are named A, C; expected letters from A on"),
        ({"id": "row-1", "question": "q", "options": TEXTS, "answer": "A"}, "the id 'row-1' stood there before"),
    ],
)
def test_a_faulty_row_is_named_with_what_was_expected(write, row, message):
    path = write({"question": "good", "options": TEXTS, "answer": 0}, row)
    with pytest.raises(McqError, match=message) as caught:
        load_questions(path)
    assert "own.jsonl, row 2" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_a_broken_line_and_an_empty_file_are_named(tmp_path):
    with pytest.raises(McqError, match=r"none\.jsonl: no such file"):
        load_questions(str(tmp_path / "none.jsonl"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "q", "options": ["x", "y"], "answer": 0}\n{"question": \n')
    with pytest.raises(McqError, match=r"broken\.jsonl, line 2: expected a JSON object"):
        load_questions(str(broken))
    broken.write_text("[1, 2]\n")
    with pytest.raises(McqError, match="line 1: expected a JSON object"):
        load_questions(str(broken))
    broken.write_text("\n")
    with pytest.raises(McqError, match="no usable question among 0 rows"):
        load_questions(str(broken))


@pytest.mark.parametrize(("name", "nearest"), [("medmcq", "medmcqa"), ("MedQA", "medqa"), ("pubmed_qa", "pubmedqa")])
def test_an_unknown_task_names_the_nearest(name, nearest):
    with pytest.raises(McqError, match=f"unknown multiple-choice task '{name}': .* did you mean {nearest}"):
        load_questions(name)


def test_an_unknown_task_without_a_near_name_lists_them_all():
    with pytest.raises(McqError, match=r"expected shipped, medqa, medmcqa, pubmedqa or a \.jsonl file$"):
        load_questions("zzz")


def test_a_data_set_that_cannot_be_reached_is_said_in_one_line(monkeypatch, caplog, capsys):
    import datasets
    import huggingface_hub

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(McqError, match="GBaker/MedQA-USMLE-4-options-hf cannot be had from the Hub") as caught:
        load_questions("medqa")
    assert "\n" not in str(caught.value) and "local .jsonl" in str(caught.value)
    assert not caplog.records and capsys.readouterr() == ("", "")


HUB_ROWS = {
    "medqa": [
        {"id": f"test-{i}", "sent1": "Which ion?", "sent2": "", "ending0": "Sodium", "ending1": "Potassium", "ending2": "Calcium"}
        | {"ending3": "Zinc", "label": 1}
        for i in range(2)
    ],
    "medmcqa": [
        {
            "id": f"uuid-{i}",
            "question": "Which ion?",
            "opa": "Sodium",
            "opb": "Potassium",
            "opc": "Calcium",
            "opd": "Zinc",
            "cop": 1,
        }
        | {"choice_type": "single", "exp": None, "subject_name": "Physiology", "topic_name": None}
        for i in range(2)
    ],
    "pubmedqa": [
        {"pubid": 21645374 + i, "question": "Is it so?", "context": {"contexts": ["We asked.", "We saw."], "labels": ["A", "B"]}}
        | {"long_answer": "It is not.", "final_decision": "no"}
        for i in range(2)
    ],
}


@pytest.mark.parametrize("task", list(HUB_ROWS))
def test_rows_of_the_hubs_shapes_become_questions(task, tmp_path, monkeypatch, write, capsys):
    # The real datasets library over a folder with the columns that the Hub's data sets have; the Hub itself is out of reach.
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = yaml.safe_load((TASKS / f"{task}.yaml").read_text())["dataset_kwargs"]
    folder = tmp_path / "hub"
    folder.mkdir()
    faulty = dict(HUB_ROWS[task][0])
    faulty |= {"medqa": {"ending2": ""}, "medmcqa": {"cop": -1}, "pubmedqa": {"final_decision": ""}}[task]
    lines = [json.dumps(row) for row in [*HUB_ROWS[task], faulty]]
    (folder / f"{source['split']}.jsonl").write_text("\n".join(lines))
    first, second = read_questions(path=str(folder), split=source["split"], shape=source["shape"])
    said = capsys.readouterr()
    assert "1 of 3 rows left out" in said.out and said.out.count("\n") == 1 and said.err == ""
    assert first["id"] != second["id"] and first["answer"] == "B"
    if task == "pubmedqa":
        assert first["question"] == "We asked.\nWe saw.\n\nIs it so?"
        assert first["options"] == {"A": "yes", "B": "no", "C": "maybe"}
    else:
        assert (
            first["question"] == "Which ion?" and first["options"]["B"] == "Potassium" and list(first["options"]) == list("ABCD")
        )
        assert first["specialty"] == ("Physiology" if task == "medmcqa" else "")


def test_a_limit_takes_its_share_of_every_specialty_and_the_same_for_the_same_seed(capsys):
    chosen = load_questions("shipped", 20, seed=3)
    assert len({question["specialty"] for question in chosen}) == 20, "one of each: the file is grouped by specialty"
    assert chosen == load_questions("shipped", 20, seed=3)
    assert chosen != load_questions("shipped", 20, seed=4)
    order = [question["id"] for question in load_questions("shipped")]
    assert [question["id"] for question in chosen] == sorted((q["id"] for q in chosen), key=order.index)
    assert capsys.readouterr().out == ""


def test_specialties_of_unlike_size_keep_their_shares_and_every_question_its_chance():
    questions = [{"id": i, "specialty": "large" if i < 87 else "rare" if i < 90 else "small"} for i in range(100)]
    seen = dict.fromkeys(range(100), 0)
    for seed in range(600):
        chosen = choose(questions, 10, seed)
        assert sum(question["specialty"] == "small" for question in chosen) == 1
        for question in chosen:
            seen[question["id"]] += 1
    assert min(seen.values()) >= 30 and max(seen.values()) <= 95, "60 are expected of each, give or take 7"


def test_fewer_questions_than_the_limit_are_all_taken_and_it_is_said(write, capsys):
    path = write({"question": "q", "options": TEXTS, "answer": 0}, {"question": "r", "options": TEXTS, "answer": 0})
    assert len(load_questions(path, limit=5)) == 2
    assert "has 2 questions, fewer than the 5 asked for" in capsys.readouterr().out
    assert len(load_questions(path, limit=2)) == 2 and capsys.readouterr().out == ""


def test_the_prompt_is_the_projects_own_with_the_options_as_lines():
    question = {"question": "Which ion? {x}", "options": {"A": "Na", "B": "K"}}
    text = prompt(question)
    assert f"### Question:\nWhich ion? {{x}}\n\nA. Na\nB. K\n\n{ASK}\n\n### Response:\n<think>\n" in text
    assert text.endswith("<think>\n") and prompt(question, newline_after_think=False).endswith("<think>")
    assert '"Answer: X"' in ASK


def test_every_task_has_a_file_of_its_name_that_lm_eval_finds():
    from lm_eval.tasks import TaskManager

    assert {path.stem for path in TASKS.glob("[!_]*.yaml")} == {*TASK_NAMES, "file"}
    found = TaskManager(include_path=TASKS, include_defaults=False).all_subtasks
    assert found == sorted(f"medcot_{name}" for name in (*TASK_NAMES, "file"))


# --- lm-eval over a model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    from medcot_utils.engines import get_engine

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
def test_completions_are_those_that_the_projects_own_generation_makes(tiny):
    from medcot_utils.generation import answer_questions

    model, tokenizer = tiny
    records = run_mcq(model, tokenizer, "shipped", limit=6, max_new_tokens=16, batch_size=4, seed=5)
    blocks = [prompt(question, False).partition("### Question:\n")[2] for question in load_questions("shipped", 6, seed=5)]
    asked = [{"id": str(i), "Question": block.partition("\n\n### Response:")[0]} for i, block in enumerate(blocks)]
    settings = CONFIG.generation.model_copy(update={"max_new_tokens": 16, "batch_size": 3})
    answers = answer_questions(model, tokenizer, asked, settings, True, 1)
    assert [record["completion"] for record in records] == [answer["completion"] for answer in answers]
    assert len({record["completion"] for record in records}) > 1


@pytest.mark.model
def test_the_callers_generators_streams_and_log_levels_are_left_alone(tiny):
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
def test_a_scripted_model_whose_outputs_are_known_is_scored_as_they_deserve(tiny, monkeypatch, write):
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

    path = write(*({"question": f"Which ion {i}?", "options": TEXTS, "answer": 0} for i in range(3)))
    for name, metadata in (("medcot_shipped", {"limit": 2, "seed": 3}), ("medcot_file", {"limit": 2, "path": path})):
        manager = TaskManager(include_path=TASKS, include_defaults=False, metadata=metadata)
        harness = HFLM(pretrained=tiny[0], tokenizer=tiny[1])
        found = simple_evaluate(harness, tasks=[name], task_manager=manager, gen_kwargs={"max_gen_toks": 3})
        assert found["results"][name]["sample_len"] == 2 and found["results"][name]["abstained,none"] == 1.0
        assert "correct_stderr,none" in found["results"][name]
        assert found["higher_is_better"][name] == {"correct": True, "abstained": False}


@pytest.mark.embedded
def test_smollm2_is_asked_with_one_bos_and_its_records_hold_together(spy, capsys):
    from medcot_utils.engines import get_engine

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

    code = "import sys, medcot_utils.mcq; print([m for m in ('lm_eval', 'torch', 'pandas', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_published_file_names_a_source_for_every_score():
    data = json.loads(mcq.PUBLISHED.read_text(encoding="utf-8"))
    for entry in data["scores"]:
        assert set(data["sources"][entry["source"]]) == {"source", "scoring"} and set(data["questions"]) <= set(entry)
