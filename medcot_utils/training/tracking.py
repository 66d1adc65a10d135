"""Tracking: the run's configuration, losses, and comparison in Weights & Biases, trackio, or TensorBoard.

Training (notebook 05) and comparison (06) are two processes, and a training that was killed is a third. All of them write to
one tracked run, whose id is in the run directory. A tracker that cannot add to a run later (W&B offline, TensorBoard) gets the
whole run from each session, which replaces the one before. The `report_to` callbacks of transformers do neither, and if a
tracker fails, they end the training. So the trainer gets `report_to="none"` and the callback from this module."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from medcot_utils.config import RunConfig
from medcot_utils.errors import MedcotError
from medcot_utils.machine import hardware, secrets, user_key
from medcot_utils.machine.names import require_plain
from medcot_utils.machine.paths import working_root
from medcot_utils.plain_text import say
from medcot_utils.run.directory import Run
from medcot_utils.run.files import to_json, write_atomic
from medcot_utils.text_files import read_json
from medcot_utils.training.trackers import TRACKERS, TrackedRun, Tracker, describe_error

if TYPE_CHECKING:
    import pandas as pd
    from transformers import TrainerCallback

    from medcot_utils.training.records import LogEntry

STATE, FOLDER = "tracking.json", "tracking"
_LOG_IN = "Weights & Biases"


class TrackingError(MedcotError):
    """Say why the tracker that the run asks for cannot be used: what is missing and what to do."""


@dataclass(frozen=True)
class TrackerChoice:
    """Hold the tracker that a run gets.

    backend: "wandb", "trackio", "tensorboard", or "none". mode: "online" or "offline" for wandb, else empty.
    description: the choice and its reason in one line."""

    backend: str
    mode: str
    description: str


def _installed(backend: str) -> bool:
    return importlib.util.find_spec(backend) is not None


def choose_tracker(config: RunConfig) -> TrackerChoice:
    """Return the tracker that follows from the settings and from this machine's secrets and packages. Never prompt for a key."""
    asked, mode = config.tracking.backend, config.tracking.mode
    switched_off = os.environ.get("WANDB_MODE") == "disabled"
    if asked == "none" or (asked == "wandb" and switched_off):
        return TrackerChoice("none", "", "tracking: none, as set")
    if asked in ("auto", "wandb"):
        key = None if switched_off else secrets.secret_of(_LOG_IN, config.secrets)
        if asked == "wandb" or (key and _installed("wandb")):
            if mode == "auto":
                mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
            why = "no key was found" if key is None else f"key from {key.where}" if mode == "online" else "as asked"
            return TrackerChoice("wandb", mode, f"tracking: wandb, {mode} ({why}), project {config.tracking.project}")
        if not _installed("trackio"):
            return TrackerChoice("none", "", "tracking: none (no W&B key was found, and trackio is not installed)")
        asked, why = "trackio", "no W&B key was found"
    else:
        why = "as asked"
    return TrackerChoice(asked, "", f"tracking: {asked}, on this machine ({why}), project {config.tracking.project}")


def check_tracker(config: RunConfig) -> str:
    """Check that the tracker can be used, and return one line on it. Prompt for a key if one is needed and someone can type it.

    Raises:
        TrackingError: if the run names a tracker that is not installed.
        PlatformError: if the run asks for W&B online and there is no key."""
    asked = config.tracking
    if asked.backend in TRACKERS and not _installed(asked.backend):
        raise TrackingError(
            f"tracking.backend is {asked.backend}, which is not installed: pip install {asked.backend}, or use "
            f"--set tracking.backend=auto"
        )
    if asked.backend == "wandb" and asked.mode == "online":
        secrets.require_secret(
            _LOG_IN, "tracking.mode=online", "use --set tracking.mode=auto (offline without a key)", config.secrets
        )
    return choose_tracker(config).description


# --- one tracked run -----------------------------------------------------------------------------------------------


def _tracked_run(run: Run, choice: TrackerChoice) -> TrackedRun:
    """Return the run's tracked run: the stored one, or a new one for another training, project, or tracker.

    Online, the stored one counts only if this user's sessions made it: its id could belong to another of the user's runs."""
    mark = {"backend": choice.backend, "project": run.config.tracking.project, "fingerprint": run.fingerprint("adapter")}
    held = _stored(run)
    if held and choice.mode == "online" and not user_key.is_signed(_identity(held), held.get("signatures")):
        say(f"tracking: {STATE} was not written by you (or by an earlier version): a new tracked run begins")
        held = None
    if held is None or any(held.get(key) != value for key, value in mark.items()):
        held = mark | {"id": token_hex(4), "url": "", "folder": ""}
        held["name"] = f"{run.path.absolute().name}-{held['id']}"
    return held | {"mode": choice.mode}


def _identity(tracked: TrackedRun) -> str:
    """Return the part of a tracked run that is signed."""
    return json.dumps([tracked.get(key) for key in ("backend", "project", "fingerprint", "id")])


