"""Nothing that comes with a model, or that a library would fetch for it, runs as code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_families import FAMILIES
from transformers.utils.import_utils import KERNELS_MIN_VERSION

pytestmark = pytest.mark.model

# The processor says that it has AVX512-BF16: then bitsandbytes looks for the package `kernels` at its import.
IMPORTS = """
import ctypes
own = ctypes.CDLL.__getattr__
ctypes.CDLL.__getattr__ = lambda self, name: (lambda: True) if name == "has_avx512bf16_cpu" else own(self, name)
from medcot_utils.models.engine import quiet_start
quiet_start()
import bitsandbytes
"""


@pytest.mark.parametrize("asked", [None, "1"])
def test_bitsandbytes_fetches_no_code_unless_asked(tmp_path, asked):
    (tmp_path / "kernels.py").write_text(f"open({str(tmp_path / 'fetched')!r}, 'w')")
    environment = {name: value for name, value in os.environ.items() if name != "USE_HUB_KERNELS"}
    environment |= {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}"} | ({"USE_HUB_KERNELS": asked} if asked else {})
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fetched").exists() is bool(asked)


# A package `kernels` whose hub has no code: it notes that it was imported, and what it was asked for.
KERNELS = """
from pathlib import Path
from unittest.mock import MagicMock
asked = Path(__file__).with_name("asked")
asked.write_text("imported")
def get_kernel(name, **_):
    asked.write_text(name)
    raise OSError(name)
def __getattr__(name):
    if name.startswith("use_kernel"):
        return lambda *_: lambda decorated: decorated
    if name.startswith("_"):
        raise AttributeError(name)
    return MagicMock()
"""
LOADS = """
import sys
from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError
from medcot_utils.models import engine
settings = load_config("smoke", [f"model.name={sys.argv[1]}"]).model
try:
    engine.get_engine(settings).load(settings)
except MedcotError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("entry", "asked", "fetched", "said"),
    [
        ("_attn_implementation_internal", None, None, ""),  # CVE-2026-4372: transformers ignores it since 5.3.0
        (
            "_attn_implementation",
            None,
            None,
            "needs code from a hub (attn_implementation in its config.json): medcot runs no code",
        ),
        ("_attn_implementation", "1", "evil/kernel", None),  # so the package is found if it may be
    ],
)
def test_a_models_attention_is_never_taken_from_a_hub(tmp_path, entry, asked, fetched, said):
    FAMILIES["llama"].make(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {entry: "evil/kernel"}))
    (tmp_path / "kernels.py").write_text(KERNELS)
    (tmp_path / "kernels-1.dist-info").mkdir()
    (tmp_path / "kernels-1.dist-info" / "METADATA").write_text(f"Name: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    environment = {name: value for name, value in os.environ.items() if name != "USE_HUB_KERNELS"}
    environment |= {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}"} | ({"USE_HUB_KERNELS": asked} if asked else {})
    command = [sys.executable, "-c", LOADS, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    note = tmp_path / "asked"
    assert (note.read_text() if note.exists() else None) == fetched, done.stderr
    if said is not None:
        assert done.returncode == 0 and said in done.stdout and bool(done.stdout) is bool(said), done.stderr
