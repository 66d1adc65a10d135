"""Every question of one or more runs with all answers to it, for the report."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from medcot_utils.data.contamination import contaminated
from medcot_utils.data.words import split_words
from medcot_utils.evaluation.merged_column import is_made
from medcot_utils.evaluation.metrics import chrf, is_bullet_list
from medcot_utils.models.records import END_OF_THINKING, by_sample
from medcot_utils.plain_text import show_controls

if TYPE_CHECKING:
    from medcot_utils.data.rows import Question
    from medcot_utils.data.tokens import DataReport
    from medcot_utils.models.records import AnswerRecord
    from medcot_utils.run.directory import Run

# A length is marked if it is at most half or at least twice the base model's.
_MARKED_RATIO = 2.0
_CLOSED_BY = {"budget": "its budget ended its thinking", "end": "it ended its text without closing its thinking"}
_SAME_BASE = ("model.name", "model.revision", "model.load_in_4bit")

# A question is the same in two runs only if id, text, and reference are: ids are often mere row numbers.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class ShownRun:
    """Hold the parts of a run that the page shows, read once.

    name: unique among the runs. seen: ids of questions and held-out rows that a row the model was trained on repeats."""

    run: Run
    name: str
    questions: Mapping[Key, Question]
    answers: Mapping[str, Mapping[Key, AnswerRecord]]  # by base, tuned and, if it was asked, merged
    data_report: DataReport
    seen: set[str]


def read_run(run: Run, name: str) -> ShownRun:
    """Return what the page shows of a run. Raises RunError if an artifact that it reads is missing."""
    asked = {(str(q["id"]), q["Question"], q["Response"]): q for q in run.read("questions")}
    keys = {key[0]: key for key in asked}
    answers = {}
    for side in ("base", "tuned", *(["merged"] if is_made(run, "merged_answers") else [])):
        greedy = next(iter(by_sample(run.read(f"{side}_answers"))), [])
        answers[side] = {keys[str(record["id"])]: record for record in greedy if str(record["id"]) in keys}
    data_report = run.read("data_report")
    return ShownRun(run, name, asked, answers, data_report, contaminated(data_report))


@dataclass(frozen=True)
class Column:
    """Hold a model's answers on the page. base: the base model's, to compare with. merged: whether it is a merged model."""

    label: str
    answers: Mapping[Key, AnswerRecord]
    base: Mapping[Key, AnswerRecord]
    merged: bool = False


def columns_of(shown: Sequence[ShownRun]) -> list[Column]:
    """Return each distinct base, followed by the tuned and merged models of its runs.

    Two runs have the same base if it is the same model and answered their common questions alike."""
    groups: list[list[ShownRun]] = []
    for one in shown:
        group = next((group for group in groups if all(_same_base(one, other) for other in group)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    columns = []
    for group in groups:
        base = {key: record for one in group for key, record in one.answers["base"].items()}
        columns.append(Column("base" if len(groups) == 1 else f"base, {listed(one.name for one in group)}", base, base))
        for one, side in itertools.product(group, ("tuned", "merged")):
            if one.answers.get(side):
                label = side if len(shown) == 1 else f"{side}, {one.name}"
                columns.append(Column(label, one.answers[side], base, merged=side == "merged"))
    return columns


def _same_base(one: ShownRun, other: ShownRun) -> bool:
    ours, theirs = one.answers["base"], other.answers["base"]
    return all(one.run.config.get(name) == other.run.config.get(name) for name in _SAME_BASE) and all(
        ours[key][text] == theirs[key][text] for key in ours.keys() & theirs.keys() for text in ("thinking", "answer")
    )


def listed(names: Iterable[str]) -> str:
    """Join names, as in `a and b`."""
    return " and ".join(names)


def anchors_of(shown: Sequence[ShownRun]) -> dict[Key, str]:
    """Return {question: anchor of its link}: its id, followed by a number if another question has the same id."""
    anchors: dict[Key, str] = {}
    taken: set[str] = set()
    for key in itertools.chain.from_iterable(one.questions for one in shown):
        if key not in anchors:
            name = show_controls(key[0])  # as the page shows it
            numbered = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
            anchors[key] = next(anchor for anchor in numbered if anchor not in taken)
            taken.add(anchors[key])
    return anchors


@dataclass(frozen=True)
class ShownAnswer:
    """Hold an answer as the page shows it under its question.

    thinking, answer: as they were written, tags in them included; thinking: everything, if there is no answer.
    thinking_words, answer_words: lengths of what the model wrote by itself. marks: notes on its form, and on its length
    compared with the base model's answer. forced, closed_by: the answer with forced closing and what ended the thinking, if the
    model did not close it."""

    label: str
    thinking: str
    answer: str
    thinking_words: int
    answer_words: int
    marks: Sequence[str]
    forced: str = ""
    closed_by: str = ""

    @property
    def shown(self) -> str:
        """Return the text to compare with other models': the answer, else the forced answer, else the thinking."""
        return self.answer or self.forced or self.thinking


