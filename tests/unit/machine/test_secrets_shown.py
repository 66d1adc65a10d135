"""Found secrets are handed on to the clients that need them, and no output or report holds one."""

from __future__ import annotations

import base64
import json
import os

import pytest

from medcot_utils.config import load_config
from medcot_utils.machine import redaction
from medcot_utils.machine.hardware import machine_report
from medcot_utils.machine.paths import HOME
from medcot_utils.machine.redaction import redact
from medcot_utils.machine.secrets import hand_on_secrets, secret_of, secrets_found
from medcot_utils.series import runner
from medcot_utils.series.progress import Watch

SECRET = "hf_verysecretvalue0123456789"
HUB, WANDB = "Hugging Face", "Weights & Biases"


def test_found_secrets_are_exported_under_their_clients_names(monkeypatch):
    monkeypatch.setenv("wandb", "key")
    hand_on_secrets()
    assert os.environ["WANDB_API_KEY"] == "key"
    assert "HF_TOKEN" not in os.environ


def test_an_existing_secret_or_token_file_is_left_alone(monkeypatch, service_modules, tmp_path):
    service_modules("kaggle", "    return 'from kaggle'")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("HF_TOKEN", "mine")
    hand_on_secrets()
    assert (os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]) == ("mine", "from kaggle")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("from the file")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    hand_on_secrets()
    assert "HF_TOKEN" not in os.environ


def test_no_report_and_no_output_holds_a_secrets_value(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("wandb", SECRET[::-1])
    report = machine_report(tmp_path)
    hand_on_secrets()
    text = json.dumps(report) + repr(secrets_found()) + repr(secret_of(HUB)) + str(secret_of(HUB)) + "".join(capfd.readouterr())
    assert report["secrets"] == {HUB: "environment HF_TOKEN", WANDB: "environment wandb"}
    assert SECRET not in text and SECRET[::-1] not in text


def test_other_libraries_messages_are_cleared_of_what_was_found(monkeypatch, tmp_path):
    monkeypatch.setenv("wandb", SECRET)
    (tmp_path / "token").write_text("a token from a file")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    secrets_found()
    assert redact(f"401 for {SECRET} and a token from a file") == "401 for ********** and **********"


PUT_OUT = """
import base64, html, os, sys, time
from pathlib import Path
from IPython.display import HTML, JSON, display
token, page = os.environ["HF_TOKEN"], Path("token").read_text()
print(token[:9], end="", flush=True)
time.sleep(0.5)
print(token[9:], page, flush=True)
print(os.environ["KAGGLE_API_TOKEN"], os.environ["MY_KEY"], file=sys.stderr)
display([token], HTML("<b>" + html.escape(page) + "</b>"), JSON({token: [page]}))
print(base64.b64encode(b"user:" + token.encode()).decode(), token.encode().hex(), *token, sep="\\n")
"""
INTERLEAVED = """
for stream, piece in [(sys.stdout, token[:9]), (sys.stderr, "a bar"), (sys.stdout, token[9:]), (sys.stderr, token[:20])]:
    print(piece, end="", file=stream, flush=True)
    time.sleep(0.1)
print(token[20:])
"""
# While the cell runs, what is saved holds no beginning of a secret, nor the rest of it.
SAVED = """
print(token[:20], end="", flush=True)
time.sleep(1)
saved = Path("out.ipynb").read_text()
print(token[20:], "very" + "secret" in saved)
"""


@pytest.mark.series
def test_cell_outputs_are_saved_without_secrets_in_every_form(monkeypatch, tmp_path):
    import nbformat
    import papermill

    held = {"HF_TOKEN": SECRET, "KAGGLE_API_TOKEN": "KGAT_verysecret", "MY_KEY": "mine verysecret"}
    for name, value in held.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "token").write_text("a&verysecret<file>")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)
    literal = "key = 'my-other-verysecret'"
    monkeypatch.setenv("WANDB_API_KEY", "my-other-verysecret")
    sources = [PUT_OUT, SAVED, INTERLEAVED, literal, "raise RuntimeError(f'401 for key {token}')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbformat.write(notebook, tmp_path / "in.ipynb")
    redaction.known_secrets(load_config("smoke", ["secrets.wandb=MY_KEY"]).secrets)
    runner._register_engine("in", lambda *arguments: None, Watch("in", None))
    quick = {"engine_name": "medcot", "kernel_name": "python3", "progress_bar": False, "autosave_cell_every": 0.01}
    with pytest.raises(papermill.PapermillExecutionError) as raised:
        papermill.execute_notebook("in.ipynb", "out.ipynb", **quick)
    text = (tmp_path / "out.ipynb").read_text()
    assert "verysecret" not in text and "verysecret" not in str(raised.value)
    assert SECRET.encode().hex()[8:] not in text and base64.b64encode(b"user:" + SECRET.encode()).decode()[10:-4] not in text
    written = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in written] == [*sources[:3], "key = '**********'", sources[4]]
    first, second, third, _, last = (cell.outputs for cell in written)
    assert first[0].text.startswith("**********") and "<b>**********</b>" in json.dumps(first)
    assert not any(SECRET in "".join("".join(output.get("text", "") for output in first).split()) for first in (first, third))
    for name in ("stdout", "stderr"):
        assert SECRET[:9] not in "".join(output.text for output in third if output.name == name)
    assert second[-1].text.endswith("********** False\n"), "nor while the notebook runs"
    assert last[0].evalue == "401 for key **********" and "**********" in "".join(last[0].traceback)
    assert text.count("**********") > 8


def test_known_secrets_come_from_every_source_not_only_the_first(monkeypatch, service_modules, tmp_path):
    service_modules("kaggle", "    if name == 'STORED': return 'stored secret'\n    raise BackendError(name)")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "an older one")
    monkeypatch.setenv("wandb", "short")
    (tmp_path / "kaggle.json").write_text('{"username": "ann", "key": "kaggle key"}')
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
    monkeypatch.setenv("MEDCOT_KEY", "what signs runs")
    assert redaction.known_secrets(load_config("smoke", ["secrets.huggingface=[STORED]"]).secrets) == {
        SECRET: "environment HF_TOKEN",
        "an older one": "environment HUGGINGFACE_TOKEN",
        "stored secret": "Kaggle secret STORED",
        "kaggle key": "Kaggle's token file",
        "what signs runs": "environment MEDCOT_KEY",
    }


def test_the_machine_report_looks_under_the_configured_names(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    overrides = ["training.max_steps=3", "secrets.huggingface=[MY_TOKEN]"]
    assert machine_report(tmp_path, overrides)["secrets"][HUB] == "environment MY_TOKEN"
    assert machine_report(tmp_path)["secrets"][HUB] == "not found"
    source = (HOME / "notebooks" / "01_setup.ipynb").read_text(encoding="utf-8")
    assert "hardware.machine_report(run_dir, OVERRIDES)" in source
