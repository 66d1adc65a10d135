"""Batch plans: which there are, what they need and cost, which is chosen, and the estimate beside a measured step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from medcot_utils.config import load_config
from medcot_utils.machine.gpu import available_gpu_memory
from medcot_utils.models.engine import get_engine
from medcot_utils.training.batch_plan import (
    BatchPlan,
    PlanError,
    batch_plans,
    choose_plans,
    memory_parts,
    padded_tokens,
    plans_table,
)

GIB = 2**30
CONFIG = load_config("smoke", ["lora.use_gradient_checkpointing=unsloth"])
ARTICLE = load_config("article")
LENGTHS = [300, 700, 500, 1100, 900, 400, 650, 800, 1000, 350, 450, 600]


@pytest.fixture(scope="module")
def tiny():
    """The tiny model in 4 bits with fresh LoRA, as notebook 04 has it."""
    engine = get_engine(CONFIG.model)
    return engine.add_lora(engine.load(CONFIG.model)[0], CONFIG.lora)


@pytest.fixture(scope="module")
def eight_b():
    """The shape of the R1-Distill-Llama-8B with the article's LoRA, at 16 bits and without a single weight."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    lora = LoraConfig(r=ARTICLE.lora.r, target_modules=list(ARTICLE.lora.target_modules), task_type="CAUSAL_LM")
    with torch.device("meta"):
        return get_peft_model(LlamaForCausalLM(shape).to(torch.bfloat16), lora)


def plans_on_a_gpu(model, config=CONFIG, lengths=LENGTHS, whole_logits=True, num_processes=1):
    return batch_plans(model, config, lengths, whole_logits, num_processes, on_gpu=True)


def shapes(plans):
    return {(p.per_device_train_batch_size, p.gradient_accumulation_steps, p.gradient_checkpointing) for p in plans}


def beside_the_weights(parts):
    return parts["total"] - parts["base weights"] - parts["LoRA weights (float32)"]


