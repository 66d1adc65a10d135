"""`medcot push` when the Hub refuses, fails, breaks off or forgets: success in the end, or one clear error and no "pushed"."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest
from hub_runs import hub_environment, make_run, push_command
from hub_server import FOREIGN, NEVER_ENDS, PART, READ, WRITE, Hub

from medcot_utils.export.hub.records import RECORD
from medcot_utils.export.hub.requests import of_the_hub, retry_after

pytest_plugins = ("hub_fixtures",)
BIG = 30_000_000


@pytest.fixture(scope="module", autouse=True)
def always_cut(tmp_path_factory):
    """(Hub, run, process) of a push that is cut off each time in its last part: begun first and looked at last, because the
    client itself tries five times more, for 23 seconds."""
    with Hub() as hub:
        folder = tmp_path_factory.mktemp("cut")
        run = make_run(folder, weights=BIG)
        hub.fail("PUT", "/storage/.*/4$", cut_after=1_000_000, times=NEVER_ENDS)
        environment, command = hub_environment(hub.url, folder / "home"), push_command(run, "--patience", "0")
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            yield hub, run, process
            process.kill()


def record_of(run):
    return json.loads((run.path / RECORD).read_text())[-1]


def the_error(done, run, hub):
    """The one error line, after checking what must hold after every failed push."""
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("medcot: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "pushed: " not in done.stdout
    for token in (WRITE, READ, FOREIGN):
        assert token not in done.stdout + done.stderr
    if (run.path / RECORD).exists():
        record = record_of(run)
        assert record["state"] == "failed" and record["error"] == lines[0].removeprefix("medcot: ")
        assert WRITE not in json.dumps(record)
    assert all(repo["tags"] == {} for repo in hub.repos.values()), "a tag says that everything was compared"
    run.require("adapter"), run.require("merged")
    return lines[0]


# --- refused -------------------------------------------------------------------------------------------------------


CHECK = """
from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError
from medcot_utils.export.hub.push import check_hub
try:
    print(check_hub(load_config("smoke", ["hub.repo_id=doctor/cot", "hub.patience_seconds=0"])))
except MedcotError as error:
    print("ERROR", error)
