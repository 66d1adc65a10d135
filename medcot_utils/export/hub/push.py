"""Push a finished run to the Hugging Face Hub. A push succeeds only if the Hub lists and returns what the run has recorded.

medcot only replaces or deletes files that it uploaded itself."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from medcot_utils.config import HubSettings, RunConfig, SecretsSettings, with_values
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
from medcot_utils.export.hub.requests import HubClient, HubError, Listing, download
from medcot_utils.machine.environment import check_proxies
from medcot_utils.machine.secrets import remember, require_secret
from medcot_utils.plain_text import say
from medcot_utils.run.directory import Run

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

PROBE_BYTES = 65_536  # downloaded again from each end of a large file
PIECE_BYTES = 32 << 20  # size of one request for a whole file, so that a broken connection costs only one piece


def hub_settings(run: Run, **changes: Any) -> HubSettings:
    """Return the run's hub settings, changed for one push; None keeps the run's value. Raises ConfigError for a wrong value."""
    return with_values(run.config, {f"hub.{name}": value for name, value in changes.items() if value is not None}).hub


def check_hub(config: RunConfig, token: str | None = None) -> str:
    """Check the token hours before a push, and return one line for notebook 01 that says where the push will go.

    Raises PlatformError if a push is set and there is no token, and HubError if a repository's name is wrong or the Hub refuses
    the token."""
    settings = config.hub
    if settings.repo_id is None:
        return "nothing will be pushed to the Hub: hub.repo_id is not set"
    require_valid(settings.addresses(settings.artifacts, settings.repo_id).values())
    user = writing_user(_connect(token, config.secrets, settings, say), settings.repo_id)
    return f"notebook 07 will push to {settings.repo_id} ({'private' if settings.private else 'public'}) as {user}"


def publish(run: Run, token: str | None = None) -> PushRecord | None:
    """Push if hub.repo_id is set; if not, say in one line that nothing was pushed, and return None. Notebook 07 calls this.

    Raises HubError, PlatformError, RunError, ExportError, or GgufError as `push_run` does."""
    if run.config.hub.repo_id is None:
        say("not pushed: hub.repo_id is not set (later: medcot push RUN_DIR --repo-id user/name)")
        return None
    return push_run(run, run.config.hub, token)


def push_run(run: Run, settings: HubSettings, token: str | None = None, say: Callable[[str], None] = say) -> PushRecord:
    """Push the run's artifacts, compare every file there with the run, and set a tag if all agree.

    The comparison uses the size and digest that the Hub lists, then the bytes of a download: a whole small file, both ends of a
    large one, or all of every file with hub.verify_all. Return the record, which is also appended to pushed.json.

    Raises HubError unless every file agrees, and before anything is sent if a file that medcot did not upload is in the way. The
    record then has the state `failed` and says what was sent. Raises PlatformError without a token, and as `chosen_artifacts`
    does."""
    if settings.repo_id is None:
        raise HubError("hub.repo_id is not set: name the repository with --repo-id user/name")
    require_valid(settings.addresses(settings.artifacts, settings.repo_id).values())
    names = chosen_artifacts(run, settings)
    hub = _connect(token, run.config.secrets, settings, say)
    about = {"repo_id": settings.repo_id, "layout": settings.layout, "endpoint": hub.api.endpoint, "tag": None}
    record = PushRecord(started=_now(), state="running", **about, verify_all=settings.verify_all, repositories=[])
    with failure_recorded(run, record):
        user = writing_user(hub, settings.repo_id)
        repo_id = settings.repo_id if "/" in settings.repo_id else f"{user}/{settings.repo_id}"
        require_valid(settings.addresses(names, repo_id).values())
        tag = tag_name(run, settings, names)
        record |= {"repo_id": repo_id, "tag": tag}
        repositories, entries = plan(run, settings, repo_id, names), record["repositories"]
        for repository in repositories:
            entries.append(prepare(hub, repository, settings.private, tag))
            save_record(run, record)
        for at, repository in enumerate(repositories):
            for artifact in repository.artifacts:
                entries[at] = send(hub, repository, artifact, commit_title(artifact, run, tag), entries[at])
                save_record(run, record)
        for at, repository in enumerate(repositories):
            entries[at]["revision"] = hub.info(repository.repo_id).sha
            listing = hub.listing(repository.repo_id, entries[at]["revision"])
            entries[at] = read_back(hub, repository, listing, settings.verify_all, entries[at])
            save_record(run, record)
            require_verified(run, repository, listing, entries[at])
            hub.say(verified_line(entries[at]))
        for at, entry in enumerate(entries):
            entries[at] = tag_verified(hub, tag, entry)
        record |= {"state": "pushed", "ended": _now()}
        save_record(run, record)
    return record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _connect(token: str | None, secrets: SecretsSettings, settings: HubSettings, say: Callable[[str], None]) -> HubClient:
    """Return the client with a token: the argument, else what `require_secret` finds. Raises PlatformError without a token."""
    from huggingface_hub import HfApi

    if token:
        found = remember(token, "argument")
    else:
        found = require_secret("Hugging Face", "the push to the Hub", "set hub.repo_id to null", secrets)
    check_proxies()
    return HubClient(HfApi(token=found.value.get_secret_value()), settings.patience_seconds, say)


def writing_user(hub: HubClient, repo_id: str) -> str:
    """Return the name of the token's user. Raises HubError if the token may only read."""
    who = hub.ask("asking the Hub whose token this is", repo_id, hub.api.whoami)
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"the token of {who['name']} may only read: make one of type write at {hub.api.endpoint}/settings/tokens")
    return who["name"]


