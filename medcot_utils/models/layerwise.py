"""Compute the held-out loss of an unquantized model: with the whole model if it fits in memory, else one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psutil import virtual_memory

from medcot_utils.config import RunConfig
from medcot_utils.errors import MedcotError
from medcot_utils.machine.gpu import available_memory_of_gpus
from medcot_utils.machine.weight_files import weight_files
from medcot_utils.models.embedded import PREFIX
from medcot_utils.models.engine import compute_dtype
from medcot_utils.models.losses import RowLoss, batch_losses, row_losses, split_into_batches
from medcot_utils.models.merging import find_weights_folder, load_unquantized
from medcot_utils.models.placement import count_weight_bytes, fits_in_memory
from medcot_utils.models.stored_names import find_stored_names

if TYPE_CHECKING:
    import torch
    from accelerate.utils import OffloadedWeightsLoader
    from datasets import Dataset
    from tqdm import tqdm
    from transformers import PretrainedConfig, PreTrainedModel

    Device = int | str  # a GPU's index or `cpu`, which both safetensors and accelerate accept

# Copies of a group's hidden states in memory: the input of a layer, the pieces of its output, and the joined output; and as much
# again for the last norm, which computes in float32.
_COPIES = 6


class LayerwiseError(MedcotError):
    """Say why a model cannot be run layer by layer."""


def base_16bit_losses(config: RunConfig, rows: Dataset) -> list[RowLoss]:
    """Return the loss of a run's base before 4-bit rounding on each tokenized row, labeled `base_16bit`.

    The base computes in the run's dtype, so that it differs from the 4-bit base only by the rounding."""
    dtype = str(compute_dtype(config.model)).removeprefix("torch.")
    batch_size = config.training.per_device_eval_batch_size
    return unquantized_losses(config.model.name, config.model.revision, dtype, rows, batch_size, "base_16bit")


def describe_16bit_base(config: RunConfig) -> str:
    """Return one line on the origin of the 16-bit weights of a run's base."""
    if config.model.name == f"{PREFIX}smollm2-135m-instruct":
        return "The 16-bit base is itself unpacked from 4-bit weights (Q4_1): what that first rounding cost cannot be measured."
    return "The 16-bit base is the checkpoint as published, before any rounding to 4 bits."


def unquantized_losses(name: str, revision: str | None, dtype: str, rows: Dataset, batch_size: int, label: str) -> list[RowLoss]:
    """Return the loss of each tokenized row, as `row_losses` does, for a model that is not quantized.

    If the model does not fit in the GPUs' memory, or in RAM without a GPU, `layerwise_losses` runs it.

    Args:
        name: a Hub id, a folder, or an embedded model, as in the settings.
        dtype: a dtype's name in torch.
        label: the model's label in the records."""
    folder = find_weights_folder(name, revision)
    if fits_in_memory(count_weight_bytes(folder, dtype)):
        model, _ = load_unquantized(folder, dtype)
        return row_losses(model, rows, batch_size, label)
    return layerwise_losses(folder, dtype, rows, batch_size, label)


def layerwise_losses(folder: Path, dtype: str, rows: Dataset, batch_size: int, label: str) -> list[RowLoss]:
    """Return the loss of each tokenized row, with only embeddings, output layer, and one decoder layer in memory at a time.

    Rows go through the layers in groups, as many as have hidden states that fit in memory, so a layer is read once per group.
    Within a layer, and for the logits, they go in batches. The losses equal those of `row_losses` up to rounding. Raises
    LayerwiseError if a weight is not stored in the form that the model computes with."""
    import torch
    from tqdm.auto import tqdm

    device = 0 if torch.cuda.is_available() else "cpu"
    model, weights = _open_model(folder, getattr(torch, dtype), device)
    layers = _decoder_layers(model)
    lengths = [len(ids) for ids in rows["input_ids"]]
    groups = _split_into_groups(lengths, model, device)
    records: dict[int, RowLoss] = {}
    with tqdm(total=len(groups) * len(layers), desc=f"held-out loss, {label}, layer by layer", unit="layer") as bar:
        _stream_layers(model, weights, device, batch_size, bar)
        for group in groups:
            hidden = _run_decoder(model, [rows[i]["input_ids"] for i in group], device)
            for i, (nll, tokens) in zip(group, _losses_of(model, hidden, [rows[i] for i in group], batch_size), strict=True):
                records[i] = RowLoss(model=label, id=str(rows[i]["id"]), nll=nll, tokens=tokens)
            del hidden
    return [records[i] for i in range(len(rows))]


# --- the model -----------------------------------------------------------------------------------------------------


def _open_model(folder: Path, kind: torch.dtype, device: Device) -> tuple[PreTrainedModel, OffloadedWeightsLoader]:
    """Return the model with its text weights on the device, except those of the decoder layers, and the loader of weights."""
    from accelerate import init_empty_weights
    from accelerate.utils import set_module_tensor_to_device
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=False)
    weights = _weights_by_own_name(model, config, folder, device)
    prefix = _layers_name(model)
    for name in weights:
        if not name.startswith(prefix):
            set_module_tensor_to_device(model, name, device, value=weights[name])
    for name, buffer in model.named_buffers():
        if buffer.device.type != "meta" and not name.startswith(prefix):
            set_module_tensor_to_device(model, name, device)
    model.tie_weights()
    return model.eval(), weights


