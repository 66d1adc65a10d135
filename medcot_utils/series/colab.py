"""A run directory on Google Drive, which outlives a Colab session."""

from __future__ import annotations

import os
from pathlib import Path

from medcot_utils.errors import PlatformError
from medcot_utils.machine import paths
from medcot_utils.machine.paths import default_run_dir, expand_home, platform_name
from medcot_utils.plain_text import say

_MINE = "MyDrive"


def run_dir_of(chosen: str | int | Path) -> Path:
    """Return the run directory that a notebook's RUN_DIR names: `auto`, `drive` (a folder on Google Drive), or a path,
    relative to the folder that holds `runs`.

    Google Drive is mounted if the run directory is on it. A whole number is allowed, because `papermill -p RUN_DIR 20251125`
    passes one. Raises PlatformError, which says what to do, if Drive cannot be mounted or if papermill has changed the value in
    another way."""
    if isinstance(chosen, bool) or not isinstance(chosen, str | int | Path):
        raise PlatformError(
            f"RUN_DIR is {chosen!r}, not text: expected a path, auto, or drive. papermill -p reads numbers, True, and None; give "
            f"a path that looks like one with papermill -r RUN_DIR"
        )
    if chosen == "drive":
        folder = paths.COLAB_DRIVE / _MINE / "medcot" / "runs" / "notebooks"
    else:
        folder = default_run_dir() if chosen == "auto" else paths.working_root() / expand_home(str(chosen))
    if folder.resolve().is_relative_to(paths.COLAB_DRIVE.resolve()) and not (paths.COLAB_DRIVE / _MINE).is_dir():
        _mount(folder)
    return folder


def _mount(folder: Path) -> None:
    mount = f"from google.colab import drive; drive.mount({str(paths.COLAB_DRIVE)!r})"
    by_hand = f"Run `{mount}` in a cell, allow it, then run this cell again"
    if platform_name() != "colab":
        raise PlatformError(f"the run directory {folder} is on Google Drive, and only Colab can mount that: give another RUN_DIR")
    if "PAPERMILL" in os.environ:
        raise PlatformError(f"the run directory {folder} is on Google Drive, which is not mounted. {by_hand}")
    say("The run directory is on Google Drive: Colab now asks for your permission to mount it.")
    try:
        from google.colab import drive

        drive.mount(str(paths.COLAB_DRIVE))
    except Exception as error:  # refused, timed out, or no front end; Colab has its own exception for each
        raise PlatformError(f"Google Drive was not mounted ({type(error).__name__}: {error}). {by_hand}") from error
    if not (paths.COLAB_DRIVE / _MINE).is_dir():
        raise PlatformError(f"Google Drive was mounted, but shows no {_MINE}. {by_hand}")
