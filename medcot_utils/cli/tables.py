"""Tables that several commands print."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from medcot_utils.machine.durations import describe_time
from medcot_utils.run.artifacts import STEPS
from medcot_utils.series.estimate import SeriesEstimate


def times_table(estimates: Mapping[str, SeriesEstimate]) -> Table:
    """Return a table of the time that each notebook will take, one column per profile. All estimates must be for one machine."""
    speed = next(iter(estimates.values())).speed
    table = Table("notebook", *estimates, title=f"time on {speed.where}: {speed.how}", title_justify="left")
    for step in STEPS:
        table.add_row(step, *(describe_time(estimate.steps[step]) for estimate in estimates.values()))
    table.add_row("all seven", *(describe_time(estimate.total) for estimate in estimates.values()))
    return table
