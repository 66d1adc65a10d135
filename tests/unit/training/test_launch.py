"""Several processes from a notebook: which failure is told, and what follows on it. The launch itself is in tests/series."""

from __future__ import annotations

import json
import signal
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from medcot_utils.training import launch
from medcot_utils.training.callbacks import TimeBudgetReached
from medcot_utils.training.launch import _first_failure, check_gpus, train_in_processes
from medcot_utils.training.trainer import TrainingError

OUT_OF_MEMORY = ("process 1: OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity")


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
            progress.write_text("")
            skipped.append(skip_plans)
            return next(endings)

        monkeypatch.setattr(launch, "_launch", launched)
        return skipped

    return script


# --- what follows on a failure -------------------------------------------------------------------------------------


def test_a_simulated_launch_that_ends_well_is_the_only_one(prepared, ending, capsys):
    skipped = ending(None)
    train_in_processes(prepared, 2)
    assert skipped == [0] and capsys.readouterr().out == ""


def test_memory_that_runs_out_in_a_simulated_launch_is_followed_by_one_with_the_next_plan(prepared, ending, capsys):
    skipped = ending(OUT_OF_MEMORY, OUT_OF_MEMORY, None)
    train_in_processes(prepared, 2)
    assert skipped == [0, 1, 2]
    assert capsys.readouterr().out.count("out of memory: going on with the next smaller batch plan from the start") == 2


def test_another_failure_of_a_simulated_launch_is_raised_with_the_process_and_its_message(prepared, ending):
    skipped = ending(("process 0: ValueError", "no such column"))
    with pytest.raises(TrainingError, match=r"training in 2 processes failed: process 0: ValueError: no such column"):
        train_in_processes(prepared, 2)
    assert skipped == [0]


def test_a_simulated_launch_that_stopped_in_time_is_a_pause_and_no_failure(prepared, ending):
    ending(("TimeBudgetReached", "stopped after step 3 of 6"))
    with pytest.raises(TimeBudgetReached, match=r"^stopped after step 3 of 6$"):
        train_in_processes(prepared, 2)


@pytest.mark.parametrize(("gpus", "refused"), [(0, False), (1, True), (2, False), (4, False)])
def test_fewer_simulated_gpus_than_processes_are_refused_and_none_at_all_is_the_cpu(gpus, refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    if refused:
        with pytest.raises(TrainingError, match=r"num_processes is 2, but only 1 can be seen.*training\.num_processes=1"):
            check_gpus(2)
    else:
        check_gpus(2)


# --- which failure is told -----------------------------------------------------------------------------------------


@pytest.fixture
def leave(tmp_path):
    """`leave(rank, message, timestamp)`: the file that a failing process leaves, as torchrun's `record` writes it."""

    def write(rank, message, timestamp):
        folder = tmp_path / "none_abc" / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        error = {"message": message, "extraInfo": {"py_callstack": "Traceback ...", "timestamp": str(timestamp)}}
        (folder / "error.json").write_text(json.dumps({"message": error}))

    return write


def test_the_process_that_failed_first_is_told(leave, tmp_path):
    leave(0, "RuntimeError: [gloo] Connection closed by peer", 1700000009)
    leave(1, "ValueError: row 7: no labels", 1700000002)
    leave(2, "DistBackendError: NCCL error", 1700000005)
    assert _first_failure(tmp_path) == ("process 1: ValueError", "row 7: no labels")


def test_time_that_was_over_is_told_without_a_process(leave, tmp_path):
    leave(1, "TimeBudgetReached: stopped after step 3 of 6", 1700000002)
    assert _first_failure(tmp_path) == ("TimeBudgetReached", "stopped after step 3 of 6")


def test_of_failures_in_the_same_second_memory_that_ran_out_is_told_before_what_followed_from_it(leave, tmp_path):
    leave(0, "DistBackendError: NCCL error: remote process exited", 1700000002)
    leave(1, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", 1700000002)
    assert _first_failure(tmp_path)[0] == "process 1: OutOfMemoryError"


@pytest.fixture
def torchrun_ends(tmp_path):
    """`torchrun_ends({rank: exit code})`: the log that torchrun itself makes of processes that ended so, in that order."""

    def write(exit_codes):
        failures = {
            rank: ProcessFailure(rank, 4000 + rank, code, str(tmp_path / "none_abc" / "attempt_0" / str(rank) / "error.json"))
            for rank, code in exit_codes.items()
        }
        (tmp_path / "torchrun.log").write_text(f"W1123 before it\n{ChildFailedError('medcot_utils.training.worker', failures)}\n")

    return write


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("later", [-60, 60])
def test_a_killed_process_is_told_and_not_one_whose_connection_it_took_with_it(order, later, leave, torchrun_ends, tmp_path):
    # torchrun lists the one that it saw first as the root cause, last; a file's time is before or after its own look.
    leave(0, "RuntimeError: [gloo] Connection closed by peer", int(time.time()) + later)
    codes = {0: 1, 1: -signal.SIGKILL, 2: -signal.SIGTERM}
    torchrun_ends({rank: codes[rank] for rank in order})
    assert _first_failure(tmp_path) == ("process 1", "killed by signal 9, as a machine out of main memory does")


def test_a_crash_is_not_told_as_a_lack_of_memory(torchrun_ends, tmp_path):
    torchrun_ends({0: -signal.SIGTERM, 1: -signal.SIGSEGV})
    assert _first_failure(tmp_path) == ("process 1", "killed by signal 11")


def test_an_error_is_told_before_the_abort_of_a_process_that_waited_for_the_one_that_had_it(leave, torchrun_ends, tmp_path):
    leave(1, "ValueError: row 7: no labels", 1700000002)
    torchrun_ends({0: -signal.SIGABRT, 1: 1})
    assert _first_failure(tmp_path) == ("process 1: ValueError", "row 7: no labels")


def test_a_process_that_aborted_is_told_before_one_that_lost_its_connection_to_it(leave, torchrun_ends, tmp_path):
    leave(0, "RuntimeError: [gloo] Connection closed by peer", 1700000002)
    torchrun_ends({0: 1, 1: -signal.SIGABRT})
    assert _first_failure(tmp_path) == ("process 1", "killed by signal 6")


def test_processes_that_leave_no_file_were_killed(tmp_path):
    kind, _ = _first_failure(tmp_path)
    assert kind == "a process was killed"
