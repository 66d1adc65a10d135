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
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from medcot_utils.config import ConfigError, RunConfig, config_from_dict
from medcot_utils.errors import MedcotError
from medcot_utils.machine import paths
from medcot_utils.machine.disk import full_disk_told
from medcot_utils.machine.gpu import peak_gpu_memory_mb
from medcot_utils.run.artifacts import ARTIFACTS, SHIPPED_CASES, STEPS, Artifact
from medcot_utils.run.files import fsync, remove, sha256_of, take_the_place, to_json, write_atomic, write_beside
from medcot_utils.run.manifest import FORMAT, ArtifactEntry, Manifest, StepEntry, read_manifest
from medcot_utils.text_files import read_json

CONFIG, MANIFEST = "config.json", "manifest.json"


class RunError(MedcotError):
    """The run directory or one of its artifacts cannot be used; the message names it and the notebook to run."""


class Run:
    """A run directory, opened. `run.config` is its configuration; artifacts go by their names in `artifacts.ARTIFACTS`."""

    def __init__(self, path: Path, config: RunConfig):
        self.path, self.config = path, config
        self._verified: dict[str, str] = {}

    # --- opening ---------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, force: bool = False) -> Run:
        """Make the run directory, or reuse that of a run of the same profile and write the new settings into it.

        Raises RunError if the folder cannot be written, holds something else, or holds a run of another profile or model
        (unless `force`, which keeps the folder and redoes what differs). A manifest that cannot be read is replaced by an
        empty one: then nothing counts as made."""
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / ".writable", "x")
            (path / ".writable").unlink()
        except OSError as error:
            raise RunError(f"run directory {path} cannot be written ({error.strerror}): choose another with --run-dir") from error
        if force and (path / MANIFEST).exists():
            pass  # a run, whatever its settings were
        elif (path / CONFIG).exists():
            held = cls.open(path).config
            for name in ("profile", "model.name"):
                if held.get(name) != config.get(name):
                    raise RunError(
                        f"run directory {path} holds a run of {name} {held.get(name)!r}, not {config.get(name)!r}: "
                        f"choose another with --run-dir, or redo it in place with --force"
                    )
        elif any(path.iterdir()):
            raise RunError(f"run directory {path} is not empty and holds no run: choose another with --run-dir")
        write_atomic(path / CONFIG, to_json(config.model_dump(mode="json")))
        run = cls(path, config)
        try:
            run.manifest()
        except RunError:
            run._save({"format": FORMAT, "steps": {}, "artifacts": {}})
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Return a run that notebook 01 made. Raises RunError if there is none or it cannot be read."""
        path = Path(path)
        if not (path / CONFIG).exists():
            raise RunError(f"no run in {path.name}/: run notebook 01_setup first, or give the run directory of one (RUN_DIR)")
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
        write_atomic(self.path / MANIFEST, to_json(manifest))

    # --- fingerprints ----------------------------------------------------------------------------------------

    def fingerprint(self, name: str) -> str:
        """Return the sha256 over the settings and the input artifacts (by content) that the artifact is made from.

        Raises RunError if an input is not there yet."""
        artifact = ARTIFACTS[name]
        made_from = {
            "settings": self.config.digest(artifact.settings),
            "inputs": self._input_digests(artifact),
            "version": artifact.version,
        }
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def _input_digests(self, artifact: Artifact) -> dict[str, str]:
        digests = {name: self._entry(name)["sha256"] for name in artifact.inputs}
        # A data file may change under its name: its content counts, not its path.
        data_file = self.config.dataset.path or (SHIPPED_CASES if self.config.dataset.name == "shipped" else None)
        if artifact.reads_dataset and data_file and Path(data_file).is_file():
            digests["data file"] = sha256_of(Path(data_file))[0]
        return digests

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
            if entry["fingerprint"] != self.fingerprint(name) or self._size_on_disk(name) != entry["bytes"]:
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
        artifact, final = ARTIFACTS[name], self.place(name)
        fingerprint = self.fingerprint(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        beside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        remove(beside)
        try:
            with full_disk_told(artifact.file, final.parent):
                self._fill(beside, artifact, value)
                for file in [beside] if beside.is_file() else [p for p in beside.rglob("*") if p.is_file()]:
                    fsync(file)
                digest, size = sha256_of(beside)
                manifest = self.manifest()
                manifest["artifacts"][name] = {
                    "file": artifact.file,
                    "step": artifact.step,
                    "sha256": digest,
                    "bytes": size,
                    "fingerprint": fingerprint,
                    "inputs": self._input_digests(artifact),
                    "made": datetime.now(UTC).isoformat(timespec="seconds"),
                }
                # On disk before the artifact takes its place: then only renames are left, and those need no room.
                recorded = write_beside(self.path / MANIFEST, to_json(manifest))
            take_the_place(beside, final)
            recorded.replace(self.path / MANIFEST)
        finally:
            remove(beside)
        fsync(final.parent)
        fsync(self.path)
        self._verified[name] = digest
        return final

    @staticmethod
    def _fill(path: Path, artifact: Artifact, value: Any) -> None:
        if callable(value):
            if not Path(artifact.file).suffix:
                path.mkdir()
            value(path)
        elif artifact.file.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in value), encoding="utf-8")
        elif artifact.file.endswith(".json"):
            path.write_text(to_json(value), encoding="utf-8")
        elif artifact.file.endswith(".parquet"):
            value.to_parquet(str(path))
        else:
            path.write_text(value, encoding="utf-8")

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
        path = self.require(name)
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".jsonl":
            # Not str.splitlines: it also splits at U+2028, which JSON leaves unescaped within a text.
            with path.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]
        if path.suffix == ".parquet":
            # Not from_parquet: its cache is keyed by path, and would return an older file of the same name.
            import pyarrow.parquet as pq
            from datasets import Dataset

            return Dataset(pq.read_table(path))
        return path

    def checkpoint_dir(self, name: str) -> Path:
        """Return the folder of the trainer's checkpoints for this artifact's present fingerprint, made if it is not there."""
        folder = self.path / "checkpoints" / self.fingerprint(name)[:12]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def display(self, path: Path) -> str:
        """Return a path as a reader should see it: from the run directory's name on."""
        scratch = paths.scratch_dir(self.path)
        root, name = (self.path, self.path.name) if path.is_relative_to(self.path) else (scratch, f"scratch/{scratch.name}")
        return f"{name}/{path.relative_to(root).as_posix()}"

    # --- steps -----------------------------------------------------------------------------------------------

    def begin(self, step: str) -> None:
        """Record the step as running, after removing what killed processes left half written.

        Raises RunError naming the notebook to run if an artifact that the step reads is missing, damaged or stale."""
        for folder in {self.path, paths.scratch_dir(self.path)}:
            paths.remove_leftovers(folder)
        for name in STEPS[step].reads:
            self.require(name)
            if stale := self._stale_origin(name):
                artifact = ARTIFACTS[stale]
                raise RunError(
                    f"{artifact.file} in {self.path.name}/ was made with other settings or inputs than the run has now: "
                    f"run notebook {artifact.step} again, and those after it"
                )
        self.record_step(step, state="running", started=time.time(), pid=os.getpid(), error=None)

    def _stale_origin(self, name: str) -> str | None:
        """Return the first artifact on the way to this one that is stale or missing, or None."""
        for source in ARTIFACTS[name].inputs:
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
        entry: StepEntry = {"state": "done", "seconds": round(time.time() - began, 1), **memory}
        self.record_step(step, **entry)
        return entry

    def record_step(self, step: str, **fields: Any) -> None:
        """Write fields of a step's entry in the manifest."""
        manifest = self.manifest()
        manifest["steps"].setdefault(step, {}).update(fields)
        self._save(manifest)

    def forget(self, step: str) -> None:
        """Drop the manifest's entries of a step, and its checkpoints, so that it is redone. The files stay until replaced."""
        manifest = self.manifest()
        manifest["steps"].pop(step, None)
        for name in STEPS[step].makes:
            manifest["artifacts"].pop(name, None)
        self._save(manifest)
        if "adapter" in STEPS[step].makes:
            remove(self.path / "checkpoints")

    def makes(self, step: str) -> tuple[str, ...]:
        """Return the artifacts that a step makes with this configuration: not those whose setting is None (`Artifact.when`)."""
        wanted = (name for name in STEPS[step].makes if ARTIFACTS[name].when is None or self.config.get(ARTIFACTS[name].when))
        return tuple(wanted)

    def step_state(self, step: str, deep: bool = True) -> str:
        """Return `done`, `stale` (settings or inputs have changed), `failed`, `paused` (training.max_hours), `running`,
        `interrupted` (its process is gone), or `not run`; `deep` as in `is_fresh`."""
        entry = self.manifest()["steps"].get(step)
        if entry is None:
            return "not run"
        if entry["state"] == "running" and not psutil.pid_exists(entry["pid"]):
            return "interrupted"
        if entry["state"] == "done" and not all(self.is_fresh(name, deep) for name in self.makes(step)):
            return "stale"
        return entry["state"]
