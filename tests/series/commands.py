"""Start `medcot` on a run, and see what it did there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

MEDCOT = Path(sys.executable).with_name("medcot")


def medcot(*arguments):
    # On the CPU and with one thread: the same bits everywhere, and no threads that wait for each other on a busy machine.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [str(MEDCOT), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=1200, check=False
    )


def succeed(*arguments):
    result = medcot(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def notebook_times(run_dir):
    return {path.stem: path.stat().st_mtime_ns for path in (run_dir / "notebooks").glob("*.ipynb")}


def redone(before, run_dir):
    """The notebooks whose executed copy was written anew since `before`."""
    return sorted(name for name, time in notebook_times(run_dir).items() if before.get(name) != time)


def states(run_dir):
    return {step["name"]: step["state"] for step in json.loads(succeed("status", run_dir, "--json").stdout)["steps"]}


def manifest(run_dir):
    return json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
