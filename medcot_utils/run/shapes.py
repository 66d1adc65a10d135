"""The types of the JSON files of a run. Files are compared with them when they are read: the run may be another's."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from typing import Any

from pydantic import TypeAdapter, ValidationError

from medcot_utils.errors import quote
from medcot_utils.run.lock import RunError

ANSWER, BATCH, PUSHES = "models.records:AnswerRecord", "models.records:AnswerBatch", "export.hub.records:Pushes"
# {artifact: the type of the file or, of a .jsonl, of its lines}. By name, since the rooms above own these types.
SHAPES = {
    "machine": "machine.hardware:MachineReport",
    "questions": "data.rows:Question",
    "base_answers": ANSWER,
    "tuned_answers": ANSWER,
    "merged_answers": ANSWER,
    "base_mcq": "evaluation.mcq.run:McqAnswer",
    "tuned_mcq": "evaluation.mcq.run:McqAnswer",
    "data_report": "data.tokens:DataReport",
    "plan": "training.records:Plan",
    "training_log": "training.records:LogEntry",
    "held_out_loss": "models.losses:RowLoss",
    "base_16bit_loss": "models.losses:RowLoss",
    "merged_loss": "models.losses:RowLoss",
    "metrics": "evaluation.measured:Measured",
    "merged_metrics": "evaluation.merged:MergedMeasured",
    "export_check": "export.merged:ExportCheck",
    "gguf_check": "export.gguf:GgufCheck",
}
_ADVICE = "It is not what medcot writes: remove it and make it again or, if the run is somebody else's, ask them for another one"


class MissingEntryError(RunError, LookupError):
    """A file of a run lacks an entry that is read; the message names both."""


class Entries(dict[str, Any]):
    """Hold a JSON object of a run. To read an entry that it lacks is a MissingEntryError: runs of earlier versions lack some,
    and open as long as nobody needs those."""

    def __init__(self, values: dict[str, Any], source: str):
        super().__init__(values)
        self.source = source

    def __missing__(self, key: str) -> Any:
        raise MissingEntryError(describe_missing(self, key))


def describe_missing(entries: Entries, key: object) -> str:
    """Return the message on an entry that a file of a run lacks."""
    return f"{entries.source} has no entry {quote(key)}. {_ADVICE}"


def read_records(content: bytes, source: str, shape: str | None = None, first_line: int | None = None) -> Any:
    """Return what a JSON file of a run holds, its objects as `Entries`.

    Args:
        source: the file, for messages.
        shape: a type as in SHAPES; None: any.
        first_line: of a file with a value on each line: the number of the first; all are returned in a list.

    Raises RunError for what is no JSON, and for an entry of another type."""
    try:
        # Not str.splitlines: it also splits at U+2028, which JSON leaves unescaped within a text.
        parts = [line for line in content.split(b"\n") if line] if first_line else [content]
        values = [json.loads(part.decode(), object_hook=lambda found: Entries(found, source)) for part in parts]
    except (ValueError, RecursionError) as error:
        raise RunError(f"{source} cannot be read ({error}). {_ADVICE}") from error
    try:
        if shape:
            _adapter(shape).validate_python(values, strict=True)
    except ValidationError as error:
        if fault := next((fault for fault in error.errors(include_url=False) if fault["type"] != "missing"), None):
            line, *entry = fault["loc"]
            where = [f"line {first_line + line}"] if first_line else []
            where += [".".join(map(str, entry))] if entry else []
            what = f"is {quote(fault['input'], 40)}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
            raise RunError(f"{', '.join([source, *where])} {what}. {_ADVICE}") from None
    return values if first_line else values[0]


@cache
def _adapter(shape: str) -> TypeAdapter[list[Any]]:
    module, _, name = shape.partition(":")
    return TypeAdapter(list[getattr(import_module(f"medcot_utils.{module}"), name)])
