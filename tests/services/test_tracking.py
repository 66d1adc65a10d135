"""The three trackers, for real and without a network: one tracked run over a kill, a resume and the comparison."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from medcot_utils.evaluation.comparison import metrics_table
from medcot_utils.training import tracking

STEPS = [1, 2, 3, 4, 5, 6]


def wandb_file(run):
    """The records of the one offline run, as `wandb leet` reads them, by type, and its summary."""
    files = list((run.path / "tracking").rglob("*.wandb"))
    assert len(files) == 1, f"one session's file is left, not {files}"
    leet = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(files[0])]
    records = [json.loads(line) for line in subprocess.check_output(leet, text=True).splitlines()]
    summary = json.loads(subprocess.check_output([*leet[:-1], "--summary", leet[-1]], text=True))
    return records, summary, files[0]


def wait_until_written(folder):
    """Until no file has grown for a second: trackers write in threads of their own."""
    seen, since, deadline = None, time.monotonic(), time.monotonic() + 120
    while time.monotonic() - since < 1:
        assert time.monotonic() < deadline, "it writes on and on"
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        if sizes != seen:
            seen, since = sizes, time.monotonic()
        time.sleep(0.1)


def killed_resumed_compared(run, train_tracked, in_child):
    """Killed after step 4 with a checkpoint at 2, resumed from there to the end, and compared: what each process printed."""
    said = [in_child(lambda: (train_tracked(run, 0, 4), wait_until_written(run.path)), killed=True)]
    first = json.loads((run.path / "tracking.json").read_text())
    said.append(in_child(lambda: train_tracked(run, 2, 6)))
    said.append(
        in_child(
            lambda: (
                tracking.record_comparison(run, metrics_table(run.read("metrics")["metrics"])),
                print(tracking.describe_tracking(run)),
            )
        )
    )
    last = json.loads((run.path / "tracking.json").read_text())
    assert (first["id"], first["name"]) == (last["id"], last["name"]), "one tracked run"
    return said


def history(records):
    lines = []
    for record in records:
        if record["type"] == "history":
            lines.append(record.get("data") or record.get("metrics") or record)
    return lines


def test_wandb_offline_holds_one_run_after_kill_and_resume(trained, train_tracked, in_child):
    choices = ["tracking.project=heart", "tracking.job_type=fine-tuning"]
    run = trained("tracking.backend=wandb", "training.max_steps=6", *choices)
    said = killed_resumed_compared(run, train_tracked, in_child)
    records, summary, file = wandb_file(run)
    text = json.dumps(records)
    started = [record["run"] for record in records if record["type"] == "run"]
    assert {(one["project"], one["job_type"]) for one in started} == {("heart", "fine-tuning")}
    assert summary["config"]["training"]["max_steps"] == 6 and summary["config"]["plan"]["steps"] == 6
    assert "secrets" not in summary["config"]
    logged = [json.dumps(line) for line in history(records)]
    assert sum('"train/loss"' in line or "train/loss" in line for line in logged) == 6, "each step once"
    assert sum("eval/loss" in line for line in logged) == 2
    assert "comparison/eval_loss/tuned" in text and "report.html" in text
    assert f"wandb sync run/{file.parent.relative_to(run.path)}" in said[-1]


def test_trackio_holds_each_step_once_after_kill_and_resume(trained, train_tracked, in_child):
    run = trained("tracking.backend=trackio")
    said = killed_resumed_compared(run, train_tracked, in_child)
    folder = run.path / "tracking" / "trackio"
    assert "TRACKIO_DIR=run/tracking/trackio trackio show --project medcot" in said[-1]
    assert "dashboard" not in "".join(said), "trackio's own notes are not repeated"
    name = json.loads((run.path / "tracking.json").read_text())["name"]
    read = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as s; "
        "print(json.dumps([s.get_logs('medcot', sys.argv[1]), s.get_run_config('medcot', sys.argv[1]), s.get_runs('medcot')]))"
    )
    found = subprocess.check_output([sys.executable, "-c", read, name], text=True, env=os.environ | {"TRACKIO_DIR": str(folder)})
    logs, config, runs = json.loads(found.splitlines()[-1])
    assert len(runs) == 1
    assert [line["train/global_step"] for line in logs if "train/loss" in line] == STEPS
    assert [line["eval/loss"] for line in logs if "eval/loss" in line] == [1.9, 1.5]
    assert config["training"]["max_steps"] == 6 and "secrets" not in config
    assert any(line.get("comparison/eval_loss/tuned") == 1.5 for line in logs) and any("comparison" in line for line in logs)
    kept = [path.read_bytes() for path in folder.rglob("blobs/**/*") if path.is_file()]
    assert run.require("report").read_bytes() in kept


def test_tensorboard_holds_each_step_once_after_kill_and_resume(trained, train_tracked, in_child):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained("tracking.backend=tensorboard")
    said = killed_resumed_compared(run, train_tracked, in_child)
    assert "tensorboard --logdir run/tracking/tensorboard" in said[-1]
    folders = list((run.path / "tracking" / "tensorboard").iterdir())
    assert len(folders) == 1
    events = EventAccumulator(str(folders[0]))
    events.Reload()
    assert [(event.step, round(event.value, 2)) for event in events.Scalars("train/loss")] == [
        (step, round(2 - step / 10, 2)) for step in STEPS
    ]
    assert [event.step for event in events.Scalars("eval/loss")] == [3, 6]
    assert {"configuration/text_summary", "comparison/text_summary", "report/text_summary"} <= set(events.Tags()["tensors"])


@pytest.mark.parametrize(
    ("here", "place", "prefix"),
    [
        (".", "", "run/"),
        ("run", "", ""),
        ("notebooks", "", "run/"),
        ("far/away/from", ", in the run directory run", ""),
    ],
)
def test_the_printed_path_is_one_to_type_where_commands_start(
    trained, train_tracked, in_child, tmp_path, monkeypatch, here, place, prefix
):
    run = trained("tracking.backend=tensorboard")
    in_child(lambda: train_tracked(run, 0, 6))
    (tmp_path / here).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / here)
    assert tracking.describe_tracking(run).endswith(f"to see it{place}: tensorboard --logdir {prefix}tracking/tensorboard")
    typed_in = run.path if place else tmp_path if here == "notebooks" else Path()
    assert (typed_in / prefix / "tracking" / "tensorboard").is_dir()


def test_another_training_is_another_tracked_run(trained, train_tracked, in_child):
    run = trained("tracking.backend=tensorboard")
    in_child(lambda: train_tracked(run, 0, 6))
    first = json.loads((run.path / "tracking.json").read_text())
    again = trained("tracking.backend=tensorboard", "training.learning_rate=0.5")
    in_child(lambda: train_tracked(again, 0, 6))
    second = json.loads((run.path / "tracking.json").read_text())
    assert first["id"] != second["id"]
    assert len(list((run.path / "tracking" / "tensorboard").iterdir())) == 2, "the first one is kept"


def test_the_comparison_tracks_a_run_that_was_trained_untracked(trained, in_child):
    run = trained("tracking.backend=wandb")
    in_child(lambda: tracking.record_comparison(run, metrics_table(run.read("metrics")["metrics"])))
    records, _, _ = wandb_file(run)
    assert sum("train/loss" in json.dumps(line) for line in history(records)) == 6


def test_only_the_first_of_several_processes_tracks(trained, train_tracked, in_child):
    run = trained("tracking.backend=tensorboard")
    in_child(lambda: train_tracked(run, 0, 6, first=False))
    assert not (run.path / "tracking").exists() and not (run.path / "tracking.json").exists()


def test_none_writes_nothing_and_imports_no_tracker(trained, train_tracked, in_child):
    run = trained()
    assert run.config.tracking.backend == "none", "profile smoke"

    def session():
        train_tracked(run, 0, 6)
        tracking.record_comparison(run, metrics_table(run.read("metrics")["metrics"]))
        assert not {"wandb", "trackio"} & set(sys.modules)

    in_child(session)
    assert not (run.path / "tracking").exists()


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_cannot_start_costs_one_line_only(trained, train_tracked, in_child, backend):
    run = trained(f"tracking.backend={backend}")
    (run.path / "tracking").write_text("in the way")
    said = in_child(
        lambda: (train_tracked(run, 0, 6), tracking.record_comparison(run, metrics_table(run.read("metrics")["metrics"])))
    )
    lines = [line for line in said.splitlines() if line.startswith("tracking ends here (FileExistsError")]
    assert len(lines) == 2 and "the run continues without it" in lines[0], "one line in each of the two sessions"


def test_a_tracker_that_fails_midway_is_reported_and_dropped(trained, train_tracked, in_child):
    run = trained("tracking.backend=tensorboard")

    def session():
        from torch.utils.tensorboard import SummaryWriter

        asked = []

        def full(self, name, value, step):
            asked.append(step)
            raise OSError(28, "No space left on device")

        SummaryWriter.add_scalar = full
        train_tracked(run, 0, 6)
        assert asked == [1]

    said = in_child(session)
    assert said.count("tracking ends here (OSError: [Errno 28] No space left on device)") == 1


@pytest.mark.parametrize("answers", ["nobody", "somebody who is not W&B"])
def test_wandb_without_a_server_goes_offline_in_reasonable_time(
    trained, train_tracked, in_child, monkeypatch, answers, unhelpful_server
):
    with socket.socket() as taken:  # bound and not listening: refused at once, as by a server that is down
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1] if answers == "nobody" else unhelpful_server.server_port
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setattr("medcot_utils.training.trackers._INIT_SECONDS", 4)
        run = trained("tracking.backend=auto")
        began = time.monotonic()
        said = in_child(lambda: (train_tracked(run, 0, 6), print(tracking.describe_tracking(run))))
    assert time.monotonic() - began < 80, "W&B's own patience is 90 s"
    assert said.count("tracking: W&B cannot be used online") == 1 and "0123456789" not in said
    assert "to upload it: wandb sync run/tracking/wandb" in said
    file = next((run.path / "tracking").rglob("offline-run-*/*.wandb"))
    leet = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    assert subprocess.check_output(leet, text=True).count("train/loss") >= 6


@pytest.mark.parametrize("backend", ["wandb", "trackio"])
def test_offline_sends_nothing_whatever_the_environment_says(
    backend, trained, train_tracked, in_child, monkeypatch, unhelpful_server
):
    address = f"http://127.0.0.1:{unhelpful_server.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("TRACKIO_SERVER_URL", f"{address}?write_token=one")
    run = trained(f"tracking.backend={backend}", "tracking.mode=offline")
    said = in_child(lambda: train_tracked(run, 0, 6))
    assert unhelpful_server.asked == [] and "tracking ends here" not in said
    assert [path for path in (run.path / "tracking" / backend).rglob("*") if path.suffix in (".wandb", ".db")]


@pytest.fixture
def unhelpful_server():
    """A server that answers 500 to everything, and lists in `asked` what it was asked."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Unhelpful(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            self.send_error(500)

        do_POST = do_HEAD = do_GET

        def log_message(self, *arguments):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Unhelpful)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
