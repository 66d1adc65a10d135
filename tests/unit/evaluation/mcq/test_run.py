"""Multiple choice: three readings of real and scripted models."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation.mcq.run import list_prompts, load_questions, prompt, run_tasks
from medcot_utils.evaluation.mcq.strict import read_answer
from medcot_utils.models.records import CLOSING
from medcot_utils.run.clock import SessionClock, TimeBudgetReached
from medcot_utils.run.journal import Journal

pytest_plugins = ("mcq_fixtures",)

CONFIG = load_config("smoke", ["model.load_in_4bit=false"])
LETTERS = {"A": "Sodium", "B": "Potassium", "C": "Calcium"}


# --- asking a model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    from medcot_utils.models.engine import get_engine

    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    return engine.for_inference(model), tokenizer


def configured(*settings):
    given = ["evaluation.mcq_limit=5", "evaluation.mcq_max_new_tokens=9", "evaluation.answer_tokens=7", "generation.batch_size=2"]
    return load_config("smoke", ["model.load_in_4bit=false", *given, *settings])


@pytest.fixture
def scripted(monkeypatch):
    """A function that gives answers instead of the model's own: completions by what the prompt holds."""

    def script(completions):
        def answer(model, tokenizer, asked, settings, answer_tokens, journal, label, others):
            assert (settings.max_new_tokens, answer_tokens) == (9, 0)
            found = []
            for one in asked:
                completion = next(text for name, text in completions.items() if name in one.prompt)
                record = {"id": one.id, "sample": 0, "prompt": one.prompt, "completion": completion}
                record["closed"] = completion.count("</think>")
                found.append(record | {"forced": {"closed_by": "itself" if record["closed"] else "budget"}})
            return found

        monkeypatch.setattr("medcot_utils.models.generation.answer_prompts", answer)

    return script


@pytest.fixture
def contexts(monkeypatch):
    """The token ids of all rows that the model is given, batch by batch, up to the last, which none is read after."""
    from lm_eval.models.huggingface import HFLM

    from medcot_utils.evaluation.mcq.joined_harness import JoinedHarness

    seen, call, read = [], HFLM._model_call, JoinedHarness._read

    def watched(self, inps, **more):
        seen.append(inps.tolist())
        return call(self, inps, **more)

    def watched_joined(self, rows):
        seen.append([row["input_ids"][:-1] for row in rows])
        return read(self, rows)

    monkeypatch.setattr(HFLM, "_model_call", watched)
    monkeypatch.setattr(JoinedHarness, "_read", watched_joined)
    return seen


@pytest.mark.model
@pytest.mark.parametrize("newline", [True, False])
def test_the_tiny_model_reads_exactly_what_was_meant(tiny, contexts, newline, capsys):
    model, tokenizer = tiny
    side = tokenizer.padding_side
    config = configured(f"prompt.newline_after_think={newline}")
    records = run_tasks(model, tokenizer, config, "base")
    questions = load_questions("shipped", 5, seed=config.seed)
    assert [record["id"] for record in records] == [question["id"] for question in questions]
    meant = []
    for record, question in zip(records, questions, strict=True):
        assert question.items() <= record.items() and (record["model"], record["task"]) == ("base", "shipped")
        assert (record["read"], record["correct"], record["abstained"]) == (None, False, True), "random weights answer nothing"
        assert record["closed_by"] == "budget" and {record["letter"], record["likelihood"]} <= set("ABCD")
        assert len(tokenizer(record["completion"], add_special_tokens=False)["input_ids"]) > 0
        meant += [f"Question: {question['question']}\nAnswer: {text}" for text in question["options"].values()]
    read = [ids for batch in contexts for ids in batch]
    for text in meant:
        ids = tokenizer(text)["input_ids"][:-1]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert any(row[: len(ids)] == ids for row in read), "padding stands on the right only"
    assert len(read) == len(meant) and max(map(len, contexts)) == 4 * 2, "four joined rows are as long as one"
    assert tokenizer.padding_side == side
    shown = capsys.readouterr()
    assert shown.out.count("\n") <= 1 and "multiple choice, base: 100%" in shown.err
    assert "likeliest options, base (0 letters, 5 texts): 100%" in shown.err and "5/5" in shown.err and shown.err.count("\n") <= 2


@pytest.fixture
def letters_apart(monkeypatch):
    """Letters are not read where the thinking is closed, as with a tokenizer that has no token for them."""
    monkeypatch.setattr("medcot_utils.models.decoding.letter_tokens", lambda tokenizer, letters: {})


