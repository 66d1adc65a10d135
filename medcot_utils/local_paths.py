"""The files and folders of this machine that settings name, and their absolute form."""

from __future__ import annotations

import os
from pathlib import Path

from medcot_utils.config import RunConfig, with_values

# Settings that hold a path of this machine, or may hold one in place of a name.
_PATHS = (
    "dataset.path",
    "dataset.name",
    "model.name",
    "model.quantized_name",
    "evaluation.mcq_tasks",
    "evaluation.embedding_model",
)


def local_paths(config: RunConfig) -> dict[str, list[str]]:
    """Return the settings that name files or folders of this machine, each with its paths as they are written."""
    found = {}
    for name in _PATHS:
        value = config.get(name)
        values = value if isinstance(value, list) else [value]
        found[name] = [text for text in values if text is not None and _is_local(name, text)]
    return {name: paths for name, paths in found.items() if paths}


def _is_local(setting: str, text: str) -> bool:
    if setting == "evaluation.mcq_tasks":
        return text.endswith(".jsonl")
    return setting == "dataset.path" or text.startswith(("/", "~", "./", "../")) or (text != "shipped" and Path(text).is_dir())


def with_absolute_paths(config: RunConfig, held: RunConfig | None = None) -> RunConfig:
    """Return a configuration that means the same from every folder: its local paths absolute, `~` replaced.

    A path that `held`, the configuration of an existing run, names in another way stays as it is there: the name is part of
    fingerprints, and another name for the same file redoes nothing."""
    changes = {}
    for setting, found in local_paths(config).items():
        spelled = {path: _absolute(path) for path in found}
        for earlier in local_paths(held).get(setting, []) if held else []:
            same = [path for path in found if os.path.realpath(_absolute(earlier)) == os.path.realpath(spelled[path])]
            spelled |= dict.fromkeys(same, earlier)
        value = config.get(setting)
        changes[setting] = [spelled.get(one, one) for one in value] if isinstance(value, list) else spelled[value]
    return with_values(config, changes)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - links stay, and no unknown ~name is an error
