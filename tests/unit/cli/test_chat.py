"""Both surfaces of the chat over a scripted model: what the terminal prints, and what a column of the page holds."""

from __future__ import annotations

import itertools
import re
import signal

import pytest

from medcot_utils.cli.chat import HELP, Terminal, chat
from medcot_utils.config import load_config
from medcot_utils.errors import MedcotError
from medcot_utils.models.chat import WARNING, Answer, ChatError, grow_answer
from medcot_utils.run.directory import Run

UNFINISHED = (
    "the thinking was not finished. The budget is 192 tokens, generation.max_new_tokens; a tuned model best answers "
    "what resembles its training rows)"
)


class Scripted:
    """A chat whose models answer with given pieces."""

    most_tokens = 192

    def __init__(self, **pieces):
        self.pieces, self.asked = pieces, []

    def stream(self, question, who, stop):
        self.asked.append(who)
        if not question:
            raise ChatError("the question is empty")
        return grow_answer(itertools.takewhile(lambda _: not stop.is_set(), self.pieces[who]))


def printed(capsys, chat, *questions, base_too=False, show=False):
    Terminal(chat, base_too, questions, show).talk()
    return lines_of(capsys)


def lines_of(capsys):
    warning, *lines = capsys.readouterr().out.splitlines()
    assert warning == WARNING
    return [re.sub(r"\d+\.\d s", "0.0 s", line) for line in lines]


def test_thinking_is_folded_and_the_answer_is_printed_once(capsys):
    chat = Scripted(tuned=["First the ", "pulse.</th", "ink>\n\n", "Rest ", "", "and  [b]", "\nfluids.\n"])
    assert printed(capsys, chat, "Why?") == ["(thinking: 3 words, 0.0 s; --show)", "Rest and  [b]", "fluids."]


def test_thinking_that_is_asked_for_is_printed_before_the_answer(capsys):
    chat = Scripted(tuned=["First the [b] pulse.</th", "ink>Rest."])
    assert printed(capsys, chat, "Why?", show=True) == ["First the [b] pulse.", "(thinking: 4 words, 0.0 s)", "Rest."]


def test_an_answer_that_never_comes_is_said_to_be_missing(capsys):
    first, second = printed(capsys, Scripted(tuned=["Hm."]), "Why?")
    assert first == "(thinking, not finished: 1 words; --show)"
    assert second == "(no answer: " + UNFINISHED
    assert printed(capsys, Scripted(tuned=["Hm.</think>"]), "Why?")[1] == "(no answer after the thinking)"


def test_both_models_are_named_and_the_base_comes_first(capsys):
    chat = Scripted(base=["a</think>no"], tuned=["b</think>yes"])
    lines = printed(capsys, chat, "Why?", base_too=True)
    assert [line for line in lines if "thinking" not in line] == ["[base]", "no", "[tuned]", "yes"]


def press_ctrl_c(value=""):
    signal.raise_signal(signal.SIGINT)
    return value


@pytest.fixture
def typed(monkeypatch):
    """`typed(*lines)`: what somebody types at a terminal; a function among them is called instead, while a line is awaited."""

    def type_lines(*lines):
        to_come = iter(lines)

        def read(_prompt):
            line = next(to_come, None)
            if line is None:
                raise EOFError
            return line() if callable(line) else line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    return type_lines


def test_ctrl_c_stops_the_answers_to_one_question_only(capsys, typed):
    chat = Scripted(base=(press_ctrl_c(piece) for piece in ["I ", "am"]), tuned=["b</think>yes"])
    typed("Why?", "/base", "Why?")
    Terminal(chat, True).talk()
    help_line, *lines = lines_of(capsys)
    assert help_line == HELP and lines[2:4] == ["(stopped)", "only the tuned model answers"] and lines[-1] == "yes"
    assert chat.asked == ["base", "tuned"]


@pytest.mark.parametrize("line", ["/exit", "/quit", "exit", "quit", "Exit", "QUIT"])
def test_a_word_that_ends_the_chat_is_not_asked(capsys, typed, line):
    chat = Scripted(tuned=["b</think>yes"])
    typed(line, "Why?")
    Terminal(chat, False).talk()
    assert (lines_of(capsys), chat.asked) == ([HELP], [])


