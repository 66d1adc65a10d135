"""Nothing that is written holds a secret: text in every form, and the outputs of cells, printed in pieces or on two streams."""

from __future__ import annotations

import base64
import time

import nbformat
import pytest

from medcot_utils.machine import redaction, secrets
from medcot_utils.machine.redaction import ClearedCopies, clear_outputs, kind_of, known_secrets, redact

SECRET = "no-prefix-" + "aB3xQ9" * 5  # known, not told by its look
new_output = nbformat.v4.new_output


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """The secrets of this machine: the token, and a word."""
    monkeypatch.setattr(secrets, "found_secrets", {})
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", "metadata")


def printed(*pieces):
    """Outputs of (stream, text)."""
    return [new_output("stream", name=name, text=text) for name, text in pieces]


def text_of(outputs):
    return "".join(output.text for output in outputs)


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        base64.b64encode(b"user:" + SECRET.encode()).decode(),
        SECRET.encode().hex(),
        "".join(f"%{byte:02x}" for byte in SECRET.encode()),
        SECRET[:20] + "\n" + SECRET[20:],
        f"{SECRET[:20]}\x1b[0m{SECRET[20:]}",
        "sk-ant-api03-" + "aB1" * 31 + "AA",
        "ghp_" + "aB1" * 12,
        "AKIAIOSFODNN7EXAMPLE",
    ],
)
def test_a_message_holds_no_secret_in_any_form(form):
    middle, message = len(form) // 2, redact(f"401 for {form}, sorry")
    assert form[middle - 4 : middle + 4] not in message and message.endswith(", sorry")
    assert kind_of(f"401 for {form}", redaction.secrets_at_hand()), "what is pushed is refused for it"


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "KAGGLE_KEY"])
def test_what_other_programs_hold_is_hidden_too(name, monkeypatch):
    monkeypatch.setenv(name, "no prefix of its own")
    assert redact("refused: no prefix of its own") == "refused: **********"


def test_passwords_of_netrc_are_hidden_also_the_default(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine example.org login a password for-example\ndefault login b password for-all-others\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert set(known_secrets().values()) - {"environment MEDCOT_KEY"} == {
        "environment HF_TOKEN",
        "environment WANDB_API_KEY",
        "netrc",
    }
    assert redact("for-example, for-all-others") == "**********, **********"


def test_a_last_line_is_cleared_before_it_is_cut(tmp_path):
    from medcot_utils.machine.processes import read_last_line

    (tmp_path / "log").write_text(f"first\n{SECRET}{'x' * 280}")
    assert SECRET[-10:] not in read_last_line(tmp_path / "log")


# --- outputs of a cell ---------------------------------------------------------------------------------------------

OUT, ERR = "stdout", "stderr"


@pytest.mark.parametrize(
    "pieces",
    [
        [(OUT, SECRET[:9]), (OUT, SECRET[9:])],
        [(OUT, SECRET[:9]), (ERR, "a bar\n"), (OUT, SECRET[9:])],
        [(OUT, f"{SECRET[:9]}\n"), (ERR, "a bar\n"), (OUT, f"{SECRET[9:]}\n")],
        [(ERR, SECRET[:9]), (OUT, "between"), (ERR, SECRET[9:])],
        [(OUT, SECRET[:9]), (ERR, SECRET[9:])],
        [(OUT, SECRET[:9]), (ERR, SECRET[9:20]), (OUT, SECRET[20:])],
        [(OUT, SECRET), (ERR, SECRET[:9]), (OUT, SECRET[9:])],
        [(OUT, f"{char}\n") for char in SECRET],
        [(OUT, base64.b64encode(SECRET.encode()).decode()[:30]), (OUT, base64.b64encode(SECRET.encode()).decode()[30:])],
    ],
)
def test_a_secret_printed_in_pieces_is_hidden(pieces):
    cleared = clear_outputs(printed((OUT, "before "), *pieces, (OUT, " after")))
    text = text_of(cleared)
    assert "**********" in text and text.startswith("before ") and text.endswith(" after")
    assert not any(piece.strip() in text for _, piece in pieces if len(piece) > 8)
    assert len(cleared) == len(pieces) + 2 and [output.name for output in cleared[1:-1]] == [name for name, _ in pieces]
    for name in (OUT, ERR):
        of_one = "".join("".join(output.text for output in cleared if output.name == name).split())
        assert SECRET[:9] not in of_one and SECRET[9:20] not in of_one


def test_every_kind_of_output_is_cleared():
    outputs = [
        new_output(
            "display_data",
            {"text/plain": f"['{SECRET}']", "text/html": f"<b>{SECRET}</b>", "application/json": {SECRET: [SECRET, 1]}},
        ),
        new_output("execute_result", {"text/plain": [SECRET[:9], SECRET]}, metadata={"image/png": {"alt": SECRET}}),
        new_output("error", ename="RuntimeError", evalue=f"401 {SECRET}", traceback=[f"at {SECRET[:9]}", f"{SECRET[9:]}!"]),
    ]
    cleared = clear_outputs(outputs)
    assert SECRET[9:] not in str(cleared) and SECRET in str(outputs), "a copy"
    assert cleared[0].data["application/json"] == {"**********": ["**********", 1]}
    assert cleared[2].traceback == ["at **********", "!"] and cleared[2].evalue == "401 **********"


def test_a_word_of_the_format_that_is_a_password_stays():
    outputs = [new_output("display_data", {"text/plain": "metadata, and metadatas"}), *printed((OUT, "metadata"))]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)])
    copy = ClearedCopies().make(notebook)
    nbformat.validate(copy)
    assert copy.cells[0].outputs[0].data == {"text/plain": "**********, and metadatas"}
    assert copy.cells[0].outputs[1].text == "**********"


