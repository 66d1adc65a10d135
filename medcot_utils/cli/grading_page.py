"""Serve the page for blind grading, only to this machine. The page never knows which model is shown as A."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from medcot_utils.cli import web
from medcot_utils.errors import MedcotError
from medcot_utils.evaluation.grades import GRADES, Grade, GradingError, Pair, append_grade, latest_grades, read_grades, read_pairs
from medcot_utils.machine.redaction import kind_of, secrets_at_hand
from medcot_utils.plain_text import say
from medcot_utils.run.directory import Run
from medcot_utils.run.lock import hold

if TYPE_CHECKING:
    import gradio

CSS = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.missing { font-style: italic; opacity: .7; }
.question { font-size: 1.1rem; font-weight: 600; }
.tag { border: 1px solid #8888; border-radius: 1em; padding: 0 .6em; margin-left: .4em; display: inline-block; }
"""
JUDGED = ("questions", "base_answers", "tuned_answers")
CHOICES = {"a": "A better", "b": "B better", "tie": "Tie", "both_wrong": "Both wrong"}


class Desk:
    """Hold one grader's session.

    The page knows only a pair's token, so a click counts for the pair it was made on, even after a restart. Everything else
    comes from the file."""

    def __init__(self, run: Run, grader: str):
        self.run, self.grader, self.pairs = run, grader, read_pairs(run)
        self.by_token = {pair.token: pair for pair in self.pairs}
        latest, self.stale = latest_grades(self.pairs, read_grades(run))
        self.judged = {name: grade for (who, name), grade in latest.items() if who == grader}
        self._judged = self._answers()
        self._lock = threading.Lock()  # gradio calls from several threads

    def _answers(self) -> list[str | None]:
        entries = self.run.manifest()["artifacts"]
        return [entry["sha256"] if (entry := entries.get(name)) else None for name in JUDGED]

    def next_pair(self, after: Pair | None = None) -> Pair | None:
        """Return the first ungraded pair after `after`, then from the beginning; None if all are graded."""
        at = self.pairs.index(after) + 1 if after else 0
        return next((pair for pair in self.pairs[at:] + self.pairs[:at] if pair.id not in self.judged), None)

    def previous_pair(self, shown: Pair | None) -> Pair | None:
        """Return the pair judged before the shown one or, if that is not judged yet, the last judged one; None without one."""
        names = list(self.judged)
        before = names[: names.index(shown.id)] if shown and shown.id in names else names
        return next((pair for pair in self.pairs if pair.id in before[-1:]), None)

    def judge(self, pair: Pair, choice: str, note: str) -> None:
        """Record a judgment; `choice` is one of CHOICES.

        Raises OSError if it cannot be written. Raises GradingError if the note is too long or holds a secret, or if the answers
        have changed meanwhile."""
        if self._answers() != self._judged:
            raise GradingError("the answers have changed since this page was started: run medcot grade again")
        if len(note) > web.MOST_CHARACTERS:  # only the browser enforces the text box's own limit
            raise GradingError(f"the note is too long: at most {web.MOST_CHARACTERS:,} characters")
        if kind := kind_of(note, secrets_at_hand()):
            raise GradingError(f"the note holds {kind}: remove it")
        now = datetime.now(UTC).replace(microsecond=0)
        verdict = dict(zip("ab", pair.shown, strict=True)).get(choice, choice)
        kept = {"note": note.strip(), "shown_as_a": pair.shown[0], "grader": self.grader, "at": now, "answers": pair.digest}
        grade = Grade(id=pair.id, verdict=verdict, **kept)
        with self._lock:
            append_grade(self.run, grade)
            self.judged.pop(pair.id, None)
            self.judged[pair.id] = grade

    def heading(self, pair: Pair | None) -> str:
        """Return progress, specialty, and this grader's earlier judgment of the pair, as HTML."""
        progress = f"{len(self.judged)} of {len(self.pairs)} judged"
        if pair is None:
            return f"<p>{progress}. That was the last one. You can close this page.</p>"
        tags = [str(pair.question["specialty"]), "" if pair.question["scored"] else "shown, not scored"]
        if grade := self.judged.get(pair.id):
            said = dict(zip(pair.shown, "ab", strict=True)).get(grade.verdict, grade.verdict)
            tags.append(f"you said: {CHOICES[said]}")
        marks = "".join(f'<span class="tag">{web.escape(tag)}</span>' for tag in tags if tag)
        return f"<p>Question {self.pairs.index(pair) + 1} of {len(self.pairs)}, {progress} {marks}</p>"


