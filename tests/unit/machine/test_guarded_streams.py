"""Standard output and standard error without secrets, also if one is written in pieces."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from medcot_utils.machine.guarded_streams import GuardedStream

SECRET = "no-prefix-" + "aB3xQ9" * 4


@pytest.fixture
def streams(monkeypatch):
    """(stdout, stderr, what reached stdout, what reached stderr)."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    reached = io.StringIO(), io.StringIO()
    out, err = map(GuardedStream, reached)
    out.twin, err.twin = err, out
    return out, err, *reached


def test_a_secret_written_in_pieces_is_hidden(streams):
    out, _, out_text, err_text = streams
    for piece in ("token ", SECRET[:4], SECRET[4:11], SECRET[11:], "!\n"):
        assert out.write(piece) == len(piece)
        out.flush()
    assert out_text.getvalue() == "token **********!\n" and err_text.getvalue() == ""


def test_a_secret_written_to_two_streams_is_hidden(streams):
    out, err, out_text, err_text = streams
    out.write("token " + SECRET[:12])
    err.write(SECRET[12:] + "!\n")
    assert out_text.getvalue() + err_text.getvalue() == "token **********!\n"
    out.write(SECRET[:12])
    err.write("a bar\n")
    out.write(SECRET[12:] + "\n")
    assert out_text.getvalue() == "token **********\n" and err_text.getvalue().endswith("a bar\n")


def test_other_text_passes_at_once_and_whole(streams):
    out, _, text, _ = streams
    out.writelines(["one\n", "two, no-prefi", "x\n", "\rbar 50%"])
    assert text.getvalue() == "one\ntwo, no-prefix\n\rbar 50%"
    out.write("ends in no-")
    assert text.getvalue().endswith("ends in ")
    out.release()
    assert text.getvalue().endswith("ends in no-")
    assert out.getvalue() == text.getvalue(), "the rest is the stream's own"


def test_a_traceback_of_a_guarded_process_holds_no_secret():
    code = (
        "from medcot_utils.machine.guarded_streams import guard_streams; import os; guard_streams(); guard_streams()\n"
        "token = os.environ['HF_TOKEN']; print(token[:9], end='', flush=True); print(token[9:]); print('ends in no-', end='')\n"
        "raise RuntimeError('refused ' + token)"
    )
    environment = os.environ | {"HF_TOKEN": SECRET}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.stdout == "**********\nends in no-", done.stderr
    assert done.stderr.endswith("RuntimeError: refused **********\n")


def test_the_command_says_no_secret_in_any_error(monkeypatch, capsys):
    from medcot_utils.cli import main
    from medcot_utils.errors import MedcotError

    monkeypatch.setenv("KAGGLE_KEY", SECRET)

    def fail():
        raise MedcotError(f"Kaggle answered: {SECRET} and {SECRET.encode().hex()} are not known")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().err == "medcot: Kaggle answered: ********** and ********** are not known\n"
