"""The user's keys: where they are looked for, that what one signs holds for the same user alone, and that none gets out."""

from __future__ import annotations

import os
import stat
import sys

import pytest

from medcot_utils.errors import PlatformError
from medcot_utils.machine import redaction
from medcot_utils.machine.user_key import is_signed, key_file, sign

TOKEN = "hf_" + "7" * 34


@pytest.fixture
def home(tmp_path, monkeypatch):
    """`home("ann")`: that user's home from now on, with no other key than is found there."""

    def move(name):
        monkeypatch.delenv("MEDCOT_KEY", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / name))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / name / ".config"))
        return tmp_path / name

    return move


def test_the_key_is_made_once_and_for_its_user_alone(home):
    signed = sign("text") if home("ann") else []
    assert is_signed("text", signed) and not is_signed("another text", signed) and not is_signed("text", [])
    file = key_file()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [path.name for path in file.parent.iterdir()] == ["key"] and len(file.read_text()) == 64
    assert sign("text") == signed and "MEDCOT_KEY" not in os.environ
    assert file.read_text() not in str(signed) and redaction.redact(file.read_text()) == "**********"


def test_another_user_signs_with_another_key(home):
    home("ann")
    signed = sign("text")
    home("bob")
    assert not is_signed("text", signed) and not is_signed("text", ["é", "", signed[0][:-1]])


def test_a_token_of_both_sessions_stands_for_the_user(home, monkeypatch):
    home("first session")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    signed = sign("text")
    home("second session")
    assert is_signed("text", signed)
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "8")
    assert not is_signed("text", signed)
    assert TOKEN not in str(signed)


def test_what_could_be_guessed_signs_nothing(home, monkeypatch):
    home("ann")
    alone = sign("text")
    monkeypatch.setenv("HF_TOKEN", "dummy")
    assert sign("text") == alone


@pytest.mark.parametrize("place", ["variable", "file"])
def test_a_short_key_is_refused_in_one_line(place, home, monkeypatch):
    home("ann")
    if place == "file":
        key_file().parent.mkdir(parents=True)
        key_file().write_text("\xff short", encoding="latin-1")
    else:
        monkeypatch.setenv("MEDCOT_KEY", "short")
    with pytest.raises(PlatformError, match=r"but a key needs 20: remove it") as caught:
        sign("text")
    assert str(caught.value).startswith("MEDCOT_KEY holds 5" if place == "variable" else f"{key_file()} holds 7")


def test_without_a_home_the_key_is_the_processs_own(home, monkeypatch):
    folder = home("nobody")
    folder.write_text("a file, so that no folder can be made in it")
    signed = sign("text")
    assert is_signed("text", signed) and len(os.environ["MEDCOT_KEY"]) == 64, "what it starts has the same"
    monkeypatch.delenv("MEDCOT_KEY")
    assert not is_signed("text", signed)


def test_a_key_in_the_platforms_store_is_handed_on(home, monkeypatch, tmp_path):
    (tmp_path / "kaggle_secrets.py").write_text(
        "class BackendError(Exception): pass\n"
        "class UserSecretsClient:\n"
        "    def get_secret(self, name):\n"
        "        if name == 'MEDCOT_KEY': return 'k' * 40\n"
        "        raise BackendError(name)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kaggle_secrets", raising=False)
    home("session")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    signed = sign("text")
    del sys.modules["kaggle_secrets"]
    assert os.environ["MEDCOT_KEY"] == "k" * 40 and not key_file().exists()
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    assert is_signed("text", signed)