def _stored(run: Run) -> TrackedRun | None:
    """Return the content of tracking.json; None if there is no such file.

    Raises TrackingError or OutsideError for a record that no tracker can have written, because its name and id become file
    names."""
    path, source = run.path / STATE, f"{run.path.absolute().name}/{STATE}"
    if not path.exists():
        return None
    try:
        held = read_json(path)
        whole = held["backend"] in TRACKERS and all(
            isinstance(held[key], str) for key in TrackedRun.__annotations__ if key != "signatures"
        )
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise TrackingError(f"{source} is not a record of a tracked run: remove it, and the next session begins a new one")
    for key in ("id", "name"):
        require_plain(held[key], f"{source}, {key}")
    return held


def _configuration(run: Run) -> dict[str, Any]:
    """Return the tracked run's configuration: settings, versions, and the plan, without the names of secrets."""
    values = {key: value for key, value in run.config.model_dump(mode="json").items() if key != "secrets"}
    versions = {name: version for name, version in hardware.installed_versions().items() if version}
    return values | {"versions": versions, "plan": run.read("plan")}


class Session:
    """Write one process's part of the tracked run. A call that fails ends the tracking with one line, but not the training."""

    def __init__(self, run: Run) -> None:
        self.run, self.sent = run, 0
        self.tracker: Tracker | None = None
        choice = choose_tracker(run.config)
        if choice.backend != "none":
            secrets.hand_on_secrets(run.config.secrets)
            self.tracker = TRACKERS[choice.backend]()
            self.send(lambda tracker: self._open(tracker, _tracked_run(run, choice)))

    def _open(self, tracker: Tracker, tracked: TrackedRun) -> None:
        folder = self.run.path.absolute() / FOLDER
        folder.mkdir(exist_ok=True)
        tracked = tracker.open(folder, tracked, self.run.config.tracking, _configuration(self.run))
        if tracked["backend"] == "wandb":
            tracked |= {"signatures": user_key.sign(_identity(tracked))}
        write_atomic(self.run.path / STATE, to_json(tracked))

    def send(self, call: Callable[[Tracker], None]) -> None:
        """Call the tracker, unless tracking has ended. An error in the call ends it."""
        if self.tracker is None:
            return
        try:
            call(self.tracker)
        except Exception as error:  # noqa: BLE001 - the training matters more than any error of a tracker
            self.tracker = None
            say(
                f"tracking ends here ({describe_error(error)[:300]}): the run continues without it, and its own log in "
                f"{self.run.name}/ has everything"
            )

    def send_log(self, log_history: Sequence[LogEntry]) -> None:
        """Send the new entries of the trainer's log. If the tracker keeps a run, entries of earlier sessions are not new."""
        new, self.sent = log_history[self.sent :], len(log_history)
        for entry in new:
            self.send(lambda tracker, entry=entry: tracker.log_once(entry))

    def close(self) -> None:
        self.send(lambda tracker: tracker.close())
        self.tracker = None


def make_tracking_callbacks(run: Run) -> list[TrainerCallback]:
    """Return the trainer callback that tracks the training; an empty list if the run is not tracked."""
    if choose_tracker(run.config).backend == "none":
        return []
    from medcot_utils.training.callbacks import TrackLog

    return [TrackLog(lambda: Session(run))]


def record_comparison(run: Run, table: pd.DataFrame) -> None:
    """Add notebook 06's results to the tracked run.

    These are base, tuned, and difference of every metric, their `table`, and report and metrics as an artifact. If the training
    was not tracked, its log is added too."""
    if choose_tracker(run.config).backend == "none":
        return
    metrics = run.read("metrics")["metrics"]
    sides = ("base", "tuned", "difference")
    numbers = {f"comparison/{name}/{side}": float(metric[side]["value"]) for name, metric in metrics.items() for side in sides}
    session = Session(run)
    session.send_log(run.read("training_log"))
    session.send(lambda tracker: tracker.summary(numbers))
    session.send(lambda tracker: tracker.table("comparison", table))
    session.send(lambda tracker: tracker.files("report", [run.require("report"), run.require("metrics")]))
    session.close()


def describe_tracking(run: Run) -> str:
    """Return one line that says where to see the tracked run: a link, or the command that shows or uploads it."""
    try:
        tracked = _stored(run)
    except MedcotError as error:  # the run is trained already, and a bad record must not end the work
        return f"not tracked: {error}"
    if tracked is None:
        return choose_tracker(run.config).description
    if tracked["url"]:
        return f"tracked: {tracked['url']}"
    where, path = _path_from_here(run, tracked["folder"])
    folder = shlex.quote(path)
    command = {
        "wandb": f"wandb sync {folder}",
        "trackio": f"TRACKIO_DIR={folder} trackio show --project {shlex.quote(tracked['project'])}",
        "tensorboard": f"tensorboard --logdir {folder}",
    }[tracked["backend"]]
    does = "upload it" if tracked["backend"] == "wandb" else "see it"
    return f"tracked with {tracked['backend']}, on this machine; to {does}{where}: {command}"


def _path_from_here(run: Run, folder: str) -> tuple[str, str]:
    """Return (from where, path) of a folder, as one types it in the folder that commands are started in or, if the run is not
    below that, in the run directory.

    The path is never absolute, because people share executed notebooks."""
    if run.path.absolute().is_relative_to(working_root()):
        return "", os.path.relpath(run.path.absolute() / folder, working_root())
    return f", in the run directory {run.name}", str(Path(folder))
