"""The grading page for real: its own process, the gradio client's clicks, a headless Chromium, SIGKILL, no way out, and no way
in for anyone else."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from browsers import CHROMIUM, find_barriers, needs_axe, needs_chromium

from medcot_utils.config import load_config
from medcot_utils.evaluation.grades import GRADES, read_grades, read_pairs, summarize_grades
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


# --- clicks ----------------------------------------------------------------------------------------------------------


def test_clicks_are_kept_corrected_and_counted(tmp_path):
    run = fill(tmp_path / "run")
    pairs = {pair.id: pair for pair in read_pairs(run)}
    with serving(run, "Dr. Ü") as server:
        click = client(server)
        assert "0 of 4 questions judged by Dr. Ü" in server.said
        first = click("current")
        assert first[1].startswith("<p>Question 1 of 4, 0 of 4 judged") and "cardiology &amp; &lt;i&gt;" in first[1]
        assert "q0 &lt; 9?" in first[2] and "&lt;mitral&gt;" not in "".join(first)
        assert "&lt;mitral&gt;" in click("reference", first[0])
        second = click("a", first[0], " a note ")
        assert "q1" in second[2] and second[-1] == "" and "Question 2 of 4, 1 of 4" in second[1]
        third = click("skip", second[0], "")
        assert "q2" in third[2]
        back = click("back", third[0], "")
        assert back[0] == first[0] and "you said: A better" in back[1] and back[-1] == "a note"
        assert click("b", back[0], "corrected")[0] == second[0], "on with the first that is not judged"
        shown_only = click("both_wrong", third[0], "")
        assert "article" in shown_only[2] and "shown, not scored" in shown_only[1]
        assert click("a", shown_only[0], "")[0] == second[0], "what was skipped comes at the end"
        done = click("tie", second[0], "")
        assert done[0] == "" and done[1].startswith("<p>4 of 4 judged") and "".join(done[2:]) == ""
        assert click("back", "", "")[0] == second[0]
        # The run's files are no part of the page.
        for file in (GRADES, "base_answers.jsonl"):
            with pytest.raises(urllib.error.HTTPError):
                get(f"{server.address}gradio_api/file={run.path / file}")
        server.process.send_signal(signal.SIGINT)
        assert "4 of 4 questions judged" in server.process.communicate(timeout=30)[0]
        assert server.process.returncode == 0
    a, b = pairs["q0"].shown
    lines = [json.loads(line) for line in (run.path / GRADES).read_text().splitlines()]
    assert [(line["id"], line["verdict"], line["note"]) for line in lines] == [
        ("q0", a, "a note"),
        ("q0", b, "corrected"),
        ("q2", "both_wrong", ""),
        ("article", pairs["article"].shown[0], ""),
        ("q1", "tie", ""),
    ]
    for line in lines:
        assert list(line) == ["id", "verdict", "note", "shown_as_a", "grader", "at", "answers"]
        assert line["shown_as_a"] == pairs[line["id"]].shown[0] and line["answers"] == pairs[line["id"]].digest
        assert line["grader"] == "Dr. Ü"
    assert summarize_grades(run).counts == {"base": 0, "tuned": 0, "tie": 1, "both_wrong": 1, "split": 0} | {b: 1}


def test_a_kill_between_two_clicks_loses_nothing(tmp_path):
    run = fill(tmp_path / "run")
    with serving(run) as server:
        click = client(server)
        later = click("tie", click("current")[0], "kept")
        server.process.kill()
        server.process.wait(30)
    assert [(grade.id, grade.note) for grade in read_grades(run)] == [("q0", "kept")]
    with (run.path / GRADES).open("a") as stream:  # killed within a write
        stream.write('{"id":"q1","verdict":"ti')
    changed = run.read("base_answers")
    changed[3]["answer"] = "Another answer to q2."
    run.write("base_answers", changed)
    with serving(run) as server:
        assert "1 line(s) set aside" in server.said and "1 of 4 questions judged" in server.said
        click = client(server)
        now = click("current")
        assert now[0] == later[0], "the second question, by the same name: an open page goes on too"
        third = click("b", later[0], "")
        assert "Another answer to q2." in "".join(third)
        # A page that still shows the answers of before: its click is no judgement of the new ones.
        old = click("a", "0" * 64, "")
        assert "nothing was saved" in old[1] and old[0] == third[0]
        (run.path / GRADES).rename(run.path / "aside")
        (run.path / GRADES).mkdir()
        again = click("a", third[0], "my note")
        assert again[0] == third[0] and again[-1] == "my note"
        assert "Not saved: grades.jsonl cannot be written (Is a directory)" in again[1]
        assert click("current")[0] == third[0]
        (run.path / GRADES).rmdir()
        (run.path / "aside").rename(run.path / GRADES)
        click("a", third[0], "")
    assert [grade.id for grade in read_grades(run)] == ["q0", "q1", "q2"]


# --- others on the machine, and other websites -----------------------------------------------------------------------


def ask(address, path, body=None, **headers):
    """(status, text) of one request by hand, with whatever headers."""
    found = urlsplit(address)
    connection = http.client.HTTPConnection(found.hostname, found.port, timeout=30)
    connection.request("GET" if body is None else "POST", found.path + path, body, headers)
    with contextlib.closing(connection), connection.getresponse() as answer:
        return answer.status, answer.read().decode()


def test_nobody_else_can_grade_or_read(tmp_path):
    run = fill(tmp_path / "run")
    first = read_pairs(run)[0]
    click = json.dumps({"data": [first.token, "not mine"]}).encode()
    as_json = {"Content-Type": "application/json"}
    with serving(run) as server:
        here = f"127.0.0.1:{server.port}"
        # Another user of the machine knows the port, and not the token: neither none nor another one will do.
        for known in (f"http://{here}/", f"http://{here}/{'0' * 64}/"):
            for path in ("", "config", "gradio_api/info", "theme.css", "gradio_api/queue/data?session_hash=x"):
                status, text = ask(known, path)
                assert status == 403 and "the whole address that medcot printed" in text
            assert ask(known, "gradio_api/run/tie", click, **as_json)[0] == 403
        # A website, open in a browser here, whose name resolves to this machine (DNS rebinding), or which only sends.
        for headers in (
            {"Host": "evil.example"},
            {"Host": f"evil.example:{server.port}"},
            {"Host": f"127.0.0.1.evil.example:{server.port}"},
            {"Origin": "http://evil.example"},
            {"Origin": "http://localhost:1"},  # a page of another user's server on this machine
            {"Origin": f"https://{here}"},
            {"Origin": "null"},
        ):
            assert ask(server.address, "config", **headers)[0] == 403, headers
            assert ask(server.address, "gradio_api/run/tie", click, **as_json, **headers)[0] == 403, headers
        assert read_grades(run) == []
        # The page itself, and the same one through a tunnel.
        for headers in ({}, {"Origin": f"http://{here}"}, {"Host": "localhost:8000", "Origin": "http://localhost:8000"}):
            status, text = ask(server.address, "gradio_api/run/tie", click, **as_json, **headers)
            assert status == 200, text
        assert [grade.note for grade in read_grades(run)] == ["not mine"] * 3


def test_nothing_can_be_uploaded_and_sizes_have_bounds(tmp_path):
    run = fill(tmp_path / "run")
    token = read_pairs(run)[0].token
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'

    def tie(note):
        body = json.dumps({"data": [token, note]}).encode()
        return ask(server.address, "gradio_api/run/tie", body, **{"Content-Type": "application/json"})

    with serving(run) as server:
        status, text = ask(server.address, "gradio_api/upload", form, **{"Content-Type": "multipart/form-data; boundary=x"})
        assert status == 403 and "takes only questions and judgments" in text
        assert ask(server.address, "gradio_api/component_server", b"{}")[0] == 403
        assert tie("x" * (1 << 20))[0] == 413
        status, text = tie("x" * 20_001)
        assert status == 200 and "Not saved: the note is too long: at most 20,000 characters" in text
        assert read_grades(run) == []
        assert tie("é" * 20_000)[0] == 200
        assert [len(grade.note) for grade in read_grades(run)] == [20_000]


def test_the_browsers_command_line_does_not_hold_the_address(tmp_path):
    """Every user of the machine can read it; the file that it names, only this one."""
    browser = tmp_path / "browser"
    browser.write_text('#!/bin/sh\necho "$1" > "$0.line"\nf="${1#file://}"\ncp -p "$f" "$0.page"\n')
    browser.chmod(0o755)
    with serving(fill(tmp_path / "run"), browser=f"{browser} %s") as server:
        for _ in range(100):
            if (tmp_path / "browser.page").exists():
                break
            time.sleep(0.1)
        token = urlsplit(server.address).path.strip("/")
        assert token and token not in (tmp_path / "browser.line").read_text()
        page = tmp_path / "browser.page"
        assert f"url={server.address}" in page.read_text() and page.stat().st_mode & 0o077 == 0


# --- blindness -------------------------------------------------------------------------------------------------------


def received(server):
    """All that a page gets: itself, gradio's configuration and API, and the answer to each kind of click."""
    click = client(server)
    texts = [get(server.address + path) for path in ("", "config", "gradio_api/info", "theme.css")]
    views = [click("current")]
    for act in ("reference", "skip", "a", "back", "b", "tie", "both_wrong", "a", "back"):
        views.append(click(act, *([views[-1][0]] if act == "reference" else [views[-1][0], "a note"])))
        if act == "reference":
            views.append(views[-2])
    text = "\n".join([*texts, json.dumps(views)])
    return re.sub(r'"app_id":\s*\d+', "", text).replace(server.address.rstrip("/"), "")


