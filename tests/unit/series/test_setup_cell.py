"""The setup cell finds the project wherever one notebook was opened, and it and the badges follow one setting."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from medcot_utils.errors import MedcotError, PlatformError
from medcot_utils.machine import paths
from medcot_utils.run.artifacts import STEPS
from medcot_utils.series import colab as drive
from medcot_utils.series.setup_cell import MOST_LINES, badges, faults, repository, setup_cell, write

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkout(tmp_path):
    """README, pyproject.toml and notebooks of the project in a copy, as the setting there makes them."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "notebooks", copy / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copyfile(ROOT / name, copy / name)
    write(copy)
    return copy


def texts(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- one setting ---------------------------------------------------------------------------------------------------


def test_the_cell_is_short_and_passes_the_linter(tmp_path):
    cell = setup_cell("some-owner/a-name-of-some-length")
    assert len(cell.splitlines()) <= MOST_LINES
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in ('RUN_DIR = "auto"', cell)])
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "one.ipynb")
    for file in ("pyproject.toml", "notebooks/ruff.toml"):
        shutil.copyfile(ROOT / file, tmp_path / file)
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_a_repository_is_written_everywhere_once(checkout):
    written = {path.name for path in write(checkout, "ann/hearts")}
    assert written == {"pyproject.toml", "README.md", *(f"{name}.ipynb" for name in STEPS)}
    after = texts(checkout)
    assert write(checkout, "ann/hearts") == [] == faults(checkout) and texts(checkout) == after
    assert tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["medcot"]["repository"] == "ann/hearts"
    readme = (checkout / "README.md").read_text().split("\n\n")
    assert readme[0] == "# medcot" and readme[1] == badges("ann/hearts")
    for name in STEPS:
        notebook = nbformat.read(checkout / "notebooks" / f"{name}.ipynb", as_version=4)
        intro = notebook.cells[0].source.split("\n\n")
        assert intro[-2] == badges("ann/hearts", name) and f"ann/hearts/blob/main/notebooks/{name}.ipynb" in intro[-2]
        assert notebook.cells[2].source == setup_cell("ann/hearts")


def test_make_badges_writes_badges_the_notebook_rules_accept(checkout):
    shutil.copytree(ROOT / "medcot_utils", checkout / "medcot_utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "Makefile", checkout / "Makefile")
    for folder in ("docs", "benchmarks/results"):  # the rules compare the documents with the demo's numbers
        shutil.copytree(ROOT / folder, checkout / folder)
    bin_folder = Path(sys.executable).parent
    make = ["make", "--old-file=.venv/.installed", f"BIN={bin_folder}", "badges"]
    # Within `make quick` this make would be a part of that one, and say so.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    environment |= {"PYTHONPATH": str(checkout)}

    def run(*command):
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120, check=False)

    done = run(*make, "REPO=ann/hearts")
    assert done.returncode == 0 and "README.md" in done.stdout, done.stderr
    assert run(*make, "REPO=ann/hearts").stdout.splitlines()[1:] == [], "a second call writes nothing"
    checked = run(str(bin_folder / "python"), "-m", "medcot_utils.series.committed", "check")
    assert checked.returncode == 0, checked.stderr
    refused = run(*make)
    assert refused.returncode != 0 and "medcot: '' is not owner/name: make badges REPO=owner/name" in refused.stderr


def test_another_repository_replaces_the_first(checkout):
    bare = texts(checkout)
    write(checkout, "ann/hearts")
    write(checkout, "bob/lungs")
    assert not any(b"ann/hearts" in content for content in texts(checkout).values())
    pyproject = checkout / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("bob/lungs", ""))
    write(checkout)
    assert repository(checkout) == "" and texts(checkout) == bare
    assert not any(b"Open in Colab" in content for content in bare.values())


def test_without_a_repository_readme_and_01_say_what_to_do(checkout):
    without = badges("")
    assert "make badges REPO=owner/name" in without and "medcot kaggle build" in without and "](" not in without, "no link"
    notebooks = {name: nbformat.read(checkout / "notebooks" / f"{name}.ipynb", as_version=4).cells[0].source for name in STEPS}
    readme = (checkout / "README.md").read_text().split("\n\n")
    assert readme[readme.index("## The notebooks") - 1] == notebooks["01_setup"].split("\n\n")[-2] == without
    assert [name for name in STEPS if "make badges" in notebooks[name]] == ["01_setup"]
    write(checkout, "ann/hearts")
    assert not any(b"make badges REPO=owner/name`. It" in content for content in texts(checkout).values()), (
        "badges took its place"
    )


