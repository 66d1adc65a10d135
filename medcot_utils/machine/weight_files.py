"""Which files hold a model's weights: those that transformers reads, and no other safetensors file that lies beside them."""

from __future__ import annotations

import json
from pathlib import Path

from medcot_utils.errors import MedcotError
from medcot_utils.machine.names import require_inside

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFilesError(MedcotError):
    """A model's index of its weights cannot be followed; the message names the file."""


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model's folder that transformers loads, sorted; empty if there are none.

    They are model.safetensors, or else the shards that the index names. Raises WeightFilesError for an index that cannot be
    followed, or a shard that is not there."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        return []
    files = [folder / name for name in sorted(set(read_weight_map(folder / INDEX).values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise WeightFilesError(
            f"{missing[0]} is missing in {folder.name}/, though {INDEX} names it: copy or download the model's folder again"
        )
    return files


def read_weight_map(index: Path) -> dict[str, str]:
    """Return {weight: its file} of an index of shards. Raises WeightFilesError for an index that cannot be followed, and
    OutsideError for one that names a file of another folder."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        usable = bool(found) and all(name.endswith(".safetensors") for name in found.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        usable = False
    if not usable:
        raise WeightFilesError(
            f"{index.name} in {index.parent.name}/ is not an index of weights: expected a weight_map that names a file of the "
            f"same folder for each weight. Copy or download the model's folder again"
        )
    for name in set(found.values()):  # links stay allowed: the Hub's cache consists of them
        require_inside(name, f"{index.name} in {index.parent.name}/")
    return found
