"""What the documents name exists: tests, files and notebooks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests" / "README.md"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_test_and_every_linked_file_that_a_document_names_is_there(document):
    text, missing = document.read_text(encoding="utf-8"), []
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        path = ROOT / file
        if not path.exists() or (name and f"def {name}(" not in path.read_text(encoding="utf-8")):
            missing.append(f"{file}::{name}")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        if not (document.parent / link).exists():
            missing.append(link)
    assert missing == []


def test_the_articles_nine_steps_have_a_notebook_and_a_test_each():
    text = (ROOT / "docs" / "reproducing-the-article.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \|(.*)\|$", text, flags=re.M)
    assert [number for number, _ in rows] == [str(number) for number in range(1, 10)]
    assert all("../notebooks/" in row and "`tests/" in row for _, row in rows)
