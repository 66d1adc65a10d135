"""The merged model beside the measured one: verdicts on made-up answers and losses whose truth is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.merged import AS_MEASURED, compare_merged, merged_table, merged_verdicts_table
from medcot_utils.evaluation.scored_set import score_merged

SETTINGS = load_config("smoke").evaluation  # 95 %, 500 resamples
REPORT = {"repeats": [], "repeats_dropped": True}


def answers(n, closed=None, words=60, finished=True, sample=0):
    spread = np.random.default_rng(1).integers(-20, 20, size=n)
    return [
        {
            "id": f"q{i}",
            "sample": sample,
            "completion": f"{words} {i < (n if closed is None else closed)}",
            "closed": int(i < (n if closed is None else closed)),
            "well_formed": i < (n if closed is None else closed),
            "finished": finished,
            "thinking": "word " * int(words + spread[i]),
            "answer": "the mitral valve",
            "thinking_tokens": 7,
            "answer_tokens": 5,
        }
        for i in range(n)
    ]


def losses(merged=2.0, n=40):
    return [
        {"model": model, "id": f"h{i}", "nll": 100 * value, "tokens": 100}
        for model, value in (("tuned", 2.0), ("merged", merged))
        for i in range(n)
    ]


def questions(n):
    return [{"id": f"q{i}", "scored": True, "Question": "Which valve?", "Response": "The mitral."} for i in range(n)]


def compared(n=40, merged_loss=2.0, **changes):
    scored = score_merged(questions(n), answers(n), answers(n, **changes), REPORT)
    return compare_merged(scored.counted, losses(merged_loss), SETTINGS, 7)


def verdicts(measured):
    return {one["metric"]: one["verdict"] for one in measured["verdicts"]}


def test_the_same_answers_and_loss_behave_as_measured():
    found = compared()
    assert set(verdicts(found).values()) == {AS_MEASURED} and found["behaves"] == "yes"
    assert found["summary"] == "Does the merged model behave as measured? Form, length, and loss: yes."
    assert found["same_answers"] == found["n_questions"] == 40
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("changes", "metric", "verdict"),
    [
        ({"closed": 28}, "closed_think_rate", "differs: fell, worse, from 1.00 [0.91, 1.00] to 0.70 [0.55, 0.82]"),
        ({"words": 80}, "completion_words", "differs: rose, from "),
        ({"words": 62}, "completion_words", AS_MEASURED),
        ({"merged_loss": 1.95}, "eval_loss", "differs: fell, better, from 2.00 [2.00, 2.00] to 1.95 [1.95, 1.95]"),
        ({"merged_loss": 2.009}, "eval_loss", AS_MEASURED),
    ],
)
def test_what_a_reader_would_notice_differs(changes, metric, verdict):
    found = compared(**changes)
    assert verdicts(found)[metric].startswith(verdict)
    assert found["behaves"] == ("yes" if verdict == AS_MEASURED else "no")
    assert (": no, " in found["summary"]) is (found["behaves"] == "no")


def test_the_summary_says_first_what_differs():
    beginning, _, end = compared(n=24, words=80)["summary"].partition("? Length: no, length of everything written: rose, from ")
    assert beginning == "Does the merged model behave as measured"
    assert end.endswith("]. Loss: yes. Form: 24 questions are too few, about 35 would tell.")


def test_too_few_questions_cannot_tell_and_say_how_many_would():
    found = compared(n=24)
    needed = {one["metric"]: one["needed"] for one in found["verdicts"]}
    assert verdicts(found)["closed_think_rate"] == "can't tell with 24 questions: about 35 would tell"
    assert needed == {"closed_think_rate": 35, "finished_rate": 35, "completion_words": None, "eval_loss": None}
    assert found["behaves"] == "can't tell" and found["summary"] == (
        "Does the merged model behave as measured? Length and loss: yes. Form: 24 questions are too few, about 35 would tell."
    )
    # As many as are said to be needed are enough, and one fewer are not.
    assert compared(n=35)["behaves"] == "yes" and compared(n=34)["behaves"] == "can't tell"
    assert verdicts(compared(n=5))["completion_words"] == "can't tell with 5 questions: at least 6 are needed"
    assert {one["needed"] for one in compared(n=5)["verdicts"]} == {None}, "six are the fewest, and need not be enough"


def test_cut_answers_have_no_length_to_behave_as_measured():
    both = score_merged(questions(40), answers(40, finished=False), answers(40, finished=False), REPORT)
    found = compare_merged(both.counted, losses(), SETTINGS, 7)
    assert "ength: can't tell, 40 of 40 measured" in found["summary"]
    cut = "40 of 40 measured (4-bit) answers and 40 of 40 merged answers were cut"
    assert verdicts(found)["completion_words"] == f"can't tell with 40 questions: {cut}"
    # Longer although cut: it differs all the more. Shorter, but cut: who knows.
    longer, shorter = ({"finished": False, "words": words} for words in (90, 30))
    assert verdicts(compared(**longer))["completion_words"].startswith("differs: rose, from ")
    assert verdicts(compared(**shorter))["completion_words"].startswith("can't tell with 40 questions: 40 of 40 merged answers")


def test_a_model_that_was_not_asked_says_what_it_needs():
    scored = score_merged(questions(8), answers(8), [], REPORT)
    assert scored.counted == []
    found = compare_merged(scored.counted, losses(), SETTINGS, 7, "needs 15.0 GiB")
    assert (found["n_questions"], found["not_measured"], set(found["metrics"])) == (
        0,
        "needs 15.0 GiB",
        {"eval_loss", "perplexity"},
    )
    assert verdicts(found)["finished_rate"] == "can't tell: not measured, needs 15.0 GiB"
    assert found["summary"].endswith("Loss: yes. Form and length: can't tell, not measured, needs 15.0 GiB.")


def test_a_loss_that_is_no_number_cannot_be_told():
    found = compared(merged_loss=float("nan"))
    assert verdicts(found)["eval_loss"] == "can't tell: not a finite number" and found["behaves"] == "can't tell"


def test_only_counted_questions_the_merged_model_answered_count():
    asked = questions(8)
    asked[0]["scored"] = False
    report = {"repeats": [{"question_id": "q2", "train_id": "t1"}], "repeats_dropped": False}
    tuned = answers(8) + answers(8, sample=1)
    scored = score_merged(asked, tuned, answers(8)[:5], report)
    assert [one.question["id"] for one in scored.counted] == ["q1", "q3", "q4"]
    assert {label: record["sample"] for label, record in scored.counted[0].greedy.items()} == {"tuned": 0, "merged": 0}


def test_forced_answers_are_compared_beside_the_natural_ones():
    closed = {"closed_by": "itself", "answer": "the mitral valve", "answer_tokens": 5, "finished": True}
    sides = [[record | {"forced": closed} for record in answers(24, words=words)] for words in (60, 80)]
    found = compare_merged(score_merged(questions(24), *sides, REPORT).counted, losses(), SETTINGS, 7)
    assert found["forced"] == {name: metric for name, metric in found["metrics"].items() if name in found["forced"]}
    table = merged_table(found)
    assert table.index.unique("reading").tolist() == ["as they answer", "forced closing"]
    assert table.columns.tolist() == ["measured (4-bit)", "merged", "difference", "verdict"]
    assert merged_verdicts_table(found).index.get_level_values("about").tolist() == ["form", "form", "length", "loss"]
