"""Call `medcot` as a process, and read the one line that it says of bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MEDCOT = Path(sys.executable).with_name("medcot")


def medcot(*arguments, cwd=None):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [str(MEDCOT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)


def the_one_line(result):
    """The line on stderr, after checking that it is the only one and that the command ended as it should."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert len(lines) == 1 and lines[0].startswith("medcot: "), result.stderr
    return lines[0]
