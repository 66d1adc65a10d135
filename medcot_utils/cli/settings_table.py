"""The table of `medcot settings`: every setting with its value in a profile, its meaning, and its possible values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from medcot_utils.config import ConfigError, RunConfig, nearest, setting_names

_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
_KINDS = {"integer": "an integer", "number": "a number", "string": "a text", "boolean": "true or false", "null": "null"}


def settings_table(config: RunConfig, words: Iterable[str] = ()) -> Table:
    """Return a table of the settings with one of the words in their name or meaning; of all settings if no word is given.

    Raises ConfigError for a word that occurs in no setting."""
    schema = RunConfig.model_json_schema()
    rows = {name: _field(schema, name) for name in setting_names() if name != "profile"}
    chosen: set[str] = set() if (words := list(words)) else set(rows)
    for word in words:
        found = {name for name, field in rows.items() if word.lower() in f"{name} {field['description']}".lower()}
        if not found:
            raise ConfigError(f"no setting has {word!r} in its name or meaning{nearest(word, rows)}")
        chosen |= found
    table = Table("setting", f"value in {config.profile}, and what it means")
    for name in filter(chosen.__contains__, rows):
        field = rows[name]
        said = Text(json.dumps(config.get(name), ensure_ascii=False), style="bold")
        said.append(f"\n{field['description']}", style="not bold")
        said.append(f"\n{describe_kind(schema, field)}{_describe_default(field)}", style="not bold dim")
        table.add_row(name, said)
    return table


def _field(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the JSON schema of one setting."""
    field: Mapping[str, Any] = schema
    for part in name.split("."):
        field = _resolve(schema, field)["properties"][part]
    return field


def _resolve(schema: Mapping[str, Any], field: Mapping[str, Any]) -> Mapping[str, Any]:
    return schema["$defs"][field["$ref"].rsplit("/", 1)[-1]] if "$ref" in field else field


def describe_kind(schema: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    """Return the possible values of a setting, from its JSON schema: its choices, or its type with the bounds."""
    if "anyOf" in field:
        return " or ".join(describe_kind(schema, one) for one in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        inner = field.get("items", {})
        return "a list" + (f" of {describe_kind(schema, inner)}" if "enum" in inner else " of texts")
    return " ".join([_KINDS[field["type"]], *(f"{word} {field[key]}" for key, word in _BOUNDS.items() if key in field)])


def _describe_default(field: Mapping[str, Any]) -> str:
    return f"; default {json.dumps(field['default'], ensure_ascii=False)}" if "default" in field else "; each profile sets it"
