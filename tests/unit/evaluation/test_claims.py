"""The article's claims: judged of models whose truth is known, from none that differs to one that was shifted on purpose."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.claims import ARTICLE_CLAIM, CLAIMS, DOES_NOT, HOLDS, SMALLEST, claims_table, judge
from medcot_utils.evaluation.comparison import compare
from medcot_utils.evaluation.mcq.scores import compare_mcq
from medcot_utils.evaluation.metrics import METRICS
from medcot_utils.evaluation.scored_set import score

CONFIG = load_config("smoke", ["model.load_in_4bit=false", "generation.max_new_tokens=12"])
SETTINGS = CONFIG.evaluation  # 95 %, 500 resamples
BY_METRIC = {next(iter(claim.expected)): claim.text for claim in CLAIMS}
QUESTIONS = 40  # as many as are held out of the shipped cases

REFERENCE = ["the", "mitral", "valve", "is", "most", "often", "affected", "by", "rheumatic", "fever"]
OTHER = ["kidney", "stones", "hurt", "so", "give", "him", "some", "water", "and", "wait"]
# How a model is at random: loss a row, words of thinking, shares of lists and of single paragraphs among what is no list,
# words taken from the reference, multiple-choice questions read and, of these, answered rightly, tags closed.
USUAL = {"loss": 2.0, "thinking": 60.0, "lists": 0.5, "single": 0.5, "likeness": 0.5, "read": 1.0, "right": 0.5, "closed": 1.0}
# What each claim says: how the base is, and how the tuned.
CLAIMED = {
    "eval_loss": ({}, {"loss": 1.7}),
    "thinking_words": ({}, {"thinking": 48.0}),
    "bullet_rate": ({"lists": 0.8}, {"lists": 0.2}),
    "one_paragraph_rate": ({"lists": 0.0, "single": 0.3}, {"lists": 0.0, "single": 0.8}),
    "completion_words": ({}, {"thinking": 48.0}),
    "rouge_l": ({}, {"likeness": 0.7}),
    "mcq_accuracy": ({}, {"right": 0.8}),
}


def drawn(seed, n=QUESTIONS, **truth):
    """What one model would give for `n` questions: (answers, losses as (nll, tokens), multiple choice)."""
    truth = USUAL | truth
    generator, rows = np.random.default_rng(seed), np.random.default_rng(n).integers(50, 300, size=n)
    answers, held_out, choices = [], [], []
    for index in range(n):
        # As many numbers are drawn whatever the truth is, so that the same seed gives the same but for the shift.
        noise, chance, words = generator.normal(size=2), generator.random(5), generator.random(len(REFERENCE))
        written = [ours if w < truth["likeness"] else other for w, ours, other in zip(words, REFERENCE, OTHER, strict=True)]
        first, second = " ".join(written[:5]), " ".join(written[5:])
        single = f"{first} {second}" if chance[1] < truth["single"] else f"{first}\n\n{second}"
        thinking = " ".join(map(str, range(max(1, round(truth["thinking"] + 10 * noise[0])))))
        answer = f"- {first}\n- {second}" if chance[0] < truth["lists"] else single
        closed, read = bool(chance[3] < truth["closed"]), bool(chance[4] < truth["read"])
        written_so = {"thinking": thinking, "answer": answer} if closed else {"thinking": f"{thinking} {answer}", "answer": ""}
        lengths = {"thinking_tokens": 1, "answer_tokens": 1}
        answers.append({"id": f"q{index}", "well_formed": closed, "finished": True} | written_so | lengths)
        held_out.append((rows[index] * (truth["loss"] + 0.4 * noise[1]), rows[index]))
        right = bool(read and chance[2] < truth["right"])
        choices.append({"task": "shipped", "id": f"m{index}", "correct": right, "abstained": not read})
    return answers, held_out, choices


def all_scored(base, tuned, questions=None):
    """A scored set of greedy answers, in which every question counts."""
    questions = questions or [{"id": record["id"], "scored": True, "Response": " ".join(REFERENCE)} for record in base]
    sides = ([record | {"sample": 0} for record in side] for side in (base, tuned))
    return score(questions, *sides, {"repeats": [], "repeats_dropped": True})


def judged(base, tuned, seed=7):
    """{the claim's first metric: verdict}, by the way that notebook 06 goes."""
    held_out = [
        {"model": label, "id": f"h{index}", "nll": float(nll), "tokens": int(tokens)}
        for label, side in (("base", base), ("tuned", tuned))
        for index, (nll, tokens) in enumerate(side[1])
    ]

    scored = all_scored(base[0], tuned[0])
    metrics = compare(scored.counted, held_out, SETTINGS, seed) | compare_mcq(base[2], tuned[2], set(), SETTINGS)
    all_answered = len(scored.answered) == len(scored.counted)
    answered = metrics if all_answered else compare(scored.answered, [], SETTINGS, seed)
    verdicts = {record["claim"]: record["verdict"] for record in judge(metrics, answered, {})}
    return {metric: verdicts[text] for metric, text in BY_METRIC.items()}


def has_no_effect(verdict):
    """Neither that something was gained nor that something was lost."""
    return verdict != HOLDS and "went the other way" not in verdict


# --- nothing changed -----------------------------------------------------------------------------------------------


def test_no_claim_holds_for_a_model_compared_with_itself():
    found = judged(drawn(1), drawn(1))
    assert all(map(has_no_effect, found.values()))
    assert found["eval_loss"] == f"{DOES_NOT}: held-out loss, per trained token differs by less than 0.01"
    assert found["mcq_accuracy"] == f"can't tell with {QUESTIONS} questions", "40 questions cannot rule out so little"


def test_claims_about_two_draws_hold_as_rarely_as_the_level_says():
    # A 95 % interval lies below zero by chance in 2 or 3 of 100, and above it as often; exact tests, claims of two metrics and
    # those of what most answers are err less. Of 200 pairs 5 are expected; 14 or more come up once in 1,000 such tests.
    pairs, held, against = 200, Counter(), Counter()
    for seed in range(pairs):
        for metric, verdict in judged(drawn(2 * seed), drawn(2 * seed + 1), seed).items():
            held[metric] += verdict == HOLDS
            against[metric] += "went the other way" in verdict
    print(f"by chance, of {pairs}: holds {dict(held)}, the other way {dict(against)}")
    assert max(held.values()) <= 13 and held.total() / pairs / len(BY_METRIC) < 0.035
    assert max(against.values()) <= 13


@pytest.mark.model
def test_no_claim_holds_for_a_real_model_with_a_zero_adapter():
    from medcot_utils import data
    from medcot_utils.models.engine import get_engine
    from medcot_utils.models.generation import answer_questions
    from medcot_utils.models.losses import row_losses
    from medcot_utils.models.records import by_sample

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
        scored = all_scored(before, after, questions)
        metrics = compare(scored.counted, base_losses + tuned_losses, SETTINGS, 7)
        loss, *others, unmeasured, _ = judge(metrics, metrics, metrics)  # as if all were answered in full form
        assert loss["verdict"].endswith("differs by less than 0.01")
        assert all(has_no_effect(record["verdict"]) for record in others)
        assert "not measured" in unmeasured["verdict"]


# --- something changed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", BY_METRIC)
def test_a_claim_holds_for_a_real_change_but_not_its_opposite(metric):
    base, tuned = (drawn(seed, 150, **truth) for seed, truth in enumerate(CLAIMED[metric]))
    assert judged(base, tuned)[metric] == HOLDS
    assert judged(tuned, base)[metric].startswith(f"{DOES_NOT}: ") and "went the other way" in judged(tuned, base)[metric]
    # Drawn from one seed, the two differ by the change alone, and no other claim is touched. (A list's dashes are letters and
    # words as well, and thinking is a part of all that is written.)
    alone = judged(*(drawn(1, 150, **truth) for truth in CLAIMED[metric]))
    form = {"bullet_rate", "one_paragraph_rate", "completion_words", "rouge_l"}
    touched = form if metric in form else {"thinking_words", "completion_words"} if metric == "thinking_words" else {metric}
    touched |= {"thinking_words"} if metric == "completion_words" else set()
    assert alone[metric] == HOLDS
    assert all(has_no_effect(alone[other]) for other in BY_METRIC if other not in touched)


@pytest.mark.parametrize("metric", BY_METRIC)
def test_three_questions_cannot_show_even_a_real_change(metric):
    base, tuned = (drawn(seed, 3, **truth) for seed, truth in enumerate(CLAIMED[metric]))
    assert judged(base, tuned)[metric].startswith("can't tell with 3 questions")


# --- what only looks like an effect --------------------------------------------------------------------------------


def test_no_answer_claim_holds_if_the_base_never_closes_its_tag():
    base, tuned = drawn(1, 100, closed=0.0, thinking=200.0), drawn(2, 100, thinking=40.0, lists=0.0, likeness=0.9)
    found = judged(base, tuned)
    of_answers = {next(iter(claim.expected)) for claim in CLAIMS if claim.of_answers}
    assert len(of_answers) == 5
    assert {found[metric] for metric in of_answers} == {"can't tell: no question was answered by both models"}
    few = judged(drawn(1, 100, closed=0.04, thinking=200.0), tuned)
    assert {few[metric].partition(" with ")[0] for metric in of_answers} == {"can't tell"}


def test_guessing_where_the_base_abstains_is_not_more_precise():
    guesses = drawn(2, 60, right=0.25)
    assert judged(drawn(1, 60, read=0.0), guesses)["mcq_accuracy"].startswith("can't tell")
    assert judged(drawn(1, 100, read=0.2, right=0.8), drawn(2, 100, right=0.4))["mcq_accuracy"] != HOLDS


def test_fewer_lists_prove_nothing_if_the_base_rarely_used_them():
    found = judged(drawn(1, 150, lists=0.3), drawn(2, 150, lists=0.0))["bullet_rate"]
    assert found == f"{DOES_NOT}: answers written as a list, base: fewer than half"


def test_lists_that_are_only_somewhat_fewer_are_lists_still():
    found = judged(drawn(1, 200, lists=1.0), drawn(2, 200, lists=0.85))["bullet_rate"]
    assert found == f"{DOES_NOT}: answers written as a list, tuned: more than half"


def test_a_difference_too_small_to_matter_is_none_however_clear():
    tiny = made(-2e-4, -3e-4, -1e-4, n=2000)
    assert verdict_of("eval_loss", {"eval_loss": tiny}).endswith("differs by less than 0.01")
    assert verdict_of("eval_loss", {"eval_loss": made(-0.008, -0.015, -0.001, n=50)}) == "can't tell with 50 questions"


def test_sampled_answers_that_disagree_leave_a_claim_undecided():
    metrics = {"thinking_words": made(-20.0, -30.0, -10.0)}
    claim = BY_METRIC["thinking_words"]
    for sampled, expected in (
        (20.0, "can't tell: length of the thinking went the other way in the sampled answers"),
        (-9.0, HOLDS),
    ):
        other = {"thinking_words": made(sampled, sampled - 5, sampled + 5)}
        found = {record["claim"]: record["verdict"] for record in judge(metrics, metrics, other)}
        assert found[claim] == expected


# --- verdicts from made-up numbers ---------------------------------------------------------------------------------


def made(value, low, high, n=20, **test):
    sides = {side: {"value": 1.0, "low": 0.9, "high": 1.1, "n": n} for side in ("base", "tuned")}
    return sides | {"difference": {"value": value, "low": low, "high": high, "n": n} | test}


def verdict_of(metric, metrics):
    return next(record["verdict"] for record in judge(metrics, metrics, {}) if record["claim"] == BY_METRIC[metric])


UP, DOWN, UNCLEAR = made(0.2, 0.1, 0.3), made(-0.2, -0.3, -0.1), made(0.2, -0.1, 0.5, n=12)


@pytest.mark.parametrize(
    ("rouge", "chrf", "expected"),
    [
        (UP, UP, HOLDS),
        (UP, UNCLEAR, "can't tell with 12 questions that both answered"),
        (UNCLEAR, UP, "can't tell with 12 questions that both answered"),
        (UP, DOWN, f"{DOES_NOT}: chrF of the answer against the reference went the other way"),
        (DOWN, UP, f"{DOES_NOT}: ROUGE-L of the answer against the reference went the other way"),
        (DOWN, UNCLEAR, f"{DOES_NOT}: ROUGE-L of the answer against the reference went the other way"),
        (UNCLEAR, UNCLEAR, "can't tell with 12 questions that both answered"),
        (UP, None, "can't tell: chrF of the answer against the reference: not measured"),
    ],
)
def test_a_claim_of_two_metrics_needs_both_and_falls_with_either(rouge, chrf, expected):
    assert verdict_of("rouge_l", {"rouge_l": rouge} | ({"chrf": chrf} if chrf else {})) == expected


def test_an_unclear_exact_test_keeps_a_claim_from_holding():
    def found(n, p):
        levels = {
            "base": {"value": 1.0, "low": 0.6, "high": 1.0, "n": n},
            "tuned": {"value": 0.0, "low": 0.0, "high": 0.4, "n": n},
        }
        return made(-1.0, -1.0, -0.6, n=n, p=p, alpha=0.05) | levels

    assert verdict_of("bullet_rate", {"bullet_rate": found(20, 0.25)}) == "can't tell with 20 questions that both answered"
    assert verdict_of("bullet_rate", {"bullet_rate": found(20, 0.03)}) == HOLDS


def test_of_one_question_without_an_interval_nothing_can_be_told():
    assert verdict_of("eval_loss", {"eval_loss": made(-2.0, None, None, n=1)}) == "can't tell with 1 questions"


def test_what_was_not_measured_is_said_to_be_so_for_every_claim():
    records = judge({}, {}, {})
    assert len(records) == len(CLAIMS) + 1
    for claim, record in zip(CLAIMS, records, strict=False):
        first = METRICS[next(iter(claim.expected))].text
        why = "no question was answered by both models" if claim.of_answers else f"{first}: not measured"
        assert (record["claim"], record["result"]) == (claim.text, "nothing to measure it on")
        assert record["verdict"] == f"can't tell: {why}"


def test_a_record_names_the_claims_test_and_its_outcome():
    measured = {"rouge_l": UP, "chrf": UP}
    record = next(r for r in judge({}, measured, {}) if r["claim"] == BY_METRIC["rouge_l"])
    among = "on the questions that both models answered"
    assert record["tested_by"] == f"{METRICS['rouge_l'].label}, {METRICS['chrf'].label} {among}"
    one = "1.00 [0.90, 1.10] to 1.00 [0.90, 1.10], difference 0.20 [0.10, 0.30]"
    assert record["result"] == f"{one}; {one}"


@pytest.mark.parametrize("seen", [(), ("row-0",), ("row-0", "row-77")])
def test_the_articles_question_alone_never_proves_its_claim(seen):
    everything_better = {name: made(-9, -9, -9) if METRICS[name].better < 0 else made(9, 9, 9) for name in METRICS}
    *_, record = judge(everything_better, everything_better, {}, seen)
    assert record["claim"] == ARTICLE_CLAIM and record["verdict"].startswith("can't tell: ")
    where = f"it stands in the training rows ({', '.join(seen)})" if seen else "it is one question"
    assert record["verdict"] == f"can't tell: {where}"


def test_every_claim_names_known_metrics_and_their_direction():
    assert set(BY_METRIC) == set(CLAIMED), "each claim has a shift of its own above"
    for claim in CLAIMS:
        for name, sign in claim.expected.items():
            assert METRICS[name].better in (0, sign), f"{claim.text}: {name}"
            assert SMALLEST[name] > 0


def test_the_table_has_a_line_for_every_claim_with_its_verdict():
    table = claims_table(judge({"eval_loss": DOWN}, {}, {}))
    assert list(table.index) == [*(claim.text for claim in CLAIMS), ARTICLE_CLAIM]
    assert list(table.columns) == ["tested by", "result", "verdict"]
    assert table.loc[BY_METRIC["eval_loss"], "verdict"] == HOLDS
