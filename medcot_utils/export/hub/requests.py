"""Send requests to the Hub, repeat them while it is busy, and turn failures into messages that say what to do.

The client itself repeats uploads and later pages of a list five times, within 23 seconds, and neither number can be set. It sends
everything else once. So tenacity repeats each call here, for at most `hub.patience_seconds`."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from medcot_utils.errors import MedcotError
from medcot_utils.machine.redaction import redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo
    from huggingface_hub.hf_api import RepoFile

T = TypeVar("T")
Listing: TypeAlias = "dict[str, RepoFile]"  # {path: the Hub's entry of the file}
# The server is busy, failing, or overloaded, or there is a conflict. The same request may succeed in a moment.
PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT_S = 30.0


class HubError(MedcotError):
    """Say that something was not pushed: what happened, what is already on the Hub, and what to do."""


class HubRefusal(HubError):
    """Say that the Hub refused a request, could not be reached, or gave an unusable answer, and what to do."""


@dataclass(frozen=True)
class HubClient:
    """Hold the library's client, the seconds for which a request may be repeated, and the function that prints progress."""

    api: HfApi
    patience_s: float
    tell: Callable[[str], None]

    def say(self, line: str) -> None:
        """Say a line without the token, because a server's message may repeat it."""
        self.tell(redact(line))

    def ask(self, doing: str, repo_id: str, call: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Return `call(*args, **kwargs)`, and repeat it while its failure may be temporary.

        Wait as many seconds as the server asks for, else 1, 2, 4, … up to 30, as long as all waits together stay within the
        patience. Raises HubRefusal, whose message begins with `doing`. Other errors, which are not the Hub's, pass through."""
        from tenacity import Retrying, retry_if_exception, wait_exponential

        backoff = wait_exponential(max=LONGEST_WAIT_S)
        retrying = Retrying(
            retry=retry_if_exception(passing),
            wait=lambda state: backoff(state) if (asked := retry_after(state.outcome.exception())) is None else asked,
            stop=lambda state: state.idle_for + state.upcoming_sleep > self.patience_s,
            before_sleep=lambda s: self.say(f"{headline(s.outcome.exception())}: trying again in {s.upcoming_sleep:.0f} s"),
            reraise=True,
        )
        try:
            return retrying(call, *args, **kwargs)
        except Exception as error:
            if not of_the_hub(error):
                error.add_note(f"while {doing}")
                raise
            raise HubRefusal(redact(f"{doing}: {explain(error, repo_id, self.api.endpoint, self.patience_s)}")) from None

    def listing(self, repo_id: str, revision: str, commits: bool = False) -> Listing:
        """Return {path: entry} of every file of a repository at a revision; with `commits`, also the last commit of each."""
        tree = partial(self.api.list_repo_tree, repo_id, recursive=True, expand=commits, revision=revision)
        found = self.ask(f"listing {repo_id}", repo_id, lambda: list(tree()))
        return {entry.path: entry for entry in found if hasattr(entry, "blob_id")}

    def info(self, repo_id: str) -> ModelInfo:
        """Return the Hub's information on a repository: whether it is private, and its newest commit."""
        return self.ask(f"looking at {repo_id}", repo_id, self.api.model_info, repo_id)


def cause_of(error: BaseException) -> BaseException:
    """Return the cause of the client's own "Error while uploading", a refusal or a broken connection; else the error itself."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the server's answer; None if it did not answer."""
    return getattr(getattr(cause_of(error), "response", None), "status_code", None)


def of_the_hub(error: BaseException) -> bool:
    """Return True for a refusal, a broken connection, or an unusable answer, and False for a fault of this machine or code.

    For an unusable answer, the client raises a plain ValueError. HFValidationError is about the client's arguments."""
    import httpx
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    cause = cause_of(error)
    if status_of(error) is not None or isinstance(cause, (httpx.HTTPError, OfflineModeIsEnabled)):
        return True
    modules = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(cause.__traceback__)]
    return isinstance(cause, ValueError) and not isinstance(cause, HFValidationError) and "huggingface_hub" in modules


