"""Blind grading: a person says which answer is better without being told which model wrote it.

Questions and answers come from the run; judgements go to grades.jsonl beside them, one line a click. The page is served to
this machine only and never receives a label: which model is shown as A stays in this process and in the file."""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import os
import socket
import threading
import webbrowser
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import AwareDatetime, BaseModel

from medcot_utils.errors import MedcotError
from medcot_utils.evaluation import format_interval
from medcot_utils.generation import by_sample
from medcot_utils.run import Run, write_atomic

if TYPE_CHECKING:
    import gradio

GRADES = "grades.jsonl"
HOST = "127.0.0.1"
# The browser itself refuses whatever lies elsewhere, also if a later gradio asks for it. Its templates need inline and eval.
CONTENT_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
CSS = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.missing { font-style: italic; opacity: .7; }
.question { font-size: 1.1rem; font-weight: 600; }
.tag { border: 1px solid #8888; border-radius: 1em; padding: 0 .6em; margin-left: .4em; white-space: nowrap; }
"""

Side = Literal["base", "tuned"]
Verdict = Literal["base", "tuned", "tie", "both_wrong"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class GradingError(MedcotError):
    """The run's answers cannot be graded, or the page cannot be served; the message says why and what to do."""


class Grade(BaseModel):
    """One judgement: a line of grades.jsonl. `answers` is the sha256 of what was judged (see `Pair.digest`)."""

    id: str
    verdict: Verdict
    note: str
    shown_as_a: Side
    grader: str
    at: AwareDatetime
    answers: str


@dataclass(frozen=True)
class Pair:
    """A question with both models' answers, and which of them is shown as A."""

    question: Mapping[str, Any]
    answers: Mapping[Side, Mapping[str, Any]]
    shown_as_a: Side

    @property
    def id(self) -> str:
        return str(self.question["id"])

    @property
    def sides(self) -> tuple[Side, Side]:
        """The models behind A and B."""
        return self.shown_as_a, "base" if self.shown_as_a == "tuned" else "tuned"

    @property
    def digest(self) -> str:
        """sha256 of the question, and thinking and answer of base and tuned: another text of any of them, another digest."""
        return self._sha256("base", "tuned")

    @property
    def token(self) -> str:
        """What the page names this pair by. Over A and B in the order shown, as `digest` would tell which of them is base."""
        return self._sha256(*self.sides)

    def _sha256(self, *sides: Side) -> str:
        texts = [[self.answers[side]["thinking"], self.answers[side]["answer"]] for side in sides]
        return hashlib.sha256(json.dumps([self.id, self.question["Question"], *texts]).encode()).hexdigest()


def read_pairs(run: Run) -> list[Pair]:
    """The run's questions with both answers, in their order, those that are shown only (`scored: false`) last.

    Which model is A is a coin thrown by the run's seed and the question's id, so every grader and every session sees the
    same. Raises RunError naming the notebook to run if answers are missing, GradingError if they do not fit the questions."""
    # The greedy answers: sampled ones stand behind them in the same file.
    answers = {side: {str(r["id"]): r for r in by_sample(run.read(f"{side}_answers"))[0]} for side in get_args(Side)}
    questions = run.read("questions")
    if not questions:
        raise GradingError(f"{run.path.name}/ holds no question to grade: run notebooks 02 and 06 again with some")
    for side, records in answers.items():
        missing = [str(question["id"]) for question in questions if str(question["id"]) not in records]
        if missing:
            raise GradingError(
                f"{side}_answers.jsonl in {run.path.name}/ has no answer to question {missing[0]}"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}: run notebooks 02 and 06 again"
            )
    pairs = []
    for question in sorted(questions, key=lambda question: not question["scored"]):
        name = str(question["id"])
        coin = hashlib.sha256(f"{run.config.seed}:{name}".encode()).digest()[0] % 2
        both = {side: records[name] for side, records in answers.items()}
        pairs.append(Pair(question, both, get_args(Side)[coin]))
    return pairs


# --- the file --------------------------------------------------------------------------------------------------------


def read_grades(run: Run) -> list[Grade]:
    """Every judgement in the run, oldest first; none if there is no file. Says how many lines could not be read.

    A line that a crash cut off is passed over, not removed: it stays in the file for whoever wants to see it."""
    path, grades, unreadable = run.path / GRADES, [], 0
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            grades += [Grade.model_validate_json(line)] if line.strip() else []
        except ValueError:
            unreadable += 1
    if unreadable:
        print(f"{run.display(path)}: {unreadable} line(s) set aside, cut off while being written or altered by hand")
    return grades


