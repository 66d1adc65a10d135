"""A real browser for the pages' tests, and axe-core, which looks for what keeps people from using a page.

`make chromium` installs a browser, from Debian. axe-core is a script that axe-playwright-python carries
(requirements-tests-nodeps.txt); nothing else of that package is used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: make chromium")
_CARRIER = find_spec("axe_playwright_python")
AXE = Path(_CARRIER.origin).with_name("axe.min.js") if _CARRIER else None
needs_axe = pytest.mark.skipif(AXE is None, reason="no axe-core: pip install --no-deps -r requirements-tests-nodeps.txt")
_SEVERE = """axe.run().then(found => found.violations
  .filter(rule => ["serious", "critical"].includes(rule.impact))
  .flatMap(rule => rule.nodes.map(node => `${rule.impact} ${rule.id}: ${node.html} ${node.failureSummary}`)))"""


def find_barriers(browser) -> list[str]:
    """What axe-core finds serious or critical on the page that a `Browser` shows, one text an element."""
    browser.js(f"{AXE.read_text(encoding='utf-8')}; null")
    found = browser.call("Runtime.evaluate", expression=_SEVERE, awaitPromise=True, returnByValue=True)["result"]
    assert isinstance(found.get("value"), list), found
    return found["value"]


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
