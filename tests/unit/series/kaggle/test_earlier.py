"""Runs of earlier sessions among the inputs: what is no run, or no longer one, stops only itself."""

from __future__ import annotations

import json
import shutil
import stat
import time
import zipfile
from pathlib import Path

import pytest

from medcot_utils.errors import MedcotError
from medcot_utils.series.kaggle.earlier import copy_run, find_earlier, unzip

CONFIG = json.dumps({"profile": "smoke", "model": {"name": "some/model"}}).encode()
MANIFEST = json.dumps(
    {"format": 1, "steps": {"01_setup": {"state": "done"}}, "artifacts": {"machine": {"made": "2026"}}}
).encode()

ODD = {
    "no UTF-8": (b'{"steps": {"\xe9": 1}}', CONFIG),
    "UTF-16": (MANIFEST.decode().encode("utf-16"), CONFIG),
    "too deep": (b"[" * 100_000, CONFIG),
    "too large": (b" " * 20_000_000, CONFIG),
    "another tool's": (b'{"name": "page", "icons": []}', CONFIG),
    "a list": (b"[1, 2]", CONFIG),
    "steps that are texts": (b'{"steps": {"01_setup": "done"}, "artifacts": {}}', CONFIG),
    "artifacts that are numbers": (b'{"steps": {}, "artifacts": {"machine": 7}}', CONFIG),
    "a time that is none": (b'{"steps": {}, "artifacts": {"machine": {"made": 7}}}', CONFIG),
    "a model that is none": (MANIFEST, b'{"profile": "smoke", "model": {"name": []}}'),
    "a configuration too deep": (MANIFEST, b'{"model":' * 100_000),
}


def put(folder: Path, packed: bool, manifest: bytes, config: bytes = CONFIG, inside: str = "medcot-run") -> None:
    folder.mkdir(parents=True)
    if not packed:
        (folder / "manifest.json").write_bytes(manifest)
        (folder / "config.json").write_bytes(config)
        return
    with zipfile.ZipFile(folder / "medcot-run.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{inside}/manifest.json", manifest)
        archive.writestr(f"{inside}/config.json", config)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_manifest_stops_only_itself_with_one_line(tmp_path, kind, packed):
    said = []
    put(tmp_path / "good", packed, MANIFEST)
    put(tmp_path / "odd", packed, *ODD[kind])
    (found,) = find_earlier(tmp_path, said.append)
    assert (found.steps_done, found.model) == (1, "some/model") and found.source.is_relative_to(tmp_path / "good")
    (line,) = said
    assert str(tmp_path / "odd") in line and "left alone" in line and "\n" not in line and len(line) < 400


def test_a_manifest_with_a_byte_order_mark_is_a_runs(tmp_path):
    put(tmp_path / "edited", False, b"\xef\xbb\xbf" + MANIFEST, b"\xef\xbb\xbf" + CONFIG)
    assert [run.model for run in find_earlier(tmp_path)] == ["some/model"]


def test_files_that_look_like_no_run_at_all_are_not_mentioned(tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "manifest.json").write_bytes(b"\xff")
    (tmp_path / "manifest.json").mkdir()
    said = []
    assert (find_earlier(tmp_path, said.append), said) == ([], [])


@pytest.mark.parametrize("content", [b"", b"PK not really", b"PK\x03\x04" + bytes(100)])
def test_a_broken_zip_stops_only_itself_with_one_line(tmp_path, content):
    (tmp_path / "other.zip").write_bytes(content)
    put(tmp_path / "good", True, MANIFEST)
    said = []
    assert len(find_earlier(tmp_path, said.append)) == 1
    assert len(said) == 1 and "other.zip" in said[0]


@pytest.mark.parametrize("inside", ["/etc", "../..", "a/../../.."])
def test_a_zip_whose_run_lies_outside_is_no_run(tmp_path, inside):
    put(tmp_path / "x", True, MANIFEST, inside=inside)
    assert find_earlier(tmp_path, print) == []


