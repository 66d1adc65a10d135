"""Names from outside: which stay below their folder, and which are refused in one line with the file and the entry."""

from __future__ import annotations

import pytest

from medcot_utils.machine.names import OutsideError, refuse_links_out, require_inside, require_plain, resolve_below

OUTSIDE = ["../x", "a/../../x", "..", "/etc/x", "//server/x", "C:\\x", "c:/x", "..\\x", "\\\\server\\x", "a\0b", "", ".", 7, None]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_is_one_line_with_the_entry(name, tmp_path):
    with pytest.raises(OutsideError) as raised:
        resolve_below(tmp_path, name, "run.zip")
    line = str(raised.value)
    assert line.startswith(f"run.zip: {name!r} ") and "\n" not in line and "Do not use it" in line


@pytest.mark.parametrize("name", ["adapter/weights.bin", "a..b", ".hidden", ".../x", "c:run-0a1b2c3d", "Ünï/\u202ex"])
def test_a_name_below_its_folder_is_kept_as_it_is(name, tmp_path):
    assert resolve_below(tmp_path, name, "run.zip") == tmp_path / name == tmp_path / require_inside(name, "run.zip")


def test_a_plain_name_is_no_path():
    assert require_plain("run-0a1b2c3d", "tracking.json, id") == "run-0a1b2c3d"
    for name in ("a/b", "../a", ""):
        with pytest.raises(OutsideError, match=r"^tracking\.json, id: "):
            require_plain(name, "tracking.json, id")


@pytest.fixture
def run(tmp_path):
    """A run directory, with something beside it that is nobody else's."""
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "weights.bin").write_text("weights")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "key").write_text("own")
    return tmp_path / "run"


@pytest.mark.parametrize("target", ["../../own", "../../own/key", "../../own/not there yet", "/etc/hostname"])
def test_a_link_out_of_a_run_is_one_line_with_the_link(target, run):
    (run / "adapter" / "link").symlink_to(target)
    with pytest.raises(OutsideError, match=r"^run/adapter/link is a link out of the run, to .*If it is your own, put"):
        refuse_links_out(run)
    with pytest.raises(OutsideError, match=r"^manifest: 'adapter/link' leads out of run/ through a link"):
        resolve_below(run, "adapter/link", "manifest")


def test_links_within_a_run_and_to_a_run_are_allowed(run):
    (run / "latest").symlink_to("adapter")
    (run / "log").symlink_to(run / "adapter" / "weights.bin")
    (run / "gone").symlink_to("adapter/nothing")
    (run.parent / "here").symlink_to(run)
    for way in (run, run.parent / "here"):
        refuse_links_out(way)


def test_a_snapshot_in_the_hubs_cache_may_link_to_its_blobs(tmp_path):
    repository = tmp_path / "hub" / "datasets--ann--run"
    snapshot = repository / "snapshots" / "0a1b" / "run"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "2c3d").write_text("{}")
    (snapshot / "config.json").symlink_to("../../../blobs/2c3d")
    refuse_links_out(snapshot)
    (snapshot / "plan.json").symlink_to("../../../../models--own--private/blobs/4e5f")
    with pytest.raises(OutsideError, match=r"^run/plan\.json is a link out of the run"):
        refuse_links_out(snapshot)
