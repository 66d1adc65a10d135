"""The article's claims: judged of models whose truth is known, from none that differs to one that was shifted on purpose."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from made_up_claims import BY_METRIC, judged_record, made

from medcot_utils.config import load_config
from medcot_utils.evaluation.claims import ANSWERED, CLAIMS, judge, outcome
from medcot_utils.evaluation.comparison import FORCED, compare
from medcot_utils.evaluation.decisions import CANNOT_TELL, DOES_NOT, HOLDS, SMALLEST
from medcot_utils.evaluation.mcq.scores import compare_mcq
from medcot_utils.evaluation.metrics import METRICS
from medcot_utils.evaluation.paired import compare_shares
from medcot_utils.evaluation.scored_set import force_closing, score

CONFIG = load_config("smoke", ["model.load_in_4bit=false", "generation.max_new_tokens=12"])
SETTINGS = CONFIG.evaluation  # 95 %, 500 resamples
OF_ANSWERS = [next(iter(claim.expected)) for claim in CLAIMS if claim.of_answers]
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
    "mcq_letter": ({}, {"right": 0.8}),
}


def drawn(seed, n=QUESTIONS, cut=False, **truth):
    """What one model would give for `n` questions: (answers, losses as (nll, tokens), multiple choice).

    cut: whether thinking that was not closed ended at its budget; else its text ended without the tag."""
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
        answers.append(answered(f"q{index}", thinking, answer, closed, cut))
        held_out.append((rows[index] * (truth["loss"] + 0.4 * noise[1]), rows[index]))
        right = bool(chance[2] < truth["right"])
        choices.append(
            {"task": "shipped", "id": f"m{index}", "correct": read and right, "abstained": not read, "letter_right": right}
        )
    return answers, held_out, choices


def answered(name, thinking, answer, closed=True, cut=False):
    """A record with its forced answer. If the model did not close its thinking by itself, its own answer is empty."""
    closed_by = "itself" if closed else "budget" if cut else "end"
    return {
        "id": name,
        "completion": thinking,
        "thinking": thinking,
        "answer": answer if closed else "",
        "thinking_tokens": 1,
        "answer_tokens": 1,
        "closed": int(closed),
        "well_formed": closed,
        "finished": closed or not cut,
        "forced": {"closed_by": closed_by, "answer": answer, "answer_tokens": 1, "finished": True},
    }


def all_scored(base, tuned, questions=None):
    """A scored set of greedy answers, in which every question counts."""
    asked = {"scored": True, "Question": "Which valve?", "Response": " ".join(REFERENCE)}
    questions = questions or [asked | {"id": record["id"]} for record in base]
    sides = ([record | {"sample": 0} for record in side] for side in (base, tuned))
    return score(questions, *sides, {"repeats": [], "repeats_dropped": True})


def judged(base, tuned, seed=7, forced=True):
    """{the claim's first metric: verdict}, by the way that notebook 06 goes; without `forced` as in runs before it."""
    held_out = [
        {"model": label, "id": f"h{index}", "nll": float(nll), "tokens": int(tokens)}
        for label, side in (("base", base), ("tuned", tuned))
        for index, (nll, tokens) in enumerate(side[1])
    ]

    scored = all_scored(base[0], tuned[0])
    metrics = compare([], held_out, SETTINGS, seed) | compare_mcq(base[2], tuned[2], set(), SETTINGS)
    answered, named = compare(scored.answered, [], SETTINGS, seed), {}
    if forced:
        letters = [np.array([float(one["letter_right"]) for one in side[2]]) for side in (base, tuned)]
        metrics["mcq_letter"] = compare_shares(*letters, SETTINGS)
        all_answered = len(scored.answered) == len(scored.counted)
        named = {"forced": answered if all_answered else compare(force_closing(scored.counted), [], SETTINGS, seed)}
    verdicts = {record["claim"]: record["verdict"] for record in judge(metrics, answered, {}, **named)}
    return {metric: verdicts[text] for metric, text in BY_METRIC.items()}


def holds(verdict):
    return verdict.startswith(HOLDS)


def has_no_effect(verdict):
    """Neither that something was gained nor that something was lost."""
    return not holds(verdict) and "went the other way" not in verdict


# --- nothing changed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("forced", [True, False])
def test_no_claim_holds_for_a_model_compared_with_itself(closed, forced):
    same = drawn(1, closed=closed, cut=closed == 0)
    found = judged(same, same, forced=forced)
    assert all(map(has_no_effect, found.values()))
    rows = f"with {QUESTIONS} held-out rows"
    assert found["eval_loss"] == f"{DOES_NOT} {rows}: held-out loss, per trained token differs by less than 0.01"
    letters = found["mcq_letter"]
    assert not forced or letters.startswith(f"can't tell with {QUESTIONS} questions, the likeliest letter: it takes about "), (
        "0.01 is not ruled out"
    )


@pytest.mark.simulation
def test_claims_about_two_draws_hold_as_rarely_as_the_level_says():
    # A 95 % interval lies below zero by chance in 2 or 3 of 100, and above it as often; exact tests, claims of two metrics and
    # those of what most answers are err less. Of 200 pairs 5 are expected; 14 or more come up once in 1,000 such tests.
    pairs, held, against = 200, Counter(), Counter()
    for seed in range(pairs):
        draws = (drawn(2 * seed, 24, closed=0.7), drawn(2 * seed + 1, 24, closed=0.7))
        for metric, verdict in judged(*draws, seed).items():
            held[metric] += holds(verdict)
            against[metric] += verdict.startswith(DOES_NOT) and "went the other way" in verdict
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
        model = engine.for_inference(model)
        answers = answer_questions(model, tokenizer, questions, CONFIG.generation, True, 1, n_samples=2, answer_tokens=12)
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
        forced = compare(force_closing(scored.counted), [], SETTINGS, 7)
        lengths = [metrics["answer_tokens"]["base"]["value"], forced["answer_tokens"]["base"]["value"]]
        assert lengths[0] == 0 < lengths[1], "no answer by itself, one with forced closing"
        by_themselves = judge(metrics, metrics, metrics)  # as if all were answered in full form
        closed = judge(metrics, {}, metrics, forced=forced, sampled_forced=forced)
        assert [claim for claim, record in zip(CLAIMS, closed, strict=False) if FORCED in record["tested_by"]] == [
            claim for claim in CLAIMS if claim.of_answers
        ]
        for loss, *others, unmeasured, _ in (by_themselves, closed):
            assert loss["verdict"].endswith("differs by less than 0.01")
            assert all(has_no_effect(record["verdict"]) for record in others)
            assert "not measured" in unmeasured["verdict"]


# --- something changed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", BY_METRIC)
def test_a_claim_holds_for_a_real_change_but_not_its_opposite(metric):
    base, tuned = (drawn(seed, 150, closed=0.8, **truth) for seed, truth in enumerate(CLAIMED[metric]))
    assert holds(judged(base, tuned)[metric])
    back = judged(tuned, base)[metric]
    assert back.startswith(f"{DOES_NOT} with 150 ") and "went the other way" in back
    # Drawn from one seed, the two differ by the change alone, and no other claim is touched. (A list's dashes are letters and
    # words as well, and thinking is a part of all that is written.)
    alone = judged(*(drawn(1, 150, closed=0.8, **truth) for truth in CLAIMED[metric]))
    form = {"bullet_rate", "one_paragraph_rate", "completion_words", "rouge_l"}
    touched = form if metric in form else {"thinking_words", "completion_words"} if metric == "thinking_words" else {metric}
    touched |= {"thinking_words"} if metric == "completion_words" else set()
    assert holds(alone[metric])
    assert all(has_no_effect(alone[other]) for other in BY_METRIC if other not in touched)


@pytest.mark.parametrize("metric", BY_METRIC)
def test_three_questions_cannot_show_even_a_real_change(metric):
    base, tuned = (drawn(seed, 3, **truth) for seed, truth in enumerate(CLAIMED[metric]))
    found = judged(base, tuned)[metric]
    assert found.startswith("can't tell with 3 ") and found.endswith(": at least 6 are needed")


# --- two readings --------------------------------------------------------------------------------------------------


def test_a_base_that_never_closes_its_tag_is_judged_all_the_same():
    base = drawn(1, 100, closed=0.0, cut=True, lists=0.9, thinking=200.0)
    found = judged(base, drawn(2, 100, thinking=40.0, lists=0.0, single=0.9, likeness=0.9))
    assert {found[metric] for metric in OF_ANSWERS} == {"holds with 100 questions, forced closing"}
    # Without forced closing there is nothing to judge, as before.
    before = judged(base, drawn(2, 100), forced=False)
    assert {before[metric] for metric in OF_ANSWERS} == {"can't tell: no question was answered by both models"}
    few = judged(drawn(1, 100, closed=0.04, thinking=200.0), drawn(2, 100, thinking=40.0), forced=False)
    assert {few[metric].partition(" with ")[0] for metric in OF_ANSWERS} == {"can't tell"}


@pytest.mark.parametrize("metric", OF_ANSWERS)
def test_what_both_answered_themselves_must_not_contradict(metric):
    (sign,) = {sign for claim in CLAIMS if metric in claim.expected for sign in claim.expected.values()}
    names = next(claim.expected for claim in CLAIMS if metric in claim.expected)
    shares = {"base": {"value": 0.9, "low": 0.8, "high": 1.0, "n": 20}, "tuned": {"value": 0.1, "low": 0.0, "high": 0.2, "n": 20}}
    if sign > 0:
        shares = {"base": shares["tuned"], "tuned": shares["base"]}
    forced = {name: made(sign * 20, sign * 20 - 1, sign * 20 + 1) | shares for name in names}
    for beside, expected in ((sign * 9.0, HOLDS), (None, HOLDS), (-sign * 9.0, CANNOT_TELL)):
        answered = {} if beside is None else {name: made(beside, beside - 1, beside + 1, n=9) for name in names}
        record = judged_record(metric, judge({}, answered, {}, forced=forced))
        assert outcome(record) == expected and record["n"] == 20 and record["reading"].startswith("forced closing")
        none = f"no question was {ANSWERED}"
        assert (record["answered_result"] == none) is (beside is None)
        assert beside is None or record["answered_result"].startswith(f"the 9 {ANSWERED}: 1.00 [")
    text = METRICS[metric].text
    where = "on the questions that both answered by themselves"
    assert record["verdict"] == f"can't tell with 20 questions, forced closing: {text} went the other way {where}"


def test_sampled_answers_that_disagree_leave_a_claim_undecided():
    metrics = {"thinking_words": made(-20.0, -30.0, -10.0)}
    for sampled, expected in ((20.0, CANNOT_TELL), (-9.0, HOLDS)):
        other = {"thinking_words": made(sampled, sampled - 5, sampled + 5)}
        agreeing = {"thinking_words": made(-9.0, -14.0, -4.0)}
        for record in (
            judged_record("thinking_words", judge(metrics, metrics, other)),
            judged_record("thinking_words", judge({}, {}, agreeing, forced=metrics, sampled_forced=other)),
        ):
            assert outcome(record) == expected
            assert (expected == HOLDS) or record["verdict"].endswith("went the other way in the sampled answers")


# --- lengths that were cut -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "tuned", "value", "expected"),
    [
        (12, 0, -20.0, "holds with 20 questions, forced closing"),
        (12, 3, -20.0, "can't tell with 20 questions, forced closing: {}3 of 20 tuned answers{}"),
        (0, 1, -20.0, "can't tell with 20 questions, forced closing: {}1 of 20 tuned answers{}"),
        (0, 3, 20.0, "does not hold with 20 questions, forced closing: {text} went the other way"),
        (4, 0, 20.0, "can't tell with 20 questions, forced closing: {}4 of 20 base answers{}"),
        (4, 3, 20.0, "can't tell with 20 questions, forced closing: {}3 of 20 tuned answers{}"),
        (4, 0, -0.1, "can't tell with 20 questions, forced closing: {}4 of 20 base answers{}"),
        (0, 0, -0.1, "does not hold with 20 questions, forced closing: {text} differs by less than 5"),
    ],
)
@pytest.mark.parametrize("metric", ["thinking_words", "completion_words"])
def test_a_cut_length_is_a_bound_that_may_not_be_undone(metric, base, tuned, value, expected):
    found = made(value, value - 2, value + 2) | {"cut": {"base": base, "tuned": tuned, "answers": 20}}
    around = ("the thinking of ", " was cut") if metric == "thinking_words" else ("", " were cut")
    record = judged_record(metric, judge({}, {}, {}, forced={metric: found}))
    assert record["verdict"] == expected.format(*around, text=METRICS[metric].text)
    assert record["needed"] is None, "more questions would not tell"
    assert ("at least 1.00" in record["result"]) is (base + tuned > 0)


