"""The merged model: made only if there is room, and checked against what it was merged from, whichever base that is."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from made_up_runs import CHECK, CONFIG, fill

from medcot_utils.config import load_config
from medcot_utils.export import merged as export_merged
from medcot_utils.export.measured import open_merged
from medcot_utils.export.merged import (
    ExportError,
    find_merge_target,
    find_trained_pair,
    probe_references,
    require_agreement,
    save_adapter,
    save_merged,
    scale_tolerance,
    verify_export,
)
from medcot_utils.machine import paths
from medcot_utils.machine.disk import DiskError
from medcot_utils.run.directory import Run

DEQUANTIZED = load_config("smoke", ["export.merge_into=dequantized_4bit"])


def check_export(engine, run):
    references = probe_references(engine, run)
    return verify_export(run, *open_merged(run), references)


def test_a_merge_that_does_not_fit_is_refused_before_loading(tmp_path, monkeypatch):
    small = fill(Run.create(tmp_path / "run", CONFIG))
    small.write("adapter", lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"1" * 1000))
    monkeypatch.setattr(paths, "disk_free_gib", lambda folder: 2.0)
    monkeypatch.setattr(export_merged, "merge", lambda *arguments: pytest.fail("merged although the disk is too small"))
    engine = SimpleNamespace()
    with pytest.raises(DiskError, match=r"2\.05 GiB needed for the run directory \(merged 16-bit model 2\.05\), 2\.00 GiB free"):
        save_merged(engine, small)


def export(folder, config):
    """(engine, run) with a real adapter whose matrices B are not zero, merged by `save_merged`."""
    import torch

    from medcot_utils.models.engine import get_engine

    engine = get_engine(config.model)
    run = fill(Run.create(folder / "run", config))
    model, tokenizer = engine.load(config.model)
    tuned = engine.add_lora(model, config.lora)
    torch.manual_seed(2)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    run.write("adapter", lambda folder: save_adapter(tuned, tokenizer, config, folder))
    merged = save_merged(engine, run)
    assert (merged / "model.safetensors").stat().st_size > 10_000
    return engine, run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("export"), CONFIG)


@pytest.fixture(scope="module")
def dequantized(tmp_path_factory):
    return export(tmp_path_factory.mktemp("dequantized"), DEQUANTIZED)


@pytest.mark.model
def test_the_saved_adapter_names_its_base_and_no_local_folder(exported):
    adapter = exported[1].require("adapter")
    text = (adapter / "adapter_config.json").read_text(encoding="utf-8")
    assert '"base_model_name_or_path": "embedded:tiny-random-llama"' in text
    assert not (adapter / "README.md").exists()


@pytest.mark.model
def test_the_saved_adapter_is_the_same_file_in_every_process(exported):
    saved = json.loads((exported[1].require("adapter") / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["target_modules"] == sorted(CONFIG.lora.target_modules)


@pytest.mark.model
def test_the_right_merge_agrees_with_base_and_adapter(exported):
    engine, run = exported
    check = check_export(engine, run)
    require_agreement(check)
    exact, trained, both_adapters = check["pairs"]
    assert (both_adapters["a"], both_adapters["b"]) == ("16-bit base + adapter", "4-bit base + adapter")
    assert check["merge_into"] == "base_16bit" and find_trained_pair(check) is trained
    assert check["ok"] and exact["same_greedy"] == exact["prompts"] == CONFIG.export.check_prompts
    assert exact["mean_logprob_difference"] < 1e-3
    assert trained["b"] == "4-bit base + adapter" and trained["mean_logprob_difference"] > exact["mean_logprob_difference"]
    losses = check["held_out_loss"]
    assert losses["merged"] == pytest.approx(losses["4-bit base + adapter"], abs=0.5)
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors"} <= {file["file"] for file in check["files"]}


@pytest.mark.model
def test_a_dequantized_merge_agrees_with_the_trained_model(dequantized):
    check = check_export(*dequantized)
    require_agreement(check)
    (exact,) = check["pairs"]
    assert check["merge_into"] == "dequantized_4bit" and find_trained_pair(check) is exact
    assert exact["b"] == "4-bit base + adapter" and exact["mean_logprob_difference"] < 1e-3
    assert exact["same_greedy"] == exact["prompts"] == CONFIG.export.check_prompts
    losses = check["held_out_loss"]
    assert losses["merged"] == pytest.approx(losses["4-bit base + adapter"], abs=1e-3)


@pytest.mark.model
@pytest.mark.parametrize(("made", "said"), [("exported", "dequantized_4bit"), ("dequantized", "base_16bit")])
def test_a_merge_into_another_base_than_said_is_told(made, said, request, tmp_path):
    engine, run = request.getfixturevalue(made)
    wrong, files = fill(Run.create(tmp_path / "run", load_config("smoke", [f"export.merge_into={said}"]))), {}
    for name in ("adapter", "merged"):
        files[name] = run.require(name)
        wrong.write(name, lambda folder, name=name: shutil.copytree(files[name], folder, dirs_exist_ok=True))
    check = check_export(engine, wrong)
    assert not check["ok"] and len(check["weights"]["wrong"]) == check["weights"]["changed"] == 14
    with pytest.raises(ExportError, match=rf"differs from the {check['pairs'][0]['b'].replace('+', '.')}: 14 of 21 weights"):
        require_agreement(check)


def test_without_4_bit_weights_both_merge_targets_are_one():
    plain = load_config("smoke", ["export.merge_into=dequantized_4bit", "model.load_in_4bit=false"])
    targets = [find_merge_target(config) for config in (CONFIG, DEQUANTIZED, plain)]
    assert targets == ["base_16bit", "dequantized_4bit", "base_16bit"]
    engine = SimpleNamespace(open_dequantized=lambda settings: pytest.fail("nothing was quantized"))
    assert export_merged.open_merge_base(engine, plain).weights


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        (["export.dtype=float16"], 1),
        (["export.dtype=bfloat16"], 8),
        (["model.dtype=bfloat16", "export.merge_into=base_16bit"], 1),
        (["model.dtype=bfloat16", "export.merge_into=dequantized_4bit"], 8),
        (["model.dtype=bfloat16", "export.merge_into=dequantized_4bit", "model.load_in_4bit=false"], 1),
    ],
)
def test_the_tolerance_is_that_of_the_coarsest_dtype_compared(settings, times):
    config = load_config("smoke", settings)
    assert scale_tolerance(config) == times * config.export.logits_tolerance


@pytest.mark.model
def test_a_checked_export_loads_no_reference_again(exported, monkeypatch):
    engine, run = exported
    run.write("export_check", check_export(engine, run))
    monkeypatch.setattr(export_merged, "load_base", lambda *arguments: pytest.fail("loaded again"))
    assert probe_references(SimpleNamespace(), run) is None


def test_a_check_of_an_earlier_version_names_the_trained_model():
    assert find_trained_pair(CHECK) is CHECK["pairs"][1]


@pytest.mark.model
def test_a_merge_that_left_the_adapter_out_is_told(exported):
    from medcot_utils.models.merging import load_base

    engine, run = exported

    def base_alone(folder):
        base, tokenizer = load_base(CONFIG.model, "float16")
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    run.write("merged", base_alone)
    check = check_export(engine, run)
    assert not check["ok"]
    with pytest.raises(ExportError, match="differs from the 16-bit base"):
        require_agreement(check)


@pytest.mark.model
def test_a_small_adapter_that_was_left_out_is_told(exported, tmp_path):
    # Smaller than the tolerance of the answers, and lost all the same.
    from safetensors.torch import load_file, save_file

    from medcot_utils.models.merging import load_base

    engine, run = exported[0], Run.open(shutil.copytree(exported[1].path, tmp_path / "run"))
    adapter = run.require("adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    small = {name: weight * (0.01 if "lora_B" in name else 1) for name, weight in weights.items()}

    def smaller(folder):
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        save_file(small, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    run.write("adapter", smaller)
    run.write("merged", lambda folder: [part.save_pretrained(folder) for part in load_base(CONFIG.model, "float16")])
    check = check_export(engine, run)
    assert check["pairs"][0]["mean_logprob_difference"] < CONFIG.export.logits_tolerance
    with pytest.raises(ExportError, match=r"14 of 21 weights are not base \+ adapter, first .*_proj\.weight holds 0\.00 times"):
        require_agreement(check)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """(engine, run) of a bfloat16 merge, compared in bfloat16, of a base whose answers round as much as an 8B model's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from medcot_utils.models.embedded import find_model_source
    from medcot_utils.models.engine import get_engine
    from medcot_utils.models.tokenizer import load_tokenizer_from

    folder = tmp_path_factory.mktemp("coarse")
    tokenizer = load_tokenizer_from(find_model_source("embedded:tiny-random-llama"))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids)).to(torch.bfloat16)
    base.lm_head.weight.data *= 16
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    few = ["export.check_prompts=1", "export.check_rows=1", "export.check_new_tokens=2", "model.load_in_4bit=false"]
    config = load_config("smoke", [f"model.name={folder / 'base'}", "export.dtype=bfloat16", *few])
    engine, run = get_engine(config.model), fill(Run.create(folder / "run", config))
    assert run.read("plan")["total_parameters"] >= 1e9, "the check holds it for a large model"
    tuned = engine.add_lora(engine.load(config.model)[0], config.lora)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2e-3)
    run.write("adapter", lambda folder: save_adapter(tuned, tokenizer, config, folder))
    save_merged(engine, run)
    return engine, run


