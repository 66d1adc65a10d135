"""The notebook for Kaggle: small, the same every time, carrying what a bare session needs; and metadata checked beforehand."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import nbformat
import pytest

from medcot_utils.errors import MedcotError
from medcot_utils.run.artifacts import STEPS
from medcot_utils.series.kaggle import carried as carrying
from medcot_utils.series.kaggle.build import build
from medcot_utils.series.kaggle.carried import carried_files
from medcot_utils.series.kaggle.metadata import METADATA, read_metadata

ROOT = Path(__file__).parents[4]


def cells(built):
    return [cell.source for cell in nbformat.read(built.notebook, as_version=4).cells if cell.cell_type == "code"]


def carried(built):
    """{name: content} of what the built notebook holds as text."""
    source = next(source for source in cells(built) if source.startswith("PROJECT"))
    packed = base64.b64decode(source.split('"""')[1])
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def test_the_built_notebook_carries_the_project_and_stays_small(tmp_path):
    built = build(tmp_path, "demo")
    files = carried(built)
    tracked = subprocess.run(["git", "ls-files", "medcot_utils"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(tracked.stdout.split()) == {name for name in files if name.startswith("medcot_utils/")}
    assert {f"notebooks/{name}.ipynb" for name in STEPS} == {name for name in files if name.startswith("notebooks/")}
    assert {"requirements.txt", "requirements-cpu.txt", "requirements-nodeps.txt", "pyproject.toml"} <= set(files)
    assert files["medcot_utils/run/directory.py"] == (ROOT / "medcot_utils" / "run" / "directory.py").read_bytes()
    assert not any("__pycache__" in name for name in files)
    assert built.bytes == built.notebook.stat().st_size < 750_000, "Kaggle takes less than 1 MB"


def test_carried_notebooks_keep_cells_and_tags_without_outputs(tmp_path):
    for name in STEPS:
        original = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        carried_one = nbformat.reads(carried_files()[0][f"notebooks/{name}.ipynb"].decode(), as_version=4)
        assert [(c.source, c.metadata) for c in carried_one.cells] == [(c.source, c.metadata) for c in original.cells]
        assert not any(cell.get("outputs") for cell in carried_one.cells)


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    first = build(tmp_path / "a", "demo", ["training.max_steps=3"]).notebook.read_bytes()
    carrying._packed.cache_clear()
    second = build(tmp_path / "b", "demo", ["training.max_steps=3"]).notebook.read_bytes()
    assert first == second
    assert first != build(tmp_path / "c", "demo", ["training.max_steps=4"]).notebook.read_bytes()


def test_the_cells_are_short_and_valid_and_have_no_outputs(tmp_path):
    built = build(tmp_path, "article", ["training.max_steps=3", "dataset.path=/kaggle/input/mine/rows.jsonl"])
    notebook = nbformat.read(built.notebook, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert len(cell.source.splitlines()) <= 15 or cell.source.startswith("PROJECT")
    values = {}
    exec(cells(built)[0], values)
    assert values["PROFILE"] == "article" and values["KERNEL"] == "your-name/medcot-series"
    assert values["SETTINGS"] == ["training.max_steps=3", "dataset.path=/kaggle/input/mine/rows.jsonl"]


@pytest.mark.parametrize(
    "profile, settings, expected",
    [
        ("demo", [], ("only **Internet**", "; optional: `HF_TOKEN`")),
        (
            "article",
            ["hub.repo_id=me/model"],
            ("**Internet** and a **GPU**", "; needed: `HF_TOKEN` or `HUGGINGFACE_TOKEN` for the push to me/model;"),
        ),
    ],
)
def test_the_first_cell_says_what_this_session_needs(profile, settings, expected, tmp_path):
    first = nbformat.read(build(tmp_path, profile, settings).notebook, as_version=4).cells[0].source
    assert all(words in " ".join(first.split()) for words in expected)


def test_a_run_of_several_sessions_gets_a_time_limit(tmp_path):
    built, values = build(tmp_path, "full", ["seed=3"]), {}
    exec(cells(built)[0], values)
    assert built.added == ["training.max_hours=10"], "said by the command"
    assert values["SETTINGS"] == ["seed=3", "training.max_hours=10"]
    assert build(tmp_path, "full", ["training.max_hours=3"]).added == build(tmp_path, "demo").added == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"profile": "artikle"}, "did you mean article"),
        ({"settings": ["training.max_step=3"]}, "did you mean training.max_steps"),
        ({"settings": ["dataset.path=rows.jsonl"]}, "make it a data set on Kaggle"),
        ({"kernel": "medcot-series"}, "is not owner/slug"),
        ({"kernel": "ann/Medcot"}, "is not owner/slug"),
        ({"kernel": "ann/med"}, "^--id 'ann/med' is not owner/slug: .* a slug of 5 to 50 lowercase [^;]*$"),
        ({"kernel": f"ann/{'m' * 51}"}, "a slug of 5 to 50"),
        ({"continue_from": ["first-run"]}, "kernel_sources: 'first-run' is not owner/slug"),
        ({"datasets": ["a/b/c"]}, "dataset_sources: 'a/b/c' is not owner/slug"),
        ({"accelerator": "T4x2"}, "no accelerator 'T4x2': expected one of NvidiaTeslaT4"),
        ({"accelerator": ""}, "no accelerator ''"),
        ({"accelerator": "NvidiaTeslaP100"}, "choose NvidiaTeslaT4"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(arguments, expected, tmp_path):
    with pytest.raises(MedcotError, match=expected):
        build(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "setting",
    [
        "model.name=models/llama",
        "model.name=./absent",
        "model.name=/data/llama",
        "model.quantized_name=~/llama",
        "dataset.name=models/llama",
        "dataset.path=/kaggle/input/../working/rows.jsonl",
        "dataset.path=../input/mine/rows.jsonl",
        "evaluation.mcq_tasks=own.jsonl",
        "evaluation.mcq_tasks=[shipped, /data/own.jsonl]",
        "evaluation.embedding_model=models/llama",
    ],
)
def test_every_file_of_this_machine_is_refused(setting, tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    name = setting.partition("=")[0]
    with pytest.raises(MedcotError, match=f"{name} .*is a file or folder of this machine: make it a data set on Kaggle"):
        build(tmp_path, "demo", [setting, "evaluation.num_questions=1"])
    assert not (tmp_path / METADATA).exists()


def test_files_among_kaggles_inputs_are_taken(tmp_path):
    settings = ["model.name=/kaggle/input/llama/1b", "evaluation.mcq_tasks=[shipped, /kaggle/input/own/mcq.jsonl]"]
    assert build(tmp_path, "demo", settings).notebook.exists()


def test_existing_metadata_is_kept_and_given_values_are_added(tmp_path):
    build(tmp_path, "demo", kernel="ann/heart-run", datasets=["ann/rows"], public=True)
    held = json.loads((tmp_path / METADATA).read_text())
    assert "docker_image" not in held
    (tmp_path / METADATA).write_text(json.dumps(held | {"model_sources": ["a/b/c/d/1"]}))
    metadata = build(tmp_path, "article", continue_from=["ann/first-run"]).metadata
    assert (metadata.docker_image, metadata.model_sources) == (None, ["a/b/c/d/1"])
    assert (metadata.id, metadata.title, metadata.is_private) == ("ann/heart-run", "heart run", False)
    assert (metadata.dataset_sources, metadata.kernel_sources) == (["ann/rows"], ["ann/first-run"])
    assert (metadata.enable_gpu, metadata.machine_shape) == (True, "NvidiaTeslaT4")
    assert build(tmp_path, "article", continue_from=["ann/first-run"], public=False).metadata.kernel_sources == ["ann/first-run"]


def test_a_fixed_image_is_dropped_unless_it_is_asked_for(tmp_path):
    build(tmp_path, "demo")
    fixed = json.loads((tmp_path / METADATA).read_text()) | {"docker_image": "gcr.io/kaggle-images/python:v150"}
    (tmp_path / METADATA).write_text(json.dumps(fixed))
    kept = build(tmp_path, "demo", keep_image=True)
    assert (kept.metadata.docker_image, kept.dropped_image) == (fixed["docker_image"], None)
    built = build(tmp_path, "demo")
    assert (built.metadata.docker_image, built.dropped_image) == (None, fixed["docker_image"])
    assert "docker_image" not in json.loads((tmp_path / METADATA).read_text()) and build(tmp_path, "demo").dropped_image is None


def test_an_accelerator_is_checked_written_and_kept(tmp_path):
    assert build(tmp_path, "article", accelerator="NvidiaL4").metadata.machine_shape == "NvidiaL4"
    again = build(tmp_path, "recommended", ["model.dtype=bfloat16"])
    assert again.metadata.machine_shape == "NvidiaL4", "as built here before"
    metadata = build(tmp_path / "demo", "demo", accelerator="NvidiaTeslaT4").metadata
    assert (metadata.enable_gpu, metadata.machine_shape) == (True, "NvidiaTeslaT4")
    with pytest.raises(MedcotError, match="is bfloat16, but NvidiaTeslaT4"):
        build(tmp_path / "bad", "article", ["model.dtype=bfloat16"])
    assert not (tmp_path / "bad").exists()


def test_a_build_without_a_profile_keeps_the_folders_profile(tmp_path):
    assert build(tmp_path / "empty").profile == "article"
    build(tmp_path, "recommended", kernel="ann/heart-run")
    again = build(tmp_path, kernel="ann/heart-run-2", continue_from=["ann/heart-run"])
    assert again.profile == "recommended" and 'PROFILE = "recommended"' in cells(again)[0]
    assert build(tmp_path, "demo").profile == build(tmp_path).profile == "demo"
    (tmp_path / again.metadata.code_file).write_text("no notebook")
    assert build(tmp_path).profile == "article"


def test_the_session_knows_which_inputs_to_resume_from(tmp_path):
    settings = ["dataset.path=/kaggle/input/rows/mine.jsonl"]
    built = build(tmp_path, "demo", settings, "ann/heart-run-2", ["ann/heart-run"], ["ann/rows", "ann/kept-run"])
    values = {}
    exec(cells(built)[0], values)
    assert values["RESUME_FROM"] == ["ann/heart-run", "ann/kept-run"]
    assert "session.resume_earlier_run(run_dir, profile, SETTINGS, RESUME_FROM)" in "".join(cells(built))
    assert "session.end(exit_code, KERNEL, profile, SETTINGS)" in cells(built)[-1]
    assert "session.read_secrets(profile, SETTINGS)" in "".join(cells(built))


def test_metadata_as_kaggle_pulls_it_is_taken_and_kept(tmp_path):
    build(tmp_path, "demo", kernel="ann/heart-run")
    pulled = {"id_no": 123, "keywords": ["medicine", "gpu"], "enable_tpu": False, "docker_image": "", "machine_shape": ""}
    (tmp_path / METADATA).write_text(json.dumps(json.loads((tmp_path / METADATA).read_text()) | pulled))
    assert read_metadata(tmp_path).id_no == 123
    build(tmp_path, "demo")
    written = json.loads((tmp_path / METADATA).read_text())
    assert pulled.items() <= written.items()
    build(tmp_path, "demo", kernel="ann/heart-run-2")
    assert "id_no" not in json.loads((tmp_path / METADATA).read_text()), "the number is the other kernel's"


@pytest.fixture
def session(tmp_path, monkeypatch):
    """`session(built, change)`: the cells up to the unpacked project, run in a session's folders, `change` applied to PROJECT."""
    monkeypatch.setenv("MEDCOT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    monkeypatch.setenv("MEDCOT_SESSION_STARTED", "1")  # taken away again, if the cell sets it
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "kaggle" / "working").mkdir(parents=True)

    def run(built, change=lambda source: source):
        values = {}
        for source in cells(built)[:3]:
            exec(change(source) if source.startswith("PROJECT") else source, values)
        return values["project"]

    return run


def test_a_session_runs_the_package_that_was_built_in(session, tmp_path):
    planted = tmp_path / "kaggle" / "tmp" / "project" / "medcot_utils" / "planted.py"
    planted.parent.mkdir(parents=True)
    planted.touch()
    built = build(tmp_path / "built", "demo")
    project = session(built)
    files = {path.relative_to(project).as_posix(): path.read_bytes() for path in project.rglob("*") if path.is_file()}
    assert files == carried(built) and sys.path[0] == str(project), "and nothing that lay there before"
    assert list((tmp_path / "kaggle" / "working").iterdir()) == [], "the output of the session holds no code"


def test_a_session_refuses_a_package_that_was_not_built_in(session, tmp_path):
    files = carried_files()[0] | {"medcot_utils/__init__.py": b"raise SystemExit('somebody else')"}
    before = list(sys.path)
    with pytest.raises(ValueError, match="PROJECT, above, is not what medcot kaggle build wrote here: build and push again"):
        session(build(tmp_path / "built", "demo"), lambda source: f'PROJECT = """\n{carrying.payload(files)}\n"""')
    assert sys.path == before and not (tmp_path / "kaggle" / "tmp").exists()


# --- what is carried and what is not -------------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 11


@pytest.fixture(params=["git", "no git"])
def checkout(request, tmp_path, monkeypatch):
    """A copy of what git tracks here, as a checkout and as an unpacked archive, that build takes for its own."""
    folder = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith(("medcot_utils/", "notebooks/")) or "/" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if request.param == "git":
        for command in (["init", "-q"], ["add", "."]):
            subprocess.run(["git", *command], cwd=folder, check=True)
    monkeypatch.setattr(carrying, "HOME", folder)
    return folder


def test_files_outside_the_project_are_not_carried_and_listed(checkout, tmp_path):
    whole = set(carried(build(tmp_path, "demo")))
    (checkout / "notebooks" / "Untitled.ipynb").write_text((checkout / "notebooks" / "01_setup.ipynb").read_text())
    (checkout / "medcot_utils" / "data" / "patients.jsonl").write_text('{"name": "a patient"}\n')
    built = build(tmp_path, "demo")
    assert set(carried(built)) == whole and "medcot_utils/data/cases.jsonl" in whole
    assert whole >= {f"notebooks/{name}.ipynb" for name in STEPS} and "a patient" not in built.notebook.read_text()
    assert built.left_out == ["medcot_utils/data/patients.jsonl", "notebooks/Untitled.ipynb"]


def test_pyproject_lists_the_files_that_git_tracks():
    tracked = set(carrying._package_files())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        listed = set(carrying._package_files())
    assert listed == tracked, "a wheel, and a build without git, hold what the checkout does"


def write_into_a_notebook(checkout, secret):
    path = checkout / "notebooks" / "01_setup.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(3, nbformat.v4.new_code_cell(f'login("{secret}")'))
    nbformat.write(notebook, path)
    return "notebooks/01_setup.ipynb"


def write_into_the_package(checkout, secret):
    with (checkout / "medcot_utils" / "run" / "directory.py").open("a") as stream:
        stream.write(f"# {secret}\n")
    return "medcot_utils/run/directory.py"


@pytest.mark.parametrize("write", [write_into_a_notebook, write_into_the_package])
@pytest.mark.parametrize(
    ("secret", "variable", "kind"),
    [
        (TOKEN, None, "what looks like a Hugging Face token"),
        ("wandb_v1_" + "aB3" * 11, None, "what looks like a Weights & Biases key"),
        ("nothing to see", "wandb", "a secret of this machine (environment wandb)"),
        ("nothing to see", "KAGGLE_API_TOKEN", "a secret of this machine (environment KAGGLE_API_TOKEN)"),
    ],
)
def test_a_secret_in_a_carried_file_is_refused_and_not_repeated(secret, variable, kind, write, checkout, tmp_path, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, secret)
    name = write(checkout, secret)
    with pytest.raises(MedcotError) as caught:
        build(tmp_path / "here", "demo")
    assert f"{name} holds {kind}. " in str(caught.value) and secret not in str(caught.value)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("known", [False, True])
def test_a_secret_in_a_setting_is_refused_and_not_repeated(known, tmp_path, monkeypatch):
    secret = "somebody special" if known else TOKEN
    if known:
        monkeypatch.setenv("MY_KEY", secret)
    with pytest.raises(MedcotError) as caught:
        build(tmp_path, "demo", [f"tracking.entity={secret}", "secrets.wandb=MY_KEY"])
    kind = "a secret of this machine (environment MY_KEY)" if known else "what looks like a Hugging Face token"
    assert f"--set tracking.entity holds {kind}" in str(caught.value) and secret not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


FAULTS = {
    "title": ({"title": "another name"}, "title 'another name' makes the slug 'another-name', but id says 'medcot-series'"),
    "short title": ({"title": "med"}, "title: 'med' has 3 characters, expected 5 to 50"),
    "internet": ({"enable_internet": False}, "the session must install its pinned stack"),
    "gpu": ({"machine_shape": "NvidiaTeslaP100"}, "choose NvidiaTeslaT4"),
    "unknown GPU": (
        {"machine_shape": "NvidiaTeslaT5"},
        "machine_shape: no accelerator 'NvidiaTeslaT5': expected one of NvidiaTeslaT4",
    ),
    "no GPU": ({"machine_shape": ""}, "enable_gpu is True, but machine_shape is ''"),
    "language": ({"language": "r"}, "language: expected 'python', not 'r'"),
    "unknown field": ({"enable_gpus": True}, "enable_gpus: no such field; remove it"),
    "TPU": ({"enable_tpu": True}, "enable_tpu is true, but the series runs on a CUDA GPU or the CPU"),
    "model": ({"model_sources": ["a/b/c"]}, "is not owner/model/framework/variation/VERSION"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_metadata_is_one_line_that_names_it(fault, tmp_path):
    change, expected = FAULTS[fault]
    values = json.loads((ROOT / METADATA).read_text(encoding="utf-8"))
    (tmp_path / METADATA).write_text(json.dumps(values | change))
    with pytest.raises(MedcotError) as caught:
        read_metadata(tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_metadata_that_is_no_json_is_one_line_and_stays(tmp_path):
    (tmp_path / METADATA).write_text('{"id": "ann/heart-run",')
    for call in (read_metadata, build):
        with pytest.raises(MedcotError, match=r"is not JSON .*: fix it, or remove it and build again"):
            call(tmp_path)
    assert (tmp_path / METADATA).read_text() == '{"id": "ann/heart-run",'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"id": "ann/heart-run"}'.encode("utf-16"), "is not JSON .the text is in UTF-16: save it as UTF-8"),
        (b'{"id": "\xe9"}', "is not JSON .*utf-8"),
        (b"[" * 100_000, "is not JSON .*nested too deep"),
        (b'["ann/heart-run"]', "is not a JSON object"),
    ],
    ids=["UTF-16", "no UTF-8", "too deep", "a list"],
)
def test_metadata_as_odd_tools_write_it_is_one_line(tmp_path, content, said):
    (tmp_path / METADATA).write_bytes(content)
    for call in (read_metadata, build):
        with pytest.raises(MedcotError, match=said):
            call(tmp_path)


def test_metadata_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / METADATA).write_bytes(b"\xef\xbb\xbf" + (ROOT / METADATA).read_bytes())
    assert read_metadata(tmp_path) == read_metadata(ROOT)


def test_the_committed_metadata_is_what_build_writes(tmp_path):
    (tmp_path / METADATA).write_bytes((ROOT / METADATA).read_bytes())
    build(tmp_path)
    assert (tmp_path / METADATA).read_text() == (ROOT / METADATA).read_text()
    assert read_metadata(ROOT).is_private


def test_one_command_of_a_clean_checkout_installs_and_builds():
    def make(*given):
        command = ["make", "-n", "VENV=no-such-environment", "kaggle", *given]
        # Not as a part of the `make test` that may run this.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    lines = make("ID=ann/heart-run", "PROFILE=demo").stdout.splitlines()
    assert any("pip install" in line and "requirements-cpu.txt" in line for line in lines[:-1])
    assert lines[-1] == 'no-such-environment/bin/medcot kaggle build --id "ann/heart-run" --profile "demo"'
    refused = make()
    assert refused.returncode != 0 and "make kaggle ID=NAME/medcot-series" in refused.stderr and refused.stdout == ""
