"""RunConfig: every setting of the series, validated once, and the profiles that set them."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from medcot_utils.errors import MedcotError, quote
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
from medcot_utils.token_shapes import name_look

PROFILES_DIR = Path(__file__).parent / "profiles"
PROFILES = ("smoke", "demo", "small", "article", "recommended", "full")

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


SECRETS_STAY_OUT = (
    "Settings are stored in the run's files, and secrets.* takes the names of secrets. Remove the secret, and put it into the "
    "environment or the platform's secret store"
)

_NULL = ("null", "Null", "NULL", "~")
_KINDS = {int: "a number", float: "a number", bool: "true or false", str: "a text", tuple: "a list", NoneType: "null"}


class ConfigError(MedcotError):
    """A profile, setting or value that the series does not know or cannot use; the message names it and the nearest valid one."""


class RunConfig(Section):
    """All settings of one run. Frozen: a notebook reads it and never changes it."""

    profile: str
    seed: int = Field(3407, ge=0, lt=2**32, description="seed of everything random; NumPy and PYTHONHASHSEED take 32 bits")
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
                f"({self.dataset.held_out_rows}): lower the first with --set "
                f"evaluation.num_questions={self.dataset.held_out_rows}, or raise the second"
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


def setting_names(model: type[BaseModel] = RunConfig) -> list[str]:
    """Return every dotted setting name; a section is not a setting."""
    return list(_fields(model))


def _fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    fields = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields |= _fields(kind, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


def _types(annotation: Any) -> set[type]:
    """Return the types of the values that an annotation allows: those of every alternative, of a Literal's values, and tuple."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(value) for value in arguments}
    if origin in (Union, UnionType, Annotated):
        alternatives = arguments[:1] if origin is Annotated else arguments
        return set().union(*map(_types, alternatives))
    return {origin or annotation}


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint to append to a message: the valid name nearest to `name`, or where to look them up if none is near."""
    valid = list(valid)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _ALIASES and _ALIASES[leaf] in valid:
        return f"; did you mean {_ALIASES[leaf]}?"
    by_leaf = {v.rsplit(".", 1)[-1]: v for v in valid}
    match = difflib.get_close_matches(name, valid, 1, 0.7) or difflib.get_close_matches(leaf, by_leaf, 1, 0.6)
    return f"; did you mean {by_leaf.get(match[0], match[0])}?" if match else "; `medcot settings` lists them all"


def override_pairs(given: Iterable[str] | str) -> list[str]:
    """Return overrides as a list; a single text, which is what `papermill -p OVERRIDES a.b=1` gives, is a list of one.

    Raises ConfigError for anything but texts."""
    listed = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    pairs = list(given) if listed else [given]
    if not all(isinstance(pair, str) for pair in pairs):
        raise ConfigError(f'OVERRIDES is {quote(given)}: expected a list of "section.setting=value" texts')
    return pairs


def parse_overrides(given: Iterable[str] | str) -> dict[str, Any]:
    """Return `["training.max_steps=10"]` as `{"training.max_steps": 10}`, each value read by its setting's type (`parse_value`).

    Raises ConfigError for a pair without `=`, a name that is no setting, a value that is no YAML, or a token, which is not
    repeated."""
    fields, overrides = _fields(RunConfig), {}
    for pair in override_pairs(given):
        name, equals, text = pair.partition("=")
        name = name.strip()
        if look := name_look(pair):
            raise ConfigError(f"--set{f' {name}' if name in fields else ''} holds what looks like {look}. {SECRETS_STAY_OUT}")
        if not equals:
            raise ConfigError(f"--set {pair}: expected NAME=VALUE, as in --set training.max_steps=10")
        if name == "profile":
            raise ConfigError("profile is not a setting: choose it with --profile, or PROFILE in notebook 01_setup")
        if name not in fields:
            raise ConfigError(f"unknown setting {name!r}{nearest(name, fields)}")
        overrides[name] = parse_value(f"--set {name}", text.strip(), _types(fields[name].annotation))
    return overrides


def parse_value(what: str, text: str, types: Set[type]) -> Any:
    """Return a value as somebody types it, read by the types that it may have.

    A text is taken as it is written, up to quotation marks around the whole of it. So are the texts in a list, and a text
    without brackets for a list; a number is decimal; everything else is YAML. Empty is None, and so is null unless only a
    text is possible. Raises ConfigError beginning with `what` for a value that cannot be read, and for Python's None."""
    if not text or (text in _NULL and types != {str}):
        return None
    if text == "None" and NoneType in types:
        raise ConfigError(f"{what} is None: expected {_name_kinds(types)}. For no value, write null")
    if tuple in types and text.startswith("["):
        return _parse_list(what, text)
    if tuple in types or types <= {str, NoneType}:
        return _unquote(text)
    for number in types & {int, float} and (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what}: {quote(text)} is not a YAML value ({getattr(error, 'problem', error)})") from error
    return text if isinstance(value, int) and ":" in text else value  # YAML 1.1 takes 1:30 for 90


def _name_kinds(types: Set[type]) -> str:
    """Return the kinds of value that a setting takes, in words: `a number, or null`."""
    found = [words for kind, words in _KINDS.items() if kind in types]
    return ", or ".join(dict.fromkeys(found))