def _plain(text: str, kind: str = "", missing: str = "") -> str:
    """Return HTML that shows a text unchanged, or `missing` if it is empty."""
    return f'<div class="text {kind}">{web.escape(text)}</div>' if text.strip() else f'<div class="missing">{missing}</div>'


def build_page(desk: Desk) -> gradio.Blocks:
    """Build the page of a desk. Every click replaces the whole view, so nothing of the previous question remains."""
    import gradio as gr

    def view(pair: Pair | None, said: str = "", note: str | None = None) -> list[Any]:
        around = [
            (f"<p><b>{web.escape(said)}</b></p>" if said else "") + desk.heading(pair),
            gr.Column(visible=pair is not None),
            gr.Button(visible=bool(desk.previous_pair(pair))),
        ]
        folded = [gr.Accordion(open=False)] * 2
        if pair is None:
            return ["", *around, *[""] * 6, *folded, ""]
        both = [pair.answers[side] for side in pair.shown]
        texts = [_plain(answer["answer"], missing="no answer after the thinking") for answer in both]
        thoughts = [_plain(answer["thinking"], missing="no thinking") for answer in both]
        if note is None:
            note = desk.judged[pair.id].note if pair.id in desk.judged else ""
        return [pair.token, *around, _plain(pair.question["Question"], "question"), *texts, *thoughts, "", *folded, note]

    def answer(act: str, token: str, note: str = "") -> Any:
        pair = desk.by_token.get(token)
        if act == "reference":
            return _plain(f"Reference response: {pair.question['Response']}") if pair else ""
        if token and not pair:
            return view(desk.next_pair(), "The answers have changed since you saw them: nothing was saved.")
        if act == "back":
            return view(desk.previous_pair(pair) or pair)
        if pair and act in CHOICES:
            try:
                desk.judge(pair, act, note)
            except (OSError, MedcotError) as error:
                why = f"{GRADES} cannot be written ({error.strerror})" if isinstance(error, OSError) else error
                return view(pair, f"Not saved: {why}", note)  # gradio's own errors show no reason on this page
        return view(desk.next_pair(pair))

    with gr.Blocks(title="Blind grading", analytics_enabled=False) as page:
        gr.HTML("<h1>Blind grading</h1>")
        token, heading = gr.Textbox(visible="hidden"), gr.HTML()
        with gr.Column() as body:
            question, texts, thoughts, folds = gr.HTML(), [], [], []
            with gr.Row():
                for letter in "AB":
                    with gr.Column(min_width=320, variant="panel"):
                        gr.HTML(f"<h2>Answer {letter}</h2>")
                        texts.append(gr.HTML())
                        with gr.Accordion(f"Thinking of {letter}", open=False) as fold:
                            thoughts.append(gr.HTML())
                        folds.append(fold)
            show, expected = gr.Button("Show the reference response", size="sm"), gr.HTML()
            note = gr.Textbox(label="Note", placeholder="optional", lines=2, max_length=web.MOST_CHARACTERS)
            with gr.Row():
                buttons = {act: gr.Button(text, variant="primary", min_width=120) for act, text in CHOICES.items()}
            buttons["skip"] = gr.Button("Skip for now")
        buttons["back"] = gr.Button("Back to the previous judgment")
        whole = [token, heading, body, buttons["back"], question, *texts, *thoughts, expected, *folds, note]
        quick = {"queue": False, "show_progress": "hidden"}
        for act, button in buttons.items():
            button.click(partial(answer, act), [token, note], whole, api_name=act, **quick)
        show.click(partial(answer, "reference"), token, expected, api_name="reference", **quick)
        page.load(partial(answer, "current", ""), None, whole, api_name="current", **quick)
    return page


def serve(run: Run, port: int = 0, open_browser: bool = False, grader: str = "grader") -> None:
    """Serve the grading page on 127.0.0.1 until interrupted. It begins with this grader's first ungraded question.

    `port` 0 means any free port; the address is printed. Raises RunError or GradingError, in one line, if the run has no answers
    or no questions, if the name is empty, or if the port is taken."""
    if not grader.strip():
        raise GradingError("the grader needs a name: give one with --grader, or leave it out")
    with hold(run.path, "medcot grade"):  # this only makes sure that no answers are being made; two graders may work at a time
        desk = Desk(run, grader.strip())
    listener = web.listen(port, GradingError)
    progress = f"of {len(desk.pairs)} questions judged by {desk.grader}"
    say(f"{len(desk.judged)} {progress}; judgments go to {run.path / GRADES}")
    if desk.stale:
        say(f"not counted: {desk.stale} judgment(s) of answers that have changed since")
    web.serve(build_page(desk), listener, "grading page", CSS, run.path, open_browser)
    say(f"{len(desk.judged)} {progress}")