def test_badges_and_setup_cells_keep_the_rest_of_a_notebook(checkout):
    before = nbformat.read(checkout / "notebooks" / "05_training.ipynb", as_version=4)
    write(checkout, "ann/hearts")
    after = nbformat.read(checkout / "notebooks" / "05_training.ipynb", as_version=4)
    assert [c for i, c in enumerate(after.cells) if i not in (0, 2)] == [c for i, c in enumerate(before.cells) if i not in (0, 2)]
    assert after.cells[2].execution_count == before.cells[2].execution_count


def test_a_setup_cell_changed_by_hand_is_a_fault(checkout):
    path = checkout / "notebooks" / "03_dataset_prep.ipynb"
    path.write_text(path.read_text().replace("find_spec", "find_specs", 1))
    assert faults(checkout) == [
        "03_dataset_prep.ipynb: badges or setup cell differ from the template: "
        "python -m medcot_utils.series.committed setup-cells"
    ]


@pytest.mark.parametrize("name", ["", "hearts", "https://github.com/ann/hearts", "ann/hearts/x", 'ann/"x'])
def test_what_is_no_repository_is_refused_and_changes_nothing(name, checkout):
    before = texts(checkout)
    with pytest.raises(MedcotError, match="is not owner/name: make badges REPO=owner/name"):
        write(checkout, name)
    assert texts(checkout) == before


# --- one notebook alone --------------------------------------------------------------------------------------------

RUN = "RUN_DIR = 'runs/one'\n{cell}\nimport medcot_utils, json\nprint(json.dumps([medcot_utils.__file__, str(run_dir)]))"


def run_cell(folder, source="", **environment):
    """The setup cell as a process of its own in `folder`: the last line that it printed, or what it raised."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}
    script = folder / "cell.py"
    script.write_text(RUN.format(cell=setup_cell(source)))
    # Where the package is installed beside the tests, as in the project's own environment, this process must not see it.
    blind = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
    blind += "sys.path = [p for p in sys.path if not __import__('os').path.isdir(p + '/medcot_utils')]\n"
    script.write_text(blind + script.read_text())
    done = subprocess.run(
        [sys.executable, "cell.py"], cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout.splitlines()[-1] if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@pytest.fixture
def project(tmp_path):
    """The package alone, in a folder that a test puts somewhere."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "medcot_utils", folder / "medcot_utils", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("place", [".", ".."])
def test_the_package_beside_the_notebook_or_above_it_is_used(place, project):
    folder = project if place == "." else project / "notebooks"
    package, run_dir = json.loads(run_cell(folder))
    assert Path(package) == project / "medcot_utils" / "__init__.py"
    assert run_dir == str(project / "runs" / "one"), "the same folder from the checkout and from its notebooks"


@pytest.fixture
def attached(project, tmp_path):
    """A session's environment, with a data set among its inputs whose package and modules leave a mark when they are run."""
    home = tmp_path / "kaggle" / "input" / "rows" / "deep"
    shutil.copytree(project, home)
    mark = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for module in ("medcot_utils/__init__.py", "medcot_utils/series/notebook.py", "psutil.py", "pandas.py"):
        (home / module).write_text(mark)
    return {"MEDCOT_KAGGLE_ROOT": str(tmp_path / "kaggle"), "KAGGLE_KERNEL_RUN_TYPE": "Interactive"}


def test_attached_data_is_never_code_without_a_package(attached, tmp_path):
    line = run_cell(tmp_path / "kaggle" / "working", **attached)
    assert line.startswith("ModuleNotFoundError: no medcot_utils: ") and not (tmp_path / "ran").exists()


def test_attached_data_is_never_code_beside_the_checkout(attached, project, tmp_path):
    package, _ = json.loads(run_cell(project, **attached))
    assert Path(package).parents[1] == project and not (tmp_path / "ran").exists()


def test_attached_data_is_never_code_beside_source(attached, hub, tmp_path):
    package, _ = json.loads(run_cell(tmp_path / "kaggle" / "working", "ann/hearts", **attached, **hub))
    assert Path(package).parents[1] == tmp_path / "kaggle" / "working" / "medcot" and not (tmp_path / "ran").exists()


def test_a_headless_notebook_takes_the_package_of_medcot_run(attached, project, tmp_path):
    data = tmp_path / "kaggle" / "input" / "rows" / "deep"  # as if somebody began a series in a folder of data
    package, _ = json.loads(run_cell(data, MEDCOT_HOME=str(project), PYTHONSAFEPATH="1", **attached))
    assert Path(package).parents[1] == project and not (tmp_path / "ran").exists()