def test_the_page_cannot_tell_which_model_is_which(tmp_path):
    """Two runs whose texts are exchanged between the models, and every coin with them: the page must be the same one."""
    run = fill(tmp_path / "one" / "run")
    sides = [pair.shown[0] for pair in read_pairs(run)]
    assert len(set(sides)) == 2
    configs = (load_config("smoke", [f"seed={seed}"]) for seed in itertools.count())
    seed = next(c.seed for c in configs if all(p.shown[1] == s for p, s in zip(read_pairs(Run(run.path, c)), sides, strict=True)))
    other = fill(tmp_path / "two" / "run", seed, base=SECOND, tuned=FIRST)
    with serving(run) as server:
        one = received(server)
    with serving(other) as server:
        two = received(server)
    assert "The mitral valve." in one and "<gradio-app" in one
    assert one == two
    assert [g.verdict for g in read_grades(run)] != [g.verdict for g in read_grades(other)], "the files do tell"
    assert "tuned" not in one.lower() and str(tmp_path) not in one
    assert set(re.findall(r".?\bbase\b.{8}", one)) == {'<base href=".'}, "nothing but the tag that every gradio page has"


# --- a browser -------------------------------------------------------------------------------------------------------


# What has the focus, by its label, and whether that is seen: by an outline, a shadow or the caret of a text box.
FOCUSED = """(() => {
  const one = document.activeElement, style = getComputedStyle(one);
  if (one === document.body) return ["", true];  // past the last one, before it begins again
  const seen = style.outlineStyle !== "none" || style.boxShadow !== "none" || one.matches("textarea, input, select");
  return [(one.labels?.[0] ?? one).innerText.trim().split("\\n")[0], seen];
})()"""


