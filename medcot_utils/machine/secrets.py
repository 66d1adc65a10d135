"""Secrets: where they are looked for, in which order, and how they reach the clients. Their values are never shown."""

from __future__ import annotations

import contextlib
import getpass
import netrc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import SecretStr

from medcot_utils.config import SecretsSettings
from medcot_utils.errors import PlatformError
from medcot_utils.machine.paths import expand_home, platform_name
from medcot_utils.text_files import decode


class Secret(NamedTuple):
    """A secret, hidden when printed, and where it was found."""

    value: SecretStr
    where: str


class Unanswered(NamedTuple):
    """A secret store that could not be asked, and the kind of error that it raised."""

    store: str
    error: str


@dataclass(frozen=True)
class Service:
    """A service whose client reads a secret."""

    setting: str  # of the section `secrets`
    variable: str  # what its client reads
    token_file: Callable[[], str | None]  # where its client's own log-in leaves it


def read_token_file(path: Path) -> str:
    """Return the text of a file that holds a secret. Raises OSError if it cannot be read, PlatformError if it is not UTF-8."""
    content = path.read_bytes()
    try:
        return decode(content).strip()
    except ValueError:  # its text would repeat bytes of the file
        raise PlatformError(f"{path} is not UTF-8 text: log in again, or save it as UTF-8") from None


