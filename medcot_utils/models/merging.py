"""Merge an adapter into its base, file by file, and load models that are not quantized, for both engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils.config import ModelSettings
from medcot_utils.errors import MedcotError
from medcot_utils.machine.weight_files import INDEX, SINGLE, read_weight_map, weight_files
from medcot_utils.models.embedded import find_model_source
from medcot_utils.models.placement import place_weights
from medcot_utils.models.stored_names import find_stored_names
from medcot_utils.models.tokenizer import load_tokenizer_from, own_code_refused
from medcot_utils.plain_text import say

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


# Configuration and tokenizer of any kind; newer repositories have the chat template in its own file.
_BESIDE_THE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model")


class MergeError(MedcotError):
    """Say why an adapter cannot be merged into its base."""


def load_unquantized(source: str | Path, dtype: str, revision: str | None = None, adapter: Path | None = None) -> Loaded:
    """Return (model, tokenizer) in `dtype`, never quantized, with the PEFT adapter if one is given.

    The model is on one GPU if its weights and a quarter more for computing fit, else on all visible GPUs together. If these are
    too small, that quarter stays free, and weights that don't fit stay in RAM; accelerate copies them when they are needed. An
    8B model in 16 bits takes 15 GiB, and a T4 has 14.6. Raises ModelError as `load_tokenizer_from` does."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with own_code_refused(source):
        placed = place_weights(source, dtype, revision)
        named = {"revision": revision, "dtype": getattr(torch, dtype)}
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **named, **placed)
    if adapter is not None:  # PEFT places the weights again
        model = PeftModel.from_pretrained(model, str(adapter), **placed)
    return model, load_tokenizer_from(source, revision)


def load_base(settings: ModelSettings, dtype: str, adapter: Path | None = None) -> Loaded:
    """Return (base model, tokenizer) of a configuration, not quantized, with the adapter if one is given."""
    return load_unquantized(find_model_source(settings.name), dtype, settings.revision, adapter)


# --- merge ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeBase:
    """Hold the base that an adapter is added to.

    name: its name, for messages. folder: the folder with its configuration and tokenizer. weights: its weights by their names
    in files, which are read like safetensors' lazy slices: `get_shape()`, `[:]`, `[first:last]`."""

    name: str
    folder: Path
    weights: Mapping[str, Any]


def open_16bit_base(settings: ModelSettings) -> MergeBase:
    """Return a configuration's 16-bit base as its files have it. Download it first if it is on the Hub.

    Raises MergeError as `open_weights` does."""
    folder = find_weights_folder(settings.name, settings.revision)
    return MergeBase(settings.name, folder, open_weights(folder))


def merge(settings: ModelSettings, adapter: Path, out: Path, dtype: str, base: MergeBase | None = None) -> None:
    """Save the base with the adapter added, and its tokenizer, to `out` as safetensors in `dtype`.

    The default base is the 16-bit one (`dequantized` has others). One file (4 GB) is in memory at a time, so an 8B model can be
    merged without a GPU and in less memory than a free Colab machine has. PEFT's merge_and_unload needs the whole model in
    memory. Sums are computed in float32 and rounded once. Only files that transformers loads are read.

    Raises:
        MergeError: if the base has no whole safetensors files, or if the adapter belongs to another model or is more than plain
            LoRA of one rank.
        WeightFilesError: if shards do not match their index.
        ModelError: as `load_tokenizer_from` does."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    kind, base = getattr(torch, dtype), base or open_16bit_base(settings)
    config, slices = read_config(base.folder), base.weights
    changes = _read_changes(adapter)
    stored = find_stored_names(config, changes, slices)
    changes = {stored[name]: change for name, change in changes.items()}
    if strange := sorted(changes.keys() - slices.keys()):
        raise MergeError(
            f"the adapter changes {strange[0]}, which {base.name} does not have: the adapter belongs to another model"
        )

    # These files come before the weights, so that a fault in them is found before minutes of merging.
    tokenizer = load_tokenizer_from(base.folder)
    generation = _read_generation_config(base.folder, config, tokenizer)
    shapes = {name: torch.empty(found.get_shape(), dtype=kind, device="meta") for name, found in slices.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size="4GB")
    out.mkdir(parents=True, exist_ok=True)
    for file, names in tqdm(plan.filename_to_tensors.items(), desc="merging", unit="file"):
        weights = {}
        for name in names:
            weight = slices[name][:]
            weights[name] = changes.get(name, lambda unchanged: unchanged)(weight).to(kind).cpu()
        save_file(weights, out / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    config.dtype = kind
    config.save_pretrained(out)
    generation.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _read_generation_config(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the base's generation settings with the tokenizer's special tokens, in a form that transformers can save.

    Some checkpoints set a temperature without do_sample, which transformers loads but refuses to save; do_sample is added.
    Settings that are wrong in another way, or cannot be read, are left out. Either way, one line says so."""
    from transformers import GenerationConfig

    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    named, fault = (folder / "generation_config.json").exists(), ""
    for repair in ({}, {"do_sample": True}):
        try:
            found = GenerationConfig.from_pretrained(folder) if named else GenerationConfig.from_model_config(config)
            found.update(**tokens, **repair)
            found.validate(strict=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            fault = fault or " ".join(str(error).split())[:200]
            continue
        if repair:
            say(f"the base's generation settings do not validate, and do_sample=true is added: {fault}")
        return found
    say(f"the base's generation settings cannot be used, so only its special tokens are kept: {fault}")
    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, **tokens)


