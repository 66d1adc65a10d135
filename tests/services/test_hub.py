"""`medcot push` with the real Hub client over HTTP: what the Hub holds afterwards is what the run holds."""

from __future__ import annotations

import hashlib
import json

import pytest
from hub_runs import LESS
from hub_server import WRITE
from huggingface_hub import ModelCard

from medcot_utils.config import load_config
from medcot_utils.export.gguf import GgufError
from medcot_utils.export.hub import push as medcot_hub
from medcot_utils.export.hub.files import chosen_artifacts, folder_digest, plan
from medcot_utils.export.hub.records import RECORD, FileRecord, PushRecord, RepositoryRecord, file_lines, push_table, read_record
from medcot_utils.export.hub.requests import HubError
from medcot_utils.export.merged import ExportError
from medcot_utils.export.model_card import model_card
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.directory import Run
from medcot_utils.run.lock import RunError

pytest_plugins = ("hub_fixtures",)


def head(hub, repo_id):
    return hub.repos["model", repo_id]["commits"][-1]


def content(hub, repo_id, path):
    return hub.blobs[head(hub, repo_id)["files"][path]["sha256"]]


def on_disk(run, artifact):
    folder = run.require(artifact)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what arrives --------------------------------------------------------------------------------------------------


def test_a_push_is_private_tagged_and_one_commit_per_artifact(hub, finished_run, push):
    run = finished_run()
    done = push(run)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["model", "doctor/cot"]
    assert repo["private"] is True
    for name, data in on_disk(run, "merged").items():
        assert content(hub, "doctor/cot", name) == data
    for name, data in on_disk(run, "adapter").items():
        assert content(hub, "doctor/cot", f"adapter/{name}") == data
    titles = [commit["message"].split(" of run")[0] for commit in repo["commits"][1:]]
    assert titles == ["model card", "adapter", "merged"], "the warning lies there before the weights do"
    record = json.loads((run.path / RECORD).read_text())[-1]
    assert record["state"] == "pushed" and repo["tags"] == {record["tag"]: repo["commits"][-1]["id"]}
    assert (
        "7 of 7 files agree: size and digest as the Hub lists them, and downloaded again 5 whole, 2 large at both" in done.stdout
    )
    assert "(private)" in done.stdout and record["tag"] in done.stdout
    assert all(line["verified"] and line["sent"] for line in record["repositories"][0]["files"])
    (entry,) = record["repositories"]
    kept = [set(PushRecord.__annotations__) - {"error"}, set(RepositoryRecord.__annotations__), set(FileRecord.__annotations__)]
    assert [set(record), set(entry), set(entry["files"][0])] == kept, "every documented field, and no other"
    assert WRITE not in done.stdout + done.stderr + json.dumps(record)


def test_a_second_push_sends_only_the_changed_artifact(hub, finished_run, push):
    run = finished_run()
    assert push(run).returncode == 0
    first, tags = head(hub, "doctor/cot")["id"], dict(hub.repos["model", "doctor/cot"]["tags"])
    hub.requests.clear()
    again = push(run)
    assert again.returncode == 0 and again.stdout.count("is already there, not sent again") == 3
    assert hub.sent("PUT", ".") == hub.sent("POST", "/commit/") == [] and head(hub, "doctor/cot")["id"] == first

    # Somebody's own file beside the run's stays.
    hub.add("model", "doctor/cot", {"NOTES.md": b"mine"})
    merge_anew(run, {"model.safetensors": b"another merge"})
    hub.requests.clear()
    changed = push(run)
    assert changed.returncode == 0, changed.stderr
    assert hub.sent("PUT", "/storage/") == [len(b"another merge")], "the adapter's weights were not sent again"
    files = head(hub, "doctor/cot")["files"]
    assert "NOTES.md" in files and "config.json" in files
    assert "merged committed, 1 of 1 files, 13 bytes, 1 of them in place of an earlier push's" in changed.stdout
    assert [line["sent"] for line in table_of(run) if line["file"] == "doctor/cot/model.safetensors"] == ["replaced"]
    now = hub.repos["model", "doctor/cot"]["tags"]
    assert now.items() > tags.items() and len(now) == 2, "the earlier run's tag stays where it was"


