"""The questions with every model's answers: which of them count, which are set apart, which all models answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medcot_utils.models.records import by_sample, with_forced_closing

if TYPE_CHECKING:
    from medcot_utils.data.rows import Question
    from medcot_utils.data.tokens import DataReport
    from medcot_utils.models.records import AnswerRecord


@dataclass(frozen=True)
class AnsweredQuestion:
    """Hold a question with the answers of several models, by the model's label (`base`, `tuned`).

    greedy: one answer per model. samples: the sampled answers in their order, the same number per model."""

    question: Question
    greedy: Mapping[str, AnswerRecord]
    samples: Mapping[str, Sequence[AnswerRecord]]


@dataclass(frozen=True)
class ScoredSet:
    """Hold all questions in their order, including those that are only shown.

    repeated_by: {id of a question or held-out row: ids of the training rows that repeat it}, for rows that the model was
    trained on."""

    asked: Sequence[AnsweredQuestion]
    repeated_by: Mapping[str, Sequence[str]]

    @property
    def counted(self) -> list[AnsweredQuestion]:
        """Return the scored questions that no training row repeats. All metrics are computed on these."""
        return [one for one in self._scored if str(one.question["id"]) not in self.repeated_by]

    @property
    def apart(self) -> list[AnsweredQuestion]:
        """Return the scored questions that a training row repeats. They are never mixed with the others."""
        return [one for one in self._scored if str(one.question["id"]) in self.repeated_by]

    @property
    def answered(self) -> list[AnsweredQuestion]:
        """Return the counted questions that every model answered in full form: thinking closed once, text on both sides."""
        return [one for one in self.counted if all(answer["well_formed"] for answer in one.greedy.values())]

    @property
    def _scored(self) -> list[AnsweredQuestion]:
        return [one for one in self.asked if one.question["scored"]]


def score(
    questions: Sequence[Question], base: Sequence[AnswerRecord], tuned: Sequence[AnswerRecord], data_report: DataReport
) -> ScoredSet:
    """Return the set that notebook 06 works on, from a run's artifacts. Raises ValueError as `pair_answers` does."""
    return ScoredSet(pair_answers(questions, {"base": base, "tuned": tuned}), _repeated_by(data_report))


def score_merged(
    questions: Sequence[Question], tuned: Sequence[AnswerRecord], merged: Sequence[AnswerRecord], data_report: DataReport
) -> ScoredSet:
    """Return the set that notebook 07 works on: the greedy answers, labeled `tuned` and `merged`.

    It holds the questions that the merged model was asked, which may be fewer, or none. Raises ValueError as `pair_answers`
    does."""
    ids = {record["id"] for record in merged}
    asked = [question for question in questions if question["id"] in ids]
    answers = {"tuned": [record for record in tuned if record["id"] in ids and record["sample"] == 0], "merged": merged}
    return ScoredSet(pair_answers(asked, answers) if asked else [], _repeated_by(data_report))


def _repeated_by(data_report: DataReport) -> dict[str, list[str]]:
    repeated_by: dict[str, list[str]] = {}
    for repeat in [] if data_report["repeats_dropped"] else data_report["repeats"]:
        repeated_by.setdefault(str(repeat["question_id"]), []).append(repeat["train_id"])
    return repeated_by


def pair_answers(questions: Sequence[Question], answers: Mapping[str, Sequence[AnswerRecord]]) -> list[AnsweredQuestion]:
    """Return each question with all models' answers to it. `answers`: {label: records of `models.answer_questions`}.

    Raises ValueError unless all models answered these questions, in this order, with the same number of samples."""
    by_model = {model: by_sample(records) for model, records in answers.items()}
    asked = [question["id"] for question in questions]
    for samples in by_model.values():
        if any([record["id"] for record in records] != asked for records in samples):
            raise ValueError(f"{' and '.join(answers)} answers are to different questions: run notebooks 02 and 06 of one run")
    if len({len(samples) for samples in by_model.values()}) > 1:
        raise ValueError(f"{' and '.join(answers)} have different numbers of samples: run notebooks 02 and 06 of one run")
    return [
        AnsweredQuestion(
            question,
            {model: samples[0][index] for model, samples in by_model.items()},
            {model: [records[index] for records in samples[1:]] for model, samples in by_model.items()},
        )
        for index, question in enumerate(questions)
    ]


def force_closing(questions: Sequence[AnsweredQuestion]) -> list[AnsweredQuestion]:
    """Return the questions with all answers as they read with forced closing (`records.with_forced_closing`).

    The list is empty if a greedy answer has no forced closing, as in runs without evaluation.answer_tokens. A question has no
    samples if one of them has no forced closing."""
    found = []
    for one in questions:
        greedy = {model: with_forced_closing(record) for model, record in one.greedy.items()}
        samples = {model: [with_forced_closing(record) for record in records] for model, records in one.samples.items()}
        if None in greedy.values():
            return []
        whole = not any(None in records for records in samples.values())
        found.append(AnsweredQuestion(one.question, greedy, samples if whole else {}))
    return found
