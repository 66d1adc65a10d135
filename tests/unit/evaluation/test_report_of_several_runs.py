"""Several runs in one report: whose answer stands under which question, what differs, and the tuned models compared."""

from __future__ import annotations

import re
import time

import pytest
from made_up_runs import ATTACK, CONFIG, QUESTIONS, Tags, fill

from medcot_utils.config import load_config
from medcot_utils.evaluation.comparison import compare_all, metric_lines
from medcot_utils.evaluation.report import build_report
from medcot_utils.evaluation.scored_set import pair_answers
from medcot_utils.run.directory import Run

pytestmark = pytest.mark.usefixtures("undrawn_figures")

SCORED = [question["id"] for question in QUESTIONS if question["scored"]]
NONE = "The tuned models are not compared: "


def make(folder, *overrides, **given):
    return fill(Run.create(folder, load_config("smoke", overrides)), **given)


def asking(*numbers, text="Which nerve"):
    """Questions by row number, as ids are made for data without them: other data, the same ids."""
    bare = {"scored": True, "specialty": "neurology", "Complex_CoT": "So.", "Response": "The vagus."}
    return [bare | {"id": f"row-{n}", "Question": f"{text} {n}?"} for n in numbers]


def said(name):
    """Answers that say to which question they were given, and by which model."""
    return lambda question: (f"{name} says {question['Question']}", True)


def cards(page):
    """[{id, question, columns: {label: answer}, tags, outcome}] of the page's questions."""
    found = []
    for identity, outcome, card in re.findall(
        r'<article id="([^"]*)".*?data-outcome="([^"]*)".*?>(.*?)</article>', page, re.DOTALL
    ):
        sections = re.findall(r'<section><h3>([^<]*)</h3>.*?</details>\s*<div class="answer">(.*?)</div>', card, re.DOTALL)
        question, tags = re.search(r"<b>(.*?)</b>", card)[1], re.findall(r'<span class="tag changed">([^<]*)</span>', card)
        assert len({label for label, _ in sections}) == len(sections), "two columns of one name"
        line = {"id": identity, "question": question, "columns": dict(sections), "tags": tags, "outcome": outcome}
        found.append(line)
    return found


def text_of(page):
    return " ".join(Tags(page).text.split())


