"""One process at a time in a run directory: what is refused beside another one, who is named, and when the lock ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from medcot_utils.config import load_config
from medcot_utils.machine.paths import host_name
from medcot_utils.run import lock
from medcot_utils.run.directory import Run
from medcot_utils.run.lock import HOLDER, LOCK, RunError, hold, is_held
from medcot_utils.run.store import CONFIG

CHANGES = {
    "create": lambda run: Run.create(run.path, load_config("smoke", ["training.max_steps=3"])),
    "begin": lambda run: run.begin("01_setup"),
    "write": lambda run: run.write("machine", {"tag": "second"}),
    "record_step": lambda run: run.record_step("01_setup", state="done"),
    "forget": lambda run: run.forget("05_training"),
}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


@pytest.mark.parametrize("change", CHANGES)
def test_beside_another_process_nothing_changes(run_factory, write_all, work_elsewhere, change):
    run = write_all(run_factory())
    (run.path / "checkpoints").mkdir()
    work_elsewhere(run.path)
    before = contents(run.path)
    with pytest.raises(RunError, match=r"another medcot run is working in run/: wait until it ends"):
        CHANGES[change](run)
    assert contents(run.path) == before and (run.path / "checkpoints").is_dir()


def test_reading_is_possible_beside_another_process(run_factory, write_all, work_elsewhere):
    run = write_all(run_factory())
    work_elsewhere(run.path)
    assert Run.open(run.path).read("plan") == {"tag": "first"} and run.is_fresh("adapter") and is_held(run.path)


def test_who_works_in_a_run_is_named(run_factory):
    run = run_factory()
    code = "import sys; from pathlib import Path; from medcot_utils.run.lock import keep; "
    code += "keep(Path(sys.argv[1]), 'notebook 05_training'); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        who = (
            rf"notebook 05_training \(process {other.pid} on {host_name()}, since .*\) is working in run/: .*kernel is restarted"
        )
        with pytest.raises(RunError, match=who):
            run.begin("06_comparison")
        other.kill()
    run.begin("01_setup")  # the lock ends with its process


def test_children_work_under_their_parents_lock(run_factory):
    run = run_factory()
    code = "import sys; from medcot_utils.run.directory import Run; run = Run.open(sys.argv[1]); "
    code += "run.begin('01_setup'); run.write('machine', {}); run.record_done('01_setup')"
    with hold(run.path, "medcot run"):
        subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)
        assert json.loads((run.path / HOLDER).read_text())["pid"] == os.getpid()
    assert run.step_state("01_setup") == "done" and not is_held(run.path) and not (run.path / HOLDER).exists()


def test_a_step_holds_the_lock_from_begin_to_done(run_factory, work_elsewhere):
    run, again = run_factory(), run_factory()
    run.begin("01_setup")
    again.begin("01_setup")  # the cell was run twice
    assert is_held(run.path)
    again.write("machine", {})
    again.record_done("01_setup")
    assert not is_held(run.path)


def test_a_refused_begin_holds_nothing(run_factory):
    run = run_factory()
    with pytest.raises(RunError, match="run notebook 02_baseline_inference first"):
        run.begin("03_dataset_prep")
    assert not is_held(run.path)


def test_a_failed_cell_frees_the_run(run_factory):
    from IPython.core.interactiveshell import ExecutionInfo, ExecutionResult

    from medcot_utils.series.notebook import _let_go_if_failed

    run = run_factory()
    run.begin("01_setup")
    result = ExecutionResult(ExecutionInfo("", False, False, False, None))
    _let_go_if_failed(result)
    assert is_held(run.path)
    result.error_in_exec = KeyboardInterrupt()
    _let_go_if_failed(result)
    assert not is_held(run.path)


def test_a_refused_folder_is_not_touched(tmp_path, smoke_config):
    (tmp_path / "thesis.tex").write_text("x")
    before = tmp_path.stat().st_mtime_ns
    with pytest.raises(RunError, match="is not empty and is not a run"):
        Run.create(tmp_path, smoke_config)
    assert tmp_path.stat().st_mtime_ns == before, "not even for a moment"


def test_a_file_system_without_locks_is_no_error(run_factory, monkeypatch):
    run = run_factory()

    def refuse(self):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.FileLock, "acquire", refuse)
    run.begin("01_setup")
    assert run.step_state("01_setup") == "running" and (run.path / CONFIG).exists()
