"""Fast answers: the dequantized model with its adapter merged, attention that groups its heads, static caches."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medcot_utils.config import load_config
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.models.engine import get_engine
from medcot_utils.models.generation import answer_questions, generate_arguments, pad_left
from medcot_utils.models.plain_weights import GROUPED, _grouped_decode, dequantize, use_grouped_decode

on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, what is decided depends on its memory")

NEW_TOKENS = 12
QUESTIONS = [
    {"id": "short", "Question": "Why fever?"},
    {"id": "long", "Question": "Which valve is most often affected in acute rheumatic fever, and which murmur is heard? " * 4},
    {"id": "middle", "Question": "What does a wide splitting of the second heart sound suggest in a child?"},
    {"id": "tiny", "Question": "Dose?"},
    {"id": "last", "Question": "A patient with a stiff neck: what comes first, the lumbar puncture or the antibiotic?"},
]
MODELS = [
    pytest.param("embedded:tiny-random-llama", marks=pytest.mark.model),
    pytest.param("embedded:smollm2-135m-instruct", marks=pytest.mark.embedded),
]


def config(name="embedded:tiny-random-llama", *overrides):
    # The profile's dtype, float32: a tolerance then bounds an error and not a rounding.
    fixed = [f"model.name={name}", f"generation.max_new_tokens={NEW_TOKENS}", "lora.r=4", "lora.lora_alpha=8"]
    return load_config("smoke", [*fixed, *overrides])


def load(name="embedded:tiny-random-llama", *overrides):
    """(model, tokenizer) in eval mode, its weights still in 4 bits."""
    settings = config(name, *overrides).model
    model, tokenizer = get_engine(settings).load(settings)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def load_tuned(tmp_path_factory):
    """`load_tuned(name, ...)`: (model, tokenizer) as notebook 06 has them, the adapter out of a folder, its matrices B random."""
    folders = {}

    def load_with_adapter(name="embedded:tiny-random-llama", *overrides):
        asked = config(name, *overrides)
        engine, key = get_engine(asked.model), (name, *overrides)
        if key not in folders:
            made = engine.add_lora(load(name, *overrides)[0], asked.lora)
            torch.manual_seed(1)
            for parameter, weight in made.named_parameters():
                if "lora_B" in parameter:
                    torch.nn.init.normal_(weight, std=0.05)
            folders[key] = tmp_path_factory.mktemp("adapter")
            made.save_pretrained(folders[key])
        model, tokenizer = engine.load(asked.model, adapter=folders[key])
        return model.eval(), tokenizer

    return load_with_adapter


def prompt_ids(tokenizer, question=QUESTIONS[2]):
    return tokenizer(inference_prompt(question["Question"]), return_tensors="pt")["input_ids"]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def settings(**changes):
    return config().generation.model_copy(update={"batch_size": 2, "cache_implementation": "dynamic"} | changes)


def answers(model, tokenizer, questions=QUESTIONS, **changes):
    return answer_questions(model, tokenizer, questions, settings(**changes), True, 1)


def untimed(records):
    return [{field: value for field, value in record.items() if field != "seconds"} for record in records]


@pytest.fixture
def unquantized():
    """The tiny model as it is: its answers to the questions all differ. In 4 bits some are equal, and could be mixed up."""
    return load("embedded:tiny-random-llama", "model.load_in_4bit=false")


@pytest.fixture
def expected(unquantized):
    """The records of a cache that grows, each question asked alone."""
    records = answers(*unquantized, batch_size=1)
    assert len({record["completion"] for record in records}) == len(QUESTIONS)
    return untimed(records)


# --- 16-bit weights out of 4-bit ones ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_dequantized_model_computes_what_the_4_bit_one_does(name):
    model, tokenizer = load(name)
    ids = prompt_ids(tokenizer)
    assert any(isinstance(layer, Linear4bit) for layer in model.modules())
    in_4_bits, dtype = logits(model, ids), model.dtype
    plain = dequantize(model)
    assert not any(isinstance(layer, Linear4bit) for layer in plain.modules()) and plain.dtype == dtype
    # Measured: no difference at all. The unquantized model's logits are elsewhere.
    assert torch.allclose(logits(plain, ids), in_4_bits, atol=1e-5)
    assert not torch.allclose(logits(load(name, "model.load_in_4bit=false")[0], ids), in_4_bits, atol=1e-2)


# Measured: 3e-7 of logits up to 0.8, and 8e-5 of logits up to 43; the adapter moves them by 0.5 and by 9.
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [pytest.param(*model.values, tolerance, marks=model.marks) for model, tolerance in zip(MODELS, (1e-5, 1e-3), strict=True)],
)
def test_the_merged_model_computes_what_base_and_adapter_do(name, tolerance, load_tuned):
    tuned, tokenizer = load_tuned(name)
    ids = prompt_ids(tokenizer)
    adapter_on = logits(tuned, ids)
    with tuned.disable_adapter():
        base = logits(tuned, ids)
    merged = dequantize(tuned)
    assert not hasattr(merged, "peft_config")
    assert not any(isinstance(layer, Linear4bit) or "lora" in type(layer).__module__ for layer in merged.modules())
    assert (logits(merged, ids) - adapter_on).abs().max() <= tolerance
    assert (adapter_on - base).abs().max() > 100 * tolerance


@pytest.mark.model
@pytest.mark.parametrize("overrides", [["lora.use_rslora=true"], ["lora.lora_alpha=32", "lora.target_modules=[q_proj, up_proj]"]])
def test_the_adapters_scale_and_projections_are_merged_too(overrides, load_tuned):
    tuned, tokenizer = load_tuned("embedded:tiny-random-llama", *overrides)
    ids = prompt_ids(tokenizer)
    adapter_on = logits(tuned, ids)
    assert (logits(dequantize(tuned), ids) - adapter_on).abs().max() <= 1e-5


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_merge_keeps_its_dtype_and_rounds_once(dtype, load_tuned):
    tuned, tokenizer = load_tuned("embedded:tiny-random-llama", f"model.dtype={dtype}")
    ids = prompt_ids(tokenizer)
    adapter_on = logits(tuned, ids).float()
    with tuned.disable_adapter():
        base = logits(tuned, ids).float()
    merged = dequantize(tuned)
    assert {weight.dtype for weight in merged.parameters()} == {getattr(torch, dtype)}
    # Measured: 0.006 and 0.0007; the adapter moves the logits by 0.5.
    error, moved = (logits(merged, ids).float() - adapter_on).abs().max(), (adapter_on - base).abs().max()
    assert error <= 0.02 < 0.2 < moved


@pytest.mark.model
def test_without_4_bit_and_adapter_the_model_is_left_as_it_is(unquantized):
    assert dequantize(unquantized[0]) is unquantized[0]


# --- grouped attention ---------------------------------------------------------------------------------------------


def masks(batch, length):
    """The three forms in which transformers hands a mask to attention, for rows that are padded on the left."""
    keep = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    for row in range(1, batch):
        keep[row, ..., : 2 * row] = False
    added = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    return {"none": None, "bool": keep, "added": added}


@pytest.mark.model
@pytest.mark.parametrize("form", ["none", "bool", "added"])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_grouped_attention_of_one_new_token_is_that_of_sdpa(unquantized, form, scaling):
    layer = unquantized[0].model.layers[0].self_attn
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 4, 1, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16)
    mask = masks(3, 9)[form]
    ours, _ = _grouped_decode(layer, query, key, value, mask, scaling=scaling)
    theirs, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, mask, scaling=scaling)
    assert ours.shape == theirs.shape == (3, 1, 4, 16)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours[:, :, [0, 2, 1, 3]], theirs, atol=1e-2), "heads of another group would show"


@pytest.mark.model
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["growing", "static"])
def test_grouped_decoding_gives_sdpas_tokens_for_a_padded_batch(unquantized, cache):
    model, tokenizer = unquantized
    batch = pad_left(tokenizer, [inference_prompt(question["Question"]) for question in QUESTIONS])
    assert (batch["attention_mask"][:, 0] == 0).sum() == len(QUESTIONS) - 1

    def tokens():
        with torch.inference_mode():
            return model.generate(**batch, **generate_arguments(settings(), tokenizer) | cache)

    by_sdpa = tokens()
    assert model.config._attn_implementation == "sdpa"
    use_grouped_decode(model)
    assert model.config._attn_implementation == GROUPED
    assert torch.equal(tokens(), by_sdpa)
    new = by_sdpa[:, batch["input_ids"].shape[1] :]
    assert new.shape == (5, NEW_TOKENS) and len({tuple(row) for row in new.tolist()}) == 5


# --- a static cache and one that grows -----------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 9])
def test_caches_agree_whatever_the_last_batch_holds(unquantized, expected, batch_size):
    # 5 questions in fewer slots, as many, and more.
    records = answers(*unquantized, cache_implementation="static", batch_size=batch_size)
    assert untimed(records) == expected


@pytest.mark.parametrize("name", MODELS)
def test_caches_agree_with_4_bits_and_an_adapter(name, load_tuned):
    tuned, tokenizer = load_tuned(name)
    few = QUESTIONS[2:]
    with tuned.disable_adapter():
        base = untimed(answers(tuned, tokenizer, few))
    growing = untimed(answers(tuned, tokenizer, few))
    assert untimed(answers(tuned, tokenizer, few, cache_implementation="static")) == growing != base


@pytest.mark.model
@on_the_cpu
def test_a_static_cache_gives_the_same_after_for_inference(load_tuned):
    as_loaded, dequantized = (load_tuned("embedded:tiny-random-llama") for _ in range(2))
    engine = get_engine(config().model)
    expected = untimed(answers(*as_loaded, cache_implementation="static"))
    model, tokenizer = engine.for_inference(dequantized[0]), dequantized[1]
    with torch.inference_mode():  # as notebook 02
        model.generate(prompt_ids(tokenizer), **generate_arguments(settings(), tokenizer))
    assert untimed(answers(model, tokenizer, cache_implementation="static")) == expected


# --- memory that runs out ------------------------------------------------------------------------------------------


def run_out_of_memory_above(limit, model, monkeypatch, message="CUDA out of memory. Tried to allocate 2.00 GiB."):
    """Make `generate` raise as a GPU does for batches of more than `limit`; gives the sizes of the batches it was asked for."""
    generate, asked = model.generate, []

    def generate_or_raise(**arguments):
        asked.append(len(arguments["input_ids"]))
        if asked[-1] > limit:
            raise torch.OutOfMemoryError(message) if "memory" in message else RuntimeError(message)
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", generate_or_raise)
    return asked


@pytest.mark.model
@pytest.mark.parametrize(
    ("batch_size", "limit", "sizes"), [(5, 2, [5, 2, 2, 1]), (5, 1, [5, 2, 1, 1, 1, 1, 1]), (4, 3, [4, 2, 2, 1])]
)
def test_simulated_out_of_memory_halves_the_batch(unquantized, expected, batch_size, limit, sizes, monkeypatch, capsys):
    model, tokenizer = unquantized
    asked = run_out_of_memory_above(limit, model, monkeypatch)
    assert untimed(answers(model, tokenizer, batch_size=batch_size)) == expected
    assert asked == sizes
    assert "out of memory: from here on, batches of 2" in capsys.readouterr().out


@pytest.mark.model
def test_simulated_out_of_memory_with_one_question_is_raised(unquantized, monkeypatch):
    asked = run_out_of_memory_above(0, unquantized[0], monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        answers(*unquantized, batch_size=2)
    assert asked == [2, 1]


@pytest.mark.model
def test_another_error_simulated_in_generate_is_raised_at_once(unquantized, monkeypatch):
    asked = run_out_of_memory_above(1, unquantized[0], monkeypatch, "expected scalar type Half but found Float")
    with pytest.raises(RuntimeError, match="expected scalar type Half"):
        answers(*unquantized, batch_size=4)
    assert asked == [4]


# --- other families ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "expected"), [("sdpa", GROUPED), ("eager", "eager")])
def test_attention_that_is_not_sdpa_is_kept(own, expected):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes), attn_implementation=own)
    use_grouped_decode(model)
    assert model.config._attn_implementation == expected
