"""The comparison as one self-contained HTML file, made from the run directory alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medcot_utils import plots
from medcot_utils.evaluation import METRICS, format_interval, verdict

if TYPE_CHECKING:
    from medcot_utils.run import Run


def build_report(run: Run) -> str:
    """HTML with the metrics, the figures and every question with both answers. Model text is escaped by the template.

    Raises RunError if an artifact it reads is missing."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("medcot_utils"), autoescape=select_autoescape(default=True, default_for_string=True)
    )
    measured = run.read("metrics")
    return environment.get_template("report.html.j2").render(
        config=run.config,
        metrics=[_line(name, metric) for name, metric in measured["metrics"].items()],
        n_questions=measured["n_questions"],
        confidence=round(100 * run.config.evaluation.confidence_level),
        comparison=plots.to_data_uri(plots.comparison_figure(measured["metrics"])),
        loss=plots.to_data_uri(plots.loss_figure(run.read("training_log"))),
        data_report=run.read("data_report"),
        plan=run.read("plan"),
        questions=_side_by_side(run),
    )


def _line(name: str, metric: dict[str, Any]) -> dict[str, str]:
    text, unit, _ = METRICS[name]
    cells = {side: format_interval(metric[side]) for side in ("base", "tuned", "difference")}
    return {"text": text, "unit": unit, "verdict": verdict(name, metric), **cells}


def _side_by_side(run: Run) -> list[dict[str, Any]]:
    answers = {side: {r["id"]: r for r in run.read(f"{side}_answers")} for side in ("base", "tuned")}
    return [
        {**question, "answers": {side: answers[side][question["id"]] for side in answers}} for question in run.read("questions")
    ]
