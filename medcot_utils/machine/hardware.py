"""What this machine has: cards, memory, secrets, versions, and which profile that allows."""

from __future__ import annotations

import contextlib
import getpass
import html
import importlib.metadata
import json
import netrc
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil
from pydantic import SecretStr

from medcot_utils.config import SecretsSettings, load_config
from medcot_utils.errors import MedcotError
from medcot_utils.machine.paths import GIB, cache_dir, disk_free_gib, platform_name

# Measured on the article's settings at 8B (4-bit, 2 x 4 rows of up to 2,048 tokens): 6.5 to 7.3 GiB reserved. A 12 GB
# card ran it with batch 1 x 4 at 7.83 GB. Below this the run would end in an out-of-memory error after the download.
ARTICLE_GPU_GIB = 8.0
# sm_60 (P100) is not in the wheels of today's torch, although torch.cuda.is_available() says True there.
MIN_COMPUTE_CAPABILITY = (7, 0)

VERSIONED_PACKAGES = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "unsloth",
    "wandb",
    "trackio",
    "kaggle",
    "papermill",
    "nbval",
]


class PlatformError(MedcotError):
    """This machine cannot run what was asked for; the message says what is missing and what to do."""


def installed_versions(packages: Iterable[str] = VERSIONED_PACKAGES) -> dict[str, str | None]:
    """Versions from package metadata: nothing is imported. None for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    free_gib: float
    capability: tuple[int, int]

    def problem(self) -> str | None:
        """Why the article profile cannot run on this card, or None."""
        if self.capability < MIN_COMPUTE_CAPABILITY:
            need = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
            return f"{self.name}: compute capability {'.'.join(map(str, self.capability))}, needs {need} (choose a T4)"
        if self.memory_gib < ARTICLE_GPU_GIB:
            return f"{self.name}: {self.memory_gib:.1f} GiB of memory, needs {ARTICLE_GPU_GIB:.0f}"
        return None


def gpus() -> list[Gpu]:
    """The visible CUDA cards; an empty list without torch or without a card."""
    try:
        import torch
    except ImportError:
        return []
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(properties.name, total / GIB, free / GIB, (properties.major, properties.minor)))
    return found


def resolve_profile(profile: str, cards: list[Gpu] | None = None) -> tuple[str, str]:
    """The profile to run and one line saying why. `auto` takes `article` on a card that can hold it, else `demo`.

    Raises PlatformError when an 8B profile was asked for by name and no visible card can run it."""
    needs_card = profile in ("article", "recommended", "full")
    if profile != "auto" and not needs_card:
        return profile, f"profile {profile}: as asked"
    cards = gpus() if cards is None else cards
    fitting = [card for card in cards if card.problem() is None]
    if profile == "auto":
        if fitting:
            return (
                "article",
                f"profile article: {fitting[0].name} with {fitting[0].memory_gib:.0f} GiB can hold the 8B model",
            )
        why = "; ".join(filter(None, (card.problem() for card in cards))) or "no CUDA card is visible"
        return "demo", f"profile demo: {why}"
    if fitting:
        return profile, f"profile {profile}: as asked, on {fitting[0].name}"
    why = "; ".join(filter(None, (card.problem() for card in cards))) or "no CUDA card is visible"
    raise PlatformError(
        f"profile {profile} needs a CUDA card with at least {ARTICLE_GPU_GIB:.0f} GiB: {why}. On Kaggle or Colab choose "
        f"a T4 accelerator; on this machine use profile demo"
    )


# --- secrets -------------------------------------------------------------------------------------------------------


class Secret(NamedTuple):
    """A secret, hidden when printed, and where it was found."""

    value: SecretStr
    where: str


@dataclass(frozen=True)
class Service:
    setting: str  # of the section `secrets`
    variable: str  # what its client reads
    token_file: Callable[[], str | None]  # where its client's own log-in leaves it


def _hugging_face_file() -> str | None:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    return path.read_text(encoding="utf-8").strip()


def _netrc() -> str | None:
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    found = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser()).authenticators(host or "")
    return found[2] if found else None


SERVICES = {
    "Hugging Face": Service("huggingface", "HF_TOKEN", _hugging_face_file),
    "Weights & Biases": Service("wandb", "WANDB_API_KEY", _netrc),
}
SECRET_NAMES = {name: getattr(SecretsSettings(), service.setting) for name, service in SERVICES.items()}
found_secrets: dict[str, str] = {}  # {value: where}: what `redact` takes out; never to be shown
SHORTEST_SECRET = 8  # anything shorter is no key, and may be part of a word


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
    """Whether somebody could answer a question: a notebook that is not run by papermill, or a terminal."""
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


def held_secrets(names: Iterable[str], token_file: Callable[[], str | None] | None, faults: list[str]) -> Iterator[Secret]:
    """Each secret that a source holds, the one that counts first; `faults` takes which stores could not be asked and why (by
    the kind of error only)."""
    names = list(names)
    for label, ask in _secret_sources():
        for name in names:
            try:
                value = ask(name)
            except Exception as error:  # noqa: BLE001 - not attached, offline, denied, timed out: each service raises its own
                if type(error).__name__ in ("BackendError", "SecretNotFoundError", "NotebookAccessError"):
                    continue  # this name is not there or not granted; the next may be
                faults.append(f"{label}: {type(error).__name__}")
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
    faults: list[str] = []
    return next(held_secrets(names, token_file, faults), None), faults


def remember(value: str, where: str) -> Secret:
    """A secret that was found; `redact` knows it from now on."""
    found_secrets.setdefault(value.strip(), where)
    return Secret(SecretStr(value.strip()), where)


def find_secret(names: Iterable[str], token_file: Callable[[], str | None] | None = None) -> Secret | None:
    """The first secret that the environment, the platform's store or the client's own token file holds, or None."""
    return _search(names, token_file)[0]


def secret_of(service: str, settings: SecretsSettings | None = None, given: str | None = None) -> Secret | None:
    """The secret of a service of SERVICES: what is `given`, else what is found under the names of the settings, else None."""
    if given:
        return remember(given, "argument")
    return find_secret(_names(service, settings), SERVICES[service].token_file)


def _names(service: str, settings: SecretsSettings | None) -> tuple[str, ...]:
    return getattr(settings or SecretsSettings(), SERVICES[service].setting)


def require_secret(service: str, wanted_by: str, otherwise: str, settings: SecretsSettings | None = None) -> Secret:
    """The secret of a service that the run asked for: found, or typed in where there is somebody to ask (and then kept in this
    process's environment for the notebooks that it starts).

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
    """For each service where its secret comes from, or `not found` and which store could not be asked; never a value."""
    found = {}
    for name, service in SERVICES.items():
        hit, faults = _search(_names(name, settings), service.token_file)
        found[name] = hit.where if hit else "not found" + (f" ({'; '.join(faults)})" if faults else "")
    return found


def hand_on_secrets(settings: SecretsSettings | None = None) -> None:
    """Put what the environment or the platform's store holds into the environment under the names that the clients read, for
    them and for the kernels that this process starts. Token files are left alone: the clients find their own."""
    for name, service in SERVICES.items():
        if service.variable not in os.environ and (hit := find_secret(_names(name, settings))):
            os.environ[service.variable] = hit.value.get_secret_value()


def redact(text: str) -> str:
    """The text without any secret that this process has found or holds in its environment: for messages of other libraries."""
    held = {os.environ.get(name, "").strip() for names in SECRET_NAMES.values() for name in names}
    for value in sorted({*found_secrets, *held}, key=len, reverse=True):
        if len(value) >= SHORTEST_SECRET:
            for form in {value, html.escape(value), json.dumps(value)[1:-1]}:  # as it is, within a page, within JSON
                text = text.replace(form, "**********")
    return text


# --- summary -------------------------------------------------------------------------------------------------------


def machine_report(run_dir: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a reader must know of the machine: platform, cores, memory and disk in GiB, cards, versions, secrets by source.

    Secrets are looked for under the names that `overrides` set; its other settings are not looked at. Raises ConfigError for a
    name that is none."""
    names = load_config("smoke", [pair for pair in overrides if pair.strip().startswith("secrets.")]).secrets
    memory = psutil.virtual_memory()
    return {
        "platform": platform_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(memory.total / GIB, 1),
        "memory_free_gib": round(memory.available / GIB, 1),
        "disk_free_gib": round(disk_free_gib(run_dir), 1),
        "cache_disk_free_gib": round(disk_free_gib(cache_dir()), 1),
        "gpus": ", ".join(f"{card.name}, {card.memory_gib:.0f} GiB" for card in gpus()) or "none",
        "versions": installed_versions(),
        "secrets": secrets_found(names),
    }
