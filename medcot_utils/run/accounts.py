"""Settings about accounts: where results are sent, under whose name, and which secrets are read for it.

They count only if this user has written them. `Run.create` is given them by a call, and signs them (accounts.json); a run
directory that comes from somebody else, or from an earlier version, holds them without such a signature, and then they stand
at the profile's values. They stay in config.json all the same, since fingerprints are made of them.

The profile's values may send too: `tracking.backend` auto is Weights & Biases for whoever has a key. So the backend of a run
that this user makes is signed whatever its value, and a run without any signed setting of tracking is tracked offline."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import PROFILES, RunConfig, load_config, setting_names, with_values
from medcot_utils.machine import secrets, user_key
from medcot_utils.machine.paths import display_path
from medcot_utils.plain_text import say
from medcot_utils.run.files import to_json, write_atomic
from medcot_utils.text_files import read_json

if TYPE_CHECKING:
    from medcot_utils.run.directory import Run

ACCOUNTS = "accounts.json"
_TRACKING, _BACKEND, _MODE = "tracking.", "tracking.backend", "tracking.mode"
_ABOUT_ACCOUNTS = ("hub.", "secrets.", _BACKEND, "tracking.entity", "tracking.project", _MODE)
_SENDS_NOTHING = {_BACKEND: ("none", "tensorboard"), _MODE: ("offline",)}  # values that count, whoever gave them
_LONGEST_SHOWN = 100  # characters of a value, which is somebody else's text


class SignedSettings(TypedDict):
    """Hold the record of one config.json in accounts.json."""

    settings: list[str]  # the names of those that this user gave
    signatures: list[str]  # of these names and of all that config.json holds, as `user_key.sign` makes them


_said: set[tuple[Path, str]] = set()


def _defaults(config: RunConfig) -> dict[str, Any]:
    """Return the settings about accounts at the values of the configuration's profile."""
    profile = load_config(config.profile if config.profile in PROFILES else PROFILES[0])
    return {name: profile.get(name) for name in setting_names() if name.startswith(_ABOUT_ACCOUNTS)}


def settings_that_count(path: Path, values: Any, stored: RunConfig) -> tuple[RunConfig, frozenset[str]]:
    """Return the configuration of the run in `path` as far as it counts for this user, and the names of the settings that this
    user signed; `values` is what its config.json holds.

    One line on stderr names what does not count. Raises PlatformError for a key of this user that is too short."""
    signed = _signed_settings(path, values)
    counting, ignored = _set_back(stored, signed)
    if ignored:
        _say_ignored(path, stored, ignored, counting)
    return counting, signed


