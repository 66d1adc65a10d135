"""The likeliest option by lm-eval: whose text or letter a model prefers, and what length does to it."""

from __future__ import annotations

import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.mcq.likelihood import (
    TASKS,
    fits,
    letter_row,
    likeliest_letters,
    make_harness,
    task_rows,
    text_row,
)

pytest_plugins = ("mcq_fixtures",)

CONFIG = load_config("smoke", ["model.load_in_4bit=false"])
TEXTS = ["Sodium", "Potassium", "Calcium"]


def question(*texts, right="A"):
    return {"id": "q", "question": "Which?", "options": dict(zip("ABCDE", texts, strict=False)), "answer": right}


def test_rows_hold_the_context_and_the_choices():
    asked = question(*TEXTS, right="C")
    assert text_row(asked) == {"context": "Question: Which?\nAnswer:", "choices": TEXTS, "right": 2}
    thought = "Which?\n<think>\nHm.\n</think>\n"
    assert letter_row(asked, thought) == {"context": f"{thought}Answer:", "choices": ["A", "B", "C"], "right": 2}


def test_rows_of_a_task_come_from_its_source(write):
    path = write(*({"question": f"q{i}", "options": TEXTS[: 2 + i % 2], "answer": 0} for i in range(4)))
    rows = task_rows(path=path, limit=2, seed=3)["test"]
    assert len(rows) == 2 and set(rows.column_names) == {"context", "choices", "right"}
    assert task_rows(path=path)["test"]["choices"] == [TEXTS[:2], TEXTS, TEXTS[:2], TEXTS]


# --- scripted models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    from medcot_utils.models.engine import get_engine

    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    return engine.for_inference(model), tokenizer


@pytest.fixture
def harness_of(tiny, monkeypatch):
    """lm-eval over a model whose next token has these logits, whatever came before; over the tiny model itself by default."""
    import torch
    from transformers.modeling_outputs import CausalLMOutput

    model, tokenizer = tiny

    def make(logits=None, batch_size=4):
        def forward(input_ids, logits_to_keep, **_):
            return CausalLMOutput(logits=logits.expand(len(input_ids), len(logits_to_keep), len(logits)).to(torch.float32))

        if logits is not None:
            monkeypatch.setattr(model, "forward", forward)
        return make_harness(model, tokenizer, batch_size)

    return make


def last_token(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"][-1]


@pytest.mark.model
def test_a_model_that_always_prefers_b_reads_b(tiny, harness_of):
    import torch

    tokenizer = tiny[1]
    logits = torch.zeros(tiny[0].config.vocab_size)
    logits[last_token(tokenizer, "x B")] = 5
    rows = [letter_row(question(*TEXTS, right=right), f"thought {i}\n</think>\n") for i, right in enumerate("ABCAB")]
    assert likeliest_letters(harness_of(logits), rows, by_length=False) == ["B"] * 5


@pytest.mark.model
def test_length_normalization_lets_long_texts_win(tiny, harness_of):
    # Every token is equally likely: the fewest tokens win as they are, the most characters a token by length.
    import torch

    tokenizer = tiny[1]
    texts = ["Zq", "the the the the the"]
    tokens = [len(tokenizer(f"Answer: {text}")["input_ids"]) - len(tokenizer("Answer:")["input_ids"]) for text in texts]
    assert tokens[0] < tokens[1] and tokens[0] / len(texts[0]) > tokens[1] / len(texts[1]), "no such pair for this tokenizer"
    harness = harness_of(torch.zeros(tiny[0].config.vocab_size))
    for given, short, long in ((texts, "A", "B"), (texts[::-1], "B", "A")):
        row = text_row(question(*given))
        assert likeliest_letters(harness, [row], by_length=False) == [short]
        assert likeliest_letters(harness, [row], by_length=True) == [long]


@pytest.mark.model
def test_letters_are_those_that_lm_eval_counts(harness_of):
    from medcot_utils.evaluation.mcq import likelihood
    from medcot_utils.evaluation.mcq.run import load_questions

    asked, harness = load_questions("shipped"), harness_of()
    rows = [text_row(one) for one in asked]
    samples = likelihood._evaluate(harness, rows)
    for by_length, metric in ((False, "acc"), (True, "acc_norm")):
        letters = likeliest_letters(harness, rows, by_length)
        assert [letter == one["answer"] for letter, one in zip(letters, asked, strict=True)] == [s[metric] for s in samples]
        assert 0 < sum(sample[metric] for sample in samples) < 60 and len(set(letters)) == 4


@pytest.mark.model
def test_joined_rows_have_the_likelihoods_of_lm_evals_own_rows(tiny, harness_of):
    from lm_eval.models.huggingface import HFLM

    from medcot_utils.evaluation.mcq.joined_harness import JoinedHarness
    from medcot_utils.evaluation.mcq.run import load_questions

    joined = harness_of()
    assert type(joined) is JoinedHarness
    plain = HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=4, softmax_dtype="float32")
    texts = [(row["context"], f" {text}") for row in map(text_row, load_questions("shipped", 9)) for text in row["choices"]]
    beyond = [("word " * 2040, " a long option of some words"), ("word " * 2040, " no")]
    requests = [(pair, *plain._encode_pair(*pair)) for pair in [*texts[::-1], *beyond, *texts[:3]]]
    assert len({len(request[1]) for request in requests}) > 5, "rows of one length would hide a fault"
    found, expected = (harness._loglikelihood_tokens(requests, disable_tqdm=True) for harness in (joined, plain))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.model
