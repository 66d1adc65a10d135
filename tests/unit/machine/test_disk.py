"""Room on the disk: needs summed by disk and compared before anything is written, large things on scratch, and a disk that is
really full in the middle of a write: a tmpfs, mounted where this user may. The tests that need one are skipped elsewhere."""

from __future__ import annotations

import errno
import subprocess

import pytest

from medcot_utils.config import load_config
from medcot_utils.export import merged
from medcot_utils.machine import disk, paths
from medcot_utils.machine.disk import DiskError, Need, disk_table, is_disk_full, needs, require_room, shortages, still_to_export
from medcot_utils.machine.paths import GIB, scratch_dir
from medcot_utils.run.directory import Run
from medcot_utils.run.files import write_atomic

ARTICLE = load_config("article")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def filler(size):
    return lambda folder: (folder / "weights.bin").write_bytes(b"0" * size)


def hidden(folder):
    return [path.name for path in folder.rglob(".*")]


# --- needs -----------------------------------------------------------------------------------------------------------


def by_name(wanted):
    return {need.what: need for need in wanted}


def test_the_articles_needs_include_downloads_and_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_hub_cache", lambda: tmp_path / "hub")
    found = by_name(needs(ARTICLE, tmp_path / "run"))
    assert {name: round(need.gib, 1) for name, need in found.items()} == {
        "base model, 16 bits": 15.0,
        "base model, 4 bits": 5.6,
        "data set": 0.2,
        "checkpoints and adapter": 1.0,
        "rows, answers, notebooks, report": 0.3,
        "merged 16-bit model": 16.5,
    }
    assert {need.place for need in found.values()} == {"Hub cache", "run directory"}


