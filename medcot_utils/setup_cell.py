"""What every notebook has in common and the package cannot give it: the setup cell, which runs before the package is found,
and the badges. Both are written from one setting, `repository` under [tool.medcot] in pyproject.toml.

python -m medcot_utils.setup_cell [owner/name]   writes them; with a name, or "" for none, sets it first"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat

from medcot_utils.errors import MedcotError
from medcot_utils.layout import STEPS
from medcot_utils.run import write_atomic

HOME = Path(__file__).parent.parent
MOST_LINES = 15
_SETTING = re.compile(r'^repository = "([^"]*)"', re.MULTILINE)
_BADGES = re.compile(r"^\[!\[Open in .*\n\n?", re.MULTILINE)

_TEMPLATE = """import importlib.util, os, sys
from pathlib import Path

SOURCE = "{repository}"  # owner/name on GitHub, written by `make badges REPO=owner/name`
inputs = Path(os.environ.get("MEDCOT_KAGGLE_ROOT", "/kaggle"), "input").rglob("medcot_utils/notebook.py")
homes = [Path.cwd(), Path.cwd().parent, Path.cwd() / "medcot", *(file.parents[1] for file in inputs)]
sys.path[:0] = [str(home) for home in homes if (home / "medcot_utils").is_dir()]
if not importlib.util.find_spec("medcot_utils"):
    if not SOURCE or os.system(f"git clone -q --depth 1 https://github.com/{{SOURCE}} medcot"):
        raise ModuleNotFoundError("{not_found}")
    sys.path.insert(0, str(Path.cwd() / "medcot"))
from medcot_utils import installing; installing.ensure()
from medcot_utils.notebook import finish, start, table

run_dir = start(RUN_DIR)"""

_NOT_FOUND = "medcot_utils is not here: open this notebook in its checkout, or add the project to this session's inputs"


class RepositoryError(MedcotError):
    """The repository setting is missing or no owner/name; the message says what to write."""


def setup_cell(repository: str) -> str:
    """The setup cell's source, the same in all seven notebooks."""
    return _TEMPLATE.format(repository=repository, not_found=_NOT_FOUND)


def repository(home: Path = HOME) -> str:
    """owner/name from pyproject.toml; empty while it is not known."""
    settings = tomllib.loads((home / "pyproject.toml").read_text(encoding="utf-8"))
    return settings.get("tool", {}).get("medcot", {}).get("repository", "")


def badges(repository: str, name: str = STEPS and "01_setup") -> str:
    """One line of Markdown: open the notebook at Kaggle or Colab. Empty without a repository."""
    if not repository:
        return ""
    file = f"{repository}/blob/main/notebooks/{name}.ipynb"
    return (
        "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
        f"(https://kaggle.com/kernels/welcome?src=https://github.com/{file}) "
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{file})"
    )
