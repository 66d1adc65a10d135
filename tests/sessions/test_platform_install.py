"""The pinned stack is installed under a running kernel of Colab's Jupyter: the kernel survives and runs notebooks 01 to 03.

The environment holds the Jupyter, numpy and pandas versions of Colab's list, and nothing else of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from wheels import copy_of_the_project

from medcot_utils.run.directory import Run

FREEZE = Path(__file__).parents[1] / "data" / "colab-freeze-2026-08.txt"
HELD = ("ipykernel", "ipython", "jupyter_client", "jupyter_core", "nbclient", "nbformat", "pyzmq", "tornado", "traitlets")
NOTEBOOKS = ("01_setup", "02_baseline_inference", "03_dataset_prep")


@pytest.fixture
def colab(tmp_path):
    """The interpreter of an environment with Colab's versions."""
    versions = dict(line.split("==") for line in FREEZE.read_text().splitlines() if re.match(r"[\w.-]+==[^+]+$", line))
    (tmp_path / "list.txt").write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "colab")], check=True)
    python = str(tmp_path / "colab" / "bin" / "python")
    pins = [f"{name}=={versions[name]}" for name in (*HELD, "numpy", "pandas")]
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", str(tmp_path / "list.txt")]
    subprocess.run([*pip, *pins], check=True, capture_output=True)
    return python


@pytest.fixture
def kernel(colab, tmp_path):
    """`kernel(source)`: what a cell prints in one running kernel of that environment, as on Colab."""
    project = copy_of_the_project(tmp_path / "project")
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "MEDCOT_NOTEBOOKS", "MEDCOT_RUN_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"COLAB_RELEASE_TAG": "release-colab", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [colab, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = tmp_path / "kernels" / "colab" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": command, "display_name": "Colab", "language": "python"}))
    manager = KernelManager(kernel_name="colab")
    manager.kernel_spec_manager.kernel_dirs = [str(spec.parents[1])]
    manager.start_kernel(env=environment, cwd=str(project / "notebooks"))
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=120)

    def run(source):
        said, failed = [], []

        def take(message):
            said.append(message["content"].get("text", "") if message["msg_type"] == "stream" else "")
            failed.extend(message["content"]["traceback"] if message["msg_type"] == "error" else [])

        reply = client.execute_interactive(source, output_hook=take, timeout=1800)
        assert reply["content"]["status"] == "ok", "\n".join([*said, *failed])
        return "".join(said)

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def packages(python):
    """{package: version} as pip lists them."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    return {one["name"].lower().replace("_", "-"): one["version"] for one in json.loads(listed.stdout)}


@pytest.mark.timeout(2400)
def test_an_install_under_a_running_kernel_leaves_it_whole(colab, kernel, tmp_path):
    before, process = packages(colab), kernel("import os; print(os.getpid())")
    said = ""
    for name in NOTEBOOKS:
        for cell in nbformat.read(tmp_path / "project" / "notebooks" / f"{name}.ipynb", as_version=4).cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source += f'\nRUN_DIR = {str(tmp_path / "run")!r}\nPROFILE = "smoke"'
            if cell.cell_type == "code":
                said += kernel(cell.source)
    after = packages(colab)
    assert kernel("import os; print(os.getpid())") == process, "the kernel that was there before"
    replaced = {name: (version, after.get(name)) for name, version in before.items() if after.get(name) != version}
    print(f"{len(set(after) - set(before))} new; replaced:", replaced)
    kept = subprocess.run(
        [colab, "-c", "from medcot_utils.machine import installing; print(*installing.kernel_packages())"],
        env={"PYTHONPATH": str(tmp_path / "project")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {"ipykernel", "traitlets", "pyzmq", "psutil"} <= set(kept) and not set(replaced) & set(kept)
    assert {"pytest", "nbval", "ruff"}.isdisjoint(after), "what only tests need"
    assert "pins to install" in said and "the packages of the kernel" in said and "Restart" not in said
    run = Run.open(tmp_path / "run")
    assert [run.step_state(name) for name in NOTEBOOKS] == ["done"] * 3
