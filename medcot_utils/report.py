"""The comparison as one self-contained HTML file, made from run directories alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medcot_utils import plots
from medcot_utils.evaluation import format_interval, verdict
from medcot_utils.generation import by_sample
from medcot_utils.grading import describe, win_rate
from medcot_utils.measures import METRICS, chrf, is_bullet_list

if TYPE_CHECKING:
    from medcot_utils.run import Run

# A length that is half or twice the first model's is marked.
_MARKED_RATIO = 2.0


def build_report(*runs: Run) -> str:
    """HTML with the claims, metrics and figures of each run, and every question with all answers side by side.

    Several runs stand beside each other: base of the first, then each run's tuned model. Model text is escaped by the
    template. Raises RunError if an artifact that it reads is missing."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("medcot_utils"), autoescape=select_autoescape(default=True, default_for_string=True)
    )
    columns = _columns(runs)
    questions = _side_by_side(runs, columns)
    return environment.get_template("report.html.j2").render(
        runs=[_run_section(run, len(runs) > 1) for run in runs],
        columns=columns,
        confidence=round(100 * runs[0].config.evaluation.confidence_level),
        questions=questions,
        asked={question["id"] for question in questions},
        specialties=sorted({question["specialty"] for question in questions} - {""}),
        outcomes=sorted({question["outcome"] for question in questions}),
    )


def _run_section(run: Run, named: bool) -> dict[str, Any]:
    measured, data_report = run.read("metrics"), run.read("data_report")
    tables = [{"title": f"greedy answers, {measured['n_questions']} questions", "lines": _lines(measured["metrics"])}]
    if measured["sampled"]:
        title = f"sampled answers, {measured['n_samples']} a question, each question by its mean"
        tables.append({"title": title, "lines": _lines(measured["sampled"])})
    if measured["contaminated"]:
        title = f"{measured['n_contaminated']} questions that training rows repeat, apart from all other figures"
        tables.append({"title": title, "lines": _lines(measured["contaminated"])})
    return {
        "title": f"Run {run.path.name}" if named else "What fine-tuning did and did not do",
        "config": run.config,
        "plan": run.read("plan"),
        "n_questions": measured["n_questions"],
        "claims": measured["claims"],
        "tables": tables,
        "notes": [*measured["notes"], *(describe(graded).splitlines() if (graded := win_rate(run)) else [])],
        "comparison": plots.to_data_uri(plots.comparison_figure(measured["metrics"])),
        "loss": plots.to_data_uri(plots.loss_figure(run.read("training_log"))),
        "repeats": data_report["repeats"],
        "repeats_dropped": data_report["repeats_dropped"],
    }


def _lines(metrics: dict[str, Any]) -> list[dict[str, str]]:
    lines = []
    for name, metric in metrics.items():
        cells = {side: format_interval(metric[side]) for side in ("base", "tuned", "difference")}
        lines.append({"text": METRICS[name].text, "unit": METRICS[name].unit, "verdict": verdict(name, metric), **cells})
    return lines


def _columns(runs: Sequence[Run]) -> list[dict[str, Any]]:
    def greedy(run: Run, side: str) -> dict[str, dict[str, Any]]:
        return {record["id"]: record for record in by_sample(run.read(f"{side}_answers"))[0]}

    first = {"label": "base", "answers": greedy(runs[0], "base")}
    names = ["tuned"] if len(runs) == 1 else [f"tuned, {run.path.name}" for run in runs]
    return [first, *({"label": name, "answers": greedy(run, "tuned")} for name, run in zip(names, runs, strict=True))]


def _side_by_side(runs: Sequence[Run], columns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    questions = {question["id"]: question for run in runs for question in run.read("questions")}
    lines = []
    for question in questions.values():
        answers = [(column["label"], column["answers"].get(question["id"])) for column in columns]
        given = [(label, record) for label, record in answers if record]
        first, last = given[0][1], given[-1][1]
        lines.append(
            question
            | {
                "answers": [_answer(label, record, first) for label, record in given],
                "tags": [] if question["scored"] else ["shown, not scored"],
                "outcome": _outcome(first, last),
                "apart": _apart(first["answer"] or first["thinking"], last["answer"] or last["thinking"]),
            }
        )
    return lines


def _apart(first: str, last: str) -> float:
    """How unlike two texts are, 0 to 1, by chrF; two empty ones are alike."""
    return round(1 - chrf(last, first), 3) if first or last else 0.0


def _outcome(first: dict[str, Any], last: dict[str, Any]) -> str:
    """How the outermost two models ended their reasoning: what can be read off without judging medicine."""
    ends = {True: "reasons and answers", False: "does not"}
    before, after = ends[bool(first["well_formed"])], ends[bool(last["well_formed"])]
    return f"both: {before}" if before == after else f"base {before}, tuned {after}"


def _answer(label: str, record: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """The record with its lengths in words and the marks of where it differs from the first model's."""
    thinking, answer = len(record["thinking"].split()), len(record["answer"].split())
    marks = [] if record["well_formed"] else ["does not close the tag properly"]
    if not record["finished"]:
        marks.append("cut off")
    if is_bullet_list(record["answer"] or record["thinking"]):
        marks.append("a list")
    before, now = (len(f"{one['thinking']} {one['answer']}".split()) for one in (first, record))
    if before and now and not 1 / _MARKED_RATIO < now / before < _MARKED_RATIO:
        marks.append(f"{now / before:.1f} times the words" if now > before else f"{before / now:.1f} times fewer words")
    words = {"thinking_words": thinking, "answer_words": answer}
    return {"label": label, "thinking": record["thinking"], "answer": record["answer"], "marks": marks} | words
