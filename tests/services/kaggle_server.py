"""A Kaggle on the loopback for the real client: it takes kernels, tells of their sessions, and serves what they left."""

from __future__ import annotations

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

USER = "ann"
PAGE = 3  # few files a page, so that a run's output takes several


class KaggleServer(ThreadingHTTPServer):
    """`saved`: the kernels that were taken. `answers`: {call: (status, JSON)} puts another answer in place of the good one.
    `output`: the folder that is a session's output; `broken` names a file of it that answers with 500."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.saved: list[dict] = []
        self.answers: dict[str, tuple[int, dict]] = {}
        self.output: Path | None = None
        self.fetched: list[str] = []
        self.broken = ""
        self.token = "KGAT_for_the_test"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self, home: Path) -> dict[str, str]:
        """What sends the real client here: its LOCALHOST has a fixed name, so this server stands as its proxy."""
        kept = {name: value for name, value in os.environ.items() if name.lower() not in ("no_proxy", "https_proxy")}
        kept |= {"HOME": str(home), "http_proxy": f"http://127.0.0.1:{self.server_port}"}
        return kept | {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "KAGGLE_API_TOKEN": self.token, "COLUMNS": "200"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: KaggleServer

    def log_message(self, *arguments):
        """Quiet."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        call = self.path.rsplit("/", 1)[1]
        answer = getattr(self, f"_{call}", None)
        if call == "IntrospectToken":
            known = body.get("token") == self.server.token
            self._json(200, {"active": known, "username": USER if known else ""})
        elif call in self.server.answers:
            self._json(*self.server.answers[call])
        elif answer is None:
            self._json(404, {"code": 404, "message": f"no such call: {call}"})
        else:
            self._json(200, answer(body))

    def do_GET(self):
        name = unquote(urlsplit(self.path).path).removeprefix("/output/")
        self.server.fetched.append(name)
        if name == self.server.broken:
            self._bytes(500, b"Internal error", "text/plain")
        else:
            self._bytes(200, (self.server.output / name).read_bytes(), "application/octet-stream")

    def _SaveKernel(self, body):
        self.server.saved.append(body)
        url = "https://www.kaggle.com/code/" + body["slug"]
        return {"ref": body["slug"], "url": url, "versionNumber": len(self.server.saved), "error": ""}

    def _GetKernelSessionStatus(self, body):
        return {"status": "COMPLETE", "failureMessage": ""}

    def _ListKernelSessionOutput(self, body):
        files = sorted(p.relative_to(self.server.output).as_posix() for p in self.server.output.rglob("*") if p.is_file())
        first = int(body.get("pageToken") or 0)
        root = f"http://127.0.0.1:{self.server.server_port}/output/"
        page = [{"url": root + quote(name), "fileName": name} for name in files[first : first + PAGE]]
        more = str(first + PAGE) if first + PAGE < len(files) else ""
        return {"files": page, "log": "[]", "nextPageToken": more}

    def _json(self, status, value):
        self._bytes(status, json.dumps(value).encode(), "application/json")

    def _bytes(self, status, data, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
