"""Work that two GPUs share: answers, training, and a 16-bit model that one does not hold. Each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("two_gpus")

ANSWERS = """
import json, sys
from medcot_utils.config import load_config
from medcot_utils.models.engine import get_engine

def main():
    config = load_config("smoke", [f"model.name={sys.argv[1]}", "model.engine=auto", "model.dtype=float16",
        "generation.max_new_tokens=48", "generation.batch_size=4"])
    engine = get_engine(config.model)
    from medcot_utils import data
    from medcot_utils.machine.gpu import describe_used_gpus
    from medcot_utils.models.generation import answer_questions
    from medcot_utils.models.other_gpus import OtherGpus

    model, tokenizer = engine.load(config.model)
    model = engine.for_inference(model)
    rows = data.load_rows(config.dataset)
    questions = [{"id": str(i), "Question": rows[i % len(rows)]["Question"]} for i in range(32)]
    found, others = {}, OtherGpus(engine, config.model)
    for name, given in {"one": None, "two": others, "again": others}.items():
        if name == "two":  # the first GPU would have answered all before the second has loaded
            assert others._start(1)[0]._connection.poll(300)
        records = answer_questions(model, tokenizer, questions, config.generation, True, 0, 1, 16, others=given)
        found[name] = [{**record, "seconds": None} for record in records]
    others.close()
    print("FOUND" + json.dumps(found | {"used": describe_used_gpus()}))

if __name__ == "__main__":
    main()
"""

SPREAD = """
import json, sys
from pathlib import Path
from medcot_utils.config import load_config
from medcot_utils.models.engine import get_engine

name = sys.argv[1]
config = load_config("smoke", [f"model.name={name}", "model.engine=auto", "generation.max_new_tokens=24"])
engine = get_engine(config.model)
import torch
from datasets import Dataset
from medcot_utils.machine.gpu import release_gpu_memory
from medcot_utils.models.generation import answer_questions
from medcot_utils.models.layerwise import unquantized_losses
from medcot_utils.models.losses import row_losses
from medcot_utils.models.merging import load_unquantized

model, _ = engine.load(config.model)  # as in notebook 07: what is loaded after it runs the layers that Unsloth has patched
del model
torch.manual_seed(1)
texts = [torch.randint(5, 1000, (length,)).tolist() for length in (200, 37, 80, 5, 120)]
rows = Dataset.from_list([{"id": str(i), "input_ids": ids, "labels": ids} for i, ids in enumerate(texts)])
questions = [{"id": str(i), "Question": f"Why fever? {i}"} for i in range(4)]
weights = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
found = {}
for way in ("one", "two"):
    release_gpu_memory()
    for gpu in (0, 1):
        total, held = torch.cuda.get_device_properties(gpu).total_memory, torch.cuda.memory_reserved(gpu)
        torch.cuda.set_per_process_memory_fraction(1.0 if way == "one" else (held + 0.9 * weights) / total, gpu)
    model, tokenizer = load_unquantized(name, "bfloat16")
    places = sorted({str(weight.device) for weight in model.parameters()})
    losses = [one["nll"] for one in row_losses(model, rows, 2, "merged")]
    records = answer_questions(model, tokenizer, questions, config.generation, True, 0)
    found[way] = {"places": places, "losses": losses, "answers": [record["completion"] for record in records]}
    del model
    found[way]["base"] = [one["nll"] for one in unquantized_losses(name, None, "bfloat16", rows, 2, "base")]
print("FOUND" + json.dumps(found))
"""


@pytest.fixture
def two_gpus():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


def run_script(tmp_path: Path, source: str, *arguments: str) -> dict:
    script = tmp_path / "script.py"
    script.write_text(source)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND")).removeprefix("FOUND"))


def test_two_gpus_give_the_records_of_one(wide_llama, tmp_path):
    found = run_script(tmp_path, ANSWERS, wide_llama)
    assert len(found["one"]) == 64 and len({record["completion"] for record in found["one"]}) > 32
    assert found["two"] == found["one"] and found["again"] == found["one"]
    assert found["used"].startswith("GPUs used: 0 (") and ", 1 (" in found["used"]


def test_a_model_spread_over_two_gpus_is_the_one_on_one(wide_llama, tmp_path):
    found = run_script(tmp_path, SPREAD, wide_llama)
    assert found["one"]["places"] == ["cuda:0"] and found["two"]["places"] == ["cuda:0", "cuda:1"]
    for kind in ("losses", "base"):
        assert found["two"][kind] == pytest.approx(found["one"][kind], rel=0.01)
    assert found["two"]["answers"] == found["one"]["answers"]


def test_notebook_05_trains_on_two_gpus_as_on_one(make_config, tokenized, tmp_path):
    from medcot_utils.models.engine import load_tokenizer
    from medcot_utils.run.directory import Run
    from medcot_utils.training.batch_plan import count_processes
    from medcot_utils.training.launch import train_in_processes

    config = make_config("training.num_processes=auto", "training.max_steps=8")
    rows, held_out = tokenized(config, load_tokenizer(config.model))
    assert count_processes(config) in (2, 4, 8)
    losses = {}
    for processes in (1, 2):
        run = Run.create(tmp_path / f"run-{processes}", config)
        for name, content in {"questions": [], "train_rows": rows, "held_out_rows": held_out}.items():
            run.write(name, content)
        train_in_processes(run, processes)
        state = run.checkpoint_dir("adapter") / "checkpoint-8" / "trainer_state.json"
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        losses[processes] = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert losses[2] == pytest.approx(losses[1], rel=0.01) and losses[1][8] < losses[1][1]