@pytest.mark.model
def test_a_right_bfloat16_merge_of_a_large_model_passes(coarse):
    engine, run = coarse
    check = check_export(engine, run)
    require_agreement(check)
    exact = check["pairs"][0]
    assert run.config.export.logits_tolerance < exact["mean_logprob_difference"] <= check["tolerance"] == 8 * 0.02
    assert check["weights"]["wrong"] == [] and check["weights"]["kept"] == pytest.approx(1, abs=0.1)


@pytest.mark.model
def test_one_lost_layer_is_found_within_the_rounding_of_bfloat16(coarse, tmp_path):
    from safetensors.torch import load_file, save_file

    engine, run = coarse[0], Run.open(shutil.copytree(coarse[1].path, tmp_path / "run"))
    name, right = "model.layers.3.self_attn.q_proj.weight", run.require("merged")
    weights = load_file(right / "model.safetensors")
    weights[name] = load_file(f"{run.config.model.name}/model.safetensors")[name]

    def without(folder):
        shutil.copytree(right, folder, dirs_exist_ok=True)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    run.write("merged", without)
    check = check_export(engine, run)
    assert check["pairs"][0]["mean_logprob_difference"] <= check["tolerance"]
    with pytest.raises(ExportError, match=rf"1 of 39 weights are not base \+ adapter, first {name} holds 0\.00 times the change"):
        require_agreement(check)


def test_greedy_answers_may_part_where_two_tokens_are_a_tie():
    import torch

    from medcot_utils.export.merged import Probe, _begin_alike

    def probe(greedy, second):
        return Probe(torch.zeros(1, 3), greedy, torch.tensor([[0.0, -9, -9], second]))

    tie, other = probe([0, 1], [-5, -0.70, -0.69]), probe([0, 2], [-5, -0.69, -0.70])
    assert _begin_alike(tie, other, 0.02) and not _begin_alike(tie, other, 0.001)
    assert not _begin_alike(probe([0, 1], [-5, -0.1, -2]), other, 0.02)
    assert _begin_alike(tie, tie, 0) and not _begin_alike(tie, probe([0], [-5, -0.70, -0.69]), 0.02)


def test_a_check_that_is_not_ok_is_an_error_with_its_numbers():
    require_agreement(CHECK)
    exact, trained = CHECK["pairs"]
    wrong = [exact | {"mean_logprob_difference": 0.81, "same_greedy": 1}, trained]
    with pytest.raises(ExportError, match=r"0\.81 \(allowed 0\.05\), same greedy answer on 1 of 3 prompts"):
        require_agreement(CHECK | {"ok": False, "pairs": wrong})
