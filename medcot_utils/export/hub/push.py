"""Push a finished run to the Hugging Face Hub, and believe it only when what the Hub lists and gives back is what the run
recorded. Nothing that an earlier push did not put there is replaced or deleted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from medcot_utils.config import HubSettings, RunConfig, config_from_dict
from medcot_utils.errors import MedcotError
from medcot_utils.export.hub import requests
from medcot_utils.export.hub.files import (
    PlannedFile,
    PlannedRepository,
    agrees,
    chosen_artifacts,
    commit_title,
    digest_of,
    folder_digest,
    left_over,
    of_others,
    plan,
    require_valid,
    size_text,
    tag_name,
)
from medcot_utils.export.hub.requests import HubError
from medcot_utils.run.directory import Run
from medcot_utils.run.files import to_json, write_atomic

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import HfApi

RECORD = "pushed.json"
PROBE_BYTES = 65_536  # downloaded again from either end of a large file
PIECE_BYTES = 32 << 20  # downloaded at a time where a file is downloaded whole: a broken connection costs one piece
NO_DOWNLOAD, OTHER_BYTES = "listed, but cannot be downloaded", "a download gives other bytes"


def hub_settings(run: Run, **changes: Any) -> HubSettings:
    """The run's hub settings with those of one push laid over them (None: as the run says). Raises ConfigError."""
    values = run.config.model_dump(mode="json")
    values["hub"] |= {name: value for name, value in changes.items() if value is not None}
    return config_from_dict(values).hub


# --- push ----------------------------------------------------------------------------------------------------------


def publish(run: Run, token: str | None = None) -> dict[str, Any] | None:
    """For notebook 07: push if hub.repo_id is set, else say in one line that nothing was pushed."""
    if run.config.hub.repo_id is None:
        print("not pushed: hub.repo_id is not set (later: medcot push RUN_DIR --repo-id user/name)")
        return None
    return push(run, run.config.hub, token)


def check_hub(config: RunConfig, token: str | None = None) -> str:
    """Return one line that says where notebook 07 will push. Raises PlatformError if a push is asked for and there is no
    token, HubError if the Hub does not take it: hours later would be too late."""
    from huggingface_hub import HfApi

    settings = config.hub
    if settings.repo_id is None:
        return "nothing will be pushed to the Hub: hub.repo_id is not set"
    require_valid(settings.addresses(settings.artifacts, settings.repo_id))
    token = requests.find_token(token, config.secrets)
    api, doing = HfApi(token=token), "asking the Hub whose token this is"
    try:
        user = _may_write(requests.repeat(api.whoami, settings.patience_seconds, print), api)
    except Exception as error:
        if isinstance(error, MedcotError) or not requests.of_the_hub(error):
            raise
        message = requests.explain(error, doing, settings.repo_id, api.endpoint, settings.patience_seconds)
        raise HubError(message.replace(token, "***")) from None
    return f"notebook 07 will push to {settings.repo_id} ({'private' if settings.private else 'public'}) as {user}"


def _may_write(who: dict[str, Any], api: HfApi) -> str:
    """The user's name. Raises HubError for a token that may only read."""
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"the token of {who['name']} may only read: make one of type write at {api.endpoint}/settings/tokens")
    return who["name"]