def read_config(folder: Path) -> PretrainedConfig:
    """Return a model's configuration, without the note in a quantized copy that its weights are quantized."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def find_weights_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder with a model's weights, configuration, and tokenizer. Download it first if it is on the Hub."""
    source = find_model_source(name)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*_BESIDE_THE_WEIGHTS, SINGLE]))
    if not (folder / SINGLE).exists() and (folder / INDEX).exists():
        shards = sorted(set(read_weight_map(folder / INDEX).values()))
        snapshot_download(source, revision=revision, allow_patterns=[*_BESIDE_THE_WEIGHTS, *shards])
    return folder


def open_weights(folder: Path) -> dict[str, Any]:
    """Return {name: lazy slice} for every weight in a model's folder that transformers would load; `slice[:]` reads it.

    Raises MergeError if there is no safetensors file or one is damaged, and WeightFilesError as `weight_files` does."""
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder)
    if not files:
        raise MergeError(
            f"there is no safetensors file in {folder.name}/ ({SINGLE}, or shards named in {INDEX}): convert the base model's "
            f"weights to safetensors first"
        )
    try:
        opened = [safe_open(file, framework="pt") for file in files]
    except SafetensorError as error:
        raise MergeError(f"a weights file in {folder.name}/ is damaged ({error}): copy or download the folder again") from error
    return {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118 - it is not a dict


def _read_changes(adapter: Path) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return {name of a changed weight: function that returns the merged weight, in float32, on a GPU if there is one}.

    The merged weight is W + scaling B A (Hu et al. 2021, section 4.1). With rsLoRA, the scaling is alpha divided by the square
    root of r (Kalajdzievski 2023). A trained bias replaces the old one."""
    import torch
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, weights = PeftConfig.from_pretrained(str(adapter)), load_peft_weights(str(adapter), device=device)
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    a, b = ".lora_A.weight", ".lora_B.weight"
    known = all(name.endswith((a, b, ".bias")) for name in weights)
    if not known or config.use_dora or config.rank_pattern or config.alpha_pattern:
        raise MergeError(
            f"the adapter in {adapter.name}/ is more than plain LoRA of one rank: merge it with PEFT's merge_and_unload"
        )

    def add(layer: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(device).float() + scaling * (weights[layer + b].float() @ weights[layer + a].float())

    def replace(name: str, bias: torch.Tensor) -> torch.Tensor:
        return weights[name].float()

    changes = {}
    for name in weights:
        if name.endswith(a):
            changes[own_name(name.replace(a, ".weight"))] = partial(add, name.removesuffix(a))
        elif name.endswith(".bias"):
            changes[own_name(name)] = partial(replace, name)
    return changes


def own_name(peft_name: str) -> str:
    """Return the base's name of a weight, from PEFT's name."""
    return peft_name.removeprefix("base_model.model.").replace(".base_layer.", ".")
