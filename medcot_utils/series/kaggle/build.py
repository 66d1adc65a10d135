"""Build the notebook that is pushed to Kaggle: it holds the project as text, and a few cells that run it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from medcot_utils.config import PROFILES, RunConfig, load_config, profile_needs
from medcot_utils.local_paths import local_paths
from medcot_utils.machine.names import OutsideError, resolve_below
from medcot_utils.machine.probe import KAGGLE_T4S
from medcot_utils.run.files import write_atomic
from medcot_utils.series.estimate import SeriesEstimate, estimate_series
from medcot_utils.series.kaggle.accelerators import ACCELERATORS, DEFAULT, check_accelerator, find_accelerator
from medcot_utils.series.kaggle.carried import carried_files, payload, refuse_secrets
from medcot_utils.series.kaggle.earlier import RUN_NAME
from medcot_utils.series.kaggle.metadata import (
    METADATA,
    PLACEHOLDER_OWNER,
    KaggleError,
    KernelMetadata,
    describe_id_fault,
    read_unvalidated,
    validated,
    write_metadata,
)
from medcot_utils.series.preflight import preflight

MOST_BYTES = 1_000_000  # Kaggle refuses larger notebooks
# Kaggle ends a session after 12 hours. The rest is for work that cannot pause (a held-out loss, the merge), and for packing.
MAX_HOURS = 10


@dataclass(frozen=True)
class Built:
    """Hold a built notebook, ready to be pushed."""

    notebook: Path
    metadata: KernelMetadata
    profile: str
    settings: list[str]
    bytes: int
    added: list[str]  # settings that the build added
    left_out: list[str]  # files beside the carried ones that do not belong to the project
    dropped_image: str | None  # the docker_image that the metadata file had, if it was removed
    estimate: SeriesEstimate | None  # None without published rates, and for a model of unknown size


def build(
    folder: Path,
    profile: str | None = None,
    settings: Iterable[str] = (),
    kernel: str | None = None,
    continue_from: Iterable[str] = (),
    datasets: Iterable[str] = (),
    public: bool | None = None,
    accelerator: str | None = None,
    keep_image: bool = False,
) -> Built:
    """Write the notebook below `folder`, and kernel-metadata.json into it.

    An existing metadata file keeps its id, privacy, accelerator, and sources, unless arguments replace them or add to them. Its
    docker_image is removed unless `keep_image` is true: it may name an old image or a CPU image, and Kaggle would start that
    without a warning (kaggle-cli, issue 1197). Without a profile, the profile of the notebook in the folder stays, else it is
    `article`. The same arguments on the same folder give the same bytes.

    Args:
        kernel: owner/slug of the notebook on Kaggle.
        continue_from, datasets: sources to add: other notebooks whose output is an input, and data sets.
        accelerator: a name in `ACCELERATORS`. None keeps the folder's, else means two T4s, or none for a profile without a GPU.

    Raises:
        MedcotError: if something cannot run on Kaggle, or if what would be pushed holds a secret; nothing is written then."""
    held = read_unvalidated(folder) or {}
    profile = profile or _held_profile(folder, held.get("code_file")) or "article"
    given = list(settings)
    if accelerator is not None:
        find_accelerator(accelerator)
    shape = accelerator or _usual_accelerator(profile, held)
    settings, estimate = _checked_settings(profile, given, shape)
    if kernel and (fault := describe_id_fault(kernel)):
        raise KaggleError(f"--id {fault}")
    kernel = kernel or held.get("id", f"{PLACEHOLDER_OWNER}/medcot-series")
    slug = kernel.rpartition("/")[2]
    image = held.get("docker_image")
    kept = {name: held.get(name) for name in ("keywords", "enable_tpu")}
    kept["docker_image"] = image if keep_image or not image else None
    if kernel == held.get("id"):  # for Kaggle the number outranks the name, so another kernel's number would overwrite that one
        kept["id_no"] = held.get("id_no")
    values = kept | {
        "id": kernel,
        "title": slug.replace("-", " "),
        "code_file": f"build/kaggle/{slug}.ipynb",
        "is_private": held.get("is_private", True) if public is None else not public,
        "enable_gpu": bool(shape),
        "machine_shape": shape,
        "dataset_sources": _joined(held.get("dataset_sources", []), datasets),
        "competition_sources": held.get("competition_sources", []),
        "kernel_sources": _joined(held.get("kernel_sources", []), continue_from),
        "model_sources": held.get("model_sources", []),
    }
    metadata = validated(values)
    files, left_out = carried_files()
    refuse_secrets(files | {METADATA: metadata.model_dump_json().encode()}, settings)
    text = notebook_text(metadata, profile, settings, files)
    size = len(text.encode())
    if size >= MOST_BYTES:
        raise KaggleError(f"the notebook has {size:,} bytes, and Kaggle takes less than {MOST_BYTES:,}")
    path = folder / metadata.code_file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    write_metadata(folder, metadata)
    added = [setting for setting in settings if setting not in given]
    dropped = image if image and not metadata.docker_image else None
    return Built(path, metadata, profile, settings, size, added, left_out, dropped, estimate)


def _held_profile(folder: Path, code_file: Any) -> str | None:
    try:
        notebook = nbformat.read(resolve_below(folder, code_file, METADATA), as_version=4)
    except (OSError, ValueError, OutsideError):  # no file, not a notebook, or outside the folder
        return None
    lines = [line for cell in notebook.cells for line in cell.source.splitlines() if line.startswith("PROFILE = ")]
    name = lines[0].partition("=")[2].strip(' "') if lines else None
    return name if name in (*PROFILES, "auto") else None


def _joined(held: Iterable[str], given: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*held, *given]))


def _on_a_gpu(profile: str) -> bool:
    return profile == "auto" or profile_needs(profile).gpu_gib is not None


def _usual_accelerator(profile: str, held: dict[str, Any]) -> str:
    if not _on_a_gpu(profile):
        return ""
    shape = held.get("machine_shape")
    return shape if isinstance(shape, str) and shape in ACCELERATORS else DEFAULT


def _checked_settings(profile: str, settings: list[str], shape: str) -> tuple[list[str], SeriesEstimate | None]:
    """Return the settings and the time that the series will take. A run on a GPU that may take as long as a session gets a time
    limit. Raises MedcotError if something cannot run on Kaggle."""
    for name in ("demo", "article") if profile == "auto" else (profile,):
        config = load_config(name, settings)
        for setting, found in local_paths(config).items():
            _refuse_files_of_this_machine(setting, found)
        preflight(config, run_dir=None, online=False)
        if shape:
            check_accelerator(shape, config)
    estimate = estimate_series(config, None, KAGGLE_T4S) if shape == DEFAULT else None
    is_short = estimate is not None and estimate.total["high"] < MAX_HOURS * 3600
    if _on_a_gpu(profile) and config.training.max_hours is None and not is_short:
        settings = [*settings, f"training.max_hours={MAX_HOURS}"]
    return settings, estimate


def _refuse_files_of_this_machine(setting: str, paths: list[str]) -> None:
    for path in paths:
        if not os.path.normpath(path).startswith("/kaggle/input/"):
            raise KaggleError(
                f"{setting} {path} is a file or folder of this machine: make it a data set on Kaggle, add that with "
                f"--dataset owner/slug, and give its path there, below /kaggle/input/"
            )


# --- the cells -------------------------------------------------------------------------------------------------------

_INTRO = """# medcot on Kaggle

