"""Everything that notebook 06 measures, computed in one call: the content of metrics.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import RunConfig
from medcot_utils.data.words import counts_characters
from medcot_utils.evaluation.claims import ClaimVerdict, judge
from medcot_utils.evaluation.comparison import Metrics, compare, compare_sampled
from medcot_utils.evaluation.loss import LossBars, compare_loss_bars
from medcot_utils.evaluation.mcq.readings import McqReading
from medcot_utils.evaluation.scored_set import force_closing

if TYPE_CHECKING:
    from medcot_utils.evaluation.scored_set import AnsweredQuestion, ScoredSet
    from medcot_utils.models.losses import RowLoss

_COUNTED_BY_CHARACTER = (
    "Words are counted by white space. Chinese, Japanese, Thai and some other scripts have none between words: there each "
    "character counts as a word, in lengths, repetition and ROUGE-L."
)


class Measured(TypedDict):
    """Hold the content of metrics.json. Metrics are of greedy answers unless a field says otherwise.

    n_questions, metrics: the number of questions that count, and the metrics as the models answer by themselves, plus loss
    and multiple choice. forced: the answers' metrics with forced closing over the same questions. It is absent in runs
    without forced closing, as earlier runs are; so is `sampled_forced`.
    claims: the article's claims, judged. notes: lines that the report shows below its tables.
    n_samples, sampled: the number of sampled answers per question, and their metrics; None without samples.
    sampled_forced: the same with forced closing.
    n_answered, answered: the counted questions that both models answered in full form; empty if there are none.
    n_contaminated, contaminated: the questions that training rows repeat; None if there are none.
    losses: the losses of 16-bit base, base, and tuned model; absent if the 16-bit base was not measured.
    mcq_readings: multiple choice in each of its readings, without the questions that training rows repeat."""

    n_questions: int
    metrics: Metrics
    forced: NotRequired[Metrics]
    claims: Sequence[ClaimVerdict]
    notes: Sequence[str]
    n_samples: int
    sampled: Metrics | None
    sampled_forced: NotRequired[Metrics | None]
    n_answered: int
    answered: Metrics
    n_contaminated: int
    contaminated: Metrics | None
    losses: NotRequired[LossBars]
    mcq_readings: NotRequired[Sequence[McqReading]]


def measure(scored: ScoredSet, losses: Sequence[RowLoss], mcq_metrics: Metrics, config: RunConfig) -> Measured:
    """Compare base and tuned model in every metric and reading, and judge the claims.

    Args:
        losses: the losses of the models labeled `base`, `tuned`, and, if it was measured, `base_16bit`, on all held-out rows.
            Rows that training rows repeat are left out here.
        mcq_metrics: what `mcq.compare_mcq` returns.

    Raises:
        ValueError: if the models' losses are of different rows."""
    settings, seed, counted = config.evaluation, config.seed, scored.counted
    held_out = [record for record in losses if record["id"] not in scored.repeated_by]
    metrics = compare(counted, held_out, settings, seed) | mcq_metrics
    sampled, answered = compare_sampled(counted, settings, seed), compare(scored.answered, [], settings, seed)
    closed = force_closing(counted)
    forced, sampled_forced = compare(closed, [], settings, seed), compare_sampled(closed, settings, seed)
    bars = compare_loss_bars(held_out, settings, seed)
    claims = judge(
        *(metrics, answered, sampled, scored.repeated_by.get("article", [])),
        **{"forced": forced, "sampled_forced": sampled_forced, "losses": bars, "confidence_level": settings.confidence_level},
    )
    measured = Measured(
        n_questions=len(counted),
        metrics=metrics,
        claims=claims,
        notes=[*describe_counting(counted), *describe_closing(counted)],
        n_samples=settings.n_samples,
        sampled=sampled or None,
        n_answered=len(scored.answered),
        answered=answered,
        n_contaminated=len(scored.apart),
        contaminated=compare(scored.apart, [], settings, seed) or None,
    )
    if forced:
        measured |= {"forced": forced, "sampled_forced": sampled_forced or None}
    return measured | {"losses": bars} if bars else measured


def describe_counting(questions: Sequence[AnsweredQuestion]) -> list[str]:
    """Return notes on how words were counted, for scripts without spaces between words; an empty list for other scripts."""
    texts = [text for one in questions for text in (one.question["Response"], *(a["answer"] for a in one.greedy.values()))]
    return [_COUNTED_BY_CHARACTER] if any(map(counts_characters, texts)) else []


def describe_closing(questions: Sequence[AnsweredQuestion]) -> list[str]:
    """Return one note per model on how many greedy answers had their thinking closed; an empty list without forced closing."""
    notes = []
    for model in questions[0].greedy if questions else ():
        records = [one.greedy[model] for one in questions]
        if all("forced" in record for record in records):
            count = Counter(record["forced"]["closed_by"] for record in records)
            forced = f"{count['budget']} {'was' if count['budget'] == 1 else 'were'} closed for it at their budget"
            notes.append(
                f"Forced closing: of {len(records)} answers the {model} model closed {count['itself']} by itself; "
                f"{forced}, and {count['end']} where the text ended without the tag."
            )
    return notes
