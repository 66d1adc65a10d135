"""What the documents name exists: tests, files, anchors, commands and settings; and links elsewhere are well formed."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer
from markdown_it import MarkdownIt

from medcot_utils.cli.main import app
from medcot_utils.config import load_config, setting_names
from medcot_utils.machine import disk
from medcot_utils.machine.durations import describe_time
from medcot_utils.machine.probe import KAGGLE_T4S
from medcot_utils.series.estimate import estimate_series
from medcot_utils.series.kaggle.build import MAX_HOURS

ROOT = Path(__file__).parents[2]
MARKDOWN = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*.md"), *ROOT.glob("tests/**/README.md")]
DOCUMENTS = sorted([*MARKDOWN, ROOT / "medcot_utils" / "data" / "README.md"])
README = (ROOT / "README.md").read_text(encoding="utf-8")
ON_A_GPU = ("small", "article", "recommended", "full")  # in the order of the tables

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def parsed(document):
    """The document's tokens, those inside paragraphs and table cells included."""
    for token in MarkdownIt("commonmark").enable("table").parse(document.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def links(document):
    return [
        str(token.attrs.get("href", token.attrs.get("src"))) for token in parsed(document) if {"href", "src"} & set(token.attrs)
    ]


def code(document):
    """Every piece of inline code, and every line of a code block."""
    return [line for token in parsed(document) if token.type in ("code_inline", "fence") for line in token.content.splitlines()]


def anchors(document):
    """The anchors that GitHub gives the document's headings."""
    tokens = list(parsed(document))
    titles = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(link, document):
    """What is wrong with a link, or None."""
    if "://" in link:
        parts = urlsplit(link)
        good = (
            parts.scheme == "https"
            and re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc)
            and not re.search(r"[\s<>\"')]|//", parts.path)
        )
        return None if good else f"{link}: not a well-formed https link"
    path, _, anchor = link.partition("#")
    target = (document.parent / path).resolve() if path else document
    if not target.exists() or not target.is_relative_to(ROOT):
        return f"{link}: no such file in the repository"
    if anchor and anchor not in anchors(target):
        return f"{link}: {target.name} has no such heading"
    return None


@every_document
def test_every_link_of_a_document_is_good(document):
    assert [fault for link in links(document) if (fault := broken(link, document))] == []


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("https://arxiv.org/abs/2106.09685", None),
        ("http://arxiv.org/abs/2106.09685", "not a well-formed"),
        ("https://arxiv/abs/2106.09685", "not a well-formed"),
        ("https:///arxiv.org", "not a well-formed"),
        ("https://arxiv.org/abs/2106.09685 ", "not a well-formed"),
        ("docs/gpu.md", None),
        ("docs/gpu.md#several-gpus", None),
        ("docs/gpu.md#many-gpus", "no such heading"),
        ("#try-it", None),
        ("docs/cpu.md", "no such file"),
        ("../outside.md", "no such file"),
    ],
)
def test_a_bad_link_is_found(link, fault):
    found = broken(link, ROOT / "README.md")
    assert found is None if fault is None else fault in found


@every_document
def test_every_test_that_a_document_names_is_there(document):
    text, missing = document.read_text(encoding="utf-8"), []
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        path = ROOT / file
        if not path.exists() or (name and f"def {name}(" not in path.read_text(encoding="utf-8")):
            missing.append(f"{file}::{name}")
    assert missing == []


@every_document
def test_every_command_that_a_document_names_is_there(document):
    """In code: `medcot ...`, `make ...`, and what --set changes."""
    program = typer.main.get_command(app)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    unknown = []
    for line in code(document):
        if (found := re.match(r"medcot ([a-z]+)(?: ([a-z]+))?", line)) and found[1] not in program.commands:
            unknown.append(line)
        if found and found[1] == "kaggle" and found[2] and found[2] not in program.commands["kaggle"].commands:
            unknown.append(line)
        if (found := re.match(r"make ([a-z]+)", line)) and found[1] not in targets:
            unknown.append(line)
        changed = [name for name in re.findall(r"--set ([a-z_.]+)=", line) if name != "section.name"]
        unknown += [name for name in changed if name not in setting_names()]
    assert unknown == []


