"""Merge an adapter into its 16-bit base, and load what is not quantized: the same for both engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psutil import virtual_memory

from medcot_utils.config import ModelSettings
from medcot_utils.errors import MedcotError
from medcot_utils.machine.gpu import free_gpu_memory
from medcot_utils.models.embedded import load_tokenizer, model_source

if TYPE_CHECKING:
    import torch


class MergeError(MedcotError):
    """The adapter and the base do not fit together; the message says where."""


def load_unquantized(source: str | Path, dtype: str, revision: str | None = None, adapter: Path | None = None):
    """(model, tokenizer) in `dtype`, never quantized, with a PEFT adapter where one is named; on the GPU where it has room,
    and a quarter more for what is computed.

    On a smaller GPU, as much of it as leaves that quarter free: the rest waits in the machine's memory and accelerate moves
    it to the GPU when its turn comes. An 8B model in 16 bits takes 15 GiB, and a T4 has 14.6."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    placed = _placement(source, kind, revision)
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=kind, **placed)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), **placed)
    return model, load_tokenizer(source, revision)


def _placement(source: str | Path, kind: torch.dtype, revision: str | None) -> dict[str, Any]:
    """What `from_pretrained` is told of where the weights go; PEFT places them anew, so it is told the same."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not torch.cuda.is_available():
        return {}
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, revision=revision))
    weights = kind.itemsize * sum(parameter.numel() for parameter in shapes.parameters())
    free = free_gpu_memory()
    if free > 1.25 * weights:
        return {"device_map": {"": 0}}
    room = {0: max(0, int(free - 0.25 * weights)), "cpu": virtual_memory().available}
    return {"device_map": "auto", "max_memory": room}


def load_base(settings: ModelSettings, dtype: str, adapter: Path | None = None):
    """(base model, tokenizer) of a configuration, not quantized, with the adapter where one is named."""
    return load_unquantized(model_source(settings.name), dtype, settings.revision, adapter)


# --- merge ---------------------------------------------------------------------------------------------------------


def merge(settings: ModelSettings, adapter: Path, out: Path, dtype: str) -> None:
    """Add the adapter to the 16-bit base (not to the dequantized 4-bit one, whose rounding would be baked in) and save
    model and tokenizer to `out` as safetensors in `dtype`.

    The weights pass through the machine's memory one file (4 GB) at a time: an 8B model is merged in less memory than a free
    Colab machine has, and needs no GPU. A sum is made in float32 and rounded once. Raises MergeError for a base without
    safetensors, or an adapter of another model."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm.auto import tqdm
    from transformers import AutoConfig, GenerationConfig

    kind, folder = getattr(torch, dtype), _weights_folder(settings)
    config = AutoConfig.from_pretrained(folder)
    slices = _tensor_slices(folder)
    changes = _changes(adapter)
    if strange := sorted(changes.keys() - slices.keys()):
        raise MergeError(f"the adapter changes {strange[0]}, which {settings.name} does not have: it is another model's adapter")

    shapes = {name: torch.empty(found.get_shape(), dtype=kind, device="meta") for name, found in slices.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size="4GB")
    out.mkdir(parents=True, exist_ok=True)
    for file, names in tqdm(plan.filename_to_tensors.items(), desc="merging", unit="file"):
        weights = {}
        for name in names:
            weight = slices[name][:]
            weights[name] = changes.get(name, lambda unchanged: unchanged)(weight).to(kind)
        save_file(weights, out / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    tokenizer = load_tokenizer(folder)
    config.dtype = kind
    config.save_pretrained(out)
    named = (folder / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(folder) if named else GenerationConfig.from_model_config(config)
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _weights_folder(settings: ModelSettings) -> Path:
    source = model_source(settings.name)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=settings.revision, allow_patterns=["*.safetensors", "*.json"]))


def _tensor_slices(folder: Path) -> dict[str, Any]:
    """{name: safetensors' lazy slice} of every weight of a model's folder; `slice[:]` reads it."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MergeError(f"no safetensors file lies in {folder.name}/: convert the base model's weights to safetensors first")
    opened = [safe_open(file, framework="pt") for file in files]
    return {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118 - it is no dict


def _changes(adapter: Path) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """{weight's name: what makes the merged weight of it, float32}: W + scaling B A, Hu et al. 2021, section 4.1 (with rsLoRA
    scaling is alpha over the root of r, Kalajdzievski 2023); a bias that was trained takes its old one's place."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    config, weights = PeftConfig.from_pretrained(str(adapter)), load_peft_weights(str(adapter), device="cpu")
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    a, b = ".lora_A.weight", ".lora_B.weight"
    known = all(name.endswith((a, b, ".bias")) for name in weights)
    if not known or config.use_dora or config.rank_pattern or config.alpha_pattern:
        raise MergeError(f"the adapter in {adapter.name}/ is more than LoRA of one rank: merge it with PEFT's merge_and_unload")

    def add(layer: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.float() + scaling * (weights[layer + b].float() @ weights[layer + a].float())

    def replace(name: str, bias: torch.Tensor) -> torch.Tensor:
        return weights[name].float()

    changes = {}
    for name in weights:
        if name.endswith(a):
            changes[_own_name(name.replace(a, ".weight"))] = partial(add, name.removesuffix(a))
        elif name.endswith(".bias"):
            changes[_own_name(name)] = partial(replace, name)
    return changes


def _own_name(peft_name: str) -> str:
    return peft_name.removeprefix("base_model.model.").replace(".base_layer.", ".")
