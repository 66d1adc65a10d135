"""The comparison as one self-contained HTML file, made from run directories alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils import plots
from medcot_utils.config import setting_names
from medcot_utils.data.contamination import contaminated
from medcot_utils.evaluation.comparison import compare_all, verdict
from medcot_utils.evaluation.grades import describe, win_rate
from medcot_utils.evaluation.intervals import format_interval
from medcot_utils.evaluation.metrics import METRICS, chrf, is_bullet_list
from medcot_utils.models.generation import by_sample

if TYPE_CHECKING:
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
    questions: dict[Key, dict[str, Any]]
    answers: dict[str, dict[Key, dict[str, Any]]]
    data_report: dict[str, Any]
    seen: set[str]


def build_report(*runs: Run) -> str:
    """HTML with the claims, metrics and figures of each run, and every question with all answers side by side.

    Several runs stand beside each other: each base that differs, each run's tuned model, what differs between the runs, and
    the tuned models compared on the questions that all runs scored. Model text is escaped by the template. Raises RunError
    if an artifact that it reads is missing."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(default=True, default_for_string=True)
    )
    shown = [_read(run, name) for run, name in zip(runs, _names([run.path for run in runs]), strict=True)]
    columns = _columns(shown)
    anchors = _anchors(shown)
    questions = _side_by_side(shown, columns, anchors)
    several = len(runs) > 1
    return environment.get_template("report.html.j2").render(
        runs=[_run_section(one, several, anchors) for one in shown],
        columns=columns,
        names=[one.name for one in shown],
        differences=_differences(shown) if several else [],
        tuned=_tuned_compared(shown) if several else None,
        questions=questions,
        specialties=sorted({question["specialty"] for question in questions} - {""}),
        outcomes=sorted({question["outcome"] for question in questions}),
    )


