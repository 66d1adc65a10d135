"""The table of docs/models.md holds what `make families` made: every family, every notebook, and no failure."""

from __future__ import annotations

import re
from pathlib import Path

from tiny_families import FAMILIES

from medcot_utils.run.artifacts import STEPS

ROOT = Path(__file__).parents[2]


def test_the_table_has_every_family_with_every_notebook():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    made = re.search(r"<!-- made by make families: begin -->\n(.*)<!-- made by make families: end -->", text, re.DOTALL)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines() if line.startswith("|")]
    assert rows[0][2:9] == [step[:2] for step in STEPS]
    assert {row[0]: row[2:9] for row in rows[2:]} == {family.title: ["yes"] * 7 for family in FAMILIES.values()}
    assert "failed:" not in made


def test_a_familys_settings_are_told():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(f"`{setting}`" in text for family in FAMILIES.values() for setting in family.settings)