def append_grade(run: Run, grade: Grade) -> None:
    """Add a judgement to the file. It is on the disk when this returns; raises OSError if it cannot be."""
    path = run.path / GRADES
    if not path.exists():
        write_atomic(path, "")  # makes the new name durable too
    with path.open("a+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - 1))
        # After a line that a crash cut off, begin a new one.
        stream.write((b"\n" if stream.read(1) not in (b"", b"\n") else b"") + grade.model_dump_json().encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def counted(pairs: Sequence[Pair], grades: Sequence[Grade]) -> tuple[dict[tuple[str, str], Grade], int]:
    """({(grader, question id): the judgement that counts, last made last}, how many count no more).

    The last one of a grader on a question counts. One of answers that have changed since does not, and is numbered unless
    its grader has judged the new ones."""
    digests = {pair.id: pair.digest for pair in pairs}
    latest: dict[tuple[str, str], Grade] = {}
    for grade in grades:
        if digests.get(grade.id) == grade.answers:
            latest.pop((grade.grader, grade.id), None)
            latest[grade.grader, grade.id] = grade
    return latest, len({(grade.grader, grade.id) for grade in grades} - latest.keys())


# --- the result ------------------------------------------------------------------------------------------------------


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Agreement of two graders beyond chance, -1 to 1: (observed - expected) / (1 - expected), where expected is what their
    own shares of each verdict would give (Cohen 1960, doi:10.1177/001316446002000104). None if both gave one same verdict
    throughout: then it is not defined."""
    n, counts = len(first), (Counter(first), Counter(second))
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    expected = sum(counts[0][name] * counts[1][name] for name in counts[0]) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def win_rate(run: Run) -> dict[str, Any] | None:
    """How often the tuned model's answer was judged better, over the scored questions; None if nothing is graded.

    {n: questions graded, of: scored questions, counts: {base, tuned, tie, both_wrong, split}, win_rate: {value, low, high, n},
    p, graders: {name: {verdict: count}}, kappa: [{graders, value, n}], stale}. win_rate is the share of tuned among the n
    decided pairs, with the exact Clopper-Pearson interval at the run's evaluation.confidence_level (0.95), and p the exact
    two-sided one against a coin (scipy.stats.binomtest); values are None if no pair is decided. A question counts once, however
    many graders: by the verdict that most of them gave, as `split` if there is none. kappa is Cohen's, a pair of graders
    each, on the questions that both graded. stale: judgements not counted, as the answers have changed since.

    Raises RunError or GradingError as `read_pairs` does."""
    grades = read_grades(run)
    if not grades:
        return None
    pairs = read_pairs(run)
    latest, stale = counted(pairs, grades)
    scored = {pair.id for pair in pairs if pair.question["scored"]}
    by_grader: dict[str, dict[str, Verdict]] = {}
    for (grader, name), grade in latest.items():
        if name in scored:
            by_grader.setdefault(grader, {})[name] = grade.verdict
    if not by_grader and not stale:
        return None
    counts = dict.fromkeys([*VERDICTS, "split"], 0)
    for name in scored:
        votes = Counter(verdicts[name] for verdicts in by_grader.values() if name in verdicts).most_common(2)
        if votes:
            split = len(votes) == 2 and votes[0][1] == votes[1][1]
            counts["split" if split else votes[0][0]] += 1
    kappa = []
    for first, second in itertools.combinations(sorted(by_grader), 2):
        if both := sorted(by_grader[first].keys() & by_grader[second].keys()):
            value = cohen_kappa([by_grader[first][name] for name in both], [by_grader[second][name] for name in both])
            kappa.append({"graders": [first, second], "value": value, "n": len(both)})
    rate, p = _binomial(counts["tuned"], counts["tuned"] + counts["base"], run.config.evaluation.confidence_level)
    tallies = {grader: {verdict: list(by_grader[grader].values()).count(verdict) for verdict in VERDICTS} for grader in by_grader}
    graded = {"n": sum(counts.values()), "of": len(scored), "counts": counts, "win_rate": rate, "p": p}
    return graded | {"graders": tallies, "kappa": kappa, "stale": stale}


def _binomial(wins: int, decided: int, confidence: float) -> tuple[dict[str, Any], float | None]:
    from scipy.stats import binomtest

    if not decided:
        return {"value": None, "low": None, "high": None, "n": 0}, None
    test = binomtest(wins, decided)
    found = test.proportion_ci(confidence, method="exact")
    return {"value": wins / decided, "low": float(found.low), "high": float(found.high), "n": decided}, float(test.pvalue)


def describe(graded: Mapping[str, Any] | None) -> str:
    """What `win_rate` gave, in words, one fact a line."""
    if graded is None:
        return "nothing is graded yet"
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in graded["counts"].items())
    lines = [f"{graded['n']} of {graded['of']} scored questions graded by {', '.join(graded['graders']) or 'nobody'}: {counts}"]
    if (rate := graded["win_rate"])["n"]:
        lines.append(
            f"tuned judged better in {format_interval(rate)} of {rate['n']} decided pairs (Clopper-Pearson), "
            f"p = {graded['p']:.2g}"
        )
    for kappa in graded["kappa"]:
        value = "not defined" if kappa["value"] is None else f"{kappa['value']:.2f}"
        lines.append(f"Cohen's kappa of {' and '.join(kappa['graders'])}: {value}, on {kappa['n']} questions that both graded")
    if graded["stale"]:
        lines.append(f"not counted: {graded['stale']} judgement(s) of answers that have changed since")
    return "\n".join(lines)


# --- the page --------------------------------------------------------------------------------------------------------


def _plain(text: str, kind: str = "", missing: str = "") -> str:
    """Text as HTML that shows it as it is. Gradio's own template marks ($, {, }) are escaped too."""
    escaped = html.escape(text).translate({ord(mark): f"&#{ord(mark)};" for mark in "${}"})
    return f'<div class="text {kind}">{escaped}</div>' if text.strip() else f'<div class="missing">{missing}</div>'


class Desk:
    """One grader's session. The page holds nothing but a pair's token, so a click means the pair it was made on, also after
    a restart; all else is read from the file."""

    def __init__(self, run: Run, grader: str):
        self.run, self.grader, self.pairs = run, grader, read_pairs(run)
        self.by_token = {pair.token: pair for pair in self.pairs}
        latest, self.stale = counted(self.pairs, read_grades(run))
        self.judged = {name: grade for (who, name), grade in latest.items() if who == grader}
        self.lock = threading.Lock()  # gradio calls from several threads

    def next_pair(self, after: Pair | None = None) -> Pair | None:
        """The first ungraded pair behind `after`, then from the beginning; None if all are graded."""
        at = self.pairs.index(after) + 1 if after else 0
        return next((pair for pair in self.pairs[at:] + self.pairs[:at] if pair.id not in self.judged), None)

    def previous_pair(self, shown: Pair | None) -> Pair | None:
        """The pair judged before the one shown; the last judged if that is not judged yet. None if there is none."""
        history = list(self.judged)
        before = history[: history.index(shown.id)] if shown and shown.id in history else history
        return next((pair for pair in self.pairs if before and pair.id == before[-1]), None)

    def judge(self, pair: Pair, choice: str, note: str) -> None:
        """Keep a judgement: `choice` is a, b, tie or both_wrong. Raises OSError if it cannot be written."""
        verdict = dict(zip("ab", pair.sides, strict=True)).get(choice, choice)
        grade = Grade(
            id=pair.id,
            verdict=verdict,
            note=note.strip(),
            shown_as_a=pair.shown_as_a,
            grader=self.grader,
            at=datetime.now(UTC).replace(microsecond=0),
            answers=pair.digest,
        )
        with self.lock:
            append_grade(self.run, grade)
            self.judged.pop(pair.id, None)
            self.judged[pair.id] = grade

    def heading(self, pair: Pair | None) -> str:
        """Progress, specialty, and what this grader said of the pair before, as HTML."""
        progress = f"{len(self.judged)} of {len(self.pairs)} judged"
        if pair is None:
            return f"<p>{progress}. That was the last one: this page can be closed.</p>"
        tags = [pair.question["specialty"], "" if pair.question["scored"] else "shown, not scored"]
        if grade := self.judged.get(pair.id):
            side = dict(zip(pair.sides, ("A better", "B better"), strict=True))
            tags.append("you said: " + side.get(grade.verdict, grade.verdict.replace("_", " ")))
        marks = "".join(f'<span class="tag">{html.escape(tag)}</span>' for tag in tags if tag)
        return f"<p>Question {self.pairs.index(pair) + 1} of {len(self.pairs)}, {progress} {marks}</p>"


def build_page(desk: Desk) -> gradio.Blocks:
    """The page over a desk. Every function gives the whole view anew, so nothing of the last question stays behind."""
    import gradio as gr

    def view(pair: Pair | None) -> list[Any]:
        shown = [desk.heading(pair), gr.Column(visible=pair is not None), gr.Button(interactive=bool(desk.previous_pair(pair)))]
        if pair is None:
            return ["", *shown, *[""] * 6, gr.Accordion(open=False), gr.Accordion(open=False), ""]
        both = [pair.answers[side] for side in pair.sides]
        texts = [_plain(answer["answer"], missing="no answer after the thinking") for answer in both]
        thoughts = [_plain(answer["thinking"], missing="no thinking") for answer in both]
        note = desk.judged[pair.id].note if pair.id in desk.judged else ""
        question = _plain(pair.question["Question"], "question")
        folded = [gr.Accordion(open=False), gr.Accordion(open=False)]
        return [pair.token, *shown, question, *texts, *thoughts, "", *folded, note]

    def known(token: str) -> Pair | None:
        if token and token not in desk.by_token:
            gr.Warning("The run's answers have changed since this page was loaded. Nothing was kept; please judge these.")
        return desk.by_token.get(token)

    def judge(choice: str, token: str, note: str) -> list[Any]:
        if pair := known(token):
            try:
                desk.judge(pair, choice, note)
            except OSError as error:
                raise gr.Error(
                    f"The judgement was not kept: {desk.run.display(desk.run.path / GRADES)}: {error.strerror}"
                ) from error
        return view(desk.next_pair(pair))

    def back(token: str) -> list[Any]:
        pair = known(token)
        return view(desk.previous_pair(pair) or pair)

    def reference(token: str) -> str:
        pair = known(token)
        return _plain("Reference response: " + pair.question["Response"]) if pair else ""

    with gr.Blocks(title="Blind grading", analytics_enabled=False) as page:
        token = gr.Textbox(visible="hidden")
        heading = gr.HTML()
        with gr.Column() as body:
            question = gr.HTML()
            answers, thoughts, folds = [], [], []
            with gr.Row():
                for letter in "AB":
                    with gr.Column(min_width=320, variant="panel"):
                        gr.HTML(f"<h3>Answer {letter}</h3>")
                        answers.append(gr.HTML())
                        with gr.Accordion(f"Thinking of {letter}", open=False) as fold:
                            thoughts.append(gr.HTML())
                        folds.append(fold)
            show = gr.Button("Show the reference response", size="sm")
            expected = gr.HTML()
            note = gr.Textbox(label="Note", placeholder="optional", lines=2)
            with gr.Row():
                choices = {"a": "A better", "b": "B better", "tie": "Tie", "both_wrong": "Both wrong"}
                buttons = {choice: gr.Button(text, variant="primary", min_width=120) for choice, text in choices.items()}
            skip = gr.Button("Skip for now")
        previous = gr.Button("Back to the previous judgement")
        whole = [token, heading, body, previous, question, *answers, *thoughts, expected, *folds, note]
        for choice, button in buttons.items():
            button.click(partial(judge, choice), [token, note], whole, api_name=f"judge_{choice}")
        previous.click(back, token, whole, api_name="back")
        skip.click(lambda token: view(desk.next_pair(known(token))), token, whole, api_name="skip")
        show.click(reference, token, expected, api_name="reference")
        page.load(lambda: view(desk.next_pair()), None, whole, api_name="current")
    return page


def serve(run: Run, port: int = 0, open_browser: bool = False, grader: str = "grader") -> None:
    """Serve the grading page on 127.0.0.1 until interrupted, going on at this grader's first ungraded question.

    `port` 0: any free one; the address is printed. Raises RunError or GradingError, in one line, if the run has no answers or
    no question, the name is empty or the port is taken."""
    if not grader.strip():
        raise GradingError("the grader needs a name: give one with --grader, or leave it out")
    desk = Desk(run, grader.strip())
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise GradingError(
            f"port {port} on {HOST} cannot be used ({error}): choose another with --port, or leave it out"
        ) from error
    listener.listen()
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    # Mounted, not launched: launch() takes host, sharing and proxies from the environment, and asks its own address through them.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app = gr.mount_gradio_app(
        FastAPI(),
        build_page(desk),
        "/",
        server_name=HOST,
        server_port=listener.getsockname()[1],
        footer_links=[],
        run_history=False,
        blocked_paths=[str(run.path.absolute())],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=CSS,
    )
    address = f"http://{HOST}:{listener.getsockname()[1]}/"
    print(f"{len(desk.judged)} of {len(desk.pairs)} questions judged by {desk.grader}; judgements go to {run.path / GRADES}")
    if desk.stale:
        print(f"not counted: {desk.stale} judgement(s) of answers that have changed since")
    print(f"grading page: {address} (Ctrl-C ends it)", flush=True)
    if open_browser:
        webbrowser.open(address)
    headers = [("Content-Security-Policy", CONTENT_POLICY)]
    # An open page holds a connection for ever: do not wait for it.
    config = uvicorn.Config(app, log_level="warning", headers=headers, timeout_graceful_shutdown=1)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        print(f"{len(desk.judged)} of {len(desk.pairs)} questions judged by {desk.grader}")
