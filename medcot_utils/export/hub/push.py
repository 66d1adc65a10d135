"""Push a finished run to the Hugging Face Hub, and believe it only if what the Hub lists and gives back is what the run
recorded. medcot only replaces or deletes files that it uploaded itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from medcot_utils.config import HubSettings, RunConfig, SecretsSettings, config_from_dict
from medcot_utils.export.hub.files import (
    PlannedRepository,
    agrees,
    as_listed,
    chosen_artifacts,
    commit_title,
    folder_digest,
    plan,
    refuse_of_others,
    require_valid,
    tag_name,
)
from medcot_utils.export.hub.records import (
    DeletedFile,
    FileRecord,
    PushRecord,
    RepositoryRecord,
    failure_recorded,
    save_record,
)
from medcot_utils.export.hub.requests import HubClient, HubError, download
from medcot_utils.machine.secrets import require_secret
from medcot_utils.run.directory import Run

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

PROBE_BYTES = 65_536  # downloaded again from either end of a large file
PIECE_BYTES = 32 << 20  # downloaded at a time of a whole file: a broken connection costs one piece


def hub_settings(run: Run, **changes: Any) -> HubSettings:
    """Return the run's hub settings with those of one push laid over them (None: as the run says). Raises ConfigError."""
    values = run.config.model_dump(mode="json")
    values["hub"] |= {name: value for name, value in changes.items() if value is not None}
    return config_from_dict(values).hub


def check_ready(config: RunConfig, token: str | None = None) -> str:
    """Return one line for notebook 01 that says where a push will go.

    Raises PlatformError if a push is asked for and there is no token, HubError if the Hub does not take it: hours later would
    be too late."""
    settings = config.hub
    if settings.repo_id is None:
        return "nothing will be pushed to the Hub: hub.repo_id is not set"
    require_valid(settings.addresses(settings.artifacts, settings.repo_id).values())
    user = writing_user(_connect(token, config.secrets, settings, print), settings.repo_id)
    return f"notebook 07 will push to {settings.repo_id} ({'private' if settings.private else 'public'}) as {user}"


def publish(run: Run, token: str | None = None) -> PushRecord | None:
    """Push if hub.repo_id is set, else say in one line that nothing was pushed: for notebook 07."""
    if run.config.hub.repo_id is None:
        print("not pushed: hub.repo_id is not set (later: medcot push RUN_DIR --repo-id user/name)")
        return None
    return push_run(run, run.config.hub, token)


def push_run(run: Run, settings: HubSettings, token: str | None = None, say: Callable[[str], None] = print) -> PushRecord:
    """Push the run's artifacts, compare every file there with the run, and tag what agrees.

    Size and digest are compared as the Hub lists them, then the bytes of a download: all of a small file, both ends of a large
    one, or all of every file with hub.verify_all. Returns the record, which is also appended to pushed.json. Raises HubError,
    and leaves a record of state `failed` with what was sent, unless every file agrees; before anything is sent if a file
    that medcot did not upload stands in the way."""
    if settings.repo_id is None:
        raise HubError("hub.repo_id is not set: name the repository with --repo-id user/name")
    require_valid(settings.addresses(settings.artifacts, settings.repo_id).values())
    names = chosen_artifacts(run, settings)
    hub = _connect(token, run.config.secrets, settings, say)
    record: PushRecord = {
        "started": _now(),
        "state": "running",
        "repo_id": settings.repo_id,
        "layout": settings.layout,
        "endpoint": hub.api.endpoint,
        "tag": None,
        "verify_all": settings.verify_all,
        "repositories": [],
    }
    with failure_recorded(run, record):
        user = writing_user(hub, settings.repo_id)
        repo_id = settings.repo_id if "/" in settings.repo_id else f"{user}/{settings.repo_id}"
        require_valid(settings.addresses(names, repo_id).values())
        tag = tag_name(run, settings, names)
        record |= {"repo_id": repo_id, "tag": tag}
        repositories = plan(run, settings, repo_id, names)
        for repository in repositories:
            record["repositories"].append(prepare(hub, repository, settings.private, tag))
            save_record(run, record)
        entries = list(zip(repositories, record["repositories"], strict=True))
        for repository, entry in entries:
            for artifact in repository.artifacts:
                sent = send(hub, repository, artifact, commit_title(artifact, run, tag))
                entry["commits"][artifact] = sent.commit
                entry["files"] += sent.files
                entry["deleted"] += sent.deleted
                save_record(run, record)
        for repository, entry in entries:
            entry["revision"] = hub.ask(
                f"looking at {repository.repo_id}", repository.repo_id, hub.api.model_info, repository.repo_id
            ).sha
            listing = hub.listing(repository.repo_id, entry["revision"])
            entry["files"] = read_back(hub, repository, entry, listing, settings.verify_all)
            save_record(run, record)
            require_verified(run, repository, entry, listing)
            hub.say(verified_line(entry))
        for _, entry in entries:
            entry["tag_commit"] = entry["tag_commit"] or set_tag(hub, entry["repo_id"], tag, entry["revision"])
        record |= {"state": "pushed", "ended": _now()}
        save_record(run, record)
    return record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _connect(token: str | None, secrets: SecretsSettings, settings: HubSettings, say: Callable[[str], None]) -> HubClient:
    """Return the client with a token: the argument, else what `require_secret` finds. Raises PlatformError without one."""
    from huggingface_hub import HfApi

    if not token:
        found = require_secret("Hugging Face", "the push to the Hub", "leave hub.repo_id unset", secrets)
        token = found.value.get_secret_value()
    return HubClient(HfApi(token=token), settings.patience_seconds, say)


