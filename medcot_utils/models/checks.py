"""Check a model before it is loaded: whether notebook 07 can merge it, and whether its tokenizer and context fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcot_utils.config import ModelSettings, RunConfig
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.data.rows import choose_questions, load_rows, split_rows, validate_rows
from medcot_utils.errors import quote
from medcot_utils.machine.weight_files import INDEX, SINGLE
from medcot_utils.models.batches import GenerationError, check_context
from medcot_utils.models.embedded import PREFIX, find_model_source
from medcot_utils.models.tokenizer import NO_CODE, ModelError, load_tokenizer_from

_MUCH_OF_A_CONTEXT = 5_000  # characters of a question: about a thousand tokens


@dataclass(frozen=True)
class _Found:
    """Hold the content of a model's folder or repository."""

    config: Path
    files: list[str]
    tokenizer: Path | None = None  # its tokenizer_config.json, if there is one


def is_at_hand(settings: ModelSettings) -> bool:
    """Return whether a model is embedded or a local folder, so that the Hub is not needed."""
    return settings.name.startswith((PREFIX, ".", "~", "/")) or Path(settings.name).is_dir()


def check_model(settings: ModelSettings) -> str:
    """Check a model by its config.json, its file names and, for a local folder, its tokenizer. Return one line on it.

    Raises:
        ModelError: if the folder is missing or holds no model, if the weights are quantized already or are not safetensors, if
            `load_tokenizer_from` refuses the tokenizer, or if the code of the model or of its quantized copy is not in
            transformers."""
    if settings.quantized_name and settings.load_in_4bit and settings.engine != "transformers":
        _check_copy(settings.model_copy(update={"name": settings.quantized_name, "revision": settings.quantized_revision}))
    name, folder = settings.name, Path(settings.name)
    if name.startswith(PREFIX):
        return f"{name}: made on this machine"
    local = is_at_hand(settings)
    found = _look_into(folder, "model.name") if local else _look_up(settings)
    if found is None:
        return f"{name}: the Hub cannot be reached, so the model was not checked"
    config = _require_known_code(f"model.name {name}", found)
    architecture = (config.get("architectures") or ["a model without an architecture"])[0]
    if quantization := config.get("quantization_config"):
        raise ModelError(
            f"model.name {name} is quantized already ({quantization.get('quant_method', 'unknown method')}), and the adapter is "
            f"merged into 16-bit weights. Name the 16-bit model; model.load_in_4bit quantizes it when it is loaded. A quantized "
            f"copy for Unsloth goes into model.quantized_name"
        )
    if not {SINGLE, INDEX} & set(found.files):
        kinds = sorted({Path(file).suffix for file in found.files if Path(file).suffix in (".bin", ".pt", ".pth", ".gguf")})
        have = f"only {', '.join(kinds)}" if kinds else "no weights at all"
        raise ModelError(
            f"model.name {name} has no safetensors ({have}), which the merge reads. Load it once with transformers, "
            f"write it with save_pretrained, and set model.name to that folder"
        )
    if local:
        load_tokenizer_from(folder)
    else:
        _require_known_tokenizer(settings, found)
    return f"{name}: {architecture}"


def _check_copy(copy: ModelSettings) -> None:
    """Raise ModelError if a quantized copy, given as the settings of a model, is not a model's folder or needs its own code."""
    found = _look_into(Path(copy.name), "model.quantized_name") if is_at_hand(copy) else _look_up(copy)
    if found:
        _require_known_code(f"model.quantized_name {copy.name}", found)
        _require_known_tokenizer(copy, found)


def _require_known_tokenizer(settings: ModelSettings, found: _Found) -> None:
    if found.tokenizer and "auto_map" in json.loads(found.tokenizer.read_text(encoding="utf-8")):
        load_tokenizer_from(settings.name, settings.revision)  # downloaded only to find out whether it loads without that code


