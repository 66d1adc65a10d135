"""The three trackers behind `tracking`. Their calls may raise any error of the libraries; `tracking.Session` catches it.

Each tracker logs as the callbacks of `transformers.integrations` do: names from their `rewrite_logs`, steps as
`train/global_step`. The callbacks themselves are not used: after a kill they log the repeated steps twice, offline they begin
a new run at each resume, and an error in them ends the training."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from medcot_utils.config import TrackingSettings
from medcot_utils.machine.redaction import redact
from medcot_utils.plain_text import say

if TYPE_CHECKING:
    import pandas as pd

    from medcot_utils.training.records import LogEntry

# A server that does not answer must not delay the training, which matters more. Unsent data stays on disk.
_ANSWER_SECONDS, _INIT_SECONDS, _FINISH_SECONDS = 10, 30, 120
# {a name in a log entry after `rewrite_logs`: the entry's kind}; any other entry is of kind "train".
_KINDS = {"eval/loss": "eval", "train/train_runtime": "end", "train/skipped_step": "skipped"}
# trackio's own variables, by which it sends every run to a Space or a server.
_TRACKIO_SENDS_TO = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID")


class TrackedRun(TypedDict):
    """Hold what identifies the tracked run of a run directory: the content of tracking.json."""

    backend: str  # "wandb", "trackio" or "tensorboard"
    mode: str  # "online" or "offline" for wandb, else empty
    project: str
    fingerprint: str  # the adapter's: another training gets another tracked run
    id: str
    name: str
    folder: str  # the folder of the tracker's files, relative to the run directory
    url: str  # empty if the run is only on this machine
    signatures: NotRequired[list[str]]  # this user's (`user_key`), for a tracker that sends data; earlier runs lack them


def describe_error(error: Exception) -> str:
    """Return an error's type and text in one line, without secrets."""
    return redact(" ".join(f"{type(error).__name__}: {error}".split()))


def _kind(values: Mapping[str, Any]) -> str:
    return next((kind for name, kind in _KINDS.items() if name in values), "train")


class _Log:
    """Log to a tracked run, in which each entry of the trainer's log appears once.

    seen: the entries that the tracked run has, as (kind, step). last: the last step among them."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self.last = 0

    def log_once(self, entry: LogEntry) -> None:
        """Log an entry of the trainer's log, unless the tracked run has it already."""
        from transformers.integrations.integration_utils import rewrite_logs

        step = int(entry["step"])
        numbers = {key: float(value) for key, value in entry.items() if key != "step" and isinstance(value, int | float | str)}
        values = rewrite_logs(numbers)
        if (_kind(values), step) not in self.seen:
            self.log(values, step)
        self.seen.add((_kind(values), step))
        self.last = max(self.last, step)

    def summary(self, values: Mapping[str, float]) -> None:
        """Add single numbers for the whole run."""
        self.log(dict(values), self.last)


class _WandbInterface(_Log):
    """Send to wandb's interface, which trackio copies.

    library: the module. run: the object that its `init` returned. id: the run's id."""

    library: ModuleType
    run: Any
    id: str

    def send(self, values: Mapping[str, Any], step: int) -> None:
        self.run.log(dict(values))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.send({**values, "train/global_step": step}, step)

    def table(self, name: str, table: pd.DataFrame) -> None:
        self.send({name: self.library.Table(dataframe=table.reset_index().astype(str))}, self.last)

    def files(self, name: str, paths: Sequence[Path]) -> None:
        artifact = self.library.Artifact(f"{name}-{self.id}", type=name)
        for path in paths:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)


