"""Half-written files: whose they are, and when they are removed."""

from __future__ import annotations

import os
import time

import pytest

from medcot_utils.machine.paths import host_name, place_beside, remove_leftovers

GONE = 4194305  # above Linux's largest process id


@pytest.mark.parametrize(
    ("name", "minutes", "kept"),
    [
        (f".merged.{host_name()}-{GONE}.tmp", 0, False),
        (f".merged.{host_name()}-{os.getpid()}.tmp", 600, True),
        (f".merged.another-node-{GONE}.tmp", 5, True),  # its processes cannot be seen from here
        (f".merged.another-node-{os.getpid()}.tmp", 600, False),
        (f".report.html.another-node-{GONE}.old", 600, False),
        (f".merged.{GONE}.tmp", 0, False),  # as earlier versions named them
        (f".merged.{os.getpid()}.tmp", 600, True),
    ],
)
def test_leftovers_are_judged_by_machine_and_process(tmp_path, name, minutes, kept):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "model.safetensors").write_text("half")
    then = time.time() - 60 * minutes
    for path in (folder / "model.safetensors", folder):
        os.utime(path, (then, then))
    remove_leftovers(tmp_path)
    assert folder.exists() is kept


def test_a_half_written_file_names_machine_and_process(tmp_path):
    assert place_beside(tmp_path / "plan.json").name == f".plan.json.{host_name()}-{os.getpid()}.tmp"
