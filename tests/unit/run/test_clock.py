"""The session's clock: what it counts from, and what it leaves time for."""

from __future__ import annotations

import time

import pytest

from medcot_utils.run.clock import SESSION_STARTED, SessionClock


@pytest.fixture
def now(monkeypatch):
    """`now(5)` makes it second 5 of a session that began at second 0."""
    monkeypatch.setenv(SESSION_STARTED, "1000")

    def set_time(second):
        monkeypatch.setattr(time, "time", lambda: 1000.0 + second)

    set_time(0)
    return set_time


def test_a_session_without_a_limit_is_never_over(now):
    clock = SessionClock(None)
    now(1e9)
    clock.end_piece()
    assert not clock.is_over()


@pytest.mark.parametrize(("second", "over"), [(0, False), (3539, False), (3541, True), (9999, True)])
def test_an_hour_ends_a_minute_early_to_keep_what_was_made(now, second, over):
    clock = SessionClock(1)
    now(second)
    assert clock.is_over() is over


def test_an_hour_counts_from_the_clock_without_a_session(now, monkeypatch):
    monkeypatch.delenv(SESSION_STARTED)
    now(5000)
    clock = SessionClock(1)
    now(5000 + 3539)
    assert not clock.is_over()
    now(5000 + 3541)
    assert clock.is_over()


def test_two_pieces_as_long_as_the_longest_must_still_fit(now):
    clock = SessionClock(1)
    for seconds in (5, 100, 5):
        clock.begin_piece()
        now(time.time() - 1000 + seconds)
        clock.end_piece()
    assert clock.pieces == 3
    now(3339)
    assert not clock.is_over()
    now(3341)
    assert clock.is_over(), "3341 + 2 x 100 + 60 are more than 3600"
