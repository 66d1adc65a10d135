"""How long work will take: seconds with their band, and the words for them."""

from __future__ import annotations

import time

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11


class TimeEstimate(TypedDict):
    """The seconds that work will take, and the band in which they should lie."""

    seconds: float
    low: float
    high: float


def describe_time(estimate: TimeEstimate) -> str:
    """Return an estimate with its band: `4 min (3 to 6)`, `40 s (30 to 54)` or `2.1 h (1.3 to 3.4)`."""
    limits = {"s": (1, 0), "min": (60, 0), "h": (3600, 1)}
    unit = "s" if estimate["seconds"] < 90 else "min" if estimate["seconds"] < 5400 else "h"
    length, digits = limits[unit]
    middle, low, high = (f"{estimate[key] / length:.{digits}f}" for key in ("seconds", "low", "high"))
    return f"{middle} {unit} ({low} to {high})"


def describe_end(estimate: TimeEstimate, began: float) -> str:
    """Return the time of day at which work should end: `until about 14:09`, or that it is late.

    Args: began: seconds since the epoch."""
    if time.time() > began + estimate["high"]:
        return f"longer than the estimated {describe_time(estimate)}"
    return f"until about {time.strftime('%H:%M', time.localtime(began + estimate['seconds']))}"
