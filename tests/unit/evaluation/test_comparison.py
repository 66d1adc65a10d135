"""The numbers: intervals and tests against known truth, verdicts against known differences."""

from __future__ import annotations

import re

import numpy as np
import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.comparison import (
    compare,
    compare_all,
    compare_sampled,
    conclusions,
    is_shown,
    metrics_table,
    needed_table,
    verdict,
)
from medcot_utils.evaluation.intervals import questions_needed
from medcot_utils.evaluation.metrics import METRICS, answer_columns
from medcot_utils.evaluation.scored_set import pair_answers

CONFIG = load_config("smoke", ["model.load_in_4bit=false"])
SETTINGS = CONFIG.evaluation  # 95 %, 500 resamples
COMPARED = {name for name in METRICS if not name.startswith(("mcq_", "embedding_"))}


# --- compare -------------------------------------------------------------------------------------------------------


def answers(n=30, well_formed=0, bullets=0, shift=0, text="the mitral valve"):
    spread = np.random.default_rng(1).integers(20, 400, size=n)
    return [
        {
            "id": f"q{i}",
            "closed": int(i < well_formed),
            "well_formed": i < well_formed,
            "finished": True,
            "thinking": "so",
            "answer": "- one\n- two" if i < bullets else text,
            "thinking_tokens": int(spread[i]) + shift,
            "answer_tokens": 5,
        }
        for i in range(n)
    ]


def paired(base, tuned, reference="the mitral valve"):
    return all_answered({"base": base, "tuned": tuned}, reference)


def all_answered(given, reference="the mitral valve"):
    """Questions with the greedy answers of several models."""
    asked = [{"id": record["id"], "Question": "Which valve?", "Response": reference} for record in next(iter(given.values()))]
    return pair_answers(asked, {label: [r | {"sample": 0} for r in records] for label, records in given.items()})


def all_sampled(base, tuned):
    """Questions with samples of two models; `base[k]` holds sample k of every question."""
    given = {"base": base, "tuned": tuned}
    answers = {
        label: [r | {"sample": k} for k, records in enumerate([samples[0], *samples]) for r in records]
        for label, samples in given.items()
    }
    return pair_answers([{"id": record["id"], "Question": "Which valve?", "Response": "x"} for record in base[0]], answers)


def losses(base=2.0, tuned=2.0, n=30):
    tokens = np.random.default_rng(2).integers(50, 300, size=n)
    pairs = (("base", base), ("tuned", tuned))
    return [
        {"model": label, "id": f"q{i}", "nll": float(tokens[i] * value), "tokens": int(tokens[i])}
        for label, value in pairs
        for i in range(n)
    ]


def compared(base, tuned, held_out=None):
    return compare(paired(base, tuned), held_out or losses(), SETTINGS, 7)


def test_identical_answers_show_no_difference_and_no_claim():
    metrics = compared(answers(well_formed=12), answers(well_formed=12))
    assert set(metrics) == COMPARED
    for name, metric in metrics.items():
        width = metric["difference"]["high"] - metric["difference"]["low"]
        assert metric["difference"]["value"] == 0 and (width > 0 if METRICS[name].yes_or_no else width == 0)
        assert metric["difference"]["needed"] is None and metric["difference"].get("p", 1) == 1
        what = "held-out rows" if name in ("eval_loss", "perplexity") else "questions"
        assert verdict(name, metric) == f"no difference shown with 30 {what}"
    assert "**Shown**: the interval of the difference excludes zero:\n\n- nothing" in conclusions(metrics)


def test_a_true_rise_of_a_rate_rose_and_is_better():
    metrics = compared(answers(well_formed=3), answers(well_formed=27))
    assert metrics["closed_think_rate"]["difference"]["value"] == pytest.approx(0.8)
    assert verdict("closed_think_rate", metrics["closed_think_rate"]) == "rose, better"
    back = compared(answers(well_formed=27), answers(well_formed=3))
    assert verdict("closed_think_rate", back["closed_think_rate"]) == "fell, worse"


def test_a_lower_loss_is_better_and_perplexity_its_exponential():
    metrics = compared(answers(), answers(), losses(base=2.0, tuned=1.5))
    assert metrics["eval_loss"]["base"]["value"] == pytest.approx(2.0)
    assert verdict("eval_loss", metrics["eval_loss"]) == "fell, better"
    assert metrics["perplexity"]["tuned"]["value"] == pytest.approx(np.exp(1.5))


