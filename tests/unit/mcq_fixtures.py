"""Files of multiple-choice questions, for their tests."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def write(tmp_path):
    def make(*rows):
        path = tmp_path / "own.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return str(path)

    return make
