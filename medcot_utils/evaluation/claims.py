"""The article's claims about what its fine-tuning did, each with a test and a computed verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.evaluation.comparison import FORCED, count_of, format_side
from medcot_utils.evaluation.decisions import (
    CANNOT_TELL,
    DOES_NOT,
    HOLDS,
    Beside,
    Evidence,
    decide,
    decide_learning,
    describe_rounding,
    fewest,
)
from medcot_utils.evaluation.metrics import METRICS

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.evaluation.comparison import LossBars, Metrics
    from medcot_utils.evaluation.decisions import Outcome


@dataclass(frozen=True)
class Claim:
    """Hold a claim and the metrics that test it.

    expected: each metric must move this way (+1 up, -1 down) by SMALLEST or more.
    of_answers: whether the claim is about answers. Such a claim is tested with forced closing or, in runs without it, on the
    questions that both models answered.
    before: the metrics that replace `expected` in runs that lack one of them.
    most: shares that must be above (+1) or below (-1) one half; ("base", "bullet_rate", +1) says that most of the base's
    answers are lists.
    beside: metrics that must not clearly move the other way."""

    text: str
    expected: Mapping[str, Literal[-1, 1]]
    of_answers: bool = False
    before: Mapping[str, Literal[-1, 1]] = field(default_factory=dict)
    most: Sequence[tuple[Literal["base", "tuned"], str, Literal[-1, 1]]] = ()
    beside: Mapping[str, Literal[-1, 1]] = field(default_factory=dict)


CLAIMS = (
    Claim(
        "Fine-tuning works: the loss falls, and by more than 4-bit rounding had cost the base (the article shows the training "
        "loss; here: on rows not trained on)",
        {"eval_loss": -1},
    ),
    Claim("The base model thinks at length; tuned, it thinks less", {"thinking_words": -1}, of_answers=True),
    Claim(
        "The base model answers in bullet lists; tuned, it does not",
        {"bullet_rate": -1},
        of_answers=True,
        most=(("base", "bullet_rate", 1), ("tuned", "bullet_rate", -1)),
    ),
    Claim(
        "Tuned, the model answers in one paragraph, more often than the base",
        {"one_paragraph_rate": 1},
        of_answers=True,
        most=(("tuned", "one_paragraph_rate", 1),),
    ),
    Claim("The tuned model is more concise (thinking and answer together)", {"completion_words": -1}, of_answers=True),
    Claim("The tuned answer is closer to the data set's own", {"rouge_l": 1, "chrf": 1}, of_answers=True),
    Claim(
        "The tuned answer is more precise (here: more multiple-choice questions are answered rightly)",
        {"mcq_letter": 1},
        before={"mcq_accuracy": 1, "mcq_accuracy_answered": 1},
        beside={"mcq_accuracy_answered": 1, "mcq_likelihood": 1},
    ),
)
_LOSS_CLAIM = CLAIMS[0]
ANSWERED = "answered by both models by themselves (thinking closed, and an answer after it, without forced closing)"
ARTICLE_CLAIM = "The tuned model answers the article's test question better"


class ClaimVerdict(TypedDict):
    """Hold the verdict on a claim. Runs of earlier versions lack the optional fields.

    verdict: begins with `holds`, `does not hold`, or `can't tell`, and says on how many questions, and why.
    reading: how answers were read, and which questions count. n: the number of these questions or rows.
    answered_result: the results that must not contradict the claim: for a claim about answers, those on the questions that
    both models answered by themselves; "" if there are none.
    needed: how many questions would decide the claim; None if these do, if more would not, or if these are too few to tell."""

    claim: str
    tested_by: str  # the metrics' labels
    result: str  # their values with intervals
    verdict: str
    reading: NotRequired[str]
    n: NotRequired[int]
    answered_result: NotRequired[str]
    needed: NotRequired[int | None]


def outcome(judged: ClaimVerdict) -> Outcome:
    """Return the outcome that a claim's verdict begins with."""
    return next(one for one in (HOLDS, DOES_NOT, CANNOT_TELL) if judged["verdict"].startswith(one))


# --- judge -----------------------------------------------------------------------------------------------------------


def judge(
    metrics: Metrics,
    answered: Metrics,
    sampled: Metrics,
    article_seen: Sequence[str] = (),
    *,
    forced: Metrics | None = None,
    sampled_forced: Metrics | None = None,
    losses: LossBars | None = None,
    confidence_level: float = 0.95,
) -> list[ClaimVerdict]:
    """Judge every claim.

    Args:
        metrics: what `compare` returns for the counted questions, plus the multiple-choice metrics if they were measured.
        answered: what `compare` returns for the questions that both models answered in full form by themselves; empty if
            there are none.
        sampled: what `compare_sampled` returns. If a metric clearly moves the other way there, the claim is left undecided.
        article_seen: ids of training rows that repeat the article's question.
        forced, sampled_forced: the same as `metrics` and `sampled` with forced closing. Without them, a claim about answers is
            judged on `answered`, because a model that never answers has no answers to measure.
        losses: the losses of 16-bit base, base, and tuned model; None if the 16-bit base was not measured.
        confidence_level: evaluation.confidence_level."""
    verdicts = []
    for claim in CLAIMS:
        if claim.of_answers:
            evidence = _of_answers(claim, answered, forced, sampled_forced or sampled)
        else:
            evidence = _of_metrics(claim, metrics)
        verdicts.append(_judge(claim, evidence, losses, confidence_level))
    return [*verdicts, _article(article_seen)]


