"""No secret in any output: marked secrets in every place that is read, a run tracked by W&B with each of its notebooks failing
once on purpose, pushed to a Hub (that refuses once) and to a Kaggle; then every file that was made is searched for the marks.

What else makes files with secrets at hand joins the search by a line in PRODUCERS."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import hub_server
import nbformat
import pytest
from kaggle_server import KaggleServer

from medcot_utils.run.artifacts import STEPS
from medcot_utils.series.runner import notebooks_dir

MARK = "mArKeDsEcReT"  # in the middle of each, so that a shortened one is found too
PLACES = {
    "HF_TOKEN": f"hf_env{MARK}hub0000000000000000",
    "HUGGINGFACE_TOKEN": f"hf_old{MARK}hub0000000000000000",
    "WANDB_API_KEY": f"env{MARK}wandb00000000000000000001",
    "wandb": f"env{MARK}wandb00000000000000000000",
    "KAGGLE_API_TOKEN": f"KGAT_env{MARK}kaggle0000",
    "KAGGLE_KEY": f"key{MARK}kaggle00000000",
    "KAGGLE_USER_SECRETS_TOKEN": f"jwt{MARK}session00000000",
}
FILES = {  # below HOME
    ".netrc": f"machine api.wandb.ai\n  login user\n  password netrc{MARK}wandb000000000000000000\n"
    f"default login user password default{MARK}00000000\n",
    ".cache/huggingface/token": f"hf_file{MARK}hub0000000000000000",
    ".kaggle/kaggle.json": json.dumps({"username": "somebody", "key": f"json{MARK}kaggle0000"}),
    ".kaggle/access_token": f"KGAT_file{MARK}kaggle0000",
}
# Stands for Kaggle's store; the real one is asked over the network.
KAGGLE_SECRETS = f"""
class BackendError(Exception): pass
class UserSecretsClient:
    def get_secret(self, name):
        held = {{"STORED": "store{MARK}wandb0000000000000000000", "HUB_STORED": "hf_store{MARK}hub0000000000000"}}
        if name not in held:
            raise BackendError(name)
        return held[name]