# --- before anything is sent ---------------------------------------------------------------------------------------


def prepare(hub: HubClient, repository: PlannedRepository, private: bool, tag: str) -> RepositoryRecord:
    """Make the repository if it does not exist, and return its record.

    Raises HubError if the repository is public and `private` is true, if its tag is on other weights, or if somebody else's file
    is in the way."""
    api, repo_id = hub.api, repository.repo_id
    making = f"making the repository {repo_id}"
    hub.ask(making, repo_id, api.create_repo, repo_id, private=private, repo_type="model", exist_ok=True)
    info = hub.info(repo_id)
    if private and not info.private:
        raise HubError(
            f"not pushed. {repo_id} exists and is public, but this push would be private: make the repository "
            f"private in its settings, choose another name, or push with --public"
        )
    if info.private and not private:
        hub.say(f"{repo_id} exists and is private; it stays private until you change it in its settings")
    commit = tagged_commit(hub, repo_id, tag)
    tagged = hub.listing(repo_id, tag) if commit else {}
    files = [file for name, files in repository.artifacts.items() for file in files if name != "model card" and commit]
    if other := next((file.path_in_repo for file in files if not agrees(file, tagged.get(file.path_in_repo))), None):
        raise HubError(
            f"not pushed. The tag {tag} of {repo_id} is on other files ({other} differs): choose another with --tag, or "
            f"delete it there"
        )
    refuse_of_others(repository, hub.listing(repo_id, "main", commits=True))
    about = {"repo_id": repo_id, "url": f"{api.endpoint}/{repo_id}", "private": info.private}
    return RepositoryRecord(**about, revision=None, commits={}, tag_commit=commit, files=[], deleted=[])


def tagged_commit(hub: HubClient, repo_id: str, tag: str) -> str | None:
    """Return the commit of the tag; None if there is no such tag."""
    refs = hub.ask(f"reading the tags of {repo_id}", repo_id, hub.api.list_repo_refs, repo_id)
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


# --- send ----------------------------------------------------------------------------------------------------------


def send(hub: HubClient, repository: PlannedRepository, artifact: str, title: str, entry: RepositoryRecord) -> RepositoryRecord:
    """Commit the artifact's files that are not already there, and delete weights of an earlier push that it no longer has.

    Return the repository's record with the commit. Raises HubError, before anything of the artifact is sent, if somebody else's
    file is in the way."""
    from huggingface_hub import CommitOperationDelete

    repo_id, files = repository.repo_id, repository.artifacts[artifact]
    there = hub.listing(repo_id, "main", commits=True)
    refuse_of_others(repository, there)  # again, because hours may have passed since `prepare`
    missing = [file for file in files if not agrees(file, there.get(file.path_in_repo))]
    stale = {path: found for path, found in there.items() if repository.left_over(path, artifact)}
    for file in missing:
        # Files are sent one by one, so that after a broken connection the earlier ones are not sent again.
        sending = f"sending {file.path_in_repo} ({size_text(file.upload_info.size)}) to {repo_id}"
        hub.ask(sending, repo_id, hub.api.preupload_lfs_files, repo_id, [file], free_memory=False)
    if missing or stale:
        operations = [*missing, *(CommitOperationDelete(path) for path in stale)]
        about = f"Without files of an earlier push: {', '.join(stale)}" if stale else None
        message = {"commit_message": title, "commit_description": about}
        commit = hub.ask(f"committing {artifact} to {repo_id}", repo_id, hub.api.create_commit, repo_id, operations, **message)
        size, replaced = sum(file.upload_info.size for file in missing), sum(file.path_in_repo in there for file in missing)
        instead = f", {replaced} of them in place of an earlier push's" if replaced else ""
        hub.say(f"{repo_id}: {artifact} committed, {len(missing)} of {len(files)} files, {size_text(size)}{instead}")
        for path, found in stale.items():
            hub.say(f"{repo_id}: deleted {path} ({size_text(found.size)}), which an earlier push had uploaded")
    else:
        hub.say(f"{repo_id}: {artifact} is already there, not sent again")
    records = [_file_record(file, artifact, file in missing, there.get(file.path_in_repo)) for file in files]
    deleted = [DeletedFile(path=path, artifact=artifact, **as_listed(found)) for path, found in stale.items()]
    commits = entry["commits"] | {artifact: commit.oid if missing or stale else "there already"}
    return entry | {"commits": commits, "files": entry["files"] + records, "deleted": entry["deleted"] + deleted}


