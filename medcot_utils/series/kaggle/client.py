"""Push to Kaggle with its own client, and judge the answer by its fields, because the client's command exits with 0 on errors."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils.machine.environment import check_proxies
from medcot_utils.machine.names import resolve_below
from medcot_utils.machine.paths import make_private
from medcot_utils.plain_text import say
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.directory import Run
from medcot_utils.run.files import sha256_of, write_atomic
from medcot_utils.series.kaggle.earlier import RUN_NAME, copy_run, find_earlier
from medcot_utils.series.kaggle.metadata import (
    METADATA,
    PLACEHOLDER_OWNER,
    KaggleError,
    KernelMetadata,
    read_metadata,
    validated,
    write_metadata,
)

if TYPE_CHECKING:
    from kaggle.api.kaggle_api_extended import KaggleApi

_NO_CREDENTIALS = (
    "no Kaggle credentials that work: make a token at https://www.kaggle.com/settings/api and set KAGGLE_API_TOKEN to it, or put "
    "it into ~/.kaggle/access_token"
)
_FAILED = ("ERROR", "CANCEL_REQUESTED", "CANCEL_ACKNOWLEDGED")


@dataclass(frozen=True)
class Pushed:
    """Hold a version of a kernel that Kaggle has saved."""

    kernel: str
    version: int
    url: str


@dataclass(frozen=True)
class Fetched:
    """Hold a fetched run, and the names of its artifacts."""

    run: Run
    verified: list[str]  # they match the manifest
    absent: list[str]  # they stayed at Kaggle


def client() -> KaggleApi:
    """Return Kaggle's client, signed in.

    Importing it already signs in, prints, and may exit, so the import is inside this function. Raises KaggleError if the client
    is not installed, if there are no credentials, or if the sign-in fails."""
    check_proxies("Kaggle's client", "requests")
    with _clear("sign in at Kaggle"), contextlib.redirect_stdout(io.StringIO()):
        try:
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            api.authenticate()
        except SystemExit:
            raise KaggleError(_NO_CREDENTIALS) from None
        except ImportError as error:
            raise KaggleError(f"Kaggle's client is not installed ({error}): pip install kaggle==2.2.4 six==1.17.0") from None
    return api


@contextlib.contextmanager
def _clear(doing: str) -> Iterator[None]:
    """Turn the client's exceptions into a KaggleError of one line."""
    import requests

    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        why = " ".join(str(error).split())
        if status == 401:
            raise KaggleError(f"could not {doing}: {_NO_CREDENTIALS} (401: {why})") from error
        raise KaggleError(f"could not {doing}: Kaggle answered {status}: {why}") from error
    except requests.RequestException as error:
        kind = type(error).__name__
        raise KaggleError(f"could not {doing}: Kaggle cannot be reached ({kind}). Check the network, then try again") from error
    except ValueError as error:
        raise KaggleError(f"could not {doing}: {' '.join(str(error).split())}") from error


def push(folder: Path) -> Pushed:
    """Push the kernel that kernel-metadata.json in `folder` describes.

    Raises KaggleError before the push if the metadata is wrong or the notebook is missing. Raises it after the push unless
    Kaggle's answer has a version number and the requested name, reports no error, and left out no source."""
    metadata = read_metadata(folder)
    notebook = folder / metadata.code_file
    if not notebook.is_file():
        raise KaggleError(f"{metadata.code_file} is not there yet: run medcot kaggle build")
    api = client()
    metadata = _with_owner(folder, metadata, api)
    with _clear(f"push {metadata.id}"), contextlib.redirect_stdout(io.StringIO()):
        answer = api.kernels_push(str(folder))
    if answer.error:
        raise KaggleError(f"Kaggle refused {metadata.id}: {' '.join(answer.error.split())}")
    for kind in ("dataset", "competition", "kernel", "model"):
        if invalid := getattr(answer, f"invalid_{kind}_sources"):
            raise KaggleError(
                f"Kaggle has no such {kind}_sources, or you may not read them: {', '.join(invalid)}. It saved the kernel "
                f"without them: fix {METADATA} and push again"
            )
    if not answer.version_number:
        raise KaggleError(f"Kaggle gave {metadata.id} no version number: nothing shows that it was saved. Push again")
    saved = "/".join(answer.ref.strip("/").split("/")[-2:])  # some answers put /code before it
    if saved.lower() != metadata.id.lower():
        raise KaggleError(
            f"Kaggle saved {saved or 'a kernel without a name'} ({answer.url}), not {metadata.id}: check that its owner is you, "
            f"and that id_no in {METADATA}, if there is one, is its number"
        )
    return Pushed(metadata.id, answer.version_number, answer.url)