def test_thinking_cut_at_its_budget_shows_that_tuned_thinks_less():
    def at_budget(words, forced):
        cut = {"closed_by": "budget", "answer": "the mitral valve", "answer_tokens": 3, "finished": forced}
        return [answered(f"q{i}", "so " * words, "", closed=False, cut=True) | {"forced": cut} for i in range(20)]

    shorter = [answered(f"q{i}", "so " * (20 + i % 5), "the mitral valve") for i in range(20)]
    for base, tuned, thinking, everything in (
        (at_budget(60, True), shorter, HOLDS, HOLDS),
        (at_budget(60, False), shorter, HOLDS, HOLDS),
        (at_budget(60, True), at_budget(30, True), CANNOT_TELL, CANNOT_TELL),
        (shorter, at_budget(60, True), DOES_NOT, DOES_NOT),
    ):
        forced = compare(force_closing(all_scored(base, tuned).counted), [], SETTINGS, 7)
        found = judge({}, {}, {}, forced=forced)
        assert outcome(judged_record("thinking_words", found)) == thinking
        assert outcome(judged_record("completion_words", found)) == everything


# --- the loss and the 16-bit base ----------------------------------------------------------------------------------


def bars(rounding, learning, half=0.02):
    """Three bars of loss, the 4-bit base at 4.00; rounding and learning as `LossBars` has them."""

    def around(value, **more):
        return {"value": value, "low": value - half, "high": value + half, "n": 40} | more

    whole = 4.0 - rounding
    found = {"base_16bit": around(whole), "base": around(4.0), "tuned": around(whole + learning)}
    differences = {"rounding": around(rounding, spread=0.3, needed=9), "learning": around(learning, spread=0.3, needed=77)}
    return found | differences | {"share": around(rounding / (rounding - learning))}


