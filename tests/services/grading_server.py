"""A run whose answers are written by hand, and the grading page's server for it, as a process whose sockets are watched."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import subprocess
import sys
import urllib.request
from types import SimpleNamespace
from urllib.parse import urlsplit

from medcot_utils.config import load_config
from medcot_utils.run.directory import Run

ATTACK = (
    "<script>document.title = 'owned'</script> <img src=http://evil.example/a.png onerror=\"document.title = 'owned'\"> "
    "![x](http://evil.example/b.png) **bold** {{value}} ${1 + 1} &lt; $x^2$ \\(y\\)"
)
FIRST = {"thinking": "A thought, then <b>another</b>.", "answer": "The mitral valve.\n\n1. Echo\n2. Surgery"}
SECOND = {"thinking": f"Thinking: {ATTACK}", "answer": ATTACK}
IDS = ("article", "q0", "q1", "q2")  # in the run; the page shows the one that is not scored last
# What the server binds, connects to or looks up goes to a file: every socket of the process passes this hook.
SERVER = """
import sys
from pathlib import Path
seen = open(sys.argv[2], "a", buffering=1)
def hook(event, arguments):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        address = arguments[1] if event in ("socket.bind", "socket.connect", "socket.sendto") else arguments[0]
        print(event, address[0] if isinstance(address, tuple) else address, file=seen)
sys.addaudithook(hook)
from medcot_utils.cli.grading_page import serve
from medcot_utils.run.directory import Run
serve(Run.open(sys.argv[1]), int(sys.argv[4]), grader=sys.argv[3], open_browser=bool(sys.argv[5:]))
"""


def fill(path, seed=42, base=FIRST, tuned=SECOND):
    """A run with three scored questions and one shown only, whose answers are written by hand."""
    run = Run.create(path, load_config("smoke", [f"seed={seed}"]))
    question = {"specialty": "cardiology & <i>more</i>", "Response": "The reference says <mitral>."}
    run.write("questions", [question | {"id": i, "scored": i != "article", "Question": f"Which valve, {i} < 9?"} for i in IDS])
    for name in ("train_rows", "held_out_rows"):
        run.write(name, lambda file: file.write_bytes(b"rows"))
    run.write("data_report", {"repeats": [], "repeats_dropped": True})
    run.write("adapter", lambda folder: (folder / "weights.bin").write_bytes(b"0"))
    for name, texts in (("base_answers", base), ("tuned_answers", tuned)):
        run.write(
            name,
            [{"id": i, "sample": 0, "thinking": f"{i}: {texts['thinking']}", "answer": f"{i}: {texts['answer']}"} for i in IDS],
        )
    return run


@contextlib.contextmanager
def serving(run, grader="grader", port=0, browser=None):
    """The page's server as a process: its address, what it printed, and every address its sockets touched."""
    seen, errors = run.path.parent / "sockets.txt", run.path.parent / "stderr.txt"
    environment = {**os.environ, "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ANALYTICS_ENABLED": "True"}
    environment["BROWSER"] = browser or ""
    command = [sys.executable, "-W", "error::UserWarning", "-c", SERVER]
    with errors.open("a") as stderr:
        process = subprocess.Popen(
            [*command, str(run.path), str(seen), grader, str(port), *(["open"] if browser else [])],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
    try:
        said = ""
        while "grading page" not in said:
            line = process.stdout.readline()
            assert line, errors.read_text()
            said += line
        address = re.search(r"http://127\.0\.0\.1:(\d+)/(?:[0-9a-f]{64}/)?", said)
        yield SimpleNamespace(process=process, address=address[0], port=int(address[1]), said=said)
        touched = seen.read_text().splitlines()
        assert "socket.bind 127.0.0.1" in touched
        assert [line for line in touched if line.split()[-1] != "127.0.0.1"] == []
        assert errors.read_text() == ""
    finally:
        process.kill()
        process.communicate()


def client(server):
    """`click("a", token, note)` gives what the page gets: token, heading, question, answers, thoughts, reference, note."""
    from gradio_client import Client

    found = Client(server.address, verbose=False)
    return lambda act, *given: found.predict(*given, api_name=f"/{act}")


def get(address):
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.read().decode()


def ask(address, path, body=None, **headers):
    """(status, text) of one request by hand, with whatever headers."""
    found = urlsplit(address)
    connection = http.client.HTTPConnection(found.hostname, found.port, timeout=30)
    connection.request("GET" if body is None else "POST", found.path + path, body, headers)
    with contextlib.closing(connection), connection.getresponse() as answer:
        return answer.status, answer.read().decode()
