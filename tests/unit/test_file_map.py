"""The file map in CONTRIBUTING.md is the tree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "medcot_utils"


def modules():
    """{(room, module)} of the package: `kaggle/build` for series/kaggle/build.py, room `root` for what stands in none."""
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {tuple(path.as_posix().split("/", 1)) if len(path.parts) > 1 else ("root", path.name) for path in paths}


def rows():
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## File map")[2].partition("\n## ")[0]
    return re.findall(r"^\| (\S+) \| (\S+) \| (\S.*) \|$", section.partition("| --- |")[2], flags=re.MULTILINE)


def test_the_file_map_names_every_module_and_no_other():
    listed = [(room, module) for room, module, _ in rows()]
    assert sorted(set(listed)) == sorted(listed), "a module is listed twice"
    assert sorted(modules() - set(listed)) == [], "in the tree, not in the map"
    assert sorted(set(listed) - modules()) == [], "in the map, not in the tree"


def test_the_rooms_stand_in_the_order_of_the_import_contract():
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("layers = [")[2].partition("]")[0]
    floors = [name for name in re.findall(r'"medcot_utils\.(\w+)', contract) if (PACKAGE / name).is_dir()]
    assert list(dict.fromkeys(room for room, _, _ in rows())) == [*floors, "root"]