def test_the_loss_is_per_token_and_not_per_row():
    held_out = [
        {"model": label, "id": name, "nll": nll, "tokens": tokens}
        for label in ("base", "tuned")
        for name, nll, tokens in (("a", 10.0, 10), ("b", 270.0, 90))
    ]
    metrics = compared(answers(2), answers(2), held_out)
    assert metrics["eval_loss"]["base"]["value"] == pytest.approx(2.8)


def test_both_answers_to_a_question_stay_together():
    # Lengths vary by hundreds from question to question, the tuned model is longer by 3 on each: only pairing shows that.
    metric = compared(answers(), answers(shift=3))["thinking_tokens"]
    assert metric["base"]["high"] - metric["base"]["low"] > 50
    assert (metric["difference"]["low"], metric["difference"]["high"]) == (pytest.approx(3), pytest.approx(3))
    assert verdict("thinking_tokens", metric) == "rose", "length is neither better nor worse"


def test_only_yes_or_no_metrics_have_an_exact_p_value():
    metrics = compared(answers(well_formed=3), answers(well_formed=27))
    assert {name for name, metric in metrics.items() if "p" in metric["difference"]} == {
        name for name in COMPARED if METRICS[name].yes_or_no
    }
    assert metrics["closed_think_rate"]["difference"]["p"] == pytest.approx(2 / 2**24)
    strict = SETTINGS.model_copy(update={"confidence_level": 0.99})
    found = compare(paired(answers(6), answers(6, well_formed=6)), [], strict, 7)["closed_think_rate"]
    assert (found["difference"]["p"], found["difference"]["alpha"]) == (2 / 64, 0.01)
    assert found["difference"]["low"] > 0, "only the exact test does not show it, so the verdict names it"
    assert verdict("closed_think_rate", found) == "no difference shown with 6 questions; McNemar's exact p is 0.031"


def test_three_changed_questions_prove_nothing_but_six_do():
    three = compare(paired(answers(3), answers(3, well_formed=3)), [], SETTINGS, 7)["closed_think_rate"]
    assert (three["difference"]["value"], three["difference"]["high"], three["difference"]["p"]) == (1, 1, 0.25)
    assert verdict("closed_think_rate", three) == "no difference shown with 3 questions; at least 6 are needed"
    six = compare(paired(answers(6), answers(6, well_formed=6)), [], SETTINGS, 7)["closed_think_rate"]
    assert verdict("closed_think_rate", six) == "rose, better"


def test_three_questions_show_nothing_of_a_length_either():
    # Three differences of one sign come up once in four where nothing has changed, as three changed answers do.
    tuned = answers(3)
    for record, more in zip(tuned, (5, 9, 14), strict=True):
        record["thinking_tokens"] += more
    found = compare(paired(answers(3), tuned), [], SETTINGS, 7)["thinking_tokens"]
    assert verdict("thinking_tokens", found) == "no difference shown with 3 questions; at least 6 are needed"


def test_one_question_is_compared_without_intervals():
    metrics = compare(paired(answers(1), answers(1, well_formed=1, shift=4)), losses(2.0, 1.5, 1), SETTINGS, 7)
    assert metrics["thinking_tokens"]["difference"] == {
        "value": 4,
        "low": None,
        "high": None,
        "n": 1,
        "spread": 0,
        "needed": None,
    }
    assert metrics["eval_loss"]["difference"]["value"] == pytest.approx(-0.5)
    assert {verdict(name, metric) for name, metric in metrics.items()} == {
        f"no difference shown with 1 {what}; at least 6 are needed" for what in ("question", "held-out row")
    }


def test_needed_follows_from_the_difference_and_spread_found():
    base, tuned = answers(), answers()
    changes = np.random.default_rng(4).normal(2, 20, size=30).round()
    for record, change in zip(tuned, changes, strict=True):
        record["thinking_tokens"] += int(change)
    found = compared(base, tuned)["thinking_tokens"]["difference"]
    assert found["needed"] == questions_needed(np.std(changes, ddof=1), changes.mean()) > 30
    text = conclusions(compared(base, tuned))
    assert f"a difference of that size takes about {found['needed']:,} questions" in text


def test_needed_rows_for_a_loss_and_its_perplexity_are_equal():
    held_out = losses(2.0, 2.0)
    changes = np.random.default_rng(5).normal(-0.05, 0.3, size=30)
    for record, change in zip(held_out[30:], changes, strict=True):
        record["nll"] += change * record["tokens"]
    metrics = compared(answers(), answers(), held_out)
    found = metrics["eval_loss"]["difference"]
    assert found["needed"] == questions_needed(np.std(changes, ddof=1), found["value"]) > 2
    assert metrics["perplexity"]["difference"]["needed"] == found["needed"]


