"""Requests to the Hub: repeated while it is busy, and what went wrong in words that say what to do."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from medcot_utils.config import SecretsSettings
from medcot_utils.errors import MedcotError
from medcot_utils.machine import secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Busy, conflicting, failing or overloaded: the same request may be granted in a moment.
PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT_S = 30.0


class HubError(MedcotError):
    """Something was not pushed; the message says what happened, what lies on the Hub already, and what to do."""


def find_token(token: str | None = None, settings: SecretsSettings | None = None) -> str:
    """The token: the argument, else what the platform has under the names of the settings, else what `hf auth login` stored,
    else what is typed in where there is somebody to ask.

    Raises PlatformError where there is none. Never print what this returns."""
    if token:
        return token
    found = secrets.require_secret("Hugging Face", "the push to the Hub", "leave hub.repo_id unset", settings)
    return found.value.get_secret_value()


def cause_of(error: BaseException) -> BaseException:
    """The error below the client's own "Error while uploading": a refusal by the server, or a broken connection."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the server answered with, or None where it did not answer."""
    return getattr(getattr(cause_of(error), "response", None), "status_code", None)


def of_the_hub(error: BaseException) -> bool:
    """True for a refusal, a broken connection or a malformed answer; False for a fault of this machine or this code."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause = cause_of(error)
    return status_of(error) is not None or isinstance(cause, (httpx.HTTPError, OfflineModeIsEnabled)) or _malformed(cause)


def _malformed(cause: BaseException) -> bool:
    """True for the plain ValueError with which the client stops at an answer that it cannot read. One that was raised outside
    the client is this code's, and HFValidationError is about what the client was given, not about what it got."""
    from huggingface_hub.errors import HFValidationError

    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(cause.__traceback__))
    in_client = any(module.partition(".")[0] == "huggingface_hub" for module in modules)
    return isinstance(cause, ValueError) and not isinstance(cause, HFValidationError) and in_client


def retry_after(error: BaseException) -> float | None:
    """Seconds after which the server asks to be asked again (a number, a date, or the Hub's own RateLimit header), or None."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(cause_of(error), "response", None), "headers", {})
    text, limit = headers.get("Retry-After", "").strip(), parse_ratelimit_headers(headers)
    if text.isdigit():
        return float(text)
    if text:
        with contextlib.suppress(ValueError):  # neither a number nor a date: as if it were not there
            return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 and status_of(error) == 429 else None


def passing(error: BaseException) -> bool:
    """True where the same request may succeed in a moment."""
    import httpx

    return status_of(error) in PASSING or isinstance(cause_of(error), httpx.TransportError)


def repeat(call: Callable[[], Any], patience_s: float, say: Callable[[str], None]) -> Any:
    """`call()`, again and again while its failure may pass: after the seconds that the server asks for, else after 1, 2, 4,
    … up to 30. What it raises last is raised when the next wait would bring all waits over `patience_s`."""
    from tenacity import RetryCallState, Retrying, retry_if_exception

    def wait(state: RetryCallState) -> float:
        asked = retry_after(state.outcome.exception())
        return asked if asked is not None else min(LONGEST_WAIT_S, 2.0 ** (state.attempt_number - 1))

    def stop(state: RetryCallState) -> bool:
        return state.idle_for + state.upcoming_sleep > patience_s

    def tell(state: RetryCallState) -> None:
        say(f"{headline(state.outcome.exception())}: trying again in {state.upcoming_sleep:.0f} s")

    return Retrying(retry=retry_if_exception(passing), wait=wait, stop=stop, before_sleep=tell, sleep=time.sleep, reraise=True)(
        call
    )


def headline(error: BaseException) -> str:
    """What happened, in a few words, without addresses."""
    cause, status = cause_of(error), status_of(error)
    if status is None and not passing(error):
        return f"the Hub's answer cannot be used ({type(cause).__name__}: {' '.join(str(cause).split())})"
    if status is None:
        return f"the connection to the Hub failed ({type(cause).__name__}: {' '.join(str(cause).split())})"
    said = " ".join((getattr(cause, "server_message", None) or "").split())
    return f"the Hub answers {status} {cause.response.reason_phrase}" + (f" ({said})" if said else "")


def explain(error: BaseException, doing: str, repo_id: str, endpoint: str, patience_s: float) -> str:
    """One sentence for what happened and one for what to do about it."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return f"{doing}: HF_HUB_OFFLINE is set, so the Hub client sends nothing. Unset it to push"
    status, tokens, asked = status_of(error), f"{endpoint}/settings/tokens", retry_after(error)
    waited = f", and went on so for all of hub.patience_seconds ({patience_s:.0f} s)"
    again = f"push again after that, or with --patience {asked + 1:.0f}" if asked is not None else "push again in some minutes"
    limit = (
        f" and asks to wait {asked:.0f} s, longer than hub.patience_seconds ({patience_s:.0f})" if asked is not None else waited
    )
    advice = {
        401: f". The token is not valid (wrong, expired or revoked): make one of type write at {tokens} and give it as HF_TOKEN",
        403: f". The token may not write to {repo_id}: give one of type write, or a fine-grained one with write access to the "
        f"contents and settings of this repository or its owner ({tokens}). If the message speaks of storage, make room there",
        404: f". {repo_id} is not there, or this token may not see it: check the spelling, and that the token's user belongs to "
        f"{repo_id.split('/')[0]}",
        409: f"{waited}. Something else is writing to {repo_id}: wait until it is done, then push again",
        429: f"{limit}. The limit of requests is reached: {again}",
    }.get(status)
    if advice is None and status is not None:
        advice = f"{waited}. The fault is the Hub's: push again later" if status >= 500 else ". It does not take this request"
    elif advice is None and passing(error):
        advice = f"{waited}. Check the connection (endpoint {endpoint}) and push again"
    elif advice is None:
        advice = f". Check that {endpoint} (HF_ENDPOINT) is a Hugging Face Hub"
    return f"{doing}: {headline(error)}{advice}"


def download(api: HfApi, repo_id: str, path: str, revision: str, start: int, length: int) -> bytes | None:
    """Part of a file as anybody with the token would download it; None if there is no such file."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if length == 0:
        return b""
    url = hf_hub_url(repo_id, path, revision=revision, endpoint=api.endpoint)
    # Uncompressed: a range of compressed bytes would be none of the file.
    headers = build_hf_headers(token=api.token) | {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        if response.status_code in (404, 416):
            return None
        hf_raise_for_status(response)
        got = bytearray()
        for block in response.iter_bytes():
            got += block
            if len(got) >= start + length:  # a server that ignores Range would go on to the end
                break
    return bytes(got[:length] if response.status_code == 206 else got[start : start + length])
