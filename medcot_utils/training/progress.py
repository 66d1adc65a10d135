"""The file in which training notes each step: read by a notebook that waits for several processes, and for the GPU memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NotRequired, TypedDict

from transformers import TrainerCallback

from medcot_utils.machine.gpu import PeakMemory, peak_gpu_memory_mb
from medcot_utils.run.artifacts import PROGRESS
from medcot_utils.run.directory import Run
from medcot_utils.training.records import LogEntry


class ProgressLine(TypedDict):
    """Hold a line of the file that `ProgressFile` writes."""

    step: int  # optimizer steps taken so far
    max_steps: int
    plan: NotRequired[str]  # only in the first line of several processes: how they split a step
    log_history: NotRequired[list[LogEntry]]  # only with several processes, when training begins or something is logged
    peak_gpu_memory_mb: NotRequired[PeakMemory]  # of the first process since its training began; not without a GPU


class ProgressFile(TrainerCallback):
    """Write each step that the first process takes as a line of JSON.

    `medcot run` reads the file when training is interrupted, and notebook 05 for the GPU memory. With the log, the notebook that
    waits for several processes reads it too.

    Args: plan: how several processes split a step, for the notebook; None for a single process, which writes no log."""

    def __init__(self, path: Path, plan: str | None = None) -> None:
        self.path, self.plan = path, plan

    def _write(self, state, **more) -> None:
        if state.is_world_process_zero:
            memory = {"peak_gpu_memory_mb": peak} if (peak := peak_gpu_memory_mb(since_reset=True)) else {}
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": state.global_step, "max_steps": state.max_steps} | memory | more) + "\n")

    def on_train_begin(self, args, state, control, **kwargs):
        self._write(state, **({"plan": self.plan, "log_history": state.log_history} if self.plan else {}))

    def on_step_end(self, args, state, control, **kwargs):
        self._write(state)

    on_train_end = on_step_end  # what was evaluated or saved after the last step counts too

    def on_log(self, args, state, control, **kwargs):
        if self.plan:
            self._write(state, log_history=state.log_history)


def read_line(line: str) -> ProgressLine | None:
    """Return what a line holds; None for half a line, which a full disk or a killed process leaves before the next one."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def read_peak(path: Path) -> PeakMemory | None:
    """Return the most GPU memory (MB) that the first process has held since training last began; None if no line tells."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            peak = json.loads(line)["peak_gpu_memory_mb"]
            return PeakMemory(allocated=int(peak["allocated"]), reserved=int(peak["reserved"]))
        except (ValueError, LookupError, TypeError, OverflowError):  # of no GPU, half a line, or not ours: it is only shown
            continue
    return None


def measured_memory_gb(run: Run) -> dict[str, float]:
    """Return the peak memory of the first GPU that trained, in GB, by kind. It is empty without a GPU, and in a run that an
    earlier version trained."""
    peak = read_peak(run.checkpoint_dir("adapter") / PROGRESS)
    if peak is None:
        return {}
    return {
        "memory, measured: reserved (GB)": round(peak["reserved"] / 1e3, 1),
        "memory, measured: in use (GB)": round(peak["allocated"] / 1e3, 1),
    }
