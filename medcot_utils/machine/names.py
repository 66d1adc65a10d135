"""Names that come from outside, in an archive, a server's answer or somebody else's run, resolved below their folder.

Standard library only: a Kaggle session resolves names before the pinned stack is used."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from medcot_utils.errors import MedcotError, quote

_ADVICE = "it was made to reach other files of this machine, or it is damaged. Do not use it; ask its author for another"
_OF_THE_HUB = ("models--", "datasets--", "spaces--")  # how the folders of the Hub's cache begin


class OutsideError(MedcotError):
    """A name or a link leads out of its folder; the message names the file that holds it, and the entry."""


def require_inside(name: object, source: str) -> PurePosixPath:
    """Return a name from outside as a path that stays below every folder that it is joined to.

    Args:
        source: the file or answer that holds the name, for the message.

    Raises OutsideError for a name that is absolute, begins with a drive letter, has a part `..`, holds a NUL, or is no name."""
    fault = None
    if not isinstance(name, str) or not PurePosixPath(name).parts:
        fault = "is not a file name"
    elif "\0" in name:
        fault = "holds a NUL"
    elif re.match(r"[/\\]|[A-Za-z]:[/\\]", name):
        fault = "is an absolute path"
    elif ".." in re.split(r"[/\\]", name):
        fault = "leads out of its folder"
    if fault:
        raise OutsideError(f"{source}: {quote(name)} {fault}: {_ADVICE}")
    return PurePosixPath(name)


def require_plain(name: object, source: str) -> str:
    """Return a name from outside that is that of one file or folder, not a path. Raises OutsideError as `require_inside` does."""
    if len(require_inside(name, source).parts) > 1:
        raise OutsideError(f"{source}: {quote(name)} names a file in another folder: {_ADVICE}")
    return str(name)


def resolve_below(folder: Path, name: object, source: str) -> Path:
    """Return the path of a name from outside below its folder. Raises OutsideError as `require_inside` does, and for a name
    that a link in the folder leads out of it."""
    path = folder / require_inside(name, source)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise OutsideError(f"{source}: {quote(name)} leads out of {folder.name}/ through a link: {_ADVICE}")
    return path


def refuse_links_out(folder: Path) -> None:
    """Raise OutsideError for the first link below a run's folder that leads out of it; the folder itself may be one.

    The files of a snapshot in the Hub's cache are links to the blobs of the same repository, and those are allowed."""
    root = Path(os.path.realpath(folder))
    allowed = [root, *_blobs(root)]
    for link in _links(root):
        target = Path(os.path.realpath(link))
        if not any(target.is_relative_to(place) for place in allowed):
            raise OutsideError(
                f"{folder.absolute().name}/{link.relative_to(root)} is a link out of the run, to {target}: whoever made it may "
                f"reach other files of this machine. If it is your own, put the file or folder itself there; else do not use the "
                f"run"
            )


def _links(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):  # it does not follow links
        paths = (Path(place, name) for name in sorted((*folders, *files)))
        yield from (path for path in paths if path.is_symlink())


def _blobs(root: Path) -> list[Path]:
    snapshots = [folder for folder in (root, *root.parents) if folder.parent.name == "snapshots"]
    return [one.parents[1] / "blobs" for one in snapshots if one.parents[1].name.startswith(_OF_THE_HUB)]
