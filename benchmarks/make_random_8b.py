"""Make an 8B Llama of random weights in the shape of DeepSeek-R1-Distill-Llama-8B, with a Llama 3 vocabulary.

Use it to study speed, memory, resuming, and several GPUs if the real weights are not available. Its answers mean nothing.

    python benchmarks/make_random_8b.py OUT --tokenizer-model tokenizer.model

The tokenizer.model is the one in PyPI's llama-models (llama_models/llama3/tokenizer.model)."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

# How Llama 3's tokenizer splits text before the byte-pair merges, and how many special tokens follow its 128,000 tokens.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL_TOKENS = 256
# Names in the R1-Distill tokenizer, for ids 128000, 128001, 128013, and 128014; Unsloth pads with 128004.
NAMES = {0: "<｜begin▁of▁sentence｜>", 1: "<｜end▁of▁sentence｜>", 4: "<|finetune_right_pad_id|>", 13: "<think>", 14: "</think>"}


def make_tokenizer(tokenizer_model: Path) -> PreTrainedTokenizerFast:
    """Return Llama 3's byte-pair encoding with R1-Distill's special tokens. It prepends BOS."""
    from tokenizers import AddedToken
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    extra = [NAMES.get(index, f"<|reserved_special_token_{index}|>") for index in range(SPECIAL_TOKENS)]
    # The think tags are ordinary added tokens, so decoding with skip_special_tokens keeps them.
    backend = TikTokenConverter(vocab_file=str(tokenizer_model), pattern=PATTERN, extra_special_tokens=[]).converted()
    for index, text in enumerate(extra):
        backend.add_tokens([AddedToken(text, special=index not in (13, 14), normalized=False)])
    template = TemplateProcessing(single=f"{extra[0]} $A", pair=f"{extra[0]} $A $B", special_tokens=[(extra[0], 128000)])
    backend.post_processor = Sequence([ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=extra[0], eos_token=extra[1], pad_token=extra[4], model_max_length=131072
    )


def make_model(layers: int = 32) -> LlamaForCausalLM:
    """Return a model with Normal(0, 0.02) weights in bfloat16, made on the GPU if there is one."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128000,
        eos_token_id=128001,
        pad_token_id=128004,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=128000, eos_token_id=128001, pad_token_id=128004, do_sample=True, temperature=0.6, top_p=0.95
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick test")
    arguments = parser.parse_args()
    began = time.time()
    tokenizer = make_tokenizer(arguments.tokenizer_model)
    text = "<think>\nA 61-year-old woman, 3 × 12.5 mg.\n</think>\nDone."
    assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [128013, 128014]
    tokenizer.save_pretrained(arguments.out)
    model = make_model(arguments.layers)
    model.save_pretrained(arguments.out, max_shard_size="4GB")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 parameters in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