@pytest.mark.model
def test_letters_read_apart_come_after_what_was_meant(tiny, contexts, letters_apart):
    model, tokenizer = tiny
    records = run_tasks(model, tokenizer, configured(), "base")
    read = [ids for batch in contexts for ids in batch]
    # The letters share all but their last token.
    assert len({tuple(ids) for ids in read}) == len(records) + sum(len(record["options"]) for record in records)
    for record in records:
        text = f"{prompt(record)}{record['completion'].rstrip()}\n</think>\nAnswer: A"
        ids = tokenizer(text)["input_ids"][:-1]
        assert any(row[: len(ids)] == ids for row in read)


@pytest.mark.embedded
def test_letters_read_at_the_closing_are_those_of_lm_eval():
    from medcot_utils.evaluation.mcq import likelihood
    from medcot_utils.models.engine import get_engine
    from medcot_utils.models.generation import Asked, answer_prompts

    config = load_config("demo", ["model.load_in_4bit=false", "generation.max_new_tokens=12", "generation.batch_size=12"])
    engine = get_engine(config.model)
    model, tokenizer = engine.load(config.model)
    questions = load_questions("shipped", 12)
    asked = [Asked(one["id"], prompt(one), letters="".join(one["options"])) for one in questions]
    records = answer_prompts(engine.for_inference(model), tokenizer, asked, config.generation, 0)
    assert {record["forced"]["closed_by"] for record in records} == {"budget"}
    # White space at the cut stays where the model goes on, and is taken off before it is read once more.
    pairs = [pair for pair in zip(questions, records, strict=True) if not pair[1]["completion"][-1:].isspace()]
    thoughts = [f"{record['prompt']}{record['completion']}{CLOSING}" for _, record in pairs]
    rows = [likelihood.letter_row(question, thought) for (question, _), thought in zip(pairs, thoughts, strict=True)]
    letters = likelihood.likeliest_letters(likelihood.make_harness(model, tokenizer, 4), rows, by_length=False)
    assert len(pairs) > 5 and len({*letters}) > 1
    assert [record["letter"] for _, record in pairs] == letters


@pytest.mark.model
def test_open_thinking_has_no_letter_without_forced_closing(tiny):
    records = run_tasks(*tiny, configured("evaluation.answer_tokens=null"), "base")
    assert len(records) == 5 and all("letter" not in record and "closed_by" not in record for record in records)
    assert all(record["likelihood"] in "ABCD" for record in records)


@pytest.mark.model
def test_the_callers_rng_streams_and_log_levels_stay_untouched(tiny):
    import random

    import numpy as np
    import torch

    def state():
        own = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return own, logging.root.manager.disable, sys.stdout, sys.stderr

    # Values that no library would set by itself.
    random.seed(80)
    np.random.seed(81)
    torch.manual_seed(82)
    logging.disable(logging.DEBUG)
    before = state()
    run_tasks(*tiny, configured("evaluation.mcq_limit=1"), "base")
    after = state()
    logging.disable(logging.NOTSET)
    assert after == before


@pytest.mark.model
def test_a_scripted_model_gets_the_score_its_outputs_deserve(tiny, scripted, write):
    replies = {
        "The first ion?": "So.\n\nLet me see.\n\n</think>\n\nIt is sodium.\n\nIn short:\n\nAnswer: A",
        "The second ion?": "So.</think>Answer: C",
        "The third ion?": "So.</think>The answer is A",
        "The fourth ion?": "So.\nAnswer: A",
    }
    scripted(replies)
    path = write(*({"id": name, "question": name, "options": LETTERS, "answer": "A"} for name in replies))
    records = run_tasks(*tiny, configured(f"evaluation.mcq_tasks=[{path}]"), "tuned")
    assert [record["completion"] for record in records] == list(replies.values())
    assert [record["read"] for record in records] == ["A", "C", None, None]
    assert [record["correct"] for record in records] == [True, False, False, False]
    assert [record["abstained"] for record in records] == [False, False, True, True]
    assert [record["closed_by"] for record in records] == ["itself", "itself", "itself", "budget"]
    assert {record["task"] for record in records} == {"own.jsonl"}


def prefer(monkeypatch, model, score):
    """Make a model's logits those of `score(token ids up to here, vocabulary size)`."""
    import torch
    from transformers.modeling_outputs import CausalLMOutput

    def forward(input_ids, attention_mask, logits_to_keep, **_):
        before = (input_ids[0][attention_mask[0, 0, place]] for place in logits_to_keep)
        return CausalLMOutput(logits=torch.stack([score(ids, model.config.vocab_size) for ids in before])[None])

    monkeypatch.setattr(model, "forward", forward)


