"""Secrets: where they are looked for and in which order, what is said where one is missing, and that none is shown.

Kaggle's and Colab's own modules are on no package index; what stands in for them raises what the real ones raise. The real ones
are tried where MEDCOT_REAL_MODULES names a folder that holds them (`kaggle_secrets.py`, `google/colab/`)."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medcot_utils.config import ConfigError, SecretsSettings, load_config
from medcot_utils.errors import PlatformError
from medcot_utils.machine import redaction, secrets
from medcot_utils.machine.paths import HOME
from medcot_utils.machine.secrets import find_secret, hand_on_secrets, require_secret, secret_of, secrets_found

SECRET = "hf_verysecretvalue0123456789"
HUB, WANDB = "Hugging Face", "Weights & Biases"


def shown(secret):
    """(value, where) of a secret, or None."""
    return secret and (secret.value.get_secret_value(), secret.where)


# --- the order -------------------------------------------------------------------------------------------------------


def test_secrets_come_from_argument_environment_store_then_file(monkeypatch, service_modules, tmp_path):
    (tmp_path / "token").write_text("from the file\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert shown(secret_of(HUB)) == ("from the file", "token file")
    service_modules("kaggle", "    return 'from kaggle' if name == 'HUGGINGFACE_TOKEN' else None")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert shown(secret_of(HUB)) == ("from kaggle", "Kaggle secret HUGGINGFACE_TOKEN")
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "from the environment")
    assert shown(secret_of(HUB)) == ("from the environment", "environment HUGGINGFACE_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "the first name")
    assert shown(secret_of(HUB)) == ("the first name", "environment HF_TOKEN")
    assert shown(secret_of(HUB, given="given")) == ("given", "argument")


@pytest.mark.parametrize(
    ("variable", "service", "file"),
    [
        ("HF_TOKEN_PATH", HUB, "token"),
        ("HF_HOME", HUB, "token"),
        ("NETRC", WANDB, "netrc"),
        ("XDG_CACHE_HOME", HUB, "huggingface/token"),
    ],
)
def test_a_token_file_may_lie_behind_a_tilde(variable, service, file, monkeypatch, tmp_path):
    path = tmp_path / "mine" / file
    path.parent.mkdir(parents=True)
    path.write_text("thekey" if service == HUB else "machine api.wandb.ai login user password thekey\n")
    for name in ("HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "~/mine" if variable.endswith("HOME") else f"~/mine/{file}")
    assert shown(secret_of(service)) == ("thekey", "token file")


def test_the_wandb_key_comes_from_netrc_for_the_address_in_use(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password thekey\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert shown(secret_of(WANDB)) == ("thekey", "token file")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:8080")
    assert secret_of(WANDB) is None
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / "netrc").write_text("machine api.wandb.ai gibberish\n")
    assert secret_of(WANDB) is None, "a netrc that cannot be read holds no key"


def test_the_default_entry_of_netrc_is_no_wandb_key(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine example.org login a password b\ndefault login user password for-all-others\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert secret_of(WANDB) is None and secrets_found()[WANDB] == "not found"


@pytest.mark.parametrize(
    "content", [b"hf_\xff\xfe0123456789", "hf_0123456789".encode("utf-16"), "hf_é123456789".encode("latin-1")]
)
@pytest.mark.parametrize(
    ("variable", "name", "find"),
    [
        ("HF_TOKEN_PATH", "token", lambda: secret_of(HUB)),
        ("NETRC", "netrc", lambda: secret_of(WANDB)),
        ("KAGGLE_CONFIG_DIR", "access_token", redaction.known_secrets),
        ("KAGGLE_CONFIG_DIR", "kaggle.json", redaction.known_secrets),
    ],
)
def test_a_token_file_that_is_no_utf_8_is_named_in_one_line(variable, name, find, content, monkeypatch, tmp_path):
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv(variable, str(tmp_path / name if variable != "KAGGLE_CONFIG_DIR" else tmp_path))
    with pytest.raises(PlatformError) as caught:
        find()
    assert str(caught.value) == f"{tmp_path / name} is not UTF-8 text: log in again, or save it as UTF-8"
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_token_file_may_begin_with_a_byte_order_mark(monkeypatch, tmp_path):
    (tmp_path / "token").write_text(f"{SECRET}\r\n", encoding="utf-8-sig")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert shown(secret_of(HUB)) == (SECRET, "token file")


def test_an_empty_variable_is_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " ")
    assert find_secret(["HF_TOKEN"]) is None
    assert secrets_found() == {HUB: "not found", WANDB: "not found"}


def test_the_names_are_those_of_the_settings(monkeypatch):
    monkeypatch.setenv("MY_KEY", "mine")
    settings = load_config("smoke", ["secrets.wandb=MY_KEY"]).secrets
    assert shown(secret_of(WANDB, settings)) == ("mine", "environment MY_KEY") and secret_of(WANDB) is None
    hand_on_secrets(settings)
    assert os.environ["WANDB_API_KEY"] == "mine"


@pytest.mark.parametrize(
    "value",
    ["hf_" + "a" * 34, "0123456789abcdef" * 3, "[WANDB_API_KEY, '0123456789abcdef0123456789abcdef']", "AKIA" + "A234567B" * 2],
)
def test_a_secret_given_for_a_name_is_refused_and_not_repeated(value):
    with pytest.raises(ConfigError, match="takes the names of secrets") as caught:
        load_config("smoke", [f"secrets.wandb={value}"])
    assert not any(part in str(caught.value) for part in ("0123456789", "aaaa", "A234567B"))


# --- Kaggle and Colab --------------------------------------------------------------------------------------------------


def test_kaggle_secrets_are_asked_for_on_kaggle_only(service_modules):
    asked = service_modules("kaggle", "    return 'value'")
    assert find_secret(["HF_TOKEN"]) is None
    assert not asked.exists()


def test_stand_in_kaggle_an_unattached_name_leads_to_the_next(monkeypatch, service_modules):
    asked = service_modules("kaggle", "    if name == 'wandb': return 'key'\n    raise BackendError('no such label')")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert shown(secret_of(WANDB)) == ("key", "Kaggle secret wandb")
    assert asked.read_text().split() == ["WANDB_API_KEY", "wandb"]


@pytest.mark.parametrize("error", ["ConnectionError", "CredentialError", "ImportError", "ValueError"])
def test_stand_in_kaggle_an_unreachable_store_is_asked_once(monkeypatch, service_modules, error):
    asked = service_modules("kaggle", f"    raise {error}('with details')")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    found = secrets_found()
    assert set(found.values()) == {f"not found (Kaggle secret: {error})"}
    assert asked.read_text().split() == ["HF_TOKEN", "WANDB_API_KEY"], "one question a service: each may wait 40 s"


def test_stand_in_colab_is_asked_only_in_a_live_notebook(monkeypatch, service_modules, live_notebook):
    asked = service_modules("colab", "    return 'from colab'")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert shown(find_secret(["HF_TOKEN"])) == ("from colab", "Colab secret HF_TOKEN")
    asked.unlink()
    live_notebook._allow_stdin = False
    assert find_secret(["HF_TOKEN"]) is None and not asked.exists()
    monkeypatch.setattr(secrets, "_kernel", lambda: None)
    assert find_secret(["HF_TOKEN"]) is None and not asked.exists(), "nor by a command, which is no notebook"


def test_stand_in_colab_without_an_answer_is_asked_once(monkeypatch, service_modules, live_notebook):
    asked = service_modules("colab", "    raise TimeoutException()")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert secrets_found(SecretsSettings())[HUB] == "not found (Colab secret: TimeoutException)"
    assert asked.read_text().split() == ["HF_TOKEN", "WANDB_API_KEY"]


@pytest.mark.series
def test_a_papermill_kernel_does_not_ask_colab_and_loses_no_time(tmp_path, monkeypatch, service_modules):
    import nbformat
    import papermill

    asked = service_modules("colab", "    import time; time.sleep(60)\n    raise TimeoutException()")
    cell = (
        "import time\nfrom medcot_utils.machine import secrets\nbegan = time.time()\n"
        "print(secrets.has_front_end(), secrets.secrets_found(), time.time() - began < 30)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbformat.write(notebook, tmp_path / "in.ipynb")
    paths = [str(tmp_path / "modules"), str(HOME)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    done = papermill.execute_notebook(
        str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), progress_bar=False, kernel_name="python3"
    )
    assert done.cells[0].outputs[0].text.startswith("False {'Hugging Face': 'not found'")
    assert done.cells[0].outputs[0].text.strip().endswith("True") and not asked.exists()


# --- the real modules --------------------------------------------------------------------------------------------------


@pytest.fixture
def real_modules(monkeypatch):
    folder = os.environ.get("MEDCOT_REAL_MODULES")
    if not folder:
        pytest.skip("MEDCOT_REAL_MODULES names no folder with Kaggle's and Colab's own modules")
    monkeypatch.syspath_prepend(folder)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "google" or name.startswith("google.")}
    yield folder
    for name in list(sys.modules):
        if name == "kaggle_secrets" or name == "google" or name.startswith("google."):
            del sys.modules[name]
    sys.modules.update(hidden)


class KaggleStore(BaseHTTPRequestHandler):
    """What kaggle_secrets asks: one secret is attached, the rest is not."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked["Label"])
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        session = asked.get("JWE") or self.headers["X-Kaggle-Authorization"]  # older and newer clients
        held = asked["Label"] == "wandb" and session.endswith("session")
        answer = {"wasSuccessful": held} | ({"result": {"secret": "from kaggle"}} if held else {})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments):
        """Quiet."""