def writing_user(hub: HubClient, repo_id: str) -> str:
    """Return the name of the token's user. Raises HubError for a token that may only read."""
    who = hub.ask("asking the Hub whose token this is", repo_id, hub.api.whoami)
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"the token of {who['name']} may only read: make one of type write at {hub.api.endpoint}/settings/tokens")
    return who["name"]


# --- before anything is sent ---------------------------------------------------------------------------------------


def prepare(hub: HubClient, repository: PlannedRepository, private: bool, tag: str) -> RepositoryRecord:
    """Make the repository if it is not there, and return its record.

    Raises HubError if the one there is public and `private` is asked for, if its tag stands on other weights, or if a file
    of somebody else is in the way."""
    api, repo_id = hub.api, repository.repo_id
    making = f"making the repository {repo_id}"
    hub.ask(making, repo_id, api.create_repo, repo_id, private=private, repo_type="model", exist_ok=True)
    info = hub.ask(f"looking at {repo_id}", repo_id, api.model_info, repo_id)
    if private and not info.private:
        raise HubError(
            f"not pushed. {repo_id} is there already and public, and this push is to be private: make the repository "
            f"private in its settings, choose another name, or push with --public"
        )
    if info.private and not private:
        hub.say(f"{repo_id} is there already and private; it stays so until you change it in its settings")
    commit = tagged_commit(hub, repo_id, tag)
    tagged = hub.listing(repo_id, tag) if commit else {}
    files = [file for name, files in repository.artifacts.items() for file in files if name != "model card" and commit]
    if other := next((file.path_in_repo for file in files if not agrees(file, tagged.get(file.path_in_repo))), None):
        raise HubError(
            f"not pushed. The tag {tag} of {repo_id} stands on other files ({other} differs): choose another with --tag, or "
            f"delete it there"
        )
    refuse_of_others(repository, hub.listing(repo_id, "main", commits=True))
    entry: RepositoryRecord = {"repo_id": repo_id, "url": f"{api.endpoint}/{repo_id}", "private": info.private}
    return entry | {"revision": None, "commits": {}, "tag_commit": commit, "files": [], "deleted": []}


def tagged_commit(hub: HubClient, repo_id: str, tag: str) -> str | None:
    """Return the commit that the tag stands on; None without such a tag."""
    refs = hub.ask(f"reading the tags of {repo_id}", repo_id, hub.api.list_repo_refs, repo_id)
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


# --- send ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """What became of one artifact: its commit (or `there already`), its files, and the weights that were deleted for it."""

    commit: str
    files: list[FileRecord]
    deleted: list[DeletedFile]


def send(hub: HubClient, repository: PlannedRepository, artifact: str, title: str) -> Sent:
    """Commit the artifact's files that are not there already, without weights of an earlier push that it no longer has.

    Raises HubError before anything of it is sent if a file of somebody else is in the way."""
    from huggingface_hub import CommitOperationDelete

    repo_id, files = repository.repo_id, repository.artifacts[artifact]
    there = hub.listing(repo_id, "main", commits=True)
    refuse_of_others(repository, there)  # once more: hours may lie between
    missing = [file for file in files if not agrees(file, there.get(file.path_in_repo))]
    stale = {path: found for path, found in there.items() if repository.left_over(path, artifact)}
    deleted: list[DeletedFile] = [{"path": path, "artifact": artifact} | as_listed(found) for path, found in stale.items()]
    records = [_file_record(file, artifact, file in missing, there.get(file.path_in_repo)) for file in files]
    if not missing and not stale:
        hub.say(f"{repo_id}: {artifact} is there already, not sent again")
        return Sent("there already", records, [])
    for file in missing:
        # One by one: a broken connection stops this file, and the ones before it are not sent again.
        sending = f"sending {file.path_in_repo} ({size_text(file.upload_info.size)}) to {repo_id}"
        hub.ask(sending, repo_id, hub.api.preupload_lfs_files, repo_id, [file], free_memory=False)
    operations = [*missing, *(CommitOperationDelete(path) for path in stale)]
    about = f"Without what an earlier push had put there: {', '.join(stale)}" if stale else None
    message = {"commit_message": title, "commit_description": about}
    commit = hub.ask(f"committing {artifact} to {repo_id}", repo_id, hub.api.create_commit, repo_id, operations, **message)
    size, replaced = sum(file.upload_info.size for file in missing), sum(bool(one["replaced"]) for one in records)
    instead = f", {replaced} of them in place of an earlier push's" if replaced else ""
    hub.say(f"{repo_id}: {artifact} committed, {len(missing)} of {len(files)} files, {size_text(size)}{instead}")
    for gone in deleted:
        hub.say(f"{repo_id}: deleted {gone['path']} ({size_text(gone['bytes'])}), which an earlier push had put there")
    return Sent(commit.oid, records, deleted)


