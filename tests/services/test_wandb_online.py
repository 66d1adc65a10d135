"""W&B online and `wandb sync`, with the real client against PyPI's openwandb on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from medcot_utils.evaluation.comparison import metrics_table
from medcot_utils.run.directory import Run
from medcot_utils.series import runner
from medcot_utils.training import tracking

pytest_plugins = ("wandb_server",)


def wait_for_losses(server, steps):
    """Until the server holds the losses of so many steps: what a killed process had not sent is no fault of ours."""
    deadline = time.monotonic() + 120
    while len(server.held("select distinct step from metrics where key = 'train/loss'")) < steps:
        assert time.monotonic() < deadline, "the server never got them"
        time.sleep(0.2)


def assert_whole(server, run_id):
    # Distinct: this server does not tell a resuming client what it holds, as W&B does, and so is sent the same lines again.
    query = "select distinct step, value from metrics where run_id = ? and key = 'train/loss' order by step"
    losses = [round(value, 2) for _, value in server.held(query, run_id)]
    assert losses == [1.9, 1.8, 1.7, 1.6, 1.5, 1.4], "each step under one number, with one value"
    [(config, summary, name)] = server.held("select config_json, summary_json, display_name from runs where run_id = ?", run_id)
    assert json.loads(config)["training"]["value"]["max_steps"] == 6 and "secrets" not in json.loads(config)
    assert json.loads(summary)["comparison/eval_loss/tuned"] == 1.5 and name == f"run-{run_id}"
    assert ("report",) in server.held("select artifact_type from artifacts where run_id = ?", run_id)


def test_an_online_run_stays_one_run_after_kill_and_resume(wandb_server, trained, train_tracked, in_child, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.address)
    monkeypatch.setenv("WANDB_API_KEY", wandb_server.key)
    run = trained("tracking.backend=wandb", "tracking.mode=online", "training.max_steps=6")
    said = in_child(lambda: (train_tracked(run, 0, 4), wait_for_losses(wandb_server, 4)), killed=True)
    state = json.loads((run.path / "tracking.json").read_text())
    said += in_child(lambda: train_tracked(run, 2, 6))
    said += in_child(
        lambda: (
            tracking.record_comparison(run, metrics_table(run.read("metrics")["metrics"])),
            print(tracking.describe_tracking(run)),
        )
    )
    last = json.loads((run.path / "tracking.json").read_text())
    assert (state["id"], state["url"]) == (last["id"], last["url"])
    assert state["url"].startswith(wandb_server.address) and f"tracked: {state['url']}" in said
    assert wandb_server.key not in said
    assert_whole(wandb_server, state["id"])


def test_an_offline_run_is_uploaded_by_the_printed_command(wandb_server, trained, train_tracked, in_child):
    run = trained("tracking.backend=wandb", "training.max_steps=6")
    in_child(lambda: train_tracked(run, 0, 6))
    said = in_child(
        lambda: (
            tracking.record_comparison(run, metrics_table(run.read("metrics")["metrics"])),
            print(tracking.describe_tracking(run)),
        )
    )
    command = said.strip().rpartition("to upload it: ")[2].split()
    assert command[:2] == ["wandb", "sync"]
    environment = os.environ | {"WANDB_BASE_URL": wandb_server.address, "WANDB_API_KEY": wandb_server.key}
    program = str(Path(sys.executable).with_name("wandb"))
    done = subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and wandb_server.key not in done.stdout + done.stderr, done.stderr
    assert_whole(wandb_server, json.loads((run.path / "tracking.json").read_text())["id"])


def test_a_strangers_run_of_the_defaults_is_sent_only_if_asked(
    wandb_server, trained, train_tracked, in_child, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setenv("MEDCOT_KEY", "the key of somebody else")
        trained(profile="demo")
    monkeypatch.setenv("WANDB_BASE_URL", wandb_server.address)
    monkeypatch.setenv("WANDB_API_KEY", wandb_server.key)

    def train(*settings):
        config, _ = runner.plan_config(tmp_path / "run", None, settings)
        Run.create(tmp_path / "run", config)
        in_child(lambda: train_tracked(Run.open(tmp_path / "run"), 0, 6))
        return set(wandb_server.held("select run_id from runs"))

    before = set(wandb_server.held("select run_id from runs"))
    assert train() == train("hub.repo_id=ann/cot") == before
    assert len(train("tracking.backend=wandb") - before) == 1
