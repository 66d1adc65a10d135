"""Secrets kept out of everything that is written: those that this machine holds, and text that looks like one.

`clear` is the one function that takes them out. Messages and logs go through it as text (`redact`), executed notebooks cell by
cell (`ClearedCopies`), and the streams of commands and workers piece by piece (`guarded_streams`)."""

from __future__ import annotations

import contextlib
import json
import netrc
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medcot_utils.config import SecretsSettings
from medcot_utils.machine import secrets
from medcot_utils.machine.paths import expand_home
from medcot_utils.machine.secret_forms import SHORTEST_SECRET, begun_at_end, find_known
from medcot_utils.token_shapes import Span, cover, find_by_look, name_look

_BEGINNING = 4  # characters of a secret that is being printed; with fewer, much that is none would be hidden

# Held for other programs, and no business of the series: not looked for, but kept out of what is written all the same.
_OTHERS = (
    *("MEDCOT_KEY", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_API_TOKEN", "KAGGLE_KEY", "KAGGLE_USER_SECRETS_TOKEN", "OPENAI_API_KEY"),
    *("ANTHROPIC_API_KEY", "GITHUB_TOKEN", "GH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)


def known_secrets(settings: SecretsSettings | None = None) -> dict[str, str]:
    """Return {value: where it was found} of every secret that any source holds, under the settings' names and the usual ones.

    It is for searching in text that is written, and must never be shown. `redact` takes these secrets out from now on. Raises
    PlatformError for a token file that is not UTF-8."""
    found: dict[str, str] = {}
    for name, service in secrets.SERVICES.items():
        names = dict.fromkeys([*getattr(settings or SecretsSettings(), service.setting), *secrets.SECRET_NAMES[name]])
        for secret in secrets.held_secrets(names, service.token_file):
            if isinstance(secret, secrets.Secret):
                found[secret.value.get_secret_value()] = secret.where
    others = [(os.environ.get(name, ""), f"environment {name}") for name in _OTHERS]
    for value, where in [*others, *_kaggle_files(), *_netrc()]:
        found.setdefault(secrets.remember(value, where).value.get_secret_value(), where)
    return {value: where for value, where in found.items() if len(value) >= SHORTEST_SECRET}


def _kaggle_files() -> Iterator[tuple[str, str]]:
    folder, where = expand_home(os.environ.get("KAGGLE_CONFIG_DIR") or "~/.kaggle"), "Kaggle's token file"
    with contextlib.suppress(OSError):
        yield secrets.read_token_file(folder / "access_token"), where
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        yield str(json.loads(secrets.read_token_file(folder / "kaggle.json"))["key"]), where


def _netrc() -> Iterator[tuple[str, str]]:
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        for _, _, password in secrets.read_netrc().values():
            yield password, "netrc"


def secrets_at_hand() -> dict[str, str]:
    """Return {value: where it was found} of the secrets that this process has found, and of those in its environment; never to
    be shown."""
    names = [*(name for names in secrets.SECRET_NAMES.values() for name in names), *_OTHERS]
    here = {os.environ.get(name, "").strip(): f"environment {name}" for name in names}
    return {value: where for value, where in (here | secrets.found_secrets).items() if len(value) >= SHORTEST_SECRET}


def kind_of(text: str, known: Mapping[str, str] | None = None) -> str | None:
    """Return the kind of the first secret in a text, or None; never the secret. `known` is the result of `known_secrets` or
    `secrets_at_hand`; without it only the look counts."""
    if held := next((where for value, where in (known or {}).items() if find_known(text, [value])), None):
        return f"a secret of this machine ({held})"
    look = name_look(text)
    return look and f"what looks like {look}"


def name_holders(texts: Mapping[str, str], known: Mapping[str, str]) -> list[str]:
    """Return `NAME holds what looks like a Kaggle token` for each of the texts, by name, that holds a secret."""
    return [f"{name} holds {kind}" for name, text in texts.items() if (kind := kind_of(text, known))]


def clear(pieces: Sequence[str]) -> list[str]:
    """Return consecutive pieces of one text without any secret that this process has found or holds, in any form, and without
    what looks like one; also if it lies across pieces."""
    return cover(pieces, _find("".join(pieces)))


def _find(text: str) -> list[Span]:
    return [*find_known(text, secrets_at_hand()), *find_by_look(text)]


def redact(text: str) -> str:
    """Return a text without secrets, as `clear` does."""
    return clear([text])[0]


# --- notebooks -----------------------------------------------------------------------------------------------------


def clear_outputs(outputs: Sequence[Any], is_running: bool = False) -> list[Any]:
    """Return a copy of a cell's outputs without secrets, also if one was printed in pieces or on two streams.

    Args:
        is_running: the cell may print more, so the end of its text is hidden too if it may be the beginning of a secret."""
    made = [_clear_output(output) for output in outputs]
    streams = [(output, []) for output in made if output.output_type == "stream"]
    names = {output.name for output, _ in streams}
    for chosen in [*({name} for name in names), *([names] if len(names) > 1 else [])]:
        pieces = [(output.text, spans) for output, spans in streams if output.name in chosen]
        text = "".join(piece for piece, _ in pieces)
        found, offset = _find(text), 0
        if is_running and (begun := begun_at_end(text, secrets_at_hand())) >= _BEGINNING:
            found.append((len(text) - begun, len(text)))
        for piece, spans in pieces:
            after = offset + len(piece)
            spans += [(max(begin - offset, 0), end - offset) for begin, end in found if begin < after and end > offset]
            offset = after
    for output, spans in streams:
        output.text = cover([output.text], spans)[0]
    return made


def _clear_output(output: Any) -> Any:
    # Only what a cell says. The words of the notebook format stay, also if one of them is somebody's password.
    said = {name: output[name] for name in ("ename", "evalue", "traceback", "metadata") if name in output}
    made = {name: _clear_value(value) for name, value in said.items()}
    if "data" in output:
        made["data"] = type(output.data)({kind: _clear_value(value) for kind, value in output.data.items()})
    return type(output)(output | made)


def _clear_value(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):  # of texts: the lines of one
        return clear(value) if all(isinstance(part, str) for part in value) else [_clear_value(part) for part in value]
    if isinstance(value, dict):
        return type(value)({_clear_value(key): _clear_value(part) for key, part in value.items()})
    return value


class ClearedCopies:
    """Make copies of a notebook that runs, to be written: without secrets in sources, outputs and widgets.

    The notebook itself is left as it is, because its cells are still to be run, and more text may be printed. A cell that has
    not changed since the last copy is not searched again."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[int, dict[str, Any]]] = {}

    def make(self, notebook: Any) -> Any:
        """Return a copy of a notebook as it is now."""
        known = hash(frozenset(secrets_at_hand()))
        copy = type(notebook)(notebook)
        copy.cells = [self._clear_cell(index, cell, known) for index, cell in enumerate(notebook.cells)]
        if "widgets" in notebook.metadata:
            copy.metadata = type(notebook.metadata)(notebook.metadata)
            copy.metadata.widgets = _clear_value(notebook.metadata.widgets)
        return copy

    def _clear_cell(self, index: int, cell: Any, known: int) -> Any:
        is_running = cell.metadata.get("papermill", {}).get("status") == "running"
        content = {name: cell[name] for name in ("source", "outputs") if name in cell}
        digest = _digest([content, is_running, known])
        if self._made.get(index, (None,))[0] != digest:
            cleared = {"source": redact(cell.source)}
            if "outputs" in cell:
                cleared["outputs"] = clear_outputs(cell.outputs, is_running)
            self._made[index] = (digest, cleared)
        return type(cell)(cell | self._made[index][1])


def _digest(value: Any) -> int:
    """Return a number that tells contents apart. A text keeps its hash, so one that has not changed is not read again."""
    if isinstance(value, dict):
        return hash(tuple((key, _digest(part)) for key, part in value.items()))
    return hash(tuple(map(_digest, value))) if isinstance(value, list) else hash(value)