def test_a_running_cell_shows_no_beginning_of_a_secret():
    begun = printed((OUT, "step 1\n"), (OUT, SECRET[:-1]), (ERR, "bar"))
    assert text_of(clear_outputs(begun, is_running=True)) == "step 1\n**********bar"
    assert text_of(clear_outputs(begun)) == f"step 1\n{SECRET[:-1]}bar"
    assert text_of(clear_outputs(printed((OUT, "between"), (ERR, "no")), is_running=True)) == "betweenno"


# --- copies of a notebook ------------------------------------------------------------------------------------------


def notebook_of(*cells):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, outputs=outputs) for source, outputs in cells])


def test_a_copy_holds_no_secret_and_the_notebook_stays():
    notebook = notebook_of((f"login('{SECRET}')", printed((OUT, SECRET))))
    notebook.cells.append(nbformat.v4.new_markdown_cell(f"my token: {SECRET}"))
    notebook.metadata["widgets"] = {"state": {"value": SECRET}}
    copy = ClearedCopies().make(notebook)
    assert SECRET not in nbformat.writes(copy) and nbformat.writes(copy).count("**********") == 4
    assert notebook.cells[0].source == f"login('{SECRET}')" and nbformat.writes(notebook).count(SECRET) == 4


def test_a_cell_is_searched_again_only_if_it_changed(monkeypatch):
    searched = []
    monkeypatch.setattr(redaction, "clear_outputs", lambda outputs, running: searched.append(len(outputs)) or list(outputs))
    notebook, copies = notebook_of(("a", printed((OUT, "one"))), ("b", [])), ClearedCopies()
    copies.make(notebook)
    copies.make(notebook)
    assert searched == [1, 0]
    notebook.cells[1].outputs += printed((OUT, "two"))
    copies.make(notebook)
    assert searched == [1, 0, 1]
    notebook.cells[0].outputs[0].text = "another"  # as `update_display` does in a cell that has ended
    copies.make(notebook)
    assert searched == [1, 0, 1, 1]
    secrets.remember("one more secret", "test")
    copies.make(notebook)
    assert searched == [1, 0, 1, 1, 1, 1], "all of them for a secret that was found since"


def test_a_notebook_of_5_mb_costs_little_beside_its_writing():
    pictures = [base64.b64encode(bytes(range(index, 256)) * 5000).decode() for index in range(3)]
    rows = [f"step {step} loss {step / 7:.4f} {'#' * 60}\n" for step in range(2000)]
    cells = [
        ("draw()", [nbformat.NotebookNode(output_type="display_data", metadata={}, data={"image/png": one})]) for one in pictures
    ]
    bars = [nbformat.NotebookNode(output_type="stream", name=OUT, text=row) for row in rows]  # not validated: that takes seconds
    notebook, copies = notebook_of(*cells, ("train()", bars)), ClearedCopies()
    for number in range(8):
        secrets.remember(f"secret number {number} of this machine", "test")
    assert len(nbformat.writes(notebook)) > 5e6

    def cost(call):
        began = time.process_time()
        call()
        return time.process_time() - began

    first, again = cost(lambda: copies.make(notebook)), min(cost(lambda: copies.make(notebook)) for _ in range(3))
    writing = min(cost(lambda: nbformat.writes(notebook)) for _ in range(3))
    assert first < 5 * writing and again < writing / 2, (first, again, writing)
