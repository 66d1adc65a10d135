"""Tokenizers of other families than Llama's, made ready: no EOS after a prompt, visible think tags, a pad token that exists."""

from __future__ import annotations

import json

import pytest
from tiny_families import FAMILIES, put_around, save, sentencepiece
from transformers import LlamaConfig

from medcot_utils.config import load_config
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.models import engine
from medcot_utils.models.records import make_record
from medcot_utils.models.tokenizer import ModelError, load_tokenizer_from

pytestmark = pytest.mark.model

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def backend():
    """A tokenizer in the style of Mistral's, with the think tags as control tokens and an EOS after each text."""

    def make(after="</s>"):
        tokenizer = sentencepiece(["<unk>", "<s>", "</s>"], prepend=True)
        tokenizer.add_special_tokens(["<think>", "</think>"])
        return put_around(tokenizer, before="<s>", after=after)

    return make


@pytest.fixture
def load(tmp_path):
    """`load(backend, ...)`: the tokenizer as the series loads it, of a checkpoint with that many rows more than tokens."""

    def make(backend, named=NAMED, more_rows=0, settings=None):
        save(tmp_path, backend, named, LlamaConfig(vocab_size=backend.get_vocab_size() + more_rows, **SMALL))
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (settings or {})))
        return engine.load_tokenizer(load_config("smoke", [f"model.name={json.dumps(str(tmp_path))}"]).model)

    return make


@pytest.mark.parametrize("settings", [{}, {"add_eos_token": True}])
def test_no_eos_follows_a_prompt(load, backend, settings, tmp_path):
    tokenizer = load(backend(), settings=settings)
    ids = tokenizer(inference_prompt("Why?"))["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert tokenizer("a", "b")["input_ids"].count(tokenizer.eos_token_id) == 0
    tokenizer.save_pretrained(tmp_path / "saved")  # as adapter and merged model are
    again = type(tokenizer).from_pretrained(tmp_path / "saved")
    assert again(inference_prompt("Why?"))["input_ids"] == ids


def test_think_tags_that_are_control_tokens_are_read(load, backend):
    tokenizer = load(backend())
    ids = tokenizer("It is so.\n</think>\nMumps.</s>", add_special_tokens=False)["input_ids"]
    record = make_record(tokenizer, "", ids, 0.0)
    assert (record["closed"], record["thinking"], record["answer"]) == (1, "It is so.", "Mumps.")
    assert record["finished"] and "</s>" not in record["completion"]
    assert tokenizer.all_special_tokens == ["<s>", "</s>", "<unk>"]


def test_a_pad_token_beyond_the_embedding_is_not_used(load, backend):
    tokenizer = load(backend(), NAMED | {"pad_token": "[PAD]"})
    assert tokenizer.pad_token == "</s>"


def test_a_pad_token_of_the_embedding_is_kept(load, backend):
    assert load(backend(), NAMED | {"pad_token": "[PAD]"}, more_rows=1).pad_token == "[PAD]"


def test_without_an_eos_token_a_model_is_refused(load, backend):
    with pytest.raises(Exception, match="its tokenizer names no EOS token"):
        load(backend(after=None), {"unk_token": "<unk>", "bos_token": "<s>"})


def test_tokens_that_the_embedding_lacks_are_refused(load, backend):
    with pytest.raises(Exception, match=r"writes '</?think>' as token \d+, and the model's embedding has \d+ rows"):
        load(backend(), more_rows=-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_tokenizer_ends_prompts_in_think(family, tmp_path):
    FAMILIES[family].make(tmp_path)
    settings = load_config("smoke", [f"model.name={json.dumps(str(tmp_path))}"]).model
    tokenizer = engine.load_tokenizer(settings)
    ids = tokenizer(inference_prompt("Fièvre ?"))["input_ids"]
    # Those that write a space before each text write one behind a control token too.
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "").endswith("Response:\n<think>\n")
    assert tokenizer.pad_token_id is not None


def test_code_beside_a_tokenizer_is_not_run_even_after_a_yes(load, backend, tmp_path, monkeypatch):
    """transformers asks at the terminal, or in the notebook, whether to run it, if nobody has told it no."""
    load(backend())
    asked = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(asked))
    code = f"from transformers import LlamaConfig as Config\nopen({str(tmp_path / 'was here')!r}, 'w')\n"
    (tmp_path / "evil.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError, match=rf"{tmp_path} needs its own code \(auto_map .*\): medcot runs no code"):
        load_tokenizer_from(tmp_path)
    assert not (tmp_path / "was here").exists()
