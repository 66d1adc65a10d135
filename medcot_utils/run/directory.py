"""Run: the directory through which the notebooks speak to each other.

config.json      the resolved configuration
manifest.json    each artifact with sha256, size and the fingerprint of what it was made from; each step's state
<artifacts>      files and folders, written whole or not at all
checkpoints/     the trainer's own, one folder per fingerprint
notebooks/       the executed notebooks
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from medcot_utils.config import ConfigError, RunConfig, config_from_dict, with_absolute_paths
from medcot_utils.machine import paths
from medcot_utils.machine.disk import full_disk_told
from medcot_utils.machine.durations import TimeEstimate, describe_end, describe_time
from medcot_utils.machine.gpu import peak_gpu_memory_mb
from medcot_utils.run.artifacts import ARTIFACTS, STEPS, Artifact
from medcot_utils.run.changes import why_stale
from medcot_utils.run.clock import SessionClock
from medcot_utils.run.files import (
    fill,
    fsync,
    read_content,
    remove,
    sha256_of,
    take_the_place,
    to_json,
    write_atomic,
    write_beside,
)
from medcot_utils.run.journal import Journal
from medcot_utils.run.lock import HOLDER, LOCK, RunError, cannot_be_written, hold, is_held, keep, let_go
from medcot_utils.run.manifest import FORMAT, ArtifactEntry, Manifest, StepEntry, read_manifest
from medcot_utils.run.sources import DATA_FILE, describe_moved, digest_sources, find_hub_commits
from medcot_utils.text_files import read_json

CONFIG, MANIFEST = "config.json", "manifest.json"
_WHOSE = ("profile", "model.name")  # a run of another one is another run, whatever it has made
# The same once something was made from it.
_MADE_FROM_MODEL = ("model.revision",)
_MADE_FROM_DATA = ("dataset.name", "dataset.subset", "dataset.revision", "dataset.path")


class Run:
    """A run directory, opened. `run.config` is its configuration; artifacts go by their names in `artifacts.ARTIFACTS`."""

    def __init__(self, path: Path, config: RunConfig):
        self.path, self.config = path, config
        self._verified: dict[str, str] = {}
        self._sources: dict[Artifact, dict[str, str]] = {}  # as they were when the step began
        self._clock = SessionClock(config.training.max_hours)

    # --- opening ---------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, force: bool = False) -> Run:
        """Make the run directory, or reuse that of a run of the same profile and write the new settings into it.

        Raises RunError as `check_place` does, and if another process works there; then nothing was written. A manifest that
        cannot be read is replaced by an empty one: then nothing counts as made."""
        path = Path(path)
        cls.check_place(path, config, force)
        with hold(path, "notebook 01_setup"):
            config = with_absolute_paths(config, cls.stored_config(path))
            write_atomic(path / CONFIG, to_json(config.model_dump(mode="json")))
            run = cls(path, config)
            try:
                run.manifest()
            except RunError:
                run._save({"format": FORMAT, "steps": {}, "artifacts": {}})
        return run

    @classmethod
    def stored_config(cls, path: Path) -> RunConfig | None:
        """Return the settings of the run in a folder; None if there is no run, or none that can be read."""
        try:
            return cls.open(path).config
        except RunError:
            return None

    @classmethod
    def check_place(cls, path: Path, config: RunConfig, force: bool = False) -> None:
        """Make the folder if it is not there, and write nothing.

        Raises RunError if it cannot be made or read, holds something else, or holds a run of another profile or model, or one
        whose results come from other data or another revision (unless `force`, which redoes in place what differs)."""
        try:
            paths.make_private(path)
            there = {file.name for file in path.iterdir()} - {LOCK, HOLDER}
        except OSError as error:
            raise cannot_be_written(path, error) from error
        if force and MANIFEST in there:
            return  # a run, whatever its settings were
        if CONFIG in there:
            cls.open(path)._refuse_another(config)
        elif there and not _is_manifest(path / MANIFEST):
            raise RunError(f"run directory {path} is not empty and holds no run: choose another with --run-dir")

    def _refuse_another(self, config: RunConfig) -> None:
        """Raise RunError if settings that say what a run is of are others than this run's."""
        try:
            made = [ARTIFACTS[name] for name in self.manifest()["artifacts"]]
        except RunError:
            made = []
        names = list(_WHOSE)
        names += _MADE_FROM_MODEL if any(artifact.reads_model for artifact in made) else ()
        names += _MADE_FROM_DATA if any(artifact.reads_dataset for artifact in made) else ()
        config = with_absolute_paths(config, self.config)
        for name in names:
            if self.config.get(name) != config.get(name):
                raise RunError(
                    f"run directory {self.path} holds a run of {name} {self.config.get(name)!r}, not {config.get(name)!r}: "
                    f"choose another one (--run-dir, RUN_DIR), or redo it in place with --force"
                )

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Return a run that notebook 01 made. Raises RunError if there is none or it cannot be read."""
        path = Path(path)
        if not (path / CONFIG).exists():
            raise RunError(
                f"no run in {path.absolute()}/: run notebook 01_setup first, or give the run directory of one (RUN_DIR)"
            )
        try:
            config = config_from_dict(read_json(path / CONFIG))
        except (OSError, ValueError, ConfigError) as error:
            raise RunError(
                f"{path.name}/{CONFIG} cannot be read ({error}): run notebook 01_setup in another run directory, or redo this "
                f"one in place with `medcot run --profile NAME --force`"
            ) from error
        return cls(path, config)

    # --- manifest --------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """Return the manifest as it is on disk now. Raises RunError if it cannot be read."""
        try:
            return read_manifest(self.path / MANIFEST)
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path.name}/{MANIFEST} cannot be read ({error}): run notebook 01_setup again") from error

    def _save(self, manifest: Manifest) -> None:
        # Only while this process holds the lock: another one's changes since it was read would be lost.
        write_atomic(self.path / MANIFEST, to_json(manifest))

    # --- fingerprints ----------------------------------------------------------------------------------------

    def fingerprint(self, name: str, recorded: Mapping[str, str] | None = None) -> str:
        """Return the sha256 over the settings, the input artifacts and the local files that the artifact is made from.

        `recorded`: inputs of the manifest's entry, to compare with that (see `input_digests`). Raises RunError if an input is
        not there yet."""
        artifact = ARTIFACTS[name]
        made_from = {
            "settings": self.config.digest(artifact.settings),
            "inputs": self.input_digests(artifact, recorded),
            "version": artifact.version,
        }
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def input_digests(self, artifact: Artifact, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return {input: digest} of what an artifact is made from.

        With `recorded`, files that the record does not have do not count, since earlier versions did not look at them; and
        those that are gone count as unchanged: a run that was copied to another machine is not undone for that."""
        digests = {name: self._entry(name)["sha256"] for name in artifact.inputs if self.wants(name)}
        if recorded is None:
            # A file that is edited while the step works was read before that.
            found = self._sources.get(artifact) or digest_sources(artifact, self.config)
        else:
            found = digest_sources(artifact, self.config)
            kept = {key: digest for key, digest in recorded.items() if key not in ARTIFACTS and key != DATA_FILE}
            found = {key: found.get(key, digest) for key, digest in kept.items()} | _only(found, DATA_FILE)
        return digests | found

    def _entry(self, name: str) -> ArtifactEntry:
        artifact, entry = ARTIFACTS[name], self.manifest()["artifacts"].get(name)
        if entry is None:
            raise RunError(f"{artifact.file} is not in {self.path.name}/ yet: run notebook {artifact.step} first")
        return entry

    def is_fresh(self, name: str, deep: bool = True) -> bool:
        """Return whether the artifact was made from today's settings and inputs and is on disk as recorded: by sha256, or by
        size alone if not `deep`."""
        try:
            entry = self._entry(name)
            if entry["fingerprint"] != self.fingerprint(name, entry["inputs"]) or self._size_on_disk(name) != entry["bytes"]:
                return False
            return not deep or self.require(name).exists()
        except RunError:
            return False

    def place(self, name: str) -> Path:
        """Return the path of an artifact, made or not: a large one is on the scratch disk if there is one. `require` also
        verifies it."""
        artifact = ARTIFACTS[name]
        return (paths.scratch_dir(self.path) if artifact.large else self.path) / artifact.file

    def _size_on_disk(self, name: str) -> int:
        path = self.place(name)
        if path.is_dir():
            return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        return path.stat().st_size if path.exists() else -1

    # --- writing ---------------------------------------------------------------------------------------------

    def write(self, name: str, value: Any) -> Path:
        """Write an artifact whole and record it; return its path.

        `value` is JSON-ready data (a list of records for .jsonl), text, a `datasets.Dataset` for .parquet, or a function that
        fills the folder or file path it is given. Raises DiskError on a full disk."""
        with hold(self.path, f"notebook {ARTIFACTS[name].step}"):
            return self._write(name, value)

    def _write(self, name: str, value: Any) -> Path:
        artifact, final = ARTIFACTS[name], self.place(name)
        fingerprint = self.fingerprint(name)
        paths.make_private(final.parent)
        beside = paths.place_beside(final)
        remove(beside)
        try:
            with full_disk_told(artifact.file, final.parent):
                fill(beside, value, Path(artifact.file).suffix)
                for file in [beside] if beside.is_file() else [p for p in beside.rglob("*") if p.is_file()]:
                    fsync(file)
                digest, size = sha256_of(beside)
                manifest, commits = self.manifest(), find_hub_commits(artifact, self.config)
                for line in describe_moved(commits, manifest):
                    print(line)
                manifest["artifacts"][name] = {
                    "file": artifact.file,
                    "step": artifact.step,
                    "sha256": digest,
                    "bytes": size,
                    "fingerprint": fingerprint,
                    "inputs": self.input_digests(artifact),
                    "made": datetime.now(UTC).isoformat(timespec="seconds"),
                    "settings": self.config.leaves(artifact.settings),
                    "commits": commits,
                }
                # On disk before the artifact takes its place: then only renames are left, and those need no room.
                recorded = write_beside(self.path / MANIFEST, to_json(manifest))
            take_the_place(beside, final)
            recorded.replace(self.path / MANIFEST)
            self._journal_path(name).unlink(missing_ok=True)
        finally:
            remove(beside)
        fsync(final.parent)
        fsync(self.path)
        self._verified[name] = digest
        return final

    def journal(self, name: str) -> Journal:
        """Return where the records of an artifact are kept while it is made. They go once it is written.

        All journals of a run share one clock: with training.max_hours, they pause in time."""
        return Journal(self._journal_path(name), self.fingerprint(name), self._clock)

    def _journal_path(self, name: str) -> Path:
        return self.path / f"{ARTIFACTS[name].file}.part"

    def get_or_make(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the artifact as `read` does, after writing the result of `make()` unless it is fresh; then one line says so."""
        if self.is_fresh(name):
            print(f"{ARTIFACTS[name].file}: made before from the same inputs, read from the run")
        else:
            self.write(name, make())
        return self.read(name)

    # --- reading ---------------------------------------------------------------------------------------------

    def require(self, name: str) -> Path:
        """Return the path of an artifact whose content matches the manifest.

        Raises RunError naming the notebook to run if it is missing, truncated or altered."""
        artifact, entry = ARTIFACTS[name], self._entry(name)
        path = self.place(name)
        if not path.exists():
            raise RunError(f"{artifact.file} is missing from {self.path.name}/: run notebook {artifact.step} again")
        if self._verified.get(name) != entry["sha256"]:
            digest, size = sha256_of(path)
            if size != entry["bytes"] or digest != entry["sha256"]:
                fault = "truncated" if size < entry["bytes"] else "altered"
                raise RunError(
                    f"{artifact.file} in {self.path.name}/ is {fault} ({size:,} bytes, {entry['bytes']:,} recorded; "
                    f"sha256 differs from the manifest): run notebook {artifact.step} again"
                )
            self._verified[name] = digest
        return path

    def read(self, name: str) -> Any:
        """Return an artifact, verified: data for .json, records for .jsonl, a Dataset for .parquet, else its path."""
        return read_content(self.require(name))

    def checkpoint_dir(self, name: str) -> Path:
        """Return the folder of the trainer's checkpoints for this artifact's present fingerprint, made if it is not there."""
        folder, earlier = (self.path / "checkpoints" / self.fingerprint(name, recorded)[:12] for recorded in (None, {}))
        if earlier.is_dir() and not folder.is_dir():  # begun by a version that did not look at the model's files
            return earlier
        paths.make_private(folder)
        return folder

    def display(self, path: Path) -> str:
        """Return a path as a reader should see it: from the run directory's name on."""
        scratch = paths.scratch_dir(self.path)
        root, name = (self.path, self.path.name) if path.is_relative_to(self.path) else (scratch, f"scratch/{scratch.name}")
        return f"{name}/{path.relative_to(root).as_posix()}"

    # --- steps -----------------------------------------------------------------------------------------------

    def begin(self, step: str) -> None:
        """Record the step as running, after removing what killed processes left half written. The run is locked for other
        processes until `record_done`.

        Raises RunError if another process works in the run, and as `require_inputs` does."""
        keep(self.path, f"notebook {step}")
        try:
            self.require_inputs(step)
            for folder in {self.path, paths.scratch_dir(self.path)}:
                paths.remove_leftovers(folder)
            self._sources = {ARTIFACTS[name]: digest_sources(ARTIFACTS[name], self.config) for name in STEPS[step].makes}
            here = {"pid": os.getpid(), "host": paths.host_name()}
            self.record_step(step, state="running", started=time.time(), **here, error=None)
            if estimate := self.estimate(step):
                # Times differ from run to run, what a notebook shows need not: so on another stream.
                print(f"{step}: {describe_time(estimate)}, {describe_end(estimate, time.time())}", file=sys.stderr)
        except BaseException:
            let_go(self.path)
            raise

    def can_begin(self, step: str) -> bool:
        """Return whether `require_inputs` finds everything that the step reads."""
        try:
            self.require_inputs(step)
        except RunError:
            return False
        return True

    def require_inputs(self, step: str) -> None:
        """Raise RunError naming the notebook to run if an artifact that the step reads is missing, damaged or stale."""
        for name in STEPS[step].reads:
            self.require(name)
            if stale := self._stale_origin(name):
                artifact = ARTIFACTS[stale]
                raise RunError(
                    f"{artifact.file} in {self.path.name}/ was made with other settings or inputs than the run has now "
                    f"({'; '.join(why_stale(self, stale))}): run notebook {artifact.step} again, and those after it"
                )

    def _stale_origin(self, name: str) -> str | None:
        """Return the first artifact on the way to this one that is stale or missing, or None."""
        for source in filter(self.wants, ARTIFACTS[name].inputs):
            if origin := self._stale_origin(source):
                return origin
        return None if self.is_fresh(name, deep=False) else name

    def record_done(self, step: str, since: float | None = None) -> StepEntry:
        """Record the step as done and return what was recorded: the seconds since `since` (a `time.time()`; None: since
        `begin`), and the most that this process has held of the machine's memory and of its GPU's, in MB."""
        began = since or self.manifest()["steps"][step]["started"]
        # Linux reports kilobytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        memory = {"peak_memory_mb": round(peak), "peak_gpu_memory_mb": peak_gpu_memory_mb()}
        seconds = {"seconds": round(time.time() - began, 1), "estimate": self.estimate(step)}
        entry: StepEntry = {"state": "done", **seconds, **memory}
        self.record_step(step, **entry)
        let_go(self.path)
        return entry

    def estimate(self, step: str) -> TimeEstimate | None:
        """Return how long notebook 01 estimated a step to take; None if it could not tell, or in a run of an earlier version."""
        try:
            found = read_json(self.place("machine"))["estimate"][step]
            return TimeEstimate(**{key: float(found[key]) for key in ("seconds", "low", "high")})
        except (OSError, ValueError, KeyError, TypeError):  # it is only shown: nothing may end for it
            return None

    def record_step(self, step: str, **fields: Any) -> None:
        """Write fields of a step's entry in the manifest."""
        with hold(self.path, f"notebook {step}"):
            manifest = self.manifest()
            manifest["steps"].setdefault(step, {}).update(fields)
            self._save(manifest)

    def forget(self, step: str) -> None:
        """Drop the manifest's entries of a step, and its checkpoints, so that it is redone. The files stay until replaced."""
        with hold(self.path, f"notebook {step}"):
            manifest = self.manifest()
            manifest["steps"].pop(step, None)
            for name in STEPS[step].makes:
                manifest["artifacts"].pop(name, None)
            self._save(manifest)
            if "adapter" in STEPS[step].makes:
                remove(self.path / "checkpoints")

    def makes(self, step: str) -> tuple[str, ...]:
        """Return the artifacts that a step makes with this configuration: not those whose setting is off (`Artifact.when`)."""
        return tuple(filter(self.wants, STEPS[step].makes))

    def wants(self, name: str) -> bool:
        """Return whether an artifact is made with this configuration (`Artifact.when`)."""
        setting = ARTIFACTS[name].when
        return setting is None or bool(self.config.get(setting))

    def step_state(self, step: str, deep: bool = True) -> str:
        """Return `done`, `stale` (settings or inputs have changed), `failed`, `paused` (training.max_hours), `running`,
        `interrupted` (its process is gone), or `not run`; `deep` as in `is_fresh`."""
        entry = self.manifest()["steps"].get(step)
        if entry is None:
            return "not run"
        if entry["state"] == "running" and not self._is_running(entry):
            return "interrupted"
        if entry["state"] == "done" and not all(self.is_fresh(name, deep) for name in self.makes(step)):
            return "stale"
        return entry["state"]

    def _is_running(self, entry: StepEntry) -> bool:
        if entry.get("host") in (None, paths.host_name()):
            return psutil.pid_exists(entry["pid"])
        return is_held(self.path)  # another machine's processes cannot be seen from here

    def why_stale(self, step: str) -> list[str]:
        """Return what has changed since the step was done: a setting with its old and new value, an input, a file."""
        found = [reason for name in self.makes(step) if not self.is_fresh(name) for reason in why_stale(self, name)]
        return list(dict.fromkeys(found))


def _is_manifest(path: Path) -> bool:
    try:
        return bool(read_manifest(path))
    except (OSError, ValueError):
        return False


def _only(values: Mapping[str, str], key: str) -> dict[str, str]:
    return {key: values[key]} if key in values else {}
