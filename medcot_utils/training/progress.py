"""The file in which training notes its steps, for whoever waits for it, and its GPU memory, for notebook 05."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerCallback

from medcot_utils.machine.gpu import PeakMemory, peak_gpu_memory_mb
from medcot_utils.run.artifacts import PROGRESS
from medcot_utils.run.directory import Run
from medcot_utils.training.records import read_last


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


def read_peak(path: Path) -> PeakMemory | None:
    """Return the most GPU memory (MB) that the first process has held since training last began; None if it used no GPU."""
    peak = (read_last(path) or {}).get("peak_gpu_memory_mb")
    is_ours = isinstance(peak, dict) and all(isinstance(peak.get(kind), int) for kind in PeakMemory.__annotations__)
    return peak if is_ours else None


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
