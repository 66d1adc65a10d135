"""How the report looks and is used in a browser: on a telephone and wider, light and dark, by the keyboard, for axe-core."""

from __future__ import annotations

import contextlib

import pytest
from browsers import Browser, find_barriers, needs_axe, needs_chromium
from made_up_runs import CONFIG, MORE, fill, fill_more

from medcot_utils.evaluation import build_report
from medcot_utils.run.directory import Run

pytestmark = needs_chromium

TELEPHONE, TABLET, DESK = 360, 768, 1300


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The addresses of two reports: of a run that measured everything, and of three runs."""
    folder = tmp_path_factory.mktemp("looks")
    runs = [fill_more(Run.create(folder / "more", MORE)), *(fill(Run.create(folder / name, CONFIG)) for name in ("a", "b"))]
    written = []
    for name, chosen in (("one", runs[:1]), ("three", runs)):
        written.append(folder / f"{name}.html")
        written[-1].write_text(build_report(*chosen), encoding="utf-8")
    return [page.as_uri() for page in written]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with contextlib.closing(Browser(tmp_path_factory.mktemp("browser") / "profile")) as browser:
        yield browser


def open_page(browser, address, width, scheme="light"):
    browser.show_as(width, scheme)
    browser.call("Page.navigate", url=address)
    browser.until(f"document.readyState === 'complete' && location.href === '{address}' && innerWidth === {width}")


SCROLLING = "[...document.querySelectorAll('html, .scroll')].filter(one => one.scrollWidth > one.clientWidth).length"


def test_on_a_telephone_nothing_scrolls_sideways(pages, browser):
    for address in pages:
        open_page(browser, address, TELEPHONE)
        assert browser.js(SCROLLING) == 0
        browser.js("document.querySelector('table').style.width = '500px'")
        assert browser.js(SCROLLING) == 1, "the test could see it"


def test_on_a_wider_page_only_tables_scroll_in_their_box(pages, browser):
    for address in pages:
        for width in (TABLET, DESK):
            open_page(browser, address, width)
            assert browser.js("document.documentElement.scrollWidth <= innerWidth")
            reached = (
                "[...document.querySelectorAll('.scroll')].every(box => box.tabIndex === 0 || box.scrollWidth <= box.clientWidth)"
            )
            assert browser.js(reached), "by the keyboard too"
    open_page(browser, pages[0], DESK)
    assert browser.js(SCROLLING) == 0


# What a card lacks: a cell whose content no label explains, but the first, and a head that is still shown.
UNLABELED = """[...document.querySelectorAll("table")].flatMap(table => {
  const cells = [...table.querySelectorAll("tr:not(.heads) td:not(:first-child)")].filter(cell => cell.textContent);
  const columns = Math.max(...[...table.rows].map(row => row.cells.length));
  return [...cells.filter(cell => columns > 2 && !getComputedStyle(cell, "::before").content.includes(cell.dataset.label)),
    ...[...table.querySelectorAll("th")].filter(head => head.checkVisibility())].map(one => one.outerHTML);
})"""


def test_on_a_telephone_each_row_is_a_card_with_labels(pages, browser):
    for address in pages:
        open_page(browser, address, TELEPHONE)
        assert browser.js(UNLABELED) == []
        browser.js("document.querySelector('td[data-label]').removeAttribute('data-label')")
        assert len(browser.js(UNLABELED)) == 1, "the test could see it"
    open_page(browser, pages[0], TELEPHONE)
    groups = "[...document.querySelectorAll('.metrics td[data-group]')].map(cell => cell.dataset.group)"
    assert set(browser.js(groups)) == {"as they answer by themselves", "with forced closing"}
    open_page(browser, pages[0], TABLET)
    assert browser.js("getComputedStyle(document.querySelector('td')).display") == "table-cell"


# The lines that each interval of the page takes.
BROKEN = r"""(() => {
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) for (const hit of texts.currentNode.data.matchAll(/\[-?\d[\d.]*,\s-?\d[\d.]*\]/g)) {
    const range = document.createRange();
    range.setStart(texts.currentNode, hit.index);
    range.setEnd(texts.currentNode, hit.index + hit[0].length);
    found.push(range.getClientRects().length);
  }
  return found;
})()"""


@pytest.mark.parametrize("width", [TELEPHONE, TABLET, DESK])
def test_no_interval_is_broken_across_lines(pages, browser, width):
    for address in pages:
        open_page(browser, address, width)
        lines = browser.js(BROKEN)
        assert len(lines) > 50 and max(lines) == 1


def test_a_telephone_gets_figures_of_its_own_width(pages, browser):
    sizes = "[...document.images].map(one => [one.naturalWidth, !!one.alt])"
    open_page(browser, pages[0], TELEPHONE)
    narrow = browser.js(sizes)
    open_page(browser, pages[0], DESK)
    wide = browser.js(sizes)
    assert len(narrow) == len(wide) == 2 and all(alt for _, alt in narrow + wide)
    assert [width for width, _ in narrow] == [462, 462] and [width for width, _ in wide] == [1100, 770]


@needs_axe
@pytest.mark.parametrize(("width", "scheme"), [(TELEPHONE, "light"), (TELEPHONE, "dark"), (TABLET, "dark"), (DESK, "light")])
def test_axe_finds_no_serious_barrier_in_the_report(pages, browser, width, scheme):
    for address in pages:
        open_page(browser, address, width, scheme)
        assert find_barriers(browser) == []
        browser.js("document.images[0].removeAttribute('alt')")
        assert [found.split(":")[0] for found in find_barriers(browser)] == ["critical image-alt"], "it can find one"


def test_the_report_can_be_used_with_the_keyboard(pages, browser):
    open_page(browser, pages[0], TABLET)
    browser.tab_to("held-out loss: how much of the fall is learning")
    browser.key("Enter")
    browser.until("!document.querySelector('details').open")
    browser.key(" ")
    browser.until("document.querySelector('details').open")
    browser.tab_to("greedy answers")
    browser.key("Tab")
    assert browser.js("document.activeElement.matches('.scroll')"), "the table is wider than its box"
    browser.js("document.getElementById('words').focus()")
    browser.call("Input.insertText", text="nothing has this in it")
    browser.until("document.getElementById('count').textContent.startsWith('0 of ')")
