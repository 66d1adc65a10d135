"""Public T4 runs of the article's recipe: the band of their losses, and whether a run is comparable with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from medcot_utils.config import RunConfig, show_value
from medcot_utils.machine.paths import PACKAGE

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.training.records import LogEntry

_REFERENCE = PACKAGE / "data" / "t4_reference.json"

SettingValue = str | int | float | bool | list[str] | None


class ReferenceRun(TypedDict):
    """Hold one public run, or several runs that are recorded as one curve."""

    label: str
    count: int  # the number of runs recorded as this curve
    losses: list[float]  # nats per token, one for each of the reference's steps
    train_seconds: list[int]  # the shortest and the longest of the runs


class Reference(TypedDict):
    """Hold the content of data/t4_reference.json: the public runs."""

    what: str
    conditions: dict[str, SettingValue]  # the settings that all `runs` share
    noted: dict[str, SettingValue]  # settings that may differ in a run that is compared
    steps: list[int]  # optimizer steps at which the losses were logged
    runs: list[ReferenceRun]  # the runs that make the band
    other_runs: list[ReferenceRun]  # not in the band: another batch, and another GPU or version of the data


class Difference(NamedTuple):
    """Hold a setting's value in the public runs and in this run."""

    theirs: SettingValue
    ours: SettingValue


class Bounds(NamedTuple):
    """Hold the lowest and highest loss of the band at one step, in nats per token."""

    low: float
    high: float


def read_reference() -> Reference:
    """Return the public runs and the settings they share."""
    return json.loads(_REFERENCE.read_text(encoding="utf-8"))


def reference_differences(config: RunConfig) -> dict[str, Difference]:
    """Return {setting: both values} for each condition of the public runs that this configuration does not meet."""
    found = {}
    for name, theirs in read_reference()["conditions"].items():
        ours = config.training.effective_batch_size if name == "effective_batch_size" else config.get(name)
        if ours != theirs:
            found[name] = Difference(theirs, ours)
    return found


def reference_band() -> dict[int, Bounds]:
    """Return {step: bounds of the band}: the public runs' losses, widened on each side by twice their range and at least by 0.05.

    Five runs, recorded as two curves, are too few for a quantile. 0.05 nats per token is about the distance of the runs
    outside the band, which have another batch, and another GPU or versions of data and library."""
    known = read_reference()
    bounds = {}
    for index, step in enumerate(known["steps"]):
        losses = [run["losses"][index] for run in known["runs"]]
        margin = max(0.05, 2 * (max(losses) - min(losses)))
        bounds[step] = Bounds(min(losses) - margin, max(losses) + margin)
    return bounds


def compare_with_reference(config: RunConfig, log_history: Sequence[LogEntry]) -> pd.DataFrame:
    """Return a table of this run's logged losses and the band or, if conditions differ, a table of the differences.

    The first table has index step and columns band low, band high, this run, inside (losses in nats per token). The second has
    index setting and columns public T4 runs, this run."""
    import pandas as pd

    if differing := reference_differences(config):
        shown = {name: map(show_value, both) for name, both in differing.items()}
        lines = [{"setting": name, "public T4 runs": theirs, "this run": ours} for name, (theirs, ours) in shown.items()]
        return pd.DataFrame(lines).set_index("setting")
    losses = {entry["step"]: float(entry["loss"]) for entry in log_history if "loss" in entry}
    columns = ["step", "band low", "band high", "this run", "inside"]
    lines = [
        {"step": step, "band low": low, "band high": high, "this run": losses[step], "inside": low <= losses[step] <= high}
        for step, (low, high) in reference_band().items()
        if step in losses
    ]
    return pd.DataFrame(lines, columns=columns).set_index("step").round(4)