@pytest.mark.parametrize(
    ("rounding", "learning", "half", "expected"),
    [
        (0.39, -0.42, 0.02, "holds with 40 held-out rows: below the 16-bit base too"),
        (0.81, 0.10, 0.02, "does not hold with 40 held-out rows: the tuned model stays above the 16-bit base"),
        (0.81, 0.001, 0.005, "does not hold with 40 held-out rows: tuned model and 16-bit base differ by less than 0.01: "),
        (
            0.79,
            -0.02,
            0.03,
            "can't tell with 40 held-out rows: it takes about 77 to show the difference found of 0.02",
        ),
        (
            0.81,
            0.02,
            0.03,
            "can't tell with 40 held-out rows: it takes about 7,064 to show a difference of 0.01",
        ),
    ],
)
def test_the_loss_must_fall_below_the_16_bit_base_too(rounding, learning, half, expected):
    metrics = {"eval_loss": made(-0.8, -0.9, -0.7, n=40)}
    record = judged_record("eval_loss", judge(metrics, {}, {}, losses=bars(rounding, learning, half)))
    assert record["verdict"].startswith(expected) and record["n"] == 40
    assert f"the 4-bit rounding had cost {rounding:.2f} of {rounding - learning:.2f}, " in record["result"]


def test_the_share_that_rounding_had_cost_stands_in_the_result():
    metrics = {"eval_loss": made(-0.8, -0.9, -0.7, n=40)}
    record = judged_record("eval_loss", judge(metrics, {}, {}, losses=bars(0.39, -0.42)))
    assert record["result"].endswith(
        "; 16-bit base 3.61 [3.59, 3.63]: the 4-bit rounding had cost 0.39 of 0.81, 48 % [46 %, 50 %]"
    )


