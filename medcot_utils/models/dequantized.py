"""The weights that 4-bit layers compute with, read one by one, from a base that is quantized on load or a quantized copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from medcot_utils.config import ModelSettings
from medcot_utils.models.engine import loads_copy
from medcot_utils.models.merging import MergeBase, find_weights_folder, open_16bit_base, open_weights, read_config
from medcot_utils.models.stored_names import find_stored_names

if TYPE_CHECKING:
    import torch
    from bitsandbytes.nn import Params4bit
    from transformers import BitsAndBytesConfig, PretrainedConfig

_STATE = ".quant_state.bitsandbytes__nf4"  # stored for each packed weight, with its scales (absmax) and tables


def four_bit_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration that quantizes a base on load: nf4 with double quantization (Dettmers et al. 2023)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # 16 values where a normal distribution has them
        bnb_4bit_use_double_quant=True,  # the scales of the blocks are quantized too
        bnb_4bit_compute_dtype=dtype,  # weights are unpacked to it for each product
    )


def open_quantized(settings: ModelSettings, dtype: torch.dtype) -> MergeBase:
    """Return the base with the weights that its 4-bit layers compute with, from the pre-quantized copy if that is loaded."""
    return open_quantized_copy(settings, dtype) if loads_copy(settings) else open_quantized_on_load(settings, dtype)


def open_quantized_on_load(settings: ModelSettings, dtype: torch.dtype) -> MergeBase:
    """Return the 16-bit base with the weights that its 4-bit layers have after `from_pretrained` with `four_bit_config`.

    Args:
        dtype: the run's compute dtype. transformers casts weights to it before it quantizes them."""
    base = open_16bit_base(settings)
    config = read_config(base.folder)
    kinds = _find_4bit_weights(config, dtype)
    stored = find_stored_names(config, kinds, base.weights)
    rounded = {
        stored[name]: partial(
            _Weight, base.weights[stored[name]].get_shape(), partial(_round, base.weights[stored[name]], kind, dtype)
        )
        for name, kind in kinds.items()
    }
    return MergeBase(base.name, base.folder, _Dequantized(base.weights, rounded))


def open_quantized_copy(settings: ModelSettings, dtype: torch.dtype) -> MergeBase:
    """Return the pre-quantized copy of a base (`model.quantized_name`), with its 4-bit weights dequantized to `dtype`.

    A "dynamic" copy leaves some layers in 16 bits. Their weights stay as the files have them."""
    folder = find_weights_folder(settings.quantized_name, settings.quantized_revision)
    slices = open_weights(folder)
    packed = [name.removesuffix(_STATE) for name in slices if name.endswith(_STATE)]
    states = {
        name: {key.removeprefix(f"{name}."): slices[key] for key in slices if key.startswith(f"{name}.")} for name in packed
    }
    beside = {f"{name}.{key}" for name, state in states.items() for key in state}
    weights = {name: found for name, found in slices.items() if name not in beside}
    unpacked = {name: _packed_weight(slices[name], state, dtype) for name, state in states.items()}
    return MergeBase(settings.quantized_name, folder, _Dequantized(weights, unpacked))


class _Weight:
    """Stand in for a weight, as safetensors' lazy slices do. The weight is computed when first read, then kept in this object."""

    def __init__(self, shape: list[int], make: Callable[[], torch.Tensor]):
        self._shape, self._make = shape, make

    @cached_property
    def _tensor(self) -> torch.Tensor:
        return self._make()

    def get_shape(self) -> list[int]:
        return self._shape

    def __getitem__(self, part: Any) -> torch.Tensor:
        return self._tensor[part]


class _Dequantized(Mapping[str, Any]):
    """Map names to the weights of a 4-bit model. Each access makes a new `_Weight`, so none outlives its use."""

    def __init__(self, weights: Mapping[str, Any], rounded: Mapping[str, Callable[[], _Weight]]):
        self._weights, self._rounded = weights, rounded

    def __getitem__(self, name: str) -> Any:
        return self._rounded[name]() if name in self._rounded else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _find_4bit_weights(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Params4bit]:
    """Return {the model's own name: empty weight} for the layers that transformers replaces with 4-bit layers."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    AutoHfQuantizer.from_config(four_bit_config(dtype)).preprocess_model(model, device_map=None)
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))
    return {f"{name}.weight": layer.weight for name, layer in layers}


def _round(weight: Any, like: Params4bit, dtype: torch.dtype) -> torch.Tensor:
    """Quantize a weight as transformers does (`Bnb4bitQuantize`), and return the values that the layer computes with."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    device = _device()
    rounded = Params4bit(weight[:].to(device, dtype), requires_grad=False, **like.__dict__).to(device)
    return dequantize_4bit(rounded.data, rounded.quant_state).cpu()


def _packed_weight(packed: Any, state: Mapping[str, Any], dtype: torch.dtype) -> Callable[[], _Weight]:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    def unpack() -> torch.Tensor:
        found = read_state(_device())
        found.dtype = dtype  # the engines compute in the run's dtype, not in the one that the copy's files name
        return dequantize_4bit(packed[:].to(_device()), found).cpu()

    def read_state(device: str) -> QuantState:
        return QuantState.from_dict({key: part[:] for key, part in state.items()}, device=device)

    return lambda: _Weight(list(read_state("cpu").shape), unpack)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"  # the engines' device, because other kernels may round differently
