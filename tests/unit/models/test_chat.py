"""The chat: thinking told from the answer however the text is cut, and a real model in the terminal, piped and typed."""

from __future__ import annotations

import itertools
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from medcot_utils.config import load_config
from medcot_utils.data.prompts import parse_completion, training_text
from medcot_utils.models.chat import WARNING, Chat, ChatError, grow_answer
from medcot_utils.models.embedded import warn_of_random_weights
from medcot_utils.run.directory import Run

QUESTION, THINKING, ANSWER = "Why is he dizzy?", "First the pulse. Then the rhythm.", "Rest and fluids."


@pytest.mark.parametrize(
    "completion",
    [
        "a thought\n</think>\nan answer",
        "never closed",
        "<think>opened again</think>one</think> two <think> three",
        "5 < 6 </ thin </thin> a</think>b < c </",
        "</think>only an answer",
        "",
    ],
)
def test_a_streamed_answer_equals_the_scored_one_in_any_pieces(completion):
    expected, dice = parse_completion(completion), random.Random(1)
    for _ in range(60):
        cuts = sorted(dice.randrange(len(completion) + 1) for _ in range(dice.randrange(6)))
        states = list(grow_answer(completion[a:b] for a, b in zip([0, *cuts], [*cuts, len(completion)], strict=True)))
        assert (states[-1].thinking, states[-1].text) == (expected.thinking, expected.answer)
        assert [state.done for state in states] == [False] * (len(states) - 1) + [True]
        for earlier, later in itertools.pairwise(states):  # what was shown is never taken back
            assert later.thinking.startswith(earlier.thinking) and later.text.startswith(earlier.text)


def test_a_piece_is_shown_at_once_unless_it_may_become_a_tag():
    shown = [(answer.thinking, answer.text) for answer in grow_answer(["one <", "two </th", "ink>three"])]
    assert shown == [("one", ""), ("one <two", ""), ("one <two", "three"), ("one <two", "three")]


def test_the_fold_gives_the_thinkings_length_and_if_it_ended():
    thinking, answered, _ = grow_answer(["three words here", "</think>x"])
    assert thinking.summarize_thinking() == "thinking, not finished: 3 words"
    assert re.fullmatch(r"thinking: 3 words, \d+\.\d s", answered.summarize_thinking())


@pytest.mark.model
def test_the_base_has_its_own_biases_although_lora_trained_them(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from medcot_utils.models.embedded import find_model_source
    from medcot_utils.models.engine import get_engine

    source = find_model_source("embedded:tiny-random-llama")
    shape = LlamaConfig.from_pretrained(source, attention_bias=True)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "biased")
    shutil.copyfile(f"{source}/tokenizer.json", tmp_path / "biased" / "tokenizer.json")
    shutil.copyfile(f"{source}/tokenizer_config.json", tmp_path / "biased" / "tokenizer_config.json")
    config = load_config("smoke", [f"model.name={tmp_path}/biased", "model.load_in_4bit=false", "lora.bias=all"])
    engine = get_engine(config.model)
    base, tokenizer = engine.load(config.model)
    tuned = engine.add_lora(engine.load(config.model)[0], config.lora)
    for name, weight in tuned.named_parameters():
        weight.data += name.endswith(".bias")
    chat = Chat(SimpleNamespace(config=config), engine.for_inference(tuned), tokenizer)
    logits = {}
    for who in ("tuned", "base"):
        model, context = chat.choose_model(who)
        with context, torch.inference_mode():
            logits[who] = model(torch.arange(5, 12)[None]).logits
    with torch.inference_mode():
        expected = engine.for_inference(base)(torch.arange(5, 12)[None]).logits
    assert torch.equal(logits["base"], expected) and not torch.allclose(logits["tuned"], expected, atol=1e-2)


# --- a real model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of the tiny Llama whose adapter has learnt one question by heart; the base babbles."""
    import torch

    from medcot_utils.export.merged import save_adapter
    from medcot_utils.models.engine import get_engine

    config = load_config("smoke", ["generation.max_new_tokens=900", "lora.r=32", "lora.lora_alpha=64"])
    run = Run.create(tmp_path_factory.mktemp("chat") / "run", config)
    run.write("questions", [{"id": "q0", "scored": True, "Question": QUESTION}])
    for name in ("train_rows", "held_out_rows"):
        run.write(name, lambda file: file.write_bytes(b"rows"))
    engine = get_engine(config.model)
    model, tokenizer = engine.load(config.model.model_copy(update={"load_in_4bit": False}))
    tuned = engine.add_lora(model, config.lora)
    ids = tokenizer(training_text(QUESTION, THINKING, ANSWER, tokenizer.eos_token), return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=3e-3)
    for _ in range(120):  # its loss stops at 5.8, as random frozen output weights bound the logits: the largest one is right
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run.write("adapter", lambda folder: save_adapter(tuned, tokenizer, config, folder))
    return run