def test_real_kaggle_secrets_over_http(real_modules, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), KaggleStore)
    server.asked, server.status = [], 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("KAGGLE_URL_BASE", f"http://127.0.0.1:{server.server_port}")
    assert secrets_found()[WANDB] == "not found (Kaggle secret: CredentialError)", "no session"
    monkeypatch.setenv("KAGGLE_USER_SECRETS_TOKEN", "session")
    assert shown(secret_of(WANDB)) == ("from kaggle", "Kaggle secret wandb")
    assert secret_of(HUB) is None and server.asked[-2:] == ["HF_TOKEN", "HUGGINGFACE_TOKEN"]
    server.shutdown()
    server.server_close()
    assert secrets_found()[WANDB] == "not found (Kaggle secret: ConnectionError)"


def test_real_colab_userdata_is_not_asked_without_a_page(real_modules, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    began = time.monotonic()
    assert secrets_found() == {HUB: "not found", WANDB: "not found"}
    assert time.monotonic() - began < 2


# --- asked for, missing ------------------------------------------------------------------------------------------------


def test_a_missing_secret_says_who_needs_it_and_what_to_do():
    with pytest.raises(PlatformError) as caught:
        require_secret(WANDB, "tracking.mode=online", "use --set tracking.mode=auto")
    assert str(caught.value) == (
        "tracking.mode=online needs a secret for Weights & Biases, and none was found under WANDB_API_KEY or wandb; looked in: "
        "environment, token file. Set WANDB_API_KEY, attach a secret of one of these names to the notebook, or use --set "
        "tracking.mode=auto"
    )


def test_a_missing_secret_is_asked_for_if_somebody_is_there(monkeypatch, live_notebook):
    asked = []
    monkeypatch.setattr(secrets.getpass, "getpass", lambda text: asked.append(text) or SECRET)
    assert shown(require_secret(HUB, "hub.repo_id", "leave it out")) == (SECRET, "typed in")
    assert len(asked) == 1 and "not stored" in asked[0]
    assert os.environ["HF_TOKEN"] == SECRET, "for the notebooks that this process starts"


@pytest.mark.parametrize("answer", ["", EOFError, NotImplementedError])
def test_no_answer_is_a_missing_secret(monkeypatch, live_notebook, answer):
    def ask(text):
        if answer:
            raise answer
        return answer

    monkeypatch.setattr(secrets.getpass, "getpass", ask)
    with pytest.raises(PlatformError, match="none was found"):
        require_secret(HUB, "hub.repo_id", "leave it out")