def _percent(run: Run) -> str:
    """`95`: the run's evaluation.confidence_level as text, in per cent."""
    return f"{100 * run.config.evaluation.confidence_level:g}"


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each run that no other has: its folder's, with as many parents as tell it from the others; a folder that is
    given twice gets a number."""
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
    questions = run.read("questions")
    keys = {str(q["id"]): (str(q["id"]), q["Question"], q["Response"]) for q in questions}
    answers = {
        side: {keys[str(record["id"])]: record for record in greedy if str(record["id"]) in keys}
        for side in ("base", "tuned")
        for greedy in by_sample(run.read(f"{side}_answers"))[:1]
    }
    data_report = run.read("data_report")
    asked = {keys[str(question["id"])]: question for question in questions}
    return _Shown(run, name, asked, answers, data_report, contaminated(data_report))


# --- one run -------------------------------------------------------------------------------------------------------


def _run_section(shown: _Shown, named: bool, anchors: dict[Key, str]) -> dict[str, Any]:
    run, data_report, measured = shown.run, shown.data_report, shown.run.read("metrics")
    tables = [{"title": f"greedy answers, {measured['n_questions']} questions", "lines": _lines(measured["metrics"])}]
    if measured["sampled"]:
        title = f"sampled answers, {measured['n_samples']} a question, each question by its mean"
        tables.append({"title": title, "lines": _lines(measured["sampled"])})
    if measured["answered"]:
        title = f"greedy answers, the {measured['n_answered']} questions that both models answered in full form"
        tables.append({"title": title, "lines": _lines(measured["answered"])})
    if measured["contaminated"]:
        title = f"{measured['n_contaminated']} questions that training rows repeat, apart from all other figures"
        tables.append({"title": title, "lines": _lines(measured["contaminated"])})
    return {
        "title": f"Run {shown.name}" if named else "What fine-tuning did and did not do",
        "config": run.config,
        "confidence": _percent(run),
        "plan": run.read("plan"),
        "n_questions": measured["n_questions"],
        "multiple_choice": "mcq_accuracy" in measured["metrics"],
        "claims": measured["claims"],
        "tables": tables,
        "notes": [*measured["notes"], *(describe(graded).splitlines() if (graded := win_rate(run)) else [])],
        "comparison": plots.to_data_uri(plots.comparison_figure(measured["metrics"])),
        "loss": plots.to_data_uri(plots.loss_figure(run.read("training_log"))),
        "repeats": data_report["repeats"],
        "repeats_dropped": data_report["repeats_dropped"],
        "anchors": {key[0]: anchors[key] for key in shown.questions},
    }


def _lines(metrics: dict[str, Any]) -> list[dict[str, str]]:
    lines = []
    for name, metric in metrics.items():
        cells = {side: format_interval(metric[side]) for side in ("base", "tuned", "difference")}
        lines.append({"text": METRICS[name].text, "unit": METRICS[name].unit, "verdict": verdict(name, metric), **cells})
    return lines


# --- several runs --------------------------------------------------------------------------------------------------


def _differences(shown: Sequence[_Shown]) -> list[dict[str, Any]]:
    """What differs between the runs: the questions they asked, then settings, each with its value in every run."""
    common = set.intersection(*(set(one.questions) for one in shown))
    lines = []
    if any(set(one.questions) != common for one in shown):
        alone = [
            f"{len(one.questions)} asked, {len(set(one.questions) - common) or 'none'} of them not in all runs" for one in shown
        ]
        lines.append({"name": "questions", "cells": alone})
    for name in (name for section in _SECTIONS for name in setting_names() if name.split(".")[0] == section):
        values = [one.run.config.get(name) for one in shown]
        if any(value != values[0] for value in values):
            lines.append({"name": name, "cells": [_setting(value) for value in values]})
    return lines


def _setting(value: Any) -> str:
    """A setting's value as text, of a path on this machine the last part only."""
    if isinstance(value, str):
        return f"…/{Path(value).name}" if Path(value).is_absolute() else value
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _tuned_compared(shown: Sequence[_Shown]) -> dict[str, Any]:
    """Each run's tuned model against the first run's, on the questions that all runs asked, scored and did not train on:
    {n, confidence, first, others, lines, losses}, without lines where there is no such question.

    The held-out loss is compared too where all runs took it on the same rows."""
    first = shown[0]
    keys = [key for key in first.questions if all(_counts(one, key) for one in shown)]
    labels = [f"tuned, {one.name}" for one in shown]
    found = {"n": len(keys), "confidence": _percent(first.run), "first": labels[0], "others": labels[1:], "lines": []}
    if not keys:
        return found | {"losses": False}
    # Under one name for all runs: a question's id is what the comparison goes by.
    answers = {
        label: [one.answers["tuned"][key] | {"id": key[0]} for key in keys] for label, one in zip(labels, shown, strict=True)
    }
    losses = _common_losses(shown, labels)
    # The embedding model is not loaded again for this.
    settings = first.run.config.evaluation.model_copy(update={"embedding_model": None})
    compared = compare_all(answers, [key[2] for key in keys], losses, settings, first.run.config.seed)
    tables = [_lines(metrics) for metrics in compared.values()]
    lines = [
        {"text": line["text"], "unit": line["unit"], "first": line["base"], "others": [table[number] for table in tables]}
        for number, line in enumerate(tables[0])
    ]
    return found | {"lines": lines, "losses": bool(losses)}


def _counts(shown: _Shown, key: Key) -> bool:
    return key in shown.answers["tuned"] and bool(shown.questions[key]["scored"]) and key[0] not in shown.seen


