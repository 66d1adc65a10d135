"""What every test stands on: a model cache of its own, no secrets, no platform, and runs in temporary folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from medcot_utils.config import RunConfig, load_config
from medcot_utils.machine import secrets
from medcot_utils.run.artifacts import ARTIFACTS, STEPS
from medcot_utils.run.directory import Run
from medcot_utils.run.files import remove

# Tiny models gain nothing from a second thread, and two waiting threads beside a busy process make the tests five times
# slower. Set before torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_SECRETS = [name for names in secrets.SECRET_NAMES.values() for name in names]
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
    "MEDCOT_HOME",
    "PYTHONSAFEPATH",
    "WANDB_MODE",
    "WANDB_BASE_URL",
    "WANDB_DATA_DIR",
    "WANDB_CACHE_DIR",
    "TRACKIO_DIR",
    "TRACKIO_SPACE_ID",
    "TRACKIO_SERVER_URL",
]


TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by folder what starts a session, a server, a browser or notebooks, and begin with the files that take longest.

    xdist hands out whole files in this order (`--dist loadfile --no-loadscope-reorder`), so that no long one comes last."""
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0]
        if tier in ("series", "gpu", "campaign"):
            item.add_marker(tier)
        elif tier == "sessions":
            item.add_marker("series")
            item.add_marker("session")
        elif tier == "services":
            item.add_marker("server")
            if any(hasattr(item.module, name) for name in ("CHROMIUM", "Browser")):
                item.add_marker("browser")
    heavy = {item.path for item in items if item.get_closest_marker("model") or item.get_closest_marker("embedded")}
    items.sort(key=lambda item: (_rank(item.path), item.path not in heavy))


def _rank(path: Path) -> int:
    """Return a file's place in the order. Files that wait for the same smoke series are apart: two workers would both wait."""
    longest = [
        *("sessions/test_kaggle_sessions.py", "sessions/test_redone.py", "sessions/test_no_secret.py"),
        *("sessions/test_processes.py", "series/test_series.py", "services/test_wandb_online.py", "series/test_two_processes.py"),
    ]
    file = f"{path.parent.name}/{path.name}"
    if file in longest:
        return longest.index(file)
    return len(longest) + (path.parent.name != "sessions")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder of the whole test session, the same one in every xdist worker."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _model_cache(shared_folder: Path) -> Iterator[None]:
    """Converted models go to a folder of this session, unless MEDCOT_CACHE names one that is kept."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("MEDCOT_CACHE"):
            patch.setenv("MEDCOT_CACHE", str(shared_folder / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _user_key() -> Iterator[None]:
    """Runs are signed with a key of this session: no test makes one in the home of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDCOT_KEY", "the key of whoever runs the tests")
        yield


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees the secrets, the platform or the session that it runs in."""
    for name in [*_SECRETS, *_PLATFORM, *_SESSION]:
        monkeypatch.setenv(name, "")  # remembered first, so that what a test sets by other means is taken away again
        monkeypatch.delenv(name)
    for name in ("NETRC", "HF_TOKEN_PATH"):  # nor the token files of whoever runs them
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / "no such file"))
    monkeypatch.setattr(secrets, "found_secrets", {})  # nor what an earlier test of this process found


@pytest.fixture(scope="session")
def smoke_series(shared_folder: Path) -> Path:
    """The folder of the seven notebooks on profile smoke, run once a session: `run/`, and `stdout` and `stderr` of the command.

    To be copied, never changed."""
    folder = shared_folder / "series"
    with FileLock(shared_folder / "series.lock"):
        if not (folder / "exit").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            medcot = Path(sys.executable).with_name("medcot")
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
            command = [str(medcot), "run", "--profile", "smoke", "--run-dir", str(folder / "run")]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, check=False)
            (folder / "stdout").write_text(done.stdout, encoding="utf-8")
            (folder / "stderr").write_text(done.stderr, encoding="utf-8")
            (folder / "exit").write_text(str(done.returncode))
    said = (folder / "stdout").read_text(encoding="utf-8") + (folder / "stderr").read_text(encoding="utf-8")
    assert (folder / "exit").read_text() == "0", said
    return folder


@pytest.fixture(scope="session")
def copy_before_training(smoke_series: Path) -> Callable[[Path], Path]:
    """`copy_before_training(run_dir)`: the session's series copied there as it was after notebook 04."""

    def copy(run_dir: Path) -> Path:
        shutil.copytree(smoke_series / "run", run_dir)
        run = Run.open(run_dir)
        for step in ("05_training", "06_comparison", "07_export"):
            for name in STEPS[step].makes:
                remove(run_dir / ARTIFACTS[name].file)
            run.forget(step)
            remove(run_dir / "notebooks" / f"{step}.ipynb")
        return run_dir

    return copy


@pytest.fixture
def work_elsewhere() -> Iterator[Callable[[Path], None]]:
    """`work_elsewhere(run_dir)`: until the test ends, another process holds the lock of that run directory."""
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    started: list[subprocess.Popen] = []

    def work(run_dir: Path) -> None:
        command = [sys.executable, "-c", code, str(run_dir / ".lock")]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        started[-1].stdout.readline()

    yield work
    for process in started:
        process.communicate(b"\n")


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
