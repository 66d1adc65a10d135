"""The platform, and the places on it: runs, large files that may end with the session, caches, and free disk space."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from pathlib import Path

import psutil

from medcot_utils.errors import PlatformError
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


def working_root() -> Path:
    """Return the folder that `runs` is in: the platform's working folder, or the one that commands are started in, which is the
    folder above `notebooks` for a notebook that is opened by hand."""
    roots = {"kaggle": kaggle_root() / "working", "colab": Path("/content")}
    if root := roots.get(platform_name()):
        return root
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def default_run_dir() -> Path:
    """Return where notebooks opened by hand keep their run: MEDCOT_RUN_DIR, else a place in the platform's working folder."""
    return working_root() / expand_home(os.environ.get("MEDCOT_RUN_DIR") or "runs/notebooks")


def display_path(folder: Path) -> str:
    """Return a folder as a reader should see it: from `working_root` on if it lies below that, as in runs/demo; else its name."""
    whole, root = folder.absolute(), working_root()
    below = whole.is_relative_to(root) and whole != root
    return whole.relative_to(root).as_posix() if below else whole.name


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone (mode 0700). One that is there stays as it is.

    A Kaggle or Colab session has one user, and its output is collected by others: there the modes are the usual ones."""
    mode = 0o700 if platform_name() == "local" else 0o777
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=mode, exist_ok=True)


def require_private(folder: Path, variable: str, may_be_shared: bool = False) -> None:
    """Raise PlatformError, naming the variable that chooses another folder, if a folder was made by another user than this one
    or root, or others may write to it: a model found there could be theirs. One that does not exist is nobody's, and a Kaggle
    or Colab session has one user.

    Args:
        may_be_shared: it may be as /tmp is, writable by all with the sticky bit, since what lies in it is checked itself."""
    if platform_name() != "local":
        return
    try:
        owners, found = {folder.lstat().st_uid}, folder.stat()
    except OSError:
        return  # whether it can be made is for `require_writable`
    if others := (owners | {found.st_uid}) - {0, os.geteuid()}:
        fault, remedy = f"belongs to another user, {_user_name(others.pop())}", ""
    elif _others_may_write(found) and not (may_be_shared and found.st_mode & stat.S_ISVTX) and _keeps_modes(folder):
        fault, remedy = "can be written by other users", f"if you trust its content, chmod go-w {folder}; else "
    else:
        return
    raise PlatformError(
        f"{folder} {fault}, who could have put a model there: {remedy}set {variable} to a folder that only you can write to"
    )


def _others_may_write(found: os.stat_result) -> bool:
    """Return whether a mode lets others write. The group that many systems give each user, named like the user, is no other."""
    import grp  # here, because Windows is told in one line that it will not do

    if found.st_mode & stat.S_IWOTH or not found.st_mode & stat.S_IWGRP:
        return bool(found.st_mode & stat.S_IWOTH)
    try:
        group = grp.getgrgid(found.st_gid)
    except KeyError:
        return True
    return group.gr_name != _user_name(os.geteuid()) or bool(group.gr_mem)


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _keeps_modes(folder: Path) -> bool:
    """Return whether the file system knows users. One that does not, as on a memory stick, shows one mode for everything."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            return not _others_may_write(Path(made).stat())
    except OSError:
        return True


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
    made again. Raises PlatformError as `require_private` does."""
    scratch = os.environ.get("MEDCOT_SCRATCH", _scratch_of_the_session(run_dir))
    if not scratch:
        return run_dir
    # The second is where an earlier version kept a run that it reached through a link.
    ways = (run_dir.resolve(), run_dir.absolute())
    names = [f"{way.name}-{hashlib.sha256(str(way).encode()).hexdigest()[:8]}" for way in ways]
    places = [expand_home(scratch) / "medcot" / name for name in names]
    chosen = next((place for place in places if place.exists()), places[0])
    for folder in (chosen.parents[1], chosen.parent, chosen):
        require_private(folder, "MEDCOT_SCRATCH", may_be_shared=folder != chosen)
    return chosen


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
    """Return where converted models are kept between runs: MEDCOT_CACHE, else the user's cache folder.

    Raises PlatformError as `require_private` does."""
    import platformdirs

    folder = expand_home(os.environ.get("MEDCOT_CACHE") or platformdirs.user_cache_dir("medcot"))
    require_private(folder, "MEDCOT_CACHE", may_be_shared=True)
    return folder
