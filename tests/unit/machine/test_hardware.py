"""Where the series runs: platform, GPUs and the profile they allow, and places."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import pydantic
import pytest

from medcot_utils.errors import PlatformError
from medcot_utils.machine.hardware import Gpu, describe_processor, installed_versions, machine_report, resolve_profile
from medcot_utils.machine.paths import (
    cache_dir,
    default_run_dir,
    ends_with_the_session,
    kaggle_root,
    platform_name,
    scratch_dir,
    under_quota,
)

T4 = Gpu("Tesla T4", 14.7, 14.5, (7, 5))
P100 = Gpu("Tesla P100-PCIE-16GB", 15.9, 15.6, (6, 0))
SMALL = Gpu("GTX 1660", 6.0, 5.6, (7, 5))


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "local"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "kaggle"),
        ({"KAGGLE_KERNEL_RUN_TYPE": ""}, "kaggle"),
        ({"COLAB_RELEASE_TAG": "release-colab"}, "colab"),
    ],
)
def test_platform_is_known_from_the_environment_alone(monkeypatch, environment, name):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert platform_name() == name


def test_the_environment_overrides_the_platforms_run_directory(monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert default_run_dir() == tmp_path / "runs" / "notebooks"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert default_run_dir() == Path("/kaggle/working/runs/notebooks")
    monkeypatch.setenv("MEDCOT_RUN_DIR", str(tmp_path / "mine"))
    assert default_run_dir() == tmp_path / "mine"


def test_a_relative_run_directory_is_found_from_the_checkout(monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MEDCOT_RUN_DIR", "runs/mine")
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        assert default_run_dir() == tmp_path / "runs" / "mine"


@pytest.mark.parametrize(
    ("gpus", "profile", "reason"),
    [
        ([T4], "article", "Tesla T4 with 15 GiB can hold the 8B model"),
        ([SMALL, T4], "article", "Tesla T4"),
        ([P100], "demo", "compute capability 6.0, needs 7.0"),
        ([SMALL], "demo", "6.0 GiB of memory, needs 8; profile small can run here"),
        ([], "demo", "no CUDA GPU is visible"),
    ],
)
def test_auto_takes_the_article_only_if_the_gpu_can_hold_it(gpus, profile, reason):
    chosen, why = resolve_profile("auto", gpus)
    assert chosen == profile
    assert reason in why and "\n" not in why


@pytest.mark.parametrize("profile", ["article", "recommended", "full"])
@pytest.mark.parametrize(
    ("gpus", "reason"), [([], "no CUDA GPU is visible"), ([P100], "compute capability 6.0"), ([SMALL], "6.0 GiB of memory")]
)
def test_an_8b_profile_without_enough_gpu_says_what_to_do(profile, gpus, reason):
    with pytest.raises(PlatformError) as caught:
        resolve_profile(profile, gpus)
    assert reason in str(caught.value)
    smaller = "small" if gpus == [SMALL] else "demo"
    assert f"choose a T4 accelerator; on this machine use profile {smaller}" in str(caught.value)


@pytest.mark.parametrize(("profile", "gpus"), [("smoke", []), ("demo", [T4]), ("small", [SMALL]), ("recommended", [SMALL, T4])])
def test_profile_asked_for_by_name_is_kept_where_it_can_run(profile, gpus):
    assert resolve_profile(profile, gpus)[0] == profile


def test_cache_folder_is_taken_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


def test_versions_come_from_metadata_and_are_none_if_missing():
    versions = installed_versions(["pydantic", "no-such-package-at-all"])
    assert versions["pydantic"] == pydantic.VERSION
    assert versions["no-such-package-at-all"] is None


def test_machine_report_is_json_and_names_the_place(tmp_path):
    report = machine_report(tmp_path)
    assert json.loads(json.dumps(report)) == report
    assert report["platform"] == "local"
    assert 0 < report["memory_free_gib"] <= report["memory_gib"]
    assert report["disk_free_gib"] > 0


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("model name\t: A CPU of 2026\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n", "AVX2, AVX-512, bfloat16, AMX"),
        ("processor: 0\nFeatures\t: fp asimd bf16\n", "NEON, bfloat16"),
        ("flags\t: fpu sse2\n", None),
        (None, None),
    ],
    ids=["x86", "arm", "old", "no such file"],
)
def test_a_processor_is_told_by_its_instructions_not_its_name(tmp_path, cpuinfo, found):
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo, encoding="utf-8")
    assert describe_processor(tmp_path / "cpuinfo") == platform.machine() + (f" with {found}" if found else "")


# --- places --------------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path, monkeypatch):
    """A run directory `real/run`, and the same one through a link, from inside, and by a way around."""
    monkeypatch.setenv("MEDCOT_SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "real" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real" / "run")
    return tmp_path / "real" / "run", [tmp_path / "link" / "run", Path(), tmp_path / "real" / "run" / ".." / "run"]


def test_a_run_has_one_scratch_folder_however_it_is_reached(linked):
    run_dir, ways = linked
    assert {scratch_dir(way) for way in ways} == {scratch_dir(run_dir)}
    assert scratch_dir(run_dir).name.startswith("run-")


def test_a_scratch_folder_of_an_earlier_version_is_found_again(linked, tmp_path):
    run_dir, (link, *_) = linked
    earlier = tmp_path / "scratch" / "medcot" / f"run-{hashlib.sha256(str(link).encode()).hexdigest()[:8]}"
    earlier.mkdir(parents=True)
    assert scratch_dir(link) == earlier
    assert scratch_dir(run_dir) != earlier


@pytest.mark.parametrize(
    ("variable", "place"),
    [
        ("MEDCOT_RUN_DIR", lambda: default_run_dir()),
        ("MEDCOT_CACHE", lambda: cache_dir()),
        ("MEDCOT_KAGGLE_ROOT", lambda: kaggle_root()),
        ("MEDCOT_SCRATCH", lambda: scratch_dir(Path("run")).parents[1]),
    ],
)
def test_a_place_in_the_environment_may_begin_with_a_tilde(variable, place, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "~/place")
    assert place() == tmp_path / "place"


def test_output_reached_through_a_link_counts_for_the_quota(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("MEDCOT_KAGGLE_ROOT", str(tmp_path))
    (tmp_path / "working").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "working")
    assert under_quota(tmp_path / "link" / "run") and not ends_with_the_session(tmp_path / "link" / "run")
    assert not under_quota(tmp_path / "working" / ".." / "tmp")
