"""What an upgrade costs a finished run: nothing. The run is one that version 0.1.0 made."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from pydantic import create_model
from typer.testing import CliRunner

from medcot_utils import settings
from medcot_utils.cli.main import app
from medcot_utils.config import RunConfig, load_config, setting_names
from medcot_utils.evaluation.headline import HEADLINE
from medcot_utils.machine.paths import HOME
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.directory import Run
from medcot_utils.series import runner
from medcot_utils.settings import Section, added_later, is_added_later

ARCHIVE = HOME / "tests" / "data" / "run-of-0.1.0.tar.xz"

# The steps that a new setting makes stale once it has another value, by section: written by hand, not taken from the table.
STALE = {
    "model": "1 2 4 5 6 7",
    "prompt": "1 2 3 6 7",
    "dataset": "1 2 3 7",
    "dataset.columns": "1 2 3 7",
    "lora": "1 4 5",
    "training": "1 4 5",
    "generation": "1 2 6",
    "evaluation": "1 6",
    "export": "1",
    "hub": "1",
    "tracking": "1",
    "secrets": "1",
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old") / "run"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old_run(unpacked, tmp_path):
    """A copy of the run of 0.1.0 that a test may change."""
    return Run.open(shutil.copytree(unpacked, tmp_path / "run"))


def leaves(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


# --- the run as it is ------------------------------------------------------------------------------------------------


def test_a_run_of_0_1_0_is_done(old_run):
    assert {step: old_run.step_state(step) for step in STEPS} == dict.fromkeys(STEPS, "done")


def test_a_run_of_0_1_0_is_not_run_again(old_run, monkeypatch):
    monkeypatch.setattr(runner, "_run_notebook", lambda run, notebook, *more: pytest.fail(f"{notebook.stem} was started"))
    said, before = [], (old_run.path / "manifest.json").read_bytes()
    finished = runner.run_series(old_run.path, old_run.config, say=said.append)
    assert said == [f"{step}: skipped, done before with the same settings and inputs" for step in STEPS]
    assert (finished.path / "manifest.json").read_bytes() == before


def test_the_profile_that_made_it_trains_nothing_again(old_run):
    # The profile measures more since: its answers are made anew, and notebooks 03 to 05 have nothing to do.
    config, _ = runner.plan_config(old_run.path, "smoke", [])
    again = Run.create(old_run.path, config)
    states = {step[:2]: again.step_state(step) for step in STEPS}
    assert states == {"01": "stale", "02": "stale", "06": "stale", "07": "stale"} | dict.fromkeys(("03", "04", "05"), "done")


def test_status_and_report_work_on_a_run_of_0_1_0(old_run):
    shown = CliRunner().invoke(app, ["status", str(old_run.path), "--json"])
    found = json.loads(shown.stdout)
    assert {step["state"] for step in found["steps"]} == {"done"} and set(found["metrics"]) == set(HEADLINE[:5])
    assert not Run.open(old_run.path).step_to_redo("report")
    assert "before and after" in CliRunner().invoke(app, ["status", str(old_run.path)]).stdout
    (old_run.path / "report.html").unlink()
    made = CliRunner().invoke(app, ["report", str(old_run.path)])
    assert made.exit_code == 0, made.output
    assert "<html" in (old_run.path / "report.html").read_text(encoding="utf-8")


# --- settings added since ----------------------------------------------------------------------------------------------


def unmarked_settings(model, known):
    found = []
    for name in setting_names(model):
        *sections, leaf = name.split(".")
        owner = model
        for section in sections:
            owner = owner.model_fields[section].annotation
        if name not in known and not is_added_later(owner.model_fields[leaf]):
            found.append(name)
    return found


def test_every_setting_since_0_1_0_is_marked(unpacked):
    known = set(leaves(json.loads((unpacked / "config.json").read_text(encoding="utf-8"))))
    unmarked = unmarked_settings(RunConfig, known)
    assert not unmarked, (
        f"{', '.join(unmarked)}: runs of 0.1.0 do not know such a setting, and would be trained again for it. Declare it in "
        f"settings.py with added_later(default, ...), the default being what the series did before"
    )


def test_an_unmarked_setting_is_found():
    lora = create_model("Lora", __base__=settings.LoraSettings, marked=(int, added_later(0)), forgotten=(int, 0))
    config = create_model("Config", __base__=RunConfig, lora=(lora, lora()))
    assert unmarked_settings(config, set(setting_names())) == ["lora.forgotten"]


def test_only_a_value_unlike_the_default_counts():
    columns = create_model("Columns", __base__=settings.ColumnNames, later=(int, added_later(0)))
    dataset = create_model("Dataset", __base__=settings.DatasetSettings, columns=(columns, columns()))
    extra = create_model("Extra", __base__=Section, one=(int, added_later(1)), two=(str | None, added_later(None)))
    config = create_model("Config", __base__=RunConfig, dataset=(dataset, ...), extra=(extra, extra()), top=(int, added_later(3)))
    before = load_config("smoke")
    values = before.model_dump()
    same = config.model_validate(values)
    names = ["dataset", "lora", "seed"]
    assert same.digest([*names, "extra", "extra.two", "top"]) == before.digest(names)
    assert same.digest(["dataset.columns"]) == before.digest(["dataset.columns"])
    for changed in (
        {"dataset": values["dataset"] | {"columns": {"later": 1}}},
        {"extra": {"one": 2}},
        {"extra": {"two": "x"}},
        {"top": 4},
    ):
        assert config.model_validate(values | changed).digest([*names, "extra", "top"]) != before.digest(names), changed
    with pytest.raises(KeyError):
        same.digest(["extra.three"])


IN_ANOTHER_PROCESS = """
import json, sys
from pathlib import Path
from medcot_utils.evaluation.headline import HEADLINE
from medcot_utils.config import config_from_dict
from medcot_utils.run.artifacts import STEPS
from medcot_utils.run.directory import Run
from medcot_utils.series import runner

