"""The grading page for real: its own process, the gradio client's clicks, SIGKILL, no way out, and no way in for anyone else."""

from __future__ import annotations

import itertools
import json
import re
import signal
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
from grading_server import FIRST, SECOND, ask, client, fill, get, serving

from medcot_utils.config import load_config
from medcot_utils.evaluation.grades import GRADES, read_grades, read_pairs, summarize_grades
from medcot_utils.run.directory import Run

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
