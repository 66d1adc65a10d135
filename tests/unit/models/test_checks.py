"""What is known of a model before it is loaded: files, quantization and tokenizer, each fault in one line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tiny_families import FAMILIES

from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError
from medcot_utils.models.checks import check_model
from medcot_utils.models.tokenizer import ModelError
from medcot_utils.series.preflight import preflight
from medcot_utils.series.runner import plan_config

pytestmark = pytest.mark.model

EVIL = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    FAMILIES["qwen2"].make(folder)
    return folder


@pytest.fixture
def model(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may break."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def settings(folder):
    return [f"model.name={json.dumps(str(folder))}"]


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def quantize(folder):
    change(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def leave_only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "training_args.safetensors").write_bytes(b"")  # no weights that transformers would load


def forget_eos(folder):
    change(folder / "tokenizer_config.json", eos_token=None)


def need_own_code(folder):
    change(folder / "config.json", model_type="evil", auto_map=EVIL)


def be_of_another_kind(folder):
    change(folder / "config.json", model_type="llama9")


def remove_all(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def take_attention_from_a_hub(folder):
    change(folder / "config.json", _attn_implementation="evil/kernel")


def take_attention_from_a_hub_inside(folder):  # as CVE-2026-4372 does, and in a part's own configuration
    change(folder / "config.json", text_config={"_attn_implementation_internal": {"": "evil/kernel@main:attend"}})


def take_experts_from_a_hub(folder):
    change(folder / "config.json", experts_implementation="evil/kernel")


FAULTS = {
    "quantized": (quantize, "is quantized already (bitsandbytes), and the adapter is merged into 16-bit weights"),
    "only .bin": (leave_only_bin, "has no safetensors (only .bin), which the merge reads"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no safetensors (no weights at all)"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no folder": (remove_all, "no such folder on this machine"),
    "own code": (need_own_code, "model_type 'evil' (config.json), and needs its own code (auto_map): medcot runs no code"),
    "another kind": (be_of_another_kind, "does not know its model_type 'llama9' (config.json): medcot runs no code"),
    "attention": (take_attention_from_a_hub, "takes attention or experts from the hub's 'evil/kernel': medcot runs no code"),
    "its part's": (take_attention_from_a_hub_inside, "from the hub's 'evil/kernel@main:attend': medcot runs no code"),
    "experts": (take_experts_from_a_hub, "takes attention or experts from the hub's 'evil/kernel': medcot runs no code"),
    "no EOS": (forget_eos, "its tokenizer names no EOS token"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_could_not_be_exported_is_refused_first(fault, model, tmp_path):
    spoil, expected = FAULTS[fault]
    spoil(model)
    with pytest.raises(MedcotError) as caught:
        plan_config(tmp_path / "run", "smoke", settings(model))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_that_can_be_used_is_named_in_one_line(model, tmp_path):
    lines = {check.name: check.line for check in preflight(load_config("smoke", settings(model)), tmp_path / "run", online=False)}
    assert lines["model"] == f"{model}: Qwen2ForCausalLM"


def test_a_model_on_the_hub_is_left_to_notebook_01(tmp_path):
    config = load_config("smoke", ["model.name=somebody/model"])
    assert "model" not in [check.name for check in preflight(config, tmp_path / "run", online=False)]


def test_a_hub_out_of_reach_hides_nothing_else(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = check_model(load_config("smoke", ["model.name=somebody/model"]).model)
    assert line == "somebody/model: the Hub cannot be reached, so the model was not checked"


def test_code_beside_a_known_kind_is_left_alone(model):
    """As many published models have it: transformers' own code is taken, and theirs is not even read."""
    change(model / "config.json", auto_map=EVIL)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    assert check_model(load_config("smoke", settings(model)).model) == f"{model}: Qwen2ForCausalLM"


@pytest.mark.parametrize("needs_code", [True, False])
def test_a_model_on_the_hub_is_asked_for_code_before_its_weights(model, monkeypatch, needs_code):
    if needs_code:
        need_own_code(model)
    else:
        change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    siblings = [SimpleNamespace(rfilename=file.name) for file in model.iterdir()]
    fetched = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, **_: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: fetched.append(file) or str(model / file))
    monkeypatch.setattr("medcot_utils.models.checks.load_tokenizer_from", lambda *given: fetched.append(given))
    hub = load_config("smoke", ["model.name=somebody/model"]).model
    if needs_code:
        with pytest.raises(ModelError, match=r"^model\.name somebody/model: .* model_type 'evil' .*medcot runs no code"):
            check_model(hub)
    else:
        assert check_model(hub) == "somebody/model: Qwen2ForCausalLM"
    assert fetched == ["config.json", "tokenizer_config.json", *([] if needs_code else [("somebody/model", None)])]


# --- the quantized copy, and a model that was not checked ------------------------------------------------------------


def copied(name, copy, **more):
    return load_config("smoke", settings(name)).model.model_copy(
        update={"engine": "unsloth", "quantized_name": str(copy), **more}
    )


@pytest.mark.parametrize("name", ["a folder", "embedded:tiny-random-llama"])
def test_a_quantized_copy_that_needs_own_code_is_refused(name, checkpoint, model):
    need_own_code(model)
    name = checkpoint if name == "a folder" else name
    with pytest.raises(
        ModelError, match=r"^model\.quantized_name .*/model: .* model_type 'evil' .*medcot runs no code"
    ) as caught:
        check_model(copied(name, model))
    assert "\n" not in str(caught.value)
    for unused in ({"engine": "transformers"}, {"load_in_4bit": False}):
        check_model(copied(name, model, **unused))


def test_a_quantized_copy_is_quantized_and_may_be(checkpoint, model):
    quantize(model)
    assert check_model(copied(checkpoint, model)) == f"{checkpoint}: Qwen2ForCausalLM"


def test_a_quantized_copy_whose_tokenizer_needs_code_is_refused(checkpoint, model):
    change(model / "config.json", model_type="llama")
    change(model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"needs its own code .*medcot runs no code"):
        check_model(copied(checkpoint, model))


def test_a_quantized_copy_on_the_hub_is_asked_for_code(checkpoint, model, monkeypatch):
    need_own_code(model)
    siblings = [SimpleNamespace(rfilename=file.name) for file in model.iterdir()]
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info",
        lambda self, name, revision, **_: asked.append((name, revision)) or SimpleNamespace(siblings=siblings),
    )
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: str(model / file))
    with pytest.raises(ModelError, match=r"^model\.quantized_name mallory/copy: "):
        check_model(copied(checkpoint, "mallory/copy", quantized_revision="c0ffee"))
    assert asked == [("mallory/copy", "c0ffee")]


def test_loading_a_model_that_needs_own_code_is_one_line(model):
    from medcot_utils.models.merging import load_unquantized
    from medcot_utils.models.transformers_engine import load

    need_own_code(model)
    for call in (lambda: load(load_config("smoke", settings(model)).model), lambda: load_unquantized(model, "float32")):
        with pytest.raises(ModelError, match=r"/model needs its own code .*medcot runs no code"):
            call()