def test_a_question_that_holds_such_a_word_is_asked(typed):
    chat = Scripted(tuned=["b</think>yes"])
    typed("How to quit smoking?", "exit wound, what now?")
    Terminal(chat, False).talk()
    assert len(chat.asked) == 2


def test_an_unknown_command_is_answered_with_the_commands(capsys, typed):
    chat = Scripted(tuned=["b</think>yes"])
    typed("/thinking")
    Terminal(chat, False).talk()
    assert (lines_of(capsys), chat.asked) == ([HELP, HELP], [])


def test_ctrl_c_at_any_other_moment_gives_the_hint(capsys, typed, monkeypatch):
    typed(press_ctrl_c, "/base", press_ctrl_c, "/exit")
    terminal = Terminal(Scripted(tuned=["b</think>yes"]), False)
    command, before = terminal._command, signal.getsignal(signal.SIGINT)  # ignored, where a shell started this in the background
    monkeypatch.setattr(terminal, "_command", lambda line: command(press_ctrl_c(line)))  # neither an answer nor a prompt
    terminal.talk()
    hint = ["", "/exit leaves"]
    assert lines_of(capsys) == [HELP, *hint, "the base model answers too", *hint, *hint]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_a_list_of_questions_after_the_answer_stopped(capsys):
    chat = Scripted(tuned=(press_ctrl_c(piece) for piece in ["b</think>yes", "no"]))
    with pytest.raises(KeyboardInterrupt):
        Terminal(chat, False, ["Why?", "And then?"]).talk()
    assert lines_of(capsys)[-1] == "(stopped)" and chat.asked == ["tuned"]


def test_several_questions_are_repeated_above_their_answers(capsys):
    Terminal(Scripted(tuned=["b</think>yes"]), False, ["Why?", "And then?"]).talk()
    assert [line for line in lines_of(capsys) if line.startswith("question: ")] == ["question: Why?", "question: And then?"]
    Terminal(Scripted(tuned=["b</think>yes"]), False, ["Why?"]).talk()
    assert "question: " not in capsys.readouterr().out


def test_show_names_a_model_stopped_before_its_first_word(typed):
    typed("Why?")
    terminal = Terminal(Scripted(base=iter(press_ctrl_c, "")), True)
    terminal.talk()
    assert terminal.last == {"base": Answer(done=True)}


def test_an_empty_question_given_as_an_option_is_an_error():
    with pytest.raises(ChatError, match="is empty"):
        Terminal(Scripted(), False, [""]).talk()


@pytest.mark.parametrize(
    ("answer", "title", "status", "texts"),
    [
        (Answer(), "thinking", "pending", ["..."]),
        (Answer("a <b>"), "thinking", "pending", ["a &lt;b&gt;"]),
        (Answer("a b", "", 1.25), "thinking: 2 words, 1.2 s", "done", ["a b"]),
        (Answer("a b", "<i>", 1.0, done=True), "thinking: 2 words, 1.0 s", "done", ["a b", "&lt;i&gt;"]),
        (Answer("a", done=True), "thinking, not finished: 1 words", "done", ["a", f"(no answer: {UNFINISHED}"]),
        (Answer("a", "", 1.0, done=True), "thinking: 1 words, 1.0 s", "done", ["a", "(no answer after the thinking)"]),
    ],
)
def test_a_column_holds_question_folded_thinking_and_answer(answer, title, status, texts):
    from medcot_utils.cli.chat_page import build_column

    asked, thinking, *rest = build_column("x < y?", answer, 192)
    assert (asked.role, asked.content) == ("user", "x &lt; y?")
    assert thinking.metadata == {"title": title, "status": status}
    assert [message.content for message in (thinking, *rest)] == texts
    assert {message.role for message in (thinking, *rest)} == {"assistant"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": ["Why?", " "]}, "is empty"),
        ({"question": ["Why?"], "page": True}, "--page takes no"),
        ({"show": True}, "--show needs --question"),
    ],
)
def test_a_question_that_cannot_be_asked_loads_no_model(options, message, tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", load_config("smoke"))
    monkeypatch.setattr(Run, "require", lambda self, name: run.path)
    monkeypatch.setattr("medcot_utils.models.chat.Chat.open", None)
    with pytest.raises(MedcotError, match=message):
        chat(run.path, **options)