def test_a_zip_of_many_manifests_is_looked_through_quickly(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for number in range(4000):
            archive.writestr(f"{number}/manifest.json", b"{}")
    began = time.process_time()
    assert find_earlier(tmp_path, print) == []
    assert time.process_time() - began < 1


def test_a_zip_that_the_disk_cannot_hold_is_not_unpacked(tmp_path, monkeypatch):
    put(tmp_path / "in", True, MANIFEST)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("medcot_utils.series.kaggle.earlier.shutil.disk_usage", lambda path: usage._replace(free=50))
    (tmp_path / "run").mkdir()
    with pytest.raises(MedcotError, match=r"medcot-run\.zip holds 0\.0 GB unpacked, but only 0\.0 GB are free"):
        unzip(tmp_path / "in" / "medcot-run.zip", tmp_path / "run", Path("medcot-run"))
    assert [*(tmp_path / "run").iterdir()] == []
    monkeypatch.undo()
    copy_run(find_earlier(tmp_path)[0], tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == MANIFEST


# --- names and links that lead out of a run ----------------------------------------------------------------------------

LINK = zipfile.ZipInfo("medcot-run/adapter/link")
LINK.create_system, LINK.external_attr = 3, (stat.S_IFLNK | 0o777) << 16


@pytest.mark.parametrize(
    ("member", "shown"),
    [
        ("medcot-run/../../escaped", "'medcot-run/../../escaped' leads out of its folder"),
        ("/escaped", "'/escaped' is an absolute path"),
        ("C:\\escaped", "'C:\\\\escaped' is an absolute path"),
        ("medcot-run/..\\escaped", "'medcot-run/..\\\\escaped' leads out of its folder"),
        ("medcot-run/plan.json\0/../escaped", "holds a NUL"),
        (LINK, "medcot-run/adapter/link is a link"),
    ],
)
def test_a_zip_with_a_member_that_leads_out_is_left_alone(tmp_path, member, shown):
    put(tmp_path / "in", True, MANIFEST)
    with zipfile.ZipFile(tmp_path / "in" / "medcot-run.zip", "a") as archive:
        if isinstance(member, str):  # ZipInfo cuts a name off at a NUL; another program's zip need not
            name, member = member, zipfile.ZipInfo("x")
            member.filename = name
        archive.writestr(member, "/etc/hostname")
    said = []
    assert find_earlier(tmp_path, said.append) == []
    (line,) = said
    assert "left alone" in line and f"medcot-run.zip: {shown}" in line.replace("'medcot-run/plan.json\\x00/../escaped' ", "")


def test_a_member_that_leads_out_is_unpacked_nowhere(tmp_path):
    (tmp_path / "deep" / "run").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        archive.writestr("medcot-run/plan.json", "{}")
        archive.writestr("medcot-run/../escaped", "out")
    with pytest.raises(MedcotError, match=r"^run\.zip: '\.\./escaped' leads out of its folder"):
        unzip(tmp_path / "run.zip", tmp_path / "deep" / "run", Path("medcot-run"))
    assert [*(tmp_path / "deep").rglob("*")] == [tmp_path / "deep" / "run"]


@pytest.fixture
def own(tmp_path):
    """A folder of the user's with a secret in it, outside what was attached."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "secret").write_text("own")
    return tmp_path / "own"


@pytest.mark.parametrize("target", ["own", "own/secret"])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_an_attached_run_with_a_link_out_of_it_is_left_alone(tmp_path, own, packed, target):
    put(tmp_path / "in", packed, MANIFEST)
    folder = tmp_path / "in" / "medcot-run" if packed else tmp_path / "in"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "link").symlink_to(tmp_path / target)
    said = []
    assert find_earlier(tmp_path / "in", said.append) == []
    assert "left alone" in said[0] and f"{folder.name}/adapter/link is a link out of the run, to {tmp_path / target}" in said[0]


@pytest.mark.parametrize("link", ["medcot-run", "medcot-run.zip"])
def test_a_zip_or_its_folder_that_is_a_link_is_left_alone(tmp_path, own, link):
    put(tmp_path / "in", True, MANIFEST)
    if link == "medcot-run":
        (tmp_path / "in" / link).symlink_to(own)
    else:
        (tmp_path / "in" / link).rename(own / link)
        (tmp_path / "in" / link).symlink_to(own / link)
    said = []
    assert find_earlier(tmp_path / "in", said.append) == []
    assert "left alone" in said[0] and f"'{link}' leads out of in/ through a link" in said[0]


def test_an_unpacked_zip_whose_large_files_are_a_link_is_refused(tmp_path, own):
    put(tmp_path / "in" / "medcot-run" / "medcot-run", False, MANIFEST)
    (tmp_path / "in" / "medcot-run" / "adapter").symlink_to(own)
    said = []
    assert find_earlier(tmp_path / "in", said.append) == []
    assert "medcot-run/adapter is a link out of the run" in said[0]


def test_links_within_an_attached_run_are_copied_as_files(tmp_path):
    put(tmp_path / "in", False, MANIFEST)
    (tmp_path / "in" / "log").symlink_to("config.json")
    copy_run(find_earlier(tmp_path / "in")[0], tmp_path / "run")
    assert (tmp_path / "run" / "log").read_bytes() == CONFIG and not (tmp_path / "run" / "log").is_symlink()
