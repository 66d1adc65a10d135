"""How a later session knows what an earlier one of the same user has written: by a signature.

Several keys stand for a user: a file that is made once, or MEDCOT_KEY in its place; and the tokens of the accounts that runs are
sent to. Whoever holds such a token can use its account anyway, and on Kaggle and Colab it is what outlives a session."""

from __future__ import annotations

import contextlib
import hmac
import os
import tempfile
from pathlib import Path
from secrets import token_hex

from medcot_utils.errors import PlatformError
from medcot_utils.machine import secrets

VARIABLE = "MEDCOT_KEY"
SHORTEST_KEY = 20  # a signature lies where others can read it: from a shorter one the key might be guessed


def sign(text: str) -> list[str]:
    """Return the HMAC-SHA256 (hex) of a text under each key of this user. Raises PlatformError for a key that is too short."""
    return [hmac.new(key, text.encode(), "sha256").hexdigest() for key in _keys()]


def is_signed(text: str, signatures: object) -> bool:
    """Return whether one of the signatures of a text is this user's; there is none in what is no list, as somebody else's file
    may hold it. Raises PlatformError as `sign` does."""
    listed = signatures if isinstance(signatures, list) else []
    given = [one for one in listed if isinstance(one, str) and one.isascii()]  # all that `compare_digest` takes
    return bool(given) and any(hmac.compare_digest(own, one) for own in sign(text) for one in given)


def _keys() -> list[bytes]:
    # Under the usual names alone: those that a run's own settings name may hold what everybody knows.
    found = filter(None, map(secrets.secret_of, secrets.SERVICES))
    tokens = [token.value.get_secret_value().encode() for token in found]
    return [_own_key(), *(token for token in tokens if len(token) >= SHORTEST_KEY)]


def key_file() -> Path:
    """Return where this user's key lies."""
    import platformdirs

    return Path(platformdirs.user_config_dir("medcot")) / "key"


def _own_key() -> bytes:
    """Return MEDCOT_KEY, of the environment or the platform's store, else what the key file holds, after making it if need be.

    Without a folder for the file, the key is one of this process and of those that it starts."""
    found, where = secrets.find_secret([VARIABLE]), VARIABLE
    if found:
        os.environ[VARIABLE] = found.value.get_secret_value()  # a store may not answer the kernels that this process starts
    else:
        try:
            found, where = secrets.remember(_read_or_make(key_file()), "key file"), str(key_file())
        except OSError:
            os.environ[VARIABLE] = token_hex(32)
            return _own_key()
    key = found.value.get_secret_value()
    if len(key) < SHORTEST_KEY:
        raise PlatformError(
            f"{where} holds {len(key)} characters, but a key needs {SHORTEST_KEY}: remove it, or put a long random text there"
        )
    return key.encode()


def _read_or_make(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent)  # of mode 0600
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(token_hex(32))
            with contextlib.suppress(FileExistsError):  # another process was faster, and its key is the one
                os.link(beside, path)
        finally:
            Path(beside).unlink()
    return path.read_text(encoding="ascii", errors="replace")
