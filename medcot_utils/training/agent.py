"""Run torchrun, and write the failure that ended its processes to a file: `python -m medcot_utils.training.agent FILE ...`.

torchrun's own `main` copies the error file of the earliest failure. A killed process leaves no such file, and the others may
fail before torchrun notices. So this module calls the same `run` and reads every process's exit code from ChildFailedError."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from medcot_utils.machine.processes import describe_exit, read_last_line
from medcot_utils.run.files import write_atomic

_FOLLOWS_FROM_ANOTHER = ("DistBackendError", "DistNetworkError", "Connection", "NCCL", "gloo")


@dataclass(frozen=True)
class Failure:
    """Hold the failure that ended training in several processes.

    process: what failed, `process 1` (by rank) or `torchrun`. kind: the exception's type; empty if there was none.
    message: the exception's text or how the process ended, in one line."""

    process: str
    kind: str
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.process, self.kind, self.message)))


def find_first_failure(failures: Mapping[int, ProcessFailure], logs: Path) -> Failure:
    """Return the failure that caused the others.

    A killed process comes first, then the earliest error, then a process that aborted (NCCL aborts one that waited too long
    for another), then a lost connection, and last the processes that torchrun ended itself.

    Args:
        failures: torchrun's failures by rank, from its ChildFailedError.
        logs: torchrun's log directory, which has the last output of a process that left no error file."""
    return min((_describe(rank, failure, logs) for rank, failure in failures.items()), key=lambda found: found[:2])[2]


def _describe(rank: int, failure: ProcessFailure, logs: Path) -> tuple[int, float, Failure]:
    """Return a failure's priority (0 comes first), its time (seconds since the epoch), and the failure itself."""
    process = f"process {rank}"
    if isinstance(failure.message, dict):  # the process's own error file, as `record` writes it
        text = " ".join(failure.message["message"].split())
        order = 3 if any(word in text for word in _FOLLOWS_FROM_ANOTHER) else 1
        kind, _, message = text.partition(": ")
        return order, failure.timestamp, Failure(process, kind, message)
    if failure.exitcode > 0:
        last_words = [read_last_line(path) for path in logs.glob(f"*/attempt_*/{failure.local_rank}/stderr.log")]
        message = ": ".join([describe_exit(failure.exitcode), *filter(None, last_words)])
        return 1, failure.timestamp, Failure(process, "", message)
    order = {signal.SIGABRT: 2, signal.SIGTERM: 4}.get(-failure.exitcode, 0)
    return order, failure.timestamp, Failure(process, "", describe_exit(failure.exitcode))


def tolerate_broken_error_files() -> None:
    """Make torchrun ignore an error file that it cannot read.

    torchrun ends the other processes when one has failed. A process that is writing its error file at that moment leaves it
    empty or incomplete. torchrun reads all error files, so it would fail on this one and name no process."""
    read = ProcessFailure.__post_init__

    def read_if_whole(failure: ProcessFailure) -> None:
        try:
            read(failure)
        except (ValueError, LookupError, TypeError):
            failure.error_file = ""
            read(failure)

    ProcessFailure.__post_init__ = read_if_whole


def main() -> None:
    from torch.distributed.run import parse_args, run

    file, arguments = Path(sys.argv[1]), parse_args(sys.argv[2:])
    tolerate_broken_error_files()
    try:
        run(arguments)
        return
    except ChildFailedError as error:
        failure = find_first_failure(error.failures, Path(arguments.log_dir))
    except Exception as error:  # noqa: BLE001 - the process that waits for this one reports it
        failure = Failure("torchrun", type(error).__name__, " ".join(str(error).split()))
    write_atomic(file, json.dumps(asdict(failure)))
    sys.exit(1)


if __name__ == "__main__":
    main()