def _require_known_code(what: str, found: _Found) -> dict[str, Any]:
    """Return a model's config.json.

    Raises ModelError if transformers does not know its type, or if a part of it is in another repository on the Hub, so that code
    of others would have to run."""
    import transformers

    config = json.loads(found.config.read_text(encoding="utf-8"))
    if (kind := config.get("model_type")) not in transformers.CONFIG_MAPPING:
        asks = ", and needs its own code (auto_map)" if "auto_map" in config else ""
        raise ModelError(
            f"{what}: transformers {transformers.__version__} does not know its model_type {quote(kind)} "
            f"(config.json){asks}: {NO_CODE}"
        )
    if repository := _find_hub_code(config):
        raise ModelError(f"{what}: its config.json takes attention or experts from the hub's {quote(repository)}: {NO_CODE}")
    return config


def _find_hub_code(config: dict[str, Any]) -> str | None:
    """Return the repository, named in a config.json or a part of it, from which transformers would load compiled code."""
    for key, value in config.items():
        inside = value if isinstance(value, dict) else {}
        if key.strip("_").removesuffix("_internal") in ("attn_implementation", "experts_implementation"):
            for name in (value, *inside.values()):
                if isinstance(name, str) and "/" in name:
                    return name
        if found := _find_hub_code(inside):
            return found
    return None


def _look_into(folder: Path, setting: str) -> _Found:
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ModelError(f"{setting} {folder} {what}: expected a model's folder, a name on the Hub, or an embedded model")
    tokenizer = folder / "tokenizer_config.json"
    return _Found(folder / "config.json", [file.name for file in folder.iterdir()], tokenizer if tokenizer.is_file() else None)


def _look_up(settings: ModelSettings) -> _Found | None:
    """Return what the Hub has of a model; None if it does not answer. If the Hub refuses, notebook 02's download says why."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(settings.name, revision=settings.revision, timeout=10)
        names = [file.rfilename for file in info.siblings or []]
        wanted = ["config.json", *{"tokenizer_config.json"}.intersection(names)]
        paths = [Path(hf_hub_download(settings.name, file, revision=settings.revision)) for file in wanted]
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return None
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "requests"):
            return None
        raise
    return _Found(paths[0], names, *paths[1:])


def check_answers(config: RunConfig, mcq_prompts: Sequence[str] = ()) -> str:
    """Check that the held-out questions and their answers with forced closing fit the model's context; return one line on it.

    Only the rows may be downloaded. A model on the Hub is read from the cache, and an embedded model is made.

    Args:
        mcq_prompts: the prompts of the multiple-choice questions, which must leave room for evaluation.mcq_max_new_tokens.

    Raises:
        GenerationError: as `check_context` does."""
    from transformers import AutoConfig

    if (source := _find_cached(config.model)) is None:
        return f"{config.model.name}: its context length is not known until it is downloaded"
    tokenizer = load_tokenizer_from(source) if (source / "tokenizer_config.json").exists() else None
    _, held_out = split_rows(validate_rows(load_rows(config.dataset))[0], config.dataset, config.seed)
    questions = choose_questions(held_out, config.evaluation.num_questions)
    prompts = [inference_prompt(question["Question"], config.prompt.newline_after_think) for question in questions]
    context, settings = AutoConfig.from_pretrained(source, trust_remote_code=False), config.evaluation
    if mcq_prompts:
        check_context(context, tokenizer, mcq_prompts, settings.mcq_max_new_tokens, 0, "evaluation.mcq_max_new_tokens")
    try:
        return check_context(context, tokenizer, prompts, config.generation.max_new_tokens, settings.answer_tokens or 0)
    except GenerationError as error:
        longest = max(questions, key=lambda question: len(question["Question"]))
        if (size := len(longest["Question"])) < _MUCH_OF_A_CONTEXT:
            raise
        which = f"that of {longest['id']:.60}, {size:,} characters"
        raise GenerationError(f"{error}, or leave out the longest question: {which}") from error


def _find_cached(settings: ModelSettings) -> Path | None:
    """Return the folder with a model's config.json on this machine; None if there is none."""
    from huggingface_hub import try_to_load_from_cache

    if is_at_hand(settings):
        return Path(find_model_source(settings.name))
    found = try_to_load_from_cache(settings.name, "config.json", revision=settings.revision)
    return Path(found).parent if isinstance(found, str) else None
