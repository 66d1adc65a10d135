"""Rows of one batch decoded each by its own rules: sampling by row, and thinking that is closed for the model."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from medcot_utils.config import load_config
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.models import growing_cache
from medcot_utils.models.batches import closing_tokens
from medcot_utils.models.decoding import RowSampler, Sampling
from medcot_utils.models.engine import get_engine
from medcot_utils.models.generation import Asked, answer_prompts, answer_questions
from medcot_utils.models.records import with_forced_closing
from medcot_utils.models.slot_writer import SlotWriter
from medcot_utils.models.slots import Slots

BUDGET, ANSWER = 20, 7
CONFIG = load_config("smoke", ["model.load_in_4bit=false", f"generation.max_new_tokens={BUDGET}"])
QUESTIONS = [
    {"id": "short", "Question": "Why fever?"},
    {"id": "long", "Question": "Which valve is most often affected in acute rheumatic fever, and which murmur is heard? " * 4},
    {"id": "middle", "Question": "What does a wide splitting of the second heart sound suggest in a child?"},
    {"id": "tiny", "Question": "Dose?"},
    {"id": "last", "Question": "A patient with a stiff neck: what comes first, the lumbar puncture or the antibiotic?"},
]
# Batches that are whole, that have a smaller last one, and slots of a static cache: fewer than rows, and more.
KINDS = [("dynamic", 1), ("dynamic", 5), ("dynamic", 2), ("static", 2), ("static", 9)]


def load():
    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    return engine.for_inference(model), tokenizer


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture
def fresh(monkeypatch):
    """A model and a tokenizer that a test may change. A script goes by the rows of a batch, so none may leave it:
    test_growing_cache shows that rows which leave are written the same."""
    monkeypatch.setattr(growing_cache, "generate_in_turns", write_in_one_call)
    return load()


def write_in_one_call(model, inputs, closing, arguments):
    with torch.inference_mode():
        model.generate(**inputs, **arguments)


def settings(**changes):
    return CONFIG.generation.model_copy(update={"batch_size": 5, "cache_implementation": "dynamic"} | changes)


def untimed(records, *without):
    return [{field: value for field, value in record.items() if field not in ("seconds", *without)} for record in records]


# --- forced closing, as a scripted model meets it ------------------------------------------------------------------

EOS = "<EOS>"
# {what happens: (what the model writes by itself, closed_by, what it writes after a forced closing, (answer, ended))}
PATHS = {
    "itself, ends": ("It hurts.</think>Pleurisy." + EOS, "itself", "", ("Pleurisy.", True)),
    "itself, cut": ("It hurts.</think>" + "Pleurisy. " * 9, "itself", "", (None, False)),
    "itself, without an answer": ("It hurts.</think>" + EOS, "itself", "", ("", True)),
    "cut in its thinking": ("It hurts, so " * 9, "budget", "Yes." + EOS, ("Yes.", True)),
    "ended without the tag": ("It hurts." + EOS, "end", "Yes." + EOS, ("Yes.", True)),
    "ended at once": (EOS, "end", "Yes." + EOS, ("Yes.", True)),
    "ends right after the closing": ("It hurts." + EOS, "end", EOS, ("", True)),
    "cut in its answer": ("It hurts." + EOS, "end", "Yes, and so on. " * 9, (None, False)),
    "closes it once more": ("It hurts, so " * 9, "budget", "So</think>Yes" + EOS, ("So</think>Yes", True)),
}


def ids_of(tokenizer, text):
    body, *ended = text.split(EOS)
    return tokenizer(body, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * len(ended)


def script(model, tokenizer, texts, monkeypatch):
    """Make the model write for each prompt its (own text, text after a forced closing), whatever it would have written.

    Gives the number of steps of each batch."""
    plans, now, steps = {}, {}, []
    for prompt, (own, after) in texts.items():
        own = ids_of(tokenizer, own)[:BUDGET]
        # While it is forced, the model proposes something else: an EOS.
        forced = [tokenizer.eos_token_id] * (len(closing_tokens(tokenizer)) - (own[-1] == tokenizer.eos_token_id))
        plans[prompt] = [*own, *forced, *ids_of(tokenizer, after)]

    def write(module, arguments, given, output):
        ids = given["input_ids"]
        if "slots" in model.config._attn_implementation:  # prompts are read; `step` says what is written
            return
        if ids.shape[1] > 1:
            prompts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            now.update(plans=[plans[prompt] for prompt in prompts], step=0)
            steps.append(0)
        for row, plan in enumerate(now["plans"]):
            output.logits[row, -1] = 0
            output.logits[row, -1, plan[now["step"]] if now["step"] < len(plan) else 7] = 9
        now["step"] += 1
        steps[-1] += 1

    def step(slots):
        (writer,) = (one for one in gc.get_objects() if isinstance(one, SlotWriter) and one._board and one._board.slots is slots)
        logits = torch.zeros(slots.rows, model.config.vocab_size)
        for slot, row in writer._active.items():
            place, plan = int(slots.places[slot]) - row.prompt_tokens + 1, plans[row.asked.prompt]
            logits[slot, plan[place] if place < len(plan) else 7] = 9
        return logits

    monkeypatch.setattr(Slots, "step", step)
    model.register_forward_hook(write, with_kwargs=True)
    return steps


@pytest.fixture
def scripted(fresh, monkeypatch):
    """`scripted(cache, batch_size, answer_tokens)`: the records of all PATHS, by their names."""
    model, tokenizer = fresh
    # Of different lengths, so that batches are padded.
    asked = [Asked(name, "Why? " * (3 + 5 * place % 7) + name) for place, name in enumerate(PATHS)]
    script(model, tokenizer, {one.prompt: (PATHS[one.id][0], PATHS[one.id][2]) for one in asked}, monkeypatch)

    def answer(cache, batch_size, answer_tokens):
        records = answer_prompts(
            model, tokenizer, asked, settings(cache_implementation=cache, batch_size=batch_size), answer_tokens
        )
        assert [record["id"] for record in records] == list(PATHS)
        return {record["id"]: record for record in records}

    return answer


@pytest.mark.model
@pytest.mark.parametrize(("cache", "batch_size"), KINDS)
def test_thinking_is_closed_where_the_model_did_not(scripted, fresh, cache, batch_size):
    _, tokenizer = fresh
    records = scripted(cache, batch_size, ANSWER)
    for name, (own, closed_by, after, (answer, ended)) in PATHS.items():
        forced = records[name]["forced"]
        if answer is None:  # cut off
            cut = ids_of(tokenizer, own)[:BUDGET] if closed_by == "itself" else ids_of(tokenizer, after)[:ANSWER]
            answer = tokenizer.decode(cut).rpartition("</think>")[2].strip()
            assert answer
        assert (forced["closed_by"], forced["answer"], forced["finished"]) == (closed_by, answer, ended), name
    again = with_forced_closing(records["closes it once more"])
    assert (again["closed"], again["well_formed"], again["answer"]) == (2, False, "SoYes")
    once = with_forced_closing(records["cut in its thinking"])
    assert (once["closed"], once["well_formed"], once["answer"], once["finished"]) == (1, True, "Yes.", True)
    assert once["thinking"] == records["cut in its thinking"]["thinking"]
    assert not with_forced_closing(records["ends right after the closing"])["well_formed"]


@pytest.mark.model
@pytest.mark.parametrize(("cache", "batch_size"), KINDS[1:4])
def test_forced_closing_leaves_the_natural_record_as_it_is(scripted, cache, batch_size):
    plain = list(scripted("dynamic", 1, None).values())
    assert not any("forced" in record for record in plain)
    assert {(record["finished"], record["closed"]) for record in plain} == {(True, 1), (False, 1), (False, 0), (True, 0)}
    for answer_tokens in (0, 1, ANSWER):
        records = list(scripted(cache, batch_size, answer_tokens).values())
        assert untimed(records, "forced") == untimed(plain)


@pytest.mark.model
def test_without_answer_tokens_only_the_closing_is_recorded(scripted):
    records = scripted("dynamic", 5, 0)
    for name, (_, closed_by, _, _) in PATHS.items():
        forced = records[name]["forced"]
        assert forced["closed_by"] == closed_by
        if closed_by != "itself":
            assert (forced["answer"], forced["answer_tokens"], forced["finished"]) == ("", 0, False)


@pytest.mark.model
def test_rows_that_need_no_closing_cost_no_step_more(fresh, monkeypatch):
    model, tokenizer = fresh
    steps = script(model, tokenizer, {path: (PATHS[path][0], "") for path in PATHS}, monkeypatch)
    for paths, expected in (
        (["itself, cut", "itself, ends"], BUDGET),
        (["itself, ends"], len(ids_of(tokenizer, PATHS["itself, ends"][0]))),
    ):
        records = answer_prompts(model, tokenizer, [Asked(path, path) for path in paths], settings(), ANSWER)
        assert {record["forced"]["closed_by"] for record in records} == {"itself"}
        assert steps.pop() == expected
    answer_prompts(model, tokenizer, [Asked(path, path) for path in PATHS], settings(batch_size=9), 0)
    assert steps.pop() == BUDGET


# --- forced closing, against a prompt that ends in it --------------------------------------------------------------


@pytest.fixture
def rewritten(fresh, monkeypatch):
    """(records under forced closing by cache and batch size, the answers of a prompt with thinking and closing in it)."""
    model, tokenizer = fresh
    monkeypatch.setattr("medcot_utils.models.batches.CLOSING", "\n</think>\nSo: ")  # one that differs from its own reverse
    for name, weight in model.named_parameters():  # else the last token alone decides, which all closings have in common
        if "self_attn" in name:
            weight.data *= 10

    def greedy(ids, count):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        made = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        return made[0, len(ids) :].tolist()

    prompts = [tokenizer(inference_prompt(question["Question"]))["input_ids"] for question in QUESTIONS]
    own = [greedy(ids, BUDGET) for ids in prompts]
    # A token in some of these texts and not in all stands for EOS, which random weights hardly ever write.
    tokenizer.eos_token_id = next(t for t in own[0][1:] if sum(t in ids for ids in own) < len(own) and t != own[0][0])
    closing, expected = closing_tokens(tokenizer), []
    for prompt, ids in zip(prompts, own, strict=True):
        ended = tokenizer.eos_token_id in ids
        thinking = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
        answer = greedy([*prompt, *thinking, *closing], ANSWER)
        text = tokenizer.decode([token for token in answer if token != tokenizer.eos_token_id])
        expected.append(("end" if ended else "budget", text.strip(), tokenizer.eos_token_id in answer))
    assert {closed_by for closed_by, _, _ in expected} == {"end", "budget"}
    assert len({answer for _, answer, _ in expected}) == len(QUESTIONS), "equal answers could be mixed up"

    def answer(**changes):
        return answer_questions(model, tokenizer, QUESTIONS, settings(**changes), True, 1, answer_tokens=ANSWER)

    yield answer, expected


@pytest.mark.model
@pytest.mark.parametrize(("cache", "batch_size"), KINDS)
def test_a_forced_answer_is_that_to_the_closed_prompt(rewritten, cache, batch_size):
    answer, expected = rewritten
    records = answer(cache_implementation=cache, batch_size=batch_size)
    forced = [record["forced"] for record in records]
    assert [(one["closed_by"], one["answer"], one["finished"]) for one in forced] == expected


@pytest.mark.model
def test_a_halved_batch_begins_its_closing_anew(rewritten, fresh, monkeypatch):
    model, (answer, expected), sizes = fresh[0], rewritten, []
    generate = model.generate

    def generate_or_fail_late(**arguments):
        made = generate(**arguments)  # what is kept of the rows is then that of a whole batch
        sizes.append(len(arguments["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return made

    monkeypatch.setattr(model, "generate", generate_or_fail_late)
    assert [record["forced"]["answer"] for record in answer()] == [text for _, text, _ in expected]
    assert sizes == [5, 2, 2, 1]


# --- sampling ------------------------------------------------------------------------------------------------------


def sampler(seeds, steps=1, temperature=0.6, top_k=50, top_p=0.95):
    return RowSampler(seeds, Sampling(temperature, top_k, top_p), steps, torch.device("cpu"))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.6, 50, 0.95), (1.5, 5, 1.0), (2.0, 50, 0.5)])
def test_rows_are_sampled_as_transformers_samples(temperature, top_k, top_p):
    logits = torch.linspace(-3, 3, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)])
    shares, rows = warpers(torch.zeros(1, 1), logits[None].clone())[0].softmax(dim=-1), 20_000
    drawn = sampler(range(rows), 1, temperature, top_k, top_p)(torch.zeros(rows, 1), logits.repeat(rows, 1)).argmax(dim=-1)
    counts = drawn.bincount(minlength=64)
    assert 5 <= (shares > 0).sum() < 64 and not counts[shares == 0].any(), "what the warpers rule out is never drawn"
    # Pearson's statistic; its mean is the number of tokens less one, its variance twice that.
    expected = shares[shares > 0] * rows
    excess = ((counts[shares > 0] - expected) ** 2 / expected).sum() - (len(expected) - 1)
    assert excess.abs() < 4 * (2 * (len(expected) - 1)) ** 0.5


def test_each_step_of_a_row_draws_anew():
    logits, steps = torch.zeros(1, 50), 400
    one = sampler([3], steps, temperature=1.0, top_p=1.0)
    drawn = [one(torch.zeros(1, 1), logits.clone()).argmax().item() for _ in range(steps)]
    assert len(set(drawn)) == 50, "400 draws of 50 tokens leave none out but once in 70 times"


def test_a_greedy_row_beside_sampled_ones_stays_as_it_is():
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    scores = sampler([5, None, 6, None], temperature=5.0)(torch.zeros(4, 1), logits.clone())
    assert torch.equal(scores[[1, 3]], logits[[1, 3]])
    assert scores[[0, 2]].isinf().sum() == 2, "and one token of each sampled row is chosen"
    alone = sampler([6], temperature=5.0)(torch.zeros(1, 1), logits[2:3].clone())
    assert torch.equal(alone[0], scores[2]), "a row's draw is its own"


@pytest.mark.model
def test_an_answer_does_not_depend_on_what_shares_its_batch(loaded):
    def texts(questions, **changes):
        records = answer_questions(*loaded, questions, settings(**changes), True, 3, n_samples=2, answer_tokens=ANSWER)
        return {(record["id"], record["sample"]): (record["completion"], record["forced"]) for record in records}

    together = texts(QUESTIONS, batch_size=15)
    assert len({completion for completion, _ in together.values()}) == 15
    assert texts(QUESTIONS, batch_size=4) == together
    assert texts(QUESTIONS[2:3], batch_size=1) == {key: value for key, value in together.items() if key[0] == "middle"}
    assert texts(QUESTIONS[::-1], batch_size=7) == together
