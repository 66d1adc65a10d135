"""The words of the project: one name an idea, and sentences that open with their subject."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md"), *ROOT.glob("tests/**/README.md")]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted((ROOT / "medcot_utils").rglob("*.py"))
PAGE_FILES = [path for path in (ROOT / "medcot_utils").rglob("*") if path.suffix in (".html", ".js", ".yaml", ".md")]
SOURCES = sorted([*PAGES, *NOTEBOOKS, *MODULES, *PAGE_FILES])

# A pattern that is not wanted, and what to write instead.
BANNED_WORDS = {
    r"(?<!model )(?<!model's )\bcards?\b": "GPU, or model card",
    r"\b(go|goes|going|gone|went) on\b(?! (a|an|the) )": "resume, continue",
    r"\b(take|takes|taking|taken|took) up\b": "resume",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"\bask(s|ed|ing)? for memory\b": "tests memorization",
    r"\bon/off setting\b": "expected a value, not true or false",
    r"\b(can|cannot|can't|could) (nothing )?be told\b": "cannot be tested",
    r"\bmet silently\b": "that raise no error",
    r"\bbuilt so\b": "name the subject",
}
IRREGULAR = "made|given|written|kept|found|taken|seen|left|built|drawn|held|sent|shown|chosen|known|done|begun|split|told"
AFTER_PARTICIPLE = "about|after|against|and|as|at|before|beside|by|for|from|if|in|into|like|on|once|only|over|so|through|to|under|when|with|without"
BANNED_OPENINGS = {
    r"of\b": "the subject",
    r"(what|where)\b(?!.*\?$)": "the subject; 'if' rather than 'where'",
    rf"(\w+ed|{IRREGULAR}) ({AFTER_PARTICIPLE})\b[^.:;]*, ": "the subject",
    r"\w+ing\b[^.:;]*, (it|they|you|we|medcot|the|a|an|this|each|every)\b": "the subject",
}


def sentences(text):
    """The sentences of a paragraph, without what is code in it."""
    text = re.sub(r"`[^`]*`|<[^<>]+>", "X", re.sub(r"[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}", "", " ".join(text.split())))
    return [part.strip(" >\"'(") for part in re.split(r"(?<=[.!?:])[\"')]?\s+(?=[\"'(]?[A-Z])", text)]


def findings(text):
    """What is wrong with a paragraph's words and openings."""
    found = []
    for sentence in sentences(text):
        for pattern, better in BANNED_WORDS.items():
            if match := re.search(pattern, sentence, flags=re.IGNORECASE):
                found.append(f"{match[0]!r} (write: {better}) in: {sentence}")
        for pattern, better in BANNED_OPENINGS.items():
            if match := re.match(pattern, sentence, flags=re.IGNORECASE):
                found.append(f"opens with {match[0].split()[0]!r} (open with {better}): {sentence}")
    return found


def markdown_paragraphs(text):
    """Paragraphs, list items and table cells of Markdown; no headings, no code."""
    heading, parts = False, []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        heading = heading and token.type != "heading_close" or token.type in ("heading_open", "th_open")
        if token.type == "inline" and not heading:
            plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", token.content)
            parts.append(plain)
        elif token.type == "html_block":
            parts.append(re.sub(r"<!--.*?-->", "", token.content, flags=re.DOTALL))
        heading = heading and token.type != "th_close"
    return parts


def python_texts(text):
    """Every string constant of a module that reads as text: messages, descriptions, pages, docstrings."""
    tree, inside = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def paragraphs(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return markdown_paragraphs(text)
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        return [part for cell in cells if cell.cell_type == "markdown" for part in markdown_paragraphs(cell.source)]
    if path.suffix == ".py":
        return [part for constant in python_texts(text) if " " in constant for part in constant.split("\n\n")]
    return text.splitlines()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_and_openings_are_plain(path):
    assert [fault for text in paragraphs(path) for fault in findings(text)] == []
