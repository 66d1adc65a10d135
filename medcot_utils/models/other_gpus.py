"""Generate answers on every GPU: with this process and its model, and one process per other GPU, which loads the model again.

Any free process takes the next batch. Only this process keeps records and shows a progress bar."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from medcot_utils.config import ModelSettings
from medcot_utils.machine.gpu import note_use
from medcot_utils.machine.guarded_streams import guard_streams
from medcot_utils.machine.hardware import name_other_gpus
from medcot_utils.machine.processes import describe_exit, end_with_parent, read_last_line
from medcot_utils.machine.redaction import redact
from medcot_utils.models.batches import GenerationError
from medcot_utils.models.deal import Batch, Deal, HowToWrite
from medcot_utils.models.generation import convert_to_write, make_writer

if TYPE_CHECKING:
    from medcot_utils.models.engine import Engine

_TAKE, _DONE = "take", "done"  # messages of a process, in addition to records: it asks for a batch, or has none left
_POLL_SECONDS = 0.2
_END_SECONDS = 10


class OtherGpus:
    """Hold the processes on the other GPUs.

    They start with the first call that has batches for them, load the model while this process answers, and stay for the next
    call."""

    def __init__(self, engine: Engine, settings: ModelSettings, adapter: Path | None = None) -> None:
        """Take the arguments of this process's `engine.load(settings, adapter)`. The other processes load the same model."""
        self._fast = cast(ModuleType, engine).__name__.endswith("transformers_engine")
        self._settings, self._adapter = settings, adapter
        self._workers: list[_Worker] = []
        self._logs: tempfile.TemporaryDirectory[str] | None = None

    def count_for(self, loads: int) -> int:
        """Return how many other GPUs of the first one's kind to use, at most one for each load beyond the first.

        Args:
            loads: how many times the answers are as many as one GPU generates at once, rounded up."""
        return max(0, min(len(name_other_gpus()), loads - 1))

    @contextlib.contextmanager
    def taking_part(self, deal: Deal, how: HowToWrite, count: int) -> Iterator[None]:
        """Let `count` other GPUs take batches too. At the end, wait for the batches they have taken.

        If a process fails or is killed, its message stops the deal, and all processes end."""
        over = threading.Event()

        def work(worker: _Worker) -> None:
            try:
                worker.take_part(deal, how, over)
            except Exception as error:  # noqa: BLE001 - the notebook's own thread raises it
                deal.stop(error)

        threads = [threading.Thread(target=work, args=[worker], daemon=True) for worker in self._start(count)]
        for thread in threads:
            thread.start()
        try:
            yield
            over.set()
            for thread in threads:
                thread.join()
        except BaseException:
            over.set()
            self.close()
            raise
        if deal.error:
            self.close()

    def close(self) -> None:
        """End the processes and free their GPUs. The next call with batches for them starts them again."""
        for worker in self._workers:
            worker.end()
        self._workers = []
        if self._logs:
            self._logs.cleanup()
            self._logs = None

    def _start(self, count: int) -> list[_Worker]:
        for number, gpu in enumerate(name_other_gpus()[:count], start=1):
            if number > len(self._workers):
                self._logs = self._logs or tempfile.TemporaryDirectory()
                log = Path(self._logs.name) / f"gpu-{number}.log"
                self._workers.append(_Worker(number, gpu, log, self._settings, self._adapter, self._fast))
                note_use(number)
        return self._workers[:count]


@dataclass(frozen=True)
class _Failed:
    """Hold the message that a process sends before it ends with an error."""

    message: str


class _Worker:
    """Hold a process on another GPU, for the notebook's process."""

    def __init__(
        self, number: int, gpu: str, log: Path, settings: ModelSettings, adapter: Path | None, fast_answers: bool
    ) -> None:
        """Start the process. Args: number: the GPU's, among the visible ones. gpu: its name in CUDA_VISIBLE_DEVICES."""
        # CUDA does not work in a fork of a process that uses it.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._number, self._log, self._is_ready = number, log, False
        self._process = context.Process(target=_serve, args=(theirs, gpu, log, settings, adapter, fast_answers), daemon=True)
        self._process.start()
        theirs.close()  # else this process would not notice when the other one ends

    def take_part(self, deal: Deal, how: HowToWrite, over: threading.Event) -> None:
        """Take batches once the model is loaded, until there are none left or the others have made them all."""
        while not self._is_ready:
            if self._connection.poll(_POLL_SECONDS):
                self._receive()
                self._is_ready = True
            elif over.is_set():
                return
        self._send(how)
        while (received := self._receive()) != _DONE:
            if received == _TAKE:
                self._send(deal.take())
            else:
                deal.keep(received)

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # the process has ended; the next `_receive` says why
            self._connection.send(message)

    def _receive(self) -> Any:
        try:
            received = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(_END_SECONDS)
            words = [describe_exit(self._process.exitcode or 0), read_last_line(self._log)]
            received = _Failed(": ".join(filter(None, words)))
        if isinstance(received, _Failed):
            raise GenerationError(
                f"answering on GPU {self._number} failed: {redact(received.message)}. Finished answers are kept: run the "
                f"notebook again, with CUDA_VISIBLE_DEVICES=0 to answer on the first GPU only"
            )
        return received

    def end(self) -> None:
        """End the process, by force if necessary."""
        self._process.terminate()
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(
    connection: Connection, gpu: str, log: Path, settings: ModelSettings, adapter: Path | None, fast_answers: bool
) -> None:
    """Answer batches in a process on another GPU, until the notebook's process ends."""
    end_with_parent()
    if not cast(BaseProcess, multiprocessing.parent_process()).is_alive():  # it was killed before the line above
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches all processes; the notebook's process ends the others
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with log.open("wb") as stream:  # else the libraries' output would appear in the notebook
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    guard_streams()
    try:
        _answer_batches(connection, settings, adapter, fast_answers)
    except (EOFError, BrokenPipeError):
        return  # the notebook's process has ended
    except BaseException as error:  # noqa: BLE001 - the process that waits for this one reports it
        connection.send(_Failed(f"{type(error).__name__}: {' '.join(str(error).split())}"))


def _answer_batches(connection: Connection, settings: ModelSettings, adapter: Path | None, fast_answers: bool) -> None:
    from medcot_utils.models.engine import get_engine

    engine = get_engine(settings, fast_answers)  # before transformers and peft
    model, tokenizer = engine.load(settings, adapter)
    model, writer = engine.for_inference(model), None
    connection.send("loaded")

    def take() -> Batch | None:
        connection.send(_TAKE)
        return connection.recv()

    while True:
        how = connection.recv()
        if writer is None or writer.how != how:
            model = convert_to_write(model, how)
            writer = make_writer(model, tokenizer, how)
        for records in writer.write(take):
            connection.send(records)
        connection.send(_DONE)
