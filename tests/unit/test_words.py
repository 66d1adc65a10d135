"""The words of the project: one name for one idea, and sentences that open with their subject.

Read are documents, the notebooks' Markdown, and every text of the package: messages, help, settings, docstrings, pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCUMENTS = [path for pattern in ("*.md", "docs/*.md", ".github/**/*.md", "tests/**/README.md") for path in ROOT.glob(pattern)]
PACKAGE = [path for path in (ROOT / "medcot_utils").rglob("*") if path.suffix in (".py", ".md", ".j2", ".yaml")]
TEXTS = sorted([*DOCUMENTS, *PACKAGE, *(ROOT / "notebooks").glob("*.ipynb")])

# A pattern that is not wanted, and what to write instead.
BANNED_WORDS = {
    r"(?<!model )(?<!model's )(?<!data )\bcards?\b(?!_)": "GPU, or model card",
    r"\b(go|goes|going|gone|went) on\b(?! (a|an|the|Kaggle|Colab)\b)": "resume, continue",
    r"\b(take|takes|taking|taken|took) up\b(?! to\b)": "resume",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"\bask(s|ed|ing)? for memory\b": "tests memorization",
    r"\bon/off setting\b": "expected a value, not true or false",
    r"\b(can|cannot|can't|could) (nothing )?be told\b": "cannot be tested, cannot be decided",
    r"\bmet silently\b": "that raise no error",
    r"\bbuilt so\b": "such a",
}
_IRREGULAR = "Made|Given|Written|Kept|Found|Taken|Seen|Left|Built|Drawn|Held|Sent|Shown|Chosen|Known|Done|Begun|Split|Told"
_AFTER_IT = (
    "about|after|against|and|as|at|before|beside|by|for|from|in|into|like|on|once|only|over|so|through|to|under|with|without"
)
BANNED_OPENINGS = {
    r"Of\b": "the subject",
    r"(What|Where)\b(?!.*\?$)": "the subject; 'if' rather than 'where'",
    rf"([A-Z]\w+ed|{_IRREGULAR}) ({_AFTER_IT})\b[^.:;?]*, (?!.*\?$)": "the subject",
    r"[A-Z]\w+ing\b[^.:;,]*, (it|they|you|we|medcot|the|a|an|this|each|every)\b": "the subject",
}


def sentences(text):
    """The sentences of a paragraph; inline code is an X in them."""
    text = re.sub(r"`[^`]*`", "X", " ".join(text.split()))
    text = re.sub(r"\{%.*?%\}|<[^<>]+>|\*+", "", text)
    return [part.strip(" >\"'(") for part in re.split(r"(?<=[.!?:])[\"')]?\s+(?=[\"'(]?[A-Z])", text)]


def findings(text):
    """What is wrong with a paragraph's words, and with how its sentences open."""
    found = []
    for sentence in sentences(text):
        for pattern, better in BANNED_WORDS.items():
            if match := re.search(pattern, sentence, flags=re.IGNORECASE):
                found.append(f"{match[0]!r}, better {better}: {sentence}")
        for pattern, better in BANNED_OPENINGS.items():
            if match := re.match(pattern, sentence):
                found.append(f"opens with {match[0].split()[0]}, better with {better}: {sentence}")
    return found


def in_markdown(text):
    """Paragraphs, list items, and cells of tables; headings and blocks of code are no sentences."""
    heading = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("heading_open", "th_open", "heading_close", "th_close"):
            heading = token.nesting == 1
        elif token.type == "inline" and not heading:
            yield re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", token.content)


def in_python(text):
    """Every string that reads as text: messages, descriptions, pages, docstrings."""
    tree = ast.parse(text)
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in joined for part in node.values}
    yield from ("".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values) for node in joined)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside and " " in node.value:
            yield from node.value.split("\n\n")


def paragraphs(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return in_markdown(text)
    if path.suffix == ".ipynb":
        cells = [cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "markdown"]
        return (part for cell in cells for part in in_markdown(cell))
    if path.suffix == ".py":
        return in_python(text)
    if path.name.endswith(".html.j2"):
        return re.split(r"<[^<>]+>", re.sub(r"<h\d.*?</h\d>", "", text.partition("<script>")[0]))
    return text.splitlines()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_and_openings_are_plain(path):
    assert [fault for text in paragraphs(path) for fault in findings(text)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A run needs a card.", "'card'"),
        ("Read the model card, and PubMedQA's data card.", None),
        ("Training goes on from the last checkpoint.", "'goes on'"),
        ("The weights go on the GPU.", None),
        ("The next session takes up the run.", "'takes up'"),
        ("Answers take up to 472 tokens.", None),
        ("It saved the kernel: mend the file.", "'mend'"),
        ("Push again. What no push put there is never deleted.", "opens with What"),
        ("What changes in 1.4?", None),
        ("Of eight claims, five hold.", "opens with Of"),
        ("Where one fails, all end.", "opens with Where"),
        ("Asked about a cough, it repeats the question.", "opens with Asked"),
        ("Loaded from its files, the model must agree.", "opens with Loaded"),
        ("Changing a setting, you redo what depends on it.", "opens with Changing"),
        ("Training and answering take most of the time.", None),
        ("Published scores, for orientation.", None),
        ("`What` is code, and so is `a card`.", None),
    ],
)
def test_a_banned_word_or_opening_is_found(text, found):
    faults = findings(text)
    assert faults == [] if found is None else found in faults[0]
