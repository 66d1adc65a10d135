"""Batches on a CPU: keys and values in pages, and rows that leave when they are done."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from medcot_utils.config import load_config
from medcot_utils.models.decoding import ForcedClosing, RowRules, RowSampler, Sampling, StopDoneRows
from medcot_utils.models.engine import get_engine
from medcot_utils.models.generation import generate_arguments, pad_left
from medcot_utils.models.growing_cache import PagedLayer, generate_in_turns, make_growing_cache

BUDGET, ANSWER = 90, 40
CONFIG = load_config("smoke", ["model.load_in_4bit=false"])
TEMPLATE = "Think before you answer the question below.\n\n"
ENDS = ["Why fever?", "Which valve is most often affected, and which murmur is heard? " * 3, "Dose?", "What first?"]
PROMPTS = [TEMPLATE + end for end in ENDS]


@pytest.fixture(scope="module")
def loaded():
    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    return engine.for_inference(model), tokenizer


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(5, 1, 1, 1), (63, 1, 1), (64, 1, 64, 1), (200, 1), (1, 130, 1)])
def test_pages_hold_what_transformers_own_cache_holds(lengths):
    paged, own, generator = PagedLayer(), DynamicLayer(), torch.Generator().manual_seed(1)
    for length in lengths:
        states = [torch.randn(3, 2, length, 8, generator=generator) for _ in range(2)]
        for found, expected in zip(paged.update(*states), own.update(*states), strict=True):
            assert torch.equal(found, expected)
    assert paged.get_seq_length() == sum(lengths)


def test_chosen_rows_keep_their_keys_and_values():
    paged, own, generator = PagedLayer(), DynamicLayer(), torch.Generator().manual_seed(1)
    for chosen in (None, [0, 2], [1]):
        for layer in (paged, own):
            if chosen:
                layer.batch_select_indices(torch.tensor(chosen))
        rows = 3 if not chosen else len(chosen)
        states = [torch.randn(rows, 2, 4, 8, generator=generator) for _ in range(2)]
        for found, expected in zip(paged.update(*states), own.update(*states), strict=True):
            assert torch.equal(found, expected)


def test_a_token_writes_its_own_place_and_moves_no_other():
    layer = PagedLayer()
    layer.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    before = layer.keys.data_ptr()
    layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert layer.keys.data_ptr() == before


def test_layers_of_other_kinds_stay_as_they_are(loaded, monkeypatch):
    window = DynamicSlidingWindowLayer(sliding_window=8)
    monkeypatch.setattr(DynamicCache, "__init__", lambda self, config: setattr(self, "layers", [DynamicLayer(), window]))
    layers = make_growing_cache(loaded[0]).layers
    assert type(layers[0]) is PagedLayer and layers[1] is window


# --- rows that leave -------------------------------------------------------------------------------------------------


def write(model, tokenizer, seeds, in_turns):
    """Return what is written for PROMPTS, and how many rows and tokens the model was given each time."""
    closing = ForcedClosing(RowRules(tokenizer, BUDGET, ANSWER), [""] * len(PROMPTS))
    sampler = [RowSampler(seeds, Sampling(0.9, 50, 0.95), BUDGET + ANSWER + 20, model.device)] if any(seeds) else []
    processors = LogitsProcessorList([*sampler, closing])
    arguments = generate_arguments(CONFIG.generation, tokenizer) | {
        "max_new_tokens": BUDGET + ANSWER + 20,
        "logits_processor": processors,
        "stopping_criteria": StoppingCriteriaList([StopDoneRows(closing)]),
    }
    shapes, inputs = [], pad_left(tokenizer, PROMPTS)
    handle = model.register_forward_pre_hook(
        lambda module, args, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    try:
        if in_turns:
            generate_in_turns(model, inputs, closing, arguments)
        else:
            with torch.inference_mode():
                model.generate(**inputs, **arguments)
    finally:
        handle.remove()
    return closing.rows, shapes


@pytest.fixture(params=[[None] * 4, [7, None, 8, 9]], ids=["greedy", "sampled"])
def seeds(request):
    return request.param


@pytest.fixture
def ending(loaded, seeds):
    """The model and tokenizer, with an EOS that some row writes in the middle of its thinking."""
    model, tokenizer = loaded
    own = write(model, tokenizer, seeds, in_turns=False)[0][0].own
    rare = min(own[20:60], key=lambda token: (own.index(token) < 10, own.count(token)))
    ends, tokenizer.eos_token = tokenizer.eos_token, tokenizer.convert_ids_to_tokens(rare)
    yield model, tokenizer
    tokenizer.eos_token = ends


def test_rows_are_written_as_in_one_call(ending, seeds):
    whole, _ = write(*ending, seeds, in_turns=False)
    turns, _ = write(*ending, seeds, in_turns=True)
    assert len({row.closed_by for row in whole}) > 1 or len({len(row.own) for row in whole}) > 1
    assert [(row.own, row.closed_by, row.answer) for row in turns] == [(row.own, row.closed_by, row.answer) for row in whole]


def test_a_row_that_is_done_leaves_the_batch(ending, seeds):
    whole, turns = ([rows for rows, tokens in write(*ending, seeds, way)[1] if tokens == 1] for way in (False, True))
    assert set(whole) == {4} and turns[0] == 4
    assert sum(turns) < sum(whole) and turns == sorted(turns, reverse=True)


# --- what prompts share ----------------------------------------------------------------------------------------------


def test_what_all_prompts_begin_with_is_read_once(loaded):
    _, shapes = write(*loaded, [None] * 4, in_turns=True)
    tokenizer = loaded[1]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    shared = shapes[0][1]
    assert shapes[0] == (1, shared) and shared >= len(tokenizer(TEMPLATE)["input_ids"]) - 2
    assert shapes[1] == (4, max(lengths) - shared - 1), "the last token is the first that generate is given"
    assert {tokens for _, tokens in shapes[2:]} == {1}


def test_a_model_with_windows_reads_each_prompt_whole(loaded, monkeypatch):
    # Padding in the middle would take up places of the window.
    own = write(*loaded, [None] * 4, in_turns=True)[0]
    init = DynamicCache.__init__

    def windowed(self, *args, **named):
        init(self, *args, **named)
        self.layers = [DynamicSlidingWindowLayer(sliding_window=4096) for _ in self.layers]

    monkeypatch.setattr(DynamicCache, "__init__", windowed)
    rows, shapes = write(*loaded, [None] * 4, in_turns=True)
    assert shapes[0][0] == 4, "no prefix was read"
    assert [row.own for row in rows] == [row.own for row in own]