@pytest.mark.model
def test_the_letter_is_the_likeliest_after_the_models_own_thinking(tiny, scripted, monkeypatch, write):
    import torch

    model, tokenizer = tiny
    (a,), (b,) = (tokenizer(f"x {letter}", add_special_tokens=False)["input_ids"][-1:] for letter in "AB")
    told = tokenizer("Potassium it is", add_special_tokens=False)["input_ids"][-3:]

    def score(ids, size):
        thought_of_b = any(ids[i : i + 3].tolist() == told for i in range(len(ids)))
        return torch.zeros(size).index_fill(0, torch.tensor([b if thought_of_b else a]), 9.0)

    scripted(
        {
            "The own tag?": "Hm, Potassium it is\n</think>\nAnswer: A",  # what is written after the tag does not count
            "The cut one?": "Hm, Potassium it is",
            "The doubted one?": "Hm.</think>Potassium it is",
        }
    )
    prefer(monkeypatch, model, score)
    names = ("own tag", "cut one", "doubted one")
    path = write(*({"question": f"The {name}?", "options": LETTERS, "answer": "B"} for name in names))
    records = run_tasks(model, tokenizer, configured(f"evaluation.mcq_tasks=[{path}]"), "base")
    assert [record["letter"] for record in records] == ["B", "B", "A"]
    assert [record["read"] for record in records] == ["A", None, None], "the strict reading is another one"


@pytest.mark.model
def test_an_answer_too_long_to_read_again_has_no_letter(tiny, scripted, write, capsys):
    # A context that lm-eval would cut at its beginning, without a word.
    scripted({"The long one?": "\ufffd" * 1500, "The short one?": "Hm."})
    path = write(*({"question": f"The {name} one?", "options": LETTERS, "answer": "B"} for name in ("long", "short")))
    long, short = run_tasks(*tiny, configured(f"evaluation.mcq_tasks=[{path}]"), "base")
    assert "letter" not in long and "letter" in short and "likelihood" in long
    assert "1 answers are too long to append `Answer:`, so they have no letter" in capsys.readouterr().out


@pytest.mark.model
def test_a_question_beyond_the_context_is_refused_before_it(tiny):
    from medcot_utils.models.batches import GenerationError

    config = configured("evaluation.mcq_max_new_tokens=1900")
    with pytest.raises(GenerationError, match=r"evaluation.mcq_max_new_tokens 1900"):
        run_tasks(*tiny, config, "base")
    # The closing tag and a letter need room too.
    (one,) = list_prompts(configured("evaluation.mcq_limit=1"))
    assert one.endswith("<think>\n\n</think>\nAnswer: A") and list_prompts(configured("evaluation.mcq_tasks=[]")) == []


