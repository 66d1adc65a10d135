"""Decide whether a claim holds, does not hold, or cannot be decided, from the metrics that test it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from medcot_utils.evaluation.comparison import describe_cut, is_shown
from medcot_utils.evaluation.intervals import (
    FEWEST_QUESTIONS,
    format_interval,
    half_questions_needed,
    is_clear,
    questions_needed,
    share_questions_needed,
)
from medcot_utils.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from medcot_utils.evaluation.claims import Claim
    from medcot_utils.evaluation.comparison import ComparedMetric, LossBars, Metrics
    from medcot_utils.evaluation.intervals import Difference, Estimate

Outcome = Literal["holds", "does not hold", "can't tell"]
HOLDS, DOES_NOT, CANNOT_TELL = "holds", "does not hold", "can't tell"
# The smallest difference that counts, in the metrics' own units; docs/results.md lists them.
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
    "mcq_letter": 0.01,
}


@dataclass(frozen=True)
class Beside:
    """Hold the metrics that must not contradict a claim, and where they were taken."""

    where: str
    metrics: Metrics
    expected: Mapping[str, Literal[-1, 1]]


@dataclass(frozen=True)
class Evidence:
    """Hold the evidence for a claim: the metrics that should move, how they were read, and what must not contradict them.

    among: the words for its questions in the verdict. shown: the text for `answered_result`."""

    reading: str
    among: str
    metrics: Metrics
    expected: Mapping[str, Literal[-1, 1]]
    beside: Sequence[Beside]
    shown: str = ""


@dataclass(frozen=True)
class Decision:
    """Hold a verdict before it becomes text; see `ClaimVerdict`."""

    outcome: Outcome
    why: str = ""
    needed: int | None = None


def fewest(names: Iterable[str], metrics: Metrics) -> int:
    """Return on how many questions these metrics were measured: the lowest number if they differ."""
    return min(metrics[name]["difference"]["n"] for name in names)


# --- the decision ----------------------------------------------------------------------------------------------------


def decide(claim: Claim, evidence: Evidence, level: float) -> Decision:
    """Decide whether a claim holds.

    The first that applies decides: the claim is refuted; it is open because lengths were cut, because there are too few
    questions, or because other metrics contradict it; or else it holds.

    Args:
        level: evaluation.confidence_level, which the numbers of questions are computed for."""
    tested = {name: evidence.metrics[name] for name in evidence.expected}
    if fewest(tested, tested) < FEWEST_QUESTIONS:
        return Decision(CANNOT_TELL, f"at least {FEWEST_QUESTIONS} are needed")
    if infinite := [name for name, metric in tested.items() if metric["difference"]["low"] is None]:
        return Decision(CANNOT_TELL, f"{METRICS[infinite[0]].text} is not a finite number")
    return (
        _refute(claim, evidence, tested)
        or _find_cut(evidence, tested)
        or _want_questions(claim, evidence, level)
        or _contradict(evidence.beside)
        or Decision(HOLDS)
    )


def _refute(claim: Claim, evidence: Evidence, tested: Metrics) -> Decision | None:
    for name, sign in evidence.expected.items():
        if _goes_against(name, tested[name], sign):
            return Decision(DOES_NOT, f"{METRICS[name].text} went the other way")
        if _is_within(tested[name]["difference"], SMALLEST[name]) and not describe_cut(name, tested[name]):
            return Decision(DOES_NOT, f"{METRICS[name].text} differs by less than {SMALLEST[name]:g}")
    for side, name, sign in claim.most:
        if _beyond_half(evidence.metrics[name][side], -sign):
            return Decision(DOES_NOT, f"{METRICS[name].text}, {side}: {'fewer' if sign > 0 else 'more'} than half")
    return None


def _find_cut(evidence: Evidence, tested: Metrics) -> Decision | None:
    """Find a length that cannot be judged, because whole answers could undo the claim or are needed to show it."""
    for name, sign in evidence.expected.items():
        undoing = describe_cut(name, tested[name], sides=("tuned" if sign < 0 else "base",))
        if undoing or (not _moved(name, tested[name], sign) and describe_cut(name, tested[name])):
            return Decision(CANNOT_TELL, undoing or describe_cut(name, tested[name]))
    return None


def _want_questions(claim: Claim, evidence: Evidence, level: float) -> Decision | None:
    """Find what these questions leave open and how many it would take; if there are several, the one that takes most."""
    wanting = [
        _need_for(name, evidence.metrics[name]["difference"], sign, level)
        for name, sign in evidence.expected.items()
        if not _moved(name, evidence.metrics[name], sign)
    ]
    for side, name, sign in claim.most:
        share = evidence.metrics[name][side]
        if not _beyond_half(share, sign):
            what = f"that {side}, {METRICS[name].text} are {'more' if sign > 0 else 'fewer'} than half"
            wanting.append((half_questions_needed(share["value"], level), what))
    if not wanting:
        return None
    return _cannot_tell_yet(*max(wanting, key=lambda one: math.inf if one[0] is None else one[0]))


def _cannot_tell_yet(needed: int | None, what: str) -> Decision:
    return Decision(CANNOT_TELL, f"it takes about {needed:,} to show {what}" if needed else f"too few to show {what}", needed)


def _need_for(name: str, difference: Difference, sign: int, level: float) -> tuple[int | None, str]:
    """Return how many questions it takes, and what they would show.

    They would show the difference found or, if it is smaller than the smallest that counts, a difference of that size. If
    these questions are enough for that, they would show on which side of the smallest the difference found lies."""

    def need(size: float) -> int | None:
        if "changed" in difference:
            return share_questions_needed(difference["changed"], size, level)
        return questions_needed(difference["spread"], size, level)

    found, smallest, text = sign * difference["value"], SMALLEST[name], METRICS[name].text
    if found >= smallest:
        needed, what = difference["needed"], f"the difference found of {abs(found):.2g} ({text})"
    else:
        needed, what = need(smallest), f"a difference of {smallest:g}, the smallest that counts ({text})"
        if is_clear(difference) or (needed and needed <= difference["n"]):
            needed, what = need(smallest - found), f"whether {text} differs by {smallest:g}, the smallest that counts"
    return needed and max(needed, difference["n"] + 1), what  # the present number has proved too few


def _contradict(beside: Sequence[Beside]) -> Decision | None:
    for other in beside:
        for name, sign in other.expected.items():
            if name in other.metrics and _goes_against(name, other.metrics[name], sign):
                where = f" {other.where}" if other.where else ""
                return Decision(CANNOT_TELL, f"{METRICS[name].text} went the other way{where}")
    return None


def _moved(name: str, metric: ComparedMetric, sign: int) -> bool:
    return is_shown(name, metric) and sign * metric["difference"]["value"] >= SMALLEST[name]


def _goes_against(name: str, metric: ComparedMetric, sign: int) -> bool:
    return is_shown(name, metric) and sign * metric["difference"]["value"] < 0


def _is_within(difference: Estimate, smallest: float) -> bool:
    return max(abs(difference["low"]), abs(difference["high"])) < smallest


def _beyond_half(share: Estimate, sign: int) -> bool:
    return share["low"] > 0.5 if sign > 0 else share["high"] < 0.5


# --- the loss and the 16-bit base ------------------------------------------------------------------------------------


def decide_learning(bars: LossBars | None, level: float) -> Decision:
    """Decide whether a loss that fell below the 4-bit base's also fell below the 16-bit base's."""
    if bars is None:
        return Decision(HOLDS, "below the 4-bit base; the 16-bit base was not measured")
    learning, smallest = bars["learning"], SMALLEST["eval_loss"]
    if learning["low"] is None:
        return Decision(CANNOT_TELL, "the loss of the 16-bit base is not a finite number")
    if is_clear(learning) and learning["value"] > 0:
        return Decision(DOES_NOT, "the tuned model stays above the 16-bit base")
    if _is_within(learning, smallest):
        return Decision(DOES_NOT, f"tuned model and 16-bit base differ by less than {smallest:g}: all of it is rounding")
    if not is_clear(learning) or learning["value"] > -smallest:
        needed, what = _need_for("eval_loss", learning, -1, level)
        return _cannot_tell_yet(needed, f"{what}, against the 16-bit base")
    return Decision(HOLDS, "below the 16-bit base too")


def describe_rounding(bars: LossBars) -> str:
    """Say how much of the fall the rounding had cost, in nats per token, as in `0.39 of 0.81, 48 % [45 %, 52 %]`."""
    rounding, fall = bars["rounding"]["value"], bars["base"]["value"] - bars["tuned"]["value"]
    share = bars["share"]
    # z: what rounds to zero has no sign
    text = f"; 16-bit base {format_interval(bars['base_16bit'])}: the 4-bit rounding had cost {rounding:z.2f}"
    if share is None or share["low"] is None:
        return text
    return f"{text} of {fall:.2f}, {share['value']:z.0%} [{share['low']:z.0%}, {share['high']:z.0%}]".replace("%", " %")
