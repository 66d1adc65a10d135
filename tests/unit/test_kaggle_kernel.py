"""The notebook for Kaggle: small, the same every time, carrying what a bare session needs; and metadata checked beforehand."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import tarfile
from pathlib import Path

import nbformat
import pytest

from medcot_utils.errors import MedcotError
from medcot_utils.kaggle_kernel import METADATA, build, carried_files, read_metadata
from medcot_utils.layout import STEPS

ROOT = Path(__file__).parents[2]


def cells(built):
    return [cell.source for cell in nbformat.read(built.notebook, as_version=4).cells if cell.cell_type == "code"]


def carried(built):
    """{name: content} of what the built notebook holds as text."""
    source = next(source for source in cells(built) if source.startswith("PROJECT"))
    packed = base64.b64decode(source.split('"""')[1])
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def test_the_notebook_carries_package_notebooks_and_pins_and_stays_small(tmp_path):
    built = build(tmp_path, "demo")
    files = carried(built)
    tracked = subprocess.run(["git", "ls-files", "medcot_utils"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(tracked.stdout.split()) <= set(files)
    assert {f"notebooks/{name}.ipynb" for name in STEPS} <= set(files)
    assert {"requirements.txt", "requirements-cpu.txt", "requirements-nodeps.txt", "pyproject.toml"} <= set(files)
    assert files["medcot_utils/run.py"] == (ROOT / "medcot_utils" / "run.py").read_bytes()
    assert not any("__pycache__" in name for name in files)
    assert built.bytes == built.notebook.stat().st_size < 400_000, "Kaggle takes less than 1 MB"


def test_the_carried_notebooks_keep_their_cells_and_tags_without_outputs(tmp_path):
    for name in STEPS:
        original = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        carried_one = nbformat.reads(carried_files()[f"notebooks/{name}.ipynb"].decode(), as_version=4)
        assert [(c.source, c.metadata) for c in carried_one.cells] == [(c.source, c.metadata) for c in original.cells]
        assert not any(cell.get("outputs") for cell in carried_one.cells)


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    from medcot_utils.kaggle_kernel import payload

    first = build(tmp_path / "a", "demo", ["training.max_steps=3"]).notebook.read_bytes()
    payload.cache_clear()
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
    # Without a limit of one's own the training pauses before Kaggle would end the session.
    assert values["SETTINGS"] == [
        "training.max_steps=3",
        "dataset.path=/kaggle/input/mine/rows.jsonl",
        "training.max_hours=10",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"profile": "artikle"}, "did you mean article"),
        ({"settings": ["training.max_step=3"]}, "did you mean training.max_steps"),
        ({"settings": ["dataset.path=rows.jsonl"]}, "make it a data set on Kaggle"),
        ({"kernel": "medcot-series"}, "is not owner/slug"),
        ({"kernel": "ann/Medcot"}, "is not owner/slug"),
        ({"kernel": "ann/med"}, "at least five"),
        ({"continue_from": ["first-run"]}, "kernel_sources: 'first-run' is not owner/slug"),
        ({"datasets": ["a/b/c"]}, "dataset_sources: 'a/b/c' is not owner/slug"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(arguments, expected, tmp_path):
    with pytest.raises(MedcotError, match=expected):
        build(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_the_metadata_has_is_kept_and_what_is_given_is_added(tmp_path):
    build(tmp_path, "demo", kernel="ann/heart-run", datasets=["ann/rows"], public=True)
    held = json.loads((tmp_path / METADATA).read_text())
    assert "docker_image" not in held
    (tmp_path / METADATA).write_text(json.dumps(held | {"docker_image": "image:1", "model_sources": ["a/b/c/d/1"]}))
    metadata = build(tmp_path, "article", continue_from=["ann/first-run"]).metadata
    assert (metadata.docker_image, metadata.model_sources) == ("image:1", ["a/b/c/d/1"])
    assert (metadata.id, metadata.title, metadata.is_private) == ("ann/heart-run", "heart run", False)
    assert (metadata.dataset_sources, metadata.kernel_sources) == (["ann/rows"], ["ann/first-run"])
    assert (metadata.enable_gpu, metadata.machine_shape) == (True, "NvidiaTeslaT4")
    assert build(tmp_path, "article", continue_from=["ann/first-run"], public=False).metadata.kernel_sources == ["ann/first-run"]


FAULTS = {
    "title": ({"title": "another name"}, "title 'another name' makes the slug 'another-name', but id says 'medcot-series'"),
    "short title": ({"title": "med"}, "title: String should have at least 5 characters"),
    "internet": ({"enable_internet": False}, "the session must install its pinned stack"),
    "card": ({"machine_shape": "NvidiaTeslaP100"}, "choose NvidiaTeslaT4"),
    "no card": ({"machine_shape": ""}, "enable_gpu is True, but machine_shape is ''"),
    "language": ({"language": "r"}, "language: Input should be 'python'"),
    "unknown field": ({"enable_gpus": True}, "enable_gpus: Extra inputs are not permitted"),
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
        with pytest.raises(MedcotError, match=r"is not JSON .*: mend it, or remove it and build again"):
            call(tmp_path)
    assert (tmp_path / METADATA).read_text() == '{"id": "ann/heart-run",'


def test_the_committed_metadata_is_what_build_writes(tmp_path):
    (tmp_path / METADATA).write_bytes((ROOT / METADATA).read_bytes())
    build(tmp_path)
    assert (tmp_path / METADATA).read_text() == (ROOT / METADATA).read_text()
    assert read_metadata(ROOT).is_private
