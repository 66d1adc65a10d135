"""The lines about the merged model in report, status, and model card."""

from __future__ import annotations

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
    """Return the settings with which the merged model's verdict could be decided; an empty text if it is decided, if no number
    of questions would decide it, or if the run does not hold out as many rows."""
    merged = read_merged(run)
    needed = (
        max((one["needed"] or 0 for one in merged["verdicts"] if one["metric"] in merged["metrics"]), default=0) if merged else 0
    )
    config, settings = run.config, run.config.evaluation
    if not needed or needed > config.dataset.held_out_rows:
        return ""
    fewer = {"num_questions": settings.num_questions, "merged_questions": settings.merged_questions}
    sets = [f"--set evaluation.{name}={needed}" for name, asked in fewer.items() if asked is not None and asked < needed]
    return (
        f"to ask the merged model enough questions: {' '.join(sets)}; {config.dataset.held_out_rows} rows are held out"
        if sets
        else ""
    )


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
