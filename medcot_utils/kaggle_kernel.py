"""The notebook that is pushed to Kaggle: the project inside itself as text, and a few cells that run it; and its metadata."""

from __future__ import annotations

import base64
import functools
import io
import json
import lzma
import re
import tarfile
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nbformat
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError
from medcot_utils.kaggle_session import RUN_NAME
from medcot_utils.run import write_atomic

HOME = Path(__file__).parent.parent
METADATA = "kernel-metadata.json"
MOST_BYTES = 1_000_000  # Kaggle refuses a larger notebook
PLACEHOLDER_OWNER = "your-name"
# Kaggle ends a session after 12 hours; the rest is for answers, merge and packing after the training has paused.
MAX_HOURS = 10
_ON_A_CARD = ("article", "recommended", "full", "auto")
_CARRIED = ("pyproject.toml", "requirements.txt", "requirements-cpu.txt", "requirements-nodeps.txt", "LICENSE")
_PACKAGE_SUFFIXES = {".py", ".yaml", ".json", ".jsonl", ".j2", ".md"}
_SOURCE = r"[A-Za-z0-9][\w-]*/[\w-]+"


class KaggleError(MedcotError):
    """The kernel cannot be built or pushed, or Kaggle refused; the message says what is wrong and what to do."""


class KernelMetadata(BaseModel):
    """kernel-metadata.json, as far as this project uses it. Raises ValidationError; `read_metadata` gives one line instead."""

    model_config = ConfigDict(extra="forbid")

    id: str
    title: str = Field(min_length=5, max_length=50)
    code_file: str
    language: Literal["python"] = "python"
    kernel_type: Literal["notebook"] = "notebook"
    is_private: bool = True
    enable_gpu: bool = True
    enable_internet: bool = True
    machine_shape: str = Field("NvidiaTeslaT4", pattern=r"^\w*$")
    dataset_sources: list[str] = []
    competition_sources: list[str] = []
    kernel_sources: list[str] = []
    model_sources: list[str] = []
    docker_image: str | None = None

    @field_validator("id")
    @classmethod
    def _owner_and_slug(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*/[a-z0-9]+(?:-[a-z0-9]+)*", value) or len(value.partition("/")[2]) < 5:
            raise ValueError(
                f"{value!r} is not owner/slug, with a slug of at least five small letters, digits and single hyphens"
            )
        return value

    @field_validator("dataset_sources", "kernel_sources")
    @classmethod
    def _two_parts(cls, values: list[str]) -> list[str]:
        for value in values:
            if not re.fullmatch(_SOURCE, value):
                raise ValueError(f"{value!r} is not owner/slug")
        return values

    @field_validator("model_sources")
    @classmethod
    def _five_parts(cls, values: list[str]) -> list[str]:
        for value in values:
            if not re.fullmatch(rf"{_SOURCE}/[\w-]+/[\w.-]+/\d+", value):
                raise ValueError(f"{value!r} is not owner/model/framework/variation/VERSION")
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> KernelMetadata:
        from slugify import slugify  # Kaggle's client makes slugs with it

        slug = self.id.partition("/")[2]
        if slugify(self.title) != slug:
            raise ValueError(f"title {self.title!r} makes the slug {slugify(self.title)!r}, but id says {slug!r}")
        if not self.enable_internet:
            raise ValueError("enable_internet is false, but the session must install its pinned stack")
        if self.machine_shape == "NvidiaTeslaP100":
            raise ValueError("machine_shape NvidiaTeslaP100: today's torch has nothing for that card, choose NvidiaTeslaT4")
        if self.enable_gpu != bool(self.machine_shape):
            raise ValueError(f"enable_gpu is {self.enable_gpu}, but machine_shape is {self.machine_shape!r}")
        return self


@dataclass(frozen=True)
class Built:
    notebook: Path
    metadata: KernelMetadata
    bytes: int


def read_metadata(folder: Path) -> KernelMetadata:
    """The validated kernel-metadata.json of a folder. Raises KaggleError with all its faults in one line."""
    path = folder / METADATA
    try:
        return KernelMetadata.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise KaggleError(f"no {METADATA} in {folder}: make one with medcot kaggle build") from None
    except json.JSONDecodeError as error:
        raise KaggleError(f"{METADATA} is not JSON ({error}): mend it, or remove it and build again") from None
    except ValidationError as error:
        raise KaggleError(f"{METADATA}: {_one_line(error)}") from None


def _one_line(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        name = ".".join(map(str, fault["loc"]))
        message = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"]
        lines.append(f"{name}: {message}" if name else message)
    return "; ".join(lines)


def build(
    folder: Path,
    profile: str = "article",
    settings: Iterable[str] = (),
    kernel: str | None = None,
    continue_from: Iterable[str] = (),
    datasets: Iterable[str] = (),
    public: bool | None = None,
) -> Built:
    """Write the notebook below `folder` and its kernel-metadata.json into it; id, privacy and sources that a metadata file
    there has already are kept, and what is given is put in or added. The same arguments give the same bytes.

    Raises KaggleError or ConfigError for what cannot run on Kaggle, before anything is written."""
    settings = _checked_settings(profile, list(settings))
    held = _held(folder)
    kernel = kernel or held.get("id", f"{PLACEHOLDER_OWNER}/medcot-series")
    slug = kernel.rpartition("/")[2]
    card = profile in _ON_A_CARD
    values = {
        "id": kernel,
        "title": slug.replace("-", " "),
        "code_file": f"build/kaggle/{slug}.ipynb",
        "is_private": held.get("is_private", True) if public is None else not public,
        "enable_gpu": card,
        "machine_shape": "NvidiaTeslaT4" if card else "",
        "dataset_sources": _joined(held.get("dataset_sources", []), datasets),
        "competition_sources": held.get("competition_sources", []),
        "kernel_sources": _joined(held.get("kernel_sources", []), continue_from),
        "model_sources": held.get("model_sources", []),
        "docker_image": held.get("docker_image"),
    }
    try:
        metadata = KernelMetadata.model_validate(values)
    except ValidationError as error:
        raise KaggleError(_one_line(error)) from None
    text = notebook_text(metadata.id, profile, settings)
    size = len(text.encode())
    if size >= MOST_BYTES:
        raise KaggleError(f"the notebook has {size:,} bytes, and Kaggle takes less than {MOST_BYTES:,}")
    path = folder / metadata.code_file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    write_atomic(folder / METADATA, json.dumps(metadata.model_dump(exclude_none=True), indent=2) + "\n")
    return Built(path, metadata, size)


def _held(folder: Path) -> dict[str, Any]:
    """What a metadata file says that is there already; not validated, since build mends it."""
    path = folder / METADATA
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise KaggleError(f"{METADATA} is not JSON ({error}): mend it, or remove it and build again") from None


def _joined(held: Iterable[str], given: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*held, *given]))


