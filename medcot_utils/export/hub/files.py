"""What a push sends: which artifacts of a run go to which repository under which names, and when a file there is the run's."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medcot_utils.config import HubSettings
from medcot_utils.export.gguf import require_gguf_agreement
from medcot_utils.export.hub.requests import HubError
from medcot_utils.export.merged import require_agreement
from medcot_utils.export.model_card import model_card
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.run.directory import Run, RunError
from medcot_utils.run.files import sha256_of

FOLDERS = {"adapter": "adapter/", "merged": "", "gguf": "gguf/"}  # in one repository: `from_pretrained(repo_id)` finds the root
# What an earlier push with other shards may have left, and a loader may take for part of this model.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf")
_TITLE = re.compile(r"(model card|adapter|merged|gguf) of run .+ \([\w.-]+\)")


@dataclass(frozen=True)
class PlannedFile:
    """A file as the run holds it. `source` is its path, or its bytes where it is made for the push (the card)."""

    artifact: str
    path: str  # in the repository
    name: str  # in the artifact
    source: Path | bytes
    bytes: int
    sha256: str

    def git_blob(self) -> str:
        """The id under which git, and so the Hub, keeps a file that is not stored as a large one."""
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def part(self, start: int, length: int) -> bytes:
        if isinstance(self.source, bytes):
            return self.source[start : start + length]
        with self.source.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)


@dataclass
class PlannedRepository:
    repo_id: str
    kind: str  # of its card: one, adapter, merged or gguf
    files: list[PlannedFile] = field(default_factory=list)

    def of(self, artifact: str) -> list[PlannedFile]:
        return [file for file in self.files if file.artifact == artifact]


# --- plan ----------------------------------------------------------------------------------------------------------


def chosen_artifacts(run: Run, settings: HubSettings) -> list[str]:
    """What of the run is pushed: each verified against the manifest and made from today's settings.

    GGUF is left out where the run makes none. Raises RunError naming the notebook to run, ExportError when the merged model
    is not what it was merged from, and GgufError when the GGUF is not the merged model."""
    has_gguf = "gguf" in run.makes(ARTIFACTS["gguf"].step)
    names = [name for name in settings.artifacts if name != "gguf" or has_gguf]
    if not names:
        raise RunError("hub.artifacts names gguf alone, and this run makes none: set export.gguf, run notebook 07_export")
    for name in [*names, *(["gguf_check"] if "gguf" in names else []), "model_card"]:
        run.require(name)
        if not run.is_fresh(name, deep=False):
            raise RunError(
                f"{ARTIFACTS[name].file} in {run.path.name}/ was made with other settings or inputs than the run has now: run "
                f"notebook {ARTIFACTS[name].step} again before pushing"
            )
    if set(names) & {"merged", "gguf"}:
        require_agreement(run.read("export_check"))
    if "gguf" in names:
        require_gguf_agreement(run.read("gguf_check"))
    return names


def tag_name(run: Run, settings: HubSettings, names: list[str]) -> str:
    """`hub.tag`, or `run-` and twelve digits over the manifest's digests of what is pushed: the same weights, the same tag."""
    manifest = run.manifest()["artifacts"]
    digests = json.dumps({name: manifest[name]["sha256"] for name in sorted(names)})
    return settings.tag or f"run-{hashlib.sha256(digests.encode()).hexdigest()[:12]}"


def plan(run: Run, settings: HubSettings, repo_id: str, names: list[str]) -> list[PlannedRepository]:
    """The repositories of a push, each with its card first: the warning on clinical use lies there before any weight does."""
    tag, one = tag_name(run, settings, names), settings.layout == "one"
    addresses = settings.addresses(names, repo_id)
    repositories: dict[str, PlannedRepository] = {}
    for name in names:
        address = addresses[name]
        if address not in repositories:
            kind = "one" if one else name
            card = model_card(run, kind, addresses, tag).encode()
            digest = hashlib.sha256(card).hexdigest()
            first = PlannedFile("model card", "README.md", "README.md", card, len(card), digest)
            repositories[address] = PlannedRepository(address, kind, [first])
        folder = run.require(name)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            inner = path.relative_to(folder).as_posix()
            if inner == "README.md":
                raise HubError(f"{name}/README.md would overwrite the model card: remove it and run notebook 07_export again")
            digest, size = sha256_of(path)
            place = (FOLDERS[name] if one else "") + inner
            repositories[address].files.append(PlannedFile(name, place, inner, path, size, digest))
    return list(repositories.values())


# --- comparing -----------------------------------------------------------------------------------------------------


def agrees(file: PlannedFile, found: Any) -> bool:
    """True if the Hub lists the file with the run's size and digest: sha256 of a large one, git's blob id of a small one."""
    if found is None or found.size != file.bytes:
        return False
    return found.lfs.sha256 == file.sha256 if found.lfs else found.blob_id == file.git_blob()


def digest_of(found: Any) -> str:
    return f"sha256:{found.lfs.sha256}" if found.lfs else f"git:{found.blob_id}"


def folder_digest(digests: dict[str, str]) -> str:
    """`run.sha256_of` of a folder, out of its files' names and digests."""
    whole = hashlib.sha256()
    for name in sorted(digests, key=PurePosixPath):
        whole.update(f"{name}\0{digests[name]}\n".encode())
    return whole.hexdigest()


def left_over(path: str, artifact: str, repository: PlannedRepository) -> bool:
    """Weights in this artifact's place that the run does not have. Files of other kinds stay where they are."""
    if artifact not in FOLDERS or not path.endswith(_WEIGHTS) or path in {file.path for file in repository.files}:
        return False
    folder = FOLDERS[artifact] if repository.kind == "one" else ""
    return path.startswith(folder) if folder else "/" not in path


# --- whose a file is -----------------------------------------------------------------------------------------------


def commit_title(artifact: str, run: Run, tag: str) -> str:
    return f"{artifact} of run {run.path.name} ({tag})"


def from_a_push(found: Any) -> bool:
    """True if the last commit that touched the file there is one of `medcot push`, by its title: a file that somebody else
    put there, or changed since, is theirs. `found` comes from a listing that names the commits."""
    return found.last_commit is not None and _TITLE.fullmatch(found.last_commit.title) is not None


def of_others(repository: PlannedRepository, there: dict[str, Any]) -> list[str]:
    """Files of somebody else that this push would replace, or leave among its weights, each with which of the two."""
    artifacts = dict.fromkeys(file.artifact for file in repository.files)
    replaced = {file.path for file in repository.files if file.path in there and not agrees(file, there[file.path])}
    beside = {path for path in there if any(left_over(path, artifact, repository) for artifact in artifacts)}
    others = sorted(path for path in replaced | beside if not from_a_push(there[path]))
    return [f"{path} ({'would be replaced' if path in replaced else 'lies among the weights'})" for path in others]


def require_valid(addresses: dict[str, str]) -> None:
    """Raises HubError for a repository's name that the Hub's own client does not take."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for address in addresses.values():
        try:
            validate_repo_id(address)
        except HFValidationError as error:
            raise HubError(
                f"nothing was sent: {address} cannot be a repository on the Hub ({' '.join(str(error).split())}). Choose another "
                f"name: --repo-id user/name, or hub.repo_id"
            ) from None


def size_text(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"