@pytest.fixture
def hub(project, tmp_path):
    """The environment in which ann/hearts on GitHub is the project."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    subprocess.run([*git, "clone", "-q", "--bare", str(project), str(tmp_path / "hub" / "ann" / "hearts")], check=True)
    found = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/hub/.insteadOf"}
    return found | {"GIT_CONFIG_VALUE_0": "https://github.com/"}


def test_the_project_is_fetched_once_and_found_the_next_time(hub, tmp_path):
    package, _ = json.loads(run_cell(tmp_path / "alone", "ann/hearts", **hub))
    assert Path(package).parents[1] == tmp_path / "alone" / "medcot"
    shutil.rmtree(tmp_path / "hub")
    assert json.loads(run_cell(tmp_path / "alone", "ann/hearts", **hub))[0] == package


@pytest.mark.parametrize("source", ["", "ann/gone"])
def test_where_it_is_nowhere_one_line_says_what_to_do(source, tmp_path):
    nowhere = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/.insteadOf"}
    nowhere["GIT_CONFIG_VALUE_0"] = "https://github.com/"
    line = run_cell(tmp_path / "alone", source, **nowhere)
    assert line.startswith("ModuleNotFoundError: no medcot_utils: open its checkout, copy it to ./medcot, or set SOURCE")


# --- Google Drive --------------------------------------------------------------------------------------------------


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """A Colab whose Drive is mounted by a `google.colab.drive` that does, or raises, what its text says."""
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setattr(paths, "COLAB_DRIVE", tmp_path / "content" / "drive")
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "google"}

    def install(body):
        package = tmp_path / "modules" / "google" / "colab"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").touch()
        (package / "__init__.py").touch()
        (package / "drive.py").write_text(f"import pathlib\ndef mount(where):\n    {body}\n")
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        return paths.COLAB_DRIVE / "MyDrive" / "medcot" / "runs" / "notebooks"

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "google"]:
        del sys.modules[name]
    sys.modules.update(hidden)


def test_a_run_directory_on_drive_asks_for_the_mount_once(colab, capsys):
    folder = colab("(pathlib.Path(where) / 'MyDrive').mkdir(parents=True)")
    assert drive.run_dir_of("drive") == folder
    assert "Colab now asks for your permission to mount it" in capsys.readouterr().out
    assert drive.run_dir_of(str(folder)) == folder and capsys.readouterr().out == ""


def test_a_run_directory_elsewhere_mounts_nothing(colab, tmp_path):
    colab("raise RuntimeError('asked')")
    assert drive.run_dir_of(str(tmp_path / "run")) == tmp_path / "run"


@pytest.mark.parametrize("body", ["raise ValueError('mount failed')", "pass"])
def test_a_refused_mount_says_how_to_do_it_by_hand(body, colab):
    colab(body)
    with pytest.raises(PlatformError, match=r"from google.colab import drive; drive.mount\("):
        drive.run_dir_of("drive")


def test_no_front_end_asks_nothing_and_drive_needs_colab(colab, monkeypatch):
    colab("raise RuntimeError('asked')")
    monkeypatch.setenv("PAPERMILL", "1")
    with pytest.raises(PlatformError, match=r"which is not mounted\. Run `from google.colab"):
        drive.run_dir_of("drive")
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    with pytest.raises(PlatformError, match="only Colab can mount that: give another RUN_DIR"):
        drive.run_dir_of("drive")


def test_the_environment_may_put_the_run_on_drive_too(colab, monkeypatch):
    folder = colab("(pathlib.Path(where) / 'MyDrive').mkdir(parents=True)")
    monkeypatch.setenv("MEDCOT_RUN_DIR", str(folder))
    assert drive.run_dir_of("auto") == folder and (paths.COLAB_DRIVE / "MyDrive").is_dir()


# --- where the run directory is -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "path"),
    [
        (20251125, "20251125"),
        ("runs/by-hand", "runs/by-hand"),
        ("2025.0", "2025.0"),
        ("~/runs/a", "HOME/runs/a"),
        (Path("~/b"), "HOME/b"),
        ("~nobody-here/x", None),
    ],
)
def test_a_run_directory_is_taken_as_it_is_written(given, path, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = str(given) if path is None else path.replace("HOME", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")  # where a notebook opened by hand runs
    assert drive.run_dir_of(given) == tmp_path / expected


@pytest.mark.parametrize("given", [100000.0, True, None])
def test_a_run_directory_that_papermill_changed_is_refused(given):
    with pytest.raises(PlatformError, match=rf"RUN_DIR is {given}, .*expected .* papermill -r RUN_DIR"):
        drive.run_dir_of(given)


def test_a_link_to_drive_counts_as_drive(colab, tmp_path):
    folder = colab("(pathlib.Path(where) / 'MyDrive').mkdir(parents=True)")
    (tmp_path / "link").symlink_to(paths.COLAB_DRIVE / "MyDrive")
    drive.run_dir_of(str(tmp_path / "link" / "medcot" / "runs" / "notebooks"))
    assert (paths.COLAB_DRIVE / "MyDrive").is_dir()
    assert paths.scratch_dir(tmp_path / "link" / "run") == paths.scratch_dir(folder.parents[2] / "run") != folder
