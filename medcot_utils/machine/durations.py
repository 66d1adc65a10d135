"""How long work will take: seconds with their band, and the words for them."""

from __future__ import annotations

import time
from collections.abc import Iterable

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11


class TimeEstimate(TypedDict):
    """The seconds that work will take, and the band in which they should lie."""

    seconds: float
    low: float
    high: float


def add_times(estimates: Iterable[TimeEstimate]) -> TimeEstimate:
    """Return the estimate of several pieces of work, one after the other."""
    listed = list(estimates)
    return TimeEstimate(**{key: sum(one[key] for one in listed) for key in ("seconds", "low", "high")})


def _choose_unit(seconds: float) -> tuple[str, int, int]:
    """Return the unit of a time, its seconds, and the digits to show after the point."""
    return ("s", 1, 0) if seconds < 90 else ("min", 60, 0) if seconds < 5400 else ("h", 3600, 1)


def describe_length(seconds: float) -> str:
    """Return a time that work has taken: `40 s`, `9 min` or `2.1 h`."""
    unit, length, digits = _choose_unit(seconds)
    return f"{seconds / length:.{digits}f} {unit}"


def describe_time(estimate: TimeEstimate) -> str:
    """Return an estimate with its band: `4 min (3 to 6)`, `40 s (30 to 54)` or `2.1 h (1.3 to 3.4)`."""
    unit, length, digits = _choose_unit(estimate["seconds"])
    middle, low, high = (f"{estimate[key] / length:.{digits}f}" for key in ("seconds", "low", "high"))
    return f"{middle} {unit} ({low} to {high})"


def describe_end(estimate: TimeEstimate, began: float) -> str:
    """Return the time of day at which work should end: `until about 14:09`, or that it is late.

    Args: began: seconds since the epoch."""
    if time.time() > began + estimate["high"]:
        return f"longer than the estimated {describe_time(estimate)}"
    return f"until about {time.strftime('%H:%M', time.localtime(began + estimate['seconds']))}"
