"""Several processes from a notebook: which failure is told, and what follows on it. The launch itself is in tests/sessions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, ProcessFailure

from medcot_utils.machine import gpu
from medcot_utils.run.artifacts import PROGRESS
from medcot_utils.run.clock import TimeBudgetReached
from medcot_utils.training import launch
from medcot_utils.training.agent import Failure, find_first_failure, tolerate_broken_error_files
from medcot_utils.training.launch import check_gpus, train_in_processes
from medcot_utils.training.trainer import TrainingError

OUT_OF_MEMORY = Failure(
    "process 1", "OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity"
)


@pytest.fixture
def prepared(run_factory, write_all):
    return write_all(run_factory("training.num_processes=2"))


@pytest.fixture
def ending(monkeypatch):
    """`ending(failure, ...)`: simulated launches that end so, in turn; gives the number of skipped plans of each."""

    def script(*failures):
        skipped, endings = [], iter(failures)

        def launched(run, num_processes, skip_plans, progress):
            assert num_processes == 2 and not progress.exists(), "lines of an earlier launch would be shown again"
            line = {"step": 1, "max_steps": 6, "peak_gpu_memory_mb": {"allocated": 5, "reserved": 7}}
            progress.write_text(json.dumps(line) + "\n")
            skipped.append(skip_plans)
            return next(endings)

        monkeypatch.setattr(launch, "_launch", launched)
        monkeypatch.setattr(gpu, "_before", {"allocated": 0, "reserved": 0})  # what they held is noted there
        return skipped

    return script


# --- what follows on a failure -------------------------------------------------------------------------------------


def test_a_simulated_launch_that_ends_well_is_the_only_one(prepared, ending, capsys):
    skipped = ending(None)
    train_in_processes(prepared, 2)
    assert skipped == [0] and capsys.readouterr().out == ""


def test_the_processes_memory_counts_as_the_notebooks(prepared, ending, monkeypatch):
    """On a simulated GPU, of which the notebook's own process has held less reserved and more in use."""
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: 6_000_000)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 6_000_000)
    ending(None)
    train_in_processes(prepared, 2)
    assert gpu.peak_gpu_memory_mb() == {"allocated": 6, "reserved": 7}
    assert gpu.peak_gpu_memory_mb(since_reset=True) == {"allocated": 6, "reserved": 6}


@pytest.mark.parametrize(("step", "launches"), [(5, [0]), (6, [])])
def test_what_several_processes_have_finished_is_not_launched_again(step, launches, prepared, ending, monkeypatch, tmp_path):
    """With a simulated checkpoint. Its file of progress stays, from which notebook 05 takes the GPU memory."""
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 6}))
    monkeypatch.setattr(launch, "last_good_checkpoint", lambda folder: tmp_path)
    progress = prepared.checkpoint_dir("adapter") / PROGRESS
    progress.write_text("of the last session")
    skipped = ending(None)
    train_in_processes(prepared, 2)
    assert skipped == launches and (progress.read_text() == "of the last session") is (not launches)


def test_simulated_launch_out_of_memory_tries_the_next_plan(prepared, ending, capsys):
    skipped = ending(OUT_OF_MEMORY, OUT_OF_MEMORY, None)
    train_in_processes(prepared, 2)
    assert skipped == [0, 1, 2]
    assert capsys.readouterr().out.count("out of memory: continuing with the next smaller batch plan from the start") == 2


def test_simulated_launch_failure_names_the_process_and_message(prepared, ending):
    skipped = ending(Failure("process 0", "ValueError", "no such column"))
    with pytest.raises(TrainingError, match=r"training in 2 processes failed: process 0: ValueError: no such column"):
        train_in_processes(prepared, 2)
    assert skipped == [0]