def _checked_settings(profile: str, settings: list[str]) -> list[str]:
    for name in ("demo", "article") if profile == "auto" else (profile,):
        config = load_config(name, settings)
    if config.dataset.path and not config.dataset.path.startswith("/kaggle/input/"):
        raise KaggleError(
            f"dataset.path {config.dataset.path} is a file of this machine: make it a data set on Kaggle, add that with "
            f"--dataset owner/slug, and give its path there, below /kaggle/input/"
        )
    if profile in _ON_A_CARD and config.training.max_hours is None:
        settings = [*settings, f"training.max_hours={MAX_HOURS}"]
    return settings


# --- what the notebook carries ---------------------------------------------------------------------------------------


def carried_files() -> dict[str, bytes]:
    """{path in the project: content} of what a bare session needs. Raises KaggleError if this is no checkout."""
    if absent := [name for name in _CARRIED if not (HOME / name).exists()]:
        raise KaggleError(f"{', '.join(absent)} not found beside the package: build from a checkout of the project")
    package = [path for path in (HOME / "medcot_utils").rglob("*") if path.suffix in _PACKAGE_SUFFIXES and path.is_file()]
    files = {path.relative_to(HOME).as_posix(): path.read_bytes() for path in [*package, *(HOME / name for name in _CARRIED)]}
    for path in (HOME / "notebooks").glob("*.ipynb"):
        files[f"notebooks/{path.name}"] = _without_outputs(path).encode()
    return dict(sorted(files.items()))


