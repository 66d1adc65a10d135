"""The article's claims about what its fine-tuning did, each with a test and a verdict that is computed, never written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from medcot_utils.evaluation import format_interval, is_clear
from medcot_utils.measures import METRICS

if TYPE_CHECKING:
    import pandas as pd

HOLDS, DOES_NOT = "holds", "does not hold"


@dataclass(frozen=True)
class Claim:
    """A claim and the metrics that test it: it holds if each of them moved as `expected` (+1 up, -1 down)."""

    text: str
    expected: Mapping[str, Literal[-1, 1]]


CLAIMS = (
    Claim(
        "Fine-tuning works: the loss falls (the article shows the training loss; here: on rows not trained on)", {"eval_loss": -1}
    ),
    Claim("The base model thinks at length; tuned, it thinks less", {"thinking_words": -1}),
    Claim("The base model answers in bullet lists; tuned, it does not", {"bullet_rate": -1}),
    Claim("The tuned answer is one paragraph", {"one_paragraph_rate": 1}),
    Claim("The tuned model is more concise (thinking and answer together)", {"completion_words": -1}),
    Claim("The tuned answer is closer to the data set's own", {"rouge_l": 1, "chrf": 1}),
    Claim("The tuned answer is more precise (here: more multiple-choice questions answered rightly)", {"mcq_accuracy": 1}),
)
ARTICLE_CLAIM = "The tuned model answers the article's test question better"


def judge(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], article_seen: Sequence[str] = ()) -> list[dict[str, str]]:
    """One record per claim: claim, tested_by, result, verdict (holds, does not hold, or can't tell and why).

    `metrics`: what `evaluation.compare` gives, with `mcq_accuracy` in the same form where it was measured. `article_seen`:
    ids of training rows that hold the article's question."""
    return [_judge(claim, metrics) for claim in CLAIMS] + [_article(article_seen)]


def _judge(claim: Claim, metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    record = {"claim": claim.text, "tested_by": ", ".join(METRICS[name].label for name in claim.expected)}
    if missing := [name for name in claim.expected if name not in metrics]:
        return record | {
            "result": "not measured in this run",
            "verdict": f"can't tell: {METRICS[missing[0]].text} was not measured",
        }
    shown = []
    for name in claim.expected:
        sides = " to ".join(format_interval(metrics[name][side]) for side in ("base", "tuned"))
        shown.append(f"{sides}, difference {format_interval(metrics[name]['difference'])}")
    return record | {"result": "; ".join(shown), "verdict": _verdict(claim, metrics)}


def _verdict(claim: Claim, metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    differences = {name: metrics[name]["difference"] for name in claim.expected}
    clear = {name: is_clear(difference) for name, difference in differences.items()}
    against = [name for name, sign in claim.expected.items() if clear[name] and sign * differences[name]["value"] < 0]
    if against:
        return DOES_NOT
    if all(clear.values()):
        return HOLDS
    return f"can't tell with {min(difference['n'] for difference in differences.values())} questions"


def _article(article_seen: Sequence[str]) -> dict[str, str]:
    seen = f"it stands in the training rows ({', '.join(article_seen)})" if article_seen else "it is one question"
    return {
        "claim": ARTICLE_CLAIM,
        "tested_by": "nothing: shown in the report, never scored",
        "result": "one answer of each model, side by side",
        "verdict": f"can't tell: {seen}",
    }


def claims_table(records: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """The claims as a reader wants them, one line each."""
    import pandas as pd

    return pd.DataFrame(records).rename(columns={"tested_by": "tested by"}).set_index("claim")
