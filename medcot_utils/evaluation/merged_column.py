"""The lines about the merged model in report, status, and model card."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medcot_utils.evaluation.merged import MergedMeasured
    from medcot_utils.run.directory import Run

SEE_NOTEBOOK_07 = "Merged model: see notebook 07"


def is_made(run: Run, name: str) -> bool:
    """Return whether the run makes this artifact of notebook 07 and the one it holds belongs to today's adapter and settings."""
    return run.wants(name) and run.step_to_redo(name) is None


def describe_stale(run: Run, name: str) -> str:
    """Return `stale: run notebook 07_export` for an artifact of an earlier training or of other settings, or an empty text."""
    step = run.step_to_redo(name) if name in run.manifest()["artifacts"] else None
    return f"stale: run notebook {step}" if step else ""


def read_merged(run: Run) -> MergedMeasured | None:
    """Return what notebook 07 measured of the merged model.

    Return None before that, and if evaluation.measure_merged is false."""
    merged: MergedMeasured | None = run.read("merged_metrics") if is_made(run, "merged_metrics") else None
    return merged


def suggest_questions(run: Run) -> str:
    """Return the command that asks the merged model as many questions as would decide its verdict; an empty text if none would,
    or if the run holds out fewer rows."""
    merged, settings, rows = read_merged(run), run.config.evaluation, run.config.dataset.held_out_rows
    verdicts = merged["verdicts"] if merged else []
    needed = max((one["needed"] or 0 for one in verdicts if one["about"] != "loss"), default=0)  # the loss takes rows
    asked = {"num_questions": settings.num_questions, "merged_questions": settings.merged_questions}
    sets = [f"--set evaluation.{name}={needed}" for name, number in asked.items() if number is not None and number < needed]
    if not sets or needed > rows:
        return ""
    call = shlex.join(["medcot", "run", "--run-dir", str(run.path)])
    whom = "all models" if settings.num_questions < needed else "the merged model"
    return f"to ask {whom} as many of the {rows} held-out questions as would tell: {call} {' '.join(sets)}"


def describe_merged(run: Run) -> str:
    """Return one line on whether the merged model behaves as measured; an empty text if the run does not measure that."""
    if not run.wants("merged_metrics"):
        return ""
    merged = read_merged(run)
    if merged is None:
        stale = describe_stale(run, "merged_metrics")
        return f"The merged model is {stale}." if stale else f"{SEE_NOTEBOOK_07}."
    why = merged["not_measured"]
    unasked = f" Its answers were not measured: {why}." if why and why not in merged["summary"] else ""
    return f"{merged['summary'].rstrip('.')}.{unasked}"