run, said = Run.open(sys.argv[1]), []
runner._run_notebook = lambda run, notebook, *more: said.append(f"{notebook.stem} was started")
runner.run_series(run.path, run.config, say=said.append)
stale = {}
for section, value in json.loads(sys.argv[2]).items():
    values = run.config.model_dump(mode="json")
    node = values
    for part in section.split("."):
        node = node[part]
    node["later"] = value
    changed = Run(run.path, config_from_dict(values))
    stale[section] = " ".join(name[1] for name in STEPS if changed.step_state(name) == "stale")
print(json.dumps({"said": said, "config": json.loads((run.path / "config.json").read_text()), "stale": stale}))
"""


@pytest.fixture(scope="module")
def a_later_version(unpacked, tmp_path_factory):
    """What a version says of the old run that has one more setting in each section."""
    home = tmp_path_factory.mktemp("later")
    shutil.copytree(Path(settings.__file__).parent, home / "medcot_utils", ignore=shutil.ignore_patterns("__pycache__"))
    source = Path(settings.__file__).read_text(encoding="utf-8")
    source, places = re.subn(
        r'(?m)^(class (\w+)\(Section\):\n(?:    """.*"""\n\n)?)',
        lambda match: (
            match[1]
            + (
                "    later: tuple[str, ...] = added_later(('A',))\n"
                if match[2] == "SecretsSettings"
                else "    later: int = added_later(0)\n"
            )
        ),
        source,
    )
    assert places == len(STALE)
    (home / "medcot_utils" / "settings.py").write_text(source, encoding="utf-8")
    run_dir = shutil.copytree(unpacked, home / "run")
    values = {section: ["B"] if section == "secrets" else 1 for section in STALE}
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(run_dir), json.dumps(values)],
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(home), "MEDCOT_NOTEBOOKS": str(HOME / "notebooks")},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_setting_added_to_each_section_retrains_nothing(a_later_version):
    assert a_later_version["said"] == [f"{step}: skipped, done before with the same settings and inputs" for step in STEPS]
    added = {name for name in leaves(a_later_version["config"]) if name.endswith(".later")}
    assert added == {f"{section}.later" for section in STALE}


@pytest.mark.parametrize("section", STALE)
def test_another_value_of_it_makes_the_right_steps_stale(a_later_version, section):
    assert a_later_version["stale"][section] == STALE[section]