def _parse_list(what: str, text: str) -> list[str]:
    with contextlib.suppress(ValueError):  # first, because YAML folds some characters that JSON leaves alone
        values = json.loads(text)
        if all(isinstance(value, str) for value in values):
            return values
    try:
        return yaml.load(text, yaml.BaseLoader)  # safe: it makes texts of all scalars
    except yaml.YAMLError as error:
        raise ConfigError(f"{what}: {quote(text)} is not a list ({getattr(error, 'problem', error)})") from error


def _unquote(text: str) -> str:
    """Return a text without the quotation marks around it; one that only begins and ends with such marks stays as it is."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return text
    for read, fault in ((json.loads, ValueError), (yaml.safe_load, yaml.YAMLError)):
        with contextlib.suppress(fault):
            return read(text)
    return text


def load_config(profile: str, overrides: Iterable[str] | str = ()) -> RunConfig:
    """Return the configuration of a profile with `a.b=value` overrides laid over it. Another model or data set by name drops
    the pinned revisions of the profile's own.

    Raises ConfigError naming the profile, setting or value at fault, and the nearest valid one."""
    values, given = read_profile(profile), parse_overrides(overrides)
    default = config_from_dict(values)
    others = [name for name in _PINS if name in given and given[name] != default.get(name)]
    unpinned = {pin: None for name in others for pin in _PINS[name]}
    return config_from_dict(_with_leaves(values, unpinned | given))


def with_values(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with other values of the named settings. Raises ConfigError for a value that is none of theirs."""
    return config_from_dict(_with_leaves(config.model_dump(mode="json"), changes))


def _with_leaves(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        node = values
        *sections, leaf = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return values


def overrides_of(config: RunConfig) -> list[str]:
    """Return the `a.b=value` pairs that make this configuration out of its profile's values."""
    default = load_config(config.profile)
    # Another model's pins are always named: left out, one equal to the profile's would be dropped on the way back.
    pins = [pin for name, pins in _PINS.items() if config.get(name) != default.get(name) for pin in pins]
    changed = (name for name in setting_names() if name in pins or config.get(name) != default.get(name))
    return [f"{name}={json.dumps(config.get(name), ensure_ascii=False)}" for name in changed]


@dataclass(frozen=True)
class ProfileNeeds:
    """Hold a profile's needs of the machine: `needs` in its YAML file, which is not a setting of a run."""

    memory_gib: float  # free memory for one kernel
    packages: tuple[str, ...]  # beside those that every profile needs, as they are imported
    expect: str  # what to expect where it can run, in a few words
    gpu_gib: float | None = None  # of one CUDA GPU; None: runs without a GPU


def profile_needs(profile: str) -> ProfileNeeds:
    """Return what a profile needs of the machine. Raises ConfigError for an unknown profile."""
    needs = _profile_file(profile)["needs"]
    return ProfileNeeds(**needs | {"packages": tuple(needs["packages"])})


def read_profile(profile: str) -> dict[str, Any]:
    """Return a profile's settings as nested dictionaries, not yet validated. Raises ConfigError for an unknown profile, or one
    that holds a token."""
    values = _profile_file(profile)
    _refuse_tokens(values, f"profile {profile}: ")
    del values["needs"]
    return values | {"profile": profile}


def _profile_file(profile: str) -> dict[str, Any]:
    if profile not in PROFILES:
        choices = ", ".join(PROFILES if profile == "auto" else (*PROFILES, "auto"))
        match = difflib.get_close_matches(str(profile), PROFILES, 1)
        hint = f"; did you mean {match[0]}?" if match else ""
        raise ConfigError(f"unknown profile {profile!r}: expected one of {choices}{hint}")
    values = copy.deepcopy(_read_yaml(PROFILES_DIR / f"{profile}.yaml"))
    parent = values.pop("extends", None)
    return _merge(_profile_file(parent), values) if parent else values


@cache  # a command asks for the same profile dozens of times
def _read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Return a nested dictionary as a validated configuration. Raises ConfigError with every fault in one line, or for a token,
    which is not repeated."""
    _refuse_tokens(values)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for fault in error.errors():
            setting = _setting_of(fault)
            # A setting of several possible types has a fault for each of them.
            lines[setting] = f"{lines[setting]}, or {_lower(fault['msg'])}" if setting in lines else _explain(fault)
        fields = _fields(RunConfig)
        nullable = {name for name in lines if name in fields and NoneType in _types(fields[name].annotation)}
        raise ConfigError("; ".join(line + ", or null" * (name in nullable) for name, line in lines.items())) from None


def _refuse_tokens(value: Any, where: str = "", name: str = "") -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _refuse_tokens(str(key), where, name)
            _refuse_tokens(part, where, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for part in value:
            _refuse_tokens(part, where, name)
    elif isinstance(value, str) and (look := name_look(value)):
        raise ConfigError(
            f"{where}{f'setting {name}' if name else 'the name of a setting'} holds what looks like {look}. {SECRETS_STAY_OUT}"
        )


def show_value(value: object) -> str:
    """Return a setting's value as a user types it: `null` for None, `true`, and a text without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
    given = "null" if fault["input"] is None else quote(fault["input"])
    return f"setting {name} is {given}: {_lower(fault['msg'])}"