def test_without_losses_the_two_metrics_of_them_are_left_out():
    metrics = compare(paired(answers(), answers()), [], SETTINGS, 7)
    assert set(metrics) == COMPARED - {"eval_loss", "perplexity"}


def test_answers_to_other_questions_are_refused():
    tuned = answers()
    tuned[4]["id"] = "another"
    with pytest.raises(ValueError, match="different questions"):
        compared(answers(), tuned)
    with pytest.raises(ValueError, match="different questions"):
        compared(answers(), answers()[::-1])


def test_a_list_without_a_closed_tag_is_a_list_too():
    record = answers(1)[0] | {"answer": "", "thinking": "1. fever\n2. rash"}
    assert answer_columns([record], [{"Question": "q", "Response": "x"}])["bullet_rate"].tolist() == [1.0]


def test_conclusions_claim_only_what_was_shown():
    metrics = compared(answers(well_formed=3, bullets=9), answers(well_formed=27, bullets=10))
    shown, rest = conclusions(metrics).split("**Not shown**")
    assert f"{METRICS['closed_think_rate'].label} **rose, better**, from 0.10 [" in shown
    assert METRICS["bullet_rate"].text not in shown and METRICS["eval_loss"].text not in shown
    not_shown, never = rest.split("**Not tested**")
    assert f"{METRICS['bullet_rate'].label}: no difference shown with 30 questions" in not_shown
    assert "rose" not in not_shown and "fell" not in not_shown and "better" not in not_shown
    assert "medically right" in never


def test_the_table_has_a_line_for_every_metric_with_its_verdict():
    table = metrics_table(compared(answers(well_formed=3), answers(well_formed=27)))
    assert len(table) == len(COMPARED) and table.index.is_unique
    assert table.loc[METRICS["closed_think_rate"].label, "verdict"] == "rose, better"


@pytest.mark.parametrize(("high", "said"), [(0.004, "rose by less than 0.005"), (0.006, "rose, worse")])
def test_a_difference_shown_as_zero_is_neither_better_nor_worse(high, said):
    estimate = {"value": 0.002, "low": 0.001, "high": high, "n": 40}
    shown = {"base": estimate, "tuned": estimate, "difference": estimate | {"needed": None, "spread": 0.1}}
    assert verdict("eval_loss", shown) == said


def test_the_needed_table_has_found_and_given_differences():
    metrics = compared(answers(well_formed=3), answers(well_formed=9))
    table = needed_table(metrics, 0.95, sizes=(0.2, 0.1))
    closed = table.loc[METRICS["closed_think_rate"].label]
    assert closed["found"] == "0.20" and closed["for that"] == str(metrics["closed_think_rate"]["difference"]["needed"])
    assert closed["for that"] == closed["for 0.20"] and int(closed["for 0.20"]) < int(closed["for 0.10"])
    assert [text == "" for text in table.loc[METRICS["bullet_rate"].label]] == [False, True, False, False]
    assert "," in needed_table(metrics, 0.95, sizes=(0.01,)).loc[METRICS["closed_think_rate"].label, "for 0.01"]
    assert METRICS["thinking_words"].label not in table.index, "words are on no scale from 0 to 1"


# --- several models, several samples -------------------------------------------------------------------------------


def test_any_number_of_models_are_each_compared_with_the_first():
    given = {"plain": answers(), "short": answers(shift=-9), "long": answers(shift=30, well_formed=20)}
    held_out = [
        record | {"model": {"base": "plain", "tuned": label}[record["model"]]}
        for label, value in (("short", 1.5), ("long", 2.5))
        for record in losses(2.0, value)
        if label == "short" or record["model"] == "tuned"
    ]
    found = compare_all(all_answered(given), held_out, SETTINGS, 7)
    assert list(found) == ["short", "long"]
    assert found["short"] == compare(paired(given["plain"], given["short"]), losses(2.0, 1.5), SETTINGS, 7)
    assert found["long"] == compare(paired(given["plain"], given["long"]), losses(2.0, 2.5), SETTINGS, 7)
    assert found["long"]["eval_loss"]["difference"]["value"] == pytest.approx(0.5)


def test_a_model_without_losses_is_compared_by_its_answers_alone():
    given = {"base": answers(), "one": answers(), "other": answers()}
    held_out = [r | {"model": r["model"].replace("tuned", "one")} for r in losses()]
    found = compare_all(all_answered(given), held_out, SETTINGS, 7)
    assert set(found["one"]) == COMPARED and set(found["other"]) == COMPARED - {"eval_loss", "perplexity"}


def sample(lengths, **changes):
    return [record | {"thinking": "word " * int(n)} | changes for record, n in zip(answers(len(lengths)), lengths, strict=True)]


