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
        (".merged.HERE-GONE.tmp", 0, False),
        (".merged.HERE-OURS.tmp", 600, True),
        (".merged.another-node-GONE.tmp", 5, True),  # its processes cannot be seen from here
        (".merged.another-node-OURS.tmp", 600, False),
        (".report.html.another-node-GONE.old", 600, False),
        (".merged.GONE.tmp", 0, False),  # as earlier versions named them
        (".merged.OURS.tmp", 600, True),
    ],
)
def test_leftovers_are_judged_by_machine_and_process(tmp_path, name, minutes, kept):
    for word, meant in {"HERE": host_name(), "GONE": GONE, "OURS": os.getpid()}.items():
        name = name.replace(word, str(meant))
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
