"""The article's claims about what its fine-tuning did, each with a test and a computed verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

from medcot_utils.evaluation.intervals import FEWEST_QUESTIONS, format_interval, is_clear
from medcot_utils.evaluation.metrics import METRICS

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.evaluation.comparison import Metrics
    from medcot_utils.evaluation.intervals import Estimate

HOLDS, DOES_NOT, CANNOT_TELL = "holds", "does not hold", "can't tell"
# A difference that lies wholly within this, either way, is none that a reader would notice. In the metrics' own units.
SMALLEST = {
    "eval_loss": 0.01,
    "thinking_words": 5.0,
    "completion_words": 5.0,
    "bullet_rate": 0.05,
    "one_paragraph_rate": 0.05,
    "rouge_l": 0.01,
    "chrf": 0.01,
    "mcq_accuracy": 0.01,
    "mcq_accuracy_answered": 0.01,
}


@dataclass(frozen=True)
class Claim:
    """Hold a claim and the metrics that test it.

    expected: each metric must move this way (+1 up, -1 down) by SMALLEST or more. most: shares that must be on their side
    of one half; ("base", "bullet_rate", +1) says that most of the base's answers are lists.
    of_answers: the claim is about answers, so it is tested on the questions that both models answered."""

    text: str
    expected: Mapping[str, Literal[-1, 1]]
    of_answers: bool = False
    most: Sequence[tuple[Literal["base", "tuned"], str, Literal[-1, 1]]] = field(default=())


CLAIMS = (
    Claim(
        "Fine-tuning works: the loss falls (the article shows the training loss; here: on rows not trained on)", {"eval_loss": -1}
    ),
    Claim("The base model thinks at length; tuned, it thinks less", {"thinking_words": -1}, of_answers=True),
    Claim(
        "The base model answers in bullet lists; tuned, it does not",
        {"bullet_rate": -1},
        of_answers=True,
        most=(("base", "bullet_rate", 1), ("tuned", "bullet_rate", -1)),
    ),
    Claim(
        "Tuned, and only then, the answer is one paragraph",
        {"one_paragraph_rate": 1},
        of_answers=True,
        most=(("tuned", "one_paragraph_rate", 1),),
    ),
    Claim("The tuned model is more concise (thinking and answer together)", {"completion_words": -1}, of_answers=True),
    Claim("The tuned answer is closer to the data set's own", {"rouge_l": 1, "chrf": 1}, of_answers=True),
    Claim(
        "The tuned answer is more precise (here: more multiple-choice answers are right, also where both models answer)",
        {"mcq_accuracy": 1, "mcq_accuracy_answered": 1},
    ),
)
ARTICLE_CLAIM = "The tuned model answers the article's test question better"


class ClaimVerdict(TypedDict):
    """Say what became of a claim."""

    claim: str
    tested_by: str  # the metrics' labels
    result: str  # their values with intervals
    verdict: str  # holds; does not hold, and why; or can't tell, and why


def judge(metrics: Metrics, answered: Metrics, sampled: Metrics, article_seen: Sequence[str] = ()) -> list[ClaimVerdict]:
    """Judge every claim.

    Args:
        metrics: what `compare` gives over the counted questions, with those of multiple choice if they were measured.
        answered: the same over the questions that both models answered in full form; empty if there are none. A model that
            never answers has no length and no likeness of answers.
        sampled: what `compare_sampled` gives. If it clearly says the opposite, neither is believed.
        article_seen: ids of training rows that hold the article's question."""
    return [_judge(claim, answered if claim.of_answers else metrics, sampled) for claim in CLAIMS] + [_article(article_seen)]


def _judge(claim: Claim, metrics: Metrics, sampled: Metrics) -> ClaimVerdict:
    among = " on the questions that both models answered" if claim.of_answers else ""
    tested_by = ", ".join(METRICS[name].label for name in claim.expected) + among
    if missing := [name for name in claim.expected if name not in metrics]:
        unanswered = claim.of_answers and not metrics
        why = "no question was answered by both models" if unanswered else f"{METRICS[missing[0]].text}: not measured"
        result, verdict = "nothing to measure it on", f"{CANNOT_TELL}: {why}"
    else:
        shown = []
        for name in claim.expected:
            base, tuned, difference = (format_interval(metrics[name][side]) for side in ("base", "tuned", "difference"))
            shown.append(f"{base} to {tuned}, difference {difference}")
        result, verdict = "; ".join(shown), _decide(claim, metrics, sampled)
    return {"claim": claim.text, "tested_by": tested_by, "result": result, "verdict": verdict}


def _decide(claim: Claim, metrics: Metrics, sampled: Metrics) -> str:
    differences = {name: metrics[name]["difference"] for name in claim.expected}
    n = min(difference["n"] for difference in differences.values())
    cannot_tell = f"{CANNOT_TELL} with {n} questions" + (" that both answered" if claim.of_answers else "")
    if n < FEWEST_QUESTIONS or any(difference["low"] is None for difference in differences.values()):
        return cannot_tell
    for name, sign in claim.expected.items():
        if is_clear(differences[name]) and sign * differences[name]["value"] < 0:
            return f"{DOES_NOT}: {METRICS[name].text} went the other way"
        if max(abs(differences[name]["low"]), abs(differences[name]["high"])) < SMALLEST[name]:
            return f"{DOES_NOT}: {METRICS[name].text} differs by less than {SMALLEST[name]:g}"
    for side, name, sign in claim.most:
        if _beyond_half(metrics[name][side], -sign):
            return f"{DOES_NOT}: {METRICS[name].text}, {side}: {'fewer' if sign > 0 else 'more'} than half"
    moved = all(is_clear(found) and abs(found["value"]) >= SMALLEST[name] for name, found in differences.items())
    if not moved or not all(_beyond_half(metrics[name][side], sign) for side, name, sign in claim.most):
        return cannot_tell
    for name, sign in claim.expected.items():
        other = sampled.get(name, {}).get("difference")
        if other and is_clear(other) and sign * other["value"] < 0:
            return f"{CANNOT_TELL}: {METRICS[name].text} went the other way in the sampled answers"
    return HOLDS


def _beyond_half(share: Estimate, sign: int) -> bool:
    return share["low"] > 0.5 if sign > 0 else share["high"] < 0.5


def _article(article_seen: Sequence[str]) -> ClaimVerdict:
    seen = f"it stands in the training rows ({', '.join(article_seen)})" if article_seen else "it is one question"
    return {
        "claim": ARTICLE_CLAIM,
        "tested_by": "nothing: shown in the report, never scored",
        "result": "one answer of each model, side by side",
        "verdict": f"{CANNOT_TELL}: {seen}",
    }


def claims_table(verdicts: Sequence[ClaimVerdict]) -> pd.DataFrame:
    """Return the claims as a table, one line each."""
    import pandas as pd

    return pd.DataFrame(verdicts).rename(columns={"tested_by": "tested by"}).set_index("claim")
