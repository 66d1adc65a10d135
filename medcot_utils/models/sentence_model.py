"""A sentence embedding model, looked through before it is loaded, since its files choose what is imported and how.

sentence-transformers imports the classes that modules.json names, and hands arguments from a model's own settings on to
transformers. One of them, `weights_only: false`, unpickles the weights, and that runs whatever they hold."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medcot_utils.errors import quote
from medcot_utils.machine.names import OutsideError, require_inside
from medcot_utils.models.tokenizer import NO_CODE, ModelError
from medcot_utils.text_files import read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_SETTING = "evaluation.embedding_model"
_MODULES = "modules.json"
_OWN_CLASS = re.compile(r"sentence_transformers(\.\w+)*\.[A-Z]\w*")
_ACTIVATION = re.compile(r"torch\.nn(\.\w+)*\.[A-Z]\w*")
_CLASSES = {"type": _OWN_CLASS, "tokenizer_class": _OWN_CLASS, "types": _OWN_CLASS, "activation_function": _ACTIVATION}
_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
_METHOD = re.compile(r"forward|get_\w+_features")  # of the model, which its settings name
_OF_CODE = ("trust_remote_code", "weights_only", "code_revision")


def load_sentence_model(name: str) -> SentenceTransformer:
    """Load the sentence embedding model of this folder or Hub id. Raises ModelError if its library is missing, if it needs code
    of its own, and for whatever else keeps it from being loaded."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ModelError(f"{_SETTING} needs another library: pip install sentence-transformers") from error
    try:
        source, commit, folder = _find(name)
        _look_through(folder)
        # What is given here counts more than the same argument in the model's own settings.
        safe = {"weights_only": True, "trust_remote_code": False}
        model = SentenceTransformer(source, revision=commit, trust_remote_code=False, model_kwargs=safe)
        found = np.asarray(model.encode(["one text"], show_progress_bar=False), float)
        if found.ndim != 2 or not np.isfinite(found).all():
            raise ModelError("it makes no numbers of a text")
        return model
    except (ModelError, OutsideError) as error:
        raise ModelError(f"{_SETTING} {name!r} cannot be used: {error}") from error
    except pickle.UnpicklingError as error:
        raise ModelError(f"{_SETTING} {name!r} cannot be used: its pickled weights hold more than weights. {NO_CODE}") from error
    except Exception as error:  # its files are somebody else's, and whatever they hold may raise anything
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(f"{_SETTING} {name!r} cannot be loaded: {why}") from error


def _find(name: str) -> tuple[str, str | None, Path]:
    """Return what to load, at which commit, and the folder with its settings; of a model on the Hub they are downloaded."""
    if Path(name).is_dir():
        return name, None, Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME")  # where the library itself looks
    names = [name] if "/" in name else [f"sentence-transformers/{name}", name]
    for source in names:
        try:
            folder = Path(snapshot_download(source, cache_dir=cache, allow_patterns=[_MODULES, "*config*.json"]))
        except (RepositoryNotFoundError, LocalEntryNotFoundError):
            if source == names[-1]:
                raise
        else:
            return source, folder.name, folder
    raise AssertionError(names)


def _look_through(folder: Path) -> None:
    """Raise ModelError or OutsideError if the settings in a model's folder name code, or files out of it."""
    if (folder / _MODULES).is_file():
        modules = _read(folder, folder / _MODULES)
        if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
            raise ModelError(f"{_MODULES} does not list modules. Expected what sentence-transformers saves")
        for module in modules:
            _check_class("type", module.get("type"), _MODULES)
            if module.get("path") != "":  # the folder itself
                require_inside(module.get("path"), _MODULES)
    for file in sorted(folder.rglob("*config*.json")):
        if "tokenizer" in file.name:  # transformers reads it, and imports no class that it does not know
            continue
        values, where = _read(folder, file), file.relative_to(folder).as_posix()
        if not isinstance(values, dict):
            raise ModelError(f"{where} holds no settings. Expected what sentence-transformers saves")
        for key, value in _walk(values):
            if key in _CLASSES and isinstance(value, str) and "." in value:
                _check_class(key, value, where)
            if key in _ARGUMENTS and value:
                _check_arguments(key, value, where)
            if key == "method" and file.name.startswith("sentence_") and not _METHOD.fullmatch(str(value)):
                raise ModelError(f"{where}: method {quote(value)} makes no embeddings. {NO_CODE}")
        if "auto_map" in values:
            _check_kind(values.get("model_type"), where)


def _read(folder: Path, file: Path) -> Any:
    try:
        return read_json(file)
    except ValueError as error:
        raise ModelError(f"{file.relative_to(folder).as_posix()} cannot be read ({error})") from error


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each entry of the objects in a JSON value, under its key; those of `types` under that."""
    rest = [("", value)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += [("types" if key == "types" else name, one) for name, one in value.items()]
        elif isinstance(value, list):
            rest += [(key, one) for one in value]
        yield key, value


def _check_class(key: str, name: object, where: str) -> None:
    if not isinstance(name, str) or not _CLASSES[key].fullmatch(name):
        raise ModelError(f"{where}: {key} {quote(name)} is no class of sentence-transformers or torch.nn. {NO_CODE}")


def _check_arguments(key: str, arguments: object, where: str) -> None:
    for name, value in arguments.items() if isinstance(arguments, dict) else [(key, arguments)]:
        kernel = "attn_implementation" in name and "/" in str(value)
        if name in _OF_CODE or kernel or isinstance(value, dict | list) or not isinstance(arguments, dict):
            raise ModelError(f"{where}: {key} gives {quote(name)} {quote(value)}, which may choose code. {NO_CODE}")


def _check_kind(kind: object, where: str) -> None:
    import transformers

    if kind not in transformers.CONFIG_MAPPING:
        raise ModelError(f"{where} has model_type {quote(kind)} and needs its own code (auto_map). {NO_CODE}")
