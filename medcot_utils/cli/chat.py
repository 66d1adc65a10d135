"""Run `medcot chat`: the tuned model in the terminal, or on a page of this machine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from medcot_utils.machine.paths import expand_home

if TYPE_CHECKING:
    from medcot_utils.models.chat import Answer, Chat, Who

HELP = "/show: the thinking of the last answer   /base: the base model too, or no more   /exit: leave"


def chat(
    run_dir: Annotated[Path, typer.Argument(parser=expand_home, help="a run that notebook 05 has trained")],
    question: Annotated[list[str] | None, typer.Option("--question", "-q", help="ask this and leave; may be repeated")] = None,
    base_too: Annotated[bool, typer.Option("--base-too", help="let the untrained model answer beside the tuned one")] = False,
    page: Annotated[bool, typer.Option("--page", help="a page in the browser instead of the terminal")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the page; 0: any free one")] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
) -> None:
    """Ask the tuned model of a run, in the terminal or on a page of this machine.

    Each question stands alone, as in training: the model does not know what was said before."""
    from medcot_utils.run.directory import Run

    run = Run.open(run_dir)
    run.require("adapter")  # before torch is imported
    from medcot_utils.models.chat import Chat, ChatError

    if question and page:
        raise ChatError("--page takes no --question: ask it on the page")
    if question and not all(text.strip() for text in question):
        raise ChatError("the question is empty")  # before the model is loaded

    if page:
        from medcot_utils.cli.chat_page import serve

        serve(run, base_too, port, open_browser)
    else:
        Terminal(Chat.open(run), base_too).talk(iter(question) if question else None)


class Terminal:
    """Hold the conversation on standard input and output. Colors and folding thinking appear only on a terminal."""

    def __init__(self, chat: Chat, base_too: bool):
        self.chat, self.base_too = chat, base_too
        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.last: dict[Who, Answer] = {}

    def talk(self, questions: Iterator[str] | None) -> None:
        """Answer the given questions, or those that are typed, until they end."""
        from medcot_utils.models.chat import WARNING, ChatError

        typed = questions is None
        self.console.print(WARNING, style="yellow")
        if typed and sys.stdin.isatty():
            self.console.print(HELP, style="dim")
        for line in self._typed() if questions is None else questions:
            if typed and line.startswith("/"):
                if not self._command(line):
                    return
                continue
            try:
                self._ask(line)
            except ChatError as error:
                if not (typed and sys.stdin.isatty()):
                    raise
                self.console.print(f"medcot: {error}", style="bold red")

    def _typed(self) -> Iterator[str]:
        ask = "question> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(ask).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.console.print("\n/exit leaves", style="dim")
                continue
            if line:
                yield line

    def _command(self, line: str) -> bool:
        """Obey a line that begins with a slash. Returns False if it ends the chat."""
        if line in ("/exit", "/quit"):
            return False
        if line == "/base":
            self.base_too = not self.base_too
            self.console.print("the base model answers too" if self.base_too else "the tuned model alone", style="dim")
        elif line == "/show":
            for who, answer in self.last.items():
                self.console.print(f"[{who}] {answer.thinking}", style="dim")
            if not self.last:
                self.console.print("nothing has been asked yet", style="dim")
        else:
            self.console.print(HELP, style="dim")
        return True

    def _ask(self, question: str) -> None:
        from medcot_utils.models.chat import choose_sides

        self.last = {}
        try:
            for who in choose_sides(self.base_too):
                with contextlib.closing(self.chat.stream(question, who)) as growing:
                    if self.base_too:
                        self.console.print(f"[{who}]", style="bold")
                    self._show(who, growing)
        except KeyboardInterrupt:
            self.console.print("\n(stopped)", style="dim")

    def _show(self, who: Who, growing: Iterator[Answer]) -> None:
        """Print one answer as it comes. The thinking streams in a live region that folds into one line when it ends."""
        from medcot_utils.models.chat import NO_ANSWER, Answer

        printed, self.last[who] = 0, Answer()
        # Off a terminal rich prints nothing of a transient region.
        with Live(console=self.console, transient=True, refresh_per_second=8) as fold:
            for answer in growing:
                self.last[who] = answer
                if fold.is_started:
                    fold.update(self._end_of(answer.thinking))
                    if answer.seconds_thinking is None and not answer.done:
                        continue
                    fold.stop()
                    self.console.print(f"({answer.summarize_thinking()}; /show)", style="dim")
                self.console.print(answer.text[printed:], end="")
                printed = len(answer.text)
        self.console.print("" if printed else NO_ANSWER)

    def _end_of(self, thinking: str) -> Text:
        """Return as much of the thinking's end as fits the screen, dim."""
        lines = Text(thinking, style="dim").wrap(self.console, max(20, self.console.width - 1))
        return Text("\n").join(list(lines)[-max(3, self.console.height - 4) :])
