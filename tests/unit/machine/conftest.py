"""What stands in for the secret stores of Kaggle and Colab, and for somebody before a notebook."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medcot_utils.machine import secrets


@pytest.fixture
def service_modules(tmp_path, monkeypatch):
    """Stands a `kaggle_secrets` or a `google.colab` on the import path, as the platforms do; both log what is asked."""
    asked = tmp_path / "asked.txt"

    def install(name: str, body: str) -> Path:
        kind = {"kaggle": "kaggle_secrets.py", "colab": "google/colab/userdata.py"}[name]
        module = tmp_path / "modules" / kind
        module.parent.mkdir(parents=True, exist_ok=True)
        errors = "".join(
            f"class {kind}(Exception): pass\n"
            for kind in ("BackendError", "CredentialError", "SecretNotFoundError", "NotebookAccessError", "TimeoutException")
        )
        log = f"    open({str(asked)!r}, 'a').write(name + '\\n')\n{body}\n"
        if name == "kaggle":
            log = "class UserSecretsClient:\n  def get_secret(self, name):\n" + log
        else:
            for package in (module.parent, module.parent.parent):
                (package / "__init__.py").touch()
            log = "def get(name):\n" + log
        module.write_text(errors + log)
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        return asked

    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "google" or name.startswith("google.")}
    yield install
    for name in list(sys.modules):
        if name == "kaggle_secrets" or name == "google" or name.startswith("google."):
            del sys.modules[name]
    sys.modules.update(hidden)


@pytest.fixture
def live_notebook(monkeypatch):
    """As in a notebook with somebody before it."""
    kernel = type("Kernel", (), {"_allow_stdin": True})()
    monkeypatch.setattr(secrets, "_kernel", lambda: kernel)
    return kernel
