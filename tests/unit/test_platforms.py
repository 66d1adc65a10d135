"""Where the series runs: platform, cards and the profile they allow, disk, and secrets that are never shown."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pydantic
import pytest

from medcot_utils.platforms import (
    Gpu,
    PlatformError,
    cache_dir,
    default_run_dir,
    disk_free_gib,
    find_secret,
    hand_on_secrets,
    installed_versions,
    machine_report,
    platform_name,
    require_disk,
    resolve_profile,
    secrets_found,
)

T4 = Gpu("Tesla T4", 14.7, 14.5, (7, 5))
P100 = Gpu("Tesla P100-PCIE-16GB", 15.9, 15.6, (6, 0))
SMALL = Gpu("GTX 1660", 6.0, 5.6, (7, 5))
SECRET = "hf_verysecretvalue0123456789"


@pytest.fixture
def service_modules(tmp_path, monkeypatch):
    """Stands a `kaggle_secrets` or a `google.colab` on the import path, as the platforms do; both log what is asked."""
    asked = tmp_path / "asked.txt"

    def install(name: str, body: str) -> Path:
        kind = {"kaggle": "kaggle_secrets.py", "colab": "google/colab/userdata.py"}[name]
        module = tmp_path / "modules" / kind
        module.parent.mkdir(parents=True, exist_ok=True)
        log = f"    open({str(asked)!r}, 'a').write(name + '\\n')\n{body}\n"
        if name == "kaggle":
            log = "class UserSecretsClient:\n  def get_secret(self, name):\n" + log
        else:
            for package in (module.parent, module.parent.parent):
                (package / "__init__.py").touch()
            log = "def get(name):\n" + log
        module.write_text(log)
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        return asked

    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "google" or name.startswith("google.")}
    yield install
    for name in list(sys.modules):
        if name == "kaggle_secrets" or name == "google" or name.startswith("google."):
            del sys.modules[name]
    sys.modules.update(hidden)


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


def test_default_run_dir_follows_the_platform_and_is_overruled_by_the_environment(monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert default_run_dir() == tmp_path / "runs" / "notebooks"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert default_run_dir() == Path("/kaggle/working/runs/notebooks")
    monkeypatch.setenv("MEDCOT_RUN_DIR", str(tmp_path / "mine"))
    assert default_run_dir() == tmp_path / "mine"


@pytest.mark.parametrize(
    ("cards", "profile", "reason"),
    [
        ([T4], "article", "Tesla T4 with 15 GiB can hold the 8B model"),
        ([SMALL, T4], "article", "Tesla T4"),
        ([P100], "demo", "compute capability 6.0, needs 7.0"),
        ([SMALL], "demo", "6.0 GiB of memory, needs 8"),
        ([], "demo", "no CUDA card is visible"),
    ],
)
def test_auto_takes_the_article_only_on_a_card_that_can_hold_it_and_says_why(cards, profile, reason):
    chosen, why = resolve_profile("auto", cards)
    assert chosen == profile
    assert reason in why and "\n" not in why


@pytest.mark.parametrize("profile", ["article", "recommended", "full"])
@pytest.mark.parametrize(
    ("cards", "reason"), [([], "no CUDA card is visible"), ([P100], "compute capability 6.0"), ([SMALL], "6.0 GiB of memory")]
)
def test_8b_profile_without_a_fitting_card_says_what_is_missing_and_what_to_do(profile, cards, reason):
    with pytest.raises(PlatformError) as caught:
        resolve_profile(profile, cards)
    assert reason in str(caught.value)
    assert "choose a T4 accelerator; on this machine use profile demo" in str(caught.value)


@pytest.mark.parametrize(("profile", "cards"), [("smoke", []), ("demo", [T4]), ("recommended", [SMALL, T4])])
def test_profile_asked_for_by_name_is_kept_where_it_can_run(profile, cards):
    assert resolve_profile(profile, cards)[0] == profile


def test_too_little_disk_names_purpose_need_and_what_is_free(tmp_path):
    folder = tmp_path / "not" / "made" / "yet"
    with pytest.raises(PlatformError, match=r"too little disk for the merge: 1000000000\.00 GiB needed .* GiB free"):
        require_disk(folder, 1e9, "the merge")
    assert require_disk(folder, 0, "nothing") == pytest.approx(disk_free_gib(tmp_path), abs=1)
    assert not folder.exists()


def test_cache_folder_is_taken_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDCOT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


def test_versions_come_from_metadata_and_are_none_for_what_is_missing():
    versions = installed_versions(["pydantic", "no-such-package-at-all"])
    assert versions["pydantic"] == pydantic.VERSION
    assert versions["no-such-package-at-all"] is None


def test_first_name_in_the_environment_wins(monkeypatch):
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "second")
    assert find_secret(["HF_TOKEN", "HUGGINGFACE_TOKEN"]) == ("second", "environment HUGGINGFACE_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "first")
    assert find_secret(["HF_TOKEN", "HUGGINGFACE_TOKEN"]) == ("first", "environment HF_TOKEN")


def test_an_empty_variable_is_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    assert find_secret(["HF_TOKEN"]) is None
    assert secrets_found() == {"Hugging Face": "not found", "Weights & Biases": "not found"}


def test_environment_comes_before_the_kaggle_secret(monkeypatch, service_modules):
    asked = service_modules("kaggle", "    return 'from kaggle' if name == 'wandb' else None")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert find_secret(["WANDB_API_KEY", "wandb"]) == ("from kaggle", "Kaggle secret wandb")
    assert asked.read_text().split() == ["WANDB_API_KEY", "wandb"]
    monkeypatch.setenv("wandb", "from environment")
    assert find_secret(["WANDB_API_KEY", "wandb"]) == ("from environment", "environment wandb")


def test_a_kaggle_service_that_fails_counts_as_not_found(monkeypatch, service_modules):
    asked = service_modules("kaggle", "    raise ConnectionError('no internet')")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert set(secrets_found().values()) == {"not found"}
    assert "HF_TOKEN" in asked.read_text()


def test_kaggle_secrets_are_asked_for_on_kaggle_only(service_modules):
    asked = service_modules("kaggle", "    return 'value'")
    assert find_secret(["HF_TOKEN"]) is None
    assert not asked.exists()


def test_colab_is_asked_in_a_live_notebook_but_not_under_papermill(monkeypatch, service_modules):
    service_modules("colab", "    return 'from colab'")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert find_secret(["HF_TOKEN"]) == ("from colab", "Colab secret HF_TOKEN")
    monkeypatch.setenv("PAPERMILL", "1")
    assert find_secret(["HF_TOKEN"]) is None


def test_no_report_and_no_output_holds_a_secrets_value(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("wandb", SECRET[::-1])
    report = machine_report(tmp_path)
    hand_on_secrets()
    shown = json.dumps(report) + repr(secrets_found()) + "".join(capfd.readouterr())
    assert report["secrets"] == {"Hugging Face": "environment HF_TOKEN", "Weights & Biases": "environment wandb"}
    assert SECRET not in shown and SECRET[::-1] not in shown


def test_found_secrets_are_handed_on_under_the_names_their_clients_read(monkeypatch):
    monkeypatch.setenv("wandb", "key")
    hand_on_secrets()
    assert os.environ["WANDB_API_KEY"] == "key"
    assert "HF_TOKEN" not in os.environ


def test_a_secret_that_stands_already_is_not_replaced(monkeypatch, service_modules):
    service_modules("kaggle", "    return 'from kaggle'")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("HF_TOKEN", "mine")
    monkeypatch.setenv("WANDB_API_KEY", "mine too")
    hand_on_secrets()
    assert (os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]) == ("mine", "mine too")


def test_machine_report_is_json_and_names_the_place(tmp_path):
    report = machine_report(tmp_path)
    assert json.loads(json.dumps(report)) == report
    assert report["platform"] == "local"
    assert 0 < report["memory_free_gib"] <= report["memory_gib"]
    assert report["disk_free_gib"] > 0
