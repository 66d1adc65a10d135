"""How a process ended, in words."""

from __future__ import annotations

import pytest

from medcot_utils.machine.processes import describe_exit, read_last_line


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (3, "ended with exit code 3"),
        (0, "ended with exit code 0"),
        (-9, "killed by signal 9, as a machine out of main memory does"),
        (-6, "killed by signal 6"),
    ],
)
def test_an_exit_code_is_told_in_words(code, told):
    assert describe_exit(code) == told


def test_the_end_of_a_logs_last_line_is_read(tmp_path):
    log = tmp_path / "log"
    assert read_last_line(log) == ""
    log.write_bytes(b"first\n\xffsecond " + b"x" * 400 + b"\n\n")
    assert read_last_line(log) == "x" * 300