def table(page, name):
    """The rows of a table, each as the texts of its cells."""
    found = re.search(rf'<table id="{name}">(.*?)</table>', page, re.DOTALL)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", found[1], re.DOTALL) if found else []
    return [
        [" ".join(Tags(cell).text.split()) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows
    ]


# --- whose answer stands where -------------------------------------------------------------------------------------


def test_several_runs_stand_beside_each_other(tmp_path):
    page = build_report(make(tmp_path / "run"), make(tmp_path / "other", tuned=("The aortic one.", True)))
    seen = Tags(page)
    assert "<h1>Runs run and other, side by side</h1>" in page and "<title>medcot: runs run and other</title>" in page
    assert "Run run" in seen.text and "Run other" in seen.text and "The effects of fine-tuning" not in seen.text
    titles = re.findall(r"<section><h3>([^<]*)</h3>", page)
    assert titles == ["base", "tuned, run", "tuned, other"] * len(QUESTIONS)
    assert seen.text.count(ATTACK) == seen.text.count("The aortic one.") == len(QUESTIONS)
    assert seen.tags.count("img") == 4 and page.count("The article's claims, tested") == 2
    assert all(page.count(f'<article id="{question["id"]}"') == 1 for question in QUESTIONS)


def test_two_data_sets_with_the_same_ids_are_kept_apart(tmp_path, capsys):
    nerves = make(tmp_path / "nerves", questions=asking(0, 1), base=said("base"), tuned=said("a"))
    bones = make(tmp_path / "bones", questions=asking(1, 2, text="Which bone"), base=said("base"), tuned=said("b"))
    page = build_report(nerves, bones)
    found = cards(page)
    assert [card["question"] for card in found] == ["Which nerve 0?", "Which nerve 1?", "Which bone 1?", "Which bone 2?"]
    for card in found:
        model, run = ("a", "nerves") if "nerve" in card["question"] else ("b", "bones")
        assert card["columns"] == {"base": f"base says {card['question']}", f"tuned, {run}": f"{model} says {card['question']}"}
        assert card["outcome"] == f"{run} alone: both: reasons and answers" and card["tags"] == [f"asked in {run} alone"]
    identities = [card["id"] for card in found]
    assert identities == ["row-0", "row-1", "row-1-2", "row-2"], "a link leads to one question only"
    why = "no question was asked and scored in all of the runs (scored questions: nerves: 2, bones: 2)"
    assert NONE + why in text_of(page) and table(page, "tuned") == []
    assert capsys.readouterr().out.splitlines() == [f"the tuned models are not compared: {why}"]
    assert ["questions", "2 asked, 2 of them not in all runs", "2 asked, 2 of them not in all runs"] in table(page, "differences")


def test_the_same_question_with_another_reference_is_another_one(tmp_path):
    corrected = [question | {"Response": "The accessory nerve."} for question in asking(0)]
    page = build_report(make(tmp_path / "a", questions=asking(0)), make(tmp_path / "b", questions=corrected))
    assert [card["tags"] for card in cards(page)] == [["asked in a alone"], ["asked in b alone"]]


def test_a_repeat_is_linked_to_the_question_of_its_own_run(tmp_path):
    repeat = {"train_id": "t1", "question_id": "row-1", "train_question": "?", "exact": True}
    page = build_report(
        make(tmp_path / "a", questions=asking(1)), make(tmp_path / "b", questions=asking(1, text="Which bone"), repeats=[repeat])
    )
    assert 't1 repeats <a href="#row-1-2">row-1</a>' in page


def test_a_question_of_one_run_shows_that_runs_columns_only(tmp_path):
    page = build_report(make(tmp_path / "a", questions=asking(0, 1)), make(tmp_path / "b", questions=asking(1)))
    alone, both = cards(page)
    assert list(alone["columns"]) == ["base", "tuned, a"] and list(both["columns"]) == ["base", "tuned, a", "tuned, b"]
    assert alone["outcome"] == "a alone: base does not, tuned reasons and answers" and alone["tags"] == ["asked in a alone"]
    assert both["outcome"] == "reasons and answers: only tuned, a; tuned, b" and both["tags"] == []


@pytest.mark.parametrize("other", [{"base": ("Another one.", True)}, {"overrides": ["model.load_in_4bit=false"]}])
def test_a_base_that_is_another_one_has_a_column_of_its_own(tmp_path, other):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", *other.pop("overrides", []), **other), make(tmp_path / "c")]
    page = build_report(*runs)
    columns = ["base, a and c", "tuned, a", "tuned, c", "base, b", "tuned, b"]
    assert [list(card["columns"]) for card in cards(page)] == [columns] * len(QUESTIONS)
    assert list(cards(build_report(runs[0], runs[2]))[0]["columns"]) == ["base", "tuned, a", "tuned, c"]


def test_a_length_is_marked_against_the_base_of_its_own_run(tmp_path):
    long = make(tmp_path / "long", base=("word " * 40, True), tuned=("word " * 40, True))
    page = build_report(make(tmp_path / "short", base=("word", True), tuned=("word", True)), long)
    assert "times the words" not in page
    assert "times the words" in build_report(make(tmp_path / "grown", base=("word", True), tuned=("word " * 40, True)))


def test_runs_in_folders_of_one_name_have_names_of_their_own(tmp_path):
    first, second = make(tmp_path / "x" / "mine"), make(tmp_path / "y" / "mine", tuned=("B.", True))
    page = build_report(first, second, first)
    labels = ["base", "tuned, x/mine", "tuned, y/mine", "tuned, x/mine (2)"]
    assert [list(card["columns"]) for card in cards(page)] == [labels] * len(QUESTIONS)
    assert re.findall(r"<h2>(Run [^<]*)</h2>", page) == ["Run x/mine", "Run y/mine", "Run x/mine (2)"]
    assert str(tmp_path) not in page


def test_a_run_in_the_working_folder_takes_the_folders_name(tmp_path, monkeypatch):
    make(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert "<h2>Run here</h2>" in build_report(Run.open("."), make(tmp_path / "there"))


def test_a_question_that_one_run_trained_on_says_which(tmp_path):
    repeat = {"train_id": "t9", "question_id": "q0", "train_question": "?", "exact": True}
    page = build_report(make(tmp_path / "a"), make(tmp_path / "b", repeats=[repeat], trained_on=("q0",)))
    assert {card["id"]: card["tags"] for card in cards(page) if card["id"] in ("q0", "q1")} == {
        "q0": ["repeated in training in b, set apart"],
        "q1": [],
    }


# --- what differs ------------------------------------------------------------------------------------------------


def test_what_differs_between_the_runs_is_said(tmp_path):
    changed = ["generation.max_new_tokens=17", "seed=5", "evaluation.confidence_level=0.9", "training.learning_rate=0.1"]
    page = build_report(make(tmp_path / "a"), make(tmp_path / "b", *changed))
    assert table(page, "differences") == [
        ["", "a", "b"],
        ["seed", "3407", "5"],
        ["generation.max_new_tokens", str(CONFIG.generation.max_new_tokens), "17"],
        ["evaluation.confidence_level", "0.95", "0.9"],
        ["training.learning_rate", str(CONFIG.training.learning_rate), "0.1"],
    ]
    text = text_of(page)
    assert text.count("Brackets: 95 %") == 2 and text.count("Brackets: 90 %") == 1, "each run's own, and the first's for both"


def test_runs_that_differ_in_nothing_are_said_to(tmp_path):
    page = build_report(make(tmp_path / "a"), make(tmp_path / "b"))
    assert table(page, "differences") == [] and "Nothing: the questions and all settings are the same." in text_of(page)
    assert "What differs between the runs" not in build_report(make(tmp_path / "a"))


def test_a_path_of_this_machine_is_not_in_what_differs(tmp_path):
    page = build_report(make(tmp_path / "a"), make(tmp_path / "b", f"dataset.path={tmp_path}/rows.jsonl"))
    assert ["dataset.path", "null", "…/rows.jsonl"] in table(page, "differences") and str(tmp_path) not in page


# --- the tuned models compared -----------------------------------------------------------------------------------


def test_tuned_models_are_compared_on_the_shared_questions(tmp_path):
    questions, more = asking(*range(20)), asking(*range(3, 25))
    seen = {"train_id": "t9", "question_id": "row-4", "train_question": "?", "exact": True}
    runs = [
        make(tmp_path / "a", questions=questions, tuned=("Short.", True)),
        make(tmp_path / "b", questions=more, tuned=("1. one\n2. two\n3. three words", True), loss=1.2),
        make(tmp_path / "c", questions=questions, tuned=("Not closed", False), repeats=[seen], trained_on=("row-4",)),
    ]
    page = build_report(*runs)
    # By hand: 20 and 22 questions have 3 to 19 in common, of which run c trained on row-4.
    common = [f"row-{n}" for n in range(3, 20) if n != 4]
    assert f"{len(common)} questions that all runs asked and scored and that no run trained on" in text_of(page)
    answers = {run.path.name: [r for r in run.read("tuned_answers") if r["id"] in common and r["sample"] == 0] for run in runs}
    asked = [question for question in questions if question["id"] in common]
    expected = compare_all(pair_answers(asked, answers), [], runs[0].config.evaluation, runs[0].config.seed)
    head, *lines = table(page, "tuned")
    assert head == ["metric", "tuned, a", "tuned, b", "difference", "verdict", "tuned, c", "difference", "verdict"]
    by_name = {line[0]: line[1:] for line in lines}
    assert by_name["answers that are a list (share)"][3] == "rose"
    for name, text in (("answer_words", "length of the answer (words)"), ("bullet_rate", "answers that are a list (share)")):
        b, c = (metric_lines({name: expected[run][name]})[name] for run in "bc")
        assert by_name[text] == [b.base, *(value for line in (b, c) for value in (line.tuned, line.difference, line.verdict))]
    assert by_name["answers that close their thinking once (share)"][6] == "fell, worse"


def test_a_verdict_names_the_run_whose_answers_were_cut(tmp_path):
    questions = asking(*range(8))
    cut, whole = (make(tmp_path / name, questions=questions, tuned=("Short.", name == "whole")) for name in ("cut", "whole"))
    whole.write("tuned_answers", [record | {"thinking_tokens": 70} for record in whole.read("tuned_answers")])
    line = next(line for line in table(build_report(cut, whole), "tuned") if line[0] == "length of the thinking (tokens)")
    assert line[4] == "can't tell: the thinking of 8 of 8 cut answers was cut"


def closed(run, text="The vagus."):
    """The run with forced answers and every reading of multiple choice."""
    forced = {"closed_by": "budget", "answer": text, "answer_tokens": 5, "finished": True}
    read = {"question": "Which?", "letter": "B", "likelihood": "A"}
    for name in ("base", "tuned"):
        run.write(f"{name}_answers", [record | {"forced": forced} for record in run.read(f"{name}_answers")])
        run.write(f"{name}_mcq", [record | read for record in run.read(f"{name}_mcq")])
    return run


def choices(page):
    return {line[0]: line[1:4] for line in table(page, "tuned") if line[0].startswith("multiple choice")}


def test_forced_answers_and_multiple_choice_are_compared_too(tmp_path):
    questions = asking(*range(8))
    unclosed = {"questions": questions, "tuned": ("", False)}
    first, second = closed(make(tmp_path / "a", **unclosed), "No."), closed(make(tmp_path / "b", **unclosed))
    page = build_report(first, second)
    by_name = {line[0]: line[1:] for line in table(page, "tuned")}
    forced = by_name["ROUGE-L of the answer against the reference, with forced closing (F1)"]
    assert [cell.split(" [")[0] for cell in forced[:3]] == ["0.00", "1.00", "1.00"] and forced[3] == "rose, better"
    assert "chrF of the answer against the reference, with forced closing (0 to 1)" in by_name
    assert {name: cells[0][:4] for name, cells in choices(page).items()} == {
        "multiple choice by letter (share)": "1.00",
        "multiple choice by likelihood (share)": "0.00",
    }
    assert "and that no run trained on, and 8 multiple-choice questions; greedy answers;" in text_of(page)
    plain = build_report(first, make(tmp_path / "c", questions=questions))
    none = "No multiple-choice question was asked in all runs."
    assert choices(plain) == {} and none in text_of(plain) and none not in text_of(page)
    assert not [line for line in table(plain, "tuned") if "with forced closing" in line[0]]


def test_multiple_choice_is_compared_on_common_unseen_questions(tmp_path):
    first, second = closed(make(tmp_path / "a")), closed(make(tmp_path / "b"))
    asked = ["gout", "measles", "asthma", "rickets", "tetanus", "scurvy", "malaria", "anthrax"]
    numbered = [one | {"question": f"{name}?"} for one, name in zip(first.read("tuned_mcq"), asked, strict=True)]
    changes = {"m6": {"letter": "A"}, "m7": {"question": "Where?", "letter": "A"}}  # another question, for m7
    first.write("tuned_mcq", numbered)
    second.write("tuned_mcq", [one | changes.get(one["id"], {}) for one in numbered])
    page = build_report(first, second)
    assert "and 7 multiple-choice questions" in text_of(page)
    assert choices(page)["multiple choice by letter (share)"][1].startswith("0.86 "), "all but m6"
    # A training row of run a repeats m6, so its metrics count seven of the eight.
    rows = first.read("train_rows").map(lambda row: {"Question": numbered[6]["question"]})
    measured = first.read("metrics")
    counted = measured["metrics"]["mcq_accuracy"]
    fewer = {"mcq_accuracy": counted | {"difference": counted["difference"] | {"n": 7}}}
    first.write("train_rows", rows)
    first.write("metrics", measured | {"metrics": measured["metrics"] | fewer})
    page = build_report(first, second)
    assert "and 6 multiple-choice questions" in text_of(page)
    assert choices(page)["multiple choice by letter (share)"][1].startswith("1.00 ")


def test_losses_are_compared_only_on_the_same_rows(tmp_path):
    first, second = make(tmp_path / "a", loss=1.5), make(tmp_path / "b", loss=1.25)
    page = build_report(first, second)
    loss = next(line for line in table(page, "tuned") if line[0].startswith("held-out loss"))
    assert loss[1:4] == ["1.50 [1.50, 1.50]", "1.25 [1.25, 1.25]", "-0.25 [-0.25, -0.25]"]
    assert "The loss is over the held-out rows, which are the same in all runs" in text_of(page)
    page = build_report(first, make(tmp_path / "c", loss=1.25, rows=2))
    assert len(table(page, "tuned")) > 5 and not [line for line in table(page, "tuned") if "held-out" in line[0]]
    assert "The held-out loss is not compared, because the runs measured it on different rows" in text_of(page)


def test_runs_without_a_shared_question_are_not_compared(tmp_path, capsys):
    repeats = [{"train_id": "t9", "question_id": q, "train_question": "?", "exact": True} for q in SCORED[:2]]
    rest = [question for question in QUESTIONS if question["id"] not in SCORED[2:]]
    # q0 and q1 are asked in both; one of each pair of runs trained on them, and the article's question counts nowhere.
    extra = [*rest, *asking(7)]
    page = build_report(make(tmp_path / "a"), make(tmp_path / "b", questions=extra, repeats=repeats, trained_on=SCORED[:2]))
    why = "a run trained on, or did not answer, each of the 2 questions that all runs asked and scored"
    assert NONE + why in text_of(page) and table(page, "tuned") == []
    assert capsys.readouterr().out.splitlines() == [f"the tuned models are not compared: {why}"]
    assert NONE not in text_of(build_report(make(tmp_path / "a"), make(tmp_path / "c", questions=extra)))


# --- size and speed ----------------------------------------------------------------------------------------------


def test_200_long_questions_make_a_small_page_quickly(tmp_path):
    import numpy as np

    words = [f"{start}{end}ia" for start in ("nephr", "carcin", "oste", "hepat") for end in ("om", "opath", "it")]
    generator = np.random.default_rng(1)

    def prose(count):
        return " ".join(generator.choice(words, size=count))

    bare = QUESTIONS[1]
    questions = [bare | {"id": f"q{i}", "Question": prose(40), "Response": prose(60)} for i in range(200)]
    # Metrics of 200 questions, computed from these answers; the thinking of every answer is as long as a real model's.
    big = make(
        tmp_path / "run",
        questions=questions,
        thinking=prose(450),
        base=lambda q: (prose(150), False),
        tuned=lambda q: (prose(150), True),
    )
    assert big.read("metrics")["metrics"]["rouge_l"]["difference"]["n"] == 200
    began = time.process_time()  # not the time that other processes take
    page = build_report(big)
    seconds = time.process_time() - began
    assert page.count("<article ") == 200 and "greedy answers, 200 questions" in page
    assert 200 * 2 * 600 * 6 < len(page.encode()) < 5_000_000
    assert seconds < 20
