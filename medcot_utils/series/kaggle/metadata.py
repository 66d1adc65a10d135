"""kernel-metadata.json, which describes a pushed notebook to Kaggle's client, validated before anything is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medcot_utils.errors import MedcotError
from medcot_utils.machine.names import OutsideError, require_inside
from medcot_utils.run.files import write_atomic
from medcot_utils.series.kaggle.accelerators import DEFAULT, AcceleratorError, find_accelerator
from medcot_utils.text_files import read_json

METADATA = "kernel-metadata.json"
PLACEHOLDER_OWNER = "your-name"
_SHORTEST, _LONGEST = 5, 50  # characters of a title, and so of the slug that Kaggle makes from it
_SOURCE = r"[A-Za-z0-9][\w-]*/[\w-]+"


class KaggleError(MedcotError):
    """Say why a kernel cannot be built or pushed, or why Kaggle refused, and what to do."""


class KernelMetadata(BaseModel):
    """Hold the fields of kernel-metadata.json that this project uses. Make one with `validated`, which reports all faults."""

    model_config = ConfigDict(extra="forbid")

    id: str
    title: str = Field(min_length=_SHORTEST, max_length=_LONGEST)
    code_file: str
    language: Literal["python"] = "python"
    kernel_type: Literal["notebook"] = "notebook"
    is_private: bool = True
    enable_gpu: bool = True
    enable_internet: bool = True
    machine_shape: str = Field(DEFAULT, pattern=r"^\w*$")
    dataset_sources: list[str] = []
    competition_sources: list[str] = []
    kernel_sources: list[str] = []
    model_sources: list[str] = []
    docker_image: str | None = None
    # `kaggle kernels pull -m` also writes these.
    id_no: int | None = None
    keywords: list[str] | None = None
    enable_tpu: bool | None = None

    @field_validator("id")
    @classmethod
    def _owner_and_slug(cls, value: str) -> str:
        if fault := describe_id_fault(value):
            raise ValueError(fault)
        return value

    @field_validator("code_file")
    @classmethod
    def _inside(cls, value: str) -> str:
        try:
            return str(require_inside(value, METADATA))
        except OutsideError as error:
            raise ValueError(str(error)) from None

    @field_validator("dataset_sources", "kernel_sources")
    @classmethod
    def _two_parts(cls, values: list[str]) -> list[str]:
        for value in values:
            if not re.fullmatch(_SOURCE, value):
                raise ValueError(f"{value!r} is not owner/slug")
        return values

    @field_validator("model_sources")
    @classmethod
    def _five_parts(cls, values: list[str]) -> list[str]:
        for value in values:
            if not re.fullmatch(rf"{_SOURCE}/[\w-]+/[\w.-]+/\d+", value):
                raise ValueError(f"{value!r} is not owner/model/framework/variation/VERSION")
        return values

    @field_validator("machine_shape")
    @classmethod
    def _known_accelerator(cls, value: str) -> str:
        try:
            if value:
                find_accelerator(value)
        except AcceleratorError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> KernelMetadata:
        from slugify import slugify  # Kaggle's client uses it to make slugs

        slug = self.id.partition("/")[2]
        if slugify(self.title) != slug:
            raise ValueError(f"title {self.title!r} makes the slug {slugify(self.title)!r}, but id says {slug!r}")
        if not self.enable_internet:
            raise ValueError("enable_internet is false, but the session must install its pinned stack")
        if self.enable_tpu:
            raise ValueError("enable_tpu is true, but the series runs on a CUDA GPU or the CPU: set it to false")
        if self.enable_gpu != bool(self.machine_shape):
            raise ValueError(f"enable_gpu is {self.enable_gpu}, but machine_shape is {self.machine_shape!r}")
        return self


def describe_id_fault(value: str) -> str | None:
    """Return what is wrong with the id of a kernel and what was expected; None for a valid id."""
    slug = value.partition("/")[2]
    is_named = re.fullmatch(r"[A-Za-z0-9][\w-]*/[a-z0-9]+(?:-[a-z0-9]+)*", value)
    if is_named and _SHORTEST <= len(slug) <= _LONGEST:
        return None
    return (
        f"{value!r} is not owner/slug: expected your name on Kaggle and a slug of {_SHORTEST} to {_LONGEST} lowercase letters, "
        f"digits, and single hyphens, as in NAME/medcot-series"
    )


def read_metadata(folder: Path) -> KernelMetadata:
    """Return the validated kernel-metadata.json of a folder. Raises KaggleError with all its faults in one line."""
    values = read_unvalidated(folder)
    if values is None:
        raise KaggleError(f"no {METADATA} in {folder}: make one with medcot kaggle build")
    return validated(values, f"{METADATA}: ")


def read_unvalidated(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's metadata file without checking it; None if there is no file.

    Raises KaggleError if it is not a JSON object."""
    path = folder / METADATA
    if not path.exists():
        return None
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise KaggleError(f"{METADATA} is not JSON ({error}): fix it, or remove it and build again") from None
    if not isinstance(values, dict):
        raise KaggleError(f"{METADATA} is not a JSON object: fix it, or remove it and build again")
    return values


def validated(values: Mapping[str, Any], prefix: str = "") -> KernelMetadata:
    """Return the values as metadata. Raises KaggleError with all faults in one line, after `prefix`."""
    try:
        return KernelMetadata.model_validate(values)
    except ValidationError as error:
        raise KaggleError(prefix + "; ".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Mapping[str, Any]) -> str:
    name = ".".join(map(str, fault["loc"]))
    match fault["type"]:
        case "value_error":
            message = str(fault["ctx"]["error"])
        case "string_too_short" | "string_too_long":
            message = f"{fault['input']!r} has {len(fault['input'])} characters, expected {_SHORTEST} to {_LONGEST}"
        case "literal_error":
            message = f"expected {fault['ctx']['expected']}, not {fault['input']!r}"
        case "extra_forbidden":
            message = "no such field; remove it"
        case _:
            message = f"{fault['msg'][:1].lower()}{fault['msg'][1:]}"
    return f"{name}: {message}" if name else message


def write_metadata(folder: Path, metadata: KernelMetadata) -> None:
    """Write kernel-metadata.json into a folder, whole or not at all."""
    write_atomic(folder / METADATA, json.dumps(metadata.model_dump(exclude_none=True), indent=2) + "\n")
