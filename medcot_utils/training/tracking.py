"""Tracking: the run's configuration, losses and comparison in Weights & Biases, trackio or TensorBoard.

Training (notebook 05) and comparison (06) are two processes, and a killed training is a third: all of them write to one
tracked run, whose id lies in the run directory. What a tracker cannot add to later (W&B offline, TensorBoard) is written
whole by each session and replaces the session before. The `report_to` callbacks of transformers know nothing of either, and
let a tracker that fails end the training; so the trainer is told `report_to="none"` and gets `Tracked` from here."""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from medcot_utils.config import RunConfig
from medcot_utils.errors import MedcotError
from medcot_utils.machine import hardware, redaction, secrets
from medcot_utils.run.directory import Run
from medcot_utils.run.files import to_json, write_atomic
from medcot_utils.training.trackers import TRACKERS, Tracker

if TYPE_CHECKING:
    import pandas as pd

STATE, FOLDER = "tracking.json", "tracking"
_PACKAGES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard"}
_LOG_IN = "Weights & Biases"


class TrackingError(MedcotError):
    """What the run asked to be tracked with cannot be used; the message says what is missing and what to do."""


def _installed(backend: str) -> bool:
    return importlib.util.find_spec(_PACKAGES[backend]) is not None


def resolve(config: RunConfig) -> tuple[str, str, str]:
    """(backend, mode, one line saying why). The mode is `online` or `offline` for wandb, else empty. Asks nobody anything."""
    asked, mode = config.tracking.backend, config.tracking.mode
    switched_off = os.environ.get("WANDB_MODE") == "disabled"
    if asked == "none" or (asked == "wandb" and switched_off):
        return "none", "", "tracking: none, as asked"
    if asked in ("auto", "wandb"):
        key = None if switched_off else secrets.secret_of(_LOG_IN, config.secrets)
        if asked == "wandb" or (key and _installed("wandb")):
            if mode == "auto":
                mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
            why = "no key was found" if key is None else f"key from {key.where}" if mode == "online" else "as asked"
            return "wandb", mode, f"tracking: wandb, {mode} ({why}), project {config.tracking.project}"
        if not _installed("trackio"):
            return "none", "", "tracking: none (no W&B key was found, and trackio is not installed)"
        asked, why = "trackio", "no W&B key was found"
    else:
        why = "as asked"
    return asked, "", f"tracking: {asked}, on this machine ({why}), project {config.tracking.project}"


def check_tracker(config: RunConfig) -> str:
    """Return one line on what this run is tracked with, after a look at all that it needs. Asks for a key if one is needed
    and somebody is there to type it.

    Raises TrackingError or PlatformError, before any model is loaded, for what the run asked for by name and cannot have: a
    package that is not installed, or W&B online without a key."""
    asked = config.tracking
    if asked.backend in _PACKAGES and not _installed(asked.backend):
        raise TrackingError(
            f"tracking.backend is {asked.backend}, which is not installed: pip install {asked.backend}, or use "
            f"--set tracking.backend=auto"
        )
    if asked.backend == "wandb" and asked.mode == "online":
        secrets.require_secret(
            _LOG_IN, "tracking.mode=online", "use --set tracking.mode=auto (offline without a key)", config.secrets
        )
    return resolve(config)[2]


# --- one tracked run -----------------------------------------------------------------------------------------------


def _state(run: Run, backend: str, mode: str) -> dict[str, str]:
    """What identifies the tracked run: as stored, or a new one for another training, project or tracker."""
    mark = {"backend": backend, "project": run.config.tracking.project, "fingerprint": run.fingerprint("adapter")}
    held = _stored(run)
    if held is None or any(held.get(key) != value for key, value in mark.items()):
        held = mark | {"id": token_hex(4), "url": "", "folder": ""}
        held["name"] = f"{run.path.absolute().name}-{held['id']}"
    return held | {"mode": mode}


def _stored(run: Run) -> dict[str, str] | None:
    import json

    path = run.path / STATE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _settings(run: Run) -> dict[str, Any]:
    """What the tracked run keeps as its configuration: settings, versions, and the plan; nothing of secrets."""
    values = {key: value for key, value in run.config.model_dump(mode="json").items() if key != "secrets"}
    versions = {name: version for name, version in hardware.installed_versions().items() if version}
    return values | {"versions": versions, "plan": run.read("plan")}


