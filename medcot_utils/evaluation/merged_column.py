"""The merged model beside base and tuned model: what report, status and model card say of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medcot_utils.evaluation.merged import MergedMeasured
    from medcot_utils.run.directory import Run

SEE_NOTEBOOK_07 = "Merged model: see notebook 07"


def is_made(run: Run, name: str) -> bool:
    """Return whether the run makes this artifact of notebook 07 and has made it from what it holds now."""
    return run.wants(name) and run.is_fresh(name, deep=False)


def read_merged(run: Run) -> MergedMeasured | None:
    """Return what notebook 07 measured of the merged model; None until it has, and if it does not (evaluation.measure_merged)."""
    merged: MergedMeasured | None = run.read("merged_metrics") if is_made(run, "merged_metrics") else None
    return merged


def describe_merged(run: Run) -> str:
    """Return one line on whether people load what was measured; an empty text if the run does not measure it."""
    if not run.wants("merged_metrics"):
        return ""
    merged = read_merged(run)
    if merged is None:
        return f"{SEE_NOTEBOOK_07}."
    unasked = f" Its answers were not measured: {merged['not_measured']}." if merged["not_measured"] else ""
    return f"{merged['summary'].rstrip('.')}.{unasked}"
