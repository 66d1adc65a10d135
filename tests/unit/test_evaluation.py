"""The numbers: losses against the model's own, intervals against known truth, verdicts against known differences."""

from __future__ import annotations

import numpy as np
import pytest

from medcot_utils import data
from medcot_utils.config import load_config
from medcot_utils.evaluation import (
    METRICS,
    answer_columns,
    compare,
    conclusions,
    format_interval,
    interval,
    is_bullet_list,
    metrics_table,
    rouge_l,
    row_losses,
    verdict,
)

CONFIG = load_config("smoke", ["model.load_in_4bit=false"])
SETTINGS = CONFIG.evaluation  # 95 %, 500 resamples


# --- held-out loss -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_and_rows():
    from medcot_utils.engines import get_engine

    model, tokenizer = get_engine(CONFIG.model).load(CONFIG.model)
    rows = data.add_text_column(data.load_rows(CONFIG.dataset).select(range(7)), tokenizer.eos_token)
    rows, _ = data.tokenize_rows(rows, tokenizer, CONFIG.dataset, 1024, True)
    assert len({len(ids) for ids in rows["input_ids"]}) > 3, "rows of one length would hide a padding fault"
    return model, rows


@pytest.mark.model
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_row_losses_are_the_models_own_whatever_the_batch(model_and_rows, batch_size):
    import torch

    model, rows = model_and_rows
    records = row_losses(model, rows, batch_size, "base")
    assert [record["id"] for record in records] == rows["id"]
    for record, row in zip(records, rows, strict=True):
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            own = model.eval()(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        assert record["tokens"] == int((labels[:, 1:] != -100).sum()) < len(row["input_ids"]) - 1
        assert record["nll"] / record["tokens"] == pytest.approx(float(own), abs=1e-4)
        assert record["model"] == "base"


# --- intervals -----------------------------------------------------------------------------------------------------


def test_the_interval_of_known_data():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = interval(np.mean, [values], SETTINGS, 0)
    assert (found["value"], found["n"]) == (3.0, 5)
    # The bootstrap's standard error is sqrt(2 / 5): 1.96 of them on either side.
    assert found["low"] == pytest.approx(3 - 1.24, abs=0.25) and found["high"] == pytest.approx(3 + 1.24, abs=0.25)


def test_one_question_has_a_value_and_no_interval():
    assert interval(np.mean, [np.array([4.0])], SETTINGS, 0) == {"value": 4.0, "low": None, "high": None, "n": 1}


def test_the_interval_is_the_same_with_the_same_seed_and_wider_with_more_confidence():
    values = np.random.default_rng(3).normal(size=40)
    narrow = interval(np.mean, [values], SETTINGS, 5)
    assert narrow == interval(np.mean, [values], SETTINGS, 5)
    wide = interval(np.mean, [values], SETTINGS.model_copy(update={"confidence_level": 0.99}), 5)
    assert wide["high"] - wide["low"] > 1.1 * (narrow["high"] - narrow["low"])


def test_the_interval_of_a_share_stays_between_0_and_1():
    one_in_ten = interval(np.mean, [np.array([1.0] + [0.0] * 9)], SETTINGS, 0)
    nine_in_ten = interval(np.mean, [np.array([0.0] + [1.0] * 9)], SETTINGS, 0)
    assert one_in_ten["low"] == 0 and 0.2 <= one_in_ten["high"] <= 0.4
    assert nine_in_ten["high"] == 1 and 0.6 <= nine_in_ten["low"] <= 0.8


def test_a_95_percent_interval_covers_the_truth_about_95_times_in_100():
    truth, samples = 2.0, 400
    generator = np.random.default_rng(3407)
    hits = 0
    for index in range(samples):
        found = interval(np.mean, [generator.normal(truth, 3.0, size=60)], SETTINGS, index)
        hits += found["low"] <= truth <= found["high"]
    assert 0.93 <= hits / samples <= 0.97


# --- compare -------------------------------------------------------------------------------------------------------


def answers(n=30, well_formed=0, bullets=0, shift=0, text="the mitral valve"):
    spread = np.random.default_rng(1).integers(20, 400, size=n)
    return [
        {
            "id": f"q{i}",
            "well_formed": i < well_formed,
            "finished": True,
            "thinking": "so",
            "answer": "- one\n- two" if i < bullets else text,
            "thinking_tokens": int(spread[i]) + shift,
            "answer_tokens": 5,
        }
        for i in range(n)
    ]


def losses(base=2.0, tuned=2.0, n=30):
    tokens = np.random.default_rng(2).integers(50, 300, size=n)
    pairs = (("base", base), ("tuned", tuned))
    return [
        {"model": label, "id": f"q{i}", "nll": float(tokens[i] * value), "tokens": int(tokens[i])}
        for label, value in pairs
        for i in range(n)
    ]


def compared(base, tuned, held_out=None, references=None):
    return compare(base, tuned, references or ["the mitral valve"] * len(base), held_out or losses(), SETTINGS, 7)


def test_identical_answers_differ_by_nothing_and_nothing_is_claimed():
    metrics = compared(answers(well_formed=12), answers(well_formed=12))
    assert set(metrics) == set(METRICS)
    for name, metric in metrics.items():
        assert (metric["difference"]["value"], metric["difference"]["low"], metric["difference"]["high"]) == (0, 0, 0)
        assert verdict(name, metric) == "no difference shown with 30 questions"
    assert "**Shown**, the interval of the difference lies clear of zero:\n\n- nothing" in conclusions(metrics)


def test_a_true_rise_of_a_rate_rose_and_is_better():
    metrics = compared(answers(well_formed=3), answers(well_formed=27))
    assert metrics["closed_think_rate"]["difference"]["value"] == pytest.approx(0.8)
    assert verdict("closed_think_rate", metrics["closed_think_rate"]) == "rose, better"
    back = compared(answers(well_formed=27), answers(well_formed=3))
    assert verdict("closed_think_rate", back["closed_think_rate"]) == "fell, worse"


def test_a_lower_loss_fell_and_is_better_and_perplexity_is_its_exponential():
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


def test_answers_to_other_questions_are_refused():
    tuned = answers()
    tuned[4]["id"] = "another"
    with pytest.raises(ValueError, match="different questions"):
        compared(answers(), tuned)
    with pytest.raises(ValueError, match="different questions"):
        compared(answers(), answers()[::-1])


def test_a_list_without_a_closed_tag_is_a_list_too():
    record = answers(1)[0] | {"answer": "", "thinking": "1. fever\n2. rash"}
    assert answer_columns([record], ["x"])["bullet_rate"].tolist() == [1.0]


def test_conclusions_say_what_was_shown_and_never_claim_what_was_not():
    metrics = compared(answers(well_formed=3, bullets=9), answers(well_formed=27, bullets=10))
    shown, rest = conclusions(metrics).split("**Not shown**")
    assert f"{METRICS['closed_think_rate'][0]} **rose, better**, from 0.10 [" in shown
    assert METRICS["bullet_rate"][0] not in shown and METRICS["eval_loss"][0] not in shown
    not_shown, never = rest.split("**Not tested**")
    assert f"{METRICS['bullet_rate'][0]}: no difference shown with 30 questions" in not_shown
    assert "rose" not in not_shown and "fell" not in not_shown and "better" not in not_shown
    assert "medically right" in never


def test_the_table_has_a_line_for_every_metric_with_its_verdict():
    table = metrics_table(compared(answers(well_formed=3), answers(well_formed=27)))
    assert len(table) == len(METRICS)
    assert table.loc["one </think>, text on both sides (share)", "verdict"] == "rose, better"


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("- aspirin\n- rest", True),
        ("Do this:\n\n1. aspirin\n2) rest", True),
        ("  • aspirin\n  * rest", True),
        ("- aspirin only", False),
        ("", False),
        ("A dose of 2.5 mg - not more -\nand rest for 3-4 days", False),
        ("-not a bullet\n-nor this", False),
        ("**bold**\n**bolder**", False),
        ("- \n- ", False),
    ],
)
def test_a_bullet_list_is_two_lines_with_a_bullet_or_a_number(answer, expected):
    assert is_bullet_list(answer) is expected


def test_rouge_l_is_1_for_equal_texts_0_for_unlike_or_empty_ones_and_between_otherwise():
    text = "The mitral valve is most often affected"
    assert rouge_l(text, text) == 1
    assert rouge_l("", text) == 0 and rouge_l("kidney stones hurt", text) == 0
    assert rouge_l("The mitral valve", text) == pytest.approx(2 * 1 * (3 / 7) / (1 + 3 / 7))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ((1.2345, 1.1, 1.399), "1.23 [1.10, 1.40]"),
        ((-0.005, -0.011, 0.004), "-0.01 [-0.01, 0.00]"),
        ((12.34, 9.95, 15.0), "12.3 [9.9, 15.0]"),
        ((-123.4, -150.5, -99.9), "-123 [-150, -100]"),
        ((0.5, None, None), "0.50"),
        ((250.4, None, None), "250"),
    ],
)
def test_an_interval_is_written_with_digits_to_suit_its_size(entry, expected):
    assert format_interval(dict(zip(("value", "low", "high"), entry, strict=True))) == expected
