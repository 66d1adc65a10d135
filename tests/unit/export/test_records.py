"""The record of a push: what older versions wrote is read, and a push that fails leaves its record."""

from __future__ import annotations

import json

import pytest

from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError
from medcot_utils.export.hub.records import RECORD, PushRecord, failure_recorded, file_lines, push_table, read_record, save_record
from medcot_utils.export.hub.requests import HubError, HubRefusal
from medcot_utils.run.directory import Run
from medcot_utils.run.lock import RunError

# As medcot 0.1.0 wrote it.
OLD_FILES = [
    {
        "path": "README.md",
        "artifact": "model card",
        "bytes": 4196,
        "sha256": "3c6a9ae1" * 8,
        "sent": True,
        "there_already": False,
        "replaced": "git:8ab686eafeb1f44702738c8b0f24f2567c36da6d",
        "verified": True,
        "on_the_hub": {"bytes": 4196, "digest": "git:1f7391f92b6a3792204e07e99f71f643cc35e7e1"},
        "downloaded": "whole",
        "fault": None,
    },
    {
        "path": "model.safetensors",
        "artifact": "merged",
        "bytes": 300000,
        "sha256": "9f86d081" * 8,
        "sent": False,
        "there_already": True,
        "replaced": None,
        "verified": False,
        "on_the_hub": None,
        "fault": "not there",
    },
]
OLD = {
    "started": "2026-01-01T00:00:00+00:00",
    "state": "failed",
    "repo_id": "doctor/cot",
    "layout": "one",
    "endpoint": "https://huggingface.co",
    "tag": "run-0123456789ab",
    "verify_all": False,
    "repositories": [
        {
            "repo_id": "doctor/cot",
            "url": "https://huggingface.co/doctor/cot",
            "private": True,
            "revision": "c" * 40,
            "commits": {"model card": "b" * 40, "merged": "there already"},
            "tag_commit": None,
            "files": OLD_FILES,
            "deleted": [{"path": "old.bin", "artifact": "merged", "bytes": 6, "digest": "sha256:16367aac"}],
        }
    ],
    "error": "not pushed.",
}


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", load_config("smoke"))


def begun(**fields) -> PushRecord:
    return OLD | {"started": "2026-02-02T00:00:00+00:00", "state": "running", **fields}


def test_a_record_of_an_older_push_is_read_shown_and_kept(run):
    (run.path / RECORD).write_text(json.dumps([OLD]))
    lines = [tuple(line.values()) for line in file_lines(read_record(run)[0])]
    assert lines == [
        ("doctor/cot/README.md", 4196, "3c6a9ae13c6a", "replaced", "whole, agrees"),
        ("doctor/cot/model.safetensors", 300000, "9f86d0819f86", "was there", "not there"),
        ("doctor/cot/old.bin", 6, "", "deleted", "gone"),
    ]
    assert list(push_table(OLD).columns) == ["bytes", "sha256", "sent", "read back"]
    save_record(run, begun())
    save_record(run, begun(state="pushed"))
    assert [one["state"] for one in read_record(run)] == ["failed", "pushed"] and read_record(run)[0] == OLD


def test_an_unreadable_record_is_one_error_with_what_to_do(run):
    (run.path / RECORD).write_text("[")
    with pytest.raises(RunError, match=r"run/pushed\.json cannot be read \(.*\)\. It is not what medcot writes: remove it and"):
        read_record(run)


REFUSED = "not pushed: listing doctor/cot: 500. Already on the Hub, and kept: doctor/cot: model card, merged. A second `medcot"


@pytest.mark.parametrize(
    ("raised", "expected", "told"),
    [
        (HubRefusal("listing doctor/cot: 500"), HubError, REFUSED),
        (MedcotError("one line of a-secret-key"), MedcotError, "one line of **********"),
        (KeyError("secret"), KeyError, "KeyError while listing doctor/cot"),
    ],
)
def test_a_failed_push_leaves_a_record_with_its_error(run, raised, expected, told, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-key")
    if expected is KeyError:
        raised.add_note("while listing doctor/cot")
    with pytest.raises(expected), failure_recorded(run, begun()):
        raise raised
    (record,) = read_record(run)
    assert record["state"] == "failed" and record["error"].startswith(told) and "secret" not in record["error"]
