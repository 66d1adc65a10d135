"""Training in several processes from a notebook: torchrun beneath, one bar and one figure above."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from medcot_utils.machine.paths import HOME
from medcot_utils.run.directory import Run
from medcot_utils.training.callbacks import LossFigure, TimeBudgetReached
from medcot_utils.training.trainer import PROGRESS, TrainingError, last_good_checkpoint

_OUT_OF_MEMORY = "out of memory"
_FOLLOWS_FROM_ANOTHER = ("DistBackendError", "DistNetworkError", "Connection", "NCCL", "gloo")
_PR_SET_PDEATHSIG = 1  # prctl(2)


def train_in_processes(run: Run, num_processes: int) -> None:
    """Train the run to its last step in `num_processes` processes, one to a GPU; the last checkpoint is left to be taken up.

    A process that runs out of memory ends them all, and the next batch plan goes on from the last checkpoint. Raises
    TrainingError with the first failing process's message, or TimeBudgetReached where training.max_hours ended it in time."""
    check_gpus(num_processes)
    output_dir = run.checkpoint_dir("adapter")
    for skip_plans in itertools.count():
        progress = output_dir / PROGRESS
        progress.unlink(missing_ok=True)
        failure = _launch(run, num_processes, skip_plans, progress)
        if failure is None:
            return
        kind, message = failure
        if kind == "TimeBudgetReached":
            raise TimeBudgetReached(message)
        if _OUT_OF_MEMORY not in message:
            raise TrainingError(f"training in {num_processes} processes failed: {kind}: {message}")
        checkpoint = last_good_checkpoint(output_dir)
        print(f"out of memory: going on with the next smaller batch plan from {checkpoint.name if checkpoint else 'the start'}")


def check_gpus(num_processes: int) -> None:
    """Raises TrainingError if there are GPUs, but fewer than processes."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < num_processes:
        raise TrainingError(
            f"training.num_processes is {num_processes}, but only {gpus} can be seen: each process needs a GPU of its own. "
            f"Set training.num_processes={gpus}"
        )


def _end_with_parent() -> None:
    # Workers that outlived a killed notebook would go on writing the checkpoints that the next call writes too. Linux only.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _launch(run: Run, num_processes: int, skip_plans: int, progress: Path) -> tuple[str, str] | None:
    """Run torchrun to its end, showing progress; (kind, message) of the first failure, or None."""
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        command += [f"--log-dir={logs}", "--redirects=3", "-m", "medcot_utils.training.worker", str(run.path)]
        command += ["--skip-plans", str(skip_plans)]
        package = str(HOME)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
        said = Path(logs) / "torchrun.log"
        with said.open("w") as out:
            # A group of its own, ended by hand below; and by the kernel, should this process be killed.
            started = subprocess.Popen(
                command, env=environment, start_new_session=True, preexec_fn=_end_with_parent, stdout=out, stderr=out
            )
        try:
            _show(started, progress)
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGTERM)
                started.wait(30)
        return None if started.returncode == 0 else _first_failure(Path(logs))


def _first_failure(logs: Path) -> tuple[str, str]:
    """The kind and message of the failure that the others follow from, by torchrun's log and the files that its `record`
    leaves: a process that was killed, else the first with an error, else one that aborted; a lost connection to another last."""
    log = logs / "torchrun.log"
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    failures: list[tuple[int, float, tuple[str, str]]] = []
    # Each process that failed has its rank and, on the next line, how it ended: -9 for SIGKILL, 1 for an exception.
    for rank, number in re.findall(r"^ *rank *: (\d+).*\n *exitcode *: -(\d+)", said, re.MULTILINE):
        if int(number) != signal.SIGTERM:  # that one torchrun sends itself, to those that are left
            why = ", as a machine out of main memory does" if int(number) == signal.SIGKILL else ""
            # NCCL aborts a process that waited in vain for another.
            order = 2 if int(number) == signal.SIGABRT else 0
            failures.append((order, 0.0, (f"process {rank}", f"killed by signal {number}{why}")))
    for path in logs.rglob("error.json"):
        message: Any = json.loads(path.read_text(encoding="utf-8"))["message"]
        if isinstance(message, dict):
            order = 3 if any(word in message["message"] for word in _FOLLOWS_FROM_ANOTHER) else 1
            kind, _, text = message["message"].partition(": ")
            told = kind if kind == "TimeBudgetReached" else f"process {path.parent.name}: {kind}"
            failures.append((order, float(message["extraInfo"]["timestamp"]), (told, text)))
    if failures:
        return min(failures)[2]
    tails = [path.read_text(encoding="utf-8", errors="replace").strip()[-300:] for path in sorted(logs.rglob("*.log"))]
    return "a process was killed", " | ".join(tail.splitlines()[-1] for tail in tails if tail)


def _show(started: subprocess.Popen, progress: Path) -> None:
    """Follow the first process's lines until the processes have ended."""
    figure, read = LossFigure(), 0
    with tqdm(desc="training", unit="step") as bar:
        while True:
            ended = started.poll() is not None
            text = progress.read_text(encoding="utf-8") if progress.exists() else ""
            lines = text.split("\n")[:-1]  # what has no line end yet is still being written
            for line in lines[read:]:
                state = json.loads(line)
                bar.total = state["max_steps"]
                bar.update(state["step"] - bar.n)
                if log := [entry for entry in state.get("log_history", []) if "loss" in entry]:
                    bar.set_postfix(loss=f"{float(log[-1]['loss']):.3f}")
            logged = [line for line in lines[read:] if "log_history" in line]
            if logged:
                figure.draw(json.loads(logged[-1])["log_history"])
            read = len(lines)
            if ended:
                return
            time.sleep(0.5)
