"""Both engines have the interface `Engine`. Unsloth itself needs a GPU, so an empty module stands in for it here."""

from __future__ import annotations

import importlib
import inspect
import sys
import types

import pytest

from medcot_utils.models.engine import Engine


def public_functions(owner):
    """{name: signature} of the functions of a module or of the protocol, without `self`."""
    signatures = {}
    for name, function in inspect.getmembers(owner, inspect.isfunction):
        if not name.startswith("_"):
            signature = inspect.signature(function)
            own = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
            signatures[name] = signature.replace(parameters=own)
    return signatures


@pytest.fixture(params=["transformers_engine", "unsloth_engine"])
def module(request, monkeypatch):
    if request.param == "unsloth_engine":
        unsloth = types.ModuleType("unsloth")
        unsloth.FastLanguageModel = unsloth.FastModel = object
        monkeypatch.setitem(sys.modules, "unsloth", unsloth)
        monkeypatch.delitem(sys.modules, "medcot_utils.models.unsloth_engine", raising=False)
    yield importlib.import_module(f"medcot_utils.models.{request.param}")
    if request.param == "unsloth_engine":
        del sys.modules["medcot_utils.models.unsloth_engine"]


def test_an_engine_has_every_function_of_the_interface(module):
    expected, found = public_functions(Engine), public_functions(module)
    assert len(expected) == 7
    assert {name: found.get(name) for name in expected} == expected
    assert set(module.__all__) == {*expected, "WHOLE_LOGITS"} and isinstance(module.WHOLE_LOGITS, bool)
