"""The files around a merge: which of the base's weights are read and downloaded, and generation settings that are broken."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from medcot_utils.config import load_config
from medcot_utils.machine import disk
from medcot_utils.models.embedded import find_model_source
from medcot_utils.models.merging import MergeError, load_base, merge

pytestmark = pytest.mark.model

TINY = "embedded:tiny-random-llama"
GENERATION = "generation_config.json"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("lora") / "adapter"
    base, _ = load_base(load_config("smoke").model, "float32")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    """A copy of the tiny model's folder, to be changed."""
    return Path(shutil.copytree(find_model_source(TINY), tmp_path / "base"))


def settings(folder):
    return load_config("smoke", [f"model.name={folder}"])


def split(base):
    """The same model in two shards and an index. Returns its weights."""
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in weights}
    for file in set(names.values()):
        save_file({name: weights[name] for name in names if names[name] == file}, base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return weights


def put_beside(base):
    """What checkpoints carry beside their weights: Mistral's own file with its own names, and older shards of the same names."""
    save_file({"layers.0.attention.wq.weight": torch.ones(64, 64)}, base / "consolidated.safetensors")
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}, base / "old-model.safetensors")


@pytest.mark.parametrize("shards", [False, True])
def test_a_merge_takes_only_weights_that_transformers_loads(base, adapter, tmp_path, shards):
    weights = split(base) if shards else load_file(base / "model.safetensors")
    sizes = disk.model_sizes(settings(base))
    put_beside(base)
    merge(settings(base).model, adapter, tmp_path / "merged", "float32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == weights.keys()
    changed = {name for name in merged if not torch.equal(merged[name], weights[name].float())}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert (
        merged["model.layers.0.self_attn.q_proj.weight"] - weights["model.layers.0.self_attn.q_proj.weight"].float()
    ).std() > 0
    assert disk.model_sizes(settings(base)) == sizes, "what a merge does not read takes no room"


def test_only_weights_that_transformers_loads_are_downloaded(base, adapter, tmp_path, monkeypatch):
    split(base)
    put_beside(base)
    (base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    cache = tmp_path / "snapshot"

    def download(name, revision, allow_patterns):
        assert (name, revision) == ("someone/model", "abc")
        cache.mkdir(exist_ok=True)
        for file in base.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = load_config("smoke", ["model.name=someone/model", "model.revision=abc"])
    merge(config.model, adapter, tmp_path / "merged", "float16")
    assert {file.name for file in base.iterdir()} - {file.name for file in cache.iterdir()} == {
        "consolidated.safetensors",
        "old-model.safetensors",
    }
    assert (tmp_path / "merged" / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"


@pytest.mark.parametrize("shards", [False, True])
def test_the_hubs_size_counts_only_weights_that_are_loaded(base, monkeypatch, shards):
    from types import SimpleNamespace

    if shards:
        split(base)
    expected = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    put_beside(base)
    siblings = [SimpleNamespace(rfilename=file.name, size=file.stat().st_size) for file in base.iterdir()]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, **_: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: str(base / file))
    assert disk.model_sizes(load_config("smoke", ["model.name=someone/model"]))[0] == expected / 2


def test_a_damaged_weights_file_is_one_clear_error(base, adapter, tmp_path):
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(MergeError, match=r"a weights file in base/ is damaged"):
        merge(settings(base).model, adapter, tmp_path / "merged", "float16")


# --- generation settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "said"),
    [
        ('{"temperature": 0.6, "top_p": 0.9}', {"temperature": 0.6, "top_p": 0.9, "do_sample": True}, "do_sample=true is added"),
        ('{"temperature": 0.6, "do_sample": true}', {"temperature": 0.6, "do_sample": True}, ""),
        ('{"num_return_sequences": 3}', {}, "only its special tokens are kept"),
        ('{"early_stopping": "sometimes"}', {}, "only its special tokens are kept"),
        ('{"max_new_tokens": -1}', {}, "only its special tokens are kept"),
        ('{"max_new_tokens": "many"}', {}, "only its special tokens are kept"),
        ('{"early_stopping":', {}, "only its special tokens are kept"),
        ("[1]", {}, "only its special tokens are kept"),
        ('{"top_k": 1, "repetition_penalty": 1.3}', {"top_k": 1, "repetition_penalty": 1.3, "do_sample": True}, "do_sample=true"),
    ],
)
def test_generation_settings_that_are_not_valid_are_repaired(base, adapter, tmp_path, capsys, text, expected, said):
    (base / GENERATION).write_text(text, encoding="utf-8")
    merge(settings(base).model, adapter, tmp_path / "merged", "float16")
    saved = json.loads((tmp_path / "merged" / GENERATION).read_text(encoding="utf-8"))
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    assert {key: value for key, value in saved.items() if key not in tokens} == expected
    assert saved["eos_token_id"] == load_tokenizer(base).eos_token_id and isinstance(saved["pad_token_id"], int)
    printed = capsys.readouterr().out
    assert said in printed and len(printed.splitlines()) == bool(said)
    load_base(settings(tmp_path / "merged").model, "float16")


def load_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_what_is_wrong_with_the_tokenizer_is_known_before_merging(base, adapter, tmp_path):
    for file in base.glob("tokenizer*"):
        file.write_text("{", encoding="utf-8")
    with pytest.raises((OSError, ValueError, TypeError)):
        merge(settings(base).model, adapter, tmp_path / "merged", "float16")
    assert not (tmp_path / "merged").exists()