class Session:
    """One process's part in the tracked run. Every call that fails ends tracking with one line, and nothing else."""

    def __init__(self, run: Run) -> None:
        self.run, self.tracker, self.sent = run, None, 0
        backend, mode, _ = resolve(run.config)
        if backend != "none":
            secrets.hand_on_secrets(run.config.secrets)
            self._try(lambda: self._open(TRACKERS[backend](), _state(run, backend, mode)))

    def _open(self, tracker: Tracker, state: dict[str, str]) -> None:
        folder = self.run.path.absolute() / FOLDER
        folder.mkdir(exist_ok=True)
        tracker.open(folder, state, self.run.config.tracking, _settings(self.run))
        write_atomic(self.run.path / STATE, to_json(state))
        self.tracker = tracker

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever a tracker does, the training is worth more
            self.tracker = None
            why = redaction.redact(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            print(
                f"tracking ends here ({why}): the run goes on without it, and its own log in {self.run.path.name}/ has everything"
            )

    def training(self, log_history: Sequence[Mapping[str, Any]]) -> None:
        """Send the entries of the trainer's log that have not been sent, by this session or, where that is kept, before."""
        new, self.sent = log_history[self.sent :], len(log_history)
        for entry in new:
            self._call(lambda tracker, entry=entry: tracker.log_once(entry))

    def _call(self, call: Callable[[Tracker], None]) -> None:
        if (tracker := self.tracker) is not None:
            self._try(lambda: call(tracker))

    def numbers(self, values: Mapping[str, float]) -> None:
        """Single numbers of the whole run."""
        self._call(lambda tracker: tracker.summary(values))

    def table(self, name: str, table: pd.DataFrame) -> None:
        self._call(lambda tracker: tracker.table(name, table))

    def files(self, name: str, paths: Iterable[Path]) -> None:
        """Files kept with the run as one artifact."""
        self._call(lambda tracker: tracker.files(name, [path for path in paths if path.exists()]))

    def close(self) -> None:
        self._call(lambda tracker: tracker.close())
        self.tracker = None


def callbacks(run: Run) -> list[Any]:
    """The trainer callback that tracks the training; an empty list where the run is not tracked."""
    from transformers import TrainerCallback

    if resolve(run.config)[0] == "none":
        return []

    class Tracked(TrainerCallback):
        """Sends the trainer's log as it grows, from the first process only; a later training goes on in the same tracked run."""

        session: Session | None = None

        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero and self.session is None:
                self.session = Session(run)
                self.session.training(state.log_history)

        def on_log(self, args, state, control, **kwargs):
            if self.session:
                self.session.training(state.log_history)

        def on_train_end(self, args, state, control, **kwargs):
            if self.session:
                self.session.training(state.log_history)
                self.session.close()
                self.session = None

    return [Tracked()]


def record_comparison(run: Run, table: pd.DataFrame) -> None:
    """Add what notebook 06 found to the tracked run: held-out losses, every metric of base and tuned model, their `table`, and
    report and metrics as an artifact. Where the training was not tracked, its log is added too."""
    if resolve(run.config)[0] == "none":
        return
    session = Session(run)
    session.training(run.read("training_log"))
    metrics = run.read("metrics")["metrics"]
    sides = ("base", "tuned", "difference")
    session.numbers(
        {f"comparison/{name}/{side}": float(metric[side]["value"]) for name, metric in metrics.items() for side in sides}
    )
    session.table("comparison", table)
    session.files("report", [run.require("report"), run.require("metrics")])
    session.close()


def where(run: Run) -> str:
    """Where the tracked run is to be seen: a link, or the command that shows or uploads it."""
    state = _stored(run)
    if state is None:
        return resolve(run.config)[2]
    if state["url"]:
        return f"tracked: {state['url']}"
    there, path = _from_here(run, Path(state["folder"]))
    folder = shlex.quote(path)
    command = {
        "wandb": f"wandb sync {folder}",
        "trackio": f"TRACKIO_DIR={folder} trackio show --project {shlex.quote(state['project'])}",
        "tensorboard": f"tensorboard --logdir {folder}",
    }[state["backend"]]
    does = "upload it" if state["backend"] == "wandb" else "see it"
    return f"tracked with {state['backend']}, on this machine; to {does}{there}: {command}"


def _from_here(run: Run, folder: Path) -> tuple[str, str]:
    """(from where, path): the folder as one would type it from here; where that is far away, as one would type it in the run
    directory. Never an absolute path: executed notebooks are passed on."""
    folder = run.path.absolute() / folder
    relative = os.path.relpath(folder)
    if relative.startswith("../.."):
        return f", in the run directory {run.path.name}", str(folder.relative_to(run.path.absolute()))
    return "", relative
