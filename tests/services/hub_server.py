"""A Hugging Face Hub of one process, for tests: repositories in memory, spoken to by the real client over HTTP.

It speaks what huggingface_hub 1.33 and datasets 4.8 ask for with HF_HUB_DISABLE_XET=1. Faults are switched on by `fail` and
by the attributes of `Hub` that begin with `forgets` or `spoils`. Standard library only."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

WRITE, READ, FOREIGN = "hf_writes_for_the_test", "hf_reads_for_the_test", "hf_foreign_for_the_test"
USERS = {WRITE: ("doctor", "write"), READ: ("doctor", "read"), FOREIGN: ("stranger", "fineGrained")}
PART = 8 << 20  # larger files come in parts of so many bytes
NEVER_ENDS = 10**9


def blob_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    method: str
    path: re.Pattern
    status: int = 500
    times: int = 1
    headers: dict = field(default_factory=dict)
    message: str = "a fault of the test"
    cut_after: int | None = None  # bytes of the body that are read before the connection is closed without an answer
    hold: threading.Event | None = None  # set when the request has come; then nothing happens until the client is gone


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` serves on hub.url. `requests` holds (method, path, bytes of body) of every one, as it came."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.blobs, self.parts, self.requests, self.faults = {}, {}, {}, [], []
        self.forgets_commits = self.forgets_large_files = self.spoils_large_files = self.forgets_tags = False
        self.spoils_middles = self.forgets_deletions = False
        self.lock = threading.RLock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Quiet: cut connections are the point of some tests."""

    def fail(self, method, path, **fields):
        self.faults.append(Fault(method, re.compile(path), **fields))

    def sent(self, method, path):
        """Bytes of the requests whose path matches, in order."""
        return [size for seen, where, size in self.requests if seen == method and re.search(path, where)]

    # --- repositories ---

    def repo(self, kind, name):
        return self.repos.get((kind, name))

    def add(self, kind, name, files, private=False, message="by hand"):
        """A commit with these files ({path: bytes}; all large ones that end in .safetensors or .json over 1 kB), and its id."""
        repo = self.repos.setdefault((kind, name), {"private": private, "commits": [], "tags": {}, "locked": False})
        entries = {path: self.entry(data, large(path, len(data))) for path, data in files.items()}
        return self.commit(repo, (repo["commits"][-1]["files"] if repo["commits"] else {}) | entries, message)

    def entry(self, data, is_large):
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return {"sha256": sha256, "size": len(data), "large": is_large, "blob": blob_id(data)}

    def commit(self, repo, files, message):
        made = hashlib.sha1(f"{time.time_ns()}{message}{len(repo['commits'])}".encode()).hexdigest()
        repo["commits"].append({"id": made, "files": files, "message": message})
        return made