@pytest.mark.model
def test_tasks_of_one_name_or_none_are_asked_once_each(tiny, tmp_path):
    paths = []
    for folder, text in (("one", "Is it so?"), ("two", "Is it not?")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "own.jsonl"
        path.write_text(json.dumps({"question": text, "options": LETTERS, "answer": "A"}))
        paths.append(str(path))
    records = run_tasks(*tiny, configured(f"evaluation.mcq_tasks=[{', '.join([*paths, paths[0]])}]"), "base")
    assert [(record["id"], record["question"]) for record in records] == [("row-1", "Is it so?"), ("row-1", "Is it not?")]
    assert run_tasks(*tiny, configured("evaluation.mcq_tasks=[]"), "base") == []


class Killed(BaseException):
    pass


class Dying(Journal):
    """A journal whose process dies after so many writes."""

    left = 0

    def add(self, records):
        super().add(records)
        self.left -= 1
        if not self.left:
            raise Killed


@pytest.mark.model
@pytest.mark.parametrize(
    ("writes", "apart"),
    [(2, False), (4, False), (4, True), (6, True)],
    ids=["answers", "likelihoods", "letters apart", "then likelihoods"],
)
def test_killed_multiple_choice_asks_only_what_is_missing(tiny, contexts, monkeypatch, request, tmp_path, writes, apart):
    # 5 questions in batches of 2 are 3 writes of answers; chunks of 3 are 2 of likelihoods, and 2 of letters read apart.
    if apart:
        request.getfixturevalue("letters_apart")
    monkeypatch.setattr("medcot_utils.evaluation.mcq.run._KEPT_AT_ONCE", 3)
    whole = run_tasks(*tiny, configured(), "base")
    read_once = len(contexts)
    contexts.clear()
    dying = Dying(tmp_path / "part", "this model")
    dying.left = writes
    with pytest.raises(Killed):
        run_tasks(*tiny, configured(), "base", dying)
    assert run_tasks(*tiny, configured(), "base", Journal(tmp_path / "part", "this model")) == whole
    assert len(contexts) == read_once, "a likelihood was taken twice, or never"
    contexts.clear()
    assert run_tasks(*tiny, configured(), "base", Journal(tmp_path / "part", "this model")) == whole and contexts == []


@pytest.mark.model
def test_spent_sessions_ask_a_batch_each_and_reach_the_end(tiny, monkeypatch, tmp_path, letters_apart):
    monkeypatch.setattr("medcot_utils.evaluation.mcq.run._KEPT_AT_ONCE", 3)
    whole, stopped = run_tasks(*tiny, configured(), "base"), []
    while True:
        journal = Journal(tmp_path / "part", "this model", SessionClock(1e-6))
        try:
            records = run_tasks(*tiny, configured(), "base", journal)
            break
        except TimeBudgetReached as pause:
            stopped.append(str(pause).partition(", before")[0])
    assert records == whole
    assert stopped == [
        *(f"multiple choice, base: stopped after {made} of 5" for made in (2, 4)),
        *(f"{name}, base: stopped after {made} of 5" for name in ("letter", "likelihood") for made in (0, 3)),
    ]


@pytest.mark.model
def test_kept_letters_are_not_another_models(tiny, contexts, tmp_path):
    run_tasks(*tiny, configured(), "base", Journal(tmp_path / "part", "this model"))
    read_once = len(contexts)
    run_tasks(*tiny, configured(), "base", Journal(tmp_path / "part", "another model"))
    assert len(contexts) == 2 * read_once


@pytest.mark.model
def test_a_batch_too_large_for_the_gpu_is_made_smaller(tiny, contexts, monkeypatch, capsys):
    import torch
    from lm_eval.models.huggingface import HFLM

    expected = run_tasks(*tiny, configured(), "base")
    call = HFLM._model_call

    def on_a_small_gpu(self, inps, **more):
        if len(inps) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return call(self, inps, **more)

    monkeypatch.setattr("medcot_utils.models.joined_rows.can_join", lambda model: False)  # as on a GPU
    monkeypatch.setattr(HFLM, "_model_call", on_a_small_gpu)
    contexts.clear()
    found = run_tasks(*tiny, configured("generation.batch_size=5"), "base")
    assert max(map(len, contexts)) == 2
    assert [(one["letter"], one["likelihood"]) for one in found] == [(one["letter"], one["likelihood"]) for one in expected]


@pytest.mark.model
def test_the_adapter_still_counts_once_answering_merged_it():
    # Answering merges the adapter into float32 weights, in place; the likelihoods are taken of the model that was given.
    import torch
    from peft import LoraConfig, get_peft_model

    from medcot_utils.evaluation.mcq import likelihood
    from medcot_utils.models.engine import get_engine

    engine = get_engine(CONFIG.model)
    model, tokenizer = engine.load(CONFIG.model)
    rows = [likelihood.text_row(question) for question in load_questions("shipped", 5)]

    def values(model):
        samples = likelihood._evaluate(likelihood.make_harness(engine.for_inference(model), tokenizer, 4), rows)
        return [value for sample in samples for value, _ in sample["filtered_resps"]]

    base = values(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=["o_proj", "down_proj"], r=4, lora_alpha=64))
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    before = values(tuned)
    assert max(abs(one - other) for one, other in zip(before, base, strict=True)) > 0.2
    first = run_tasks(tuned, tokenizer, configured(), "tuned")
    assert values(tuned) == pytest.approx(before, abs=0.01)
    assert run_tasks(tuned, tokenizer, configured(), "tuned") == first, "answered again, with the model that was used up"


@pytest.mark.embedded
def test_smollm2_gives_three_consistent_readings(contexts):
    from medcot_utils.models.engine import get_engine

    config = load_config("demo", ["model.load_in_4bit=false", "evaluation.mcq_limit=4", "evaluation.mcq_max_new_tokens=48"])
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"answer_tokens": 8})})
    assert config.model.name == "embedded:smollm2-135m-instruct"
    engine = get_engine(config.model)
    model, tokenizer = engine.load(config.model)
    records = run_tasks(engine.for_inference(model), tokenizer, config, "base")
    assert len(records) == len({record["id"] for record in records}) == len({record["specialty"] for record in records}) == 4
    for ids in (ids for batch in contexts for ids in batch):
        assert ids[0] == tokenizer.bos_token_id
    assert any("\n" in record["completion"] for record in records), "a newline must end nothing"
    for record in records:
        assert record["completion"].strip() and record["abstained"] == (record["read"] is None)
        assert record["correct"] == (record["read"] == record["answer"])
        assert record["read"] == read_answer(record["completion"], record["options"])
        assert {record["letter"], record["likelihood"]} <= set(record["options"])


def test_the_module_imports_without_lm_eval_torch_or_pandas():
    import subprocess

    heavy = ("lm_eval", "torch", "pandas", "datasets")
    code = f"import sys, medcot_utils.evaluation.mcq.run; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
