"""Training in several processes from a notebook, through torchrun, with one progress bar and one figure."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tqdm.auto import tqdm

from medcot_utils.machine import hardware
from medcot_utils.machine.gpu import note_peak, note_use
from medcot_utils.machine.paths import HOME
from medcot_utils.machine.processes import describe_exit, end_with_parent, read_last_line
from medcot_utils.machine.redaction import redact
from medcot_utils.plain_text import say
from medcot_utils.run.artifacts import PROGRESS
from medcot_utils.run.clock import TimeBudgetReached
from medcot_utils.run.directory import Run
from medcot_utils.training.agent import Failure
from medcot_utils.training.callbacks import LossFigure
from medcot_utils.training.checkpoints import is_last, last_good_checkpoint
from medcot_utils.training.progress import read_peak
from medcot_utils.training.records import read_line
from medcot_utils.training.trainer import TrainingError

_OUT_OF_MEMORY = "out of memory"
_END_SECONDS = 60  # torchrun itself gives its processes 30


def train_in_processes(run: Run, num_processes: int) -> None:
    """Train the run to its last step in `num_processes` processes, one per GPU, and leave the last checkpoint to resume from.

    If a process runs out of memory, all of them end, and training resumes from the last checkpoint with the next batch plan.

    Raises:
        TrainingError: if training fails, with the process that failed first and its message; or if there are fewer GPUs than
            processes.
        TimeBudgetReached: if the training stopped before training.max_hours ended."""
    output_dir = run.checkpoint_dir("adapter")
    if (checkpoint := last_good_checkpoint(output_dir)) and is_last(checkpoint):
        return
    check_gpus(num_processes)
    note_use(*range(num_processes))
    for skip_plans in itertools.count():
        progress = output_dir / PROGRESS
        progress.unlink(missing_ok=True)
        failure = _launch(run, num_processes, skip_plans, progress)
        if failure is None:
            note_peak(read_peak(progress))
            return
        if failure.kind == TimeBudgetReached.__name__:
            raise TimeBudgetReached(failure.message)
        if _OUT_OF_MEMORY not in failure.message:
            raise TrainingError(redact(f"training in {num_processes} processes failed: {failure}"))
        checkpoint = last_good_checkpoint(output_dir)
        say(f"out of memory: continuing with the next smaller batch plan from {checkpoint.name if checkpoint else 'the start'}")


def check_gpus(num_processes: int) -> None:
    """Raise TrainingError if there are GPUs, but fewer than `num_processes`."""
    hardware.require_gpus(num_processes, TrainingError)


def _launch(run: Run, num_processes: int, skip_plans: int, progress: Path) -> Failure | None:
    """Run torchrun to its end, show progress, and return the failure that ended it, if any.

    torchrun's agent gets a process of its own, because it handles the signals of its process and blocks the main thread, which
    the notebook needs to draw. Inside the notebook's process, its workers would also outlive a killed notebook."""
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        report, log = logs / "failure.json", logs / "agent.log"
        command = [sys.executable, "-m", "medcot_utils.training.agent", str(report)]
        command += ["--standalone", f"--nproc-per-node={num_processes}", f"--log-dir={logs}", "--redirects=3"]
        command += ["-m", "medcot_utils.training.worker", str(run.path), "--skip-plans", str(skip_plans)]
        search = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": search}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
        with log.open("w") as out:
            # It has its own process group, which `_end` ends. If this process is killed, the operating system ends it.
            started = subprocess.Popen(
                command, env=environment, start_new_session=True, preexec_fn=end_with_parent, stdout=out, stderr=out
            )
        try:
            _show(started, progress)
        finally:
            _end(started)
        if started.returncode == 0:
            return None
        if report.exists():
            return Failure(**json.loads(report.read_text(encoding="utf-8")))
        # torchrun itself was killed, or it could not begin.
        return Failure("torchrun", "", f"{describe_exit(started.returncode)}: {read_last_line(log)}")


def _end(started: subprocess.Popen) -> None:
    """End torchrun and its processes, by force if they do not end by themselves."""
    if started.poll() is not None:
        return
    os.killpg(started.pid, signal.SIGTERM)
    try:
        started.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        agent = psutil.Process(started.pid)
        for process in [*agent.children(recursive=True), agent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        started.wait()


def _show(started: subprocess.Popen, progress: Path) -> None:
    """Show the progress that the first process writes until the processes have ended."""
    figure, read = LossFigure(), 0
    with tqdm(desc="training", unit="step") as bar:
        while True:
            ended = started.poll() is not None
            text = progress.read_text(encoding="utf-8") if progress.exists() else ""
            lines = text.split("\n")[:-1]  # a line without an end is still being written
            states = [state for line in lines[read:] if (state := read_line(line))]
            for state in states:
                if "plan" in state:
                    say(state["plan"])
                bar.total = state["max_steps"]
                bar.update(state["step"] - bar.n)
                if log := [entry for entry in state.get("log_history", []) if "loss" in entry]:
                    bar.set_postfix(loss=f"{float(log[-1]['loss']):.3f}")
            if logged := [state["log_history"] for state in states if "log_history" in state]:
                figure.draw(logged[-1])
            read = len(lines)
            if ended:
                return
            time.sleep(0.5)