def test_rounding_that_cost_nothing_has_no_sign():
    losses = bars(-0.001, -0.02) | {"share": {"value": -0.001, "low": -0.002, "high": 0.01, "n": 40}}
    record = judged_record("eval_loss", judge({"eval_loss": made(-0.8, -0.9, -0.7, n=40)}, {}, {}, losses=losses))
    assert record["result"].endswith("the 4-bit rounding had cost 0.00 of 0.02, 0 % [0 %, 1 %]")


def test_a_16_bit_base_that_was_not_measured_is_named():
    metrics = {"eval_loss": made(-0.8, -0.9, -0.7, n=40)}
    record = judged_record("eval_loss", judge(metrics, {}, {}))
    assert record["verdict"] == "holds with 40 held-out rows: below the 4-bit base; the 16-bit base was not measured"


# --- multiple choice -----------------------------------------------------------------------------------------------


def test_more_precise_is_judged_by_letters_and_not_contradicted():
    better, worse = made(0.2, 0.1, 0.3, n=60), made(-0.2, -0.3, -0.1, n=12)
    for beside, expected in (
        ({}, "holds with 60 questions, the likeliest letter"),
        ({"mcq_accuracy_answered": better, "mcq_likelihood": better}, "holds with 60 questions, the likeliest letter"),
        ({"mcq_accuracy_answered": worse}, "can't tell with 60 questions, the likeliest letter: {} went the other way"),
        ({"mcq_likelihood": worse}, "can't tell with 60 questions, the likeliest letter: {} went the other way"),
    ):
        record = judged_record("mcq_letter", judge({"mcq_letter": better} | beside, {}, {}))
        assert record["verdict"] == expected.format(METRICS[next(iter(beside), "mcq_letter")].text)
        assert all(METRICS[name].text in record["answered_result"] for name in beside)


