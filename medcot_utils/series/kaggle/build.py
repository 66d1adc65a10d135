"""The notebook that is pushed to Kaggle: the project inside itself as text, and a few cells that run it; and its metadata."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import lzma
import re
import subprocess
import tarfile
import textwrap
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nbformat
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medcot_utils.config import PROFILES, load_config
from medcot_utils.errors import MedcotError
from medcot_utils.machine import redaction
from medcot_utils.machine.paths import HOME
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.files import write_atomic
from medcot_utils.series.kaggle.session import RUN_NAME

METADATA = "kernel-metadata.json"
MOST_BYTES = 1_000_000  # Kaggle refuses a larger notebook
PLACEHOLDER_OWNER = "your-name"
# Kaggle ends a session after 12 hours; the rest is for answers, merge and packing after the training has paused.
MAX_HOURS = 10
_ON_A_GPU = ("article", "recommended", "full", "auto")
_CARRIED = ("pyproject.toml", "requirements.txt", "requirements-cpu.txt", "requirements-nodeps.txt", "LICENSE")
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
    # What `kaggle kernels pull -m` writes beside.
    id_no: int | None = None
    keywords: list[str] | None = None
    enable_tpu: bool | None = None

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
        if self.enable_tpu:
            raise ValueError("enable_tpu is true, but the series runs on a CUDA GPU or the CPU: set it to false")
        if self.machine_shape == "NvidiaTeslaP100":
            raise ValueError("machine_shape NvidiaTeslaP100: today's torch has nothing for that GPU, choose NvidiaTeslaT4")
        if self.enable_gpu != bool(self.machine_shape):
            raise ValueError(f"enable_gpu is {self.enable_gpu}, but machine_shape is {self.machine_shape!r}")
        return self


@dataclass(frozen=True)
class Built:
    notebook: Path
    metadata: KernelMetadata
    profile: str
    bytes: int
    left_out: list[str]  # files that lie among the carried ones, but are none of the project's


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
    profile: str | None = None,
    settings: Iterable[str] = (),
    kernel: str | None = None,
    continue_from: Iterable[str] = (),
    datasets: Iterable[str] = (),
    public: bool | None = None,
) -> Built:
    """Write the notebook below `folder` and its kernel-metadata.json into it; id, privacy and sources that a metadata file
    there has already are kept, and what is given is put in or added. Without a profile it is that of the notebook which the
    folder holds, else `article`. The same arguments on the same folder give the same bytes.

    Raises KaggleError or ConfigError for what cannot run on Kaggle, or for a secret in what would be pushed, before anything is
    written."""
    held = _held(folder)
    profile = profile or _held_profile(folder, held) or "article"
    settings = _checked_settings(profile, list(settings))
    kernel = kernel or held.get("id", f"{PLACEHOLDER_OWNER}/medcot-series")
    slug = kernel.rpartition("/")[2]
    gpu = profile in _ON_A_GPU
    kept = {name: held.get(name) for name in ("docker_image", "keywords", "enable_tpu")}
    if kernel == held.get("id"):  # the number goes before the name: another kernel's would be overwritten
        kept["id_no"] = held.get("id_no")
    values = kept | {
        "id": kernel,
        "title": slug.replace("-", " "),
        "code_file": f"build/kaggle/{slug}.ipynb",
        "is_private": held.get("is_private", True) if public is None else not public,
        "enable_gpu": gpu,
        "machine_shape": "NvidiaTeslaT4" if gpu else "",
        "dataset_sources": _joined(held.get("dataset_sources", []), datasets),
        "competition_sources": held.get("competition_sources", []),
        "kernel_sources": _joined(held.get("kernel_sources", []), continue_from),
        "model_sources": held.get("model_sources", []),
    }
    try:
        metadata = KernelMetadata.model_validate(values)
    except ValidationError as error:
        raise KaggleError(_one_line(error)) from None
    files, left_out = carried_files()
    _refuse_secrets(files, settings)
    text = notebook_text(metadata, profile, settings, files)
    size = len(text.encode())
    if size >= MOST_BYTES:
        raise KaggleError(f"the notebook has {size:,} bytes, and Kaggle takes less than {MOST_BYTES:,}")
    path = folder / metadata.code_file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    write_atomic(folder / METADATA, json.dumps(metadata.model_dump(exclude_none=True), indent=2) + "\n")
    return Built(path, metadata, profile, size, left_out)


def _held(folder: Path) -> dict[str, Any]:
    """What a metadata file says that is there already; not validated, since build mends it."""
    path = folder / METADATA
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise KaggleError(f"{METADATA} is not JSON ({error}): mend it, or remove it and build again") from None


def _held_profile(folder: Path, held: dict[str, Any]) -> str | None:
    try:
        notebook = nbformat.read(folder / str(held.get("code_file")), as_version=4)
    except (OSError, ValueError):  # none there, or no notebook
        return None
    lines = [line for cell in notebook.cells for line in cell.source.splitlines() if line.startswith("PROFILE = ")]
    name = lines[0].partition("=")[2].strip(' "') if lines else None
    return name if name in (*PROFILES, "auto") else None


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
    if profile in _ON_A_GPU and config.training.max_hours is None:
        settings = [*settings, f"training.max_hours={MAX_HOURS}"]
    return settings


# --- what the notebook carries ---------------------------------------------------------------------------------------


def carried_files() -> tuple[dict[str, bytes], list[str]]:
    """({path in the project: content} of what a bare session needs, what lies among it and is left out).

    Carried are the seven notebooks without their outputs, the pins, and of the package what is the project's: the files that
    git tracks, or without git those that pyproject.toml lists. Raises KaggleError if this is no checkout."""
    if absent := [name for name in _CARRIED if not (HOME / name).exists()]:
        raise KaggleError(f"{', '.join(absent)} not found beside the package: build from a checkout of the project")
    package, notebooks = _package_files(), [HOME / "notebooks" / f"{name}.ipynb" for name in STEPS]
    if absent := [path.name for path in notebooks if not path.exists()]:
        raise KaggleError(f"{', '.join(absent)} not found in notebooks/: build from a checkout of the project")
    files = {path.relative_to(HOME).as_posix(): path.read_bytes() for path in [*package, *(HOME / name for name in _CARRIED)]}
    files |= {path.relative_to(HOME).as_posix(): _without_outputs(path).encode() for path in notebooks}
    there = [*(HOME / "notebooks").glob("*.ipynb"), *(HOME / "medcot_utils").rglob("*")]
    others = {path.relative_to(HOME).as_posix() for path in there if path.is_file() and "__pycache__" not in path.parts}
    return dict(sorted(files.items())), sorted(others - set(files))


def _package_files() -> list[Path]:
    git = ["git", "-C", str(HOME)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True).stdout
        if Path(top.strip()).resolve() == HOME.resolve():  # else HOME is a folder that lies in something else's checkout
            listed = subprocess.run([*git, "ls-files", "-z", "medcot_utils"], capture_output=True, text=True, check=True).stdout
            return [HOME / name for name in listed.split("\0") if name and (HOME / name).is_file()]
    tool = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name: HOME / name.replace(".", "/") for name in tool["package-data"]}
    data = [path for name, globs in tool["package-data"].items() for one in globs for path in folders[name].glob(one)]
    return [*(HOME / "medcot_utils").rglob("*.py"), *data]


def _refuse_secrets(files: dict[str, bytes], settings: list[str]) -> None:
    known = redaction.known_secrets(load_config("smoke", [pair for pair in settings if pair.startswith("secrets.")]).secrets)
    texts = {name: content.decode(errors="replace") for name, content in files.items()}
    texts |= {f"--set {pair.partition('=')[0]}": pair for pair in settings}
    if found := [f"{name} holds {kind}" for name, text in texts.items() if (kind := redaction.kind_of(text, known))]:
        raise KaggleError(
            f"{'; '.join(found)}. What is built is pushed as it is: take it out, put it into the environment or attach it as a "
            f"secret in Kaggle's editor, and build again"
        )


def _without_outputs(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(notebook)


def payload(files: dict[str, bytes]) -> str:
    """The files as a tar, compressed, in lines of base64 text. Byte for byte the same for the same files."""
    return _packed(tuple(files.items()))


@functools.lru_cache(maxsize=1)
def _packed(files: tuple[tuple[str, bytes], ...]) -> str:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
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

Secrets are optional and attached once, in the editor (Add-ons > Secrets): {hub}, and {wandb}.
To go on with an earlier session, add its output as input. Afterwards the output holds `{run}.zip`, `{run}/adapter`
and `{run}/report.html`."""