def retry_after(error: BaseException) -> float | None:
    """Return the seconds that the server asks to wait; None if it does not ask.

    It asks with a number, a date (which the client does not read), or the Hub's own RateLimit header."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(cause_of(error), "response", None), "headers", {})
    text, limit = headers.get("Retry-After", "").strip(), parse_ratelimit_headers(headers)
    if text.isdigit():
        return float(text)
    with contextlib.suppress(ValueError):  # a header that is neither a number nor a date is ignored
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 and status_of(error) == 429 else None


def passing(error: BaseException) -> bool:
    """Return whether the same request may succeed in a moment."""
    import httpx

    return status_of(error) in PASSING or isinstance(cause_of(error), httpx.TransportError)


def headline(error: BaseException) -> str:
    """Return a few words on what happened, without addresses."""
    cause, status = cause_of(error), status_of(error)
    if status is None:
        what = "the connection to the Hub failed" if passing(error) else "the Hub's answer cannot be used"
        return f"{what} ({type(cause).__name__}: {' '.join(str(cause).split())})"
    said = " ".join((getattr(cause, "server_message", None) or "").split())
    return f"the Hub answers {status} {cause.response.reason_phrase}" + (f" ({said})" if said else "")


def explain(error: BaseException, repo_id: str, endpoint: str, patience_s: float) -> str:
    """Return one sentence on what happened, and one on what to do."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub client sends nothing. Unset it to push"
    status, asked, tokens = status_of(error), retry_after(error), f"{endpoint}/settings/tokens"
    waited = f", and kept doing so for all of hub.patience_seconds ({patience_s:.0f} s)"
    advice = {
        401: f". The token is not valid (wrong, expired or revoked): make one of type write at {tokens} and set HF_TOKEN to it",
        403: f". The token may not write to {repo_id}: give one of type write, or a fine-grained one with write access to the "
        f"contents and settings of this repository or its owner ({tokens}). If the message mentions storage, make room there",
        404: f". {repo_id} is not there, or this token may not see it: check the spelling, and that the token's user belongs to "
        f"{repo_id.split('/')[0]}",
        409: f"{waited}. Something else is writing to {repo_id}: wait until it is done, then push again",
        429: f"{waited}. The limit of requests is reached: push again in a few minutes",
    }.get(status, ". It does not accept this request")
    if status == 429 and asked is not None:
        advice = (
            f" and asks to wait {asked:.0f} s, longer than hub.patience_seconds ({patience_s:.0f}). The limit of requests is "
        )
        advice += f"reached: push again after that, or with --patience {asked + 1:.0f}"
    elif status is not None and status >= 500:
        advice = f"{waited}. The fault is the Hub's: push again later"
    elif status is None and passing(error):
        advice = f"{waited}. Check the connection (endpoint {endpoint}) and push again"
    elif status is None:
        advice = f". Check that {endpoint} (HF_ENDPOINT) is a Hugging Face Hub"
    return headline(error) + advice


def download(api: HfApi, repo_id: str, path: str, revision: str, start: int, length: int) -> bytes | None:
    """Return `length` bytes of a file from `start` on, as anyone with the token downloads them; None if there is no such file.

    `HfFileSystem` reads ranges too, but of compressed bytes. If a server ignores ranges, it keeps the whole file in memory."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(repo_id, path, revision=revision, endpoint=api.endpoint)
    headers = build_hf_headers(token=api.token) | {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        if response.status_code in (404, 416):
            return None
        hf_raise_for_status(response)
        skipped, got = 0 if response.status_code == 206 else start, bytearray()
        for block in response.iter_bytes():
            got += block
            if len(got) >= skipped + length:  # a server that ignores ranges would send the whole file
                break
    return bytes(got[skipped : skipped + length])
