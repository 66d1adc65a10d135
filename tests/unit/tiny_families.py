"""Tiny random checkpoints in the style of the model families that people fine-tune, each with a tokenizer like its family's.

What makes a family hard is kept: the normalizer, who puts which token before or after a text, the place of the pad token, rows of
the embedding that no token uses, tied embeddings, fused projections, and a text model inside a larger one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils.run.artifacts import SHIPPED_CASES

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

# Llama 3's and Qwen2's cut of a text before merging; theirs differ in how many digits stay together.
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
_VOCABULARY = 1200


def _train(tokenizer: Tokenizer, specials: list[str], alphabet: list[str]) -> Tokenizer:
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SHIPPED_CASES.read_text(encoding="utf-8").splitlines(), trainer)
    return tokenizer


def byte_level(specials: list[str], digits: int, normalizer: object | None = None) -> Tokenizer:
    """Return a byte-level BPE of the shipped cases, as Llama 3's and Qwen's are."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizer
    cut = pre_tokenizers.Split(Regex(_CUT.replace("DIGITS", str(digits))), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    return _train(bpe, specials, pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(specials: list[str], prepend: bool) -> Tokenizer:
    """Return a BPE with `▁` for a space and bytes for what it does not know, as Mistral's, Phi-3's and Gemma's are."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = "<unk>"
    bpe = Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if prepend else []), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prepend else [])])
    _train(bpe, [*specials, *(f"<0x{byte:02X}>" for byte in range(256))], [])
    # Bytes are tokens of the vocabulary, no control tokens: those would be left out of a decoded text.
    stored = json.loads(bpe.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] in specials]
    return Tokenizer.from_str(json.dumps(stored))


def put_around(tokenizer: Tokenizer, before: str | None = None, after: str | None = None) -> Tokenizer:
    """Make the tokenizer put a token before or after each text."""
    from tokenizers import processors

    parts = [before, "$A", after]
    used = [(token, tokenizer.token_to_id(token)) for token in (before, after) if token]
    template = processors.TemplateProcessing(single=" ".join(filter(None, parts)), special_tokens=used)
    own = tokenizer.post_processor
    tokenizer.post_processor = processors.Sequence([own, template]) if own else template
    return tokenizer


@dataclass(frozen=True)
class Family:
    """Say how a family's checkpoint is made, what it stands for, and which settings it needs."""

    title: str
    stands_for: str
    make: Callable[[Path], None]
    settings: tuple[str, ...] = ()


def save(folder: Path, tokenizer: Tokenizer, named: dict[str, str], config: PretrainedConfig, **changes: Any) -> None:
    """Write random weights in bfloat16 and their tokenizer, whose special tokens are `named`, as a folder of the Hub is."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    text = config.get_text_config()
    for name in ("bos", "eos", "pad"):
        token = getattr(fast, f"{name}_token_id")
        setattr(text, f"{name}_token_id", token if token is not None and token < text.vocab_size else None)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)


def _llama(folder: Path) -> None:
    from transformers import LlamaConfig

    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    tokenizer = byte_level(specials, digits=3)
    tokenizer.add_tokens(["<think>", "</think>"])
    named = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **_SIZES)
    save(folder, put_around(tokenizer, before=specials[0]), named, config)


def _qwen(folder: Path, kind: str) -> None:
    from tokenizers import normalizers
    from transformers import AutoConfig

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(specials, digits=1, normalizer=normalizers.NFC())
    if kind == "qwen3":
        tokenizer.add_tokens(["<think>", "</think>"])
    # No BOS; and more rows in the embedding than tokens, so that its size divides well.
    rows = -(-(tokenizer.get_vocab_size() + 1) // 64) * 64
    config = AutoConfig.for_model(kind, vocab_size=rows, tie_word_embeddings=True, **_SIZES)
    save(folder, tokenizer, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, config)


def make_distilled_qwen(folder: Path, **sizes: int) -> None:
    """Write what profile `small` loads, made tiny: a Qwen2 with an output layer of its own, and R1's BOS, EOS and think tags.

    `sizes` of its configuration make it as large as they say."""
    from tokenizers import normalizers
    from transformers import Qwen2Config

    specials = ["<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"]
    tokenizer = put_around(byte_level(specials, digits=1, normalizer=normalizers.NFC()), before=specials[1])
    tokenizer.add_tokens(["<think>", "</think>"])
    rows = -(-(tokenizer.get_vocab_size() + 1) // 64) * 64
    named = {"bos_token": specials[1], "eos_token": specials[0], "pad_token": specials[0]}
    save(folder, tokenizer, named, Qwen2Config(tie_word_embeddings=False, **{"vocab_size": rows} | _SIZES | sizes))


def _mistral(folder: Path) -> None:
    from transformers import MistralConfig

    tokenizer = put_around(sentencepiece(["<unk>", "<s>", "</s>"], prepend=True), before="<s>")
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}  # no pad token, as published
    save(folder, tokenizer, named, MistralConfig(vocab_size=tokenizer.get_vocab_size(), **_SIZES | {"sliding_window": None}))


def _gemma(folder: Path, kind: str) -> None:
    from transformers import AutoConfig

    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = put_around(sentencepiece(specials, prepend=False), before="<bos>")
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<image_soft_token>"])  # gemma-3-1b's tokenizer names one token more than its embedding has
    text = _SIZES | {"vocab_size": size, "head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}
    if kind == "gemma3":
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = AutoConfig.for_model(
            kind,
            text_config=text | {"vocab_size": size + 1},
            vision_config=vision | {"image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=size,
        )
    else:
        config = AutoConfig.for_model(kind, **text)
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    save(folder, tokenizer, named, config)


def _phi3(folder: Path) -> None:
    from transformers import Phi3Config

    tokenizer = sentencepiece(["<unk>", "<s>", "</s>", "<|endoftext|>"], prepend=True)
    tokenizer.add_special_tokens(["<think>", "</think>"])  # control tokens: a decoder leaves them out unless told otherwise
    rows = -(-tokenizer.get_vocab_size() // 64) * 64
    config = Phi3Config(vocab_size=rows, **_SIZES, sliding_window=None, eos_token_id=None, pad_token_id=None)
    save(folder, tokenizer, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>"}, config)


FAMILIES = {
    "llama": Family("Llama", "Llama 3, DeepSeek-R1-Distill-Llama", _llama),
    "qwen2": Family("Qwen2", "Qwen2.5, DeepSeek-R1-Distill-Qwen", lambda folder: _qwen(folder, "qwen2")),
    "qwen3": Family("Qwen3", "Qwen3", lambda folder: _qwen(folder, "qwen3")),
    "mistral": Family("Mistral", "Mistral 7B", _mistral),
    "gemma2": Family("Gemma 2", "Gemma 2", lambda folder: _gemma(folder, "gemma2")),
    "gemma3_text": Family("Gemma 3, text", "Gemma 3 1B", lambda folder: _gemma(folder, "gemma3_text")),
    "gemma3": Family(
        "Gemma 3, composite", "Gemma 3 4B and larger, which see images too", lambda folder: _gemma(folder, "gemma3")
    ),
    "phi3": Family("Phi-3", "Phi-3 and Phi-4 mini", _phi3, ("lora.target_modules=[qkv_proj,o_proj,gate_up_proj,down_proj]",)),
}