Fine-tunes and judges a reasoning model on medical chain-of-thought data, in seven notebooks, headless. This notebook needs
{needs} (in the settings on the right), and holds package and notebooks as text. It runs on Python 3.11, 3.12,
and 3.13, and leaves the session's own torch and kernel as they are. `medcot kaggle build` wrote it; to change it, build it again.
Not for clinical use.

Secrets are attached once, in the editor (Add-ons > Secrets); {secrets}.
To resume an earlier session, add its output as input. At the end, the output holds `{run}.zip`, `{run}/adapter`,
and `{run}/report.html`."""

_PARAMETERS = """PROFILE = {profile}
SETTINGS = {settings}
KERNEL = {kernel}
RESUME_FROM = {sources}"""

# The project is unpacked outside the working folder, which is the session's output, so sessions never pass on code.
_UNPACK = """import base64, hashlib, io, os, shutil, sys, tarfile, time
from pathlib import Path

os.environ.setdefault("MEDCOT_SESSION_STARTED", str(time.time()))
kaggle, packed = Path(os.environ.get("MEDCOT_KAGGLE_ROOT") or "/kaggle"), base64.b64decode(PROJECT)
if hashlib.sha256(packed).hexdigest() != "DIGEST":
    raise ValueError("PROJECT, above, is not what medcot kaggle build wrote here: build and push again")
