"""Everything that notebook 06 measures, in one call: both readings, three bars, the claims, and notes."""

from __future__ import annotations

import json

from medcot_utils import evaluation
from medcot_utils.config import load_config
from medcot_utils.evaluation.claims import outcome

CONFIG = load_config("smoke")
N = 12
QUESTIONS = [{"id": "article", "scored": False, "Question": "Which?", "Response": "This."}]
QUESTIONS += [{"id": f"q{i}", "scored": True, "Question": "Which valve?", "Response": "The mitral valve."} for i in range(N)]


def answers(closed, words, forced=True, answer="The mitral valve."):
    """Greedy and one sampled answer to every question; thinking that is not closed was cut at its budget."""
    found = []
    for sample in (0, 1):
        for i, question in enumerate(QUESTIONS):
            record = {
                "id": question["id"],
                "sample": sample,
                "thinking": "so " * (words + i),
                "answer": answer if closed else "",
                "completion": "so",
                "thinking_tokens": words + i,
                "answer_tokens": 4 * closed,
                "closed": int(closed),
                "well_formed": closed,
                "finished": closed,
            }
            by = {"closed_by": "itself" if closed else "budget", "answer": answer, "answer_tokens": 4, "finished": True}
            found.append(record | ({"forced": by} if forced else {}))
    return found


def losses(**values):
    return [
        {"model": model, "id": f"h{i}", "nll": 10.0 * value + i, "tokens": 10}
        for model, value in values.items()
        for i in range(8)
    ]


def measured(base, tuned, held_out, repeats=()):
    report = {"repeats": list(repeats), "repeats_dropped": False}
    return evaluation.measure(evaluation.score(QUESTIONS, base, tuned, report), held_out, {}, CONFIG)


def test_both_readings_are_over_all_counted_questions():
    found = measured(answers(False, 60), answers(True, 20), losses(base=4.0, tuned=3.2, base_16bit=3.6))
    assert json.loads(json.dumps(found)) == found
    assert (found["n_questions"], found["n_answered"], found["answered"]) == (N, 0, {})
    for natural, forced in ((found["metrics"], found["forced"]), (found["sampled"], found["sampled_forced"])):
        assert natural["answered_rate"]["difference"]["value"] == 1 and forced["answered_rate"]["difference"]["value"] == 0
        assert natural["rouge_l"]["difference"]["value"] == 1 and forced["rouge_l"]["difference"]["value"] == 0
        assert forced["rouge_l"]["difference"]["n"] == N
    assert found["losses"]["base_16bit"]["value"] < found["losses"]["base"]["value"]
    assert "eval_loss" in found["metrics"] and "eval_loss" not in found["forced"]


def test_no_claim_ends_for_want_of_an_answer_with_forced_closing():
    found = measured(answers(False, 60), answers(True, 20), losses(base=4.0, tuned=3.2, base_16bit=3.6))
    loss, thinks_less, *answers_claims, precise, _ = found["claims"]
    assert outcome(loss) == outcome(thinks_less) == "holds"
    assert all("no question was answered" not in one["verdict"] for one in found["claims"])
    assert "16-bit base" in loss["verdict"] and "not measured" in precise["verdict"]
    assert all(one["n"] == N for one in answers_claims)


def test_records_without_forced_answers_are_measured_as_before():
    found = measured(answers(False, 60, forced=False), answers(True, 20, forced=False), losses(base=4.0, tuned=3.2))
    assert not {"forced", "sampled_forced", "losses"} & found.keys() and found["notes"] == []
    assert sum("no question was answered by both models" in one["verdict"] for one in found["claims"]) == 5


def test_what_training_rows_repeat_is_in_no_figure():
    repeats = [{"question_id": name, "train_id": "t1"} for name in ("q0", "h0", "article")]
    held_out = losses(base=4.0, tuned=3.2, base_16bit=3.6)
    found = measured(answers(False, 60), answers(True, 20), held_out, repeats)
    assert (found["n_questions"], found["n_contaminated"]) == (N - 1, 1)
    assert found["metrics"]["eval_loss"]["difference"]["n"] == found["losses"]["learning"]["n"] == 7
    assert found["claims"][-1]["verdict"].endswith("it is in the training rows (t1)")


def test_notes_say_whose_thinking_was_closed_for_how_many():
    notes = measured(answers(False, 60), answers(True, 20), [])["notes"]
    assert notes == [
        f"Forced closing: of {N} answers the base model closed 0 by itself; {N} were closed for it at their budget, and 0 where "
        "the text ended without the tag.",
        f"Forced closing: of {N} answers the tuned model closed {N} by itself; 0 were closed for it at their budget, and 0 where "
        "the text ended without the tag.",
    ]
    chinese = measured(answers(True, 20, answer="二尖瓣"), answers(True, 20), [])["notes"]
    assert len(chinese) == 3 and chinese[0].startswith("Words are counted by white space.")
