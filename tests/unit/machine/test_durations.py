"""Estimated times in words: the unit follows the length, and a late notebook is told from one in time."""

from __future__ import annotations

import time

import pytest

from medcot_utils.machine.durations import add_times, describe_end, describe_length, describe_time


def lasting(seconds):
    return {"seconds": seconds, "low": seconds / 2, "high": seconds * 2}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s (0 to 1)"),
        (40, "40 s (20 to 80)"),
        (240, "4 min (2 to 8)"),
        (5300, "88 min (44 to 177)"),
        (7200, "2.0 h (1.0 to 4.0)"),
    ],
)
def test_the_unit_of_a_time_follows_its_length(seconds, said):
    assert describe_time(lasting(seconds)) == said
    assert describe_length(seconds) == said.partition(" (")[0]


def test_the_time_of_several_pieces_of_work_is_their_sum():
    assert add_times([lasting(40), lasting(20)]) == lasting(60)


def test_the_end_is_a_time_of_day_until_the_band_is_over(monkeypatch):
    began = time.mktime((2026, 11, 26, 14, 5, 0, 0, 0, -1))
    monkeypatch.setattr(time, "time", lambda: began + 479)
    assert describe_end(lasting(240), began) == "until about 14:09"
    monkeypatch.setattr(time, "time", lambda: began + 481)
    assert describe_end(lasting(240), began) == "longer than the estimated 4 min (2 to 8)"
