"""Where the pages' tests find a real browser, and axe-core, which looks for what keeps people from using a page.

`make chromium` installs a browser, from Debian. axe-core is a script that axe-playwright-python carries
(requirements-tests-nodeps.txt); nothing else of that package is used."""

from __future__ import annotations

import shutil
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
