"""The table of settings: each with its meaning and what it may be, chosen by words."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from medcot_utils.cli.settings_table import describe_kind, settings_table
from medcot_utils.config import ConfigError, RunConfig, load_config, setting_names


def shown(*words, width=80, profile="demo"):
    console = Console(file=io.StringIO(), width=width)
    console.print(settings_table(load_config(profile), words))
    return console.file.getvalue()


def test_every_setting_says_what_it_means():
    fields = [field for one in RunConfig.model_json_schema()["$defs"].values() for field in one["properties"].items()]
    silent = [name for name, field in fields if "$ref" not in field and "description" not in field]
    assert silent == []


def test_every_setting_that_may_be_null_says_what_null_means():
    schema = RunConfig.model_json_schema()["$defs"].values()
    fields = [field for one in schema for field in one["properties"].items() if {"type": "null"} in field[1].get("anyOf", [])]
    assert len(fields) > 15
    assert [name for name, field in fields if "null: " not in field["description"]] == []


def test_a_setting_shows_value_meaning_choices_and_default():
    text = shown("training.warmup_steps", width=120)
    assert text.count("training.") == 1
    assert all(part in text for part in ("3", "optimizer steps until learning_rate is reached", "an integer from 0; default 5"))


def test_words_choose_settings_by_name_or_meaning():
    text = shown("lora.r", "W&B", width=120)
    assert "lora.random_state" in text and "tracking.entity" in text and "model.name" not in text
    with pytest.raises(ConfigError, match=r"no setting has 'leraning_rate' in .*; did you mean training\.learning_rate\?"):
        shown("leraning_rate")


def test_rounding_finds_the_settings_that_decide_on_it():
    text = shown("rounding", width=120)
    names = ("model.load_in_4bit", "evaluation.base_16bit_loss", "export.merge_into")
    assert [name in text for name in names] == [True] * 3 and "lora.r" not in text


def test_the_whole_table_fits_80_columns_and_cuts_no_name():
    text = shown(profile="article")
    assert max(map(len, text.splitlines())) <= 80
    assert [name for name in setting_names() if name != "profile" and name not in text] == []


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ({"type": "integer", "minimum": 0, "exclusiveMaximum": 2**32}, "an integer from 0 below 4294967296"),
        ({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}, "a number above 0 or null"),
        ({"anyOf": [{"const": "unsloth"}, {"type": "boolean"}]}, "unsloth or true or false"),
        ({"enum": ["auto", "none"]}, "auto, none"),
        ({"type": "array", "items": {"enum": ["adapter", "gguf"]}}, "a list of adapter, gguf"),
        ({"type": "array", "items": {"type": "string"}}, "a list of texts"),
    ],
)
def test_what_a_setting_may_be_is_read_from_its_schema(field, kind):
    assert describe_kind({}, field) == kind
