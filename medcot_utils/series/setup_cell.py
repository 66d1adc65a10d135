"""Write the setup cell and the badges into the notebooks. The cell runs before the package is found, so it cannot import them.

Both depend on one setting, `repository` under [tool.medcot] in pyproject.toml. `make badges REPO=owner/name` sets it and writes
them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import nbformat

from medcot_utils.errors import MedcotError
from medcot_utils.machine.paths import HOME
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.files import write_atomic

MOST_LINES = 15
_SETTING = re.compile(r'^repository = "([^"]*)"', re.MULTILINE)
_ADDRESS = "**On Kaggle or Colab:** "
_WRITTEN = re.compile(rf"\[!\[Open in |{re.escape(_ADDRESS)}")  # the beginning of paragraphs that are written from the setting
# In the README and notebook 01, this replaces badges that would lead nowhere.
_WITHOUT_REPOSITORY = (
    f"{_ADDRESS}`medcot kaggle build` makes one notebook that carries the whole project and needs no address. To open "
    f"single notebooks there, put the project on GitHub and run `make badges REPO=owner/name`. It adds badges here and writes "
    f"the address into the setup cells. Until then, a notebook finds the project in its checkout or in a folder `medcot` "
    f"beside it."
)
_README_PLACE = "## The notebooks"  # the text that replaces badges comes before this heading

_TEMPLATE = """import os
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCE = "{repository}"  # owner/name on GitHub; `make badges` writes it
here = Path(os.environ.get("MEDCOT_HOME") or Path.cwd())  # the checkout, or what medcot run runs from
homes = [str(home) for home in (here, here.parent, here / "medcot") if (home / "medcot_utils").is_dir()]
sys.path[:0] = [home for home in homes if home not in sys.path]
if not find_spec("medcot_utils") and (not SOURCE or os.system({clone})):  # fmt: skip
    raise ModuleNotFoundError("{not_found}")
sys.path.append(str(Path.cwd() / "medcot"))
from medcot_utils.series.notebook import finish, start, table

run_dir = start(RUN_DIR)"""

_CLONE = 'f"git clone -q --depth 1 https://github.com/{SOURCE} medcot"'
_NOT_FOUND = "no medcot_utils: open its checkout, copy it to ./medcot, or set SOURCE"


class RepositoryError(MedcotError):
    """Say that the repository setting is missing or is not owner/name, and what to write."""


def setup_cell(repository: str) -> str:
    """Return the setup cell's source, the same in all seven notebooks."""
    return _TEMPLATE.format(repository=repository, clone=_CLONE, not_found=_NOT_FOUND)


# These entries collapse the cell, in this order: in JupyterLab, in Colab, on Kaggle.
COLLAPSED: dict[str, Any] = {"jupyter": {"source_hidden": True}, "cellView": "form", "_kg_hide-input": True}


def repository(home: Path = HOME) -> str:
    """Return owner/name from pyproject.toml; "" until it is known."""
    settings = tomllib.loads((home / "pyproject.toml").read_text(encoding="utf-8"))
    return settings.get("tool", {}).get("medcot", {}).get("repository", "")


def badges(repository: str, name: str = "01_setup") -> str:
    """Return one line of Markdown with links that open the notebook on Kaggle or Colab.

    Without a repository, return for notebook 01, and so for the README, what to do instead, and "" for the other notebooks."""
    if not repository:
        return _WITHOUT_REPOSITORY if name == "01_setup" else ""
    file = f"{repository}/blob/main/notebooks/{name}.ipynb"
    return (
        "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
        f"(https://kaggle.com/kernels/welcome?src=https://github.com/{file}) "
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{file})"
    )


def with_badges(text: str, line: str, place: int | str) -> str:
    """Return Markdown in which `line` replaces what `badges` wrote. An empty `line` only removes it.

    Args:
        place: the paragraph before which to insert the line, as its index (-1: the last) or its text."""
    paragraphs = [part for part in re.split(r"\n\n", text) if not _WRITTEN.match(part)]
    if line:
        paragraphs.insert(place if isinstance(place, int) else paragraphs.index(place), line)
    return "\n\n".join(paragraphs)


def changed(home: Path = HOME) -> dict[Path, Any]:
    """Return {file: new content} of the README and the notebooks whose badges or setup cell differ from the setting."""
    chosen, contents = repository(home), {}
    readme = (home / "README.md").read_text(encoding="utf-8")
    if (new := with_badges(readme, badges(chosen), 1 if chosen else _README_PLACE)) != readme:
        contents[home / "README.md"] = new
    for name in STEPS:
        path = home / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        before = nbformat.writes(notebook)
        intro, setup = notebook.cells[0], [cell for cell in notebook.cells if cell.cell_type == "code"][1]
        intro.source = with_badges(intro.source, badges(chosen, name), -1)
        setup.source = setup_cell(chosen)
        setup.metadata.update(COLLAPSED)
        if nbformat.writes(notebook) != before:
            contents[path] = notebook
    return contents


def faults(home: Path = HOME) -> list[str]:
    """Return one line for each file whose badges or setup cell differ from the setting."""
    fault = "badges or setup cell differ from the template: python -m medcot_utils.series.committed setup-cells"
    return [f"{path.name}: {fault}" for path in changed(home)]


def write(home: Path = HOME, new_repository: str | None = None) -> list[Path]:
    """Write badges and setup cells into the README and the notebooks. If `new_repository` is given, write it to pyproject.toml
    first.

    Return the files that changed; a second call changes nothing. Raises RepositoryError for a name that is not owner/name."""
    written = []
    if new_repository is not None:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*/[\w.-]+", new_repository):
            raise RepositoryError(f"{new_repository!r} is not owner/name: make badges REPO=owner/name, as on GitHub")
        path = home / "pyproject.toml"
        text = path.read_text(encoding="utf-8")
        if not _SETTING.search(text):
            raise RepositoryError('pyproject.toml has no line `repository = "..."` under [tool.medcot]: add one')
        if (new := _SETTING.sub(f'repository = "{new_repository}"', text)) != text:
            write_atomic(path, new)
            written.append(path)
    for path, content in changed(home).items():
        write_atomic(path, content if isinstance(content, str) else nbformat.writes(content) + "\n")
        written.append(path)
    return written
