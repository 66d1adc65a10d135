"""The sources of a result beside settings and artifacts: files and folders of this machine, and commits of the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import yaml

from medcot_utils.config import RunConfig
from medcot_utils.machine.paths import PACKAGE
from medcot_utils.run.artifacts import SHIPPED_CASES, SHIPPED_MCQ, Artifact
from medcot_utils.run.files import sha256_of
from medcot_utils.run.manifest import Manifest

DATA_FILE = "data file"  # the one source that every record has
# Weights of some gigabytes cannot be read through at every call.
_MOST_BYTES = 64_000_000
_MCQ_TASKS = PACKAGE / "evaluation" / "mcq"
_MODEL_FILES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".tiktoken"}


def digest_sources(artifact: Artifact, config: RunConfig) -> dict[str, str]:
    """Return {what it is: digest} of the local files and folders that an artifact is made from, those that are there."""
    digests = {}
    # A data file may change under its name: its content counts, not its path.
    data_file = config.dataset.path or (SHIPPED_CASES if config.dataset.name == "shipped" else None)
    if artifact.reads_dataset and data_file and Path(data_file).is_file():
        digests[DATA_FILE] = sha256_of(Path(data_file))[0]
    if artifact.asks_mcq:
        files = {task: SHIPPED_MCQ if task == "shipped" else Path(task) for task in config.evaluation.mcq_tasks}
        digests |= {f"questions of {task}": _digest_file(file) for task, file in files.items() if file.is_file()}
    folders = {}
    if artifact.reads_model:
        folders = {"model.name": config.model.name, "model.quantized_name": config.model.quantized_name}
    elif artifact.measures:
        folders = {"evaluation.embedding_model": config.evaluation.embedding_model}
    places = {setting: Path(name) for setting, name in folders.items() if name}
    return digests | {f"files of {setting}": _digest_folder(place) for setting, place in places.items() if place.is_dir()}


def _digest_folder(folder: Path) -> str:
    """Return the sha256 over the names and digests of a model's files. Checkpoints that lie below it are not the model."""
    counted = sorted(file for file in folder.iterdir() if file.suffix in _MODEL_FILES and file.is_file())
    lines = [f"{file.name}\0{_digest_file(file)}\n" for file in counted]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest_file(file: Path) -> str:
    """Return the sha256 of a file, or of a large one its size and the time of its last change."""
    found = file.stat()
    if found.st_size > _MOST_BYTES:
        return f"{found.st_size} bytes of {found.st_mtime_ns}"
    return _sha256_once(file, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256_once(file: Path, size: int, changed: int) -> str:
    return sha256_of(file)[0]


def find_hub_commits(artifact: Artifact, config: RunConfig) -> dict[str, str]:
    """Return {setting: commit} that the unpinned names an artifact is made from have in the Hub's cache on this machine.

    The Hub's client writes there what `main` was when it last loaded a repository."""
    model, dataset, names = config.model, config.dataset, {}
    if artifact.reads_model:
        names["model.name"] = ("models", model.name, model.revision)
        names["model.quantized_name"] = ("models", model.quantized_name, model.quantized_revision)
    if artifact.reads_dataset and not dataset.path:
        names["dataset.name"] = ("datasets", dataset.name, dataset.revision)
    if artifact.asks_mcq:
        shipped = {file.stem for file in _MCQ_TASKS.glob("*.yaml")}  # a task's name is never followed out of that folder
        tasks = [task for task in config.evaluation.mcq_tasks if task in shipped]
        given = {task: yaml.safe_load((_MCQ_TASKS / f"{task}.yaml").read_text(encoding="utf-8")) for task in tasks}
        names |= {f"evaluation.mcq_tasks {task}": ("datasets", given[task]["dataset_kwargs"]["path"], None) for task in tasks}
    if artifact.measures:
        names["evaluation.embedding_model"] = ("models", config.evaluation.embedding_model, None)
    unpinned = {setting: (kind, name) for setting, (kind, name, revision) in names.items() if name and not revision}
    if not unpinned:
        return {}
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    refs = {setting: cache / f"{kind}--{name.replace('/', '--')}/refs/main" for setting, (kind, name) in unpinned.items()}
    return {setting: ref.read_text(encoding="utf-8").strip() for setting, ref in refs.items() if ref.is_file()}


def describe_moved(commits: Mapping[str, str], manifest: Manifest) -> list[str]:
    """Return a line for each unpinned name that the Hub had at another commit when other artifacts of the run were made."""
    lines = []
    for setting, commit in commits.items():
        recorded = {entry.get("commits", {}).get(setting) for entry in manifest["artifacts"].values()} - {None, commit}
        if recorded:
            before = ", ".join(sorted(one[:12] for one in recorded))
            lines.append(
                f"{setting} is not pinned, and has changed at the Hub: {commit[:12]} now, {before} when other parts of this run "
                f"were made. Pin it with its revision setting"
            )
    return lines


def with_commits_used(config: RunConfig, manifest: Manifest) -> RunConfig:
    """Return the configuration with the recorded commits in place of revisions that are not set, for telling, not for loading."""
    used = {key: commit for entry in manifest["artifacts"].values() for key, commit in entry.get("commits", {}).items()}
    sections = {section: getattr(config, section) for section in ("model", "dataset")}
    return config.model_copy(
        update={
            section: values.model_copy(update={"revision": values.revision or used.get(f"{section}.name")})
            for section, values in sections.items()
        }
    )
