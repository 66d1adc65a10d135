"""manifest.json of a run: what is made, from what, and what each step has cost."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.errors import quote
from medcot_utils.machine.durations import TimeEstimate, describe_time
from medcot_utils.machine.names import require_inside
from medcot_utils.machine.paths import display_path
from medcot_utils.text_files import read_json

FORMAT = 1


class ArtifactEntry(TypedDict):
    """Hold the manifest's record of an artifact."""

    file: str  # file or folder, as `artifacts.Artifact.file`
    step: str  # the notebook that made it
    sha256: str  # as `files.sha256_of`
    bytes: int
    fingerprint: str  # sha256 over the settings and inputs it was made from
    inputs: dict[str, str]  # {input artifact, or file or folder of this machine: its digest}
    made: str  # time in ISO 8601, UTC
    settings: NotRequired[dict[str, object]]  # {setting: value} it was made with; runs of early versions lack it
    commits: NotRequired[dict[str, str]]  # {setting without a revision: the commit that the Hub gave for it}


class GpuPeak(TypedDict):
    """The most that a process has held of its GPU, in MB: the notebook's own, or one of those that trained for it."""

    allocated: int
    reserved: int


class StepEntry(TypedDict):
    """Hold the manifest's record of a step. Runs of early versions lack the memory."""

    state: str  # running, done, failed or paused
    started: NotRequired[float]  # seconds since the epoch
    pid: NotRequired[Annotated[int, Field(ge=0, lt=2**31)]]
    host: NotRequired[str]  # the machine of the pid
    error: NotRequired[str | None]
    seconds: NotRequired[float]
    estimate: NotRequired[TimeEstimate | None]  # of notebook 01; None if nobody could tell
    peak_memory_mb: NotRequired[int]
    peak_gpu_memory_mb: NotRequired[GpuPeak | None]  # None: no GPU was used


class Manifest(TypedDict):
    """The whole file."""

    format: int
    steps: dict[str, StepEntry]
    artifacts: dict[str, ArtifactEntry]


@cache
def _shape() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def read_manifest(path: Path) -> Manifest:
    """Return the manifest in a file. Raises OSError or ValueError if there is none that this version can read, and OutsideError
    for an entry that names a file out of the run."""
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"not a manifest of format {FORMAT}")
    try:
        _shape().validate_python(manifest, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg'][0].lower()}{fault['msg'][1:]}") from None
    for name, entry in manifest["artifacts"].items():
        require_inside(entry["file"], f"{display_path(path.parent)}/{path.name}, artifact {quote(name)}")
    for step in manifest["steps"].values():  # its name until 0.1
        if "peak_card_memory_mb" in step:
            step["peak_gpu_memory_mb"] = step.pop("peak_card_memory_mb")
    return manifest


def describe_costs(entry: StepEntry) -> str:
    """Return a done step's seconds beside those estimated, and its memory, in one line."""
    estimated = f", estimated {describe_time(estimate)}" if (estimate := entry.get("estimate")) else ""
    gpu = entry.get("peak_gpu_memory_mb")
    of_the_gpu = f", {gpu['reserved']} MB of the GPU" if gpu else ""
    return f"{entry['seconds']} s{estimated}, peak memory {entry['peak_memory_mb']} MB{of_the_gpu}"
