"""The three trackers behind `tracking`, each with the same six calls. All of them may raise whatever their libraries do."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils.config import TrackingSettings
from medcot_utils.machine import redaction

if TYPE_CHECKING:
    import pandas as pd

# A server that does not answer must not hold up what is worth more than the tracking; what was not sent stays on disk.
_ANSWER_SECONDS, _INIT_SECONDS, _FINISH_SECONDS = 10, 30, 120


class Tracker:
    """What the trackers have in common. `open` completes `state` with `folder` (below the run directory) and `url`."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self.last = 0

    def open(self, folder: Path, state: dict[str, str], settings: TrackingSettings, config: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def log_once(self, entry: Mapping[str, Any]) -> None:
        """Log an entry of the trainer's log, unless the tracked run has it from an earlier session."""
        from transformers.integrations.integration_utils import rewrite_logs

        step, values = int(entry["step"]), {key: value for key, value in entry.items() if key != "step"}
        kind = "eval" if any(key.startswith("eval_") for key in values) else "end" if "train_runtime" in values else "train"
        if (kind, step) not in self.seen:
            numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float | str)}
            self.log(rewrite_logs(numbers), step)
        self.seen.add((kind, step))
        self.last = max(self.last, step)

    def log(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def summary(self, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def table(self, name: str, table: pd.DataFrame) -> None:
        raise NotImplementedError

    def files(self, name: str, paths: Sequence[Path]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Wandb(Tracker):
    """Weights & Biases. Online, a later session adds to the run; offline, it writes the run whole, under the same id."""

    def open(self, folder, state, settings, config):
        home = folder / "wandb"
        home.mkdir(exist_ok=True)
        # Artifacts wait there for the upload, which offline may be another day's.
        os.environ.setdefault("WANDB_DATA_DIR", str(home / "data"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(home / "cache"))
        self.home, self.state = home, state
        mode = state["mode"]
        try:
            if mode == "online":
                _ask_server()
            self._init(mode, settings, config)
        except Exception as error:
            if mode != "online":
                raise
            why = redaction.redact(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
            print(f"tracking: W&B cannot be used online ({why}); this session is tracked offline, to be uploaded with wandb sync")
            state["mode"] = "offline"
            import wandb

            wandb.teardown()  # it holds the id as one in use
            self._init("offline", settings, config)
        self.older = [path for path in self.home.glob(f"wandb/offline-run-*-{state['id']}") if path != self.folder]
        state["folder"] = self.folder.relative_to(folder.parent).as_posix()
        state["url"] = (self.run.url or "") if state["mode"] == "online" else ""
        if state["mode"] == "online" and (before := self.run.summary.get("train/global_step")):
            self.seen = {(kind, step) for kind in ("train", "eval", "end") for step in range(int(before) + 1)}

    def _init(self, mode: str, settings: TrackingSettings, config: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            job_type=settings.job_type,
            name=self.state["name"],
            id=self.state["id"],
            resume="allow" if mode == "online" else None,
            dir=str(self.home),
            mode=mode,
            config=dict(config),
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        self.folder = Path(self.run.dir).parent
        self.run.define_metric("train/global_step")
        for part in ("train/*", "eval/*"):
            self.run.define_metric(part, step_metric="train/global_step")

    def log(self, values, step):
        self.run.log({**values, "train/global_step": step})

    def summary(self, values):
        self.run.summary.update(dict(values))

    def table(self, name, table):
        import wandb

        self.run.log({name: wandb.Table(dataframe=table.reset_index().astype(str))})

    def files(self, name, paths):
        import wandb

        artifact = wandb.Artifact(f"{name}-{self.state['id']}", type=name)
        for path in paths:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self):
        try:
            self.run.finish()
        except TimeoutError as error:
            raise TimeoutError(
                f"W&B took not everything within {_FINISH_SECONDS} s; later: wandb sync {self.folder.name}"
            ) from error
        for path in self.older:
            shutil.rmtree(path)


def _ask_server() -> None:
    """Raises URLError where nothing answers at W&B's address: `wandb.init` would try for half a minute."""
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    with contextlib.suppress(urllib.error.HTTPError):  # an answer all the same
        urllib.request.urlopen(address, timeout=_ANSWER_SECONDS).close()


class Trackio(Tracker):
    """trackio: a SQLite file in the run directory (or in TRACKIO_DIR), to which later sessions add."""

    def open(self, folder, state, settings, config):
        home = Path(os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio")))  # read by trackio when it is imported
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        before = []
        with contextlib.redirect_stdout(io.StringIO()):  # notes on a dashboard; `where` says how to start it
            if SQLiteStorage.get_project_db_path(state["project"]).exists():
                before = SQLiteStorage.get_logs(state["project"], state["name"])
            self.run = trackio.init(
                project=state["project"], name=state["name"], config=dict(config), resume="allow", embed=False, auto_log_cpu=False
            )
        for entry in before:
            kind = (
                "eval" if any(key.startswith("eval/") for key in entry) else "end" if "train/train_runtime" in entry else "train"
            )
            self.seen.add((kind, int(entry.get("train/global_step", -1))))
        state["folder"] = os.path.relpath(home, folder.parent)

    def log(self, values, step):
        self.run.log({**values, "train/global_step": step}, step=step)

    def summary(self, values):
        self.run.log(dict(values), step=self.last)

    def table(self, name, table):
        import trackio

        self.run.log({name: trackio.Table(dataframe=table.reset_index().astype(str))}, step=self.last)

    def files(self, name, paths):
        import trackio

        artifact = trackio.Artifact(name, type=name)
        for path in paths:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self):
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


class TensorBoard(Tracker):
    """TensorBoard's event files: each session writes the run whole into a folder of its own, which replaces those before."""

    def open(self, folder, state, settings, config):
        from torch.utils.tensorboard import SummaryWriter

        home = folder / "tensorboard"
        self.older = [path for path in home.glob("*") if path.is_dir()]
        numbers = [int(path.name.rpartition("-")[2]) for path in self.older if path.name.startswith(state["name"])]
        self.writer = SummaryWriter(log_dir=str(home / f"{state['name']}-{max(numbers, default=0) + 1}"))
        self.older = [path for path in self.older if path.name.startswith(state["name"])]
        lines = "\n".join(f"    {name}: {value}" for name, value in config.items())
        self.writer.add_text("configuration", lines)
        state["folder"] = home.relative_to(folder.parent).as_posix()

    def log(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def summary(self, values):
        self.log(dict(values), self.last)

    def table(self, name, table):
        columns = [table.index.name or "", *table.columns]
        lines = [columns, ["---"] * len(columns), *([index, *row] for index, row in zip(table.index, table.values, strict=True))]
        self.writer.add_text(name, "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines), self.last)

    def files(self, name, paths):
        self.writer.add_text(name, "in the run directory: " + ", ".join(path.name for path in paths), self.last)

    def close(self):
        self.writer.close()
        for path in self.older:
            shutil.rmtree(path)


TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "trackio": Trackio, "tensorboard": TensorBoard}