def _file_record(file: CommitOperationAdd, artifact: str, missing: bool, found: RepoFile | None) -> FileRecord:
    return {
        "path": file.path_in_repo,
        "artifact": artifact,
        "bytes": file.upload_info.size,
        "sha256": file.upload_info.sha256.hex(),
        "sent": missing,
        "there_already": not missing,
        "replaced": as_listed(found)["digest"] if missing and found else None,
        "verified": None,
    }


def size_text(count: int) -> str:
    """Return a number of bytes for a reader, in MB from 100,000 on."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"


# --- read back -----------------------------------------------------------------------------------------------------


def read_back(
    hub: HubClient, repository: PlannedRepository, entry: RepositoryRecord, listing: dict[str, RepoFile], verify_all: bool
) -> list[FileRecord]:
    """Return the file records with what the Hub lists and what a download gives, each with its fault or None."""
    checked = []
    for file, record in zip(repository.files, entry["files"], strict=True):
        found, downloaded = listing.get(file.path_in_repo), {}
        if found is None:
            fault = "not there"
        elif not agrees(file, found):
            fault = "another size" if found.size != file.upload_info.size else "another digest"
        else:
            whole = verify_all or found.lfs is None or found.size <= 2 * PROBE_BYTES
            downloaded = {"downloaded": "whole" if whole else "both ends"}
            fault = download_fault(hub, entry["repo_id"], entry["revision"], file, whole)
        listed = None if found is None else as_listed(found)
        checked.append(record | {"on_the_hub": listed} | downloaded | {"verified": fault is None, "fault": fault})
    return checked


def download_fault(hub: HubClient, repo_id: str, revision: str, file: CommitOperationAdd, whole: bool) -> str | None:
    """Return what is wrong with a download of the file, whole or its first and last PROBE_BYTES alone; None if it is right."""
    path, size, length = file.path_in_repo, file.upload_info.size, PIECE_BYTES if whole else PROBE_BYTES
    with file.as_file() as ours:
        for start in range(0, size, length) if whole else (0, size - length):
            part = min(length, size - start)
            reading = f"reading {path} back from {repo_id}"
            got = hub.ask(reading, repo_id, download, hub.api, repo_id, path, revision, start, part)
            if got is None:
                return "listed, but cannot be downloaded"
            ours.seek(start)
            if got != ours.read(part):
                return "a download gives other bytes"
    return None


def require_verified(run: Run, repository: PlannedRepository, entry: RepositoryRecord, listing: dict[str, RepoFile]) -> None:
    """Raise HubError unless every file agrees, what was deleted is gone, and each artifact is as a whole the manifest's."""
    faults = [f"{one['path']} ({one['fault']})" for one in entry["files"] if not one["verified"]]
    faults += [f"{gone['path']} (deleted, still there)" for gone in entry["deleted"] if gone["path"] in listing]
    manifest = run.manifest()["artifacts"]
    for name in () if faults else repository.artifacts.keys() & manifest.keys():
        place = repository.folder(name)
        digests = {one["path"].removeprefix(place): one["sha256"] for one in entry["files"] if one["artifact"] == name}
        if folder_digest(digests) != manifest[name]["sha256"]:
            faults.append(f"{name} as a whole (not the manifest's)")
    if faults:
        good = sum(bool(one["verified"]) for one in entry["files"])
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise HubError(
            f"not pushed. The Hub took the files for {entry['repo_id']} without an error, but gives back something else: "
            f"{', '.join(faults[:3])}{more}; {good} of {len(entry['files'])} files agree. No tag was set; do not use what lies "
            f"there. Push again, and if it stays so delete the repository and push anew"
        )


def verified_line(entry: RepositoryRecord) -> str:
    """Return one line on how many files agree, and how much of them was downloaded."""
    count, ends = len(entry["files"]), sum(one["downloaded"] == "both ends" for one in entry["files"])
    probed = f", {ends} large at both ends (every byte: --verify-all)" if ends else ""
    return (
        f"{entry['repo_id']}: {count} of {count} files agree: size and digest as the Hub lists them, and downloaded again "
        f"{count - ends} whole{probed}"
    )


def set_tag(hub: HubClient, repo_id: str, tag: str, revision: str) -> str:
    """Set the tag on the verified commit and return what the Hub then lists it on. Raises HubError unless they agree."""
    setting = f"setting the tag {tag} on {repo_id}"
    hub.ask(setting, repo_id, hub.api.create_tag, repo_id, tag=tag, revision=revision, exist_ok=True)
    if tagged_commit(hub, repo_id, tag) != revision:
        raise HubError(
            f"not pushed whole. Every file lies in {repo_id} as in the run, but the Hub says that it set the tag {tag} "
            f"and does not list it on that commit: push again, or with another --tag"
        )
    return revision
