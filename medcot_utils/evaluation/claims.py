"""The article's claims about what its fine-tuning did, each with a test and a verdict that is computed, never written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from medcot_utils.evaluation.intervals import FEWEST_QUESTIONS, format_interval, is_clear
from medcot_utils.evaluation.metrics import METRICS

if TYPE_CHECKING:
    import pandas as pd

Metrics = Mapping[str, Mapping[str, Mapping[str, Any]]]
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
    """A claim and the metrics that test it. It holds if each of them moved as `expected` (+1 up, -1 down), by SMALLEST or
    more, and the shares named in `most` are on their side of one half: ("base", "bullet_rate", +1) says that most of the
    base's answers are lists.

    of_answers: it is about answers, and so is tested on the questions that both models answered."""

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


def judge(metrics: Metrics, answered: Metrics, sampled: Metrics, article_seen: Sequence[str] = ()) -> list[dict[str, str]]:
    """One record per claim: claim, tested_by, result, verdict (holds; does not hold, and why; or can't tell, and why).

    `metrics`: what `evaluation.compare` gives over all scored questions, with `mcq_accuracy` and `mcq_accuracy_answered` in
    the same form where they were measured. `answered`: the same over the questions that both models answered in full form,
    empty if there are none: of a model that never answers no length and no likeness of answers can be said. `sampled`: what
    `compare_sampled` gives, empty without samples; where it clearly says the opposite, neither is believed. `article_seen`:
    ids of training rows that hold the article's question."""
    return [_judge(claim, answered if claim.of_answers else metrics, sampled) for claim in CLAIMS] + [_article(article_seen)]


def _judge(claim: Claim, metrics: Metrics, sampled: Metrics) -> dict[str, str]:
    among = " on the questions that both models answered" if claim.of_answers else ""
    record = {"claim": claim.text, "tested_by": ", ".join(METRICS[name].label for name in claim.expected) + among}
    if missing := [name for name in claim.expected if name not in metrics]:
        unanswered = claim.of_answers and not metrics
        why = "no question was answered by both models" if unanswered else f"{METRICS[missing[0]].text}: not measured"
        return record | {"result": "nothing to measure it on", "verdict": f"{CANNOT_TELL}: {why}"}
    shown = []
    for name in claim.expected:
        sides = " to ".join(format_interval(metrics[name][side]) for side in ("base", "tuned"))
        shown.append(f"{sides}, difference {format_interval(metrics[name]['difference'])}")
    return record | {"result": "; ".join(shown), "verdict": _verdict(claim, metrics, sampled)}


def _verdict(claim: Claim, metrics: Metrics, sampled: Metrics) -> str:
    differences = {name: metrics[name]["difference"] for name in claim.expected}
    n = min(difference["n"] for difference in differences.values())
    cannot_tell = f"{CANNOT_TELL} with {n} questions" + (" that both answered" if claim.of_answers else "")
    if n < FEWEST_QUESTIONS:
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


def _beyond_half(share: Mapping[str, Any], sign: int) -> bool:
    return share["low"] > 0.5 if sign > 0 else share["high"] < 0.5


def _article(article_seen: Sequence[str]) -> dict[str, str]:
    seen = f"it stands in the training rows ({', '.join(article_seen)})" if article_seen else "it is one question"
    return {
        "claim": ARTICLE_CLAIM,
        "tested_by": "nothing: shown in the report, never scored",
        "result": "one answer of each model, side by side",
        "verdict": f"{CANNOT_TELL}: {seen}",
    }


def claims_table(records: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """The claims as a reader wants them, one line each."""
    import pandas as pd

    return pd.DataFrame(records).rename(columns={"tested_by": "tested by"}).set_index("claim")
