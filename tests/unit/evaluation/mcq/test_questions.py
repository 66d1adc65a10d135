"""Multiple-choice questions: every shape of a file, tasks by name, the share of a limit, the prompt."""

from __future__ import annotations

import json

import pytest
import yaml

from medcot_utils.evaluation.mcq import questions
from medcot_utils.evaluation.mcq.questions import read_questions
from medcot_utils.evaluation.mcq.run import (
    ASK,
    TASK_NAMES,
    TASKS,
    McqError,
    choose,
    load_questions,
    prompt,
)
from medcot_utils.evaluation.mcq.strict import read_answer

pytest_plugins = ("mcq_fixtures",)

TEXTS = ["Sodium", "Potassium", "Calcium"]
LETTERS = dict(zip("ABC", TEXTS, strict=True))

# --- the questions -------------------------------------------------------------------------------------------------


def test_every_shipped_question_has_its_answer_among_its_options():
    questions = load_questions("shipped")
    assert len(questions) == 60 and len({question["specialty"] for question in questions}) == 20
    for question in questions:
        assert question["answer"] in question["options"] and list(question["options"]) == list("ABCD")
        assert set(question) == {"id", "question", "options", "answer", "specialty"}
        reply = f"so</think>{question['options'][question['answer']]}\nAnswer: {question['answer']}"
        assert read_answer(reply, question["options"]) == question["answer"]


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


def test_optional_ids_and_specialties_are_used_if_present(write):
    rows = [{"id": 7, "question": "q", "options": [1, 0], "answer": 1, "specialty": "toxicology"}]
    rows += [{"id": "x", "question": "r", "options": list("pqrst"), "answer": "E"}]
    first, second = load_questions(write(*rows))
    assert (first["id"], first["specialty"], first["answer"]) == ("7", "toxicology", "B")
    assert first["options"] == {"A": "1", "B": "0"} and second["options"]["E"] == "t"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": TEXTS, "answer": "A"}, "row 2: no question; expected question, options and answer_idx or answer"),
        ({"question": "q", "answer": "A"}, r"no options; .*\(it has question, answer\)"),
        ({"question": "q", "options": TEXTS}, "no answer; expected"),
        ({"question": "q", "options": [], "answer": 0}, "no options"),
        (
            {"question": "q", "options": TEXTS, "answer": "D"},
            "the answer 'D' is not an option; expected A, B, C, an index from 0",
        ),
        ({"question": "q", "options": TEXTS, "answer": 3}, "the answer 3 is not an option"),
        ({"question": "q", "options": TEXTS, "answer": -1}, "the answer -1 is not an option"),
        ({"question": "q", "options": ["x", " ", "z"], "answer": 0}, "option B is ' '; expected a text for every option"),
        ({"question": "q", "options": {"A": "x", "B": ""}, "answer": "A"}, "option B is empty"),
        ({"question": "q", "options": {"A": "x", "B": None}, "answer": "A"}, "option B is empty"),
        ({"question": "q", "options": [{"key": "A", "value": "x"}], "answer": "A"}, "option A is {'key'"),
        ({"question": "q", "options": "A) x B) y", "answer": "A"}, "expected a list, or an object of letters and texts"),
        ({"question": "q", "options": {"A": "x", "C": "y"}, "answer": "A"}, "expected consecutive letters that begin with A"),
        ({"id": "row-1", "question": "q", "options": TEXTS, "answer": "A"}, "the id 'row-1' occurs twice"),
        ({"id": ["a"], "question": "q", "options": TEXTS, "answer": "A"}, r"the id is \['a'\]; expected a text or a number"),
        ({"specialty": {"a": 1}, "question": "q", "options": TEXTS, "answer": "A"}, r"the specialty is \{.*expected a text"),
        ({"question": ["q"], "options": TEXTS, "answer": "A"}, r"the question is \['q'\]; expected a text"),
        ({"question": float("nan"), "options": TEXTS, "answer": "A"}, "no question; expected"),
        ({"question": "q", "options": ["x", float("nan")], "answer": "A"}, "option B is empty"),
        ({"question": "q", "options": TEXTS, "answer": True}, "the answer True is not an option"),
        ({"question": "q", "options": ["x", "\ud83d"], "answer": "A"}, "B holds half a character"),
        (
            {"question": "q", "options": {"A": "x", "B": "  "}, "answer": "B"},
            "option B is '  '; expected a text for every option",
        ),
        ({"question": "q", "options": {"A": "x", "B": ""}, "answer": "B"}, "option B is empty"),
        ({"question": "q", "options": ["", "x"], "answer": ""}, "no answer"),
        ({"question": "q", "options": ["Sodium"] * 3, "answer": 2}, "every option reads 'Sodium'; expected at least two"),
        ({"question": "q", "options": ["Sodium", " sodium", "SODIUM "], "answer": "B"}, "every option reads 'sodium'"),
        ({"question": "q", "options": ["Sodium"], "answer": "A"}, "every option reads 'Sodium'; expected at least two"),
        (
            {"question": "q", "options": ["Na", "K", "Na "], "answer": "C"},
            "options A and C both read 'Na', and C is the right one",
        ),
        (
            {"question": "q", "options": ["a  b", "K", "a b"], "answer": "a b"},
            "options A and C both read 'a b', and C is the right",
        ),
        ({"question": "q \ud83d", "options": TEXTS, "answer": "A"}, "question holds half a character"),
    ],
)
def test_a_faulty_row_is_named_with_what_was_expected(write, row, message):
    path = write({"question": "good", "options": TEXTS, "answer": 0}, row)
    with pytest.raises(McqError, match=message) as caught:
        load_questions(path)
    assert "own.jsonl, row 2" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("texts", [["AA", "Aa", "aa"], ["Sodium", "Zinc", "Zinc"], ["1", "10", "1.0"]])