def with_accounts_of(config: RunConfig, recorded: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with the settings about accounts that counted when an artifact was made, as its entry records."""
    return with_values(config, {name: value for name, value in recorded.items() if name.startswith(_ABOUT_ACCOUNTS)})


def _set_back(stored: RunConfig, signed: Collection[str]) -> tuple[RunConfig, list[str]]:
    """Return the configuration with the profile's values of settings about accounts that are not signed, and their names.

    If there are any, tracking is offline: online it would write to another place than the run was meant for. It also is
    offline if no setting of tracking is signed, since nobody asked this user; the backend is named then if it would send."""
    defaults = _defaults(stored)
    ignored = [
        name
        for name, value in defaults.items()
        if name not in signed and stored.get(name) not in (value, *_SENDS_NOTHING.get(name, ()))
    ]
    counting = with_values(stored, {name: defaults[name] for name in ignored}) if ignored else stored
    asked = any(name.startswith(_TRACKING) for name in signed)
    sends = all(counting.get(name) not in values for name, values in _SENDS_NOTHING.items())
    if _MODE in signed or (asked and not ignored) or not (sends or ignored):
        return counting, ignored
    named = asked or _BACKEND in ignored or _MODE in ignored
    if sends and not named and secrets.secret_of("Weights & Biases", counting.secrets):
        ignored.append(_BACKEND)
    return with_values(counting, {_MODE: "offline"}), ignored


def _say_ignored(path: Path, stored: RunConfig, ignored: list[str], counting: RunConfig) -> None:
    them = "them" if len(ignored) > 1 else "it"
    until = ["nothing is pushed"] if counting.hub.repo_id is None else []
    until += ["Weights & Biases stays offline"] if counting.tracking.mode == "offline" else []
    then = f"; {' and '.join(until)}" if until else ""
    values = {name: stored.get(name) for name in ignored}
    if values.get(_BACKEND) == _defaults(stored)[_BACKEND]:
        values[_BACKEND] = "wandb"  # a call that gives the default cannot be told from one that gives nothing
    options = shlex.join(part for name, value in values.items() for part in ("--set", f"{name}={_show(value)}"))
    line = (
        f"{display_path(path)}/config.json: ignored {', '.join(ignored)}, because you did not set {them}{then}. To use {them}: "
        f"{options} (in notebook 01: OVERRIDES; medcot push: --repo-id)"
    )
    if (path.absolute(), line) not in _said:  # a process opens its run several times
        _said.add((path.absolute(), line))
        say(line, stream=sys.stderr)


def _show(value: Any) -> str:
    """Return a value as --set takes it, in ASCII, since it is shown on a terminal; `...` for one that would fill it."""
    text = json.dumps(value)
    if isinstance(value, str) and re.fullmatch(r"(?!null$)[\w./-]+", value, re.ASCII | re.IGNORECASE):
        text = value
    return text if len(text) <= _LONGEST_SHOWN else "..."


def settle(config: RunConfig, there: Run | None) -> RunConfig:
    """Return a call's configuration as it will count once it is in `there`, the run in the same place."""
    return _set_back(*settings_to_store(config, there))[0]


def settings_to_store(config: RunConfig, there: Run | None) -> tuple[RunConfig, list[str]]:
    """Return what config.json is to hold, and the names of the settings in it that are to be signed: those of this call.

    Settings that `there`, the run in the same place, holds but that do not count stay there, unless this call changes them. The
    backend is this call's, even the profile's own one, if the run is new or this user asked for its tracking before."""
    kept = {}
    if there:
        names = [name for name in _defaults(there.stored) if there.stored.get(name) != there.config.get(name)]
        kept = {name: there.stored.get(name) for name in names if config.get(name) == there.config.get(name)}
    own = there is None or any(name.startswith(_TRACKING) for name in there.signed)
    wanted = [name for name, value in _defaults(config).items() if config.get(name) != value or (own and name == _BACKEND)]
    given = [name for name in wanted if name not in kept]
    return with_values(config, kept), given


def sign_settings(path: Path, values: Any, names: list[str]) -> None:
    """Record that this user gives the named settings of a config.json that holds `values`, before that is written.

    The record before stays beside it, and counts if config.json remains, or is put back, as it was."""
    given = [{"settings": names, "signatures": user_key.sign(_text(names, values))}] if names else []
    earlier = _records(path)
    if (records := given + [record for record in earlier if record not in given][:1]) != earlier:
        write_atomic(path / ACCOUNTS, to_json(records))


def _signed_settings(path: Path, values: Any) -> frozenset[str]:
    for record in _records(path):
        if user_key.is_signed(_text(record["settings"], values), record["signatures"]):
            return frozenset(record["settings"])
    return frozenset()


def _records(path: Path) -> list[SignedSettings]:
    """Return what accounts.json holds: the newest first, and the one before it. A file that cannot be read counts as none."""
    try:
        return _shape().validate_python(read_json(path / ACCOUNTS))[:2]
    except (OSError, ValueError):
        return []


@cache
def _shape() -> TypeAdapter[list[SignedSettings]]:
    return TypeAdapter(list[SignedSettings])


def _text(names: list[str], values: Any) -> str:
    return json.dumps([names, values], sort_keys=True)
