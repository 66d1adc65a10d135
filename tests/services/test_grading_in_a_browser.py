"""The grading page in a headless Chromium: its texts verbatim, the clicks kept, axe-core, and the keyboard alone."""

from __future__ import annotations

import contextlib
import re
import time
import urllib.request

from browsers import Browser, find_barriers, needs_axe, needs_chromium
from grading_server import ATTACK, FIRST, fill, serving

from medcot_utils.evaluation.grades import GRADES, read_grades, read_pairs


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
