"""The run directory as a store: its configuration, its manifest, and its artifacts, each with what it was made from.

config.json      the resolved configuration
accounts.json    which of its settings about accounts this user gave, signed
manifest.json    each artifact with sha256, size and the fingerprint of what it was made from; each step's state
<artifacts>      files and folders, written whole or not at all
checkpoints/     the trainer's own, one folder per fingerprint
notebooks/       the executed notebooks
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from medcot_utils.config import ConfigError, RunConfig, config_from_dict
from medcot_utils.local_paths import with_absolute_paths
from medcot_utils.machine import paths
from medcot_utils.machine.disk import full_disk_told
from medcot_utils.machine.names import refuse_links_out
from medcot_utils.plain_text import say
from medcot_utils.run.accounts import ACCOUNTS, settings_that_count, settings_to_store, sign_settings, with_accounts_of
from medcot_utils.run.artifacts import ARTIFACTS, STEPS, Artifact
from medcot_utils.run.clock import SessionClock
from medcot_utils.run.files import (
    fill,
    fsync,
    read_rows,
    remove,
    sha256_of,
    take_the_place,
    to_json,
    write_atomic,
    write_beside,
)
from medcot_utils.run.journal import Journal
from medcot_utils.run.lock import HOLDER, LOCK, RunError, cannot_be_written, hold
from medcot_utils.run.manifest import FORMAT, ArtifactEntry, Manifest, read_manifest
from medcot_utils.run.shapes import SHAPES, read_records
from medcot_utils.run.sources import DATA_FILE, describe_moved, digest_sources, find_hub_commits
from medcot_utils.text_files import read_json
from medcot_utils.token_shapes import name_look

CONFIG, MANIFEST = "config.json", "manifest.json"
_WHOSE = ("profile", "model.name")  # a run of another one is another run, whatever it has made
# The same once something was made from it.
_MADE_FROM_MODEL = ("model.revision",)
_MADE_FROM_DATA = ("dataset.name", "dataset.subset", "dataset.revision", "dataset.path")


class StoredRun:
    """A run directory, opened, with its artifacts, which go by their names in `artifacts.ARTIFACTS`.

    `run.config` is its configuration, and `run.stored` the same as config.json holds it: with settings about accounts that do
    not count (`accounts`). `run.signed` names those that this user gave."""

    def __init__(self, path: Path, config: RunConfig, stored: RunConfig | None = None, signed: Collection[str] = ()):
        self.path, self.config, self.stored, self.signed = path, config, stored or config, signed
        self._verified: dict[str, str] = {}
        self._sources: dict[Artifact, dict[str, str]] = {}  # as they were when the step began
        self._clock = SessionClock(config.training.max_hours)

    # --- opening ---------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, force: bool = False) -> Self:
        """Make the run directory, or reuse that of a run of the same profile and write the new settings into it.

        Raises RunError as `check_place` does, and if another process works there; then nothing was written. A manifest that
        cannot be read is replaced by an empty one: then nothing counts as made."""
        path = Path(path)
        if look := name_look(str(path)):
            raise RunError(f"run directory {path} holds what looks like {look}: choose another with --run-dir, or RUN_DIR")
        cls.check_place(path, config, force)
        with hold(path, "notebook 01_setup"):
            there = cls.open_if_readable(path)
            config = with_absolute_paths(config, there.config if there else None)
            stored, given = settings_to_store(config, there)
            values = stored.model_dump(mode="json")
            sign_settings(path, values, given)
            write_atomic(path / CONFIG, to_json(values))
            run = cls.open(path)
            try:
                run.manifest()
            except RunError:
                run._save({"format": FORMAT, "steps": {}, "artifacts": {}})
        return run

    @classmethod
    def open_if_readable(cls, path: Path) -> Self | None:
        """Return the run in a folder; None if there is no run, or none that can be read."""
        try:
            return cls.open(path)
        except RunError:
            return None

    @classmethod
    def check_place(cls, path: Path, config: RunConfig, force: bool = False) -> None:
        """Make the folder if it is not there, and write nothing.

        Raises RunError if it cannot be made or read, holds something else, or holds a run of another profile or model, or one
        whose results come from other data or another revision (unless `force`, which redoes in place what differs)."""
        try:
            paths.make_private(path)
            there = {file.name for file in path.iterdir()} - {LOCK, HOLDER, ACCOUNTS}
        except OSError as error:
            raise cannot_be_written(path, error) from error
        if force and MANIFEST in there:
            return  # a run, whatever its settings were
        if CONFIG in there:
            cls.open(path)._refuse_another(config)
        elif there and not _is_manifest(path / MANIFEST):
            raise RunError(f"run directory {path} is not empty and is not a run: choose another with --run-dir")

    def _refuse_another(self, config: RunConfig) -> None:
        """Raise RunError if settings that say what a run is of are others than this run's."""
        try:
            made = [ARTIFACTS[name] for name in self.manifest()["artifacts"] if name in ARTIFACTS]
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
    def open(cls, path: str | Path) -> Self:
        """Return a run that notebook 01 made. Settings about accounts that this user did not write do not count, and one line
        on stderr says so. Raises RunError if there is no run or it cannot be read, and OutsideError if a link leads out of it."""
        path = Path(path)
        if not (path / CONFIG).exists():
            raise RunError(
                f"no run in {path.absolute()}/: run notebook 01_setup first, or give the run directory of one (RUN_DIR)"
            )
        refuse_links_out(path)
        try:
            values = read_json(path / CONFIG)
            stored = config_from_dict(values)
        except (OSError, ValueError, ConfigError) as error:
            raise RunError(
                f"{paths.display_path(path)}/{CONFIG} cannot be read ({error}): run notebook 01_setup in another run "
                f"directory, or redo this one in place with `medcot run --profile NAME --force`"
            ) from error
        config, signed = settings_that_count(path, values, stored)
        return cls(path, config, stored, signed)

    # --- manifest --------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """Return the manifest as it is on disk now. Raises RunError if it cannot be read."""
        try:
            return read_manifest(self.path / MANIFEST)
        except (OSError, ValueError) as error:
            raise RunError(f"{self.name}/{MANIFEST} cannot be read ({error}): run notebook 01_setup again") from error

    def _save(self, manifest: Manifest) -> None:
        # Only while this process holds the lock: another one's changes since it was read would be lost.
        write_atomic(self.path / MANIFEST, to_json(manifest))

    # --- fingerprints ----------------------------------------------------------------------------------------

    def fingerprint(self, name: str, recorded: Mapping[str, str] | None = None, config: RunConfig | None = None) -> str:
        """Return the sha256 over the settings, the input artifacts and the local files that the artifact is made from.

        `recorded`: inputs of the manifest's entry, to compare with that (see `input_digests`). `config`: other settings than
        the run's own. Raises RunError if an input is not there yet."""
        artifact = ARTIFACTS[name]
        made_from = {
            "settings": (config or self.config).digest(artifact.settings),
            "inputs": self.input_digests(artifact, recorded),
            "version": artifact.version,
        }
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def input_digests(self, artifact: Artifact, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return {input: digest} of what an artifact is made from.

        With `recorded`, files that the record does not have do not count, since earlier versions did not look at them; and
        those that are gone count as unchanged: a run that was copied to another machine is not undone for that."""
        entries = self.manifest()["artifacts"]
        digests = {name: self._entry(name, entries)["sha256"] for name in artifact.inputs if self.wants(name)}
        if recorded is None:
            # A file that is edited while the step works was read before that.
            found = self._sources.get(artifact) or digest_sources(artifact, self.config)
        else:
            found = digest_sources(artifact, self.config)
            kept = {key: digest for key, digest in recorded.items() if key not in ARTIFACTS and key != DATA_FILE}
            found = {key: found.get(key, digest) for key, digest in kept.items()} | _only(found, DATA_FILE)
        return digests | found

    def _entry(self, name: str, entries: Mapping[str, ArtifactEntry] | None = None) -> ArtifactEntry:
        artifact, entry = ARTIFACTS[name], (self.manifest()["artifacts"] if entries is None else entries).get(name)
        if entry is None:
            raise RunError(f"{artifact.file} is not in {self.name}/ yet: run notebook {artifact.step} first")
        return entry

    def is_fresh(self, name: str, deep: bool = True) -> bool:
        """Return whether the artifact was made from today's settings and inputs and is on disk as recorded: by sha256, or by
        size alone if not `deep`."""
        try:
            if not self._is_made_from_todays(name) or self._size_on_disk(name) != self._entry(name)["bytes"]:
                return False
            return not deep or self.require(name).exists()
        except RunError:
            return False

    def _is_made_from_todays(self, name: str) -> bool:
        """Return whether the record says that the artifact was made from today's settings and inputs, gone from the disk or not.

        Raises RunError if the artifact or an input was never made."""
        entry = self._entry(name)
        # Nothing is made again because settings about accounts do not count here: it was made when they did.
        settings = [self.config]
        if self.stored is not self.config:
            settings += [self.stored, with_accounts_of(self.config, entry.get("settings", {}))]
        return entry["fingerprint"] in (self.fingerprint(name, entry["inputs"], config) for config in settings)

    def step_to_redo(self, name: str) -> str | None:
        """Return the notebook to run before an artifact is what today's settings give: the first one that made something on the
        way to it, or the artifact itself, from other settings or inputs. None if there is none.

        `is_fresh` compares an artifact with its own inputs alone, which may be stale themselves. An input that is gone from the
        disk counts by its record, because a large one does not outlast a session."""
        on_the_way = {name}
        for one in reversed(ARTIFACTS):  # inputs stand before what is made from them
            if one in on_the_way:
                on_the_way.update(filter(self.wants, ARTIFACTS[one].inputs))
        stale = (one for one in ARTIFACTS if one in on_the_way and not self._counts(one, on_disk=one == name))
        return next((ARTIFACTS[one].step for one in stale), None)

    def _counts(self, name: str, on_disk: bool) -> bool:
        if on_disk:
            return self.is_fresh(name, deep=False)
        try:
            return self._is_made_from_todays(name)
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
                    say(line)
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
            say(f"{ARTIFACTS[name].file}: made before from the same inputs; read from the run")
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
            raise RunError(f"{artifact.file} is missing from {self.name}/: run notebook {artifact.step} again")
        if self._verified.get(name) != entry["sha256"]:
            digest, size = sha256_of(path)
            if size != entry["bytes"] or digest != entry["sha256"]:
                fault = "truncated" if size < entry["bytes"] else "altered"
                raise RunError(
                    f"{artifact.file} in {self.name}/ is {fault} ({size:,} bytes, {entry['bytes']:,} recorded; "
                    f"sha256 differs from the manifest): run notebook {artifact.step} again"
                )
            self._verified[name] = digest
        return path

    def read(self, name: str) -> Any:
        """Return an artifact, verified: data for .json, records for .jsonl, a Dataset for .parquet, else its path.

        Raises RunError as `require` does, and if the file is none that medcot writes."""
        path = self.require(name)
        if path.suffix in (".json", ".jsonl"):
            return read_records(path.read_bytes(), self.display(path), SHAPES.get(name), 1 if path.suffix == ".jsonl" else None)
        return read_rows(path) if path.suffix == ".parquet" else path

    def checkpoint_dir(self, name: str) -> Path:
        """Return the folder of the trainer's checkpoints for this artifact's present fingerprint, made if it is not there."""
        folder, earlier = (self.path / "checkpoints" / self.fingerprint(name, recorded)[:12] for recorded in (None, {}))
        if earlier.is_dir() and not folder.is_dir():  # begun by a version that did not look at the model's files
            return earlier
        paths.make_private(folder)
        return folder

    def display(self, path: Path) -> str:
        """Return a path of the run as a reader should see it, without folders above the one that commands are started in."""
        scratch = paths.scratch_dir(self.path)
        root, name = (self.path, self.name) if path.is_relative_to(self.path) else (scratch, f"scratch/{scratch.name}")
        return f"{name}/{path.relative_to(root).as_posix()}"

    @property
    def name(self) -> str:
        """The run directory as a reader should see it (`display_path`)."""
        return paths.display_path(self.path)

    def makes(self, step: str) -> tuple[str, ...]:
        """Return the artifacts that a step makes with this configuration: not those whose setting is off (`Artifact.when`)."""
        return tuple(filter(self.wants, STEPS[step].makes))

    def wants(self, name: str) -> bool:
        """Return whether an artifact is made with this configuration (`Artifact.when`)."""
        setting = ARTIFACTS[name].when
        return setting is None or bool(self.config.get(setting))


def _is_manifest(path: Path) -> bool:
    try:
        return bool(read_manifest(path))
    except (OSError, ValueError):
        return False


def _only(values: Mapping[str, str], key: str) -> dict[str, str]:
    return {key: values[key]} if key in values else {}
