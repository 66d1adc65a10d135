"""The verdicts on claims, from numbers: what holds, what does not, what cannot be told, and what it would take."""

from __future__ import annotations

import pytest
from made_up_claims import BY_METRIC, judged_record, made, verdict_of

from medcot_utils.evaluation.claims import ARTICLE_CLAIM, CLAIMS, claims_table, judge, outcome
from medcot_utils.evaluation.decisions import CANNOT_TELL, DOES_NOT, HOLDS
from medcot_utils.evaluation.metrics import METRICS

SMALLEST = "a difference of 5, the smallest that counts ("


def test_a_difference_too_small_to_matter_is_none_however_clear():
    tiny = made(-2e-4, -3e-4, -1e-4, n=2000)
    assert verdict_of("eval_loss", {"eval_loss": tiny}).endswith("differs by less than 0.01")
    small = made(-0.008, -0.015, -0.001, n=50, spread=0.02)
    whether = "whether held-out loss, per trained token differs by 0.01, the smallest that counts"
    found = verdict_of("eval_loss", {"eval_loss": small})
    assert found == f"can't tell with 50 held-out rows: it takes about 785 to show {whether}"


# --- how many questions it would take ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "needed", "what"),
    [
        ({"value": -8.0, "low": -20.0, "high": 4.0, "spread": 30.0, "needed": 111}, 111, "the difference found of 8 ("),
        (
            {"value": 8.0, "low": -4.0, "high": 20.0, "spread": 30.0, "needed": 111},
            283,
            SMALLEST,
        ),
        (
            {"value": 0.0, "low": -12.0, "high": 12.0, "spread": 30.0, "needed": None},
            283,
            SMALLEST,
        ),
        (
            {"value": -2.0, "low": -14.0, "high": 10.0, "spread": 30.0, "needed": 1766},
            283,
            SMALLEST,
        ),
        ({"value": -8.0, "low": -16.0, "high": 0.1, "spread": 12.0, "needed": 18}, 25, "the difference found of 8 ("),
    ],
    ids=["found", "found the other way", "nothing found", "found too little", "nearly enough"],
)
def test_what_cannot_be_told_says_how_many_questions_it_takes(difference, needed, what):
    record = judged_record("thinking_words", judge({}, {}, {}, forced={"thinking_words": made(n=24, **difference)}))
    text = f"it takes about {needed:,} to show {what}{METRICS['thinking_words'].text})"
    assert record["verdict"] == f"can't tell with 24 questions, forced closing: {text}"
    assert record["needed"] == needed


def test_enough_to_show_the_smallest_may_not_rule_it_out():
    found = made(-0.004, -0.0102, 0.0022, n=1000, spread=0.1, needed=4906)  # 785 would show 0.01
    record = judged_record("eval_loss", judge({"eval_loss": found}, {}, {}))
    assert record["needed"] == 2181 and "whether held-out loss, per trained token differs by 0.01" in record["verdict"]


def test_of_two_open_metrics_the_one_that_takes_more_is_named():
    few, many = (made(0.02, -0.1, 0.14, spread=0.3, needed=needed) for needed in (80, 900))
    for rouge, chrf, name in ((few, many, "chrf"), (many, few, "rouge_l")):
        record = judged_record("rouge_l", judge({}, {}, {}, forced={"rouge_l": rouge, "chrf": chrf}))
        assert record["needed"] == 900 and record["verdict"].endswith(f"the difference found of 0.02 ({METRICS[name].text})")


def test_a_majority_that_is_not_clear_says_how_many_it_takes():
    shares = {
        "base": {"value": 0.6, "low": 0.45, "high": 0.73, "n": 40},
        "tuned": {"value": 0.1, "low": 0.0, "high": 0.2, "n": 40},
    }
    found = made(-0.5, -0.6, -0.4, n=40, p=0.001, alpha=0.05, changed=0.5, needed=15) | shares
    record = judged_record("bullet_rate", judge({}, {}, {}, forced={"bullet_rate": found}))
    assert record["needed"] == 194  # ((1.96 x 0.5 + 0.84 x 0.49) / 0.1)^2
    assert record["verdict"].endswith("it takes about 194 to show that base, answers that are a list are more than half")


# --- verdicts from made-up numbers ---------------------------------------------------------------------------------


UP, DOWN, UNCLEAR = made(0.2, 0.1, 0.3, n=12), made(-0.2, -0.3, -0.1, n=12), made(0.2, -0.1, 0.5, n=12)


