"""Find the modules of a model that LoRA trains, and refuse a choice that would train or merge something else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from medcot_utils.config import LoraSettings
from medcot_utils.models.tokenizer import ModelError

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel


def check_targets(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Raise ModelError unless every name in `lora.target_modules` matches a projection of the model's text part.

    The error lists the model's own projections. PEFT itself ignores names that match nothing, if others match. An embedding, or
    an output layer that shares its weights (tied embeddings), could be trained, but not merged in notebook 07."""
    from torch.nn import Linear

    found = _text_modules(model)
    own = sorted({name.rpartition(".")[2] for name, module in found.items() if isinstance(module, Linear)})
    known = f"this {type(model).__name__} has {', '.join(own)}"
    targeted = {target: [name for name in found if _matches(name, target)] for target in settings.target_modules}
    if missing := [target for target, names in targeted.items() if not names]:
        raise ModelError(f"lora.target_modules: {', '.join(missing)} match nothing; {known}")
    tied = model.config.get_text_config().tie_word_embeddings
    for target, names in targeted.items():
        for module in (found[name] for name in names):
            if tied and module is model.get_output_embeddings():
                raise ModelError(
                    f"lora.target_modules: {target} shares its weights with the embeddings (tie_word_embeddings), so it could "
                    f"not be merged; {known}. Leave {target} out"
                )
            if not isinstance(module, Linear):
                raise ModelError(
                    f"lora.target_modules: {target} is a {type(module).__name__}, and only linear projections can be "
                    f"merged; {known}"
                )


def find_excluded(model: PreTrainedModel) -> str | None:
    """Return PEFT's `exclude_modules` for a text model inside a larger one, as in Gemma 3; None for a text-only model.

    It matches every module outside the text model, such as an image encoder with projections of the same names."""
    decoder, head = _name_of(model, model.get_decoder()), _name_of(model, model.get_output_embeddings())
    beside = [name for name, _ in model.named_parameters() if not name.startswith((f"{decoder}.", f"{head}."))]
    return rf"(?!{re.escape(decoder)}\.|{re.escape(head)}$).*" if beside else None


def _text_modules(model: PreTrainedModel) -> dict[str, Module]:
    """Return {name: module} of the leaves of the text model and the output layer."""
    decoder, output = _name_of(model, model.get_decoder()), model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if (name.startswith(f"{decoder}.") or module is output) and not any(True for _ in module.children())
    }


def _name_of(model: PreTrainedModel, part: Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")  # as PEFT does
