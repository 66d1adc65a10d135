"""The state of a run: each step with its costs, and the headline metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypedDict

from medcot_utils.evaluation.headline import HEADLINE, OF_ANSWERS
from medcot_utils.evaluation.merged_column import describe_merged, read_merged
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.directory import Run
from medcot_utils.run.manifest import GpuPeak

if TYPE_CHECKING:
    from medcot_utils.evaluation.comparison import ComparedMetric, Metrics


class StepStatus(TypedDict):
    """Hold a step as `medcot status` shows it. A value that was not recorded is None."""

    name: str
    state: str  # from `Run.step_state`
    seconds: float | None
    peak_memory_mb: int | None
    peak_gpu_memory_mb: GpuPeak | None
    error: str | None


class Status(TypedDict):
    """Hold a run as `medcot status --json` prints it."""

    run_dir: str
    profile: str
    steps: list[StepStatus]
    metrics: dict[str, ComparedMetric]  # the headline metrics in metrics.json; empty before notebook 06, and if they are stale
    forced: dict[str, ComparedMetric]  # the headline metrics of answers; empty without forced closing
    merged: dict[str, ComparedMetric]  # the headline metrics, tuned to merged model; empty before notebook 07 measured it
    merged_verdict: str  # whether the merged model behaves as measured; empty if it is not measured


def read_status(run: Run) -> Status:
    """Return the state and costs of each step of a run, and the headline metrics."""
    recorded = run.manifest()["steps"]
    steps = [
        {"name": name, "state": run.step_state(name, deep=False)}
        | {key: recorded.get(name, {}).get(key) for key in ("seconds", "peak_memory_mb", "peak_gpu_memory_mb", "error")}
        for name in STEPS
    ]
    measured = run.read("metrics") if run.step_to_redo("metrics") is None else {"metrics": {}}
    merged = read_merged(run)
    return {
        "run_dir": str(run.path),
        "profile": run.config.profile,
        "steps": steps,
        "metrics": _only(HEADLINE, measured["metrics"]),
        "forced": _only(OF_ANSWERS, measured.get("forced", {})),
        "merged": _only(HEADLINE, merged["metrics"] if merged else {}),
        "merged_verdict": describe_merged(run),
    }


def _only(names: Iterable[str], metrics: Metrics) -> dict[str, ComparedMetric]:
    return {name: metrics[name] for name in names if name in metrics}
