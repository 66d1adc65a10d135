"""Data and models from the Hub over HTTP: the pinned revision is what arrives, and a changed file behind a name is noticed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_runs import hub_environment, make_run, push_command
from hub_server import Hub

from medcot_utils.config import load_config

pytest_plugins = ("hub_fixtures",)
NAME, FILE = "FreedomIntelligence/medical-o1-reasoning-SFT", "medical_o1_sft.json"
README = f"---\nconfigs:\n- config_name: en\n  data_files: {FILE}\n---\n".encode()
LOAD_ROWS = """
import json, sys
from medcot_utils.config import load_config
from medcot_utils.data.rows import DataError, load_rows
try:
    rows = load_rows(load_config("article", json.loads(sys.argv[1])).dataset)
    print("ROWS", len(rows), rows[0]["Question"])
except DataError as error:
    print("ERROR", error)
"""
LOAD_MODELS = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from medcot_utils.config import load_config
from medcot_utils.models.merging import load_base
from medcot_utils.models.transformers_engine import load
first, tag = json.loads(sys.argv[1])
found = {}
for name, revision in (("pinned", first), ("newest", "null")):
    settings = load_config("article", ["model.name=doctor/tiny", "model.load_in_4bit=false", f"model.revision={revision}"]).model
    for model, _ in (load_base(settings, "float32"), load(settings)):
        found.setdefault(name, []).append(float(model.get_input_embeddings().weight.float()[7, 3]))
tokenizer = AutoTokenizer.from_pretrained("doctor/cot", revision=tag)
pushed = AutoModelForCausalLM.from_pretrained("doctor/cot", revision=tag)
found["pushed"] = float(pushed.get_input_embeddings().weight.float()[7, 3]), tokenizer("fever")["input_ids"]
tuned = PeftModel.from_pretrained(pushed, "doctor/cot", revision=tag, subfolder="adapter")
found["adapter"] = [float(weight.sum()) for name, weight in tuned.named_parameters() if "lora_B" in name]
print("FOUND", json.dumps(found))
"""


def rows(label, count=60):
    texts = [{"Question": f"{label} {n}?", "Complex_CoT": "So.", "Response": "It is."} for n in range(count)]
    return json.dumps(texts).encode()


def python(hub, home, code, *overrides):
    command = [sys.executable, "-c", code, json.dumps(overrides)]
    environment = hub_environment(hub.url, home)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("ROWS", "ERROR", "FOUND"))]


# --- data ----------------------------------------------------------------------------------------------------------


def test_the_article_profile_pins_its_datas_revision_and_digest():
    settings = load_config("article").dataset
    assert (settings.name, settings.revision) == (NAME, "fc2c9e8a37b38f38da6d449564a8c350b244aef4")
    assert settings.sha256 == "6a0289ebe0d07e3e77e8dbc81c31fcfc02cc99c7bca1602694cb2f76d505667e"
    assert load_config("full").dataset.sha256 == settings.sha256
    assert load_config("article", ["dataset.name=me/other"]).dataset.sha256 is None, "another data set, another digest"


@pytest.fixture
def versions(hub):
    """The data set in two commits: (the first one's id, its digest)."""
    first = hub.add("dataset", NAME, {"README.md": README, FILE: rows("old", 80)})
    hub.add("dataset", NAME, {FILE: rows("new")})
    return first, hashlib.sha256(rows("old", 80)).hexdigest()


def test_the_pinned_revision_is_downloaded_though_the_name_moved(hub, versions, tmp_path):
    first, digest = versions
    pinned = [f"dataset.revision='{first}'", f"dataset.sha256={digest}"]
    assert python(hub, tmp_path, LOAD_ROWS, *pinned) == ["ROWS 80 old 0?"]
    downloads = [path for method, path, _ in hub.requests if method == "GET" and path.endswith(f"/resolve/{first}/{FILE}")]
    assert len(downloads) == 1, "checked and loaded from one download"


def test_a_changed_data_file_is_one_error_with_both_digests(hub, versions, tmp_path):
    moved_on = ["dataset.revision=null", f"dataset.sha256={versions[1]}"]
    (line,) = python(hub, tmp_path, LOAD_ROWS, *moved_on)
    found = hashlib.sha256(rows("new")).hexdigest()
    assert line.startswith(f"ERROR {NAME} is not the data that this run names: its file {FILE} at revision main")
    assert f"sha256 {found}, expected sha256 {versions[1]}" in line and f"--set dataset.sha256={found}" in line
    assert python(hub, tmp_path, LOAD_ROWS, "dataset.revision=null", f"dataset.sha256={found}") == ["ROWS 60 new 0?"]


def test_a_revision_that_is_not_there_is_one_error(hub, versions, tmp_path):
    (line,) = python(hub, tmp_path, LOAD_ROWS)
    assert line.startswith(f"ERROR data set {NAME} at revision fc2c9e8a37b38f38da6d449564a8c350b244aef4 could not be loaded")


# --- models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What one process (ten seconds of imports) loaded from a Hub with `doctor/tiny` in two commits and a pushed run."""
    import torch
    from safetensors.torch import load_file, save, save_file

    from medcot_utils.models.embedded import find_model_source
    from medcot_utils.models.tokenizer import load_tokenizer_from

    folder, tiny = tmp_path_factory.mktemp("models"), Path(find_model_source("embedded:tiny-random-llama"))
    weights = load_file(tiny / "model.safetensors")
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    run = make_run(folder)
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    layer = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {layer.format(n, side): torch.ones(shape) for n in (0, 1) for side, shape in (("A", (2, 64)), ("B", (64, 2)))}

    def fill_adapter(out):
        (out / "adapter_config.json").write_text(json.dumps(lora))
        save_file(shapes, out / "adapter_model.safetensors")

    run.write("adapter", fill_adapter)
    run.write("merged", lambda out: [(out / name).write_bytes(data) for name, data in files.items()])
    run.write("export_check", run.read("export_check"))
    for name in ("held_out_loss", "tuned_answers", "tuned_mcq", "metrics", "export_check", "model_card"):
        run.write(name, "text" if name == "model_card" else run.read(name))
    with Hub() as hub:
        first = hub.add("model", "doctor/tiny", files)
        changed = {name: weight + 1 for name, weight in weights.items()}
        hub.add("model", "doctor/tiny", {"model.safetensors": save(changed, {"format": "pt"})})
        environment = hub_environment(hub.url, folder)
        subprocess.run(push_command(run), env=environment, capture_output=True, timeout=120, check=True)
        (tag,) = hub.repos["model", "doctor/cot"]["tags"]
        (line,) = python(hub, folder, LOAD_MODELS, f"'{first}'", tag)
    value = float(weights["model.embed_tokens.weight"].float()[7, 3])
    return json.loads(line.removeprefix("FOUND ")), value, load_tokenizer_from(tiny)("fever")["input_ids"]


@pytest.mark.model
def test_both_loaders_take_the_pinned_revision_of_a_model(loaded):
    found, value, _ = loaded
    assert found["pinned"] == pytest.approx([value] * 2, abs=0.01)
    assert found["newest"] == pytest.approx([value + 1] * 2, abs=0.01)


@pytest.mark.model
def test_a_pushed_run_loads_as_its_model_card_says(loaded):
    found, value, tokens = loaded
    assert found["pushed"] == [pytest.approx(value, abs=0.01), tokens]
    assert found["adapter"] == [128.0, 128.0]
