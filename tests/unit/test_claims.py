"""The article's claims: judged of models whose truth is known, from none that differs to one that was shifted on purpose."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from medcot_utils.claims import ARTICLE_CLAIM, CLAIMS, DOES_NOT, HOLDS, claims_table, judge
from medcot_utils.config import load_config
from medcot_utils.evaluation import compare
from medcot_utils.mcq import paired
from medcot_utils.measures import METRICS

CONFIG = load_config("smoke", ["model.load_in_4bit=false", "generation.max_new_tokens=12"])
SETTINGS = CONFIG.evaluation  # 95 %, 500 resamples
BY_METRIC = {next(iter(claim.expected)): claim.text for claim in CLAIMS}
QUESTIONS = 40  # as many as are held out of the shipped cases

REFERENCE = ["the", "mitral", "valve", "is", "most", "often", "affected", "by", "rheumatic", "fever"]
OTHER = ["kidney", "stones", "hurt", "so", "give", "him", "some", "water", "and", "wait"]
# How a model is at random: loss a row, words of thinking, shares of lists and of single paragraphs among what is no list,
# words taken from the reference, questions answered rightly. And the shift that each claim says of the tuned one.
USUAL = {"loss": 2.0, "thinking": 40.0, "lists": 0.4, "single": 0.5, "likeness": 0.5, "right": 0.5}
CLAIMED = {
    "eval_loss": {"loss": -0.3},
    "thinking_words": {"thinking": -6.0},
    "bullet_rate": {"lists": -0.3},
    "one_paragraph_rate": {"single": 0.4},
    "completion_words": {"thinking": -6.0},
    "rouge_l": {"likeness": 0.2},
    "mcq_accuracy": {"right": 0.3},
}


def drawn(seed, n=QUESTIONS, sign=1, **shift):
    """What one model would give for `n` questions: (answers, losses as (nll, tokens), multiple choice)."""
    truth = {name: value + sign * shift.get(name, 0) for name, value in USUAL.items()}
    generator, rows = np.random.default_rng(seed), np.random.default_rng(n).integers(50, 300, size=n)
    answers, held_out, choices = [], [], []
    for index in range(n):
        # As many numbers are drawn whatever the truth is, so that the same seed gives the same but for the shift.
        noise, chance, words = generator.normal(size=2), generator.random(3), generator.random(len(REFERENCE))
        written = [ours if w < truth["likeness"] else other for w, ours, other in zip(words, REFERENCE, OTHER, strict=True)]
        first, second = " ".join(written[:5]), " ".join(written[5:])
        single = f"{first} {second}" if chance[1] < truth["single"] else f"{first}\n\n{second}"
        answers.append(
            {
                "id": f"q{index}",
                "well_formed": True,
                "finished": True,
                "thinking": " ".join(map(str, range(max(1, round(truth["thinking"] + 10 * noise[0]))))),
                "answer": f"- {first}\n- {second}" if chance[0] < truth["lists"] else single,
                "thinking_tokens": 1,
                "answer_tokens": 1,
            }
        )
        held_out.append((rows[index] * (truth["loss"] + 0.4 * noise[1]), rows[index]))
        choices.append({"task": "shipped", "id": f"m{index}", "correct": chance[2] < truth["right"], "abstained": False})
    return answers, held_out, choices


def judged(base, tuned, seed=7):
    """{the claim's first metric: verdict}, by the way that notebook 06 goes."""
    held_out = [
        {"model": label, "id": f"h{index}", "nll": float(nll), "tokens": int(tokens)}
        for label, side in (("base", base), ("tuned", tuned))
        for index, (nll, tokens) in enumerate(side[1])
    ]
    metrics = compare(base[0], tuned[0], [" ".join(REFERENCE)] * len(base[0]), held_out, SETTINGS, seed)
    metrics["mcq_accuracy"] = paired(base[2], tuned[2], SETTINGS, seed)
    verdicts = {record["claim"]: record["verdict"] for record in judge(metrics)}
    return {metric: verdicts[text] for metric, text in BY_METRIC.items()}


# --- nothing changed -----------------------------------------------------------------------------------------------


def test_of_a_model_compared_with_itself_no_claim_can_be_told():
    model = drawn(1)
    assert judged(model, model) == dict.fromkeys(BY_METRIC, f"can't tell with {QUESTIONS} questions")


def test_of_two_draws_of_one_model_a_claim_holds_by_chance_about_as_rarely_as_the_level_allows():
    # A 95 % interval of 40 questions and 500 resamples lies below zero by chance in 3 of 100, and above it as often; exact
    # tests and claims of two metrics err less. Of 200 pairs 7 are expected; 14 or more come up once in 120 such tests.
    pairs, held, against = 200, Counter(), Counter()
    for seed in range(pairs):
        for metric, verdict in judged(drawn(2 * seed), drawn(2 * seed + 1), seed).items():
            held[metric] += verdict == HOLDS
            against[metric] += verdict == DOES_NOT
    print(f"by chance, of {pairs}: holds {dict(held)}, does not hold {dict(against)}")
    assert max(held.values()) <= 13 and held.total() / pairs / len(BY_METRIC) < 0.035
    assert max(against.values()) <= 13


@pytest.mark.model
def test_a_real_model_with_an_adapter_of_zeros_makes_no_claim_hold():
    from medcot_utils import data
    from medcot_utils.engines import get_engine
    from medcot_utils.generation import answer_questions, by_sample
    from medcot_utils.losses import row_losses

    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    cases = data.load_rows(CONFIG.dataset)
    rows = data.add_text_column(cases.select(range(6)), tokenizer.eos_token)
    rows, _ = data.tokenize_rows(rows, tokenizer, CONFIG.dataset, 1024, True)
    questions = data.choose_questions(cases.select(range(6, 12)), 6)[1:]

    def side(model, label):
        answers = answer_questions(engine.for_inference(model), tokenizer, questions, CONFIG.generation, True, 1, n_samples=2)
        return by_sample(answers), row_losses(model, rows, 3, label)

    base, base_losses = side(model, "base")
    tuned_model = engine.add_lora(model, CONFIG.lora)
    zeros = [weight for name, weight in tuned_model.named_parameters() if "lora_B" in name]
    assert len(zeros) >= 7 and not any(weight.any() for weight in zeros), "an adapter there is, and it changes nothing"
    tuned, tuned_losses = side(tuned_model, "tuned")
    assert len({record["completion"] for sample in base for record in sample}) > 12, "equal answers would compare nothing"
    for before, after in zip(base, tuned, strict=True):
        references = [question["Response"] for question in questions]
        records = judge(compare(before, after, references, base_losses + tuned_losses, SETTINGS, 7))
        measured, unmeasured = records[:-2], records[-2]
        assert {record["verdict"] for record in measured} == {"can't tell with 6 questions"}
        assert "was not measured" in unmeasured["verdict"]


# --- something changed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sign", "expected"), [(1, HOLDS), (-1, DOES_NOT)], ids=["as claimed", "the other way"])
@pytest.mark.parametrize("metric", BY_METRIC)
def test_of_a_model_that_was_truly_shifted_the_claim_holds_or_does_not(metric, sign, expected):
    assert judged(drawn(1, 150), drawn(2, 150, sign, **CLAIMED[metric]))[metric] == expected
    # Drawn from one seed, the two differ by the shift alone, and no other claim is touched. (A list's dashes are letters and
    # words as well, and thinking is a part of all that is written.)
    alone = judged(drawn(1, 150), drawn(1, 150, sign, **CLAIMED[metric]))
    form = {"bullet_rate", "one_paragraph_rate", "completion_words", "rouge_l"}
    touched = form if metric == "bullet_rate" else {other for other in CLAIMED if CLAIMED[other] == CLAIMED[metric]}
    assert alone[metric] == expected
    assert {alone[other] for other in BY_METRIC if other not in touched} == {"can't tell with 150 questions"}


@pytest.mark.parametrize("metric", BY_METRIC)
def test_three_questions_tell_nothing_even_of_a_model_that_was_truly_shifted(metric):
    far = {"loss": -1.0, "thinking": -30.0, "lists": -1.0, "single": 1.0, "likeness": 0.5, "right": 1.0}
    shift = {name: far[name] for name in CLAIMED[metric]}
    assert judged(drawn(1, 3, -1, **shift), drawn(2, 3, 1, **shift))[metric] == "can't tell with 3 questions"


# --- verdicts from made-up numbers ---------------------------------------------------------------------------------


def made(value, low, high, n=20, **test):
    sides = {side: {"value": 1.0, "low": 0.9, "high": 1.1, "n": n} for side in ("base", "tuned")}
    return sides | {"difference": {"value": value, "low": low, "high": high, "n": n} | test}


def verdict_of(metric, metrics):
    return next(record["verdict"] for record in judge(metrics) if record["claim"] == BY_METRIC[metric])


UP, DOWN, UNCLEAR = made(0.2, 0.1, 0.3), made(-0.2, -0.3, -0.1), made(0.2, -0.1, 0.5, n=12)


@pytest.mark.parametrize(
    ("rouge", "chrf", "expected"),
    [
        (UP, UP, HOLDS),
        (UP, UNCLEAR, "can't tell with 12 questions"),
        (UNCLEAR, UP, "can't tell with 12 questions"),
        (UP, DOWN, DOES_NOT),
        (DOWN, UP, DOES_NOT),
        (DOWN, UNCLEAR, DOES_NOT),
        (UNCLEAR, UNCLEAR, "can't tell with 12 questions"),
        (UP, None, "can't tell: chrF of the answer against the reference was not measured"),
    ],
)
def test_a_claim_of_two_metrics_needs_both_and_falls_with_either(rouge, chrf, expected):
    assert verdict_of("rouge_l", {"rouge_l": rouge} | ({"chrf": chrf} if chrf else {})) == expected


def test_an_exact_test_that_is_not_clear_keeps_a_claim_from_holding():
    without_width = made(-1.0, -1.0, -1.0, n=3, p=0.25, alpha=0.05)
    assert verdict_of("bullet_rate", {"bullet_rate": without_width}) == "can't tell with 3 questions"
    assert verdict_of("bullet_rate", {"bullet_rate": without_width | made(-1.0, -1.0, -1.0, n=6, p=0.03, alpha=0.05)}) == HOLDS


def test_of_one_question_without_an_interval_nothing_can_be_told():
    assert verdict_of("eval_loss", {"eval_loss": made(-2.0, None, None, n=1)}) == "can't tell with 1 questions"


def test_what_was_not_measured_is_said_to_be_so_for_every_claim():
    records = judge({})
    assert len(records) == len(CLAIMS) + 1
    for claim, record in zip(CLAIMS, records, strict=False):
        first = METRICS[next(iter(claim.expected))].text
        assert (record["claim"], record["result"]) == (claim.text, "not measured in this run")
        assert record["verdict"] == f"can't tell: {first} was not measured"


def test_a_record_says_by_what_a_claim_is_tested_and_what_came_out():
    record = next(r for r in judge({"rouge_l": UP, "chrf": UP}) if r["claim"] == BY_METRIC["rouge_l"])
    assert record["tested_by"] == f"{METRICS['rouge_l'].label}, {METRICS['chrf'].label}"
    one = "1.00 [0.90, 1.10] to 1.00 [0.90, 1.10], difference 0.20 [0.10, 0.30]"
    assert record["result"] == f"{one}; {one}"


@pytest.mark.parametrize("seen", [(), ("row-0",), ("row-0", "row-77")])
def test_the_articles_question_never_makes_its_claim_hold_and_the_training_rows_that_hold_it_are_named(seen):
    everything_better = {name: made(-9, -9, -9) if METRICS[name].better < 0 else made(9, 9, 9) for name in METRICS}
    *_, record = judge(everything_better, seen)
    assert record["claim"] == ARTICLE_CLAIM and record["verdict"].startswith("can't tell: ")
    where = f"it stands in the training rows ({', '.join(seen)})" if seen else "it is one question"
    assert record["verdict"] == f"can't tell: {where}"


def test_every_claim_names_metrics_that_exist_and_a_direction_that_agrees_with_what_is_better():
    assert set(BY_METRIC) == set(CLAIMED), "each claim has a shift of its own above"
    for claim in CLAIMS:
        for name, sign in claim.expected.items():
            assert METRICS[name].better in (0, sign), f"{claim.text}: {name}"


def test_the_table_has_a_line_for_every_claim_with_its_verdict():
    table = claims_table(judge({"eval_loss": DOWN}))
    assert list(table.index) == [*(claim.text for claim in CLAIMS), ARTICLE_CLAIM]
    assert list(table.columns) == ["tested by", "result", "verdict"]
    assert table.loc[BY_METRIC["eval_loss"], "verdict"] == HOLDS
