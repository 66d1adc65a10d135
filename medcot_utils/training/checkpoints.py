"""The trainer's checkpoints: the newest one that can be resumed from, and what is wrong with the others."""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from medcot_utils.plain_text import say
from medcot_utils.run.files import remove

Shapes = Sequence[tuple[int, ...]]


def last_good_checkpoint(output_dir: Path, trained: Shapes | None = None) -> Path | None:
    """Return the newest checkpoint that training can resume from, or None. Set broken ones aside, and say why.

    `trained`: the shapes of the trained weights, if known; a checkpoint must hold the same ones."""
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        fault = checkpoint_fault(path, trained)
        if fault is None:
            return path
        # The name must not begin with `checkpoint-`: the trainer would count it, and remove a good checkpoint to make room.
        aside = path.with_name(f"broken-{path.name}")
        say(f"{path.name} is not whole ({fault}): set aside as {aside.name}; an earlier one is used if there is one")
        remove(aside)
        path.rename(aside)
    return None


def is_last(checkpoint: Path) -> bool:
    """Return whether a whole checkpoint is that of the last step."""
    state = _read_json(checkpoint / "trainer_state.json")
    return state["global_step"] >= state["max_steps"]


def checkpoint_fault(path: Path, trained: Shapes | None = None) -> str | None:
    """Return why training cannot resume from a checkpoint with an adapter, or None if it can.

    Each file is read as the trainer reads it. So a file that is cut off, damaged, or written by another version of a library
    is found here, and does not break the training."""
    import zlib

    from safetensors import SafetensorError

    readers: dict[str, Callable[[Path], None]] = {
        "trainer_state.json": _read_state,
        "adapter_model.safetensors": lambda file: _read_adapter(file, trained),
        "optimizer.pt": lambda file: _read_optimizer(file, trained),
        "scheduler.pt": lambda file: _require_keys(_load(file), "last_epoch"),
    }
    # Not every checkpoint has these: a random state per process, a scaler with float16, a configuration.
    optional = {
        "rng_state*.pth": _read_random_state,
        "scaler.pt": lambda file: _require_keys(_load(file)),
        "config.json": _read_json,
    }
    for pattern, read in optional.items():
        readers |= {file.name: read for file in sorted(path.glob(pattern))}
    broken = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError)
    for name, read in readers.items():
        try:
            read(path / name)
        except (*broken, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error).replace(f"{path}/", "").partition("\n")[0]
            return f"{name}: {type(error).__name__}: {reason[:160]}"
    return None


def _read_json(file: Path) -> dict:
    found = json.loads(file.read_text(encoding="utf-8"))
    _require_keys(found)
    return found


def _read_state(file: Path) -> None:
    """Read the state as `TrainerState.load_from_json` does. An unknown field comes from another version and raises TypeError."""
    from transformers import TrainerState

    found = _read_json(file)
    _require_keys(found, "global_step", "max_steps")
    state = TrainerState(**found)
    numbers = isinstance(state.global_step, int) and isinstance(state.max_steps, int) and isinstance(state.epoch, int | float)
    if not numbers or not all(isinstance(entry, dict) and isinstance(entry["step"], int) for entry in state.log_history):
        raise ValueError("expected global_step, max_steps, epoch, and a log with the step of each entry")


def _read_adapter(file: Path, trained: Shapes | None) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        shapes = [tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118 - it is not a dict
    if not shapes or Counter(trained or ()) - Counter(shapes):
        raise ValueError("it does not hold the weights that are trained")


def _read_optimizer(file: Path, trained: Shapes | None) -> None:
    found = _load(file)
    _require_keys(found, "state", "param_groups")
    held = sum(len(group["params"]) for group in found["param_groups"])
    if trained is not None and held != len(trained):
        raise ValueError(f"it holds {held} weights, and {len(trained)} are trained")


def _read_random_state(file: Path) -> None:
    import numpy as np
    import torch

    found = _load(file)
    random.Random().setstate(found["python"])
    np.random.RandomState().set_state(found["numpy"])
    torch.Generator().set_state(found["cpu"])


def _load(file: Path) -> dict:
    import torch
    from transformers.trainer_pt_utils import safe_globals

    with zipfile.ZipFile(file) as archive:  # torch does not check the checksums
        if bad := archive.testzip():
            raise ValueError(f"{bad} is damaged")
    with safe_globals():
        return torch.load(file, map_location="cpu", weights_only=True)


def _require_keys(found: dict, *keys: str) -> None:
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        raise ValueError(f"expected {' and '.join(keys) or 'a state'}")