working, project = kaggle / "working", kaggle / "tmp" / "project"
shutil.rmtree(project, ignore_errors=True)
with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
    archive.extractall(project, filter="data")
sys.path.insert(0, str(project))
print(f"unpacked to {project}, Python {sys.version.split()[0]}")"""

_INSTALL = """from medcot_utils.machine import installing

installing.install()"""

_RESUME = f"""from medcot_utils.series.kaggle import session

run_dir = working / "{RUN_NAME}"
profile = session.resolved_profile(PROFILE)
session.read_secrets(profile, SETTINGS)
session.resume_earlier_run(run_dir, profile, SETTINGS, RESUME_FROM)"""

_RUN = """exit_code = session.run_medcot(run_dir, profile, SETTINGS)"""
_REPORT = """session.show_report(run_dir)"""
_LEAVE = """session.leave_output(run_dir)
session.end(exit_code, KERNEL, profile, SETTINGS)"""


def cells(metadata: KernelMetadata, profile: str, settings: list[str], files: dict[str, bytes]) -> list[Any]:
    """Return the cells of the pushed notebook, with fixed ids."""
    chosen = {"profile": json.dumps(profile), "settings": _list(settings), "kernel": json.dumps(metadata.id)}
    chosen["sources"] = _list(_earlier_sessions(metadata, settings))
    needs = "**Internet** and a **GPU**" if metadata.enable_gpu else "only **Internet**"
    secrets = describe_secrets(load_config("article" if profile == "auto" else profile, settings), mark="`")
    packed = payload(files)
    digest = hashlib.sha256(base64.b64decode(packed)).hexdigest()
    sources = [
        ("markdown", _INTRO.format(run=RUN_NAME, needs=needs, secrets=secrets), {}),
        ("code", _PARAMETERS.format(**chosen), {"tags": ["parameters"]}),
        ("markdown", "## The project, as compressed text", {}),
        ("code", f'PROJECT = """\n{packed}\n"""', {"_kg_hide-input": True, "jupyter": {"source_hidden": True}}),
        ("code", _UNPACK.replace("DIGEST", digest), {}),
        ("markdown", "## The pinned stack", {}),
        ("code", _INSTALL, {}),
        ("markdown", "## Secrets, and an earlier session's run", {}),
        ("code", _RESUME, {}),
        ("markdown", "## The series", {}),
        ("code", _RUN, {}),
        ("code", _REPORT, {}),
        ("markdown", "## The output", {}),
        ("code", _LEAVE, {}),
    ]
    made = []
    for number, (kind, source, metadata) in enumerate(sources):
        new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        made.append(new(source, id=f"medcot-{number:02}", metadata=metadata))
    return made


def _earlier_sessions(metadata: KernelMetadata, settings: list[str]) -> list[str]:
    """Return the sources that may hold the session to resume: other notebooks' output, and data sets that no setting reads."""
    read = {part for pair in settings if "/kaggle/input/" in pair for part in re.split(r"[/=\s\"']", pair)}
    return [*metadata.kernel_sources, *(name for name in metadata.dataset_sources if name.partition("/")[2] not in read)]


def describe_secrets(config: RunConfig, mark: str = "") -> str:
    """Return which secrets a run needs or can use, and for what. `mark` stands on both sides of each name."""
    hub, wandb = (
        " or ".join(f"{mark}{name}{mark}" for name in names) for names in (config.secrets.huggingface, config.secrets.wandb)
    )
    needs = [f"needed: {hub} for the push to {config.hub.repo_id}" if config.hub.repo_id else f"optional: {hub} for the Hub"]
    if config.tracking.backend in ("auto", "wandb"):
        needs.append(f"optional: {wandb} for Weights & Biases")
    return "; ".join(needs)


def _list(settings: list[str]) -> str:
    return "[\n" + "".join(f"    {setting!r},\n" for setting in settings) + "]" if settings else "[]"


def notebook_text(metadata: KernelMetadata, profile: str, settings: list[str], files: dict[str, bytes]) -> str:
    """Return the pushed notebook as text, without outputs and with kernelspec python3."""
    notebook = nbformat.v4.new_notebook(cells=cells(metadata, profile, settings, files))
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"
