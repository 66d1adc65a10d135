"""What the trackers share: each entry of the trainer's log once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from medcot_utils.training.trackers import _Log


class SimulatedTracker(_Log):
    """Keeps what it is given to log, in place of a library."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


LOSS = {"step": 3, "loss": 2.5, "epoch": 0.5}


@pytest.mark.parametrize("other", [{"eval_loss": 1.5}, {"train_runtime": 9.0, "train_loss": 2.0}, {"skipped_step": 1}])
def test_an_entry_is_logged_once_and_hides_no_other_of_its_step(other):
    tracker = SimulatedTracker()
    for entry in [{"step": 3} | other, LOSS, LOSS]:
        tracker.log_once(entry)
    assert len(tracker.logged) == 2 and tracker.logged[1] == (3, {"train/loss": 2.5, "train/epoch": 0.5})


def test_what_is_no_number_is_not_logged():
    tracker = SimulatedTracker()
    tracker.log_once(LOSS | {"loss": "2.5", "rates": [1, 2]})
    assert tracker.logged == [(3, {"train/loss": 2.5, "train/epoch": 0.5})]


BROKEN_TENSORFLOW = """
import sys
from pathlib import Path
from medcot_utils.config import TrackingSettings
from medcot_utils.training.trackers import TensorBoard
tracker = TensorBoard()
tracker.open(Path(sys.argv[1]), {"name": "one"}, TrackingSettings(), {"a": 1})
tracker.log({"train/loss": 2.5}, 1)
tracker.close()
print(*(path.name for path in Path(sys.argv[1]).rglob("events*")))
"""


def test_tensorboard_works_beside_a_broken_tensorflow(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise TypeError('Descriptors cannot be created directly')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", BROKEN_TENSORFLOW, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "events.out" in done.stdout, done.stderr
