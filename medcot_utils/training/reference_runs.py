"""Public T4 runs of the article's recipe: the band their losses make, and whether a run may be placed in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medcot_utils.config import RunConfig
from medcot_utils.machine.paths import PACKAGE

if TYPE_CHECKING:
    import pandas as pd

_REFERENCE = PACKAGE / "data" / "t4_reference.json"


def reference() -> dict[str, Any]:
    """The file with the runs: conditions (settings they share), noted (what differs without forbidding a look), steps, runs
    and other_runs (each label, count, losses in nats per token, train_seconds)."""
    return json.loads(_REFERENCE.read_text(encoding="utf-8"))


def differences(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """{setting: (the public runs', this run's)} for each condition that this run does not meet; empty where it meets all."""
    found = {}
    for name, theirs in reference()["conditions"].items():
        ours = config.training.effective_batch_size if name == "effective_batch_size" else config.get(name)
        if ours != theirs:
            found[name] = (theirs, ours)
    return found


def band() -> dict[int, tuple[float, float]]:
    """{step: (lowest, highest loss)} over the public runs, widened to twice its width on either side and at least by 0.05.

    Five runs of two library versions are too few for a quantile; 0.05 is about what another library version, another
    version of the data or another GPU changed in the runs that are not in the band."""
    known = reference()
    bounds = {}
    for index, step in enumerate(known["steps"]):
        losses = [run["losses"][index] for run in known["runs"]]
        margin = max(0.05, 2 * (max(losses) - min(losses)))
        bounds[step] = (min(losses) - margin, max(losses) + margin)
    return bounds


def place(config: RunConfig, log_history: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """This run's logged losses beside the band's, or, where conditions differ, a table of what does.

    Columns step, band low, band high, this run, inside; or setting, public runs, this run."""
    import pandas as pd

    if differing := differences(config):
        lines = [{"setting": name, "public T4 runs": theirs, "this run": ours} for name, (theirs, ours) in differing.items()]
        return pd.DataFrame(lines).set_index("setting")
    losses = {entry["step"]: float(entry["loss"]) for entry in log_history if "loss" in entry}
    columns = ["step", "band low", "band high", "this run", "inside"]
    lines = [
        {"step": step, "band low": low, "band high": high, "this run": losses.get(step), "inside": low <= losses[step] <= high}
        for step, (low, high) in band().items()
        if step in losses
    ]
    return pd.DataFrame(lines, columns=columns).set_index("step").round(4)