def large(path, size):
    return path.endswith((".safetensors", ".bin", ".gguf")) or size > 1_000_000


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        """Quiet."""

    # --- in and out ---

    def handle_one(self):
        address = urlsplit(self.path)
        self.query, path = parse_qs(address.query), unquote(address.path)
        fault = next((f for f in self.server.faults if f.times and f.method == self.command and f.path.search(path)), None)
        if fault:
            fault.times -= 1
            if fault.hold:
                self.rfile.read(1_000_000)
                fault.hold.set()
                time.sleep(60)
            if fault.cut_after is not None:
                self.server.requests.append((self.command, path, len(self.rfile.read(fault.cut_after))))
                self.close_connection = True
                self.connection.close()
                return
        body = self.body()
        self.server.requests.append((self.command, path, len(body)))
        if fault:
            self.error(fault.status, fault.message, headers=fault.headers)
            return
        with self.server.lock:
            self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        whole = bytearray()
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(whole)

    def answer(self, value, status=200, headers=None):
        self.raw(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def raw(self, data, status=200, headers=None, length=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data) if length is None else length)} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status, message, code=None, headers=None):
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer({"error": message}, status, named | (headers or {}))

    @property
    def user(self):
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    # --- routes ---

    def route(self, path, body):
        if path.startswith("/storage/"):
            return self.storage(path, body)
        if self.headers.get("Authorization") and not self.user:
            return self.error(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            if not self.user:
                return self.error(401, "Invalid username or password.")
            return self.answer(
                {"type": "user", "name": self.user[0], "orgs": [], "auth": {"accessToken": {"role": self.user[1]}}}
            )
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/([^/]+)(?:/(.*))?)?", path):
            kind, name, call, rest = match.groups()
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, call, rest = "dataset" if match[1] else "model", match[2], "resolve", f"{match[3]}/{match[4]}"
        else:
            return self.error(404, f"the test's Hub has no {self.command} {path}")
        repo = self.server.repo(kind, name)
        if repo is None or (repo["private"] and (not self.user or self.user[0] != name.split("/")[0])):
            return self.error(404, "Repository not found", "RepoNotFound")
        return getattr(self, f"on_{(call or 'info').replace('-', '_')}")(name, repo, rest or "", body)

    def create(self, asked):
        owner, name = asked.get("organization") or self.user[0], asked["name"]
        if owner != self.user[0]:
            return self.error(403, f"You don't have the rights to create a model under the namespace {owner}")
        if self.server.repo("model", f"{owner}/{name}"):
            return self.answer({"error": "You already created this model repo", "url": f"{self.server.url}/{owner}/{name}"}, 409)
        self.server.add("model", f"{owner}/{name}", {".gitattributes": b"* text=auto\n"}, asked["visibility"] == "private")
        return self.answer({"url": f"{self.server.url}/{owner}/{name}", "id": f"{owner}/{name}"})

    def may_write(self, name):
        return self.user and self.user == (name.split("/")[0], "write")

    def at(self, repo, revision):
        if revision in ("main", "HEAD", ""):
            return repo["commits"][-1]
        revision = repo["tags"].get(revision, revision)
        found = next((commit for commit in repo["commits"] if commit["id"] == revision), None)
        if found is None:
            self.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def on_info(self, name, repo, rest, body):
        if commit := self.at(repo, rest):
            siblings = [{"rfilename": path} for path in sorted(commit["files"])]
            private = {"private": repo["private"], "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
            self.answer({"_id": "0", "id": name, "sha": commit["id"], "siblings": siblings} | private)

    on_revision = on_info

    def on_refs(self, name, repo, rest, body):
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": commit} for tag, commit in repo["tags"].items()]
        head = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo["commits"][-1]["id"]}
        self.answer({"branches": [head], "tags": tags, "converts": []})

    def on_tag(self, name, repo, rest, body):
        tag = json.loads(body)["tag"]
        if not self.may_write(name):
            return self.error(403, "Forbidden")
        if tag in repo["tags"]:
            return self.error(409, "Tag reference exists already")
        if commit := self.at(repo, rest):
            repo["tags"] |= {} if self.server.forgets_tags else {tag: commit["id"]}
            self.answer({})
        return None

    @staticmethod
    def listed(path, entry):
        line = {"type": "file", "path": path, "size": entry["size"], "oid": entry["blob"]}
        return line | ({"lfs": {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}} if entry["large"] else {})

    def on_tree(self, name, repo, rest, body):
        revision, _, folder = rest.partition("/")
        if commit := self.at(repo, revision):
            deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
            files = {path: entry for path, entry in commit["files"].items() if path.startswith(f"{folder}/" if folder else "")}
            start = len(folder) + 1 if folder else 0
            named = self.query.get("expand", ["false"])[0].lower() in ("true", "1")
            shown = [
                self.listed(path, entry) | ({"lastCommit": self.last_commit(repo, commit, path)} if named else {})
                for path, entry in files.items()
                if deep or "/" not in path[start:]
            ]
            folders = {path[: path.index("/", start)] for path in files if "/" in path[start:]}
            self.answer([{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)] + shown)

    @staticmethod
    def last_commit(repo, commit, path):
        """The commit that gave the file the content it has in `commit`."""
        history = repo["commits"][: repo["commits"].index(commit) + 1]
        before = [{"files": {}}, *history]
        changed = [one for old, one in zip(before, history, strict=False) if old["files"].get(path) != one["files"].get(path)]
        return {"id": changed[-1]["id"], "title": changed[-1]["message"], "date": "2026-01-01T00:00:00.000Z"}

    def on_paths_info(self, name, repo, rest, body):
        if commit := self.at(repo, rest):
            form = self.headers.get("Content-Type", "").startswith("application/json")
            wanted = json.loads(body)["paths"] if form else parse_qs(body.decode()).get("paths", [])
            self.answer([self.listed(path, commit["files"][path]) for path in wanted if path in commit["files"]])

    def on_preupload(self, name, repo, rest, body):
        if not self.may_write(name):
            return self.error(403, "You don't have write access to this repository")
        files = [{"path": file["path"], "size": file["size"]} for file in json.loads(body)["files"]]
        modes = [{"path": f["path"], "uploadMode": "lfs" if large(f["path"], f["size"]) else "regular"} for f in files]
        return self.answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})

    def batch(self, asked):
        objects = []
        for wanted in asked["objects"]:
            found, oid, href = {"oid": wanted["oid"], "size": wanted["size"]}, wanted["oid"], f"{self.server.url}/storage/"
            if oid not in self.server.blobs:
                upload = {"href": href + oid}
                if wanted["size"] > PART:
                    count = -(-wanted["size"] // PART)
                    parts = {str(number): f"{href}{oid}/{number}" for number in range(1, count + 1)}
                    upload = {"href": href + oid, "header": {"chunk_size": str(PART)} | parts}
                found["actions"] = {"upload": upload}
            objects.append(found)
        self.answer({"transfer": "basic", "objects": objects})

    def storage(self, path, body):
        oid, _, number = path.removeprefix("/storage/").partition("/")
        if number:
            self.server.parts[oid, int(number)] = body
            return self.raw(b"", headers={"ETag": hashlib.md5(body).hexdigest()})
        if self.command == "POST":
            numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
            body = b"".join(self.server.parts.pop((oid, number)) for number in numbers)
        if hashlib.sha256(body).hexdigest() != oid:
            return self.error(400, "what came has another sha256")
        spoiled = bytes(len(body)) if self.server.spoils_large_files else body
        if self.server.spoils_middles and len(body) > 1_000_000:
            spoiled = body[: len(body) // 2] + bytes(1000) + body[len(body) // 2 + 1000 :]
        self.server.blobs[oid] = None if self.server.forgets_large_files else spoiled
        return self.answer({})

    def on_commit(self, name, repo, rest, body):
        if not self.may_write(name):
            return self.error(403, "You don't have write access to this repository")
        files, message = dict(repo["commits"][-1]["files"]), ""
        for line in body.decode().splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = self.server.entry(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return self.error(400, f"the large file {value['path']} was never sent")
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {value['size']}\n"
                stored = {"sha256": value["oid"], "size": value["size"], "large": True, "blob": blob_id(pointer.encode())}
                files[value["path"]] = stored
            elif key == "deletedFile" and not self.server.forgets_deletions:
                files.pop(value["path"])
        commit = "f" * 40 if self.server.forgets_commits else self.server.commit(repo, files, message)
        return self.answer({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})

    def on_resolve(self, name, repo, rest, body):
        revision, _, path = rest.partition("/")
        if not (commit := self.at(repo, revision)):
            return None
        entry, named = commit["files"].get(path), {"X-Repo-Commit": commit["id"]}
        if entry is None:
            return self.error(404, "Entry not found", "EntryNotFound", named)
        data = self.server.blobs[entry["sha256"]]
        if data is None:
            return self.error(404, "The object is not in the storage")
        etag = entry["sha256"] if entry["large"] else entry["blob"]
        named |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if entry["large"]:
            named |= {"X-Linked-Size": str(entry["size"]), "X-Linked-Etag": f'"{etag}"'}
        if not entry["large"] and "gzip" in self.headers.get("Accept-Encoding", ""):
            return self.raw(gzip.compress(data), 200, named | {"Content-Encoding": "gzip"})
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            named["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.raw(data[start : end + 1], 206, named)
        return self.raw(data, 200, named)
