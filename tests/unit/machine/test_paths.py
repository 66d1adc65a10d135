"""Half-written files: whose they are, and when they are removed. Folders on a machine that others use too."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from medcot_utils.errors import PlatformError
from medcot_utils.machine.paths import (
    cache_dir,
    host_name,
    make_private,
    place_beside,
    remove_leftovers,
    require_private,
    scratch_dir,
)
from medcot_utils.models.embedded import _cached

GONE = 4194305  # above Linux's largest process id
OTHER = 54321  # a user's id


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


# --- folders on a machine that others use too ------------------------------------------------------------------------


@pytest.fixture
def give_away(monkeypatch):
    """`give_away(folder)` makes another user its owner; for whoever may not, this user becomes another one."""

    def give(path):
        if os.geteuid() == 0:
            os.chown(path, OTHER, OTHER, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: OTHER)

    return give


@pytest.fixture
def umask():
    before = os.umask(0)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_new_folder_is_its_users_alone_whatever_the_umask(tmp_path, umask, mask):
    umask(mask)
    (tmp_path / "there").mkdir(mode=0o755)
    make_private(tmp_path / "there" / "new" / "run")
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("there", "there/new", "there/new/run")]
    assert modes == [0o755 & ~mask, 0o700, 0o700]


def test_a_session_that_has_one_user_keeps_the_usual_modes(tmp_path, umask, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    umask(0o022)
    make_private(tmp_path / "run")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("made", [lambda path: path.mkdir(), lambda path: path.symlink_to(path.parent)], ids=["folder", "link"])
def test_what_another_user_made_is_refused_in_one_line(tmp_path, give_away, made):
    made(tmp_path / "cache")
    give_away(tmp_path / "cache")
    with pytest.raises(
        PlatformError, match=r"/cache belongs to another user, .*: set MEDCOT_CACHE to a folder that only you can write to"
    ):
        require_private(tmp_path / "cache", "MEDCOT_CACHE")


@pytest.mark.parametrize(
    ("mode", "group", "shared", "refused"),
    [
        (0o700, None, False, False),
        (0o755, None, False, False),
        (0o777, None, False, True),
        (0o777, None, True, True),
        (0o1777, None, True, False),  # as /tmp
        (0o1777, None, False, True),
        (0o775, "own", False, False),  # many systems give each user a group, and let it write
        (0o775, "another", False, True),
    ],
)
def test_a_folder_that_others_may_write_to_is_refused(tmp_path, monkeypatch, mode, group, shared, refused):
    import grp
    import pwd

    user = pwd.getpwuid(os.geteuid()).pw_name
    named = {"own": grp.struct_group((user, "x", 1, [])), "another": grp.struct_group(("staff", "x", 1, []))}
    monkeypatch.setattr(grp, "getgrgid", lambda _: named[group])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    if not refused:
        return require_private(tmp_path / "cache", "MEDCOT_CACHE", shared)
    with pytest.raises(PlatformError, match=r"/cache can be written by other users, .*chmod go-w .*; else set MEDCOT_CACHE"):
        require_private(tmp_path / "cache", "MEDCOT_CACHE", shared)


def test_a_file_system_without_users_is_no_fault(tmp_path, monkeypatch):
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick").chmod(0o777)

    class AllOpen(tempfile.TemporaryDirectory):
        def __enter__(self):
            made = super().__enter__()
            Path(made).chmod(0o777)
            return made

    monkeypatch.setattr(tempfile, "TemporaryDirectory", AllOpen)
    require_private(tmp_path / "stick", "MEDCOT_CACHE")


def test_a_model_that_another_user_left_is_not_loaded(tmp_path, monkeypatch, give_away):
    """In a folder like /tmp, which is nobody's, whoever comes first takes the name."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setenv("MEDCOT_CACHE", str(shared))
    assert cache_dir() == shared
    (shared / "model").mkdir()
    give_away(shared / "model")
    with pytest.raises(PlatformError, match="belongs to another user"):
        _cached("model", lambda folder: None)


@pytest.mark.parametrize("planted", [".", "medcot", "medcot/run"])
def test_a_scratch_folder_that_another_user_made_is_refused(tmp_path, monkeypatch, give_away, planted):
    scratch, run_dir = tmp_path / "scratch", tmp_path / "run"
    monkeypatch.setenv("MEDCOT_SCRATCH", str(scratch))
    folder = scratch / planted.replace("run", scratch_dir(run_dir).name)
    folder.mkdir(parents=True)
    assert scratch_dir(run_dir).parent == scratch / "medcot", "one's own is taken"
    give_away(folder)
    with pytest.raises(PlatformError, match=r"belongs to another user, .*: set MEDCOT_SCRATCH to a folder"):
        scratch_dir(run_dir)