def _common_losses(shown: Sequence[_Shown], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The tuned models' losses on the held-out rows that no run trained on, if all runs have the same rows, else none."""
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


def _columns(shown: Sequence[_Shown]) -> list[dict[str, Any]]:
    """Each base that is another model, or answered otherwise, followed by the tuned models of its runs: {label, answers, runs,
    base}, `base` being the answers that the column's own are set against."""
    groups: list[list[_Shown]] = []
    for one in shown:
        group = next((group for group in groups if all(_same_base(one, other) for other in group)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    columns = []
    for group in groups:
        answers = {key: record for one in group for key, record in one.answers["base"].items()}
        label = "base" if len(groups) == 1 else f"base, {_listed(one.name for one in group)}"
        columns.append({"label": label, "answers": answers, "base": answers})
        for one in group:
            label = "tuned" if len(shown) == 1 else f"tuned, {one.name}"
            columns.append({"label": label, "answers": one.answers["tuned"], "base": answers})
    return columns


def _same_base(one: _Shown, other: _Shown) -> bool:
    ours, theirs = one.answers["base"], other.answers["base"]
    return all(one.run.config.get(name) == other.run.config.get(name) for name in _SAME_BASE) and all(
        ours[key][text] == theirs[key][text] for key in ours.keys() & theirs.keys() for text in ("thinking", "answer")
    )


def _listed(names: Any) -> str:
    return " and ".join(names)


def _anchors(shown: Sequence[_Shown]) -> dict[Key, str]:
    """{question: what its card is linked by}: its id, with a number where another question has that id too."""
    anchors: dict[Key, str] = {}
    taken: set[str] = set()
    for key in itertools.chain.from_iterable(one.questions for one in shown):
        if key not in anchors:
            numbered = itertools.chain([key[0]], (f"{key[0]}-{n}" for n in itertools.count(2)))
            anchors[key] = next(anchor for anchor in numbered if anchor not in taken)
            taken.add(anchors[key])
    return anchors


def _side_by_side(shown: Sequence[_Shown], columns: Sequence[dict[str, Any]], anchors: dict[Key, str]) -> list[dict[str, Any]]:
    lines = []
    for key, anchor in anchors.items():
        asking = [one for one in shown if key in one.questions]
        alone = f"{_listed(one.name for one in asking)} alone" if len(asking) < len(shown) else ""
        given = [(column, column["answers"][key]) for column in columns if key in column["answers"]]
        records = [record for _, record in given]
        outcome = _outcome([column["label"] for column, _ in given], records, len(asking))
        lines.append(
            asking[0].questions[key]
            | {
                "anchor": anchor,
                "answers": [_answer(column["label"], record, column["base"].get(key, record)) for column, record in given],
                "tags": [f"asked in {alone}"] * bool(alone) + _tags(asking, key, len(shown) > 1),
                "outcome": f"{alone}: {outcome}" if alone else outcome,
                "differ": len({bool(record["well_formed"]) for record in records}) > 1,
                "apart": _apart([record["answer"] or record["thinking"] for record in records]),
            }
        )
    return lines


def _tags(asking: Sequence[_Shown], key: Key, named: bool) -> list[str]:
    scored = asking[0].questions[key]["scored"]
    tags = [] if scored else ["shown, not scored"]
    if repeated := [one.name for one in asking if key[0] in one.seen]:
        where = f" in {_listed(repeated)}" if named else ""
        tags.append(f"repeated in training{where}{', set apart' if scored else ''}")
    return tags


def _apart(texts: Sequence[str]) -> float:
    """How unlike the two texts least alike are, 0 to 1, by chrF; two empty ones are alike."""
    pairs = itertools.combinations(texts, 2)
    return max((round(1 - chrf(last, first), 3) for first, last in pairs if first != last), default=0.0)


def _outcome(labels: Sequence[str], records: Sequence[dict[str, Any]], n_runs: int) -> str:
    """How the models ended their reasoning: what can be read off without judging medicine."""
    ends, closed = {True: "reasons and answers", False: "does not"}, [bool(record["well_formed"]) for record in records]
    both = n_runs == 1 and len(closed) == 2
    if len(set(closed)) == 1:
        return f"{'both' if both else 'all'}: {ends[closed[0]]}"
    if both:
        return f"base {ends[closed[0]]}, tuned {ends[closed[1]]}"
    return f"reasons and answers: only {'; '.join(label for label, end in zip(labels, closed, strict=True) if end)}"


def _answer(label: str, record: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The record with its lengths in words and the marks of where it differs from its base model's."""
    thinking, answer = len(record["thinking"].split()), len(record["answer"].split())
    marks = [] if record["well_formed"] else ["does not close the tag properly"]
    if not record["finished"]:
        marks.append("cut off")
    if is_bullet_list(record["answer"] or record["thinking"]):
        marks.append("a list")
    before, now = (len(f"{one['thinking']} {one['answer']}".split()) for one in (base, record))
    if before and now and not 1 / _MARKED_RATIO < now / before < _MARKED_RATIO:
        marks.append(f"{now / before:.1f} times the words" if now > before else f"{before / now:.1f} times fewer words")
    words = {"thinking_words": thinking, "answer_words": answer}
    return {"label": label, "thinking": record["thinking"], "answer": record["answer"], "marks": marks} | words