"""


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (WRITE, "notebook 07 will push to doctor/cot (private) as doctor"),
        (READ, "ERROR the token of doctor may only read"),
        ("hf_unknown_for_the_test", "ERROR asking the Hub whose token this is: the Hub answers 401"),
        (
            None,
            "ERROR the push to the Hub needs a secret for Hugging Face, and none was found under HF_TOKEN",
        ),
    ],
)
def test_notebook_01_can_ask_whether_a_push_will_be_taken(hub, tmp_path, token, says):
    environment = hub_environment(hub.url, tmp_path, token)
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.startswith(says) and (token or "hf_") not in done.stdout


def test_no_token_is_one_error(hub, finished_run, push):
    run = finished_run()
    error = the_error(push(run, token=None), run, hub)
    assert "none was found under HF_TOKEN or HUGGINGFACE_TOKEN" in error and "Set HF_TOKEN" in error and hub.repos == {}


def test_401_says_that_the_token_is_not_valid(hub, finished_run, push):
    run = finished_run()
    error = the_error(push(run, token="hf_unknown_for_the_test"), run, hub)
    assert "the Hub answers 401" in error and "make one of type write at" in error and "hf_unknown" not in error
    assert "This push has committed nothing" in error and hub.repos == {}


def test_a_read_only_token_is_refused_before_anything_is_created(hub, finished_run, push):
    run = finished_run()
    assert "the token of doctor may only read" in the_error(push(run, token=READ), run, hub)
    assert hub.repos == {}


def test_403_names_the_permission_that_is_missing(hub, finished_run, push):
    run = finished_run()
    error = the_error(push(run, repo_id="clinic/cot"), run, hub)
    assert "making the repository clinic/cot: the Hub answers 403" in error and "under the namespace clinic" in error
    assert "fine-grained one with write access to the contents and settings" in error

    hub.add("model", "doctor/cot", {".gitattributes": b""})
    error = the_error(push(run, "--public", token=FOREIGN), run, hub)
    assert "403 Forbidden (" in error and "may not write to doctor/cot" in error
    assert len(hub.repos["model", "doctor/cot"]["commits"]) == 1


def test_a_token_that_the_server_repeats_is_not_shown(hub, finished_run, push):
    run = finished_run()
    hub.fail("POST", "/api/repos/create$", status=500, message=f"cannot read {WRITE}")
    hub.fail("POST", "/api/repos/create$", status=403, message=f"what is {WRITE}?")
    done = push(run)
    assert (
        "403 Forbidden (what is **********?)" in the_error(done, run, hub)
        and "(cannot read **********): trying again" in done.stdout
    )


def test_404_midway_says_what_is_gone_and_what_was_committed(hub, finished_run, push):
    run = finished_run()
    hub.fail("PUT", "/storage/", status=404, message="NoSuchBucket", times=NEVER_ENDS)
    error = the_error(push(run), run, hub)
    assert "sending adapter/adapter_model.safetensors (0.2 MB) to doctor/cot: the Hub answers 404" in error
    assert "Already on the Hub, and kept: doctor/cot: model card." in error
    entry = record_of(run)["repositories"][0]
    assert [line["path"] for line in entry["files"] if line["sent"]] == ["README.md"] and list(entry["commits"]) == ["model card"]


# --- busy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "path"), [(500, "/api/repos/create$"), (409, "/commit/main$"), (500, "/tag/")])
def test_a_passing_409_or_500_is_repeated_until_it_is_granted(hub, finished_run, push, status, path):
    run = finished_run()
    hub.fail("POST", path, status=status, times=2)
    done = push(run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"the Hub answers {status}") == 2 and record_of(run)["state"] == "pushed"


def test_409_that_stays_says_that_something_else_writes_there(hub, finished_run, push):
    run = finished_run()
    hub.fail("POST", "/commit/main$", status=409, message="A commit has happened since", times=NEVER_ENDS)
    error = the_error(push(run, "--patience", "3"), run, hub)
    assert "committing model card to doctor/cot: the Hub answers 409 Conflict (A commit has happened since)" in error
    assert "Something else is writing to doctor/cot" in error and "hub.patience_seconds (3 s)" in error


def test_429_waits_as_long_as_the_hub_asks(hub, finished_run, push):
    run = finished_run()
    hub.fail("POST", "/commit/main$", status=429, headers={"Retry-After": "3"}, message="slow down")
    hub.fail("POST", "/preupload/", status=429, headers={"Retry-After": "2"})
    started = time.monotonic()
    done = push(run)
    assert done.returncode == 0, done.stderr
    assert "the Hub answers 429 Too Many Requests (slow down): trying again in 3 s" in done.stdout
    assert time.monotonic() - started > 5


def test_the_wait_is_what_the_hub_asks_for_in_each_of_its_ways():
    def refused(status=429, **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return SimpleNamespace(response=SimpleNamespace(status_code=status, headers=named))

    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert retry_after(refused(Retry_After="7")) == 7
    assert retry_after(refused(Retry_After=in_a_minute)) == pytest.approx(60, abs=3)
    assert retry_after(refused(RateLimit='"api";r=0;t=55')) == 55
    assert retry_after(refused(RateLimit='"api";r=10;t=55')) is retry_after(refused(Retry_After="soon")) is None
    assert retry_after(refused(500)) is retry_after(OSError("no answer")) is None


def test_429_with_a_wait_beyond_our_patience_fails_immediately(hub, finished_run, push):
    run = finished_run()
    hub.fail("POST", "/commit/main$", status=429, headers={"Retry-After": "3600"}, times=NEVER_ENDS)
    error = the_error(push(run), run, hub)
    assert "asks to wait 3600 s, longer than hub.patience_seconds (300)" in error and "--patience 3601" in error
    assert len(hub.sent("POST", "/commit/")) == 1


def test_a_lasting_500_blames_the_hub_and_the_next_push_resumes(hub, finished_run, push):
    run = finished_run()
    hub.fail("POST", "/commit/main$", status=500, message="Internal Error", times=0)
    fault = hub.faults[-1]
    assert push(run, "--artifact", "adapter").returncode == 0  # the adapter lies there from before
    hub.repos["model", "doctor/cot"]["tags"].clear()
    fault.times = NEVER_ENDS
    error = the_error(push(run, "--patience", "1"), run, hub)
    assert (
        "the Hub answers 500 Internal Server Error (Internal Error)" in error
        and "The fault is the Hub's: push again later" in error
    )
    fault.times = 0
    hub.requests.clear()
    done = push(run)
    assert done.returncode == 0 and "adapter is already there" in done.stdout


# --- cut off -------------------------------------------------------------------------------------------------------


def test_a_cut_30_mb_upload_resumes_at_the_part_it_was_in(hub, finished_run, push):
    run = finished_run(weights=BIG)
    hub.fail("PUT", "/storage/.*/2$", cut_after=PART // 2)
    done = push(run)
    assert done.returncode == 0, done.stderr
    assert hub.sent("PUT", "/storage/.*/2$") == [PART // 2, PART], "the second part was sent again"
    assert hub.sent("PUT", "/storage/.*/[134]$") == [PART, PART, BIG - 3 * PART], "the others were not"
    assert record_of(run)["state"] == "pushed"


def test_a_push_killed_midway_resumes(hub, finished_run, push, tmp_path):
    run, came = finished_run(weights=BIG), threading.Event()
    hub.fail("PUT", "/storage/.*/2$", hold=came)
    environment = hub_environment(hub.url, tmp_path / "home")
    with subprocess.Popen(push_command(run), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert came.wait(300)
        process.kill()
    assert record_of(run)["state"] == "running" and list(record_of(run)["repositories"][0]["commits"]) == [
        "model card",
        "adapter",
    ]
    assert "model.safetensors" not in hub.repos["model", "doctor/cot"]["commits"][-1]["files"]
    hub.requests.clear()
    assert push(run).returncode == 0
    assert sum(hub.sent("PUT", "/storage/")) == BIG and record_of(run)["state"] == "pushed"


def test_no_server_at_all_names_the_endpoint(hub, finished_run, push):
    run = finished_run()
    error = the_error(push(run, "--patience", "1", HF_ENDPOINT="http://127.0.0.1:9"), run, hub)
    assert "the connection to the Hub failed (ConnectError" in error and "endpoint http://127.0.0.1:9" in error


def test_offline_mode_is_named(hub, finished_run, push):
    run = finished_run()
    assert "HF_HUB_OFFLINE is set" in the_error(push(run, HF_HUB_OFFLINE="1"), run, hub) and hub.requests == []


# --- yes, and nothing stored ---------------------------------------------------------------------------------------


def test_a_hub_that_says_yes_and_commits_nothing_is_found_out(hub, finished_run, push):
    run = finished_run()
    hub.forgets_commits = True
    error = the_error(push(run), run, hub)
    assert "took the files for doctor/cot without an error, but returns something else" in error
    assert "README.md (not there), adapter/adapter_config.json (not there)" in error and "0 of 7 files agree" in error
    assert not any(line["verified"] for line in record_of(run)["repositories"][0]["files"])


def test_verification_finds_weights_listed_but_not_stored(hub, finished_run, push):
    run = finished_run()
    hub.forgets_large_files = True
    error = the_error(push(run), run, hub)
    assert "model.safetensors (listed, but cannot be downloaded)" in error and "5 of 7 files agree" in error


def test_a_hub_that_gives_back_other_weights_is_found_out(hub, finished_run, push):
    run = finished_run()
    hub.spoils_large_files = True
    error = the_error(push(run), run, hub)
    assert "adapter/adapter_model.safetensors (a download gives other bytes)" in error and "5 of 7 files agree" in error


def test_only_verify_all_finds_zeroes_inside_a_large_file(hub, finished_run, push):
    run = finished_run(weights=40_000_000)  # more than one piece of a download
    hub.spoils_middles = True
    error = the_error(push(run, "--verify-all"), run, hub)
    assert "model.safetensors (a download gives other bytes); 6 of 7 files agree" in error
    done = push(run)
    assert done.returncode == 0, done.stderr
    assert "2 large at both ends (every byte: --verify-all)" in done.stdout
    lines = {line["path"]: line["downloaded"] for line in record_of(run)["repositories"][0]["files"]}
    assert lines["model.safetensors"] == "both ends" and lines["config.json"] == "whole"
    assert record_of(run)["verify_all"] is False


def test_verify_all_downloads_every_byte(hub, finished_run, push):
    run = finished_run(weights=40_000_000)
    done = push(run, "--verify-all")
    assert done.returncode == 0 and "downloaded again 7 whole\n" in done.stdout, done.stdout + done.stderr
    assert record_of(run)["verify_all"] is True
    assert {line["downloaded"] for line in record_of(run)["repositories"][0]["files"]} == {"whole"}


def test_an_unreadable_answer_blames_the_hub_a_wrong_value_us():
    from huggingface_hub.lfs import _validate_batch_actions
    from huggingface_hub.utils import validate_repo_id

    def raised(call, *arguments):
        with pytest.raises(ValueError) as caught:
            call(*arguments)
        return caught.value

    assert of_the_hub(raised(_validate_batch_actions, {"actions": 1}))
    assert not of_the_hub(raised(validate_repo_id, "user/a..b"))
    assert not of_the_hub(raised(int, "x"))


def test_a_hub_that_sets_no_tag_is_found_out(hub, finished_run, push):
    run = finished_run()
    hub.forgets_tags = True
    assert "says that it set the tag run-" in the_error(push(run), run, hub)


# --- last, because it takes so long ----------------------------------------------------------------------------------


def test_the_next_push_sends_what_a_cut_connection_left_out(always_cut, tmp_path):
    hub, run, process = always_cut
    out, err = process.communicate(timeout=300)
    error = the_error(subprocess.CompletedProcess([], process.returncode, out, err), run, hub)
    assert "sending model.safetensors (30.0 MB) to doctor/cot: the connection to the Hub failed (" in error
    assert "kept: doctor/cot: model card, adapter." in error and "sends only what is missing" in error
    hub.faults.clear()
    hub.requests.clear()
    again = subprocess.run(
        push_command(run), env=hub_environment(hub.url, tmp_path), capture_output=True, timeout=120, check=False
    )
    assert again.returncode == 0
    assert sum(hub.sent("PUT", "/storage/")) == BIG, "the merged weights alone: the adapter lay there"