def test_in_runs_without_letters_strict_readings_are_judged():
    better, worse, unclear = made(0.2, 0.1, 0.3), made(-0.2, -0.3, -0.1), made(0.2, -0.1, 0.5, spread=1.0, needed=40)
    for answered, expected in ((better, HOLDS), (worse, DOES_NOT), (unclear, CANNOT_TELL)):
        record = judged_record("mcq_letter", judge({"mcq_accuracy": better, "mcq_accuracy_answered": answered}, {}, {}))
        assert outcome(record) == expected and METRICS["mcq_accuracy"].label in record["tested_by"]


def test_guessing_where_the_base_abstains_is_not_more_precise():
    guesses = drawn(2, 60, right=0.25)
    assert judged(drawn(1, 60, read=0.0), guesses, forced=False)["mcq_letter"].startswith("can't tell")
    assert not holds(judged(drawn(1, 100, read=0.2, right=0.8), drawn(2, 100, right=0.4), forced=False)["mcq_letter"])
    assert not holds(judged(drawn(1, 100, read=0.2, right=0.8), drawn(2, 100, right=0.4))["mcq_letter"])


# --- what only looks like an effect --------------------------------------------------------------------------------


def test_fewer_lists_prove_nothing_if_the_base_rarely_used_them():
    found = judged(drawn(1, 150, lists=0.3), drawn(2, 150, lists=0.0))["bullet_rate"]
    assert found == f"{DOES_NOT} with 150 questions, forced closing: answers that are a list, base: fewer than half"


def test_lists_that_are_only_somewhat_fewer_are_lists_still():
    found = judged(drawn(1, 200, lists=1.0), drawn(2, 200, lists=0.85))["bullet_rate"]
    assert found == f"{DOES_NOT} with 200 questions, forced closing: answers that are a list, tuned: more than half"


def test_every_claim_names_known_metrics_and_their_direction():
    assert set(BY_METRIC) == set(CLAIMED), "each claim has a shift of its own above"
    for claim in CLAIMS:
        for name, sign in (*claim.expected.items(), *claim.before.items()):
            assert METRICS[name].better in (0, sign), f"{claim.text}: {name}"
            assert SMALLEST[name] > 0
