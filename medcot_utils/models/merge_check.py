"""Compare a merged model's files with its base and adapter, weight by weight, in float32 and in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import ModelSettings
from medcot_utils.models.merging import MergeBase, open_16bit_base, open_weights, own_name, read_config
from medcot_utils.models.stored_names import find_stored_names

if TYPE_CHECKING:
    import torch

    Change = Callable[[], torch.Tensor]
    Slices = Mapping[str, Any]  # safetensors' lazy slices by the weights' names

PIECE = 2**22  # values of a weight that are compared at once: 16 MiB in float32
_LEAST_KEPT = 0.5


class WeightCheck(TypedDict):
    """Hold the comparison of a merged model's weights with base + adapter."""

    weights: int  # the number of the base's weights
    changed: int  # the number of weights that the adapter changes
    wrong: list[str]  # weights that are not the rounded sum, each with what is wrong
    kept: float | None  # share of the adapter's change that is left after rounding; None if it changes nothing


def compare_weights(settings: ModelSettings, adapter: Path, merged: Path, base: MergeBase | None = None) -> WeightCheck:
    """Compare each weight in `merged` with the base's weight plus the change that PEFT computes from the adapter.

    `base` is what the adapter was merged into; by default, the 16-bit base. A weight is right if each of its values is as near to
    the float32 sum as its dtype allows. That bound does not grow with the model, and an adapter that is lost or added twice
    breaks it in any dtype. Memory holds one layer's change and a piece of its weight at a time. Raises MergeError if files are
    missing or damaged."""
    into = base or open_16bit_base(settings)
    ours, found = into.weights, open_weights(merged)
    changes = _read_peft_changes(into.folder, adapter, ours)
    wrong = [f"{name} is missing" for name in sorted(ours.keys() - found.keys())]
    wrong += [f"{name} is not in the base" for name in sorted((found.keys() | changes.keys()) - ours.keys())]
    projected = squared = 0.0
    for name in sorted(ours.keys() & found.keys()):
        if ours[name].get_shape() != found[name].get_shape():
            wrong.append(f"{name} has shape {found[name].get_shape()} instead of {ours[name].get_shape()}")
            continue
        change = changes[name]() if name in changes else None
        as_expected, along, size = _compare_weight(ours[name], found[name], change)
        if not as_expected:
            times = round(along / size, 2) + 0.0 if size else None  # no -0.00
            wrong.append(f"{name} {'is not what the base has' if times is None else f'holds {times:.2f} times the change'}")
        projected, squared = projected + along, squared + size
    return {
        "weights": len(ours),
        "changed": len(changes),
        "wrong": wrong,
        "kept": projected / squared if squared else None,
    }


def find_weight_fault(check: WeightCheck) -> str | None:
    """Return in one phrase what is wrong with a merged model's weights, or None."""
    if check["wrong"]:
        return f"{len(check['wrong'])} of {check['weights']} weights are not base + adapter, first {check['wrong'][0]}"
    if check["kept"] is not None and check["kept"] < _LEAST_KEPT:
        return (
            f"rounding leaves only {100 * check['kept']:.0f} % of the adapter's change (at least {100 * _LEAST_KEPT:.0f} % "
            f"expected): set export.dtype=float16, which is finer than bfloat16, or train more"
        )
    return None


def _compare_weight(base: Any, found: Any, change: torch.Tensor | None) -> tuple[bool, float, float]:
    """Return whether a merged weight is the rounded sum, (merged - base) . change, and change . change.

    Args:
        base, found: lazy slices of the same shape.
        change: the adapter's change, in float32; None for a weight that it leaves alone."""
    import torch

    shape = base.get_shape()
    if not shape:  # a single number
        return _is_rounded_sum(base[:], found[:], None), 0.0, 0.0
    rows = max(1, PIECE // max(1, math.prod(shape[1:])))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    right, along, size = True, 0.0, 0.0
    for at in range(0, shape[0], rows):
        ours, theirs = base[at : at + rows].to(device).float(), found[at : at + rows].to(device)
        added = None if change is None else change[at : at + rows].to(device)
        right = _is_rounded_sum(ours, theirs, added) and right
        if added is not None:
            along += float(((theirs.float() - ours) * added).sum(dtype=torch.float64))
            size += float(added.square().sum(dtype=torch.float64))
    return right, along, size


def _is_rounded_sum(base: torch.Tensor, found: torch.Tensor, added: torch.Tensor | None) -> bool:
    expected = base.float() if added is None else base + added
    rounded = expected.to(found.dtype)
    if not found.isfinite().all():
        return False
    if rounded.equal(found):
        return True
    # In float32, the order of summation matters a little. That may move a sum that lies halfway between two values of the dtype.
    slack = 1e-6 * expected.abs() + (0.0 if added is None else 1e-5 * added.abs().max())
    return bool(((found.float() - expected).abs() <= (rounded.float() - expected).abs() + slack).all())


def _read_peft_changes(folder: Path, adapter: Path, base: Slices) -> dict[str, Change]:
    """Return {weight that the adapter changes: function that returns its change, in float32, as PEFT computes it}.

    PEFT's layers are built around a model on the meta device, so that only the adapter's own matrices need memory."""
    import torch
    from peft import PeftConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.utils import load_peft_weights
    from transformers import AutoModelForCausalLM

    config, settings = read_config(folder), PeftConfig.from_pretrained(str(adapter))
    settings.base_model_name_or_path = None  # PEFT would warn that the embedded model's name differs from its folder's
    with torch.device("meta"):
        tuned = get_peft_model(AutoModelForCausalLM.from_config(config, trust_remote_code=False), settings)
    weights = {name: weight.float() for name, weight in load_peft_weights(str(adapter), device="cpu").items()}
    own = {name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): weights[name] for name in weights}
    tuned.load_state_dict(own, strict=False, assign=True)

    def add(layer: LoraLayer) -> torch.Tensor:
        return layer.get_delta_weight("default").detach()

    def replace(name: str, bias: torch.Tensor) -> torch.Tensor:
        return bias - base[name][:].float()

    layers = {own_name(f"{name}.weight"): layer for name, layer in tuned.named_modules() if isinstance(layer, LoraLayer)}
    biases = {own_name(name): bias for name, bias in weights.items() if name.endswith(".bias")}
    stored = find_stored_names(config, [*layers, *biases], base)
    return {stored[name]: partial(add, layer) for name, layer in layers.items()} | {
        stored[name]: partial(replace, stored[name], bias) for name, bias in biases.items()
    }