def _file_record(file: CommitOperationAdd, artifact: str, sent: bool, found: RepoFile | None) -> FileRecord:
    replaced = as_listed(found)["digest"] if sent and found else None
    about = {"path": file.path_in_repo, "artifact": artifact, "bytes": file.upload_info.size}
    digest = file.upload_info.sha256.hex()
    return FileRecord(**about, sha256=digest, sent=sent, there_already=not sent, replaced=replaced, verified=None)


def size_text(count: int) -> str:
    """Return a number of bytes as text, in MB if it is 100,000 or more."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"


# --- read back -----------------------------------------------------------------------------------------------------


def read_back(
    hub: HubClient, repository: PlannedRepository, listing: Listing, verify_all: bool, entry: RepositoryRecord
) -> RepositoryRecord:
    """Return the repository's record with the Hub's listing, the extent of the download, and the fault (or None) of each file."""
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
            fault = download_fault(hub, repository.repo_id, entry["revision"], file, whole)
        listed = None if found is None else as_listed(found)
        checked.append(record | {"on_the_hub": listed} | downloaded | {"verified": fault is None, "fault": fault})
    return entry | {"files": checked}


def download_fault(hub: HubClient, repo_id: str, revision: str, file: CommitOperationAdd, whole: bool) -> str | None:
    """Return what is wrong with a download of the file; None if it is right. Not `whole`: only its first and last PROBE_BYTES."""
    path, size, length = file.path_in_repo, file.upload_info.size, PIECE_BYTES if whole else PROBE_BYTES
    with file.as_file() as ours:
        for start in range(0, size, length) if whole else (0, size - length):
            part, reading = min(length, size - start), f"reading {path} back from {repo_id}"
            got = hub.ask(reading, repo_id, download, hub.api, repo_id, path, revision, start, part)
            if got is None:
                return "listed, but cannot be downloaded"
            ours.seek(start)
            if got != ours.read(part):
                return "a download gives other bytes"
    return None


def require_verified(run: Run, repository: PlannedRepository, listing: Listing, entry: RepositoryRecord) -> None:
    """Raise HubError unless every file agrees, deleted files are gone, and each whole artifact has the manifest's digest."""
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
            f"not pushed. The Hub took the files for {entry['repo_id']} without an error, but returns something else: "
            f"{', '.join(faults[:3])}{more}; {good} of {len(entry['files'])} files agree. No tag was set; do not use what lies "
            f"there. Push again, and if it fails again, delete the repository and push"
        )


def verified_line(entry: RepositoryRecord) -> str:
    """Return one line on how many files agree, and how many of them were downloaded whole."""
    count, ends = len(entry["files"]), sum(one["downloaded"] == "both ends" for one in entry["files"])
    probed = f", {ends} large at both ends (every byte: --verify-all)" if ends else ""
    return (
        f"{entry['repo_id']}: {count} of {count} files agree: size and digest as the Hub lists them, and downloaded again "
        f"{count - ends} whole{probed}"
    )


def tag_verified(hub: HubClient, tag: str, entry: RepositoryRecord) -> RepositoryRecord:
    """Set the tag on the verified commit, unless it is set already, and return the record with the tag's commit.

    Raises HubError if the Hub then lists the tag on another commit, or does not list it."""
    if entry["tag_commit"]:
        return entry
    repo_id, revision = entry["repo_id"], entry["revision"]
    setting = f"setting the tag {tag} on {repo_id}"
    hub.ask(setting, repo_id, hub.api.create_tag, repo_id, tag=tag, revision=revision, exist_ok=True)
    if tagged_commit(hub, repo_id, tag) != revision:
        raise HubError(
            f"not fully pushed. Every file is in {repo_id} as in the run, but the Hub says that it set the tag {tag} "
            f"and does not list it on that commit: push again, or with another --tag"
        )
    return entry | {"tag_commit": revision}