def test_options_that_differ_at_the_right_one_are_taken(write, texts):
    (question,) = load_questions(write({"question": "q", "options": texts, "answer": 0}))
    assert list(question["options"].values()) == texts


@pytest.mark.parametrize("missing", [None, float("nan"), ""], ids=["null", "NaN", "empty"])
def test_a_missing_id_or_specialty_is_as_if_it_were_not_there(write, missing):
    row = {"question": "q", "options": TEXTS, "answer": "A"}
    (question,) = load_questions(write(row | {"id": missing, "specialty": missing}))
    assert (question["id"], question["specialty"]) == ("row-1", "")
    assert load_questions(write(row | {"specialty": 0}))[0]["specialty"] == "0"


def test_byte_order_marks_in_a_file_of_questions_are_read_over(tmp_path):
    line = json.dumps({"question": "q", "options": TEXTS, "answer": "A"}).encode()
    (tmp_path / "own.jsonl").write_bytes(b"\n".join([b"\xef\xbb\xbf" + line] * 2))
    assert len(load_questions(str(tmp_path / "own.jsonl"))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "q"}'.encode("utf-16"), r"own\.jsonl: the text is in UTF-16: save it as UTF-8"),
        (b'{"question": "\xe9"}', r"own\.jsonl: 'utf-8' codec can't decode"),
        (b"[" * 100_000, r"own\.jsonl, line 1: expected a JSON object .*nested too deep"),
    ],
    ids=["UTF-16", "no UTF-8", "too deep"],
)
def test_questions_that_cannot_be_read_are_one_clear_error(tmp_path, content, message):
    (tmp_path / "own.jsonl").write_bytes(content)
    with pytest.raises(McqError, match=message):
        load_questions(str(tmp_path / "own.jsonl"))


def test_a_file_of_questions_above_the_limit_is_refused(tmp_path, monkeypatch):
    (tmp_path / "own.jsonl").write_text('{"question": "q"}\n')
    monkeypatch.setattr("medcot_utils.data.files.MAX_DATA_BYTES", 10)
    with pytest.raises(McqError, match=r"own\.jsonl: its rows take .* \(MAX_DATA_BYTES"):
        load_questions(str(tmp_path / "own.jsonl"))