def test_the_articles_nine_steps_have_a_notebook_and_a_test_each():
    text = (ROOT / "docs" / "reproducing-the-article.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \|(.*)\|$", text, flags=re.M)
    assert [number for number, _ in rows] == [str(number) for number in range(1, 10)]
    assert all("../notebooks/" in row and "`tests/" in row for _, row in rows)


@every_document
def test_every_setting_that_a_document_sets_is_accepted(document):
    """In blocks of code: the profile and all --set of a command together, as `medcot run` and `medcot kaggle build` read them."""
    blocks = [token.content.replace("\\\n", " ") for token in parsed(document) if token.type == "fence"]
    for line in "\n".join(blocks).splitlines():
        words = shlex.split(line, comments=True) if "--set" in line else []
        given = [after for word, after in itertools.pairwise(words) if word == "--set"]
        load_config(dict(itertools.pairwise(words)).get("--profile", "demo"), given)


# --- numbers that the package computes ---------------------------------------------------------------------------------


@pytest.fixture
def nothing_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr("medcot_utils.machine.disk._hub_cache", lambda: tmp_path / "hub")


def read_page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_times_on_kaggle_are_those_that_build_prints(nothing_downloaded):
    table = read_page("kaggle.md").partition("| notebook | `small` |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    estimates = [estimate_series(load_config(profile), None, KAGGLE_T4S) for profile in ON_A_GPU]
    columns = [[describe_time(one).partition(" (")[0] for one in (*made.steps.values(), made.total)] for made in estimates]
    assert rows == [list(row) for row in zip([*estimates[0].steps, "all seven"], *columns, strict=True)]


def test_the_disk_that_a_profile_needs_is_what_doctor_prints(nothing_downloaded, tmp_path):
    needs = {profile: disk.needs(load_config(profile), tmp_path / "run") for profile in ON_A_GPU}
    sums = {profile: sum(need.gib for need in parts) for profile, parts in needs.items()}
    cached = sum(need.gib for need in needs["article"] if need.place == "Hub cache")
    assert sums["article"] == sums["recommended"] == sums["full"]
    for page in map(read_page, ("gpu.md", "disk.md")):
        assert f"{sums['article']:.1f} GiB" in page and f"{sums['small']:.1f} GiB" in page
    assert f"{cached:.1f} in the cache" in read_page("disk.md")


def test_the_time_limit_in_the_documents_is_the_one_that_build_adds():
    found = {hours for path in DOCUMENTS for hours in re.findall(r"training\.max_hours=(\d+)", path.read_text(encoding="utf-8"))}
    assert found == {str(MAX_HOURS)}


def test_make_says_how_large_the_install_is_before_it_begins():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("$(INSTALLED):")[2].partition("\n\n")[0]
    said = re.search(r"@echo 'installing .* ([\d.]+) GiB", recipe)
    assert said and said.start() < recipe.index("$(BIN)/pip")
    assert f"{said[1]} for the packages in `.venv`" in read_page("disk.md")


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_has_one_figure():
    assert len(README.splitlines()) <= 120
    assert len(re.findall(r"!\[[^\]]{20,}\]\(docs/", README)) == len(re.findall(r"(?<!\[)!\[", README)) == 1, (
        "one figure, with alt text"
    )


def test_the_readme_leads_to_every_page_of_docs():
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages - set(links(ROOT / "README.md")) == set()


def test_every_measurement_in_the_readme_says_what_made_it():
    table = README.partition("## What was measured")[2].partition("\n\nIntervals")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    heads = {line for line, rule in itertools.pairwise(lines) if set(rule) <= set("|- ")}
    rows = [line.split(" | ") for line in lines if line not in heads and set(line) - set("|- ")]
    assert len(rows) >= 5
    assert [row[0] for row in rows if not re.match(r"`(make|medcot) \w+`|\[\w+\]\(docs/", row[-1])] == []