def push(run: Run, settings: HubSettings, token: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Push the run's artifacts, compare every file there with the run, and tag what agrees.

    Compared are size and digest as the Hub lists them, and the bytes of a download: all of a small file, both ends of a large
    one, or all of every file with hub.verify_all. Gives the record that is also appended to pushed.json: {state, tag,
    repositories: [{repo_id, private, commits, files, deleted}]}. Raises HubError, and leaves a record of state `failed` with
    what was sent, unless every file agrees; before anything is sent if a file that no push put there stands in the way."""
    from huggingface_hub import HfApi

    if settings.repo_id is None:
        raise HubError("hub.repo_id is not set: name the repository with --repo-id user/name")
    require_valid(settings.addresses(settings.artifacts, settings.repo_id))
    names = chosen_artifacts(run, settings)
    token = requests.find_token(token, run.config.secrets)
    # A server may repeat the token in what it says.
    pusher = _Push(run, settings, HfApi(token=token), lambda line: say(line.replace(token, "***")))
    try:
        return pusher.run_all(names)
    except MedcotError as error:
        pusher.fail(str(error))
        raise
    except Exception as error:
        if not requests.of_the_hub(error):
            pusher.fail(f"{type(error).__name__} while {pusher.doing}")
            raise
        message = requests.explain(error, pusher.doing, pusher.where, pusher.api.endpoint, settings.patience_seconds)
        message = f"not pushed: {message}. {pusher.what_lies_there()}".replace(token, "***")
        pusher.fail(message)
        raise HubError(message) from None


class _Push:
    """One push as it goes on: what it is doing, what it has done, and the record of both."""

    def __init__(self, run: Run, settings: HubSettings, api: HfApi, say: Callable[[str], None]):
        self.run, self.settings, self.api, self.say = run, settings, api, say
        self.doing, self.where = "asking the Hub whose token this is", settings.repo_id
        self.record: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "state": "running",
            "repo_id": settings.repo_id,
            "layout": settings.layout,
            "endpoint": api.endpoint,
            "tag": None,
            "verify_all": settings.verify_all,
            "repositories": [],
        }

    # --- the record ---

    def _save(self) -> None:
        path = self.run.path / RECORD
        before = read_record(self.run)
        write_atomic(path, to_json([push for push in before if push["started"] != self.record["started"]] + [self.record]))

    def fail(self, message: str) -> None:
        self.record |= {"state": "failed", "error": message}
        self._save()

    def what_lies_there(self) -> str:
        lies = [f"{one['repo_id']}: {', '.join(one['commits'])}" for one in self.record["repositories"] if one["commits"]]
        there = f"Already on the Hub, and kept: {'; '.join(lies)}" if lies else "This push has committed nothing"
        return f"{there}. A second `medcot push` sends only what is missing; {RECORD} in the run says what was sent"

    def _call(self, doing: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.doing = doing
        return requests.repeat(partial(call, *args, **kwargs), self.settings.patience_seconds, self.say)

    # --- the steps ---

    def run_all(self, names: list[str]) -> dict[str, Any]:
        user = _may_write(self._call(self.doing, self.api.whoami), self.api)
        repo_id = self.settings.repo_id if "/" in self.settings.repo_id else f"{user}/{self.settings.repo_id}"
        require_valid(self.settings.addresses(names, repo_id))
        self.record |= {"repo_id": repo_id, "tag": tag_name(self.run, self.settings, names)}
        repositories = plan(self.run, self.settings, repo_id, names)
        entries = [self._prepare(repository) for repository in repositories]
        for repository, entry in zip(repositories, entries, strict=True):
            for artifact in dict.fromkeys(file.artifact for file in repository.files):
                self._send(repository, artifact, entry)
        for repository, entry in zip(repositories, entries, strict=True):
            self._verify(repository, entry)
        for entry in entries:
            self._tag(entry)
        self.record |= {"state": "pushed", "ended": datetime.now(UTC).isoformat(timespec="seconds")}
        self._save()
        return self.record

    def _prepare(self, repository: PlannedRepository) -> dict[str, Any]:
        """Make the repository, or see that the one there is as visible as was asked for, holds no other run's tag, and nothing
        of somebody else's that stands in the way."""
        self.where, repo_id, private = repository.repo_id, repository.repo_id, self.settings.private
        made = f"making the repository {repo_id}"
        self._call(made, self.api.create_repo, repo_id, private=private, repo_type="model", exist_ok=True)
        info = self._call(f"looking at {repo_id}", self.api.model_info, repo_id)
        if private and not info.private:
            raise HubError(
                f"not pushed. {repo_id} is there already and public, and this push is to be private: make the repository "
                f"private in its settings, choose another name, or push with --public"
            )
        if info.private and not private:
            self.say(f"{repo_id} is there already and private; it stays so until you change it in its settings")
        entry = {"repo_id": repo_id, "url": f"{self.api.endpoint}/{repo_id}", "private": info.private, "revision": None}
        entry |= {"commits": {}, "tag_commit": self._tagged(repository), "files": [], "deleted": []}
        self._refuse_of_others(repository, self._listing(repo_id, "main", commits=True))
        self.record["repositories"].append(entry)
        self._save()
        return entry

    def _tagged(self, repository: PlannedRepository) -> str | None:
        """The commit that the push's tag stands on already; raises HubError if it holds other weights."""
        tag, repo_id = self.record["tag"], repository.repo_id
        commit = self._tag_commit(repo_id)
        if commit is None:
            return None
        listing = self._listing(repo_id, tag)
        others = [file.path for file in repository.files if file.path != "README.md" and not agrees(file, listing.get(file.path))]
        if others:
            raise HubError(
                f"not pushed. The tag {tag} of {repo_id} stands on other files ({others[0]} differs): choose another with "
                f"--tag, or delete it there"
            )
        return commit

    def _tag_commit(self, repo_id: str) -> str | None:
        refs = self._call(f"reading the tags of {repo_id}", self.api.list_repo_refs, repo_id)
        return next((ref.target_commit for ref in refs.tags if ref.name == self.record["tag"]), None)

    def _refuse_of_others(self, repository: PlannedRepository, there: dict[str, Any]) -> None:
        if others := of_others(repository, there):
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            raise HubError(
                f"not pushed. {repository.repo_id} holds files that no `medcot push` put there, or that somebody changed since: "
                f"{', '.join(others[:5])}{more}. None of them was touched: choose another repository with --repo-id, or delete "
                f"them there if nobody needs them, and push again"
            )

    def _listing(self, repo_id: str, revision: str, commits: bool = False) -> dict[str, Any]:
        """{path: what the Hub says of the file}, with the last commit that touched it if `commits`."""
        from huggingface_hub.hf_api import RepoFile

        def read() -> dict[str, Any]:
            tree = self.api.list_repo_tree(repo_id, recursive=True, expand=commits, revision=revision)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

        return self._call(f"listing {repo_id}", read)

    def _send(self, repository: PlannedRepository, artifact: str, entry: dict[str, Any]) -> None:
        """One commit with the artifact's files that are not there already, and without weights of an earlier push that it no
        longer has."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        self.where, repo_id, files = repository.repo_id, repository.repo_id, repository.of(artifact)
        there = self._listing(repo_id, "main", commits=True)
        self._refuse_of_others(repository, there)  # once more: hours may lie between
        missing = [file for file in files if not agrees(file, there.get(file.path))]
        for file in files:
            fields = {"path": file.path, "artifact": artifact, "bytes": file.bytes, "sha256": file.sha256}
            before = digest_of(there[file.path]) if file in missing and file.path in there else None
            fields |= {"sent": False, "there_already": file not in missing, "replaced": before, "verified": None}
            entry["files"].append(fields)
        self._save()
        stale = {path: found for path, found in there.items() if left_over(path, artifact, repository)}
        if not missing and not stale:
            self.say(f"{repo_id}: {artifact} is there already, not sent again")
            entry["commits"][artifact] = "there already"
            return
        additions = []
        for file in missing:
            additions.append(CommitOperationAdd(file.path, file.source if isinstance(file.source, bytes) else str(file.source)))
            additions[-1].upload_info.sha256 = bytes.fromhex(file.sha256)
            # One by one: what a broken connection stops is this file, and the ones before it are not sent again.
            upload = partial(self.api.preupload_lfs_files, repo_id, [additions[-1]], free_memory=False)
            self._call(f"sending {file.path} ({size_text(file.bytes)}) to {repo_id}", upload)
        operations = [*additions, *(CommitOperationDelete(path) for path in stale)]
        message = {"commit_message": commit_title(artifact, self.run, self.record["tag"])}
        if stale:
            message["commit_description"] = f"Without what an earlier push had put there: {', '.join(stale)}"
        commit = self._call(f"committing {artifact} to {repo_id}", self.api.create_commit, repo_id, operations, **message)
        entry["commits"][artifact] = commit.oid
        entry["deleted"] += [
            {"path": path, "artifact": artifact, "bytes": found.size, "digest": digest_of(found)} for path, found in stale.items()
        ]
        sent = {file.path for file in missing}
        for fields in entry["files"]:
            fields["sent"] = fields["sent"] or fields["path"] in sent
        self._save()
        size, replaced = size_text(sum(file.bytes for file in missing)), sum(file.path in there for file in missing)
        instead = f", {replaced} of them in place of an earlier push's" if replaced else ""
        self.say(f"{repo_id}: {artifact} committed, {len(missing)} of {len(files)} files, {size}{instead}")
        for path, found in stale.items():
            self.say(f"{repo_id}: deleted {path} ({size_text(found.size)}), which an earlier push had put there")

    def _tag(self, entry: dict[str, Any]) -> None:
        if entry["tag_commit"] is None:
            tag, repo_id = self.record["tag"], entry["repo_id"]
            doing = f"setting the tag {tag} on {repo_id}"
            self._call(doing, self.api.create_tag, repo_id, tag=tag, revision=entry["revision"], exist_ok=True)
            entry["tag_commit"] = self._tag_commit(repo_id)
            if entry["tag_commit"] != entry["revision"]:
                raise HubError(
                    f"not pushed whole. Every file lies in {repo_id} as in the run, but the Hub says that it set the tag {tag} "
                    f"and does not list it on that commit: push again, or with another --tag"
                )

    # --- reading back ---

    def _verify(self, repository: PlannedRepository, entry: dict[str, Any]) -> None:
        """Compare what the Hub lists and gives back with the run, file by file and with the manifest. Raises HubError."""
        self.where, repo_id = repository.repo_id, repository.repo_id
        entry["revision"] = self._call(f"looking at {repo_id}", self.api.model_info, repo_id).sha
        listing, digests = self._listing(repo_id, entry["revision"]), {}
        for file, fields in zip(repository.files, entry["files"], strict=True):
            found = listing.get(file.path)
            fields["on_the_hub"] = None if found is None else {"bytes": found.size, "digest": digest_of(found)}
            if found is None:
                fault = "not there"
            elif not agrees(file, found):
                fault = "another size" if found.size != file.bytes else "another digest"
            else:
                whole = self.settings.verify_all or found.lfs is None or file.bytes <= 2 * PROBE_BYTES
                fields["downloaded"] = "whole" if whole else "both ends"
                read = self._whole_fault if whole else self._ends_fault
                fault = read(file, repo_id, entry["revision"])
            fields |= {"verified": fault is None, "fault": fault}
            digests.setdefault(file.artifact, {})[file.name] = file.sha256 if fault is None else "?"
        self._save()
        faults = [f"{fields['path']} ({fields['fault']})" for fields in entry["files"] if not fields["verified"]]
        faults += [f"{gone['path']} (deleted, still there)" for gone in entry["deleted"] if gone["path"] in listing]
        manifest = self.run.manifest()["artifacts"]
        faults += [
            f"{name} as a whole (not the manifest's)"
            for name, files in digests.items()
            if not faults and name in manifest and folder_digest(files) != manifest[name]["sha256"]
        ]
        if faults:
            good = sum(fields["verified"] for fields in entry["files"])
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise HubError(
                f"not pushed. The Hub took the files for {repo_id} without an error, but gives back something else: "
                f"{', '.join(faults[:3])}{more}; {good} of {len(entry['files'])} files agree. No tag was "
                f"set; do not use what lies there. Push again, and if it stays so delete the repository and push anew"
            )
        count, ends = len(entry["files"]), sum(fields["downloaded"] == "both ends" for fields in entry["files"])
        probed = f", {ends} large at both ends (every byte: --verify-all)" if ends else ""
        self.say(
            f"{repo_id}: {count} of {count} files agree: size and digest as the Hub lists them, and downloaded again "
            f"{count - ends} whole{probed}"
        )

    def _downloaded(self, file: PlannedFile, repo_id: str, revision: str, start: int, length: int) -> bytes | None:
        doing, length = f"reading {file.path} back from {repo_id}", min(length, file.bytes - start)
        return self._call(doing, requests.download, self.api, repo_id, file.path, revision, start, length)

    def _whole_fault(self, file: PlannedFile, repo_id: str, revision: str) -> str | None:
        """None, or what is wrong with the bytes of the file that a download gives."""
        digest = hashlib.sha256()
        for start in range(0, file.bytes, PIECE_BYTES):
            got = self._downloaded(file, repo_id, revision, start, PIECE_BYTES)
            if got is None:
                return NO_DOWNLOAD
            digest.update(got)
        return None if digest.hexdigest() == file.sha256 else OTHER_BYTES

    def _ends_fault(self, file: PlannedFile, repo_id: str, revision: str) -> str | None:
        """The same of its first and its last bytes alone."""
        for start in (0, file.bytes - PROBE_BYTES):
            got = self._downloaded(file, repo_id, revision, start, PROBE_BYTES)
            if got is None:
                return NO_DOWNLOAD
            if got != file.part(start, PROBE_BYTES):
                return OTHER_BYTES
        return None


# --- the record ----------------------------------------------------------------------------------------------------


def read_record(run: Run) -> list[dict[str, Any]]:
    """Every push of the run, the oldest first; an empty list if there was none. Raises HubError for an unreadable record."""
    path = run.path / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise HubError(f"{run.path.name}/{RECORD} cannot be read ({error}): move it away and push again") from error


def file_lines(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What was compared and what was deleted, one line a file."""
    lines = []
    for entry in record["repositories"]:
        for fields in entry["files"]:
            sent = "was there" if not fields["sent"] else "replaced" if fields["replaced"] else "yes"
            read = fields.get("fault") or f"{fields['downloaded']}, agrees"
            line = {"file": f"{entry['repo_id']}/{fields['path']}", "bytes": fields["bytes"], "sha256": fields["sha256"][:12]}
            lines.append(line | {"sent": sent, "read back": read})
        for gone in entry["deleted"]:
            line = {"file": f"{entry['repo_id']}/{gone['path']}", "bytes": gone["bytes"]}
            lines.append(line | {"sha256": "", "sent": "deleted", "read back": "gone"})
    return lines


def push_table(record: dict[str, Any] | None) -> pd.DataFrame | None:
    """`file_lines` as a table for notebook 07; None where nothing was pushed."""
    import pandas as pd

    return None if record is None else pd.DataFrame(file_lines(record)).set_index("file")