def _of_answers(claim: Claim, answered: Metrics, forced: Metrics | None, sampled: Metrics) -> Evidence:
    in_samples = Beside("in the sampled answers", sampled, claim.expected)
    if not forced:
        reading = "as they answer, on the questions that both models answered"
        return Evidence(reading, " that both answered", answered, claim.expected, [in_samples])
    by_themselves = Beside("on the questions that both answered by themselves", answered, claim.expected)
    shown = f"no question was {ANSWERED}"
    if claim.expected.keys() <= answered.keys():
        shown = f"the {fewest(claim.expected, answered)} {ANSWERED}: {_values(claim.expected, answered)}"
    reading = f"{FORCED}, on all scored questions"
    return Evidence(reading, f", {FORCED}", forced, claim.expected, [by_themselves, in_samples], shown)


def _of_metrics(claim: Claim, metrics: Metrics) -> Evidence:
    if claim is _LOSS_CLAIM:
        return Evidence("held-out rows", "", metrics, claim.expected, [])
    if not claim.expected.keys() <= metrics.keys():
        return Evidence("read strictly, all questions", ", read strictly", metrics, claim.before, [])
    beside = [Beside("", metrics, {name: sign}) for name, sign in claim.beside.items() if name in metrics]
    shown = "; ".join(
        f"{METRICS[name].text}: {_values(one.expected, metrics)} (n = {metrics[name]['difference']['n']})"
        for one in beside
        for name in one.expected
    )
    return Evidence("the likeliest letter, all questions", ", the likeliest letter", metrics, claim.expected, beside, shown)


def _judge(claim: Claim, evidence: Evidence, bars: LossBars | None, level: float) -> ClaimVerdict:
    metrics, expected = evidence.metrics, evidence.expected
    among = f" ({evidence.reading})" if claim.of_answers else ""
    found: ClaimVerdict = {
        "claim": claim.text,
        "tested_by": ", ".join(METRICS[name].label for name in expected) + among,
        "result": "nothing to measure it on",
        "verdict": "",
        "reading": evidence.reading,
        "n": 0,
        "answered_result": evidence.shown,
        "needed": None,
    }
    if missing := [name for name in expected if name not in metrics]:
        unanswered = claim.of_answers and not metrics
        why = "no question was answered by both models" if unanswered else f"{METRICS[missing[0]].text}: not measured"
        return found | {"verdict": f"{CANNOT_TELL}: {why}"}

    decided, result = decide(claim, evidence, level), _values(expected, metrics)
    if claim is _LOSS_CLAIM:
        decided = decide_learning(bars, level) if decided.outcome == HOLDS else decided
        result += describe_rounding(bars) if bars else ""
    n = fewest(expected, metrics)
    why = f": {decided.why}" if decided.why else ""
    verdict = f"{decided.outcome} with {count_of(next(iter(expected)), n)}{evidence.among}{why}"
    return found | {"result": result, "verdict": verdict, "n": n, "needed": decided.needed}


def _values(names: Iterable[str], metrics: Metrics) -> str:
    shown = []
    for name in names:
        base, tuned, difference = (format_side(metrics[name], side) for side in ("base", "tuned", "difference"))
        shown.append(f"{base} to {tuned}, difference {difference}")
    return "; ".join(shown)


# --- the article's question, and the table ---------------------------------------------------------------------------


def _article(article_seen: Sequence[str]) -> ClaimVerdict:
    seen = f"; it is in the training rows ({', '.join(article_seen)})" if article_seen else ""
    return {
        "claim": ARTICLE_CLAIM,
        "tested_by": "nothing: shown in the report, never scored",
        "result": "one answer of each model, side by side",
        "verdict": f"{CANNOT_TELL}: one question says nothing about others{seen}",
        "reading": "as they answer",
        "n": 1,
        "needed": None,
    }


def claims_table(verdicts: Sequence[ClaimVerdict]) -> pd.DataFrame:
    """Return the claims as a table, one line per claim. Leave out the column `beside it` if it is empty for all claims."""
    import pandas as pd

    columns = {
        "claim": "claim",
        "tested_by": "tested by",
        "result": "result",
        "answered_result": "beside it",
        "verdict": "verdict",
    }
    table = pd.DataFrame(verdicts).reindex(columns=list(columns)).rename(columns=columns).set_index("claim").fillna("")
    return table if table["beside it"].any() else table.drop(columns="beside it")
