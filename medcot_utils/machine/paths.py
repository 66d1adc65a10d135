"""The platform, and the places on it: runs, large files that may end with the session, caches, and free disk space."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import time
from pathlib import Path

import psutil

from medcot_utils.machine.installing import HOME

PACKAGE = HOME / "medcot_utils"
GIB = 1024**3

# Kaggle keeps 20 GB of output and refuses more; beside it, the machine's own disk has several times that, until the session ends.
KAGGLE_QUOTA_GIB = 20e9 / GIB
# On Colab: the machine's own disk, which ends with the session, and Google Drive, which outlives it and holds 15 GB for free.
COLAB_SCRATCH, COLAB_DRIVE = Path("/content/medcot-scratch"), Path("/content/drive")
MORE_ROOM = (
    "Free some space there, or take a larger disk: --run-dir for the run, MEDCOT_SCRATCH for the merged model, HF_HOME for "
    "downloads, MEDCOT_CACHE for the embedded models"
)

_ABANDONED_SECONDS = 3600  # a merged model of 16 GB is written in less, file by file


def platform_name() -> str:
    """Return `kaggle`, `colab` or `local`, by environment variables: the IPython shell's name is lost under papermill."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in os.environ else "local"


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` or `~name` at its start replaced by that home folder; as it is if there is no such folder."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises where there is none


def kaggle_root() -> Path:
    """Return the folder of Kaggle's `working` and `input`; MEDCOT_KAGGLE_ROOT puts another in its place for a rehearsal."""
    return expand_home(os.environ.get("MEDCOT_KAGGLE_ROOT") or "/kaggle")


def default_run_dir() -> Path:
    """Return where notebooks opened by hand keep their run: MEDCOT_RUN_DIR, else a place in the platform's working folder."""
    if chosen := os.environ.get("MEDCOT_RUN_DIR"):
        return expand_home(chosen)
    roots = {"kaggle": kaggle_root() / "working", "colab": Path("/content")}
    root = roots.get(platform_name())
    if root is None:
        here = Path.cwd()
        root = here.parent if here.name == "notebooks" else here
    return root / "runs" / "notebooks"


def disk_of(folder: Path) -> tuple[int, Path]:
    """Return the device number and the nearest existing folder of where `folder` is or would be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev, folder


def under_quota(folder: Path) -> bool:
    """Return whether files written there count as a Kaggle notebook's output."""
    return platform_name() == "kaggle" and folder.resolve().is_relative_to((kaggle_root() / "working").resolve())


def disk_free_gib(folder: Path) -> float:
    """Return the free GiB where `folder` is or would be made; on Kaggle, no more than the quota of /kaggle/working leaves."""
    place = disk_of(folder)[1]
    free = shutil.disk_usage(place).free / GIB
    if under_quota(place):
        free = min(free, max(0.0, KAGGLE_QUOTA_GIB - folder_gib(kaggle_root() / "working")))
    return free


def scratch_dir(run_dir: Path) -> Path:
    """Return the folder of a run's large artifacts: below MEDCOT_SCRATCH if that is set; below /kaggle/tmp for a run in Kaggle's
    output folder, which holds 20 GB; on Colab's own disk for a run on Google Drive; else the run directory itself.

    It is the same folder through whatever links the run is reached. It may be gone in the next session; its artifacts are then
    made again."""
    scratch = os.environ.get("MEDCOT_SCRATCH", _scratch_of_the_session(run_dir))
    if not scratch:
        return run_dir
    # The second is where an earlier version kept a run that it reached through a link.
    ways = (run_dir.resolve(), run_dir.absolute())
    names = [f"{way.name}-{hashlib.sha256(str(way).encode()).hexdigest()[:8]}" for way in ways]
    places = [expand_home(scratch) / "medcot" / name for name in names]
    return next((place for place in places if place.exists()), places[0])


def _scratch_of_the_session(run_dir: Path) -> Path | None:
    if under_quota(run_dir):
        return kaggle_root() / "tmp"
    if platform_name() == "colab" and run_dir.resolve().is_relative_to(COLAB_DRIVE.resolve()):
        return COLAB_SCRATCH
    return None


def ends_with_the_session(folder: Path) -> bool:
    """Return whether files there are lost when this Kaggle or Colab session ends: all but Kaggle's output and Google Drive."""
    lasting = {"kaggle": kaggle_root() / "working", "colab": COLAB_DRIVE}.get(platform_name())
    return lasting is not None and not folder.resolve().is_relative_to(lasting.resolve())


def host_name() -> str:
    """Return this machine's name as it can stand in a file name."""
    return re.sub(r"[^\w-]", "_", platform.node()) or "localhost"


def place_beside(final: Path, kind: str = "tmp") -> Path:
    """Return where this process writes a file or folder before it takes the place of `final`: `.NAME.HOST-PID.tmp`."""
    return final.with_name(f".{final.name}.{host_name()}-{os.getpid()}.{kind}")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written (see `place_beside`): of this machine, if the process is gone; of another
    one, whose processes cannot be seen from here, if nothing has been written to it for an hour. Earlier versions wrote no
    machine's name, and theirs count as this machine's."""
    for path in folder.glob(".*"):
        leftover = re.fullmatch(r"\..+\.(?:([\w-]+)-)?(\d+)\.(?:tmp|old)", path.name)
        if not leftover:
            continue
        here = leftover[1] in (None, host_name())
        gone = not psutil.pid_exists(int(leftover[2])) if here else time.time() - _last_written(path) > _ABANDONED_SECONDS
        if gone and path.is_dir():
            shutil.rmtree(path)
        elif gone:
            path.unlink(missing_ok=True)


def _last_written(path: Path) -> float:
    return max(file.stat().st_mtime for file in [path, *path.rglob("*")])


def folder_gib(folder: Path) -> float:
    """Return the GiB of the files below `folder`; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / GIB


def cache_dir() -> Path:
    """Return where converted models are kept between runs: MEDCOT_CACHE, else the user's cache folder."""
    import platformdirs

    return expand_home(os.environ.get("MEDCOT_CACHE") or platformdirs.user_cache_dir("medcot"))
