"""Secrets kept out of everything that is written: those that this machine holds, and text that looks like one."""

from __future__ import annotations

import contextlib
import html
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from medcot_utils.config import SecretsSettings
from medcot_utils.machine import secrets
from medcot_utils.machine.paths import expand_home
from medcot_utils.machine.secrets import SECRET_NAMES, SHORTEST_SECRET, found_secrets

LOOKS_LIKE = {
    "a Hugging Face token": re.compile(r"hf_[A-Za-z0-9]{30,}"),
    "a Kaggle token": re.compile(r"KGAT_[A-Za-z0-9]{16,}"),
    "a secret API key (sk-...)": re.compile(r"sk-[A-Za-z0-9]{20,}"),
    "a Weights & Biases key": re.compile(r"wandb_v\d_[A-Za-z0-9_]{20,}|wandb[^\n]{0,40}\b[0-9a-f]{40}\b"),
}
# Held for other programs, and no business of the series: not looked for, but kept out of what is written all the same.
_OTHERS = ("MEDCOT_KEY", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_API_TOKEN", "KAGGLE_KEY", "KAGGLE_USER_SECRETS_TOKEN")


def known_secrets(settings: SecretsSettings | None = None) -> dict[str, str]:
    """Return {value: where it was found} of every secret that any source holds, under the settings' names and the usual ones.

    It is for searching in text that is written, and must never be shown. `redact` takes these secrets out from now on."""
    found: dict[str, str] = {}
    for name, service in secrets.SERVICES.items():
        names = dict.fromkeys([*getattr(settings or SecretsSettings(), service.setting), *secrets.SECRET_NAMES[name]])
        for secret in secrets.held_secrets(names, service.token_file):
            if isinstance(secret, secrets.Secret):
                found[secret.value.get_secret_value()] = secret.where
    others = [(os.environ.get(name, ""), f"environment {name}") for name in _OTHERS]
    for value, where in [*others, *((value, "Kaggle's token file") for value in _kaggle_files())]:
        found[secrets.remember(value, where).value.get_secret_value()] = where
    return {value: where for value, where in found.items() if len(value) >= secrets.SHORTEST_SECRET}


def _kaggle_files() -> Iterator[str]:
    folder = expand_home(os.environ.get("KAGGLE_CONFIG_DIR") or "~/.kaggle")
    with contextlib.suppress(OSError):
        yield (folder / "access_token").read_text(encoding="utf-8")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        yield str(json.loads((folder / "kaggle.json").read_text(encoding="utf-8"))["key"])


def kind_of(text: str, known: Mapping[str, str] | None = None) -> str | None:
    """Return the kind of the first secret in a text, or None; never the secret. `known` is the result of `known_secrets`;
    without it only the look counts."""
    held = next((f"a secret of this machine ({where})" for value, where in (known or {}).items() if value in text), None)
    return held or next((f"what looks like {kind}" for kind, pattern in LOOKS_LIKE.items() if pattern.search(text)), None)


def redact_outputs(notebook: Any) -> None:
    """Take every known secret out of a notebook's outputs and widgets, in place; the cells' source is left as it is."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _join_cut_secrets(cell.outputs)
            cell.outputs[:] = _redacted(cell.outputs)
    if "widgets" in notebook.metadata:
        notebook.metadata.widgets = _redacted(notebook.metadata.widgets)


def _join_cut_secrets(outputs: list[Any]) -> None:
    """Put printed text into its first piece if a secret lies across two. The other pieces stay, empty: the client finds
    outputs by their number."""
    for _, group in itertools.groupby(outputs, lambda output: output.get("name") if output.output_type == "stream" else None):
        pieces = [output for output in group if output.output_type == "stream"]
        text = "".join(output.text for output in pieces)
        if redact(text) != "".join(redact(output.text) for output in pieces):
            for output in pieces:
                output.text = ""
            pieces[0].text = text


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [_redacted(part) for part in value]
    if isinstance(value, dict):
        return type(value)({_redacted(key): _redacted(part) for key, part in value.items()})
    return value


def redact(text: str) -> str:
    """Return the text without any secret that this process has found or holds: for messages of other libraries."""
    held = {os.environ.get(name, "").strip() for names in SECRET_NAMES.values() for name in names}
    for value in sorted({*found_secrets, *held}, key=len, reverse=True):
        if len(value) >= SHORTEST_SECRET:
            for form in {value, html.escape(value), json.dumps(value)[1:-1]}:  # as it is, within a page, within JSON
                text = text.replace(form, "**********")
    return text