def _weights_by_own_name(
    model: PreTrainedModel, config: PretrainedConfig, folder: Path, device: Device
) -> OffloadedWeightsLoader:
    """Return accelerate's loader of the checkpoint's weights for decoder and output layer, by the model's own names."""
    from accelerate.utils import OffloadedWeightsLoader
    from safetensors import safe_open

    stored: dict[str, str] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            stored |= dict.fromkeys(opened.keys(), str(file))
    parts = (_name_of(model, model.get_decoder()), _name_of(model, model.get_output_embeddings()))
    own = [name for name in model.state_dict() if name.startswith(tuple(f"{part}." for part in parts))]
    own = [name for name in own if name not in model.all_tied_weights_keys]
    names = find_stored_names(config, own, stored)
    if strange := [name for name in own if names[name] not in stored]:
        raise LayerwiseError(
            f"{strange[0]} of {folder.name}/ is not stored in the form that the model computes with, so the model cannot be run "
            f"layer by layer: use a GPU that holds it, or set evaluation.base_16bit_loss=false"
        )
    return OffloadedWeightsLoader(
        index={name: {"safetensors_file": stored[names[name]], "weight_name": names[name]} for name in own}, device=device
    )


def _stream_layers(model: PreTrainedModel, weights: OffloadedWeightsLoader, device: Device, batch_size: int, bar: tqdm) -> None:
    """Make each decoder layer read its weights when it is called, use them for all rows, and free them."""
    from accelerate.hooks import attach_align_device_hook

    for index, layer in enumerate(_decoder_layers(model)):
        layer.forward = _in_pieces(layer.forward, batch_size, bar)  # inside the hook, so weights are read once for all pieces
        attach_align_device_hook(
            layer,
            execution_device=device,
            offload=True,
            offload_buffers=True,
            weights_map=weights,
            module_name=f"{_layers_name(model)}{index}",
            preload_module_classes=[type(layer).__name__],
        )


def _in_pieces(forward: Callable[..., Any], size: int, bar: tqdm) -> Callable[..., Any]:
    """Return a layer's forward that runs `size` rows of its batch at a time and joins the outputs."""
    import torch
    from accelerate.utils import recursively_apply

    def forward_in_pieces(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = len(hidden)

        def cut(tensor: torch.Tensor, piece: slice) -> torch.Tensor:
            # Masks and positions have one row for the whole batch, or one per row.
            return tensor[piece] if tensor.ndim > 1 and len(tensor) == rows else tensor

        outputs = []
        for at in range(0, rows, size):
            own_args, own_kwargs = recursively_apply(cut, (args, kwargs), slice(at, at + size))
            outputs.append(forward(hidden[at : at + size], *own_args, **own_kwargs))
        bar.update()
        if isinstance(outputs[0], tuple):  # hidden states come first, in older families and with Unsloth's patches
            return torch.cat([output[0] for output in outputs]), *outputs[0][1:]
        return torch.cat(outputs)

    return forward_in_pieces


def _decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    from torch.nn import ModuleList

    return next(part for part in model.get_decoder().children() if isinstance(part, ModuleList))


def _layers_name(model: PreTrainedModel) -> str:
    return f"{_name_of(model, _decoder_layers(model))}."


def _name_of(model: PreTrainedModel, part: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


# --- the rows ------------------------------------------------------------------------------------------------------


def _split_into_groups(lengths: Sequence[int], model: PreTrainedModel, device: Device) -> list[list[int]]:
    """Return the rows' indices, longest first, in groups whose hidden states take at most half of the free memory."""
    free = available_memory_of_gpus()[0] if device == 0 else virtual_memory().available
    per_token = _COPIES * model.config.get_text_config().hidden_size * model.dtype.itemsize
    left, groups = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True), []
    while left:
        size = max(1, int(free / 2 // (per_token * lengths[left[0]])))
        groups.append(left[:size])
        left = left[size:]
    return groups


def _run_decoder(model: PreTrainedModel, token_ids: Sequence[Sequence[int]], device: Device) -> torch.Tensor:
    """Return the last hidden states (rows, tokens of the longest row, hidden size) of rows that are padded on the right.

    Causal attention never looks at the padding, so no mask is needed."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    kept = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> Any:
        kept.append(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state[:, :1]  # the logits of all rows would be too large
        return output

    ids = pad_sequence([torch.tensor(one) for one in token_ids], batch_first=True).to(device)
    hook = model.get_decoder().register_forward_hook(keep)
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    return kept[0]


def _losses_of(model: PreTrainedModel, hidden: torch.Tensor, group: Sequence[Any], batch_size: int) -> list[tuple[float, int]]:
    """Return (nll in nats, number of labels) of each row from its last hidden states, through the model's own output layer."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    decoder, found = model.get_decoder(), []
    lengths = [len(row["input_ids"]) for row in group]  # longest first, so the rows of a batch are consecutive
    for chosen in split_into_batches(lengths, batch_size, model.config.get_text_config().vocab_size):
        own = BaseModelOutputWithPast(last_hidden_state=hidden[chosen[0] : chosen[-1] + 1, : lengths[chosen[0]]])
        decoder.forward = lambda *args, _own=own, **kwargs: _own
        found += batch_losses(model, [group[i] for i in chosen], hidden.device)
        del decoder.forward
    return found
