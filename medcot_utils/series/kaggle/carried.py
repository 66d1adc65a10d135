"""The content of a pushed notebook: package, notebooks, and pins as compressed text, checked for secrets."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import lzma
import subprocess
import tarfile
import textwrap
import tomllib
from pathlib import Path

import nbformat

from medcot_utils.config import load_config
from medcot_utils.machine import redaction
from medcot_utils.machine.paths import HOME
from medcot_utils.run.artifacts import STEPS
from medcot_utils.series.kaggle.metadata import KaggleError

_CARRIED = ("pyproject.toml", "requirements.txt", "requirements-cpu.txt", "requirements-nodeps.txt", "LICENSE")


def carried_files() -> tuple[dict[str, bytes], list[str]]:
    """Return {path in the project: content} of the files that a bare session needs, and the paths of other files beside them.

    The files are the seven notebooks without their outputs, the pins, and the package's own files: those that git tracks or,
    without git, those that pyproject.toml lists. Raises KaggleError if this is not a checkout."""
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
        if Path(top.strip()).resolve() == HOME.resolve():  # else HOME is inside another project's checkout
            listed = subprocess.run([*git, "ls-files", "-z", "medcot_utils"], capture_output=True, text=True, check=True).stdout
            return [HOME / name for name in listed.split("\0") if name and (HOME / name).is_file()]
    tool = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name: HOME / name.replace(".", "/") for name in tool["package-data"]}
    data = [path for name, globs in tool["package-data"].items() for one in globs for path in folders[name].glob(one)]
    return [*(HOME / "medcot_utils").rglob("*.py"), *data]


def refuse_secrets(files: dict[str, bytes], settings: list[str]) -> None:
    """Raise KaggleError if a carried file or a setting holds a secret, known here or by its form. The error omits the secret."""
    known = redaction.known_secrets(load_config("smoke", [pair for pair in settings if pair.startswith("secrets.")]).secrets)
    texts = {name: content.decode(errors="replace") for name, content in files.items()}
    texts |= {f"--set {pair.partition('=')[0]}": pair for pair in settings}
    if found := redaction.name_holders(texts, known):
        raise KaggleError(
            f"{'; '.join(found)}. The build is pushed as it is: remove the secret, set it in the environment or attach it "
            f"in Kaggle's editor, and build again"
        )


def _without_outputs(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(notebook)


def payload(files: dict[str, bytes]) -> str:
    """Return the files as a compressed tar in lines of base64 text. The same files give the same bytes."""
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