@pytest.mark.parametrize(
    ("settings", "counted"),
    [
        ([], True),
        (["model.engine=unsloth", "export.merge_into=base_16bit"], True),
        (["export.merge_into=dequantized_4bit"], False),
        (["model.engine=transformers", "export.merge_into=dequantized_4bit"], True),
        (["model.engine=unsloth", "export.merge_into=dequantized_4bit"], False),
        (["model.engine=unsloth", "export.merge_into=dequantized_4bit", "evaluation.base_16bit_loss=true"], True),
        (["model.engine=unsloth", "export.merge_into=dequantized_4bit", "model.load_in_4bit=false"], True),
        (["model.engine=unsloth", "export.merge_into=dequantized_4bit", "model.quantized_name=null"], True),
    ],
)
def test_the_16_bit_base_counts_where_it_may_be_loaded(settings, counted, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_hub_cache", lambda: tmp_path / "hub")
    config = load_config("article", ["evaluation.base_16bit_loss=false", *settings])
    for wanted in (needs(config, tmp_path / "run"), still_to_export(config, tmp_path / "run", 8e9)):
        assert ("base model, 16 bits" in by_name(wanted)) is counted


def test_only_the_cached_model_itself_lowers_the_disk_need(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_hub_cache", lambda: tmp_path)
    before = by_name(needs(ARTICLE, tmp_path / "run"))["base model, 4 bits"].gib
    ours = f"models--{ARTICLE.model.quantized_name.replace('/', '--')}"
    for name, size in ((ours, GIB), ("models--other--model", 2 * GIB)):
        blob = tmp_path / name / "blobs" / "a"
        blob.parent.mkdir(parents=True)
        with blob.open("wb") as stream:
            stream.truncate(size)
    after = by_name(needs(ARTICLE, tmp_path / "run"))
    assert after["base model, 4 bits"].gib == pytest.approx(before - 1)
    assert after["base model, 16 bits"].gib == pytest.approx(14.96, abs=0.01)


def test_a_local_model_is_measured_and_others_are_called_unknown(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    with (tmp_path / "model" / "model.safetensors").open("wb") as stream:
        stream.truncate(4 * GIB)
    found = by_name(needs(load_config("article", [f"model.name={tmp_path / 'model'}"]), tmp_path / "run"))
    assert found["merged 16-bit model"].gib == pytest.approx(4.4) and "base model, 16 bits" not in found
    monkeypatch.setattr(disk, "_folder_or_hub_bytes", lambda name, revision: None)
    table = disk_table(load_config("article", ["model.name=somebody/model"]), tmp_path / "run")
    assert table.loc["merged 16-bit model", "needed (GiB)"] == "unknown"
    assert "checkpoints and adapter" not in table.index


def test_needs_on_one_disk_add_up_and_the_message_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "disk_free_gib", lambda folder: 4.0)
    wanted = [Need("merged", "run directory", tmp_path / "a", 3.0), Need("base", "Hub cache", tmp_path / "b", 2.5)]
    assert [require_room([need]) for need in wanted] == [None, None], "each alone has room"
    with pytest.raises(DiskError) as caught:
        require_room(wanted)
    assert str(caught.value) == (
        "too little disk: 5.50 GiB needed for the Hub cache and run directory (merged 3.00, base 2.50), 4.00 GiB free. Free some "
        "space there, or take a larger disk: --run-dir for the run, MEDCOT_SCRATCH for the merged model, HF_HOME for downloads, "
        "MEDCOT_CACHE for the embedded models"
    )
    assert shortages([*wanted[:1], Need("who knows", "Hub cache", tmp_path, None)]) == []


def test_a_small_disk_is_one_of_its_own(small_disk, tmp_path):
    wanted = [Need("large", "run directory", small_disk / "run", 0.01), Need("more", "Hub cache", tmp_path, 0.01)]
    [line] = shortages(wanted)
    assert line == "0.01 GiB needed for the run directory (large 0.01), 0.00 GiB free"


def test_notebook_01_refuses_a_run_on_a_disk_that_cannot_hold_it(small_disk):
    with pytest.raises(DiskError, match=r"too little disk: .* GiB needed for the run directory \(.*merged 16-bit model"):
        disk_table(load_config("smoke"), small_disk / "run")
    assert list(small_disk.iterdir()) == []


def test_an_export_written_anew_keeps_the_old_one_until_then(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"0" * 10**6)
    config = load_config("smoke")
    assert by_name(still_to_export(config, tmp_path, 1e9))["merged 16-bit model"].gib == pytest.approx(2.2e9 / GIB)


# --- scratch and quota -------------------------------------------------------------------------------------------------


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    """Kaggle's two places, below a temporary folder."""
    working, tmp = tmp_path / "working", tmp_path / "tmp"
    working.mkdir()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("MEDCOT_KAGGLE_ROOT", str(tmp_path))
    return working, tmp


def test_kaggles_merged_model_is_kept_and_verified_on_scratch(kaggle, write_all):
    working, tmp = kaggle
    run = write_all(Run.create(working / "run", load_config("smoke")))
    merged = run.require("merged")
    assert merged.is_relative_to(tmp) and not (working / "run" / "merged").exists()
    assert run.require("adapter").parent == working / "run"
    assert run.is_fresh("merged") and run.display(merged) == f"scratch/{merged.parent.name}/merged"
    (merged / "weights.bin").unlink()
    assert not Run.open(working / "run").is_fresh("merged"), "gone with the session: made again, not trusted"


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """Colab's own disk and Google Drive, below a temporary folder."""
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setattr(paths, "COLAB_SCRATCH", tmp_path / "content" / "scratch")
    monkeypatch.setattr(paths, "COLAB_DRIVE", tmp_path / "content" / "drive")
    return paths.COLAB_DRIVE / "MyDrive", paths.COLAB_SCRATCH


@pytest.mark.parametrize("platform", ["kaggle", "colab", "colab, not on Drive", "local"])
@pytest.mark.parametrize(("overrides", "pushed"), [([], False), (["hub.repo_id=me/cot"], True)])
def test_a_merge_lost_with_the_session_is_announced(
    platform, overrides, pushed, request, tmp_path, write_all, capsys, monkeypatch
):
    lasting = tmp_path if platform == "local" else request.getfixturevalue(platform.partition(",")[0])[0]
    folder = tmp_path / "content" if "not on" in platform else lasting
    run = write_all(Run.create(folder / "run", load_config("smoke", overrides)))
    run.write("plan", {"total_parameters": 1000})
    (run.require("merged") / "weights.bin").unlink()
    monkeypatch.setattr(merged, "open_merge_base", lambda engine, config: None)
    monkeypatch.setattr(merged, "merge", lambda *what: (what[2] / "weights.bin").write_bytes(b"new"))
    assert (merged.save_merged(None, Run.open(run.path)) / "weights.bin").read_bytes() == b"new"
    told = "on a disk that is lost when this session ends: set hub.repo_id" in capsys.readouterr().out
    assert told is (platform != "local" and not pushed)


def test_a_drive_run_keeps_large_files_on_colabs_own_disk(colab, write_all, monkeypatch, tmp_path):
    drive, scratch = colab
    run = write_all(Run.create(drive / "medcot" / "run", load_config("smoke")))
    assert run.require("merged").is_relative_to(scratch) and run.require("adapter").parent == run.path
    assert scratch_dir(tmp_path / "content" / "run") == tmp_path / "content" / "run"
    monkeypatch.setenv("MEDCOT_SCRATCH", str(drive / "large"))
    assert scratch_dir(run.path).is_relative_to(drive / "large"), "as asked, for who has the room there"


def test_two_runs_do_not_share_their_scratch(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDCOT_SCRATCH", str(tmp_path / "scratch"))
    paths = {scratch_dir(tmp_path / "a" / "run"), scratch_dir(tmp_path / "b" / "run")}
    assert len(paths) == 2 and all(place.is_relative_to(tmp_path / "scratch") for place in paths)


def test_elsewhere_everything_lies_in_the_run_directory(tmp_path, kaggle, monkeypatch):
    assert scratch_dir(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    assert scratch_dir(kaggle[0] / "run") == kaggle[0] / "run"


def test_kaggles_output_folder_is_limited_by_its_quota(kaggle, monkeypatch):
    working, _ = kaggle
    monkeypatch.setattr(paths, "KAGGLE_QUOTA_GIB", 0.003)
    (working / "model").write_bytes(b"0" * int(0.002 * GIB))
    assert paths.disk_free_gib(working / "run") == pytest.approx(0.001, abs=1e-5)
    assert paths.disk_free_gib(working.parent) > 0.01
    wanted = [Need("merged", "scratch disk", working.parent / "tmp", 0.002), Need("answers", "run directory", working, 0.002)]
    assert len(shortages(wanted)) == 1, "one file system, two limits"


# --- a disk that is full -------------------------------------------------------------------------------------------------


def test_a_full_disk_during_a_write_keeps_the_old_artifact(small_disk):
    run = Run.create(small_disk / "run", load_config("smoke"))
    run.write("questions", [{"id": "q"}])
    run.write("train_rows", _rows(1))
    run.write("held_out_rows", _rows(1))
    run.write("adapter", filler(200_000))
    manifest, before = run.manifest(), run.require("adapter")
    with pytest.raises(DiskError) as caught:
        run.write("adapter", filler(2_000_000))
    text = str(caught.value)
    assert text.startswith("the disk of run/ is full (0.00 GiB free): adapter could not be written; the artifacts made before")
    assert "MEDCOT_SCRATCH" in text and isinstance(caught.value.__cause__, OSError)
    assert run.manifest() == manifest and hidden(run.path) == [".lock"]
    assert Run.open(run.path).require("adapter") == before and (before / "weights.bin").stat().st_size == 200_000
    run.write("adapter", filler(300_000))
    assert Run.open(run.path).is_fresh("adapter")


def _rows(number):
    from datasets import Dataset

    return Dataset.from_dict({"id": list(range(number))})


def test_a_full_disk_leaves_artifact_and_manifest_unchanged(small_disk):
    run = Run.create(small_disk / "run", load_config("smoke"))
    run.write("questions", [{"id": "first"}])
    manifest = run.manifest()
    ballast = run.path / "ballast"
    ballast.write_bytes(b"0" * (paths.shutil.disk_usage(small_disk).free - 4096))  # one block: the file, not the manifest
    with pytest.raises(DiskError, match="is full"):
        run.write("questions", [{"id": "second"}])
    assert run.manifest() == manifest and run.read("questions") == [{"id": "first"}] and hidden(run.path) == [".lock"]
    ballast.unlink()
    run.write("questions", [{"id": "second"}])
    assert Run.open(run.path).read("questions") == [{"id": "second"}]


def test_a_full_disk_leaves_a_text_file_as_it_was(small_disk):
    path = small_disk / "config.json"
    write_atomic(path, "first")
    with pytest.raises(DiskError, match=r"config\.json could not be written"):
        write_atomic(path, "x" * 2_000_000)
    assert path.read_text() == "first" and [one.name for one in small_disk.iterdir()] == ["config.json"]


def test_a_full_disk_is_recognized_from_library_errors(small_disk):
    import numpy
    import pyarrow
    import pyarrow.parquet
    import torch
    from safetensors.torch import save_file

    noise = torch.rand(10**6)

    def parquet():
        pyarrow.parquet.write_table(pyarrow.table({"a": numpy.random.default_rng(1).random(10**6)}), small_disk / "c")

    writers = [lambda: torch.save(noise, small_disk / "a"), lambda: save_file({"a": noise}, small_disk / "b"), parquet]
    for number, write in enumerate(writers):
        with pytest.raises(Exception) as caught:
            write()
        assert is_disk_full(caught.value), f"writer {number}: {caught.value!r}"
        for file in small_disk.iterdir():
            file.unlink()


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    assert not is_disk_full(PermissionError(errno.EACCES, "denied")) and not is_disk_full(RuntimeError("out of memory"))
    with pytest.raises(PermissionError), disk.full_disk_told("x", tmp_path):
        raise PermissionError(errno.EACCES, "denied")
    try:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        except OSError as error:
            raise ValueError("the writer gave up") from error
    except ValueError as error:
        assert is_disk_full(error)
