"""The files of a push: which files each repository gets, whether a file there equals the run's, and who uploaded it.

`HfApi.verify_repo_checksums` compares the same digests as `agrees`. But it reads every local byte again each time, needs a folder
with the layout of the repository, and returns neither sizes nor last commits, which show who uploaded a file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from medcot_utils.config import HubSettings
from medcot_utils.export.gguf import require_gguf_agreement
from medcot_utils.export.hub.records import ListedFile
from medcot_utils.export.hub.requests import HubError, Listing
from medcot_utils.export.merged import require_agreement
from medcot_utils.export.model_card import model_card
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.directory import Run
from medcot_utils.run.lock import RunError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

FOLDERS = {"adapter": "adapter/", "merged": "", "gguf": "gguf/"}  # in one repository: `from_pretrained(repo_id)` finds the root
# An earlier push with other shards may have left such files, and a loader may read them as part of this model.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf")
_TITLE = re.compile(r"(model card|adapter|merged|gguf) of run .+ \([\w.-]+\)")


@dataclass(frozen=True)
class PlannedRepository:
    """Hold one repository's planned content. artifacts: {artifact: its files, for the client's commit}, the model card first."""

    repo_id: str
    kind: str  # of its card: one, adapter, merged, or gguf
    artifacts: dict[str, list[CommitOperationAdd]]

    @property
    def files(self) -> list[CommitOperationAdd]:
        return [file for files in self.artifacts.values() for file in files]

    def folder(self, artifact: str) -> str:
        """Return the folder of an artifact in this repository, with its slash; "" for the root."""
        return FOLDERS.get(artifact, "") if self.kind == "one" else ""

    def left_over(self, path: str, artifact: str) -> bool:
        """Return whether `path` holds weights in this artifact's place that the run does not have. Other files stay untouched."""
        folder = self.folder(artifact)
        here = path.startswith(folder) if folder else "/" not in path
        planned = any(file.path_in_repo == path for file in self.files)
        return artifact in FOLDERS and here and path.endswith(_WEIGHTS) and not planned


# --- plan ----------------------------------------------------------------------------------------------------------


def chosen_artifacts(run: Run, settings: HubSettings) -> list[str]:
    """Return the artifacts to push. Each is verified against the manifest and was made with the current settings.

    GGUF is left out if the run makes none. Raises RunError, which names the notebook to run, if an artifact is missing or stale,
    ExportError if the merged model failed its check, and GgufError if the GGUF file failed its check."""
    has_gguf = "gguf" in run.makes(ARTIFACTS["gguf"].step)
    names = [name for name in settings.artifacts if name != "gguf" or has_gguf]
    if not names:
        raise RunError("hub.artifacts names only gguf, but this run makes none: set export.gguf, run notebook 07_export")
    for name in [*names, *(["gguf_check"] if "gguf" in names else []), "model_card"]:
        run.require(name)
        if step := run.step_to_redo(name):
            raise RunError(
                f"{ARTIFACTS[name].file} in {run.name}/ was made with other settings or inputs than the run has now: run "
                f"notebook {step} again before pushing"
            )
    if set(names) & {"merged", "gguf"}:
        require_agreement(run.read("export_check"))
    if "gguf" in names:
        require_gguf_agreement(run.read("gguf_check"))
    return names


def tag_name(run: Run, settings: HubSettings, names: list[str]) -> str:
    """Return `hub.tag`, or `run-` and twelve hexadecimal digits from the digests of the pushed artifacts.

    The same weights get the same tag."""
    manifest = run.manifest()["artifacts"]
    digests = json.dumps({name: manifest[name]["sha256"] for name in sorted(names)})
    return settings.tag or f"run-{hashlib.sha256(digests.encode()).hexdigest()[:12]}"


def plan(run: Run, settings: HubSettings, repo_id: str, names: list[str]) -> list[PlannedRepository]:
    """Return the repositories of a push. The model card is first in each, so that its warning is there before any weight.

    Raises HubError if an artifact would overwrite the model card."""
    from huggingface_hub import CommitOperationAdd

    tag, addresses = tag_name(run, settings, names), settings.addresses(names, repo_id)
    repositories: dict[str, PlannedRepository] = {}
    for name in names:
        address, kind = addresses[name], "one" if settings.layout == "one" else name
        if address not in repositories:
            card = CommitOperationAdd("README.md", model_card(run, kind, addresses, tag).encode())
            repositories[address] = PlannedRepository(address, kind, {"model card": [card]})
        folder, place = run.require(name), repositories[address].folder(name)
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if "README.md" in paths:
            raise HubError(f"{name}/README.md would overwrite the model card: remove it and run notebook 07_export again")
        repositories[address].artifacts[name] = [CommitOperationAdd(place + inner, path) for inner, path in paths.items()]
    return list(repositories.values())


def require_valid(addresses: Iterable[str]) -> None:
    """Raise HubError if the Hub's own client refuses the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for address in addresses:
        try:
            validate_repo_id(address)
        except HFValidationError as error:
            raise HubError(
                f"nothing was sent: {address} cannot be a repository on the Hub ({' '.join(str(error).split())}). Choose another "
                f"name: --repo-id user/name, or hub.repo_id"
            ) from None


# --- compare -------------------------------------------------------------------------------------------------------


def agrees(file: CommitOperationAdd, found: RepoFile | None) -> bool:
    """Return whether the Hub lists the file with the run's size and digest.

    The digest is the sha256 of a large file (stored with LFS), and git's blob id of any other file."""
    from huggingface_hub.utils.sha import git_hash

    if found is None or found.size != file.upload_info.size:
        return False
    if found.lfs:
        return found.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as stream:
        return found.blob_id == git_hash(stream.read())


def as_listed(found: RepoFile) -> ListedFile:
    """Return size and digest of a file as the Hub lists it."""
    return {"bytes": found.size, "digest": f"sha256:{found.lfs.sha256}" if found.lfs else f"git:{found.blob_id}"}


def folder_digest(digests: dict[str, str]) -> str:
    """Return the sha256 of a folder from {name: sha256} of its files, as the manifest has it (see `run.files.sha256_of`)."""
    whole = hashlib.sha256()
    for name in sorted(digests, key=PurePosixPath):
        whole.update(f"{name}\0{digests[name]}\n".encode())
    return whole.hexdigest()


# --- who uploaded a file -------------------------------------------------------------------------------------------


def commit_title(artifact: str, run: Run, tag: str) -> str:
    """Return the commit title by which a later push recognizes a commit of `medcot push`."""
    return f"{artifact} of run {run.path.name} ({tag})"


def refuse_of_others(repository: PlannedRepository, there: Listing) -> None:
    """Raise HubError if the push would replace somebody else's file, or leave one among its weights.

    medcot uploaded a file if the title of the last commit that touched it says so. `there` is a listing with the commits."""
    replaced = {path for file in repository.files if not agrees(file, there.get(path := file.path_in_repo))} & there.keys()
    beside = {path for path in there if any(repository.left_over(path, artifact) for artifact in repository.artifacts)}
    others = [
        f"{path} ({'would be replaced' if path in replaced else 'lies among the weights'})"
        for path in sorted(replaced | beside)
        if not ((commit := there[path].last_commit) and _TITLE.fullmatch(commit.title))
    ]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise HubError(
            f"not pushed. {repository.repo_id} holds files that `medcot push` did not upload, or that somebody changed later: "
            f"{', '.join(others[:5])}{more}. None of them was touched: choose another repository with --repo-id, or delete them "
            f"there if nobody needs them, and push again"
        )
