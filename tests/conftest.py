"""What every test stands on: a model cache of its own, no secrets, no platform, and runs in temporary folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medcot_utils.config import RunConfig, load_config
from medcot_utils.machine.secrets import SECRET_NAMES
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.directory import Run

# Tiny models gain nothing from a second thread, and two waiting threads beside a busy process make the tests five times
# slower. Set before torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_SECRETS = [name for names in SECRET_NAMES.values() for name in names]
_PLATFORM = [
    "KAGGLE_KERNEL_RUN_TYPE",
    "COLAB_RELEASE_TAG",
    "PAPERMILL",
    "MEDCOT_RUN_DIR",
    "MEDCOT_NOTEBOOKS",
    "MEDCOT_KAGGLE_ROOT",
]
_SESSION = [
    "MEDCOT_SESSION_STARTED",
    "MEDCOT_SCRATCH",
    "WANDB_MODE",
    "WANDB_BASE_URL",
    "WANDB_DATA_DIR",
    "WANDB_CACHE_DIR",
    "TRACKIO_DIR",
]


@pytest.fixture(scope="session", autouse=True)
def _model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted models go to a folder of this session, unless MEDCOT_CACHE names one that is kept."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("MEDCOT_CACHE"):
            patch.setenv("MEDCOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees the secrets, the platform or the session that it runs in."""
    for name in [*_SECRETS, *_PLATFORM, *_SESSION]:
        monkeypatch.setenv(name, "")  # remembered first, so that what a test sets by other means is taken away again
        monkeypatch.delenv(name)
    for name in ("NETRC", "HF_TOKEN_PATH"):  # nor the token files of whoever runs them
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / "no such file"))


@pytest.fixture
def smoke_config() -> RunConfig:
    return load_config("smoke")


@pytest.fixture
def run_factory(tmp_path: Path) -> Callable[..., Run]:
    """`run_factory("training.max_steps=2", ...)`: the run in `tmp_path/run`, made or taken up again with these settings."""

    def make(*overrides: str, profile: str = "smoke", name: str = "run", force: bool = False) -> Run:
        return Run.create(tmp_path / name, load_config(profile, overrides), force)

    return make


@pytest.fixture
def content() -> Callable[..., Any]:
    """`content("adapter", "second")`: something small that `run.write` takes for that artifact; another tag, other content."""

    def make(name: str, tag: str = "first") -> Any:
        suffix = Path(ARTIFACTS[name].file).suffix
        if suffix == ".parquet":
            from datasets import Dataset

            return Dataset.from_dict({"name": [name], "tag": [tag]})
        if not suffix:
            return lambda folder: (folder / "weights.bin").write_text(f"{name} {tag}")
        return {".jsonl": [{"name": name, "tag": tag}], ".json": {"tag": tag}}.get(suffix, f"{name} {tag}\n")

    return make


@pytest.fixture
def write_all(content: Callable[..., Any]) -> Callable[[Run], Run]:
    """`write_all(run)` writes made-up content for every artifact, in the order of the series, and gives the run back."""

    def write(run: Run) -> Run:
        for name in ARTIFACTS:
            run.write(name, content(name))
        return run

    return write