def medcot(*arguments, given=""):
    command = [sys.executable, "-m", "medcot_utils", *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.model
def test_a_piped_question_is_answered_with_its_thinking_folded(trained):
    done = medcot("chat", trained.path, given=f"{QUESTION}\n/show\n")
    assert done.returncode == 0, done.stderr
    random, warning, folded, answer, thinking = done.stdout.strip().splitlines()
    assert random == warn_of_random_weights("embedded:tiny-random-llama") and warning == WARNING
    assert re.fullmatch(r"\(thinking: 6 words, \d+\.\d s; /show\)", folded)
    assert (answer, thinking) == (ANSWER, f"[tuned] {THINKING}")
    assert "\x1b" not in done.stdout


@pytest.mark.model
def test_the_base_model_answers_too_and_differently(trained):
    run = Run(trained.path, load_config("smoke", ["generation.max_new_tokens=40"]))
    chat = Chat.open(run)
    first, base, again = (last_of(chat.stream(QUESTION, who)) for who in ("tuned", "base", "tuned"))
    assert (first.thinking, first.text) == (again.thinking, again.text) == (THINKING, ANSWER)
    assert base.done and ANSWER not in base.thinking + base.text


@pytest.mark.model
def test_a_checkpoints_own_settings_change_nothing_in_a_chat(trained):
    chat = Chat.open(Run(trained.path, load_config("smoke", ["generation.max_new_tokens=40"])))
    chat.model.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=1, do_sample=True, num_beams=2)
    last = last_of(chat.stream(QUESTION))
    assert (last.thinking, last.text) == (THINKING, ANSWER)


def last_of(growing):
    *_, last = growing
    return last


@pytest.mark.model
def test_a_question_that_cannot_be_asked_is_one_error(trained):
    with pytest.raises(ChatError, match="is empty"):
        Chat.open(trained).stream("  ")
    done = medcot("chat", trained.path, "-q", "why " * 3000)
    assert done.returncode == 1 and "the question is too long: with the prompt" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.model
def test_an_error_of_the_generation_is_raised_to_the_reader(trained, monkeypatch):
    chat = Chat.open(trained)
    monkeypatch.setattr(chat.model, "generate", lambda **arguments: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat.stream(QUESTION))


@pytest.mark.model
def test_closing_the_stream_ends_the_generation(trained, monkeypatch):
    chat, made = Chat.open(trained), []
    generate = chat.model.generate
    monkeypatch.setattr(chat.model, "generate", lambda **arguments: made.append(generate(**arguments | {"min_new_tokens": 700})))
    pieces = chat.stream("Something it has never seen", "base")
    next(pieces)
    pieces.close()
    assert made[0].shape[1] < 600, "not the 700 tokens that it would make at least"
    monkeypatch.undo()
    assert last_of(chat.stream(QUESTION, "tuned")).text == ANSWER


def test_a_missing_adapter_is_one_error_that_names_the_notebook(run_factory):
    done = medcot("chat", run_factory().path, given="a question\n")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == "medcot: adapter is not in run/ yet: run notebook 05_training first"


class Typist:
    """`medcot chat` on a terminal of its own."""

    def __init__(self, *arguments):
        self.terminal, inside = pty.openpty()
        command = [sys.executable, "-m", "medcot_utils", "chat", *map(str, arguments)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        self.process = subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, env=environment, start_new_session=True
        )
        os.close(inside)
        self.seen = ""

    def until(self, pattern, seconds=90):
        """What came up to the first match of `pattern`."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            came, _, _ = select.select([self.terminal], [], [], max(0, end - time.monotonic()))
            assert came, f"no {pattern!r} in {self.seen!r}"
            self.seen += os.read(self.terminal, 4096).decode(errors="replace")
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, text):
        os.write(self.terminal, f"{text}\n".encode())


@pytest.mark.model
def test_a_terminal_folds_thinking_and_ctrl_c_stops_one_answer(trained):
    typist, dice = Typist(trained.path), random.Random(1)
    try:
        assert WARNING.split(":")[0] in typist.until("question> ")
        typist.type(QUESTION)
        said = typist.until(r"fluids\.")
        assert "Then the rhythm." in said and said.index("Then the rhythm.") < said.index("thinking: 6 words")
        typist.until("question> ")
        typist.type("/base")
        typist.until("the base model answers too")
        typist.until("question> ")
        stopped = []
        for delay in [0.0, *(dice.random() / 2 for _ in range(5))]:  # in an answer or after it: each signal can be seen
            typist.type("Something it has never seen")
            typist.until(r"\[base\]")
            time.sleep(delay)
            typist.process.send_signal(signal.SIGINT)
            stopped.append("(stopped)" in typist.until(r"\(stopped\)|/exit leaves"))
            typist.until("question> ")
        assert any(stopped)
        typist.type("/show")
        typist.until(r"\[base\] ")
        typist.until("question> ")
        typist.type("/exit")
        assert typist.process.wait(30) == 0
    finally:
        typist.process.kill()
        typist.process.wait()
        os.close(typist.terminal)
