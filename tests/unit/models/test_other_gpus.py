"""Answers shared with a second process, here on the CPU: the records of one, what a dead process leaves, and who ends whom."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import types

import psutil
import pytest

from medcot_utils.config import load_config
from medcot_utils.models import other_gpus
from medcot_utils.models.batches import GenerationError
from medcot_utils.models.engine import get_engine
from medcot_utils.models.generation import BatchWriter, Deal, answer_questions
from medcot_utils.models.other_gpus import OtherGpus
from medcot_utils.run.journal import Journal

pytestmark = pytest.mark.model

CONFIG = load_config("smoke", ["model.load_in_4bit=false", "generation.max_new_tokens=12", "generation.batch_size=2"])
QUESTIONS = [{"id": str(count), "Question": "Why fever, and which sign comes next? " * count} for count in (1, 40, 3, 7, 2)]
TO_THE_END = 120  # seconds that no wait of these tests comes near


@pytest.fixture(scope="module")
def loaded():
    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    return engine.for_inference(model), tokenizer


@pytest.fixture(scope="module", autouse=True)
def _second_process():
    """As if there were a second GPU; its process has none."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(other_gpus, "name_other_gpus", lambda: [""])
        yield


@pytest.fixture
def others():
    started = OtherGpus(get_engine(CONFIG.model), CONFIG.model)
    yield started
    started.close()


@pytest.fixture
def elsewhere(monkeypatch):
    """What the other process does: `taken`, its batches so far; `made`, an event that comes with its first records; and `may`,
    an event without which it goes no further from there."""
    found = types.SimpleNamespace(taken=[], made=threading.Event(), may=threading.Event())
    found.may.set()
    take, keep = Deal.take, Deal.keep

    def watched_take(deal):
        batch = take(deal)
        if batch and threading.current_thread() is not threading.main_thread():
            found.taken.append(batch)
        return batch

    def watched_keep(deal, records):
        keep(deal, records)
        if threading.current_thread() is not threading.main_thread():
            found.made.set()
            found.may.wait(TO_THE_END)

    monkeypatch.setattr(Deal, "take", watched_take)
    monkeypatch.setattr(Deal, "keep", watched_keep)
    return found


def before_each_batch(monkeypatch, do):
    """Have this process call `do()` before it writes a batch."""
    write = BatchWriter.write

    def delayed(writer, batch):
        do()
        yield from write(writer, batch)

    monkeypatch.setattr(BatchWriter, "write", delayed)


def answers(loaded, **given):
    records = answer_questions(*loaded, QUESTIONS, CONFIG.generation, True, 1, n_samples=1, answer_tokens=4, **given)
    return [{field: value for field, value in record.items() if field != "seconds"} for record in records]


def test_two_processes_give_the_records_of_one_in_order(loaded, others, elsewhere, monkeypatch, tmp_path, capsys):
    expected = answers(loaded)
    assert "dealt out" not in capsys.readouterr().out
    before_each_batch(monkeypatch, lambda: elsewhere.made.wait(TO_THE_END))
    journal = Journal(tmp_path / "answers.jsonl.part", "this")
    assert answers(loaded, others=others, journal=journal) == expected
    assert 1 <= len(elsewhere.taken) <= 4, "of five batches this process writes one at least"
    assert {record["id"] for record in journal.read()} == {question["id"] for question in QUESTIONS}
    assert "10 answers, 2 at once on each of 2 GPUs" in capsys.readouterr().out
    (worker,) = others._workers
    assert answers(loaded, others=others) == expected
    assert others._workers == [worker] and worker._process.is_alive(), "it stays for the next call"


def test_a_killed_process_is_told_and_what_was_made_is_kept(loaded, others, elsewhere, monkeypatch, tmp_path):
    expected = answers(loaded)
    elsewhere.may.clear()

    def kill_the_other():
        assert elsewhere.made.wait(TO_THE_END)
        if others._workers[0]._process.is_alive():
            others._workers[0]._process.kill()
            others._workers[0]._process.join()
        elsewhere.may.set()

    journal = Journal(tmp_path / "answers.jsonl.part", "this")
    with monkeypatch.context() as patched:
        before_each_batch(patched, kill_the_other)
        told = r"^answering on GPU 1 failed: killed by signal 9, as a machine out of main memory does.*Finished answers are kept"
        with pytest.raises(GenerationError, match=told):
            answers(loaded, others=others, journal=journal)
    kept = journal.read()
    assert 4 <= len(kept) < 10, "its first batch and those of this process until it was noticed"
    assert others._workers == []
    asked = len(elsewhere.taken)
    assert answers(loaded, journal=journal) == expected, "with another number of processes"
    assert journal.read()[: len(kept)] == kept and len(elsewhere.taken) == asked


def test_a_process_that_cannot_load_says_why(loaded, monkeypatch):
    # Its settings ask for an engine that this machine cannot run.
    settings = CONFIG.model.model_copy(update={"engine": "unsloth"})
    others = OtherGpus(types.ModuleType("medcot_utils.models.unsloth_engine"), settings)
    before_each_batch(monkeypatch, lambda: others._workers[0]._process.join(TO_THE_END))
    with pytest.raises(GenerationError, match=r"answering on GPU 1 failed: PlatformError: model\.engine unsloth: the pack"):
        answers(loaded, others=others)
    assert others._workers == []


def test_an_error_here_ends_the_other_process(loaded, others, monkeypatch):
    workers = []

    def interrupt():
        workers.extend(others._workers)
        raise KeyboardInterrupt

    before_each_batch(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        answers(loaded, others=others)
    assert not workers[0]._process.is_alive() and others._workers == []


def test_a_single_batch_starts_no_process(loaded, others):
    answer_questions(*loaded, QUESTIONS[:2], CONFIG.generation, True, 1, others=others)
    assert others._workers == [] and [others.count_for(batches) for batches in (0, 1, 2, 9)] == [0, 0, 1, 1]


# The other process imports this file too: it would sleep for long if nothing ended it.
ALONE = """
import sys, time, types
from pathlib import Path
from medcot_utils.config import load_config
from medcot_utils.models import other_gpus

other_gpus._answer_batches = lambda *_: time.sleep(600)
other_gpus.name_other_gpus = lambda: [""]
if __name__ == "__main__":
    others = other_gpus.OtherGpus(types.ModuleType("transformers_engine"), load_config("smoke").model)
    (worker,) = others._start(1)
    while sys.argv[1] == "working" and not worker._log.exists():
        time.sleep(0.01)
    print(worker._process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("state", ["starting", "working"])
def test_the_other_process_ends_when_its_parent_is_killed(state, tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    parent = subprocess.Popen([sys.executable, script, state], stdout=subprocess.PIPE, text=True)
    other = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while other.is_running() and other.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    ended = not other.is_running() or other.status() == psutil.STATUS_ZOMBIE
    if not ended:
        other.kill()
    assert ended
    parent.stdout.close()