def _with_owner(folder: Path, metadata: KernelMetadata, api: Any) -> KernelMetadata:
    owner, _, slug = metadata.id.partition("/")
    if owner != PLACEHOLDER_OWNER:
        return metadata
    user = api.config_values.get(api.CONFIG_NAME_USER)
    if not user:
        raise KaggleError(f"{METADATA} names no owner: medcot kaggle build --id NAME/{slug}, with your Kaggle name")
    owned = validated(metadata.model_dump() | {"id": f"{user}/{slug}"})
    notebook = folder / metadata.code_file
    write_atomic(notebook, notebook.read_text(encoding="utf-8").replace(metadata.id, owned.id))
    write_metadata(folder, owned)
    return owned


def session_state(kernel: str) -> str:
    """Return the state of a kernel's latest session as one word. Raises KaggleError, with Kaggle's reason, if it failed."""
    api = client()
    with _clear(f"ask for the state of {kernel}"):
        answer = api.kernels_status(kernel)
    state = getattr(answer.status, "name", str(answer.status))
    if state in _FAILED:
        why = " ".join((answer.failure_message or "no reason given").split())
        raise KaggleError(
            f"the session of {kernel} ended as {state.lower()}: {why}. To fetch its output: medcot kaggle output {kernel}"
        )
    return state.lower()


def output(kernel: str, run_dir: Path, everything: bool = False) -> Fetched:
    """Fetch the run that a session left as output to `run_dir`, and verify it against its own manifest.

    A merged model, if the output has one, and the checkpoints of a finished training stay at Kaggle unless `everything` is true.

    Raises KaggleError if the output holds no run, if a file is incomplete, or if `run_dir` is not empty. Raises OutsideError,
    before anything is written, if a file's name leads out of the output."""
    if run_dir.exists() and any(run_dir.iterdir()):
        raise KaggleError(f"{run_dir} is not empty: choose another folder with --run-dir")
    api = client()
    make_private(run_dir.absolute().parent)
    download = Path(tempfile.mkdtemp(prefix=f".{run_dir.name}.", dir=run_dir.absolute().parent))
    try:
        archive = download / f"{RUN_NAME}.zip"
        _fetch(api, kernel, download, rf"^{re.escape(archive.name)}$")
        if archive.exists() and not zipfile.is_zipfile(archive):
            raise KaggleError(f"{archive.name} of {kernel} arrived incomplete: fetch it again")
        packed = find_earlier(download, lambda line: None)  # the second call below reports the lines
        # A trained adapter no longer needs its checkpoints, but a paused training resumes from them.
        left = (
            []
            if everything
            else ["merged", *(["checkpoints"] if packed and "adapter" in packed[0].manifest["artifacts"] else [])]
        )
        _fetch(api, kernel, download, rf"^{re.escape(RUN_NAME)}/" + "".join(f"(?!{name}/)" for name in left))
        refused: list[str] = []
        found = find_earlier(download, lambda line: refused.append(line.replace(f"{download}/", "")))
        if not found:
            why = "; ".join(refused) or f"has its session ended? medcot kaggle status {kernel}"
            raise KaggleError(f"the output of {kernel} holds no run: {why}")
        for line in refused:
            say(line)
        copy_run(found[0], run_dir)
    finally:
        shutil.rmtree(download)
    return _verified(run_dir, kernel)


def _fetch(api: KaggleApi, kernel: str, folder: Path, pattern: str) -> None:
    with _clear(f"fetch the output of {kernel}"), contextlib.redirect_stdout(io.StringIO()):
        names = [name for name in _list_output(api, kernel) if re.search(pattern, name)]
        for name in names:
            resolve_below(folder, name, f"the output of {kernel}")
        if names:  # the client writes to any name that the answer gives, so it may fetch only these
            checked = rf"\A(?:{'|'.join(map(re.escape, names))})\Z"
            api.kernels_output(kernel, str(folder), file_pattern=checked, force=True)


def _list_output(api: KaggleApi, kernel: str) -> Iterator[str]:
    """Yield the names of the output's files as Kaggle gives them. The client's own listing uses another request."""
    from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

    request = ApiListKernelSessionOutputRequest()
    request.user_name, request.kernel_slug, _ = api.parse_kernel_string(kernel)
    with api.build_kaggle_client() as kaggle:
        while True:
            answer = kaggle.kernels.kernels_api_client.list_kernel_session_output(request)
            yield from (file.file_name for file in answer.files or [])
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token


def _verified(run_dir: Path, kernel: str) -> Fetched:
    run = Run.open(run_dir)
    verified, absent, broken = [], [], []
    recorded = run.manifest()["artifacts"]
    for name, entry in ((name, recorded[name]) for name in ARTIFACTS if name in recorded):
        path = run.path / ARTIFACTS[name].file
        if not path.exists():
            absent.append(name)
        elif sha256_of(path) == (entry["sha256"], entry["bytes"]):
            verified.append(name)
        else:
            broken.append(ARTIFACTS[name].file)
    if broken:
        raise KaggleError(f"{', '.join(broken)} of {kernel} differ from the manifest: remove {run_dir} and fetch it again")
    return Fetched(run, verified, absent)