def test_a_secret_in_the_message_is_redacted(prepared, ending, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a1B2" * 9)
    ending(Failure("process 0", "HfHubHTTPError", f"401 for hf_{'a1B2' * 9}"))
    with pytest.raises(TrainingError, match=r"process 0: HfHubHTTPError: 401 for \*+$"):
        train_in_processes(prepared, 2)


def test_simulated_launch_that_stops_in_time_is_a_pause(prepared, ending):
    ending(Failure("process 1", "TimeBudgetReached", "stopped after step 3 of 6"))
    with pytest.raises(TimeBudgetReached, match=r"^stopped after step 3 of 6$"):
        train_in_processes(prepared, 2)


@pytest.mark.parametrize(("gpus", "refused"), [(0, False), (1, True), (2, False), (4, False)])
def test_fewer_simulated_gpus_than_processes_are_refused(gpus, refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    if refused:
        with pytest.raises(TrainingError, match=r"num_processes is 2, but only 1 can be seen.*training\.num_processes=1"):
            check_gpus(2)
    else:
        check_gpus(2)


# --- which failure is told -----------------------------------------------------------------------------------------


@pytest.fixture
def end(tmp_path, monkeypatch):
    """`end({rank: exit code}, {rank: (error, time)})`: the failure found when processes ended so, in that order of torchrun's
    notice; those with an error left the file that torchrun's own handler writes, at that time (now if None)."""

    def find(exit_codes, errors=None):
        for rank, (error, moment) in (errors or {}).items():
            file = tmp_path / "none_abc" / "attempt_0" / str(rank) / "error.json"
            file.parent.mkdir(parents=True)
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
            with monkeypatch.context() as at:
                if moment is not None:
                    at.setattr("time.time", lambda moment=moment: moment)
                ErrorHandler().record_exception(error)
        folder = tmp_path / "none_abc" / "attempt_0"
        failures = {
            rank: ProcessFailure(rank, 4000 + rank, code, str(folder / str(rank) / "error.json"))
            for rank, code in exit_codes.items()
        }
        return find_first_failure(failures, tmp_path)

    return find


class DistBackendError(RuntimeError):
    """Named as torch's own, which no process can raise at will."""


LOST = RuntimeError("[gloo] Connection closed by peer")
NO_LABELS = Failure("process 1", "ValueError", "row 7: no labels")


def test_the_process_that_failed_first_is_told(end):
    errors = {0: (LOST, 1700000009), 1: (ValueError("row 7: no labels"), 1700000002), 2: (DistBackendError("NCCL"), 1700000001)}
    assert end({0: 1, 1: 1, 2: 1}, errors) == NO_LABELS
    assert str(NO_LABELS) == "process 1: ValueError: row 7: no labels"


def test_the_earlier_of_two_errors_is_told(end):
    errors = {0: (KeyError("b"), 1700000009), 1: (ValueError("row 7: no labels"), 1700000002)}
    assert end({0: 1, 1: 1}, errors) == NO_LABELS


def test_time_that_was_over_is_told_without_a_process(end):
    found = end({1: 1}, {1: (TimeBudgetReached("stopped after step 3 of 6"), 1700000002)})
    assert (found.kind, found.message) == ("TimeBudgetReached", "stopped after step 3 of 6")


def test_out_of_memory_is_reported_before_what_it_caused(end):
    class OutOfMemoryError(RuntimeError):
        pass

    memory = OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    errors = {0: (DistBackendError("NCCL error: remote process exited"), 1700000002), 1: (memory, 1700000002)}
    assert end({0: 1, 1: 1}, errors) == Failure("process 1", "OutOfMemoryError", str(memory))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("later", [-60, 60])
def test_a_killed_process_is_reported_not_the_cut_off_one(order, later, end):
    # torchrun takes the earliest as the root cause; a file's time is before or after its own look.
    codes = {0: 1, 1: -signal.SIGKILL, 2: -signal.SIGTERM}
    found = end({rank: codes[rank] for rank in order}, {0: (LOST, time.time() + later)})
    assert str(found) == "process 1: killed by signal 9, as a machine out of main memory does"


def test_a_crash_is_not_told_as_a_lack_of_memory(end):
    assert str(end({0: -signal.SIGTERM, 1: -signal.SIGSEGV})) == "process 1: killed by signal 11"


def test_an_error_is_reported_before_the_abort_it_caused(end):
    assert end({0: -signal.SIGABRT, 1: 1}, {1: (ValueError("row 7: no labels"), 1700000002)}) == NO_LABELS


def test_an_abort_is_reported_before_the_lost_connection(end):
    assert str(end({0: 1, 1: -signal.SIGABRT}, {0: (LOST, 1700000002)})) == "process 1: killed by signal 6"


def test_an_error_of_several_lines_is_told_in_one(end):
    assert end({1: 1}, {1: (ValueError("row 7:\nno labels"), None)}) == NO_LABELS


def test_processes_without_an_error_file_are_known_by_last_line(end, tmp_path):
    folder = tmp_path / "none_abc" / "attempt_0" / "1"
    folder.mkdir(parents=True)
    (folder / "stderr.log").write_text("Traceback\nImportError: no torch\n")
    assert str(end({0: -signal.SIGTERM, 1: 3})) == "process 1: ended with exit code 3: ImportError: no torch"


def test_an_ended_process_is_reported_if_there_is_no_other(end):
    assert str(end({1: -signal.SIGTERM})) == "process 1: killed by signal 15"


@pytest.mark.parametrize("text", ["", '{"message": {"mess', "{}", "[]", "null", '{"message": {"message": "x"}}'])
def test_a_half_written_error_file_does_not_hide_the_killed_one(text, tmp_path, monkeypatch):
    monkeypatch.setattr(ProcessFailure, "__post_init__", ProcessFailure.__post_init__)  # put back afterwards
    tolerate_broken_error_files()
    file = tmp_path / "error.json"
    file.write_text(text)
    failures = {0: ProcessFailure(0, 4000, -signal.SIGTERM, str(file)), 1: ProcessFailure(1, 4001, -signal.SIGKILL, "")}
    assert str(find_first_failure(failures, tmp_path)) == "process 1: killed by signal 9, as a machine out of main memory does"


# --- the agent -----------------------------------------------------------------------------------------------------

# The real torchrun over processes that raise or are killed is in tests/sessions/test_processes.py.
WORKER = """
import os, sys, time
if os.environ["RANK"] == "1":
    {ending}
time.sleep(60)
"""
# Ends with half an error file, as a process does that is killed while it writes it.
HALF = """
    open(os.environ["TORCHELASTIC_ERROR_FILE"], "w").write('{"message": {"mess')
    sys.exit("no torch here")
"""


@pytest.mark.parametrize("ending", ['sys.exit("no torch here")', HALF.strip()])
def test_the_real_torchrun_leaves_the_failure_in_a_file(ending, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER.replace("{ending}", ending))
    report = tmp_path / "failure.json"
    command = [sys.executable, "-m", "medcot_utils.training.agent", report, "--standalone", "--nproc-per-node=2"]
    command += [f"--log-dir={tmp_path}", "--redirects=3", tmp_path / "worker.py"]
    assert subprocess.run(list(map(str, command)), capture_output=True, timeout=120).returncode == 1
    failure = Failure(**json.loads(report.read_text()))
    assert str(failure) == "process 1: ended with exit code 1: no torch here"


def test_a_line_of_progress_that_is_no_json_is_passed_over(tmp_path, monkeypatch):
    progress, drawn = tmp_path / "progress.jsonl", []
    lines = ['{"step": 1, "max_steps": 3}', '{"step": 2, "ma{"step": 2, "max_steps": 3}', '{"step": 3, "max_steps": 3, "log_hist']
    last = '{"step": 3, "max_steps": 3, "log_history": [{"step": 3, "loss": 1.5}]}'
    progress.write_text("\n".join([*lines, last, '{"step": 3']), encoding="utf-8")
    monkeypatch.setattr(launch.LossFigure, "draw", lambda self, history: drawn.append(history))
    launch._show(SimpleNamespace(poll=lambda: 0), progress)
    assert drawn == [[{"step": 3, "loss": 1.5}]]


DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-S", "-c", "import time; print('there', flush=True); time.sleep(600)"], start_new_session=True)
time.sleep(600)
"""


def test_processes_that_do_not_end_by_themselves_are_killed(monkeypatch):
    monkeypatch.setattr(launch, "_END_SECONDS", 0.2)
    command = [sys.executable, "-S", "-c", DEAF]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as started:
        assert started.stdout.readline() == b"there\n"
        launch._end(started)
        assert started.returncode == -signal.SIGKILL
        assert started.stdout.read() == b"", "its own process has ended too"