"""


def encodings(mark: str) -> list[bytes]:
    """The mark as it stands in a file, in hex, and within base64 at each of the three offsets."""
    found = [mark.encode(), mark.encode("utf-16-le"), mark.encode().hex().encode(), mark.encode().hex("%").encode()]
    for offset in range(3):
        coded = base64.b64encode(b"\0" * offset + mark.encode())
        found.append(coded[4 if offset else 0 : -4])
    return found


def contents(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield archive.read(name)
    elif path.suffix == ".ipynb":
        yield from map(str.encode, printed_text(path))


def printed_text(path: Path) -> Iterator[str]:
    """What each cell of a notebook printed, on one stream and on both, without what stands between two pieces."""
    for cell in nbformat.read(path, as_version=4).cells:
        streams = [output for output in cell.get("outputs", []) if output.output_type == "stream"]
        for names in (("stdout",), ("stderr",), ("stdout", "stderr")):
            yield "".join("".join(output.text for output in streams if output.name in names).split())


def holding(folder: Path, leave_out: tuple[Path, ...] = ()) -> list[str]:
    """The files below a folder that hold a mark: in the open, in UTF-16, in base64, or packed."""
    marks = encodings(MARK)
    files = [path for path in folder.rglob("*") if path.is_file() and not any(path.is_relative_to(one) for one in leave_out)]
    return [str(path) for path in files if any(mark in data for data in contents(path) for mark in marks)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder that is HOME, working directory and temporary folder at once, with secrets in every place: (folder, environment,
    the folders that hold the secrets themselves)."""
    folder = tmp_path_factory.mktemp("world")
    home, modules = folder / "home", folder / "modules"
    for name, text in FILES.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
        (home / name).chmod(0o600)
    modules.mkdir()
    (modules / "kaggle_secrets.py").write_text(KAGGLE_SECRETS)
    (folder / "tmp").mkdir()
    paths = [str(Path(__file__).parents[2]), str(modules)]
    environment = {name: value for name, value in os.environ.items() if name not in ("NETRC", "HF_TOKEN_PATH")} | PLACES
    environment |= {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "TMPDIR": str(folder / "tmp"),
        "JUPYTER_PLATFORM_DIRS": "0",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    return folder, environment, (modules, *(home / name for name in FILES), folder / "broken")


def medcot(world, *arguments, **more):
    """`medcot` in the world; what it printed is kept there as a file, to be searched with the others."""
    folder, environment, _ = world
    done = subprocess.run(
        [str(Path(sys.executable).with_name("medcot")), *map(str, arguments)],
        cwd=folder,
        env=environment | more,
        capture_output=True,
        text=True,
        timeout=900,
    )
    number = len(list(folder.glob("said-*.txt")))
    (folder / f"said-{number}.txt").write_text(done.stdout + done.stderr)
    return done


SETTINGS = (
    *("--set", "tracking.backend=wandb", "--set", "tracking.mode=offline"),
    *("--set", "secrets.wandb=[WANDB_API_KEY,wandb,STORED]", "--set", "secrets.huggingface=[HF_TOKEN,HUB_STORED]"),
)


def the_whole_series(world) -> None:
    """The seven notebooks, tracked offline."""
    done = medcot(world, "run", "--profile", "smoke", "--run-dir", "runs/mine", *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr


# Output of every kind, and an error, that hold the secrets of every place: no library hides what it repeats. As they are, encoded
# and in pieces; one stands in the cell itself.
FAILURE = (
    f"""
literal = "{PLACES["HF_TOKEN"]}"
"""
    + """
import base64, netrc, os, sys, time
from urllib.parse import quote
from pathlib import Path
from IPython.display import HTML, JSON, display
from kaggle_secrets import UserSecretsClient
values = [os.environ[name] for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY", "wandb", "KAGGLE_API_TOKEN")]
values += [os.environ["KAGGLE_KEY"], os.environ["KAGGLE_USER_SECRETS_TOKEN"]]
values += [UserSecretsClient().get_secret(name) for name in ("STORED", "HUB_STORED")]
values += [Path("~/.cache/huggingface/token").expanduser().read_text(), netrc.netrc().authenticators("api.wandb.ai")[2]]
values += [netrc.netrc().authenticators("elsewhere")[2]]
values += [Path("~/.kaggle", name).expanduser().read_text() for name in ("kaggle.json", "access_token")]
print(*values)
print(*values, sep="\\n", file=sys.stderr)
for value in values:
    print(*(base64.b64encode(b"x" * before + value.encode()).decode() for before in range(3)), quote(value), sep="\\n")
    print(value.encode().hex(), value.encode().hex("%").upper(), base64.encodebytes(b"y" * 40 + value.encode()), *value)
    middle = len(value) // 2
    for stream, piece in [(sys.stdout, value[:middle]), (sys.stderr, " bar "), (sys.stdout, value[middle:])]:
        print(piece, end="", file=stream, flush=True)
        time.sleep(0.02)
    print(value[:middle], end="", flush=True)
    time.sleep(0.02)
    print(value[middle:], file=sys.stderr, flush=True)
display(values, HTML("<b>" + "</b><b>".join(values) + "</b>"), JSON({value: [value] for value in values}))
raise RuntimeError("refused with " + " and ".join(values))
"""
)


def a_failure_in_each_notebook(world) -> None:
    """Each notebook cut short by a cell that shows and raises the secrets of every place, on the finished run."""
    folder = world[0]
    for name in reversed(STEPS):  # the last first: a forced step forgets what it made, and later ones read it
        broken = folder / "broken" / name
        shutil.copytree(notebooks_dir(), broken, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        notebook = nbformat.read(broken / f"{name}.ipynb", as_version=4)
        code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
        # After the step has begun, and before what takes time.
        notebook.cells.insert(code[3], nbformat.v4.new_code_cell(FAILURE))
        nbformat.write(notebook, broken / f"{name}.ipynb")
        number = str(list(STEPS).index(name) + 1)
        done = medcot(
            world, "run", "--run-dir", "runs/mine", "--from", number, "--to", number, "--force", MEDCOT_NOTEBOOKS=str(broken)
        )
        assert done.returncode == 1 and "refused with" in done.stderr, done.stdout + done.stderr


def refused_settings(world) -> None:
    """A secret typed where its name belongs, and W&B asked for online without a key."""
    given = PLACES["wandb"]
    done = medcot(world, "run", "--profile", "smoke", "--run-dir", "runs/other", "--set", f"secrets.wandb=[{given}]")
    assert done.returncode == 1
    wrong = [("--set", f"tracking.entity={given}"), ("--set", given), ("--parameter", f"QUESTION={given}"), ("--from", given)]
    for option, value in wrong:
        done = medcot(world, "run", "--profile", "smoke", "--run-dir", "runs/other", option, value)
        assert done.returncode != 0, (option, done.stdout)
    online = ("--set", "tracking.backend=wandb", "--set", "tracking.mode=online", "--set", "secrets.wandb=NOWHERE")
    done = medcot(world, "run", "--profile", "smoke", "--run-dir", "runs/other", *online, NETRC="/nowhere")
    assert done.returncode == 1 and "none was found under NOWHERE" in done.stderr, done.stderr


def a_library_that_speaks(world) -> None:
    """The error of a tracker that repeats its key, and the server of W&B refusing it."""
    code = (
        "import os; from medcot_utils.machine import redaction, secrets; secrets.hand_on_secrets();"
        "print(secrets.secrets_found(), redaction.redact('refused: ' + os.environ['HF_TOKEN'] + os.environ['WANDB_API_KEY']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=world[0], env=world[1], capture_output=True, text=True, timeout=300)
    (world[0] / "said-library.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0 and "refused: **********\n" in done.stdout, done.stderr


def a_push_to_the_hub(world) -> None:
    """Refused with the token, which the Hub's answer repeats; then accepted. What lies on the Hub then is searched too."""
    token, here = PLACES["HF_TOKEN"], {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    with hub_server.Hub() as hub, pytest.MonkeyPatch.context() as patch:
        here |= {"HF_ENDPOINT": hub.url}
        refused = medcot(world, "push", "runs/mine", "--repo-id", "doctor/cot", **here)
        assert refused.returncode == 1 and "401" in refused.stderr, refused.stdout + refused.stderr
        patch.setitem(hub_server.USERS, token, ("doctor", "write"))
        hub.fail("POST", "/commit/", status=403, message=f"{token} may not write", times=1)
        refused = medcot(world, "push", "runs/mine", "--repo-id", "doctor/cot", **here)
        assert refused.returncode == 1 and "may not write" in refused.stderr, refused.stdout + refused.stderr
        done = medcot(world, "push", "runs/mine", "--repo-id", "doctor/cot", **here)
        assert done.returncode == 0, done.stdout + done.stderr
        received = world[0] / "hub"
        received.mkdir()
        for name, data in hub.blobs.items():
            (received / name).write_bytes(data)


def a_push_to_kaggle(world) -> None:
    """The pushed text as Kaggle received it, and what it carries, unpacked."""
    server, carried = KaggleServer(), world[0] / "kaggle-received"
    server.token = PLACES["KAGGLE_API_TOKEN"]
    proxied = {"http_proxy": f"http://127.0.0.1:{server.server_port}", "KAGGLE_API_ENVIRONMENT": "LOCALHOST"}
    proxied |= {"no_proxy": "", "NO_PROXY": ""}
    try:
        for command in (["build", "--id", "ann/heart-run", *SETTINGS], ["push"]):
            done = medcot(world, "kaggle", *command, **proxied)
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        server.shutdown()
    carried.mkdir()
    text = server.saved[0]["text"]
    (carried / "saved.json").write_text(json.dumps(server.saved))
    source = next(c.source for c in nbformat.reads(text, as_version=4).cells if c.source.startswith("PROJECT"))
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(source.split('"""')[1])), mode="r:xz") as archive:
        archive.extractall(carried / "project", filter="data")
    assert (carried / "project" / "medcot_utils" / "notebook.py").exists() or list(carried.rglob("notebook.py"))


# Each makes files in the world with the secrets at hand; in this order, on one run.
PRODUCERS = [
    the_whole_series,
    a_push_to_the_hub,
    a_push_to_kaggle,
    a_failure_in_each_notebook,
    refused_settings,
    a_library_that_speaks,
]


@pytest.fixture(scope="module")
def produced(world):
    for producer in PRODUCERS:
        producer(world)
    return world


def test_no_file_holds_a_secret_even_if_every_notebook_fails(produced):
    folder, _, sources = produced
    searched = [path for path in folder.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in searched}
    assert {".ipynb", ".json", ".wandb", ".log", ".html", ".txt", ".safetensors"} <= kinds, "the search sees what it should"
    assert len(list((folder / "runs" / "mine" / "notebooks").glob("*.ipynb"))) == 7
    assert holding(folder, sources) == []


@pytest.mark.parametrize("form", ["open", "binary", "utf-16", "base64", "hex", "gzip", "zip"])
def test_control_a_planted_secret_is_found(tmp_path, form):
    value = PLACES["HF_TOKEN"].encode()
    path = tmp_path / "deep" / "file"
    path.parent.mkdir()
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inner", value)
    else:
        path.write_bytes(
            {
                "open": b"x" + value,
                "binary": bytes(range(256)) + value + bytes(range(256)),
                "utf-16": value.decode().encode("utf-16"),
                "base64": base64.b64encode(b"user:" + value),
                "hex": b"key: " + value.hex().encode(),
                "gzip": gzip.compress(value),
            }[form]
        )
    assert holding(tmp_path) == [str(path)]


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stdout"), ("stdout", "stderr"), ("stderr", "stdout", "stderr")])
def test_control_a_secret_printed_by_a_notebook_is_found(streams, produced, tmp_path):
    run = shutil.copytree(produced[0] / "runs" / "mine" / "notebooks", tmp_path / "notebooks")
    path = run / "05_training.ipynb"
    notebook = nbformat.read(path, as_version=4)
    pieces = {
        1: [PLACES["wandb"]],
        2: [PLACES["wandb"][:9], PLACES["wandb"][9:]],
        3: [PLACES["wandb"][:9], "bar", PLACES["wandb"][9:]],
    }
    printed = zip(streams, pieces[len(streams)], strict=True)
    notebook.cells[-2]["outputs"] = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in printed]
    nbformat.write(notebook, path)
    assert holding(tmp_path) == [str(path)]
    assert holding(produced[0], produced[2][1:]) == [str(produced[2][0] / "kaggle_secrets.py")], (
        "the search reads the sources too"
    )
