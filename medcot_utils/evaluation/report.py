"""The comparison as one self-contained HTML file, made from run directories alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medcot_utils import plots
from medcot_utils.config import RunConfig, setting_names
from medcot_utils.data.contamination import contaminated
from medcot_utils.data.words import split_words
from medcot_utils.evaluation.comparison import MetricLine, compare_all, metric_lines
from medcot_utils.evaluation.grades import describe_grades, summarize_grades
from medcot_utils.evaluation.metrics import chrf, is_bullet_list
from medcot_utils.evaluation.scored_set import AnsweredQuestion
from medcot_utils.models.records import by_sample

if TYPE_CHECKING:
    from medcot_utils.data.rows import Question
    from medcot_utils.data.tokens import DataReport
    from medcot_utils.evaluation.comparison import Measured
    from medcot_utils.models.losses import RowLoss
    from medcot_utils.models.records import AnswerRecord
    from medcot_utils.run.directory import Run

# A length that is half or twice the base model's is marked.
_MARKED_RATIO = 2.0
# Settings in which runs may differ, those that change how the answers were made and judged first.
_SECTIONS = ("seed", "generation", "evaluation", "prompt", "model", "dataset", "lora", "training", "profile")
_SAME_BASE = ("model.name", "model.revision", "model.load_in_4bit")

# A question is the same in two runs only where id, text and reference are: ids are often no more than row numbers.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class _Shown:
    """What the page shows of a run, read once. `name` is no other run's; `seen`: ids that a trained row repeats."""

    run: Run
    name: str
    questions: Mapping[Key, Question]
    answers: Mapping[str, Mapping[Key, AnswerRecord]]  # by base and tuned
    data_report: DataReport
    seen: set[str]


def build_report(*runs: Run) -> str:
    """Return HTML with the claims, metrics and figures of each run, and every question with all answers side by side.

    Several runs stand beside each other: each base that differs, each run's tuned model, what differs between the runs, and
    the tuned models compared on the questions that all runs scored. The template escapes model text. Raises RunError if an
    artifact that it reads is missing."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(default=True, default_for_string=True)
    )
    shown = [_read(run, name) for run, name in zip(runs, _names([run.path for run in runs]), strict=True)]
    columns = _columns(shown)
    anchors = _anchors(shown)
    questions = [_shown_question(key, anchor, shown, columns) for key, anchor in anchors.items()]
    several = len(runs) > 1
    return environment.get_template("report.html.j2").render(
        runs=[_run_section(one, several, anchors) for one in shown],
        columns=columns,
        names=[one.name for one in shown],
        differences=_differences(shown) if several else {},
        tuned=_tuned_compared(shown) if several else None,
        questions=questions,
        # As text: a data set may number its specialties.
        specialties=sorted({str(one.question["specialty"]) for one in questions} - {""}),
        outcomes=sorted({one.outcome for one in questions}),
    )


def _percent(run: Run) -> str:
    """Return the run's evaluation.confidence_level as text, in per cent: `95`."""
    return f"{100 * run.config.evaluation.confidence_level:g}"


def _names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each run that no other has: its folder's, with as many parents as tell it from the others.

    A folder that is given twice gets a number."""
    parts = [path.resolve().parts for path in paths]
    names: list[str] = []
    for own in parts:
        others = [other for other in parts if other != own]
        depths = range(1, len(own) + 1)
        depth = next((n for n in depths if all(other[-n:] != own[-n:] for other in others)), 1)
        name = "/".join(own[-depth:])
        numbered = (f"{name} ({n})" for n in itertools.count(2))
        names.append(name if name not in names else next(one for one in numbered if one not in names))
    return names


def _read(run: Run, name: str) -> _Shown:
    asked = {(str(q["id"]), q["Question"], q["Response"]): q for q in run.read("questions")}
    keys = {key[0]: key for key in asked}
    answers = {}
    for side in ("base", "tuned"):
        greedy = by_sample(run.read(f"{side}_answers"))[0]
        answers[side] = {keys[str(record["id"])]: record for record in greedy if str(record["id"]) in keys}
    data_report = run.read("data_report")
    return _Shown(run, name, asked, answers, data_report, contaminated(data_report))


# --- one run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RunSection:
    """The page's section of one run. tables: {title: lines}. comparison, loss: figures as data addresses."""

    title: str
    config: RunConfig
    confidence: str
    plan: Mapping[str, object]
    measured: Measured
    tables: Mapping[str, Sequence[MetricLine]]
    notes: Sequence[str]
    comparison: str
    loss: str
    data: DataReport
    anchors: Mapping[str, str]  # {question id: what it is linked by}