class Wandb(_WandbInterface):
    """Track with Weights & Biases. Online, a later session adds to it. Offline, it writes the whole run under the same id."""

    def open(self, folder: Path, tracked: TrackedRun, settings: TrackingSettings, config: Mapping[str, Any]) -> TrackedRun:
        home = folder / "wandb"
        home.mkdir(exist_ok=True)
        # Artifacts wait there for the upload, which may come days later if the run is offline.
        os.environ.setdefault("WANDB_DATA_DIR", str(home / "data"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(home / "cache"))
        import wandb

        self.library, self.id, mode = wandb, tracked["id"], tracked["mode"]
        try:
            if mode == "online":
                _ask_server()
            self._init(mode, home, tracked, settings, config)
        except Exception as error:
            if mode != "online":
                raise
            why = describe_error(error)[:200]
            say(f"tracking: W&B cannot be used online ({why}); this session is tracked offline: upload it with wandb sync")
            wandb.teardown()  # it still counts the id as in use
            mode = "offline"
            self._init(mode, home, tracked, settings, config)
        self.folder = Path(self.run.dir).parent
        self.older = [path for path in home.glob(f"wandb/offline-run-*-{self.id}") if path != self.folder]
        if mode == "online" and (before := self.run.summary.get("train/global_step")):
            self.seen = {(kind, step) for kind in ("train", *_KINDS.values()) for step in range(int(before) + 1)}
        url = (self.run.url or "") if mode == "online" else ""
        return tracked | {"mode": mode, "url": url, "folder": self.folder.relative_to(folder.parent).as_posix()}

    def _init(self, mode: str, home: Path, tracked: TrackedRun, settings: TrackingSettings, config: Mapping[str, Any]) -> None:
        self.run = self.library.init(
            project=settings.project,
            entity=settings.entity,
            job_type=settings.job_type,
            name=tracked["name"],
            id=tracked["id"],
            resume="allow" if mode == "online" else None,
            dir=str(home),
            mode=mode,
            config=dict(config),
            reinit="create_new",
            settings=self.library.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        self.run.define_metric("train/global_step")
        for part in ("train/*", "eval/*"):
            self.run.define_metric(part, step_metric="train/global_step")

    def summary(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def close(self) -> None:
        try:
            self.run.finish()
        except TimeoutError as error:
            raise TimeoutError(
                f"W&B did not receive everything within {_FINISH_SECONDS} s; later: wandb sync {self.folder.name}"
            ) from error
        for path in self.older:
            shutil.rmtree(path)


def _ask_server() -> None:
    """Raise URLError if no server answers at W&B's address. `wandb.init` would try for half a minute."""
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    with contextlib.suppress(urllib.error.HTTPError):  # an HTTP error is an answer too
        urllib.request.urlopen(address, timeout=_ANSWER_SECONDS).close()


class Trackio(_WandbInterface):
    """Track with trackio: a SQLite file in the run directory (or in TRACKIO_DIR), to which later sessions add."""

    def open(self, folder: Path, tracked: TrackedRun, settings: TrackingSettings, config: Mapping[str, Any]) -> TrackedRun:
        if settings.mode == "offline":
            for place in _TRACKIO_SENDS_TO:
                os.environ.pop(place, None)
        home = Path(os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio")))  # trackio reads it on import
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self.library, self.id = trackio, tracked["id"]
        project, name = tracked["project"], tracked["name"]
        with contextlib.redirect_stdout(io.StringIO()):  # hints about a dashboard; `describe_tracking` says how to start it
            before = SQLiteStorage.get_logs(project, name) if SQLiteStorage.get_project_db_path(project).exists() else []
            self.run = trackio.init(
                project=project, name=name, config=dict(config), resume="allow", embed=False, auto_log_cpu=False
            )
        self.seen = {(_kind(entry), int(entry.get("train/global_step", -1))) for entry in before}
        return tracked | {"folder": os.path.relpath(home, folder.parent)}

    def send(self, values: Mapping[str, Any], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.library.finish()


class TensorBoard(_Log):
    """Track with TensorBoard's event files. Each session writes the whole run to a new folder, which replaces earlier ones."""

    def open(self, folder: Path, tracked: TrackedRun, settings: TrackingSettings, config: Mapping[str, Any]) -> TrackedRun:
        # This is TensorBoard's own switch against TensorFlow. It would import the platform's, which a newer protobuf breaks.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        home = folder / "tensorboard"
        self.older = [path for path in home.glob("*") if path.name.startswith(f"{tracked['name']}-")]
        number = max((int(path.name.rpartition("-")[2]) for path in self.older), default=0) + 1
        self.writer = SummaryWriter(log_dir=str(home / f"{tracked['name']}-{number}"))
        self.writer.add_text("configuration", "\n".join(f"    {name}: {value}" for name, value in config.items()))
        return tracked | {"folder": home.relative_to(folder.parent).as_posix()}

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def table(self, name: str, table: pd.DataFrame) -> None:
        columns = [table.index.name or "", *table.columns]
        lines = [columns, ["---"] * len(columns), *([index, *row] for index, row in zip(table.index, table.values, strict=True))]
        self.writer.add_text(name, "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines), self.last)

    def files(self, name: str, paths: Sequence[Path]) -> None:
        self.writer.add_text(name, "in the run directory: " + ", ".join(path.name for path in paths), self.last)

    def close(self) -> None:
        self.writer.close()
        for path in self.older:
            shutil.rmtree(path)


Tracker = Wandb | Trackio | TensorBoard
TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "trackio": Trackio, "tensorboard": TensorBoard}
