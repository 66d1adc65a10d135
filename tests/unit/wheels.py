"""The project's tracked files in a folder of their own, and the wheel and sdist made from them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tracked() -> set[str]:
    """Return the paths that git tracks and that are there, relative to the root of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if (ROOT / name).is_file()}


def copy_of_the_project(folder: Path) -> Path:
    """Copy the tracked files into `folder` and return it; a build then leaves nothing in the repository."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def build(kind: str, project: Path, into: Path) -> Path:
    """Build a `wheel` or an `sdist` with the installed setuptools, offline, and return its path."""
    into.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = into.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built