def _without_outputs(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(notebook)


@functools.cache
def payload() -> str:
    """The carried files as a tar, compressed, in lines of base64 text. Byte for byte the same for the same files."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in carried_files().items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    packed = lzma.compress(archive.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    return "\n".join(textwrap.wrap(base64.b64encode(packed).decode(), 128))


# --- the cells -------------------------------------------------------------------------------------------------------

_INTRO = """# medcot on Kaggle

Fine-tunes and judges a reasoning model on medical chain-of-thought data, in seven notebooks, headless. This notebook needs
nothing but itself and **Internet** (settings, right): package and notebooks are in it as text. It was written by
`medcot kaggle build`; change it there. Not for clinical use.

Secrets are optional and attached once, in the editor (Add-ons > Secrets): `HF_TOKEN` or `HUGGINGFACE_TOKEN`, and `WANDB_API_KEY`
or `wandb`. To go on with an earlier session, add its output as input. Afterwards the output holds `{run}.zip`, `{run}/adapter`
and `{run}/report.html`."""

_PARAMETERS = """PROFILE = {profile}
SETTINGS = {settings}
KERNEL = {kernel}"""

_UNPACK = """import base64, io, os, sys, tarfile, time
from pathlib import Path

os.environ.setdefault("MEDCOT_SESSION_STARTED", str(time.time()))
sys.dont_write_bytecode = True  # what lies in the working folder at the end is output
working = Path(os.environ.get("MEDCOT_KAGGLE_ROOT") or "/kaggle", "working")
with tarfile.open(fileobj=io.BytesIO(base64.b64decode(PROJECT)), mode="r:xz") as archive:
    archive.extractall(working / "medcot", filter="data")
sys.path.insert(0, str(working / "medcot"))
print(f"unpacked to {working / 'medcot'}, Python {sys.version.split()[0]}")"""

_INSTALL = """from medcot_utils import installing

installing.install()"""

_TAKE_UP = f"""from medcot_utils import kaggle_session as session

session.read_secrets()
run_dir = working / "{RUN_NAME}"
profile = session.resolved_profile(PROFILE)
session.take_up(run_dir, profile, SETTINGS)"""

_RUN = """exit_code = session.run_series(run_dir, profile, SETTINGS)"""
_REPORT = """session.show_report(run_dir)"""
_LEAVE = """session.leave_output(run_dir)
session.end(exit_code, KERNEL)"""


def cells(kernel: str, profile: str, settings: list[str]) -> list[Any]:
    """The pushed notebook's cells, with fixed ids."""
    chosen = {"profile": json.dumps(profile), "settings": _list(settings), "kernel": json.dumps(kernel)}
    sources: list[tuple[str, str, dict[str, Any]]] = [
        ("markdown", _INTRO.format(run=RUN_NAME), {}),
        ("code", _PARAMETERS.format(**chosen), {"tags": ["parameters"]}),
        ("markdown", "## The project, as compressed text", {}),
        ("code", f'PROJECT = """\n{payload()}\n"""', {"_kg_hide-input": True, "jupyter": {"source_hidden": True}}),
        ("code", _UNPACK, {}),
        ("markdown", "## The pinned stack", {}),
        ("code", _INSTALL, {}),
        ("markdown", "## Secrets, and an earlier session's run", {}),
        ("code", _TAKE_UP, {}),
        ("markdown", "## The series", {}),
        ("code", _RUN, {}),
        ("code", _REPORT, {}),
        ("markdown", "## What is left as output", {}),
        ("code", _LEAVE, {}),
    ]
    made = []
    for number, (kind, source, metadata) in enumerate(sources):
        new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        made.append(new(source, id=f"medcot-{number:02}", metadata=metadata))
    return made


def _list(settings: list[str]) -> str:
    return "[\n" + "".join(f"    {setting!r},\n" for setting in settings) + "]" if settings else "[]"


def notebook_text(kernel: str, profile: str, settings: list[str]) -> str:
    """The pushed notebook as text: no outputs, kernelspec python3."""
    notebook = nbformat.v4.new_notebook(cells=cells(kernel, profile, settings))
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"
