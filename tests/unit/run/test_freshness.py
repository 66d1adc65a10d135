"""What is made again and what is not: the table of artifacts, skipping, and checkpoints."""

from __future__ import annotations

import json
import re
import shutil

import nbformat
import pytest

from medcot_utils.config import setting_names
from medcot_utils.machine.paths import HOME
from medcot_utils.run.artifacts import ARTIFACTS, STEPS
from medcot_utils.run.directory import Run

ANSWERS = {"base_answers", "tuned_answers", "merged_answers"}
METRICS = {"metrics", "merged_metrics"}
DATA = {"train_rows", "held_out_rows", "data_report"}

# Setting, and every artifact whose own content it changes, by the meaning of each: written by hand, not taken from layout.
BY_SETTING = [
    ("generation.max_new_tokens=25", ANSWERS),
    ("prompt.newline_after_think=false", {*ANSWERS, "base_mcq", "tuned_mcq", "export_check", "gguf", "gguf_check", *DATA}),
    ("lora.r=8", {"plan", "adapter", "training_log"}),
    ("training.learning_rate=1e-4", {"plan", "adapter", "training_log"}),
    ("training.save_steps=3", {"plan", "adapter", "training_log"}),
    # How the work is shared out and when it pauses: the same losses come out.
    ("training.num_processes=2", set()),
    ("training.num_processes=auto", set()),
    ("training.max_hours=2", set()),
    ("training.batch_plan=as_set", set()),
    ("training.padding=padded", set()),
    ("dataset.loss_on=full", {"questions", "model_card", *DATA}),
    ("evaluation.n_resamples=600", METRICS),
    ("evaluation.num_questions=5", {"questions", *METRICS}),
    ("evaluation.n_samples=3", {"base_answers", "tuned_answers", *METRICS}),  # the merged model answers greedily alone
    ("evaluation.mcq_limit=2", {"base_mcq", "tuned_mcq", *METRICS}),
    ("evaluation.answer_tokens=8", {*ANSWERS, "base_mcq", "tuned_mcq", *METRICS}),
    ("evaluation.merged_questions=2", {"merged_answers", *METRICS}),
    ("export.dtype=bfloat16", {"merged", "export_check", "merged_answers", "merged_loss", "gguf_check"}),
    ("export.merge_into=base_16bit", {"merged"}),
    ("export.check_prompts=2", {"export_check", "gguf_check"}),
    ("export.check_rows=2", {"export_check"}),
    ("export.gguf=q8_0", {"gguf", "gguf_check"}),
    (
        "model.max_seq_length=512",
        {"base_answers", "tuned_answers", "base_mcq", "tuned_mcq", "plan", "adapter", "training_log", "held_out_loss"}
        | {"base_16bit_loss", "merged", "gguf", *DATA},
    ),
]
BY_INPUT = [
    ("questions", {*ANSWERS, *METRICS, "export_check", "gguf_check", *DATA}),
    ("train_rows", {"plan", "adapter", "training_log", "metrics"}),
    ("held_out_rows", {"adapter", "training_log", "held_out_loss", "base_16bit_loss", "export_check", "merged_loss"}),
    ("adapter", {"held_out_loss", "tuned_answers", "tuned_mcq", "merged", "export_check"}),
    ("merged", {"export_check", "merged_answers", "merged_loss", "gguf", "gguf_check"}),
    ("base_answers", {"metrics", "report"}),
    ("metrics", {"report", "model_card"}),
    ("report", set()),
]


def stale(run: Run) -> set[str]:
    return {name for name in ARTIFACTS if not run.is_fresh(name)}


def test_a_stale_input_further_back_names_the_notebook_to_redo(run_factory, write_all):
    run = write_all(run_factory())
    assert {run.step_to_redo(name) for name in ARTIFACTS} == {None}
    run.write("adapter", lambda folder: (folder / "weights.bin").write_bytes(b"another one"))
    assert run.is_fresh("merged_answers") and run.step_to_redo("merged_answers") == "07_export"
    assert run.step_to_redo("adapter") is None and run.step_to_redo("metrics") == "05_training", "its held-out loss"
    assert run_factory("seed=5").step_to_redo("model_card") == "02_baseline_inference"


def test_weights_that_are_gone_do_not_make_their_answers_stale(run_factory, write_all):
    run = write_all(run_factory())
    shutil.rmtree(run.place("merged"))
    assert run.step_to_redo("merged_answers") is None and run.step_to_redo("merged") == "07_export"


def test_nothing_is_stale_after_a_whole_series_opened_anew(run_factory, write_all):
    assert stale(Run.open(write_all(run_factory()).path)) == set()


@pytest.mark.parametrize(("override", "expected"), BY_SETTING)
def test_a_changed_setting_makes_stale_only_what_depends_on_it(run_factory, write_all, override, expected):
    write_all(run_factory())
    assert stale(run_factory(override)) == expected | {"machine"}


@pytest.mark.parametrize(("override", "expected"), BY_SETTING[:3])
def test_a_setting_put_back_makes_all_fresh_again(run_factory, write_all, override, expected):
    write_all(run_factory())
    assert stale(run_factory(override))
    assert stale(run_factory()) == set()


@pytest.mark.parametrize(("name", "expected"), BY_INPUT)
def test_a_changed_input_makes_only_its_products_stale(run_factory, write_all, content, name, expected):
    run = write_all(run_factory())
    run.write(name, content(name, "second"))
    assert stale(run) == expected


@pytest.mark.parametrize("name", [name for name, _ in BY_INPUT])
def test_an_input_redone_with_the_same_content_keeps_all_fresh(run_factory, write_all, content, name):
    run = write_all(run_factory())
    run.write(name, content(name))
    assert stale(run) == set()