def merge_anew(run, files):
    def fill(folder):
        for name, data in files.items():
            (folder / name).write_bytes(data)

    run.write("merged", fill)
    for name in ("export_check", "model_card"):
        run.write(name, run.read(name) if name == "export_check" else "text\n")


def table_of(run):
    return file_lines(read_record(run)[-1])


def test_a_push_deletes_and_reports_weights_the_run_has_lost(hub, finished_run, push):
    run, shard = finished_run(), "model-00002-of-00002.safetensors"
    merge_anew(run, {"model.safetensors": b"first", shard: b"second"})
    assert push(run).returncode == 0 and shard in head(hub, "doctor/cot")["files"]
    merge_anew(run, {"model.safetensors": b"one file"})
    hub.forgets_deletions = True
    done = push(run)
    assert done.returncode == 1 and f"{shard} (deleted, still there)" in done.stderr
    hub.forgets_deletions = False
    done = push(run)
    assert done.returncode == 0, done.stderr
    assert shard not in head(hub, "doctor/cot")["files"]
    assert f"doctor/cot: deleted {shard} (6 bytes), which an earlier push had uploaded" in done.stdout
    digest = f"sha256:{hashlib.sha256(b'second').hexdigest()}"
    (gone,) = read_record(run)[-1]["repositories"][0]["deleted"]
    assert gone == {"path": shard, "artifact": "merged", "bytes": 6, "digest": digest}
    assert [line["sent"] for line in table_of(run) if line["file"].endswith(shard)] == ["deleted"]
    assert shard in done.stdout[done.stdout.index("what the Hub lists and returns") :]


def test_each_separate_repository_has_a_model_card_the_hub_reads(hub, finished_run, push):
    overrides = ["model.name=me/base-8b", "dataset.name=me/cases", "dataset.revision=abc", "dataset.held_out_rows=40"]
    run = finished_run(*overrides)
    done = push(run, "--layout", "separate", "--public")
    assert done.returncode == 0, done.stderr
    assert {name for _, name in hub.repos} == {"doctor/cot-lora", "doctor/cot-merged"}
    assert not any(repo["private"] for repo in hub.repos.values())
    expected = {"doctor/cot-lora": ("adapter", "peft"), "doctor/cot-merged": ("finetune", "transformers")}
    for repo_id, (relation, library) in expected.items():
        card = ModelCard(content(hub, repo_id, "README.md").decode())
        data = card.data.to_dict()
        assert (data["base_model"], data["base_model_relation"], data["library_name"]) == ("me/base-8b", relation, library)
        assert (data["datasets"], data["license"], data.get("language")) == (["me/cases"], "other", None)
        assert data["pipeline_tag"] == "text-generation" and "medical" in data["tags"]
        (measured,) = [result for result in card.data.eval_results if result.metric_type == "eval_loss"]
        assert measured.metric_value == 3.18 and measured.dataset_type == "me/cases" and measured.dataset_revision == "abc"
        assert measured.metric_args == {"interval_95": [3.08, 3.28], "base_value": 3.99}
        assert "Not for clinical use" in card.text and f'"{repo_id}"' in card.text


def test_a_model_card_names_no_repository_before_a_push(finished_run):
    run = finished_run("model.name=me/base-8b", "dataset.held_out_rows=40")
    assert "from_pretrained(" not in model_card(run)
    card = ModelCard(model_card(run, "gguf", {"merged": "me/cot-merged", "gguf": "me/cot-gguf"}, "run-1"))
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("me/cot-merged", "quantized") and "gguf" in data["tags"]
    assert "library_name" not in data and "Modelfile" in card.text


def test_the_token_may_have_the_articles_name(hub, finished_run, push):
    done = push(finished_run(), "--artifact", "adapter", repo_id="cot", token=None, HUGGINGFACE_TOKEN=WRITE)
    assert done.returncode == 0, done.stderr
    assert set(head(hub, "doctor/cot")["files"]) > {"README.md", "adapter/adapter_model.safetensors"}, "the token's own user"
    assert "model.safetensors" not in head(hub, "doctor/cot")["files"]


