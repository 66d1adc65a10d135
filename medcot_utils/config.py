"""RunConfig: every setting of the series, validated once, and the profiles that set them."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from medcot_utils.errors import MedcotError
from medcot_utils.settings import (
    DatasetSettings,
    EvaluationSettings,
    ExportSettings,
    GenerationSettings,
    HubSettings,
    LoraSettings,
    ModelSettings,
    PromptSettings,
    SecretsSettings,
    Section,
    TrackingSettings,
    TrainingSettings,
)

PROFILES_DIR = Path(__file__).parent / "profiles"
PROFILES = ("smoke", "demo", "article", "recommended", "full")

# Pins that belong to the profile's own model or data set, and not to another one put in its place.
_PINS = {
    "model.name": ("model.revision", "model.quantized_name", "model.quantized_revision"),
    "dataset.name": ("dataset.subset", "dataset.revision", "dataset.sha256"),
}

# What people type for a setting whose name in this field is another: string distance would never find these.
_ALIASES = {
    "lr": "training.learning_rate",
    "bs": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    "grad_accum": "training.gradient_accumulation_steps",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "max_length": "model.max_seq_length",
    "temp": "generation.temperature",
    "file": "dataset.path",
}


class ConfigError(MedcotError):
    """A profile, setting or value that the series does not know or cannot use; the message names it and the nearest valid one."""


class RunConfig(Section):
    """All settings of one run. Frozen: a notebook reads it and never changes it."""

    profile: str
    seed: int = 3407
    model: ModelSettings
    prompt: PromptSettings = PromptSettings()
    dataset: DatasetSettings
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    generation: GenerationSettings = GenerationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()
    hub: HubSettings = HubSettings()
    tracking: TrackingSettings = TrackingSettings()
    secrets: SecretsSettings = SecretsSettings()

    @model_validator(mode="after")
    def _enough_questions(self) -> RunConfig:
        if self.dataset.name != "shipped" and self.evaluation.num_questions > self.dataset.held_out_rows:
            raise ValueError(
                f"evaluation.num_questions is {self.evaluation.num_questions}, more than dataset.held_out_rows "
                f"({self.dataset.held_out_rows}): raise the second or lower the first"
            )
        return self

    def get(self, dotted: str) -> Any:
        """Return the value at a dotted name, JSON-ready: `config.get("training.max_steps")`.

        Raises KeyError for an unknown name."""
        return _value_at(self.model_dump(mode="json"), dotted)

    def digest(self, dotted_names: Iterable[str]) -> str:
        """Return the sha256 (hex) over the named settings or whole sections, independent of their order.

        Settings added later count only once they differ from their default (`settings.added_later`). Raises KeyError for
        an unknown name."""
        counted, chosen = self.fingerprinted(), {}
        for name in sorted(dotted_names):
            self.get(name)  # a misspelled name must not count as one that was left out
            with contextlib.suppress(KeyError):
                chosen[name] = _value_at(counted, name)
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def leaves(self, dotted_names: Iterable[str]) -> dict[str, object]:
        """Return {setting: value, JSON-ready} of the named settings and of all in the named sections."""
        values, wanted = self.model_dump(mode="json"), tuple(dotted_names)
        names = [name for name in setting_names() if any(f"{name}.".startswith(f"{one}.") for one in wanted)]
        return {name: _value_at(values, name) for name in names}


def _value_at(values: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        values = values[part]
    return values


def setting_names(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Return every dotted setting name; a section is not a setting."""
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += setting_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint to append to a message: the valid name nearest to `name`, or where to look them up if none is near."""
    valid = list(valid)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _ALIASES and _ALIASES[leaf] in valid:
        return f"; did you mean {_ALIASES[leaf]}?"
    by_leaf = {v.rsplit(".", 1)[-1]: v for v in valid}
    match = difflib.get_close_matches(name, valid, 1, 0.7) or difflib.get_close_matches(leaf, by_leaf, 1, 0.6)
    return f"; did you mean {by_leaf.get(match[0], match[0])}?" if match else "; `medcot settings` lists them all"


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Return `["training.max_steps=10"]` as `{"training.max_steps": 10}`, with values read as YAML scalars or lists.

    Raises ConfigError for a pair without `=` or a name that is no setting."""
    valid, overrides = setting_names(), {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals:
            raise ConfigError(f"--set {pair}: expected NAME=VALUE, as in --set training.max_steps=10")
        if name == "profile":
            raise ConfigError("profile is no setting: choose it with --profile, or PROFILE in notebook 01_setup")
        if name not in valid:
            raise ConfigError(f"unknown setting {name!r}{nearest(name, valid)}")
        try:
            overrides[name] = yaml.safe_load(text) if text.strip() else None
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {name}: {text!r} is not a YAML value ({getattr(error, 'problem', error)})") from error
        if overrides[name] == text.strip():  # a plain text, not one in quotation marks
            overrides[name] = _number(overrides[name])
    return overrides


def _number(text: str) -> Any:
    # YAML 1.1 reads 2e-4 (no dot) as a string; people write learning rates so.
    try:
        return float(text) if "e" in text.lower() else text
    except ValueError:
        return text


def load_config(profile: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Return the configuration of a profile with `a.b=value` overrides laid over it. Another model or data set by name drops
    the pinned revisions of the profile's own.

    Raises ConfigError naming the profile, setting or value at fault, and the nearest valid one."""
    values, given = read_profile(profile), parse_overrides(overrides)
    default = config_from_dict(values)
    others = [name for name in _PINS if name in given and given[name] != default.get(name)]
    unpinned = {pin: None for name in others for pin in _PINS[name]}
    for name, value in (unpinned | given).items():
        node = values
        *sections, leaf = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return config_from_dict(values)


def overrides_of(config: RunConfig) -> list[str]:
    """Return the `a.b=value` pairs that make this configuration out of its profile's values."""
    default = load_config(config.profile)
    # Another model's pins are always named: left out, one equal to the profile's would be dropped on the way back.
    pins = [pin for name, pins in _PINS.items() if config.get(name) != default.get(name) for pin in pins]
    changed = (name for name in setting_names() if name in pins or config.get(name) != default.get(name))
    return [f"{name}={json.dumps(config.get(name), ensure_ascii=False)}" for name in changed]


@dataclass(frozen=True)
class ProfileNeeds:
    """What a profile needs of the machine: `needs` in its YAML file, which is no setting of a run."""

    memory_gib: float  # free memory for one kernel
    packages: tuple[str, ...]  # beside those that every profile needs, as they are imported
    expect: str  # what to expect where it can run, in a few words
    gpu_gib: float | None = None  # of one CUDA GPU; None: runs without a GPU


def profile_needs(profile: str) -> ProfileNeeds:
    """Return what a profile needs of the machine. Raises ConfigError for an unknown profile."""
    needs = _profile_file(profile)["needs"]
    return ProfileNeeds(**needs | {"packages": tuple(needs["packages"])})


def read_profile(profile: str) -> dict[str, Any]:
    """Return a profile's settings as nested dictionaries, not yet validated. Raises ConfigError for an unknown profile."""
    values = _profile_file(profile)
    del values["needs"]
    return values | {"profile": profile}


def _profile_file(profile: str) -> dict[str, Any]:
    if profile not in PROFILES:
        choices = ", ".join((*PROFILES, "auto"))
        match = difflib.get_close_matches(profile, PROFILES, 1)
        hint = f"; did you mean {match[0]}?" if match else ""
        raise ConfigError(f"unknown profile {profile!r}: expected one of {choices}{hint}")
    values = yaml.safe_load((PROFILES_DIR / f"{profile}.yaml").read_text(encoding="utf-8"))
    parent = values.pop("extends", None)
    return _merge(_profile_file(parent), values) if parent else values


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Return a nested dictionary as a validated configuration. Raises ConfigError with every fault in one line."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for fault in error.errors():
            setting = _setting_of(fault)
            # A setting of several possible types has a fault for each of them.
            lines[setting] = f"{lines[setting]}, or {_lower(fault['msg'])}" if setting in lines else _explain(fault)
        raise ConfigError("; ".join(lines.values())) from None


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]


def _setting_of(fault: Mapping[str, Any]) -> str:
    """Return the dotted name that a fault is about, without the alternatives and list places that pydantic adds to it."""
    name = ".".join(str(part) for part in fault["loc"])
    known = [setting for setting in setting_names() if f"{name}.".startswith(f"{setting}.")]
    return known[0] if known else name


def _explain(fault: Mapping[str, Any]) -> str:
    name = _setting_of(fault)
    if fault["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{nearest(name, setting_names())}"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    if fault["type"] == "missing":
        return f"setting {name} is missing"
    return f"setting {name} is {fault['input']!r}: {_lower(fault['msg'])}"