def test_of_several_samples_each_question_counts_with_its_mean():
    base, tuned = [sample([2, 10]), sample([4, 20])], [sample([9, 11]), sample([11, 21])]
    found = compare_sampled(all_sampled(base, tuned), SETTINGS, 7)
    words = found["thinking_words"]
    assert (words["base"]["value"], words["tuned"]["value"], words["difference"]["n"]) == (9, 13, 2)
    # The means of the two questions rose by 7 and by 1: what is resampled lies between them.
    assert (words["difference"]["low"], words["difference"]["high"]) == (1, 7)
    assert set(found) == COMPARED - {"eval_loss", "perplexity"}, "a loss has no samples"


def test_one_sample_is_compared_as_the_greedy_answers_are():
    base, tuned = answers(well_formed=3), answers(well_formed=27)
    found = compare_sampled(all_sampled([base], [tuned]), SETTINGS, 7)
    assert found == compare(paired(base, tuned, "x"), [], SETTINGS, 7)


def test_more_samples_do_not_replace_more_questions():
    generator = np.random.default_rng(11)

    def width(n_questions, n_samples):
        # Questions differ by 60 words, the samples of one question by 10.
        usual = generator.normal(200, 60, size=n_questions)
        samples = [sample(generator.normal(usual, 10).clip(1)) for _ in range(n_samples)]
        words = compare_sampled(all_sampled(samples, samples), SETTINGS, 7)["thinking_words"]["base"]
        return words["high"] - words["low"]

    few, sampled, many = width(16, 1), width(16, 16), width(256, 1)
    assert sampled > 0.6 * few, "16 answers to each of 16 questions are no 256 questions"
    assert many < 0.4 * few


def test_three_questions_show_nothing_at_any_number_of_samples():
    base, tuned = ([sample([5] * 3, well_formed=closed)] * 4 for closed in (False, True))
    found = compare_sampled(all_sampled(base, tuned), SETTINGS, 7)["closed_think_rate"]
    assert verdict("closed_think_rate", found) == "no difference shown with 3 questions; at least 6 are needed"


def test_samples_must_match_the_questions_and_their_number():
    with pytest.raises(ValueError, match="different questions"):
        all_sampled([answers(), answers()], [answers(), answers()[::-1]])
    with pytest.raises(ValueError, match="numbers of samples"):
        all_sampled([answers(), answers()], [answers()])


# --- lengths that were cut -----------------------------------------------------------------------------------------


def lengths(words, unfinished=0, n=20):
    """Answers of so many words, thinking included; the first are cut in their answer."""
    return [
        record | {"thinking": "so " * (words - 3), "finished": i >= unfinished, "closed": 1, "well_formed": True}
        for i, record in enumerate(answers(n))
    ]


@pytest.mark.parametrize(
    ("base", "tuned", "expected", "shown"),
    [
        ((60, 0), (30, 0), "fell", ("60.0", "30.0", "-30.0")),
        ((60, 5), (30, 0), "fell", ("at least 60.0", "30.0", "at most -30.0")),
        ((60, 0), (30, 5), "can't tell: 5 of 20 tuned answers were cut", ("60.0", "at least 30.0", "at least -30.0")),
        ((60, 5), (30, 5), "can't tell: 5 of 20 tuned answers were cut", ("at least 60.0", "at least 30.0", "-30.0")),
        ((30, 0), (60, 5), "rose", ("30.0", "at least 60.0", "at least 30.0")),
        ((30, 5), (60, 0), "can't tell: 5 of 20 base answers were cut", ("at least 30.0", "60.0", "at most 30.0")),
        ((30, 5), (30, 5), "no difference shown with 20 questions", ("at least 30.0", "at least 30.0", "0.00")),
    ],
)
def test_a_cut_length_is_a_bound_in_verdicts_and_tables(base, tuned, expected, shown):
    metrics = compare(paired(lengths(*base), lengths(*tuned)), [], SETTINGS, 7)
    metric = metrics["completion_words"]
    assert verdict("completion_words", metric) == expected
    assert is_shown("completion_words", metric) is (expected in ("fell", "rose"))
    assert metric.get("cut") == ({"base": base[1], "tuned": tuned[1], "answers": 20} if base[1] or tuned[1] else None)
    row = metrics_table(metrics).loc[METRICS["completion_words"].label]
    assert tuple(row[side].split(" [")[0] for side in ("base", "tuned", "difference")) == shown
    text = conclusions(metrics)
    assert (f"{METRICS['completion_words'].label} **{expected}**" in text) is (expected in ("fell", "rose"))
    # The thinking was whole, and only the answer's own length is cut with it.
    assert "cut" not in metrics["thinking_words"] and ("cut" in metrics["answer_words"]) is ("cut" in metric)


