"""The names of a model's weights in its files, if these differ from the model's own names."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def find_stored_names(config: PretrainedConfig, own: Collection[str], stored: Collection[str]) -> dict[str, str]:
    """Return {the model's own name of a weight: its name among those `stored` in files}; the own name if there is no other.

    transformers renames the weights of some families on load: a Gemma 3 that sees images has `language_model.model.layers` in its
    files and `model.language_model.layers` in memory. An adapter uses the names in memory; merged files use those of the base's
    files."""
    if set(own) <= set(stored):
        return {name: name for name in own}
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    steps, weights = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    found = {rename_source_key(name, renamings, converters, model.base_model_prefix, weights)[0]: name for name in stored}
    return {name: found.get(name, name) for name in own}