def test_what_greedy_decoding_would_write_is_said(tiny, harness_of):
    import torch

    model, tokenizer = tiny
    context = tokenizer("Question: Which ion?\nAnswer:")["input_ids"]
    with torch.no_grad():
        best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    found = harness_of()._loglikelihood_tokens([("", context, [best]), ("", context, [best + 1])])
    assert [greedy for _, greedy in found] == [True, False] and found[0][0] > found[1][0]


@pytest.mark.model
def test_the_batch_size_changes_no_letter(harness_of):
    from medcot_utils.evaluation.mcq.run import load_questions

    rows = [text_row(one) for one in load_questions("shipped", 8)]
    assert likeliest_letters(harness_of(), rows, True) == likeliest_letters(harness_of(batch_size=1), rows, True)


@pytest.mark.model
def test_a_quantized_model_is_read_with_its_adapter():
    import torch
    from peft import LoraConfig, get_peft_model

    from medcot_utils.evaluation.mcq import likelihood
    from medcot_utils.models.engine import get_engine

    settings, row = load_config("smoke").model, text_row(question(*TEXTS))
    assert settings.load_in_4bit
    engine = get_engine(settings)
    model, tokenizer = engine.load(settings)

    def by_lm_eval(model):
        (sample,) = likelihood._evaluate(make_harness(engine.for_inference(model), tokenizer, 2), [row])
        return [value for value, _ in sample["filtered_resps"]]

    def by_hand(model, text):
        start, ids = len(tokenizer(row["context"])["input_ids"]), tokenizer(f"{row['context']} {text}")["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids)))

    base = by_lm_eval(model)
    torch.manual_seed(1)  # of the matrices A too
    tuned = get_peft_model(model, LoraConfig(target_modules=["o_proj", "down_proj"], r=4, lora_alpha=64))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    found = by_lm_eval(tuned)
    assert found == pytest.approx([by_hand(tuned, text) for text in TEXTS], abs=0.02)
    assert max(abs(one - other) for one, other in zip(found, base, strict=True)) > 0.2, "the adapter was not read"


@pytest.mark.model
def test_a_row_beyond_the_context_does_not_fit(harness_of):
    harness = harness_of()
    assert harness.max_length == 2048
    row = text_row(question(*TEXTS))
    assert fits(harness, row)
    assert not fits(harness, row | {"context": "word " * 2100})
    assert not fits(harness, row | {"choices": ["x", "word " * 2100]})


@pytest.mark.model
def test_lm_eval_itself_can_run_the_task_files(tiny, write):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    path = write(*({"question": f"Which ion {i}?", "options": TEXTS, "answer": 0} for i in range(3)))
    harness = HFLM(pretrained=tiny[0], tokenizer=tiny[1])
    for name, metadata in (("medcot_shipped", {"limit": 2, "seed": 3}), ("medcot_file", {"limit": 2, "path": path})):
        manager = TaskManager(include_path=TASKS, include_defaults=False, metadata=metadata)
        found = simple_evaluate(harness, tasks=[name], task_manager=manager, bootstrap_iters=0)
        assert found["results"][name]["sample_len"] == 2
        assert {"acc,none", "acc_norm,none"} <= set(found["results"][name])
        assert found["higher_is_better"][name] == {"acc": True, "acc_norm": True}