def _run_section(shown: _Shown, named: bool, anchors: Mapping[Key, str]) -> _RunSection:
    run = shown.run
    measured: Measured = run.read("metrics")
    graded = summarize_grades(run)
    return _RunSection(
        title=f"Run {shown.name}" if named else "What fine-tuning did and did not do",
        config=run.config,
        confidence=_percent(run),
        plan=run.read("plan"),
        measured=measured,
        tables=_tables(measured),
        notes=[*measured["notes"], *(describe_grades(graded).splitlines() if graded else [])],
        comparison=plots.to_data_uri(plots.comparison_figure(measured["metrics"])),
        loss=plots.to_data_uri(plots.loss_figure(run.read("training_log"))),
        data=shown.data_report,
        anchors={key[0]: anchors[key] for key in shown.questions},
    )


def _tables(measured: Measured) -> dict[str, list[MetricLine]]:
    answered, apart = measured["n_answered"], measured["n_contaminated"]
    titled = {
        f"greedy answers, {measured['n_questions']} questions": measured["metrics"],
        f"sampled answers, {measured['n_samples']} a question, each question by its mean": measured["sampled"],
        f"greedy answers, the {answered} questions that both models answered in full form": measured["answered"],
        f"{apart} questions that training rows repeat, apart from all other figures": measured["contaminated"],
    }
    return {title: metric_lines(metrics) for title, metrics in titled.items() if metrics}


# --- several runs --------------------------------------------------------------------------------------------------


def _differences(shown: Sequence[_Shown]) -> dict[str, list[str]]:
    """Return what differs between the runs: the questions they asked, then settings, each with its value in every run."""
    common = set.intersection(*(set(one.questions) for one in shown))
    found = {}
    if any(set(one.questions) != common for one in shown):
        found["questions"] = [
            f"{len(one.questions)} asked, {len(set(one.questions) - common) or 'none'} of them not in all runs" for one in shown
        ]
    for name in (name for section in _SECTIONS for name in setting_names() if name.split(".")[0] == section):
        values = [one.run.config.get(name) for one in shown]
        if any(value != values[0] for value in values):
            found[name] = [_format_setting(value) for value in values]
    return found


def _format_setting(value: object) -> str:
    """Return a setting's value as text, of a path on this machine the last part only."""
    if isinstance(value, str):
        return f"…/{Path(value).name}" if Path(value).is_absolute() else value
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class _TunedCompared:
    """Each run's tuned model against the first run's, on `n` questions. losses: whether the held-out loss is compared too.

    lines: for every metric, the lines of all other models, the first run's as base; empty if there is no such question."""

    n: int
    confidence: str
    labels: Sequence[str]
    losses: bool = False
    lines: Sequence[Sequence[MetricLine]] = ()


def _tuned_compared(shown: Sequence[_Shown]) -> _TunedCompared:
    """Compare the tuned models on the questions that all runs asked, scored and did not train on.

    The held-out loss is compared too if all runs took it on the same rows."""
    first = shown[0]
    keys = [key for key in first.questions if all(_counts(one, key) for one in shown)]
    labels = [f"tuned, {one.name}" for one in shown]
    if not keys:
        return _TunedCompared(0, _percent(first.run), labels)
    questions = [
        AnsweredQuestion(first.questions[key], dict(zip(labels, (one.answers["tuned"][key] for one in shown), strict=True)), {})
        for key in keys
    ]
    losses = _common_losses(shown, labels)
    # The embedding model is not loaded again for this.
    settings = first.run.config.evaluation.model_copy(update={"embedding_model": None})
    compared = compare_all(questions, losses, settings, first.run.config.seed)
    lines = zip(*(metric_lines(metrics) for metrics in compared.values()), strict=True)
    return _TunedCompared(len(keys), _percent(first.run), labels, bool(losses), [*lines])


def _counts(shown: _Shown, key: Key) -> bool:
    return key in shown.answers["tuned"] and bool(shown.questions[key]["scored"]) and key[0] not in shown.seen


def _common_losses(shown: Sequence[_Shown], labels: Sequence[str]) -> list[RowLoss]:
    """Return the tuned models' losses on the held-out rows that no run trained on, if all runs have the same rows, else none."""
    rows = {one.run.manifest()["artifacts"].get("held_out_rows", {}).get("sha256") for one in shown}
    if len(rows) > 1 or rows == {None}:
        return []
    seen = set.union(*(one.seen for one in shown))
    return [
        record | {"model": label}
        for label, one in zip(labels, shown, strict=True)
        for record in one.run.read("held_out_loss")
        if record["model"] == "tuned" and str(record["id"]) not in seen
    ]


# --- side by side --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A model's answers on the page. `base`: the answers that they are set against."""

    label: str
    answers: Mapping[Key, AnswerRecord]
    base: Mapping[Key, AnswerRecord]


