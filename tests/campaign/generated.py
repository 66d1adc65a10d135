"""What the campaign draws: settings, files of rows, and places, as people write them and as nobody should."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from medcot_utils.config import load_config, setting_names

COLUMNS = ("Question", "Complex_CoT", "Response")
ODD_TEXTS = (
    "",
    " ",
    "\u00a0",
    "caf\u0065\u0301",
    "患者男，五十岁，胸痛两小时。",
    "Больной жалуется на боль в груди.",
    "**1. First** then\n+ second\n– third、fourth",
    "a</think>b<think>c",
    "<｜end▁of▁sentence｜>",
    "{question} {0} %s {{x}}",
    "x" * 5000,
    "line\r\nline\u2028line\x0bline",
    "nul\x00byte",
    "=1+1",
    "a;b,c\td\"e'f",
    "# of days?",
    "7e12345",
    "nan",
)
ODD_VALUES = (None, 0, 7, 2**70, 1.5, float("nan"), True, [], ["a", "b"], {"a": {"b": [1, "x"]}})
SCALARS = (
    "",
    " ",
    "null",
    "true",
    "no",
    "auto",
    "0",
    "1",
    "-1",
    "3",
    "2e-4",
    "1.0",
    "7e12345",
    ".nan",
    "-.inf",
    "1_000",
    "0x10",
    "010",
    "2025-11-25",
    "[]",
    "[1, 2]",
    "[auto, none]",
    "{a: 1}",
    "'quoted'",
    '"open',
    "a: b",
    "case #2",
    "# of days?",
    "~",
    "*x",
    "!!python/none",
    "C:\\data",
    "100000000000000000000",
)
PLACES = ("run", "a run", "{1}", "läuf", "20251125", "run.1", "-run", "#run", "%s", "a'b", "a=b", "deep/er/run", "$HOME", "1e5")
ENVIRONMENT = st.fixed_dictionaries(
    {},
    optional={
        "LOCAL_RANK": st.sampled_from(["", "0", "3", "x"]),
        "RANK": st.sampled_from(["", "0", "1"]),
        "WORLD_SIZE": st.sampled_from(["", "1", "2"]),
        "MASTER_ADDR": st.just("192.0.2.1"),
        "MASTER_PORT": st.just("29500"),
        "HTTPS_PROXY": st.sampled_from(["", "http://127.0.0.1:9"]),
        "TERM": st.sampled_from(["", "dumb"]),
        "PYTHONHASHSEED": st.just("random"),
        "HF_TOKEN": st.sampled_from(["", " ", "x"]),
    },
)
# Nothing that a generated setting may name: a hub that cannot be reached, or a model of 16 GB.
NEVER_DRAWN = ("model.name", "dataset.name", "dataset.path", "hub.repo_id", "evaluation.embedding_model", "model.quantized_name")


@dataclass(frozen=True)
class RowFile:
    """A file of rows: its name, its bytes, and the settings that read it."""

    name: str
    content: bytes
    settings: tuple[str, ...]

    def write(self, folder: Path) -> list[str]:
        """Write the file into a folder and return the settings of a run on it."""
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        return [f"dataset.path={json.dumps(str(path))}", *self.settings]


def texts() -> st.SearchStrategy[str]:
    """Return texts of any script, ordinary ones and odd ones."""
    words = st.lists(st.sampled_from(["chest", "pain", "rest", "fluids", "why", "he", "is"]), min_size=3, max_size=12).map(
        " ".join
    )
    return words | words | st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(ODD_TEXTS)


@st.composite
def rows(draw: st.DrawFn, least: int, tidy: bool) -> list[dict[str, Any]]:
    """Draw rows with the three columns and some that nobody uses; unless tidy, some with missing values or a missing column."""
    unused = ["specialty", "id", "note", "Unnamed: 0", *([] if tidy else ["split"])]
    extra = draw(st.lists(st.sampled_from(unused), unique=True, max_size=3))
    odd = not tidy and draw(st.booleans())
    made = []
    for index in range(draw(st.integers(least, 14))):
        row: dict[str, Any] = {name: f"{draw(texts())} {index}" if not odd else draw(texts()) for name in COLUMNS}
        row |= {name: draw(st.sampled_from(ODD_VALUES) | texts()) for name in extra}
        made.append(row)
    if not tidy and draw(st.integers(0, 9)) == 0:
        for row in made:
            row.pop("Complex_CoT")
    return made


@st.composite
def row_files(draw: st.DrawFn, least: int = 0, tidy: bool = False) -> RowFile:
    """Draw a file of rows in one of the usual formats and encodings, read by matching settings; a tidy one can be trained on."""
    made = draw(rows(least, tidy))
    kind = draw(st.sampled_from(["jsonl", "jsonl", "json", "csv", "csv", "parquet"]))
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", *([] if tidy else ["utf-16", "cp1252"])]))
    if kind == "parquet":
        import pandas as pd

        table = pd.DataFrame({name: [str(row.get(name)) for row in made] for name in {key: None for row in made for key in row}})
        content = table.to_parquet(None)
    elif kind == "csv":
        out = io.StringIO()
        names = list({key: None for row in made for key in row}) or list(COLUMNS)
        writer = csv.DictWriter(out, names, delimiter=draw(st.sampled_from([",", ";", "\t"])))
        writer.writeheader()
        writer.writerows(made)
        content = out.getvalue().encode(encoding, "replace")
    else:
        lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in made]
        text = "\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}]"
        content = text.encode(encoding, "replace")
    folder = draw(st.sampled_from(["", "my data/", "{0}/", "données/"]))
    size = len(made)
    held_out = draw(st.integers(1, size // 2 if tidy else max(1, size)))
    settings = [f"dataset.held_out_rows={held_out}", f"evaluation.num_questions={draw(st.integers(1, held_out))}"]
    trained_on = ["null", str(max(1, size - held_out)), *([] if tidy else ["1", "500"])]
    settings += [f"dataset.num_rows={draw(st.sampled_from(trained_on))}"]
    settings += [f"dataset.overlong={draw(st.sampled_from(['drop', 'truncate', *([] if tidy else ['error'])]))}"]
    settings += [f"dataset.repeats={draw(st.sampled_from(['report'] if tidy else ['report', 'drop']))}"]
    return RowFile(f"{folder}rows.{kind}", content, tuple(settings))


def any_setting() -> st.SearchStrategy[str]:
    """Return `name=value` for any setting that asks no hub, with a value that may fit it or not."""
    default = load_config("smoke")
    names = [name for name in setting_names() if name not in (*NEVER_DRAWN, "profile")]

    def pair(name: str) -> st.SearchStrategy[str]:
        kept = json.dumps(default.get(name))
        return (st.sampled_from([kept, *SCALARS]) | texts()).map(lambda value: f"{name}={value}")

    return st.sampled_from(names).flatmap(pair)


def usual_settings() -> st.SearchStrategy[list[str]]:
    """Return settings that somebody may well choose, on the tiny model and with few steps and tokens."""
    choices: dict[str, st.SearchStrategy[Any]] = {
        "training.max_steps": st.integers(1, 3),
        "training.warmup_steps": st.integers(0, 3),
        "training.logging_steps": st.integers(1, 10),
        "training.save_steps": st.integers(1, 5),
        "training.eval_steps": st.sampled_from(["null", 1, 2, 9]),
        "training.per_device_train_batch_size": st.integers(1, 4),
        "training.lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant"]),
        "training.optim": st.sampled_from(["adamw_8bit", "adamw_torch", "sgd"]),
        "lora.r": st.sampled_from([1, 8]),
        "lora.bias": st.sampled_from(["none", "all", "lora_only"]),
        "lora.target_modules": st.sampled_from(["[q_proj]", "[q_proj, down_proj]"]),
        "lora.lora_dropout": st.sampled_from([0, 0.1]),
        "generation.max_new_tokens": st.integers(1, 16),
        "generation.batch_size": st.sampled_from([1, 5, "auto"]),
        "generation.do_sample": st.booleans(),
        "evaluation.n_samples": st.integers(0, 2),
        "evaluation.n_resamples": st.just(200),
        "evaluation.mcq_limit": st.integers(1, 3),
        "evaluation.mcq_max_new_tokens": st.integers(1, 8),
        "export.dtype": st.sampled_from(["float16", "bfloat16"]),
        "export.check_new_tokens": st.just(4),
        "export.check_prompts": st.just(1),
        "model.load_in_4bit": st.booleans(),
        "model.max_seq_length": st.sampled_from([256, 1024]),
        "tracking.backend": st.sampled_from(["none", "trackio", "tensorboard"]),
        "seed": st.integers(-1, 5),
    }
    chosen = st.fixed_dictionaries({}, optional=choices)
    few = {"training.max_steps": 2, "training.warmup_steps": 0, "generation.max_new_tokens": 4, "evaluation.mcq_limit": 2}
    few |= {"evaluation.mcq_max_new_tokens": 4, "evaluation.n_resamples": 200, "export.check_new_tokens": 4}
    return chosen.map(lambda values: [f"{name}={str(value).lower()}" for name, value in (few | values).items()])