def test_a_gguf_is_pushed_if_it_was_made_from_the_merged_model(finished_run):
    without = finished_run(name="without")
    assert chosen_artifacts(without, medcot_hub.hub_settings(without)) == ["adapter", "merged"]
    with pytest.raises(RunError, match=r"hub\.artifacts names only gguf"):
        chosen_artifacts(without, medcot_hub.hub_settings(without, artifacts=["gguf"]))

    run = finished_run("export.gguf=q4_k_m")
    separate, one = (medcot_hub.hub_settings(run, repo_id="me/cot", layout=layout) for layout in ("separate", "one"))
    with pytest.raises(RunError, match="gguf is not in run/ yet: run notebook 07_export first"):
        chosen_artifacts(run, separate)

    def fill(folder):
        (folder / "model.q4_k_m.gguf").write_bytes(b"GGUF")
        (folder / "Modelfile").write_text("FROM ./model.q4_k_m.gguf")

    run.write("gguf", fill)
    run.write("gguf_check", {"ok": True})
    names = chosen_artifacts(run, separate)
    assert names == ["adapter", "merged", "gguf"]
    last = plan(run, separate, "me/cot", names)[-1]
    assert (last.repo_id, [file.path_in_repo for file in last.files]) == (
        "me/cot-gguf",
        ["README.md", "Modelfile", "model.q4_k_m.gguf"],
    )
    (all_in_one,) = plan(run, one, "me/cot", names)
    assert {"model.safetensors", "adapter/adapter_config.json", "gguf/Modelfile"} < {
        file.path_in_repo for file in all_in_one.files
    }
    wrong = {"special_tokens": {"eos": [2, 1]}, "exact": False, "greedy": []}
    run.write("gguf_check", {"ok": False, "file": "model.q4_k_m.gguf"} | wrong)
    with pytest.raises(GgufError, match="is not the merged model"):
        chosen_artifacts(run, separate)


# --- what is refused before anything is sent -----------------------------------------------------------------------


def test_a_private_push_to_a_public_repository_is_refused(hub, finished_run, push):
    hub.add("model", "doctor/cot", {".gitattributes": b""})
    done = push(finished_run())
    assert done.returncode == 1 and "exists and is public, but this push would be private" in done.stderr
    assert len(hub.repos["model", "doctor/cot"]["commits"]) == 1


def test_a_tag_on_other_weights_is_refused(hub, finished_run, push):
    commit = hub.add("model", "doctor/cot", {"model.safetensors": b"another run's"}, private=True)
    hub.repos["model", "doctor/cot"]["tags"]["v1"] = commit
    done = push(finished_run(), "--tag", "v1")
    assert done.returncode == 1 and "The tag v1 of doctor/cot is on other files" in done.stderr
    assert len(hub.repos["model", "doctor/cot"]["commits"]) == 1


def test_a_push_only_replaces_or_deletes_files_it_uploaded(hub, finished_run, push):
    run = finished_run()
    strange = {"pytorch_model.bin": b"years of work", "README.md": b"# Mine", "NOTES.md": b"mine"}
    hub.add("model", "doctor/cot", strange, private=True)
    before = head(hub, "doctor/cot")["id"]
    done = push(run)
    assert done.returncode == 1 and "pushed: " not in done.stdout
    assert "README.md (would be replaced), pytorch_model.bin (lies among the weights). None of them was touched" in done.stderr
    assert "NOTES.md" not in done.stderr and "choose another repository with --repo-id, or delete them there" in done.stderr
    assert head(hub, "doctor/cot")["id"] == before and hub.sent("PUT", ".") == hub.sent("POST", "/commit/") == []
    assert read_record(run)[-1]["state"] == "failed"


def test_one_repository_with_another_model_stops_the_whole_push(hub, finished_run, push):
    hub.add("model", "doctor/cot-merged", {"model.safetensors": b"years of work"}, private=True)
    done = push(finished_run(), "--layout", "separate")
    assert done.returncode == 1 and "doctor/cot-merged holds files" in done.stderr
    assert "model.safetensors (would be replaced)" in done.stderr and hub.sent("POST", "/commit/") == []


