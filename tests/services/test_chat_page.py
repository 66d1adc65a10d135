"""The chat page for real: `medcot chat D --page` as a process, the gradio client's stream, and a headless Chromium."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
import urllib.request

import pytest
from browsers import FOCUSED, Browser, find_barriers, needs_axe, needs_chromium
from grading_server import ask

from medcot_utils.config import load_config
from medcot_utils.models.chat import WARNING
from medcot_utils.run.directory import Run

ATTACK = "<img src=http://evil.example/a.png onerror=\"document.title = 'owned'\"> **bold** ![x](http://evil.example/b.png)"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run whose adapter changes the tiny Llama: both of its models babble, each in its own way."""
    import torch

    from medcot_utils.export.merged import save_adapter
    from medcot_utils.models.engine import get_engine

    config = load_config("smoke", ["generation.max_new_tokens=60"])
    run = Run.create(tmp_path_factory.mktemp("page") / "run", config)
    run.write("questions", [])
    for name in ("train_rows", "held_out_rows"):
        run.write(name, lambda file: file.write_bytes(b"rows"))
    model, tokenizer = (engine := get_engine(config.model)).load(config.model)
    tuned = engine.add_lora(model, config.lora)
    torch.manual_seed(2)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    run.write("adapter", lambda folder: save_adapter(tuned, tokenizer, config, folder))
    return run


@contextlib.contextmanager
def serving(run, *arguments):
    """The page's address; its process is ended afterwards."""
    command = [sys.executable, "-m", "medcot_utils", "chat", str(run.path), "--page", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        while "chat page" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        assert WARNING in said
        yield re.search(r"http://127\.0\.0\.1:\d+/(?:[0-9a-f]{64}/)?", said)[0]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.model
def test_the_page_streams_both_models_with_folded_thinking(untrained):
    from gradio_client import Client

    with serving(untrained) as address:
        job = Client(address, verbose=False).submit("Why is he dizzy?", True, api_name="/ask")
        base, tuned = job.result(timeout=120)
        assert len(job.outputs()) > 3, "it came in pieces"
        for column in (base, tuned):
            assert [message["role"] for message in column] == ["user", "assistant", "assistant"]
            assert re.match(r"thinking(, not finished)?: \d+ words", column[1]["metadata"]["title"])
        assert "Why is he dizzy?" in str(tuned[0]["content"])
        assert base[1]["content"] != tuned[1]["content"]
        base, tuned = Client(address, verbose=False).predict("Why is he dizzy?", False, api_name="/ask")
        assert base == [] and len(tuned) == 3
        with pytest.raises(Exception, match="the question is empty"):
            Client(address, verbose=False).predict("  ", False, api_name="/ask")
        with pytest.raises(Exception, match="the question is too long: at most 20,000 characters"):
            Client(address, verbose=False).predict("why " * 5_001, False, api_name="/ask")
        # Another user of the machine, a website that is open in a browser here, and a file.
        question = b'{"data": ["Why?", false], "fn_index": 1, "session_hash": "x"}'
        joined, bare = "gradio_api/queue/join", address[: address.index("/", 7) + 1]
        for where, headers in ((bare, {}), (address, {"Origin": "http://evil.example"}), (address, {"Host": "evil.example"})):
            assert ask(where, "config", **headers)[0] == 403
            assert ask(where, joined, question, **{"Content-Type": "application/json"}, **headers)[0] == 403
        assert ask(address, "gradio_api/upload", b"")[0] == 403
        taken = [
            sys.executable,
            "-m",
            "medcot_utils",
            "chat",
            str(untrained.path),
            "--page",
            "--port",
            address.split(":")[2].partition("/")[0],
        ]
        done = subprocess.run(taken, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1 and re.match(
            r"medcot: port \d+ on 127\.0\.0\.1 cannot be used \(Address already", done.stderr
        )


BOX = "document.querySelector('textarea[placeholder^=\"a clinical\"]')"
BOTH_ANSWERED = "(document.body.innerText.match(/no answer|thinking: /g) || []).length >= 2"


def ask_on_page(browser, question):
    """Ask, and wait until both models have answered."""
    for _ in range(20):  # a text typed before the page listens is lost
        browser.js(f"{BOX}.value = ''; {BOX}.focus()")
        browser.call("Input.insertText", text=question)
        browser.press("Ask")
        time.sleep(1)
        if question[:10] in browser.text():
            break
    browser.until(BOTH_ANSWERED)


@pytest.mark.model
@needs_chromium
def test_a_browser_asks_and_shows_what_comes_as_plain_text(untrained, tmp_path):
    with contextlib.closing(Browser(tmp_path / "profile")) as browser, serving(untrained, "--base-too") as address:
        browser.call("Page.navigate", url=address)
        browser.until("document.body && document.body.innerText.includes('Not for clinical use')")
        browser.until("document.body.innerText.includes('base model')")
        ask_on_page(browser, f"Is this bold? {ATTACK}")
        assert ATTACK in browser.text(), "the question is shown as it was typed"
        assert browser.js("document.querySelectorAll('img[src*=evil], .message strong').length") == 0
        assert browser.js("document.title") == "medcot chat"
        browser.screenshot(tmp_path / "chat.png")
        own = address[: address.index("/", 7) + 1]
        assert [url for url in browser.requested if not url.startswith((own, "data:", "blob:"))] == []
        policy = urllib.request.urlopen(address, timeout=30).headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self' ") and "http" not in policy


@pytest.mark.model
@needs_chromium
@needs_axe
def test_axe_finds_no_serious_barrier_on_the_chat_page(untrained, tmp_path):
    with contextlib.closing(Browser(tmp_path / "profile")) as browser, serving(untrained, "--base-too") as address:
        for width, scheme in ((1280, "light"), (360, "dark")):
            browser.show_as(width, scheme)
            browser.call("Page.navigate", url=address)
            browser.until("document.body && document.body.innerText.includes('base model')")
            assert find_barriers(browser) == []
            ask_on_page(browser, "Why is he dizzy?")
            assert find_barriers(browser) == []
            assert browser.js("document.documentElement.scrollWidth") == width


@pytest.mark.model
@needs_chromium
def test_the_chat_page_can_be_used_with_the_keyboard(untrained, tmp_path):
    with contextlib.closing(Browser(tmp_path / "profile")) as browser, serving(untrained, "--base-too") as address:
        browser.call("Page.navigate", url=address)
        browser.until("document.body && document.body.innerText.includes('base model')")
        ask_on_page(browser, "Why is he dizzy?")
        browser.js(f"{BOX}.focus()")
        browser.call("Input.insertText", text=" Since when?")
        browser.key("Tab")
        assert browser.js(FOCUSED) == ["Ask", True]
        browser.key("Enter")
        browser.until("[...document.querySelectorAll('.message')].some(one => one.innerText.includes('Since when?'))")
        browser.until(BOTH_ANSWERED)
        browser.tab_to("thinking")
        browser.key("Enter")
        browser.until("document.querySelectorAll('.thought-group .content').length === 1")
