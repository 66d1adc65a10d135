"""Run `medcot chat`: chat with the tuned model in the terminal, or on a page that this machine serves."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.text import Text

from medcot_utils.cli.console import PlainConsole
from medcot_utils.cli.runs import choose_run
from medcot_utils.machine.paths import expand_home
from medcot_utils.plain_text import say, show_controls

if TYPE_CHECKING:
    from medcot_utils.models.chat import Answer, Chat, Who

HELP = "/show: the thinking of the last answer   /base: turn the base model's answers on or off   /exit, exit, quit: end"
_END = ("/exit", "/quit", "exit", "quit")  # as a question, the bare words would cost an answer


def chat(
    run_dir: Annotated[Path | None, typer.Argument(parser=expand_home, help="a run that notebook 05 has trained")] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", metavar="TEXT", help="ask this and exit; repeat for several")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="with --question: print the thinking before the answer")] = False,
    base_too: Annotated[bool, typer.Option("--base-too", help="also show the untrained model's answers")] = False,
    page: Annotated[bool, typer.Option("--page", help="use a page in the browser instead of the terminal")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of the page; 0: any free port")] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
) -> None:
    """Chat with the tuned model of a run.

    This works in the terminal or in the browser. The model answers each question by itself, as in training: it does not know
    the questions before."""
    from medcot_utils.run.directory import Run

    run = Run.open(choose_run(run_dir))
    run.require("adapter")  # before torch is imported
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a log would hold each of a bar's states
    from medcot_utils.models.chat import Chat, ChatError
    from medcot_utils.models.embedded import warn_of_random_weights

    if question and page:
        raise ChatError("--page takes no --question: ask it on the page")
    if show and not question:
        raise ChatError("--show needs --question; in the conversation, type /show after an answer")
    if question and not all(text.strip() for text in question):
        raise ChatError("the question is empty")  # before the model is loaded

    if random := warn_of_random_weights(run.config.model.name):
        say(random)
    if page:
        from medcot_utils.cli.chat_page import serve

        serve(run, base_too, port, open_browser)
    else:
        Terminal(Chat.open(run), base_too, question or None, show).talk()


class Terminal:
    """Hold the conversation on standard input and output. Only a terminal shows colors and folds thinking.

    Ctrl-C stops the current answer, and shows a hint at any other time. Its handler raises only while a question is typed: an
    exception elsewhere could be lost in a library, or end the chat between an answer and the next prompt."""

    def __init__(self, chat: Chat, base_too: bool, questions: Sequence[str] | None = None, show: bool = False):
        self.chat, self.base_too, self.questions, self.show = chat, base_too, questions, show
        self.interactive = questions is None and sys.stdin.isatty()
        self.console = PlainConsole(highlight=False, soft_wrap=True)
        self.last: dict[Who, Answer] = {}
        self._stop: threading.Event | None = None  # it stops the current answer
        self._typing, self._hint_owed = False, False

    def talk(self) -> None:
        """Answer the given questions, or those that the user types, until they end.

        Raises ChatError and, after Ctrl-C, KeyboardInterrupt, unless a user types the questions at a terminal."""
        from medcot_utils.models.chat import WARNING, ChatError

        self.console.print(WARNING, style="yellow")
        if self.interactive:
            self.console.print(HELP, style="dim")
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            for line in self._typed() if self.questions is None else self.questions:
                if self.questions is None and (line.startswith("/") or line.lower() in _END):
                    if not self._command(line):
                        return
                    continue
                if self.questions is not None and len(self.questions) > 1:
                    self.console.print(f"question: {line}", style="bold")
                try:
                    stopped = self._ask(line)
                except ChatError as error:
                    if not self.interactive:
                        raise
                    self.console.print(f"medcot: {error}", style="bold red")
                else:
                    if stopped and not self.interactive:
                        raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupted(self, *_: object) -> None:
        if self._stop is not None:
            self._stop.set()
        elif self._typing or not self.interactive:
            self._typing = False  # raise only once for each prompt: a second exception could escape the handler of the first
            raise KeyboardInterrupt
        else:
            self._hint_owed = True

    def _typed(self) -> Iterator[str]:
        ask = "question> " if self.interactive else ""
        while True:
            try:
                self._typing = True
                if self._hint_owed:
                    raise KeyboardInterrupt
                line = input(ask).strip()
                self._typing = False
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self._typing = self._hint_owed = False
                self.console.print("\n/exit leaves", style="dim")
                continue
            if line:
                yield line

    def _command(self, line: str) -> bool:
        """Execute a line that is no question. Return False if it ends the chat."""
        if line.lower() in _END:
            return False
        if line == "/base":
            self.base_too = not self.base_too
            self.console.print("the base model answers too" if self.base_too else "only the tuned model answers", style="dim")
        elif line == "/show":
            for who, answer in self.last.items():
                self.console.print(f"[{who}] {answer.thinking}", style="dim")
            if not self.last:
                self.console.print("nothing has been asked yet", style="dim")
        else:
            self.console.print(HELP, style="dim")
        return True

    def _ask(self, question: str) -> bool:
        """Show the answers to one question. Return True if Ctrl-C stopped them."""
        from medcot_utils.models.chat import choose_sides

        self._stop = stop = threading.Event()
        try:
            self.last = {}
            for who in choose_sides(self.base_too):
                with contextlib.closing(self.chat.stream(question, who, stop)) as growing:
                    if self.base_too:
                        self.console.print(f"[{who}]", style="bold")
                    self._show(who, growing)
                if stop.is_set():
                    break
                if not (answer := self.last[who]).text:
                    self.console.print(answer.explain_missing(self.chat.most_tokens))
        finally:
            self._stop = None
        if stop.is_set():
            self.console.print("(stopped)", style="dim")
        return stop.is_set()

    def _show(self, who: Who, growing: Iterator[Answer]) -> None:
        """Print one answer as it comes. The thinking streams in a live region that folds into one line when it ends."""
        printed = 0
        # If the output is not a terminal, rich prints nothing of a transient region.
        with Live(console=self.console, transient=True, refresh_per_second=8) as fold:
            for answer in growing:
                self.last[who] = answer
                if fold.is_started:
                    fold.update(self._end_of(answer.thinking))
                    if answer.seconds_thinking is None and not answer.done:
                        continue
                    fold.stop()
                    how = "/show" if self.questions is None else "--show"
                    if self.show:
                        self.console.print(answer.thinking, style="dim")
                    self.console.print(f"({answer.summarize_thinking()}{'' if self.show else f'; {how}'})", style="dim")
                self.console.print(answer.text[printed:], end="")
                printed = len(answer.text)
        if printed:
            self.console.print()

    def _end_of(self, thinking: str) -> Text:
        """Return the last lines of the thinking that fit on the screen, dimmed."""
        lines = Text(show_controls(thinking), style="dim").wrap(self.console, max(20, self.console.width - 1))
        return Text("\n").join(list(lines)[-max(3, self.console.height - 4) :])