def test_a_push_keeps_files_that_somebody_changed_on_the_hub(hub, finished_run, push):
    run = finished_run()
    assert push(run).returncode == 0
    edited = content(hub, "doctor/cot", "README.md") + b"\nA note by hand."
    hub.add("model", "doctor/cot", {"README.md": edited}, message="Update README.md")
    done = push(run)
    assert done.returncode == 1 and "or that somebody changed later: README.md (would be replaced)" in done.stderr
    assert content(hub, "doctor/cot", "README.md") == edited


def test_an_invalid_repository_name_is_refused_before_upload(hub, finished_run, push):
    run = finished_run()
    done = push(run, repo_id="user/a..b")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "user/a..b cannot be a repository on the Hub (" in done.stderr and "HF_ENDPOINT" not in done.stderr
    assert hub.requests == []
    # One of three names, made of it, may be too long.
    done = push(run, "--layout", "separate", repo_id=f"doctor/{'a' * 90}")
    assert done.returncode == 1 and "-merged cannot be a repository on the Hub (" in done.stderr and hub.requests == []
    with pytest.raises(HubError, match=r"user/a\.\.b cannot be a repository"):
        medcot_hub.check_hub(load_config("smoke", ["hub.repo_id=user/a..b"]))


def test_altered_stale_or_mismatched_artifacts_are_not_pushed(finished_run, monkeypatch):
    monkeypatch.setattr(medcot_hub, "require_secret", lambda *arguments: pytest.fail("went on to the token"))
    run = finished_run()
    settings = medcot_hub.hub_settings(run, repo_id="doctor/cot")
    (run.path / "merged" / "config.json").write_text("{}")
    run._verified.clear()
    with pytest.raises(RunError, match=r"merged in run/ is .*run notebook 07_export again"):
        medcot_hub.push_run(run, settings)
    run = finished_run(name="second")
    run.write("adapter", lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"trained anew"))
    with pytest.raises(RunError, match="run notebook 07_export again before pushing"):
        medcot_hub.push_run(run, settings)
    run = finished_run(name="third")
    run.write("export_check", run.read("export_check") | {"ok": False})
    run.write("model_card", "text\n")
    with pytest.raises(ExportError, match="do not publish it"):
        medcot_hub.push_run(run, settings)


def test_a_run_without_a_repository_pushes_nothing_and_says_so(finished_run, capsys):
    run = finished_run()
    assert medcot_hub.publish(run) is None and push_table(None) is None
    assert capsys.readouterr().out.splitlines() == [
        "not pushed: hub.repo_id is not set (later: medcot push RUN_DIR --repo-id user/name)"
    ]
    assert not (run.path / RECORD).exists()


def test_a_folder_is_checked_against_the_manifest_by_digests(finished_run):
    run = finished_run()

    def fill(folder):
        (folder / "a").mkdir()
        for name in ("a/x.json", "a-b.json", "a.json"):
            (folder / name).write_text(name)

    folder = run.write("merged", fill)
    files = [path for path in folder.rglob("*") if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(digests) == 3 and folder_digest(digests) == run.manifest()["artifacts"]["merged"]["sha256"]
    assert folder_digest(digests | {"a.json": "0" * 64}) != run.manifest()["artifacts"]["merged"]["sha256"]


def test_asking_for_a_push_later_redoes_only_notebook_07(finished_run):
    depend = [name for name, artifact in ARTIFACTS.items() if any(setting.startswith("hub") for setting in artifact.settings)]
    assert depend == ["machine", "model_card"]
    run = finished_run()
    assert run.is_fresh("model_card")
    asked = Run.create(run.path, load_config("smoke", [*LESS, "hub.repo_id=doctor/cot"]))
    assert asked.is_fresh("merged") and not asked.is_fresh("model_card")
    assert 'from_pretrained("doctor/cot", dtype' in model_card(asked) and 'subfolder="adapter"' in model_card(asked)