def _hugging_face_file() -> str | None:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return read_token_file(expand_home(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token"))


def read_netrc() -> dict[str, tuple[str, str, str]]:
    """Return {host: (login, account, password)} of the netrc file. Raises OSError or NetrcParseError if it cannot be read,
    PlatformError if it is not UTF-8."""
    path = expand_home(os.environ.get("NETRC") or "~/.netrc")
    read_token_file(path)
    return netrc.netrc(path).hosts


def _netrc() -> str | None:
    # Not `authenticators`, which gives the default entry for every host that has none: that password is another program's.
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    found = read_netrc().get(host or "")
    return found[2] if found else None


SERVICES = {
    "Hugging Face": Service("huggingface", "HF_TOKEN", _hugging_face_file),
    "Weights & Biases": Service("wandb", "WANDB_API_KEY", _netrc),
}


SECRET_NAMES = {name: getattr(SecretsSettings(), service.setting) for name, service in SERVICES.items()}

found_secrets: dict[str, str] = {}  # {value: where}: what `redact` takes out; never to be shown


def _from_kaggle(name: str) -> str | None:
    from kaggle_secrets import UserSecretsClient

    return UserSecretsClient().get_secret(name)


def _from_colab(name: str) -> str | None:
    from google.colab import userdata

    return userdata.get(name)


def _kernel() -> Any:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None)


def has_front_end() -> bool:
    """Return whether somebody could answer a question: in a notebook that papermill does not run, or in a terminal."""
    if kernel := _kernel():
        return bool(kernel._allow_stdin)  # what nbclient and papermill switch off with each cell they send
    return sys.stdin is not None and sys.stdin.isatty()


def _secret_sources() -> list[tuple[str, Callable[[str], str | None]]]:
    sources: list[tuple[str, Callable[[str], str | None]]] = [("environment", os.environ.get)]
    if platform_name() == "kaggle":
        sources.append(("Kaggle secret", _from_kaggle))
    # Colab's userdata is answered by the page. Under papermill there is none, and each question would wait 10 s for it.
    if platform_name() == "colab" and _kernel() and has_front_end():
        sources.append(("Colab secret", _from_colab))
    return sources


def held_secrets(names: Iterable[str], token_file: Callable[[], str | None] | None) -> Iterator[Secret | Unanswered]:
    """Ask one source after the other for a secret of these names, and yield each that one holds, the one that counts first.
    A store that could not be asked is yielded in its place. No source is asked before its turn: some take seconds."""
    names = list(names)
    for label, ask in _secret_sources():
        for name in names:
            try:
                value = ask(name)
            except Exception as error:  # noqa: BLE001 - not attached, offline, denied, timed out: each service raises its own
                if type(error).__name__ in ("BackendError", "SecretNotFoundError", "NotebookAccessError"):
                    continue  # this name is not there or not granted; the next may be
                yield Unanswered(label, type(error).__name__)
                break  # no internet, no session: asking for other names would only wait as long again
            if value and value.strip():
                yield remember(value, f"{label} {name}")
    try:
        value = token_file() if token_file else None
    except (OSError, netrc.NetrcParseError):
        value = None
    if value:
        yield remember(value, "token file")


def _search(names: Iterable[str], token_file: Callable[[], str | None] | None) -> tuple[Secret | None, list[str]]:
    """Return the secret that counts, or None, and the stores that could not be asked before it was found."""
    faults: list[str] = []
    for found in held_secrets(names, token_file):
        if isinstance(found, Secret):
            return found, faults
        faults.append(f"{found.store}: {found.error}")
    return None, faults


def remember(value: str, where: str) -> Secret:
    """Return a secret that was found as one that `redact` takes out from now on."""
    found_secrets.setdefault(value.strip(), where)
    return Secret(SecretStr(value.strip()), where)


def find_secret(names: Iterable[str], token_file: Callable[[], str | None] | None = None) -> Secret | None:
    """Return the first secret that the environment, the platform's store or the client's own token file holds, or None."""
    return _search(names, token_file)[0]


def secret_of(service: str, settings: SecretsSettings | None = None, given: str | None = None) -> Secret | None:
    """Return the secret of a service of SERVICES: the one `given`, else one found under the settings' names, else None."""
    if given:
        return remember(given, "argument")
    return find_secret(_names(service, settings), SERVICES[service].token_file)


def _names(service: str, settings: SecretsSettings | None) -> tuple[str, ...]:
    return getattr(settings or SecretsSettings(), SERVICES[service].setting)


def require_secret(service: str, wanted_by: str, otherwise: str, settings: SecretsSettings | None = None) -> Secret:
    """Return the secret of a service that the run asked for: found, or typed in if there is somebody to ask. A typed one is
    kept in this process's environment for the notebooks that it starts.

    Raises PlatformError saying who wants it (`wanted_by`), where it was looked for, and what to do without (`otherwise`)."""
    names = _names(service, settings)
    found, faults = _search(names, SERVICES[service].token_file)
    if found is None and has_front_end():
        with contextlib.suppress(EOFError, NotImplementedError):  # a front end that cannot ask after all
            if typed := getpass.getpass(f"{service}: {wanted_by} needs a secret (not shown, not stored): ").strip():
                os.environ[SERVICES[service].variable] = typed
                return remember(typed, "typed in")
    if found is None:
        looked = ", ".join([*(label for label, _ in _secret_sources()), "token file"])
        why = f" ({'; '.join(faults)})" if faults else ""
        raise PlatformError(
            f"{wanted_by} needs a secret for {service}, and none was found under {' or '.join(names)}{why}; looked in: {looked}. "
            f"Set {SERVICES[service].variable}, attach a secret of one of these names to the notebook, or {otherwise}"
        )
    return found


def secrets_found(settings: SecretsSettings | None = None) -> dict[str, str]:
    """Return for each service where its secret comes from, or `not found` and the stores that could not be asked; no value."""
    found = {}
    for name, service in SERVICES.items():
        hit, faults = _search(_names(name, settings), service.token_file)
        found[name] = hit.where if hit else "not found" + (f" ({'; '.join(faults)})" if faults else "")
    return found


def hand_on_secrets(settings: SecretsSettings | None = None) -> None:
    """Put each secret that is found into the environment under the name that its client reads, for the clients and for the
    kernels that this process starts. Token files are left alone: the clients find their own."""
    for name, service in SERVICES.items():
        if service.variable not in os.environ and (hit := find_secret(_names(name, settings))):
            os.environ[service.variable] = hit.value.get_secret_value()
