"""Public T4 runs of the article's recipe: the band their losses make, and whether a run may be compared with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from medcot_utils.config import RunConfig
from medcot_utils.machine.paths import PACKAGE

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.training.records import LogEntry

_REFERENCE = PACKAGE / "data" / "t4_reference.json"

SettingValue = str | int | float | bool | list[str] | None


class ReferenceRun(TypedDict):
    """One public run, or several that are recorded as one curve."""

    label: str
    count: int  # runs recorded as this curve
    losses: list[float]  # nats per token, one for each of the reference's steps
    train_seconds: list[int]  # one run's, or the shortest and the longest


class Reference(TypedDict):
    """The public runs, as data/t4_reference.json holds them."""

    what: str
    conditions: dict[str, SettingValue]  # the settings that all `runs` share
    noted: dict[str, SettingValue]  # what may differ without forbidding a comparison
    steps: list[int]  # optimizer steps at which the losses were logged
    runs: list[ReferenceRun]  # they make the band
    other_runs: list[ReferenceRun]  # another GPU and batch; not in the band


class Difference(NamedTuple):
    """A setting's value in the public runs and in this run."""

    theirs: SettingValue
    ours: SettingValue


class Bounds(NamedTuple):
    """Lowest and highest loss of the band at one step, in nats per token."""

    low: float
    high: float


def read_reference() -> Reference:
    """Return the public runs and the settings they share."""
    return json.loads(_REFERENCE.read_text(encoding="utf-8"))


def reference_differences(config: RunConfig) -> dict[str, Difference]:
    """Return each condition of the public runs that this configuration does not meet, by setting; empty if it meets all."""
    found = {}
    for name, theirs in read_reference()["conditions"].items():
        ours = config.training.effective_batch_size if name == "effective_batch_size" else config.get(name)
        if ours != theirs:
            found[name] = Difference(theirs, ours)
    return found


def reference_band() -> dict[int, Bounds]:
    """Return the band by step: the public runs' losses, widened to twice their width on either side and at least by 0.05.

    Five runs of two library versions are too few for a quantile. 0.05 is about what another library version, another version
    of the data or another GPU changed in the runs that are not in the band."""
    known = read_reference()
    bounds = {}
    for index, step in enumerate(known["steps"]):
        losses = [run["losses"][index] for run in known["runs"]]
        margin = max(0.05, 2 * (max(losses) - min(losses)))
        bounds[step] = Bounds(min(losses) - margin, max(losses) + margin)
    return bounds


def compare_with_reference(config: RunConfig, log_history: Sequence[LogEntry]) -> pd.DataFrame:
    """Return this run's logged losses beside the band or, if conditions differ, a table of the differences.

    Index step, columns band low, band high, this run, inside; or index setting, columns public T4 runs, this run."""
    import pandas as pd

    if differing := reference_differences(config):
        lines = [{"setting": name, "public T4 runs": theirs, "this run": ours} for name, (theirs, ours) in differing.items()]
        return pd.DataFrame(lines).set_index("setting")
    losses = {entry["step"]: float(entry["loss"]) for entry in log_history if "loss" in entry}
    columns = ["step", "band low", "band high", "this run", "inside"]
    lines = [
        {"step": step, "band low": low, "band high": high, "this run": losses[step], "inside": low <= losses[step] <= high}
        for step, (low, high) in reference_band().items()
        if step in losses
    ]
    return pd.DataFrame(lines, columns=columns).set_index("step").round(4)
