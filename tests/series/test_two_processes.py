"""Training in two processes on the CPU against the smoke series' own, which one process made."""

from __future__ import annotations

import json

import pytest

from medcot_utils.run.directory import Run
from medcot_utils.training.launch import train_in_processes


def losses(history):
    return {(key, entry["step"]): entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry}


def test_two_processes_train_as_the_series_did(smoke_series, copy_before_training, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = Run.open(copy_before_training(tmp_path / "run"))
    train_in_processes(run, 2)
    last = run.checkpoint_dir("adapter") / "checkpoint-6"
    assert (last / "rng_state_1.pth").exists(), "one process alone leaves a single state"
    found = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    log = (smoke_series / "run" / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert losses(found) == pytest.approx(losses(map(json.loads, log)), abs=1e-5)
    assert {step for key, step in losses(found) if key == "loss"} == set(range(1, 7))