def test_of_samples_all_cut_answers_are_counted():
    base = [lengths(60, 5), lengths(60, 3)]
    found = compare_sampled(all_sampled(base, [lengths(30)] * 2), SETTINGS, 7)["completion_words"]
    assert found["cut"] == {"base": 8, "tuned": 0, "answers": 40} and verdict("completion_words", found) == "fell"


# --- two readings --------------------------------------------------------------------------------------------------


def test_a_metric_has_a_line_for_each_of_its_readings():
    natural = compared(answers(well_formed=3), answers(well_formed=27))
    forced = compare(paired(answers(well_formed=30), answers(well_formed=30)), [], SETTINGS, 7)
    table = metrics_table(natural, forced)
    assert table.columns.tolist() == ["base", "tuned", "difference", "verdict"]
    closed = table.loc[METRICS["closed_think_rate"].label]
    assert closed["verdict"].to_dict() == {
        "as they answer": "rose, better",
        "forced closing": "no difference shown with 30 questions",
    }
    assert list(table.index.unique("metric")) == list(metrics_table(natural).index)
    assert list(table.loc[METRICS["eval_loss"].label].index) == ["as they answer"], "the loss has one reading"


def test_conclusions_tell_both_readings_and_what_no_one_tests():
    natural = compared(answers(well_formed=3), answers(well_formed=27))
    forced = compare(paired(answers(well_formed=30), answers(well_formed=30)), [], SETTINGS, 7)
    first, second = conclusions(natural, forced).split("### Forced closing")
    assert first.startswith("### As they answer") and "**rose, better**" in first and "**rose, better**" not in second
    assert second.count("**Not tested** at all") == 1 == conclusions(natural).count("**Not tested** at all")
    assert not re.search(r"\[[^]]* [^]]*\]", first + second), "no interval can end a line"


# --- before a model is loaded --------------------------------------------------------------------------------------


def test_evaluation_needs_are_checked_before_a_model_is_loaded(tmp_path, monkeypatch):
    from medcot_utils.config import load_config
    from medcot_utils.evaluation.comparison import check_questions
    from medcot_utils.evaluation.mcq.run import McqError
    from medcot_utils.evaluation.metrics import MetricError

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (
        check_questions(load_config("smoke", ["evaluation.mcq_limit=4", "evaluation.mcq_tasks=[shipped, shipped]"]))
        == "8 multiple-choice questions; 112 of 120 are left unused (evaluation.mcq_limit is 4)"
    )
    assert check_questions(load_config("smoke", ["evaluation.mcq_tasks=[]"])) == "0 multiple-choice questions"
    with pytest.raises(McqError, match=r"nowhere\.jsonl"):
        check_questions(load_config("smoke", [f"evaluation.mcq_tasks=[{tmp_path / 'nowhere.jsonl'}]"]))
    with pytest.raises(MetricError, match="nowhere"):
        check_questions(load_config("smoke", [f"evaluation.embedding_model={tmp_path / 'nowhere'}"]))


# --- nothing, and no number ----------------------------------------------------------------------------------------


def test_of_nothing_compared_the_tables_are_empty_and_say_none():
    assert metrics_table({}).empty and metrics_table({}).columns.tolist() == ["base", "tuned", "difference", "verdict"]
    assert needed_table({}, 0.95).empty and "for 0.20" in needed_table({}, 0.95)
    assert needed_table({"eval_loss": compared(answers(), answers())["eval_loss"]}, 0.95).empty, "no metric from 0 to 1"
    assert "- nothing" in conclusions({})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_no_number_costs_no_other_result(value):
    metrics = compared(answers(well_formed=3), answers(well_formed=27), losses(tuned=value))
    assert verdict("closed_think_rate", metrics["closed_think_rate"]) == "rose, better"
    assert verdict("eval_loss", metrics["eval_loss"]) == "can't tell: not a finite number"
    assert metrics["eval_loss"]["difference"]["needed"] is None
    assert len(metrics_table(metrics)) == len(COMPARED) and "can't tell: not a finite number" in conclusions(metrics)


def test_a_perplexity_beyond_the_largest_float_is_infinite():
    metrics = compared(answers(), answers(), losses(base=800.0, tuned=900.0))
    assert metrics["perplexity"]["base"]["value"] == np.inf and metrics["eval_loss"]["difference"]["value"] > 0
    assert verdict("perplexity", metrics["perplexity"]) == "can't tell: not a finite number"