@dataclass(frozen=True)
class ShownQuestion:
    """Hold a question with all answers to it.

    anchor: the anchor of its link. outcome: how base and tuned models ended their reasoning. differ: whether they ended it
    differently. apart: see `_apart`."""

    question: Question
    anchor: str
    answers: Sequence[ShownAnswer]
    tags: Sequence[str]
    outcome: str
    differ: bool
    apart: float


def show_question(key: Key, anchor: str, shown: Sequence[ShownRun], columns: Sequence[Column]) -> ShownQuestion:
    """Return a question with the answers of all models that were asked it. `key` must be in one of the `shown` runs."""
    asking = [one for one in shown if key in one.questions]
    alone = f"{listed(one.name for one in asking)} alone" if len(asking) < len(shown) else ""
    given = [column for column in columns if key in column.answers]
    answers = [_shown_answer(column.label, column.answers[key], column.base.get(key)) for column in given]
    measured = [column for column in given if not column.merged]
    records = [column.answers[key] for column in measured]
    outcome = _outcome([column.label for column in measured], records, len(asking))
    return ShownQuestion(
        question=asking[0].questions[key],
        anchor=anchor,
        answers=answers,
        tags=[f"asked in {alone}"] * bool(alone) + _tags(asking, key, len(shown) > 1),
        outcome=f"{alone}: {outcome}" if alone else outcome,
        differ=len({bool(record["well_formed"]) for record in records}) > 1,
        apart=_apart([answer.shown for answer in answers]),
    )


def _tags(asking: Sequence[ShownRun], key: Key, named: bool) -> list[str]:
    scored = asking[0].questions[key]["scored"]
    tags = [] if scored else ["shown, not scored"]
    if repeated := [one.name for one in asking if key[0] in one.seen]:
        where = f" in {listed(repeated)}" if named else ""
        tags.append(f"repeated in training{where}{', set apart' if scored else ''}")
    return tags


def _apart(texts: Sequence[str]) -> float:
    """Return the largest distance between two of the texts: 1 - chrF, from 0 to 1. Equal texts have distance 0."""
    pairs = itertools.combinations(texts, 2)
    return max((round(1 - chrf(last, first), 3) for first, last in pairs if first != last), default=0.0)


def _outcome(labels: Sequence[str], records: Sequence[AnswerRecord], n_runs: int) -> str:
    """Say how the models ended their reasoning, which needs no medical judgment."""
    ends, closed = {True: "reasons and answers", False: "does not"}, [bool(record["well_formed"]) for record in records]
    both = n_runs == 1 and len(closed) == 2
    if len(set(closed)) == 1:
        return f"{'both' if both else 'all'}: {ends[closed[0]]}"
    if both:
        return f"base {ends[closed[0]]}, tuned {ends[closed[1]]}"
    return f"reasons and answers: only {'; '.join(label for label, end in zip(labels, closed, strict=True) if end)}"


def _shown_answer(label: str, record: AnswerRecord, base: AnswerRecord | None) -> ShownAnswer:
    thinking, answer = len(split_words(record["thinking"])), len(split_words(record["answer"]))
    # As it was written: a tag that the parser removes explains why nothing is taken for the answer.
    before_tag, _, after_tag = (text.strip() for text in record["completion"].partition(END_OF_THINKING))
    marks = [] if record["well_formed"] else ["does not close the tag properly"]
    if not record["finished"]:
        marks.append("cut off")
    if is_bullet_list(record["answer"] or record["thinking"]):
        marks.append("a list")
    before, now = (len(split_words(f"{one['thinking']} {one['answer']}")) for one in (base or record, record))
    if before and now and not 1 / _MARKED_RATIO < now / before < _MARKED_RATIO:
        marks.append(f"{now / before:.1f} times the words" if now > before else f"{before / now:.1f} times fewer words")
    texts = (before_tag, after_tag) if record["answer"] else (record["completion"].strip(), "")
    shown = ShownAnswer(label, *texts, thinking, answer, marks)
    forced = record.get("forced")
    if not forced or forced["closed_by"] == "itself":
        return shown
    return replace(shown, forced=forced["answer"], closed_by=_CLOSED_BY[forced["closed_by"]])