@pytest.mark.parametrize(
    ("rouge", "chrf", "expected"),
    [
        (UP, UP, HOLDS),
        (UP, UNCLEAR, f"{CANNOT_TELL}: it takes about 40 to show the difference found of 0.2 (chrF"),
        (UNCLEAR, UP, f"{CANNOT_TELL}: it takes about 40 to show the difference found of 0.2 (ROUGE-L"),
        (UP, DOWN, f"{DOES_NOT}: chrF of the answer against the reference went the other way"),
        (DOWN, UP, f"{DOES_NOT}: ROUGE-L of the answer against the reference went the other way"),
        (DOWN, UNCLEAR, f"{DOES_NOT}: ROUGE-L of the answer against the reference went the other way"),
        (UNCLEAR, UNCLEAR, f"{CANNOT_TELL}: it takes about 40 to show the difference found of 0.2 (ROUGE-L"),
    ],
)
def test_a_claim_of_two_metrics_needs_both_and_falls_with_either(rouge, chrf, expected):
    found, why = expected.split(":") if ":" in expected else (expected, "")
    verdict = verdict_of("rouge_l", {"rouge_l": rouge, "chrf": chrf})
    assert verdict.startswith(f"{found} with 12 questions that both answered" + (f":{why}" if why else ""))
    assert bool(why) is (verdict != "holds with 12 questions that both answered")
    assert verdict_of("rouge_l", {"rouge_l": rouge}) == "can't tell: chrF of the answer against the reference: not measured"


def test_an_unclear_exact_test_keeps_a_claim_from_holding():
    def found(n, p):
        levels = {
            "base": {"value": 1.0, "low": 0.6, "high": 1.0, "n": n},
            "tuned": {"value": 0.0, "low": 0.0, "high": 0.4, "n": n},
        }
        return made(-1.0, -1.0, -0.6, n=n, p=p, alpha=0.05) | levels

    unclear, clear = (verdict_of("bullet_rate", {"bullet_rate": found(20, p)}) for p in (0.25, 0.03))
    assert unclear.startswith("can't tell with 20 questions that both answered: it takes about 40 ")
    assert clear == "holds with 20 questions that both answered"


def test_of_one_question_without_an_interval_nothing_can_be_told():
    one = verdict_of("eval_loss", {"eval_loss": made(-2.0, None, None, n=1)})
    assert one == "can't tell with 1 held-out row: at least 6 are needed"
    infinite = verdict_of("eval_loss", {"eval_loss": made(float("inf"), None, None)})
    assert infinite == "can't tell with 20 held-out rows: held-out loss, per trained token is not a finite number"


def test_what_was_not_measured_is_said_to_be_so_for_every_claim():
    records = judge({}, {}, {})
    assert len(records) == len(CLAIMS) + 1
    for claim, record in zip(CLAIMS, records, strict=False):
        first = METRICS[next(iter(claim.before or claim.expected))].text
        why = "no question was answered by both models" if claim.of_answers else f"{first}: not measured"
        assert (record["claim"], record["result"]) == (claim.text, "nothing to measure it on")
        assert record["verdict"] == f"can't tell: {why}"


def test_a_record_names_the_claims_test_and_its_outcome():
    measured = {"rouge_l": UP, "chrf": UP}
    record = judged_record("rouge_l", judge({}, measured, {}))
    among = "(as they answer, on the questions that both models answered)"
    assert record["tested_by"] == f"{METRICS['rouge_l'].label}, {METRICS['chrf'].label} {among}"
    one = "1.00 [0.90, 1.10] to 1.00 [0.90, 1.10], difference 0.20 [0.10, 0.30]"
    assert record["result"] == f"{one}; {one}"


@pytest.mark.parametrize("seen", [(), ("row-0",), ("row-0", "row-77")])
def test_the_articles_question_alone_never_proves_its_claim(seen):
    everything_better = {name: made(-9, -9, -9) if METRICS[name].better < 0 else made(9, 9, 9) for name in METRICS}
    *_, record = judge(everything_better, everything_better, {}, seen, forced=everything_better)
    where = f"; it is in the training rows ({', '.join(seen)})" if seen else ""
    assert record["claim"] == ARTICLE_CLAIM
    assert record["verdict"] == f"can't tell: one question says nothing about others{where}"


def test_the_table_has_a_line_for_every_claim_with_its_verdict():
    table = claims_table(judge({"eval_loss": DOWN}, {}, {}))
    assert list(table.index) == [*(claim.text for claim in CLAIMS), ARTICLE_CLAIM]
    assert list(table.columns) == ["tested by", "result", "verdict"]
    assert table.loc[BY_METRIC["eval_loss"], "verdict"].startswith(HOLDS)
    beside = claims_table(judge({"eval_loss": DOWN}, {}, {}, forced={"thinking_words": DOWN}))
    assert list(beside.columns) == ["tested by", "result", "beside it", "verdict"]
    assert beside.loc[BY_METRIC["eval_loss"], "beside it"] == ""


def test_records_of_earlier_runs_are_tabulated_and_read_too():
    old = {"claim": "c", "tested_by": "t", "result": "r", "verdict": "does not hold: x differs by less than 5"}
    assert claims_table([old]).loc["c"].tolist() == ["t", "r", old["verdict"]]
    assert [outcome(old | {"verdict": text}) for text in ("holds", "can't tell with 3 questions", old["verdict"])] == [
        *(HOLDS, CANNOT_TELL, DOES_NOT)
    ]
