"""Sentence embedding models of other people: what is planted in their files does not run, and is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from medcot_utils.models.embedded import find_model_source
from medcot_utils.models.sentence_model import load_sentence_model
from medcot_utils.models.tokenizer import ModelError

pytestmark = pytest.mark.model

TRANSFORMER, POOLING = "sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"
DENSE, NEWER = "sentence_transformers.models.Dense", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
BERT = "sentence_bert_config.json"


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.fixture
def mark(tmp_path):
    """The file that whatever is planted makes, if it runs; evil.py makes it too."""
    return tmp_path / "ran"


@pytest.fixture
def model(tmp_path, mark):
    """`model(modules, files)`: the folder of an embedding model with these modules, and with these files laid over it."""

    def make(modules=((TRANSFORMER, ""), (POOLING, "1_Pooling")), files=None, name="embedder"):
        folder = tmp_path / name
        shutil.copytree(find_model_source("embedded:tiny-random-llama"), folder)
        width = json.loads((folder / "config.json").read_text())["hidden_size"]
        text = json.dumps([{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)])
        pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
        evil = f"open({str(mark)!r}, 'w')\nclass Module:\n    pass\n"
        dense = {"in_features": width, "out_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"}
        held = {"modules.json": text, "1_Pooling/config.json": pooling, "2_Dense/config.json": dense, "evil.py": evil}
        for file, content in (held | (files or {})).items():
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            if content is None:
                path.unlink()
            elif isinstance(content, Planted):
                torch.save({"weights": content}, path)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return make


def settings_of(name: str) -> dict:
    return json.loads((Path(find_model_source("embedded:tiny-random-llama")) / name).read_text())


WITH_CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Module", "AutoModel": "evil.Module"}}


@pytest.mark.parametrize("pooling", [POOLING, NEWER])
def test_a_plain_model_gives_its_embeddings(model, pooling):
    from sentence_transformers import SentenceTransformer

    arguments = {"max_seq_length": 32, "model_args": {"attn_implementation": "eager"}}
    folder = str(model(((TRANSFORMER, ""), (pooling, "1_Pooling")), {BERT: arguments}))
    found = load_sentence_model(folder).encode(["Normal residual volume."])
    assert np.array_equal(found, SentenceTransformer(folder).encode(["Normal residual volume."]))


CLASSES = {
    "of its folder": "evil.Module",
    "of the system": "os.system",
    "of another library": "transformers.AutoModel",
    "without a module": "Module",
    "a module of the library's": "sentence_transformers.base.model.pickle",
    "a function of the library's": "sentence_transformers.util.misc.import_from_string",
    "no text": ["evil.Module"],
    "missing": None,
}


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_a_class_of_another_library_is_refused_unread(model, mark, monkeypatch, kind):
    folder = model(((TRANSFORMER, ""), (kind, "")))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=r"^evaluation\.embedding_model .* cannot be used: modules\.json: type .* is no class "):
        load_sentence_model(str(folder))
    assert not mark.exists()


SETTINGS = {
    "a router's": ("router_config.json", {"types": {"0_a": "evil.Module"}}, "router_config.json: types 'evil.Module'"),
    "words": ("wordembedding_config.json", {"tokenizer_class": "evil.Module"}, "tokenizer_class 'evil.Module' is no class"),
    "activation": ("2_Dense/config.json", {"activation_function": "evil.Module"}, "activation_function 'evil.Module'"),
    "torch": ("2_Dense/config.json", {"activation_function": "torch.utils.cpp_extension.load"}, "no class of"),
    "pickled": (BERT, {"model_args": {"weights_only": False}}, "model_args gives 'weights_only' False"),
    "trusted": (BERT, {"config_args": {"trust_remote_code": True}}, "config_args gives 'trust_remote_code' True"),
    "a kernel": (BERT, {"model_kwargs": {"attn_implementation": "evil/kernel"}}, "'attn_implementation' 'evil/kernel'"),
    "an object": (BERT, {"model_args": {"adapter_kwargs": {"a": 1}}}, "model_args gives 'adapter_kwargs'"),
    "no object": (BERT, {"model_args": ["weights_only"]}, "model_args gives"),
    "a method": (BERT, {"modality_config": {"text": {"method": "push_to_hub"}}}, "method 'push_to_hub'"),
    "own code": ("config.json", WITH_CODE, "config.json has model_type 'mine' and needs its own code"),
    "a list": ("config_sentence_transformers.json", [1], "config_sentence_transformers.json holds no settings"),
    "too deep": ("config_sentence_transformers.json", "[" * 100_000, "cannot be read (its lists and objects"),
    "no JSON": ("modules.json", "{", "modules.json cannot be read (Expecting"),
    "no modules": ("modules.json", "[1]", "modules.json does not list modules"),
    "out": ("modules.json", json.dumps([{"type": TRANSFORMER, "path": "../other"}]), "'../other' leads out of its folder"),
}


@pytest.mark.parametrize(("file", "content", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_choose_code_are_refused_unread(model, mark, monkeypatch, file, content, message):
    folder = model(files={file: content})
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=r"^evaluation\.embedding_model .* cannot be used: ") as error:
        load_sentence_model(str(folder))
    assert message in str(error.value) and "\n" not in str(error.value) and not mark.exists()


@pytest.mark.parametrize("looked_through", [True, False])
def test_weights_are_not_unpickled_whatever_the_settings_say(model, mark, monkeypatch, looked_through):
    # With no dtype to go by, transformers reads the first file as these arguments say, and so runs what it holds.
    without = {key: value for key, value in settings_of("config.json").items() if "dtype" not in key}
    arguments = {"model_args": {"weights_only": False, "dtype": "auto"}}
    files = {"config.json": without, BERT: arguments, "pytorch_model.bin": Planted(mark), "model.safetensors": None}
    if not looked_through:
        monkeypatch.setattr("medcot_utils.models.sentence_model._check_arguments", lambda *_: None)
    with pytest.raises(ModelError, match=r"cannot be used: (its pickled weights hold more than weights|sentence_bert_config)"):
        load_sentence_model(str(model(files=files)))
    assert not mark.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "2_Dense/pytorch_model.bin"])
def test_pickled_weights_that_hold_code_are_one_line(model, mark, file):
    files = {file: Planted(mark)} | ({"model.safetensors": None} if "/" not in file else {})
    with pytest.raises(ModelError, match="cannot be used: its pickled weights hold more than weights") as error:
        load_sentence_model(str(model(((TRANSFORMER, ""), (POOLING, "1_Pooling"), (DENSE, "2_Dense")), files)))
    assert "\n" not in str(error.value) and not mark.exists()


BROKEN = {
    "a class that is not there": {
        "modules.json": json.dumps([{"type": "sentence_transformers.none.X", "path": "", "name": "0"}])
    },
    "an argument twice": {BERT: {"model_name_or_path": "elsewhere"}},
    "no modules": {"modules.json": "[]"},
    "an unknown prompt": {"config_sentence_transformers.json": {"default_prompt_name": "gone"}},
    "an unnamed module": {"modules.json": json.dumps([{"type": TRANSFORMER, "path": ""}])},
}


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN)
def test_a_model_that_cannot_be_loaded_is_one_line(model, files):
    with pytest.raises(ModelError, match=r"^evaluation\.embedding_model '.*embedder' cannot be (loaded|used): .") as error:
        load_sentence_model(str(model(files=files)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mallory/embedder", "embedder"])
@pytest.mark.parametrize("kind", [TRANSFORMER, "evil.Module"])
def test_a_model_on_the_hub_is_looked_through_too(model, mark, monkeypatch, tmp_path, name, kind):
    cached = tmp_path / "cache" / f"models--{name if '/' in name else f'sentence-transformers/{name}'}".replace("/", "--", 2)
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c" * 40)
    (cached / "snapshots").mkdir()
    shutil.move(model(((kind, ""), (POOLING, "1_Pooling"))), cached / "snapshots" / ("c" * 40))
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if kind == TRANSFORMER:
        assert load_sentence_model(name).encode(["one"]).shape[0] == 1
        return
    with pytest.raises(ModelError, match=rf"^evaluation\.embedding_model '{name}' cannot be used: modules\.json: type 'evil\."):
        load_sentence_model(name)
    assert not mark.exists()
