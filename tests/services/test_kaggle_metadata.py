"""kernel-metadata.json, judged by the real kaggle client: it pushes the checkout to a server on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class KaggleServer(BaseHTTPRequestHandler):
    """Takes the token and a kernel, and keeps what was sent; refuses all else."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Quiet."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        call = self.path.rsplit("/", 1)[1]
        if call == "IntrospectToken":
            self.answer(200, {"active": True, "username": "medcot"})
        elif call == "SaveKernel":
            self.server.saved.append(body)
            url = "https://www.kaggle.com/code/" + body["slug"]
            self.answer(200, {"ref": body["slug"], "url": url, "versionNumber": 1, "error": ""})
        else:
            self.answer(404, {"code": 404, "message": call})

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    running = ThreadingHTTPServer(("127.0.0.1", 0), KaggleServer)
    running.saved = []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def push(server, folder, home):
    environment = {name: value for name, value in os.environ.items() if name.lower() not in ("no_proxy", "https_proxy")}
    environment |= {
        "HOME": str(home),
        "http_proxy": f"http://127.0.0.1:{server.server_port}",  # the client's LOCALHOST has a fixed name of its own
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_API_TOKEN": "KGAT_for_the_test",
    }
    command = [str(Path(sys.executable).with_name("kaggle")), "kernels", "push", "-p", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_real_client_pushes_the_checkout(server, tmp_path):
    done = push(server, ROOT, tmp_path)
    assert len(server.saved) == 1, done.stdout + done.stderr
    sent = server.saved[0]
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text())
    assert (sent["slug"], sent["newTitle"]) == (metadata["id"], metadata["title"])
    assert sent["isPrivate"] is True and sent["enableGpu"] is True and sent["enableInternet"] is True
    cells = json.loads(sent["text"])["cells"]
    assert any("medcot_utils" in "".join(cell["source"]) for cell in cells)
    assert len(sent["text"]) < 1_000_000


def test_the_real_client_refuses_metadata_without_its_notebook(server, tmp_path):
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text()) | {"code_file": "gone.ipynb"}
    (tmp_path / "kernel-metadata.json").write_text(json.dumps(metadata))
    done = push(server, tmp_path, tmp_path)
    assert server.saved == [] and "gone.ipynb" in done.stdout + done.stderr