_PARAMETERS = """PROFILE = {profile}
SETTINGS = {settings}
KERNEL = {kernel}
GO_ON_FROM = {sources}"""

_UNPACK = """import base64, io, os, sys, tarfile, time
from pathlib import Path

os.environ.setdefault("MEDCOT_SESSION_STARTED", str(time.time()))
sys.dont_write_bytecode = True  # what lies in the working folder at the end is output
working = Path(os.environ.get("MEDCOT_KAGGLE_ROOT") or "/kaggle", "working")
with tarfile.open(fileobj=io.BytesIO(base64.b64decode(PROJECT)), mode="r:xz") as archive:
    archive.extractall(working / "medcot", filter="data")
sys.path.insert(0, str(working / "medcot"))
print(f"unpacked to {working / 'medcot'}, Python {sys.version.split()[0]}")"""

_INSTALL = """from medcot_utils.machine import installing

installing.install()"""

_TAKE_UP = f"""from medcot_utils.series.kaggle import session

run_dir = working / "{RUN_NAME}"
profile = session.resolved_profile(PROFILE)
session.read_secrets(profile, SETTINGS)
session.take_up(run_dir, profile, SETTINGS, GO_ON_FROM)"""

_RUN = """exit_code = session.run_series(run_dir, profile, SETTINGS)"""
_REPORT = """session.show_report(run_dir)"""
_LEAVE = """session.leave_output(run_dir)
session.end(exit_code, KERNEL, profile, SETTINGS)"""