def test_missing_broken_and_empty_files_are_named(tmp_path):
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
    with pytest.raises(McqError, match="GBaker/MedQA-USMLE-4-options-hf could not be loaded from the Hub") as caught:
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
    alike = dict(HUB_ROWS[task][0]) | {"medqa": {"ending0": "Potassium"}, "medmcqa": {"opa": "Potassium"}, "pubmedqa": {}}[task]
    lines = [json.dumps(row) for row in [*HUB_ROWS[task], faulty, *[alike] * (task != "pubmedqa")]]
    (folder / f"{source['split']}.jsonl").write_text("\n".join(lines))
    first, second = read_questions(path=str(folder), split=source["split"], shape=source["shape"])
    said = capsys.readouterr()
    out = "1 of 3" if task == "pubmedqa" else "2 of 4"  # PubMedQA's three options are the same everywhere
    assert f"{out} rows left out" in said.out and said.out.count("\n") == 1 and said.err == ""
    assert first["id"] != second["id"] and first["answer"] == "B"
    if task == "pubmedqa":
        assert first["question"] == "We asked.\nWe saw.\n\nIs it so?"
        assert first["options"] == {"A": "yes", "B": "no", "C": "maybe"}
    else:
        assert (
            first["question"] == "Which ion?" and first["options"]["B"] == "Potassium" and list(first["options"]) == list("ABCD")
        )
        assert first["specialty"] == ("Physiology" if task == "medmcqa" else "")


def test_a_limit_samples_every_specialty_by_share_and_seed(capsys):
    chosen = load_questions("shipped", 20, seed=3)
    assert len({question["specialty"] for question in chosen}) == 20, "one of each: the file is grouped by specialty"
    assert chosen == load_questions("shipped", 20, seed=3)
    assert chosen != load_questions("shipped", 20, seed=4)
    order = [question["id"] for question in load_questions("shipped")]
    assert [question["id"] for question in chosen] == sorted((q["id"] for q in chosen), key=order.index)
    assert capsys.readouterr().out == ""


def test_uneven_specialties_keep_shares_and_equal_chances():
    questions = [{"id": i, "specialty": "large" if i < 87 else "rare" if i < 90 else "small"} for i in range(100)]
    seen = dict.fromkeys(range(100), 0)
    for seed in range(600):
        chosen = choose(questions, 10, seed)
        assert sum(question["specialty"] == "small" for question in chosen) == 1
        for question in chosen:
            seen[question["id"]] += 1
    assert min(seen.values()) >= 30 and max(seen.values()) <= 95, "60 are expected of each, give or take 7"


def test_all_questions_are_taken_and_reported_below_the_limit(write, capsys):
    path = write({"question": "q", "options": TEXTS, "answer": 0}, {"question": "r", "options": TEXTS, "answer": 0})
    assert len(load_questions(path, limit=5)) == 2
    assert "has 2 questions, fewer than evaluation.mcq_limit (5)" in capsys.readouterr().out
    assert len(load_questions(path, limit=2)) == 2 and capsys.readouterr().out == ""


def test_the_prompt_is_the_projects_own_plus_one_line_per_option():
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


def test_more_options_than_letters_are_refused(tmp_path):
    row = {"question": "Which?", "options": [f"option {number}" for number in range(27)], "answer": 0}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    with pytest.raises(McqError, match="row 1: there are 27 options; expected at most 26, one for each letter"):
        read_questions(str(tmp_path / "own.jsonl"))


def test_a_hub_data_set_with_other_columns_is_one_error(monkeypatch):
    monkeypatch.setattr(questions, "_download", lambda *_: [{"id": "1", "text": "Which?"}])
    expected = r"a/b, row 1: its columns are not those of medqa \(KeyError: 'sent1'\); it has id, text. Give a local .jsonl file"
    with pytest.raises(McqError, match=expected):
        read_questions("a/b", shape="medqa")