def _columns(shown: Sequence[_Shown]) -> list[_Column]:
    """Return each base that is another model, or answered otherwise, followed by the tuned models of its runs."""
    groups: list[list[_Shown]] = []
    for one in shown:
        group = next((group for group in groups if all(_same_base(one, other) for other in group)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    columns = []
    for group in groups:
        base = {key: record for one in group for key, record in one.answers["base"].items()}
        columns.append(_Column("base" if len(groups) == 1 else f"base, {_listed(one.name for one in group)}", base, base))
        for one in group:
            columns.append(_Column("tuned" if len(shown) == 1 else f"tuned, {one.name}", one.answers["tuned"], base))
    return columns


def _same_base(one: _Shown, other: _Shown) -> bool:
    ours, theirs = one.answers["base"], other.answers["base"]
    return all(one.run.config.get(name) == other.run.config.get(name) for name in _SAME_BASE) and all(
        ours[key][text] == theirs[key][text] for key in ours.keys() & theirs.keys() for text in ("thinking", "answer")
    )


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names)


def _anchors(shown: Sequence[_Shown]) -> dict[Key, str]:
    """Return {question: what it is linked by}: its id, with a number if another question has that id too."""
    anchors: dict[Key, str] = {}
    taken: set[str] = set()
    for key in itertools.chain.from_iterable(one.questions for one in shown):
        if key not in anchors:
            numbered = itertools.chain([key[0]], (f"{key[0]}-{n}" for n in itertools.count(2)))
            anchors[key] = next(anchor for anchor in numbered if anchor not in taken)
            taken.add(anchors[key])
    return anchors


@dataclass(frozen=True)
class _ShownAnswer:
    """An answer under its question. thinking_words, answer_words: lengths. marks: where it differs from its base model's."""

    label: str
    thinking: str
    answer: str
    thinking_words: int
    answer_words: int
    marks: Sequence[str]


@dataclass(frozen=True)
class _ShownQuestion:
    """A question with all answers to it.

    anchor: what it is linked by. outcome: how the models ended their reasoning. differ: whether they ended it differently.
    apart: see `_apart`."""

    question: Question
    anchor: str
    answers: Sequence[_ShownAnswer]
    tags: Sequence[str]
    outcome: str
    differ: bool
    apart: float


def _shown_question(key: Key, anchor: str, shown: Sequence[_Shown], columns: Sequence[_Column]) -> _ShownQuestion:
    asking = [one for one in shown if key in one.questions]
    alone = f"{_listed(one.name for one in asking)} alone" if len(asking) < len(shown) else ""
    given = [column for column in columns if key in column.answers]
    records = [column.answers[key] for column in given]
    outcome = _outcome([column.label for column in given], records, len(asking))
    return _ShownQuestion(
        question=asking[0].questions[key],
        anchor=anchor,
        answers=[_shown_answer(column.label, column.answers[key], column.base.get(key)) for column in given],
        tags=[f"asked in {alone}"] * bool(alone) + _tags(asking, key, len(shown) > 1),
        outcome=f"{alone}: {outcome}" if alone else outcome,
        differ=len({bool(record["well_formed"]) for record in records}) > 1,
        apart=_apart([record["answer"] or record["thinking"] for record in records]),
    )


def _tags(asking: Sequence[_Shown], key: Key, named: bool) -> list[str]:
    scored = asking[0].questions[key]["scored"]
    tags = [] if scored else ["shown, not scored"]
    if repeated := [one.name for one in asking if key[0] in one.seen]:
        where = f" in {_listed(repeated)}" if named else ""
        tags.append(f"repeated in training{where}{', set apart' if scored else ''}")
    return tags


def _apart(texts: Sequence[str]) -> float:
    """Return how unlike the two texts least alike are, 0 to 1, by chrF; two empty ones are alike."""
    pairs = itertools.combinations(texts, 2)
    return max((round(1 - chrf(last, first), 3) for first, last in pairs if first != last), default=0.0)


def _outcome(labels: Sequence[str], records: Sequence[AnswerRecord], n_runs: int) -> str:
    """Say how the models ended their reasoning, which takes no judgement of medicine."""
    ends, closed = {True: "reasons and answers", False: "does not"}, [bool(record["well_formed"]) for record in records]
    both = n_runs == 1 and len(closed) == 2
    if len(set(closed)) == 1:
        return f"{'both' if both else 'all'}: {ends[closed[0]]}"
    if both:
        return f"base {ends[closed[0]]}, tuned {ends[closed[1]]}"
    return f"reasons and answers: only {'; '.join(label for label, end in zip(labels, closed, strict=True) if end)}"


def _shown_answer(label: str, record: AnswerRecord, base: AnswerRecord | None) -> _ShownAnswer:
    thinking, answer = len(split_words(record["thinking"])), len(split_words(record["answer"]))
    marks = [] if record["well_formed"] else ["does not close the tag properly"]
    if not record["finished"]:
        marks.append("cut off")
    if is_bullet_list(record["answer"] or record["thinking"]):
        marks.append("a list")
    before, now = (len(split_words(f"{one['thinking']} {one['answer']}")) for one in (base or record, record))
    if before and now and not 1 / _MARKED_RATIO < now / before < _MARKED_RATIO:
        marks.append(f"{now / before:.1f} times the words" if now > before else f"{before / now:.1f} times fewer words")
    return _ShownAnswer(label, record["thinking"], record["answer"], thinking, answer, marks)