def cells(metadata: KernelMetadata, profile: str, settings: list[str], files: dict[str, bytes]) -> list[Any]:
    """The pushed notebook's cells, with fixed ids."""
    chosen = {"profile": json.dumps(profile), "settings": _list(settings), "kernel": json.dumps(metadata.id)}
    chosen["sources"] = _list(_earlier_sessions(metadata, settings))
    secrets = load_config("demo" if profile == "auto" else profile, settings).secrets
    names = {"hub": _either(secrets.huggingface), "wandb": _either(secrets.wandb)}
    sources: list[tuple[str, str, dict[str, Any]]] = [
        ("markdown", _INTRO.format(run=RUN_NAME, **names), {}),
        ("code", _PARAMETERS.format(**chosen), {"tags": ["parameters"]}),
        ("markdown", "## The project, as compressed text", {}),
        ("code", f'PROJECT = """\n{payload(files)}\n"""', {"_kg_hide-input": True, "jupyter": {"source_hidden": True}}),
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


def _earlier_sessions(metadata: KernelMetadata, settings: list[str]) -> list[str]:
    """The sources from which the session is meant to go on: other notebooks' output, and data sets that no setting reads from."""
    read = {part for pair in settings if "/kaggle/input/" in pair for part in re.split(r"[/=\s\"']", pair)}
    return [*metadata.kernel_sources, *(name for name in metadata.dataset_sources if name.partition("/")[2] not in read)]


def _either(names: Iterable[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _list(settings: list[str]) -> str:
    return "[\n" + "".join(f"    {setting!r},\n" for setting in settings) + "]" if settings else "[]"


def notebook_text(metadata: KernelMetadata, profile: str, settings: list[str], files: dict[str, bytes]) -> str:
    """The pushed notebook as text: no outputs, kernelspec python3."""
    notebook = nbformat.v4.new_notebook(cells=cells(metadata, profile, settings, files))
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"