# --- which plans there are -----------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ([], [1, 2, 4]),
        (["training.gradient_accumulation_steps=4"], [1, 2, 4, 8]),
        (["training.per_device_train_batch_size=3"], [1, 2, 3, 6]),
        (["training.per_device_train_batch_size=7", "training.gradient_accumulation_steps=1"], [1, 7]),
    ],
)
def test_every_divisor_of_the_effective_batch_is_a_gpu_plan(tiny, overrides, sizes):
    config = load_config("smoke", ["lora.use_gradient_checkpointing=unsloth", *overrides])
    rows = config.training.effective_batch_size
    plans = plans_on_a_gpu(tiny, config)
    assert shapes(plans) == {(size, rows // size, checkpointing) for size in sizes for checkpointing in (False, "unsloth")}
    assert len(plans) == 2 * len(sizes), "none twice"
    assert {plan.effective_batch_size for plan in plans} == {rows}
    costs = [plan.relative_cost for plan in plans]
    assert costs == sorted(costs), "fastest first"


@pytest.mark.model
def test_where_no_checkpointing_is_asked_for_no_plan_has_it(tiny):
    plans = plans_on_a_gpu(tiny, load_config("smoke", ["lora.use_gradient_checkpointing=false"]))
    assert shapes(plans) == {(1, 4, False), (2, 2, False), (4, 1, False)}


@pytest.mark.model
@pytest.mark.parametrize("asked", ["unsloth", "true", "false"])
@pytest.mark.parametrize(("on_gpu", "batch_plan"), [(True, "as_set"), (False, "as_set"), (False, "auto")])
def test_as_set_and_on_a_cpu_the_one_plan_is_the_settings_own(tiny, asked, on_gpu, batch_plan):
    config = load_config("smoke", [f"lora.use_gradient_checkpointing={asked}", f"training.batch_plan={batch_plan}"])
    (plan,) = batch_plans(tiny, config, LENGTHS, True, on_gpu=on_gpu)
    assert (plan.per_device_train_batch_size, plan.gradient_accumulation_steps, plan.num_processes) == (2, 2, 1)
    assert plan.gradient_checkpointing == config.lora.use_gradient_checkpointing


@pytest.mark.model
@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("batch_plan", ["auto", "as_set"])
def test_processes_share_the_effective_batch_evenly(tiny, num_processes, batch_plan):
    plans = plans_on_a_gpu(tiny, load_config("smoke", [f"training.batch_plan={batch_plan}"]), num_processes=num_processes)
    assert plans and {plan.effective_batch_size for plan in plans} == {4}
    assert {plan.per_device_train_batch_size * plan.gradient_accumulation_steps for plan in plans} == {4 // num_processes}
    assert {plan.num_processes for plan in plans} == {num_processes}


@pytest.mark.model
def test_as_set_keeps_the_rows_if_a_processs_share_allows(tiny):
    def rows_at_once(per_device, accumulation, processes):
        settings = [
            "training.batch_plan=as_set",
            f"training.per_device_train_batch_size={per_device}",
            f"training.gradient_accumulation_steps={accumulation}",
        ]
        (plan,) = plans_on_a_gpu(tiny, load_config("smoke", settings), num_processes=processes)
        return plan.per_device_train_batch_size, plan.gradient_accumulation_steps

    assert rows_at_once(2, 4, 2) == (2, 2)
    assert rows_at_once(2, 2, 4) == (1, 1), "a share of one row is one row"
    assert rows_at_once(4, 3, 2) == (2, 3), "4 do not divide a share of 6: the largest that divides both"


@pytest.mark.model
def test_processes_that_cannot_share_the_batch_are_refused(tiny):
    with pytest.raises(PlanError, match="3 processes cannot evenly share an effective batch of 4 rows"):
        plans_on_a_gpu(tiny, num_processes=3)


def test_a_plan_says_its_shape_in_words():
    assert str(BatchPlan(4, 2, 1, False, 0, 0)) == "4 rows x 2 micro-batches, no checkpointing"
    assert str(BatchPlan(4, 2, 1, True, 0, 0)) == "4 rows x 2 micro-batches, gradient checkpointing"
    assert str(BatchPlan(2, 1, 4, "unsloth", 0, 0)) == "4 processes x 2 rows x 1 micro-batches, unsloth checkpointing"


@pytest.mark.parametrize(
    ("lengths", "rows", "expected"),
    [
        ([10, 20, 30, 40], 1, 25),  # (10 + 20 + 30 + 40) / 4
        ([10, 20, 30, 40], 2, 60),  # 2 x 20 and 2 x 40
        ([10, 20, 30, 40], 4, 160),  # 4 x 40
        ([40, 10, 20, 30], 2, 70),  # 2 x 40 and 2 x 30: the order counts
        ([10, 20, 30, 40, 999], 2, 60),  # the last row fills no micro-batch
        ([10, 20], 4, 40),  # fewer rows than a micro-batch takes: the two there are
    ],
)
def test_padded_tokens_by_hand(lengths, rows, expected):
    assert padded_tokens(lengths, rows) == expected


# --- what they need ------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_the_parts_of_the_memory_add_up_as_in_the_formula(tiny):
    parts = memory_parts(tiny, CONFIG, 500, False, True)
    assert parts["total"] == pytest.approx(sum(size for part, size in parts.items() if part != "total"), abs=0.5)
    trained = 32_768  # 28 matrices of rank 16, four bytes a number
    assert parts["LoRA weights (float32)"] == parts["LoRA gradients"] == pytest.approx(4 * trained / 1e6, abs=0.05)
    assert parts["optimizer states"] == pytest.approx(8 * trained / 1e6, abs=0.05)
    assert parts["activations"] == pytest.approx(34 * 2 * 500 * 64 * 2 / 1e6, abs=0.05)  # twice the 16 bits, 2 layers of 64
    vocabulary = tiny.config.vocab_size
    assert parts["logits"] == pytest.approx(3 * 4 * 500 * vocabulary / 1e6, abs=0.05)
    twice = memory_parts(tiny, CONFIG, 1000, False, True)
    assert twice["logits"] == pytest.approx(2 * parts["logits"], abs=0.1)
    assert twice["base weights"] == parts["base weights"]


def test_checkpointing_lowers_activations_and_unsloths_even_more(eight_b):
    plain, saved, offloaded = (memory_parts(eight_b, ARTICLE, 2000, kind, True) for kind in (False, True, "unsloth"))
    assert plain["activations"] > 4 * saved["activations"] > 4 * offloaded["activations"] > 0
    others = set(plain) - {"activations", "total"}
    assert all(plain[part] == saved[part] == offloaded[part] for part in others)


def test_a_loss_in_pieces_keeps_no_logits(eight_b):
    whole, pieces = (memory_parts(eight_b, ARTICLE, 2000, False, kind) for kind in (True, False))
    assert pieces["logits"] == 0 and whole["logits"] == pytest.approx(3 * 4 * 2000 * 128256 / 1e6, abs=0.05)
    assert whole["total"] - pieces["total"] == pytest.approx(whole["logits"], abs=0.2)


def test_an_8_bit_optimizer_takes_a_quarter_of_the_others_states(eight_b):
    eight_bit, full = (
        memory_parts(eight_b, load_config("article", [f"training.optim={name}"]), 100, False, False)["optimizer states"]
        for name in ("adamw_8bit", "adamw_torch")
    )
    assert full == pytest.approx(4 * eight_bit, abs=0.2) and full == pytest.approx(8 * 41_943_040 / 1e6, abs=0.1)


def test_a_plans_memory_is_weights_plus_the_largest_micro_batch(eight_b):
    for plan in plans_on_a_gpu(eight_b, ARTICLE, whole_logits=True):
        tokens = plan.per_device_train_batch_size * max(LENGTHS)
        parts = memory_parts(eight_b, ARTICLE, tokens, plan.gradient_checkpointing, True)
        assert plan.memory_mb == pytest.approx(beside_the_weights(parts), abs=0.5)


# --- which is chosen -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["whole logits", "loss in pieces"])
def article_plans(eight_b, request):
    return plans_on_a_gpu(eight_b, ARTICLE, whole_logits=request.param)


def test_the_chosen_plan_fits_and_more_memory_is_never_slower(article_plans):
    least = min(plan.memory_mb for plan in article_plans) * 1e6 / 0.9
    chosen = [(free, choose_plans(article_plans, free)[0]) for free in (least * 1.05**step for step in range(1, 90))]
    assert all(plan.memory_mb * 1e6 <= free for free, plan in chosen)
    costs = [plan.relative_cost for _, plan in chosen]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == min(plan.relative_cost for plan in article_plans) < costs[0], "and with room enough the fastest"


def test_a_tenth_of_the_free_memory_is_left_alone(article_plans):
    fastest = article_plans[0]
    assert choose_plans(article_plans, fastest.memory_mb * 1e6 / 0.89)[0] == fastest
    assert choose_plans(article_plans, fastest.memory_mb * 1e6 / 0.91)[0] != fastest


@pytest.mark.parametrize("free_gib", [6, 8.5, 12, 20, 40, 130, math.inf])
def test_each_fallback_plan_needs_less_memory_than_the_last(article_plans, free_gib):
    chosen = choose_plans(article_plans, free_gib * GIB)
    assert all(after.memory_mb < before.memory_mb for before, after in itertools.pairwise(chosen))
    assert chosen[-1].memory_mb == min(plan.memory_mb for plan in article_plans)
    below = [plan for plan in article_plans if plan.memory_mb < chosen[0].memory_mb]
    assert len(chosen) == 1 + len({plan.memory_mb for plan in below}), "none is left out"


def test_only_the_faster_of_two_equal_memory_plans_is_a_fallback():
    plans = [
        BatchPlan(4, 1, 1, False, memory_mb=30, relative_cost=1),
        BatchPlan(4, 1, 1, True, memory_mb=20, relative_cost=2),
        BatchPlan(2, 2, 1, False, memory_mb=20, relative_cost=3),
        BatchPlan(1, 4, 1, False, memory_mb=10, relative_cost=4),
    ]
    assert choose_plans(plans, math.inf) == [plans[0], plans[1], plans[3]]


def test_too_little_memory_is_refused_with_needed_and_free(article_plans):
    smallest = min(article_plans, key=lambda plan: plan.memory_mb)
    need = f"{smallest.memory_mb / 1e3:.1f} GB in addition to the weights even with 1 rows x 8 micro-batches, unsloth"
    with pytest.raises(PlanError) as caught:
        choose_plans(article_plans, 0.5 * GIB)
    assert f"needs {need} checkpointing; 0.5 GB are free" in str(caught.value)
    assert "Lower model.max_seq_length or lora.r" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_memory_is_no_limit(article_plans):
    assert choose_plans(article_plans, available_gpu_memory())[0] == article_plans[0]


def test_the_table_lists_each_plan_and_marks_the_chosen_one(article_plans):
    chosen = choose_plans(article_plans, 20 * GIB)[0]
    table = plans_table(article_plans, chosen, weights_mb=6000)
    assert len(table) == len(article_plans) == 8
    (line,) = table[table["chosen"] == "yes"].to_dict("records")
    assert (line["rows at once"], line["micro-batches"]) == (
        chosen.per_device_train_batch_size,
        chosen.gradient_accumulation_steps,
    )
    assert line["relative time"] == 1 and line["memory (GB)"] == pytest.approx(chosen.memory_mb / 1e3 + 6, abs=0.05)
    fastest = table.iloc[0]
    assert fastest["relative time"] < 1 and fastest["memory (GB)"] > line["memory (GB)"]


# --- the 8B model, beside what was measured ------------------------------------------------------------------------


def test_the_8b_shape_has_the_articles_trainable_parameters(eight_b):
    assert eight_b.get_nb_trainable_parameters()[0] == 41_943_040


def test_the_8_row_estimate_is_within_a_quarter_of_the_measured(eight_b):
    # Measured on a GPU with the unsloth engine: 38.8 GiB reserved, 5.7 of them the 4-bit weights. (Here the weights would
    # count 16 bits each, so the parts beside them are compared.)
    parts = memory_parts(eight_b, ARTICLE, 8 * 1097, False, whole_logits=False)
    estimated = (parts["total"] - parts["base weights"]) * 1e6 / GIB
    assert estimated == pytest.approx(38.8 - 5.7, rel=0.25)


@pytest.mark.parametrize("whole_logits", [True, False])
def test_the_article_needs_checkpointing_on_a_t4_only(eight_b, whole_logits):
    lengths = [300 + 37 * index % 801 for index in range(500)]
    assert max(lengths) == 1100
    plans = plans_on_a_gpu(eight_b, ARTICLE, lengths, whole_logits)
    on_a_t4, on_a_large_gpu = choose_plans(plans, 8.5 * GIB)[0], choose_plans(plans, 130 * GIB)[0]
    assert on_a_t4.gradient_checkpointing == "unsloth"
    assert shapes([on_a_large_gpu]) == {(8, 1, False)}


def test_two_gpus_take_4_rows_each_and_half_the_activations(eight_b):
    alone = choose_plans(plans_on_a_gpu(eight_b, ARTICLE), 130 * GIB)[0]
    shared = choose_plans(plans_on_a_gpu(eight_b, ARTICLE, num_processes=2), 130 * GIB)[0]
    assert (shared.per_device_train_batch_size, shared.gradient_accumulation_steps, shared.num_processes) == (4, 1, 2)
    assert shared.memory_mb < 0.6 * alone.memory_mb
