"""The journal of an unfinished artifact: what is kept, of which batch, and when it counts."""

from __future__ import annotations

import os

import pytest

from medcot_utils.machine.disk import DiskError
from medcot_utils.run.clock import SessionClock, TimeBudgetReached
from medcot_utils.run.journal import Journal

FIRST, SECOND = [{"id": "a", "text": "Fi\u00e8vre\u2028?"}, {"id": "b"}], [{"id": "c"}]


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "answers.jsonl.part", "this")


def test_a_journal_holds_what_was_added_in_its_order(journal):
    assert journal.read() == []
    journal.add(FIRST)
    journal.add(SECOND)
    assert journal.read() == Journal(journal.path, "this").read() == FIRST + SECOND


def test_a_journal_made_from_something_else_is_begun_anew(journal):
    journal.add(FIRST)
    other = Journal(journal.path, "that")
    assert other.read() == []
    other.add(SECOND)
    assert other.read() == SECOND and journal.read() == []


def test_a_batch_cut_off_anywhere_is_not_there_at_all(journal):
    journal.add(FIRST)
    before = journal.path.read_bytes()
    journal.add(SECOND + FIRST)
    whole = journal.path.read_bytes()
    for length in range(len(whole)):
        journal.path.write_bytes(whole[:length])
        assert journal.read() == (FIRST if length >= len(before) else [])
        if length % 9 == 0 or length in (len(before) - 1, len(whole) - 1):
            kept = journal.read()
            journal.add(SECOND)
            assert journal.read() == kept + SECOND, "what is cut off is written over"


def test_records_are_on_the_disk_when_add_returns(journal, monkeypatch):
    journal.add(FIRST)
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size) or fsync(number))
    journal.add(SECOND)
    assert synced == [journal.path.stat().st_size]


def test_a_full_disk_is_told_and_costs_only_the_batch(journal, monkeypatch):
    journal.add(FIRST)

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError, match=r"answers\.jsonl\.part"):
            journal.add(SECOND)
    journal.add([{"id": "d"}])
    assert journal.read()[:2] == FIRST and journal.read()[-1] == {"id": "d"}


def test_the_journal_of_a_run_goes_once_the_artifact_is_there(run_factory):
    run = run_factory()
    journal = run.journal("questions")
    journal.add(FIRST)
    assert run.journal("questions").read() == FIRST and journal.path.parent == run.path
    run.write("questions", FIRST)
    assert not journal.path.exists() and run.journal("questions").read() == []


def test_another_setting_makes_the_journal_of_a_run_empty(run_factory):
    run_factory().journal("base_mcq").add(FIRST)
    assert run_factory().journal("base_mcq").read() == FIRST
    assert run_factory("evaluation.mcq_max_new_tokens=17").journal("base_mcq").read() == []


# --- time that runs out --------------------------------------------------------------------------------------------


def test_each_process_makes_one_batch_then_pauses(tmp_path):
    for number in range(3):
        journal = Journal(tmp_path / "part", "this", SessionClock(1e-6))
        journal.require_time("answers", number, 9)
        journal.add([{"id": str(number)}])
        with pytest.raises(TimeBudgetReached, match=rf"^answers: stopped after {number + 1} of 9, before training\.max_hours"):
            journal.require_time("answers", number + 1, 9)
    assert [record["id"] for record in Journal(tmp_path / "part", "this").read()] == ["0", "1", "2"]


def test_the_journals_of_a_run_share_one_clock(run_factory):
    run = run_factory("training.max_hours=0.000001")
    first, second = run.journal("base_mcq"), run.journal("questions")
    first.require_time("multiple choice", 0, 4)
    first.add(FIRST)
    with pytest.raises(TimeBudgetReached):
        second.require_time("answers", 0, 9)


@pytest.mark.parametrize("settings", [(), ("training.max_hours=1",)])
def test_a_run_with_time_left_does_not_pause(run_factory, settings):
    journal = run_factory(*settings).journal("base_mcq")
    for _ in range(3):
        journal.require_time("answers", 0, 9)
        journal.add(FIRST)
