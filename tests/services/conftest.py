"""A run that could have been trained, and processes that end as they please."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

import pytest

from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.directory import Run

LOG = [{"step": step, "loss": 2.0 - step / 10, "learning_rate": 0.001} for step in range(1, 7)]
LOG.insert(3, {"step": 3, "eval_loss": 1.9})
LOG += [{"step": 6, "eval_loss": 1.5}, {"step": 6, "train_runtime": 12.5, "train_loss": 1.65}]


def _side(value: float) -> dict:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 8}


@pytest.fixture
def trained(run_factory, content, tmp_path, monkeypatch) -> Callable[..., Run]:
    """`trained("tracking.backend=wandb", ...)`: a run of made-up artifacts, log and metrics as 05 and 06 write them, in the
    working folder."""
    monkeypatch.chdir(tmp_path)
    metric = {"base": _side(2.0), "tuned": _side(1.5), "difference": _side(-0.5) | {"needed": 4}}
    real = {
        "training_log": LOG,
        "metrics": {"metrics": {"eval_loss": metric}, "notes": []},
        "plan": {"steps": 6, "total_parameters": 1000},
    }

    def make(*overrides: str, name: str = "run", profile: str = "smoke") -> Run:
        run = run_factory(*overrides, name=name, profile=profile)
        for artifact in ARTIFACTS:
            run.write(artifact, real.get(artifact, content(artifact)))
        return run

    return make


@pytest.fixture
def in_child(capfd) -> Callable[..., str]:
    """`in_child(function, killed=True)`: what the function printed in a process of its own, which is killed after it if asked;
    trackers keep state in their modules, and each notebook is a process of its own."""

    def start(function: Callable[[], None], killed: bool = False) -> str:
        capfd.readouterr()
        child = os.fork()
        if child == 0:
            code = 1
            for name in [name for name in sys.modules if name.partition(".")[0] in ("wandb", "trackio")]:
                del sys.modules[name]  # other tests' libraries may have imported them, with those tests' folders
            try:
                function()
                code = 0
            except BaseException:  # noqa: BLE001 - this process ends here, whatever happened
                traceback.print_exc()
            sys.stdout.flush()
            if killed and code == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        said = capfd.readouterr()
        assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if killed else 0), said.out + said.err
        return said.out

    return start


@pytest.fixture
def train_tracked() -> Callable[..., None]:
    """`train_tracked(run, begin, end)`: the trainer's calls to its callbacks from a checkpoint at step `begin` to step `end`;
    the training ends there only if that is the last step, or `ends`."""
    from transformers import TrainerState

    from medcot_utils.training import tracking

    def train(run: Run, begin: int, end: int, first: bool = True, ends: bool | None = None) -> None:
        log = [entry for entry in LOG if entry["step"] <= begin]
        state = TrainerState(global_step=begin, log_history=log, is_world_process_zero=first)
        for callback in tracking.make_tracking_callbacks(run):
            callback.on_train_begin(None, state, None)
            for entry in LOG:
                if begin < entry["step"] <= end:
                    state.log_history.append(entry)
                    callback.on_log(None, state, None)
            if ends if ends is not None else end == 6:
                callback.on_train_end(None, state, None)

    return train
