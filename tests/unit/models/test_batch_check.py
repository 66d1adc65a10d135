"""A batch's logits against those of its rows alone: what agrees, what does not, and what follows on a T4."""

from __future__ import annotations

import functools
import os
import sys
import types

import pytest
import torch

from medcot_utils.config import load_config
from medcot_utils.models import batch_check
from medcot_utils.models.batch_check import BatchCheck, check_batches, compare_batch
from medcot_utils.models.batches import MAX_BATCH, PACKED_ROWS, PACKED_SWITCH, GenerationError, choose_batch_size

CONFIG = load_config("smoke", ["model.load_in_4bit=false"])
GOOD, WRONG, BROKEN = BatchCheck(16, 0.06, 6.5, True), BatchCheck(16, 0.4, 6.5, True), BatchCheck(16, float("nan"), 6.5, False)


@pytest.fixture(scope="module")
def loaded():
    from medcot_utils.models.engine import get_engine

    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    return engine.for_inference(model), tokenizer


@pytest.fixture
def t4(monkeypatch):
    """A simulated T4 on which Unsloth has been imported: the module of its kernels."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (7, 5))
    monkeypatch.setenv(PACKED_SWITCH, "")
    kernels = types.ModuleType("unsloth.kernels.utils")
    kernels._BNB_GEMM_4BIT = True
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    monkeypatch.setitem(sys.modules, "unsloth.kernels.utils", kernels)
    return kernels


@pytest.fixture
def compared(monkeypatch):
    """`compared(GOOD, ...)`: what each comparison finds, in turn."""

    def script(*found):
        endings = iter(found)
        monkeypatch.setattr(batch_check, "compare_batch", lambda *_: next(endings))
        return endings

    return script


QUANTIZED = types.SimpleNamespace(is_loaded_in_4bit=True)


def check(**settings):
    check_batches(QUANTIZED, None, CONFIG.generation.model_copy(update={"batch_size": "auto"} | settings))


# --- the comparison ------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_a_padded_batch_agrees_with_its_rows_alone(loaded):
    found = compare_batch(*loaded, batch_check._make_prompts(), CONFIG.generation)
    assert found.agrees and found.rows == PACKED_ROWS and found.scale > 0.01
    assert found.difference < 1e-3 * found.scale, "float32 rounds no further"


@pytest.mark.model
@pytest.mark.parametrize(
    ("spoil", "told"), [(lambda x: x + x.std(), "differ by at most"), (lambda x: x * torch.nan, "not finite")]
)
def test_a_batch_whose_steps_are_wrong_is_found(loaded, monkeypatch, spoil, told):
    model, tokenizer = loaded
    forward = model.forward

    @functools.wraps(forward)  # generate looks at its arguments
    def wrong_in_batches(input_ids, **given):
        made = forward(input_ids=input_ids, **given)
        if len(input_ids) > 1 and input_ids.shape[1] == 1:  # only where each token goes through by itself
            made.logits = spoil(made.logits)
        return made

    monkeypatch.setattr(model, "forward", wrong_in_batches)
    found = compare_batch(model, tokenizer, batch_check._make_prompts(), CONFIG.generation)
    assert not found.agrees and told in str(found)


# --- what follows --------------------------------------------------------------------------------------------------


def test_agreement_on_a_t4_is_said_and_nothing_changes(t4, compared, capsys):
    compared(GOOD)
    check()
    assert capsys.readouterr().out == (
        "logits of 16 rows in a batch and alone differ by at most 0.060 (allowed 0.33, on a scale of 6.5)\n"
    )
    assert t4._BNB_GEMM_4BIT and os.environ[PACKED_SWITCH] == ""


@pytest.mark.parametrize("first", [WRONG, BROKEN])
def test_packed_products_that_disagree_are_switched_off(t4, compared, capsys, first):
    compared(first, GOOD)
    check()
    said = capsys.readouterr().out.splitlines()
    assert "Unsloth's product of small batches with packed 4-bit weights is switched off (UNSLOTH_BNB_GEMM_4BIT=0)" in said[0]
    assert said[1] == str(GOOD)
    assert t4._BNB_GEMM_4BIT is False and os.environ[PACKED_SWITCH] == "0"


def test_batches_that_disagree_either_way_end_the_notebook(t4, compared):
    compared(WRONG, WRONG)
    with pytest.raises(GenerationError, match=r"at most 0\.400 .*Set generation\.batch_size=1, which is slow, or"):
        check()


def test_without_unsloth_a_disagreement_has_no_remedy(t4, compared, monkeypatch):
    monkeypatch.delitem(sys.modules, "unsloth")
    left = compared(WRONG, GOOD)
    with pytest.raises(GenerationError, match="would not be the model's own"):
        check()
    assert next(left) is GOOD


def test_another_gpu_or_single_answers_are_not_compared(t4, compared, monkeypatch):
    compared()
    check(batch_size=1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (8, 0))
    check()


@pytest.mark.parametrize(
    ("capability", "switch", "quantized", "expected"),
    [((7, 5), "", True, 15), ((7, 5), "0", True, 60), ((7, 5), "", False, 60), ((9, 0), "", True, 60)],
)
def test_a_t4_writes_at_most_16_rows_at_once(t4, monkeypatch, capability, switch, quantized, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)
    monkeypatch.setenv(PACKED_SWITCH, switch)
    monkeypatch.setattr("medcot_utils.models.batches.available_gpu_memory", lambda: 80 * 2**30)
    sizes = types.SimpleNamespace(num_hidden_layers=32, num_key_value_heads=8, head_dim=128)
    model = types.SimpleNamespace(
        is_loaded_in_4bit=quantized, config=types.SimpleNamespace(get_text_config=lambda: sizes), num_parameters=lambda: 8e9
    )
    settings = CONFIG.generation.model_copy(update={"batch_size": "auto", "cache_implementation": "dynamic"})
    assert choose_batch_size(model, settings, 60, 200, 1200) == expected <= MAX_BATCH