@pytest.mark.parametrize(
    ("asked", "stale_steps"),
    [
        ("export.gguf=f16", {"01_setup", "07_export"}),
        ("evaluation.base_16bit_loss=true", {"01_setup", "06_comparison"}),
        ("evaluation.measure_merged=true", {"01_setup", "06_comparison", "07_export"}),
    ],
)
def test_an_optional_artifact_makes_its_step_stale_if_requested(run_factory, content, asked, stale_steps):
    off = ("export.gguf=null", "evaluation.base_16bit_loss=false", "evaluation.measure_merged=false")
    run = run_factory(*off)
    for step in STEPS:
        for name in run.makes(step):
            run.write(name, content(name))
        run.record_step(step, state="done")
    optional = {name for name, artifact in ARTIFACTS.items() if artifact.when}
    assert {"base_16bit_loss", "merged_answers", "merged_loss", "merged_metrics", "gguf", "gguf_check"} == optional
    assert set(ARTIFACTS) - set(run.manifest()["artifacts"]) == optional
    assert {run.step_state(step) for step in STEPS} == {"done"}
    again = run_factory(*off, asked)
    assert {step for step in STEPS if again.step_state(step) == "stale"} == stale_steps


def test_new_generation_settings_redo_answers_but_not_training(run_factory, write_all, content):
    write_all(run_factory())
    run = run_factory("generation.max_new_tokens=25")
    for name in ANSWERS:
        run.write(name, content(name, "second"))
    assert stale(run) == {*METRICS, "report", "machine"}
    assert run.is_fresh("train_rows") and run.is_fresh("adapter")


def test_the_content_of_a_users_data_file_counts(run_factory, write_all, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"Question": "a"}\n')
    override = f"dataset.path={json.dumps(str(file))}"
    write_all(run_factory(override))
    file.touch()
    assert stale(run_factory(override)) == set()
    file.write_text('{"Question": "b"}\n')
    assert stale(run_factory(override)) == {"questions", *DATA}


def test_an_artifact_is_made_once_and_then_read(run_factory, capsys):
    run, made = run_factory(), []

    def make():
        made.append(1)
        return [{"id": str(len(made))}]

    assert run.get_or_make("questions", make) == [{"id": "1"}]
    assert capsys.readouterr().out == ""
    assert run_factory().get_or_make("questions", make) == [{"id": "1"}]
    assert "questions.jsonl: made before from the same inputs" in capsys.readouterr().out
    assert run_factory("evaluation.num_questions=5").get_or_make("questions", make) == [{"id": "2"}]


def test_a_damaged_artifact_is_made_again(run_factory):
    path = run_factory().write("questions", [{"id": "1"}])
    path.write_text(path.read_text().replace("1", "7"))
    assert run_factory().get_or_make("questions", lambda: [{"id": "2"}]) == [{"id": "2"}]


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("lora.r=8", False),
        ("training.max_steps=9", False),
        ("generation.max_new_tokens=9", True),
        ("training.num_processes=2", True),
        ("training.num_processes=auto", True),
        ("training.max_hours=2", True),
    ],
)
def test_checkpoints_lie_elsewhere_when_what_is_trained_changes(run_factory, write_all, override, same):
    before = write_all(run_factory()).checkpoint_dir("adapter")
    after = run_factory(override).checkpoint_dir("adapter")
    assert (before == after) is same
    assert before.is_dir() and after.is_dir()


def test_checkpoints_lie_elsewhere_when_the_training_rows_change(run_factory, write_all, content):
    run = write_all(run_factory())
    before = run.checkpoint_dir("adapter")
    run.write("train_rows", content("train_rows", "second"))
    assert run.checkpoint_dir("adapter") != before


# --- the table itself --------------------------------------------------------------------------------------------------


def test_every_input_is_made_before_it_is_read():
    made: list[str] = []
    for step in STEPS:
        for name in STEPS[step].makes:
            late = [source for source in ARTIFACTS[name].inputs if source not in made]
            assert not late, f"{name} of {step} reads {late}, which are made later, or nowhere"
            made.append(name)
    assert sorted(made) == sorted(ARTIFACTS)


def test_a_step_reads_its_artifacts_inputs_and_what_it_shows():
    for number, step in STEPS.items():
        wanted = {source for name in step.makes for source in ARTIFACTS[name].inputs} - set(step.makes)
        cells = [
            cell.source for cell in nbformat.read(HOME / "notebooks" / f"{number}.ipynb", 4).cells if cell.cell_type == "code"
        ]
        shown = set(re.findall(r'\brun\.read\("(\w+)"\)', "\n".join(cells))) - set(step.makes)
        assert wanted <= set(step.reads) and shown <= set(step.reads), number
        assert set(step.reads) <= wanted | shown, number


def test_the_table_names_real_settings_and_one_artifact_per_file():
    names = setting_names()
    for name, artifact in ARTIFACTS.items():
        for setting in artifact.settings:
            assert any(known == setting or known.startswith(f"{setting}.") for known in names), f"{name}: {setting}"
    assert len({artifact.file for artifact in ARTIFACTS.values()}) == len(ARTIFACTS)


def test_every_setting_that_affects_results_makes_one_stale():
    used = {setting for name, artifact in ARTIFACTS.items() if name != "machine" for setting in artifact.settings}
    unused = [name for name in setting_names() if not any(name == one or name.startswith(f"{one}.") for one in used)]
    how = {f"training.{name}" for name in ("batch_plan", "padding", "num_processes", "max_hours")}
    how |= {"hub.private", "hub.tag", "hub.patience_seconds", "hub.verify_all"}
    assert set(unused) == how | {name for name in setting_names() if name.startswith(("tracking.", "secrets."))}
