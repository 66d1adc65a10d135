"""Run: the directory through which the notebooks speak to each other. Here are its steps: one notebook, one step."""

from __future__ import annotations

import os
import resource
import time
from typing import Any

import psutil

from medcot_utils.machine import paths
from medcot_utils.machine.durations import TimeEstimate, describe_end, describe_time
from medcot_utils.machine.gpu import peak_gpu_memory_mb
from medcot_utils.plain_text import say
from medcot_utils.run.artifacts import ARTIFACTS, SETUP, STEPS
from medcot_utils.run.changes import why_stale
from medcot_utils.run.files import remove
from medcot_utils.run.lock import RunError, hold, is_held, keep, let_go
from medcot_utils.run.manifest import StepEntry
from medcot_utils.run.sources import digest_sources
from medcot_utils.run.store import StoredRun
from medcot_utils.text_files import read_json


class Run(StoredRun):
    """A run directory, opened, with what its steps have done."""

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
            # Not on standard error, which notebooks show on red ground.
            if step == SETUP:
                say(f"run directory: {self.name}")
            elif estimate := self.estimate(step):
                say(f"{step}: {describe_time(estimate)}, {describe_end(estimate, time.time())}")
        except BaseException:
            let_go(self.path)
            raise

    def require_inputs(self, step: str) -> None:
        """Raise RunError naming the notebook to run if an artifact that the step reads is missing, damaged or stale."""
        for name in STEPS[step].reads:
            self.require(name)
        for name in STEPS[step].reads:
            if stale := self._stale_origin(name):
                artifact = ARTIFACTS[stale]
                raise RunError(
                    f"{artifact.file} in {self.name}/ was made with other settings or inputs than the run has now "
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
        `begin`), and in MB the most that this process has held of the machine's memory, and it or one that trained for it of
        a GPU's."""
        began = since or self.manifest()["steps"][step]["started"]
        # Linux reports units of 1,024 bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = {"peak_memory_mb": round(peak / 1e6), "peak_gpu_memory_mb": peak_gpu_memory_mb()}
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
            return "pid" in entry and psutil.pid_exists(entry["pid"])
        return is_held(self.path)  # another machine's processes cannot be seen from here

    def why_stale(self, step: str) -> list[str]:
        """Return what has changed since the step was done: a setting with its old and new value, an input, a file."""
        found = [reason for name in self.makes(step) if not self.is_fresh(name) for reason in why_stale(self, name)]
        return list(dict.fromkeys(found))
