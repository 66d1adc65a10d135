"""What a build says at its end: the steps to a fetched run, what comes back, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from medcot_utils.series.kaggle.build import build
from medcot_utils.series.kaggle.next_steps import list_next_steps

STEPS = ["1. a phone number", "2. a token", "3. push", "4. secrets", "5. look", "6. fetch"]


@pytest.fixture
def said(tmp_path):
    def make(profile, *settings, folder=None, **arguments):
        built = build(tmp_path, profile, list(settings), **{"kernel": "ann/heart-run"} | arguments)
        return list_next_steps(built, folder or Path())

    return make


def test_the_steps_lead_from_a_token_to_the_fetched_run(said):
    lines = said("article")
    assert [line[: len(step)] for line, step in zip(lines, STEPS, strict=False)] == STEPS
    assert "neither Internet nor a GPU" in lines[0] and "KAGGLE_API_TOKEN" in lines[1]
    assert lines[2] == "3. push: medcot kaggle push; the session starts at once on 2 x T4, 16 GB each, float16"
    assert "https://www.kaggle.com/code/ann/heart-run/edit" in lines[3] and "Add-ons > Secrets" in lines[3]
    assert "medcot kaggle status ann/heart-run" in lines[4] and "medcot kaggle output ann/heart-run" in lines[5]
    assert lines[6].startswith("comes back: adapter") and all("\n" not in line for line in lines)


def test_what_ends_with_the_session_is_named_unless_pushed(said):
    lost = said("article")[-1]
    assert lost.startswith("ends with the session") and ": merged. To keep it" in lost and "hub.repo_id=NAME/MODEL" in lost
    assert "because it is on the session's scratch disk, not in the output" in lost and "GB" not in lost
    assert said("demo")[-1] == lost, "a small model is left out too"
    assert ": merged, gguf. To keep it" in said("article", "export.gguf=f16")[-1]
    lines = said("article", "hub.repo_id=ann/hearts")
    assert lines[-1].startswith("goes only to the Hub (ann/hearts)") and lines[-1].endswith(": merged")
    assert lines[2].endswith("float16, and ends in notebook 01 without the secret of step 4")
    assert "needed: HF_TOKEN or HUGGINGFACE_TOKEN for the push to ann/hearts" in lines[3]
    assert said("article", "hub.repo_id=ann/hearts", "hub.artifacts=adapter")[-1].startswith("ends with the session")


def test_only_secrets_that_the_run_can_use_are_asked_for(said):
    assert "for Weights & Biases" in said("article")[3]
    assert "Biases" not in said("article", "tracking.backend=none")[3]
    assert "optional: my_key for the Hub" in said("article", "secrets.huggingface=my_key")[3]


def test_a_run_without_a_gpu_asks_for_none(said):
    lines = said("demo")
    assert "without it Kaggle gives no Internet" in lines[0] and "at once, without a GPU" in lines[2]


def test_an_accelerator_that_few_are_given_is_named_so(said):
    assert "4 x L4, 24 GB each, bfloat16; Kaggle gives it only to" in said("article", accelerator="NvidiaL4")[2]


def test_another_folder_and_a_missing_owner_are_in_the_commands(said, tmp_path):
    lines = said("demo", folder=Path("there"))
    assert "medcot kaggle push --folder there" in lines[2] and "medcot kaggle output --folder there" in lines[5]
    assert "code/NAME/medcot-series" in "".join(said("demo", kernel="your-name/medcot-series"))