class Browser:
    """Headless Chromium on its DevTools pipe (NUL-ended JSON on descriptors 3 and 4): a page that is clicked and looked at."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --remote-debugging-pipe --window-size=1280,1100"
    )

    def __init__(self, profile):
        (there, self.write), (self.read, back) = os.pipe(), os.pipe()

        def descriptors():
            high = [os.dup(there) for _ in range(8)][-1], [os.dup(back) for _ in range(8)][-1]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *self.FLAGS.split(), f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=descriptors,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self.session, self.buffer, self.number, self.requested, self.refused = None, b"", 0, [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Network.enable")
        self.call("Page.enable")

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                block = os.read(self.read, 1 << 16)
                assert block, "chromium is gone"
                self.buffer += block
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("method") == "Network.loadingFailed":
                self.refused.append(f"blocked: {answer['params'].get('blockedReason')}")
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, code):
        return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def until(self, code):
        for _ in range(200):
            if found := self.js(code):
                return found
            time.sleep(0.1)
        pytest.fail(f"never: {code}\n{self.text()}")

    def text(self):
        return self.js("document.body.innerText")

    def press(self, label):
        self.js(f"[...document.querySelectorAll('button')].find(b => b.innerText.trim().startsWith({label!r})).click()")

    def key(self, name):
        """Press Tab, Enter or a space, as on the keyboard."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}[name]
        how = {"key": name, "code": {" ": "Space"}.get(name, name), "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **how)
        self.call("Input.dispatchKeyEvent", type="keyUp", **how)

    def tab_to(self, label):
        """Tab until the focus, which must be seen, is on what begins with a label; return the labels on the way."""
        passed = []
        for _ in range(30):
            self.key("Tab")
            name, seen = self.js(FOCUSED)
            assert seen, f"nobody sees that {name!r} has the focus"
            if name.startswith(label):
                return passed
            passed += [name] if name else []
        pytest.fail(f"never reached: {label}, only {passed}")

    def show_as(self, width, scheme):
        """Show the page that wide, in a light or dark color scheme."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        import base64

        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)


@needs_chromium
def test_a_browser_shows_the_texts_verbatim_and_keeps_the_clicks(tmp_path):
    run = fill(tmp_path / "run")
    pairs = read_pairs(run)
    with contextlib.closing(Browser(tmp_path / "profile")) as browser:
        with serving(run) as server:
            browser.call("Page.navigate", url=server.address)
            browser.until("document.body && document.body.innerText.includes('Question 1 of 4')")
            text = browser.text()
            for expected in ("Which valve, q0 < 9?", "cardiology & <i>more</i>", f"q0: {FIRST['answer']}", f"q0: {ATTACK}"):
                assert expected in text
            assert browser.js("document.title") == "Blind grading"
            assert browser.js("document.querySelectorAll('.text *, .tag *, img[src*=evil]').length") == 0
            assert "then <b>another" not in text and "The reference says" not in browser.js("document.documentElement.outerHTML")
            seen = browser.js("document.documentElement.outerHTML")
            assert "tuned" not in seen.lower() and re.findall(r"\bbase\b(?! href)", seen) == []
            left = browser.js("[...document.querySelectorAll('.panel')].map(e => e.innerText)")[0]
            assert pairs[0].answers[pairs[0].shown[0]]["answer"].strip() in left, "A is what will be written down as A"
            browser.screenshot(tmp_path / "wide.png")

            browser.press("Thinking of A")
            browser.press("Thinking of B")
            browser.until("document.body.innerText.includes('then <b>another</b>')")
            assert f"Thinking: {ATTACK}" in browser.text()
            browser.press("Show the reference")
            browser.until("document.body.innerText.includes('The reference says <mitral>.')")
            browser.js("document.querySelector('textarea[placeholder=optional]').focus()")
            browser.call("Input.insertText", text="from the page")
            browser.screenshot(tmp_path / "open.png")
            browser.press("B better")
            browser.until("document.body.innerText.includes('Question 2 of 4, 1 of 4')")
            text = browser.text()
            assert "q1 < 9?" in text and "then <b>another" not in text and "The reference says" not in text, "folded again"
            assert browser.js("document.querySelector('textarea[placeholder=optional]').value") == ""
            assert [(g.id, g.verdict, g.note) for g in read_grades(run)] == [("q0", pairs[0].shown[1], "from the page")]

            browser.press("Back")
            browser.until("document.body.innerText.includes('you said: B better')")
            assert browser.js("document.querySelector('textarea[placeholder=optional]').value") == "from the page"

            browser.until("!document.body.innerText.includes('Not saved')")
            (run.path / GRADES).rename(run.path / "aside")
            (run.path / GRADES).symlink_to("/dev/full")
            browser.press("Tie")
            browser.until(
                "document.body.innerText.includes('Not saved: grades.jsonl cannot be written (No space left on device)')"
            )
            assert "Question 1 of 4" in browser.text() and "q0 < 9?" in browser.text()
            assert browser.js("document.querySelector('textarea[placeholder=optional]').value") == "from the page"
            (run.path / GRADES).unlink()
            (run.path / "aside").rename(run.path / GRADES)
            assert len(read_grades(run)) == 1

            phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
            browser.call("Emulation.setDeviceMetricsOverride", **phone)
            browser.until("document.documentElement.clientWidth === 390")
            assert browser.js("document.documentElement.scrollWidth") == 390, "nothing to scroll sideways"
            browser.screenshot(tmp_path / "phone.png")
            for label, number in (("A better", 2), ("Tie", 3), ("Both wrong", 4)):
                browser.press(label)
                browser.until(f"document.body.innerText.includes('Question {number} of 4')")
            assert [g.verdict for g in read_grades(run)][1:] == [pairs[0].shown[0], "tie", "both_wrong"]

            server.process.kill()
        with serving(run, port=server.port) as server:
            browser.press("A better")  # on the page that was open all along: its address is no longer good
            time.sleep(1)
            assert len(read_grades(run)) == 4
            browser.call("Page.navigate", url=server.address)
            browser.until("document.body && document.body.innerText.includes('Question 4 of 4, 3 of 4')")
            browser.press("A better")
            browser.until("document.body.innerText.includes('4 of 4 judged. That was the last one')")
            assert [(g.id, g.verdict) for g in read_grades(run)][4:] == [("article", pairs[-1].shown[0])]
            browser.screenshot(tmp_path / "done.png")
            policy = urllib.request.urlopen(server.address, timeout=30).headers["Content-Security-Policy"]

        assert len(browser.requested) > 10
        own = f"http://127.0.0.1:{server.port}/"
        assert [url for url in browser.requested if not url.startswith((own, "data:", "blob:"))] == []
        # Were anything to ask, the browser would refuse: also an address of this machine that is not the page's own.
        browser.js("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/c.png', id: 'out'}))")
        browser.until("document.getElementById('out').complete")
        assert "blocked" in "".join(browser.refused)
        assert policy.startswith("default-src 'self' ") and "*" not in policy and "http" not in policy


@needs_chromium
@needs_axe
def test_axe_finds_no_serious_barrier_on_the_grading_page(tmp_path):
    with contextlib.closing(Browser(tmp_path / "profile")) as browser, serving(fill(tmp_path / "run")) as server:
        for width, scheme in ((1280, "light"), (1280, "dark"), (360, "dark")):
            browser.show_as(width, scheme)
            browser.call("Page.navigate", url=server.address)
            browser.until("document.body && document.body.innerText.includes('Question 1 of 4')")
            browser.press("Thinking of A")
            browser.press("Show the reference")
            browser.until("document.body.innerText.includes('The reference says')")
            assert find_barriers(browser) == []
        browser.js("document.querySelector('h2').style.color = '#333'")
        assert [found.split(":")[0] for found in find_barriers(browser)] == ["serious color-contrast"], "it can find one"


@needs_chromium
def test_the_grading_page_can_be_used_with_the_keyboard(tmp_path):
    run = fill(tmp_path / "run")
    with contextlib.closing(Browser(tmp_path / "profile")) as browser, serving(run) as server:
        browser.call("Page.navigate", url=server.address)
        browser.until("document.body && document.body.innerText.includes('Question 1 of 4')")
        browser.tab_to("Thinking of A")
        browser.key("Enter")
        browser.until("document.querySelectorAll('.open').length === 1")
        assert browser.tab_to("A better") == ["Thinking of B", "Show the reference response", "Note"]
        browser.key(" ")
        browser.until("document.body.innerText.includes('Question 2 of 4, 1 of 4')")
    assert len(read_grades(run)) == 1
