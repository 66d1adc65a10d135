"""Blind grading: a person says which answer is better without being told which model wrote it.

Judgements go to grades.jsonl in the run directory, one line a click. The page is served to this machine only and never
receives a label: which model is shown as A stays in this process and in the file."""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import AwareDatetime, BaseModel

from medcot_utils.cli import web
from medcot_utils.data.contamination import contaminated
from medcot_utils.errors import MedcotError
from medcot_utils.evaluation.intervals import format_interval
from medcot_utils.models.generation import by_sample
from medcot_utils.run.directory import Run, write_atomic

if TYPE_CHECKING:
    import gradio

GRADES = "grades.jsonl"
CSS = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.missing { font-style: italic; opacity: .7; }
.question { font-size: 1.1rem; font-weight: 600; }
.tag { border: 1px solid #8888; border-radius: 1em; padding: 0 .6em; margin-left: .4em; display: inline-block; }
"""

Side = Literal["base", "tuned"]
Verdict = Literal["base", "tuned", "tie", "both_wrong"]
SIDES: tuple[Side, Side] = get_args(Side)
CHOICES = {"a": "A better", "b": "B better", "tie": "Tie", "both_wrong": "Both wrong"}


class GradingError(MedcotError):
    """The run's answers cannot be graded, or the page cannot be served; the message says why and what to do."""


class Grade(BaseModel):
    """One judgement: a line of grades.jsonl. `answers` is the digest of what was judged (see `Pair`)."""

    id: str
    verdict: Verdict
    note: str
    shown_as_a: Side
    grader: str
    at: AwareDatetime
    answers: str


@dataclass(frozen=True)
class Pair:
    """A question with both models' answers; `shown` are the models behind A and B.

    `digest`: sha256 of question, thinking and answers, base first. The page names the pair by `token`, the same with A first,
    as a digest with base first would tell which of A and B is base."""

    id: str
    question: Mapping[str, Any]
    answers: Mapping[Side, Mapping[str, Any]]
    shown: tuple[Side, Side]
    digest: str
    token: str


def read_pairs(run: Run) -> list[Pair]:
    """The run's questions with both answers, in their order, those that are shown only (`scored: false`) last.

    Which model is A is a coin thrown by the run's seed and the question's id: the same for every grader and session.
    Raises RunError naming the notebook to run if answers are missing, GradingError if they do not fit the questions."""
    # The greedy answers: sampled ones stand behind them in the same file.
    answers = {side: {record["id"]: record for record in by_sample(run.read(f"{side}_answers"))[0]} for side in SIDES}
    questions = run.read("questions")
    if not questions:
        raise GradingError(f"{run.path.name}/ holds no question: run notebook 02_baseline_inference again with some")
    if any(question["id"] not in answers[side] for question in questions for side in SIDES):
        raise GradingError(f"the answers in {run.path.name}/ are to other questions: run notebooks 02 and 06 again")
    pairs = []
    for question in sorted(questions, key=lambda question: not question["scored"]):
        coin = hashlib.sha256(f"{run.config.seed}:{question['id']}".encode()).digest()[0] % 2
        both, shown = {side: answers[side][question["id"]] for side in SIDES}, SIDES[::-1] if coin else SIDES
        texts = {side: [both[side]["thinking"], both[side]["answer"]] for side in SIDES}
        digests = (
            hashlib.sha256(json.dumps([question["id"], question["Question"], *map(texts.get, order)]).encode()).hexdigest()
            for order in (SIDES, shown)
        )
        pairs.append(Pair(question["id"], question, both, shown, *digests))
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
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
        torn = stream.read(1) not in (b"", b"\n")  # a crash cut the last line off: begin a new one
        stream.write(b"\n" * torn + grade.model_dump_json().encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def counted(pairs: Sequence[Pair], grades: Sequence[Grade]) -> tuple[dict[tuple[str, str], Grade], int]:
    """({(grader, question id): the judgement that counts, last made last}, how many count no more).

    The last one of a grader on a question counts. One of answers that have changed since does not; it is among the second
    number unless its grader has judged the new ones."""
    digests, latest = {pair.id: pair.digest for pair in pairs}, {}
    for grade in grades:
        if digests.get(grade.id) == grade.answers:
            latest.pop((grade.grader, grade.id), None)
            latest[grade.grader, grade.id] = grade
    return latest, len({(grade.grader, grade.id) for grade in grades} - latest.keys())


# --- the result ------------------------------------------------------------------------------------------------------


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Agreement of two graders beyond chance, at most 1: (observed - expected) / (1 - expected), where expected is what their
    own shares of each verdict would give (Cohen 1960, doi:10.1177/001316446002000104). None, as undefined, if both gave one
    same verdict throughout."""
    n, one, other = len(first), Counter(first), Counter(second)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    expected = sum(one[name] * other[name] for name in one) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def win_rate(run: Run) -> dict[str, Any] | None:
    """How often the tuned model's answer was judged better, over the scored questions that no training row repeats; None if
    nothing is graded.

    {n: questions graded, of: scored questions, counts: {base, tuned, tie, both_wrong, split}, win_rate: {value, low, high, n},
    p, graders: {name: {verdict: count}}, kappa: [{graders, value, n}], stale}. win_rate: the share of tuned among the n
    decided pairs with its exact (Clopper-Pearson) interval at evaluation.confidence_level, 95 % by default; p: exact,
    two-sided, against a coin (scipy.stats.binomtest for both); None where no pair is decided. A question counts once, however
    many graders, so that pairs stay independent: by the verdict that more of them gave than any other, as `split` if there is
    none. kappa: Cohen's, for each two graders, on the questions that both graded. stale: judgements not counted, of answers
    that have changed since. Raises RunError or GradingError as `read_pairs` does."""
    from scipy.stats import binomtest

    if not (grades := read_grades(run)):
        return None
    pairs = read_pairs(run)
    latest, stale = counted(pairs, grades)
    seen = contaminated(run.read("data_report"))
    scored = [pair.id for pair in pairs if pair.question["scored"] and pair.id not in seen]
    by_grader: dict[str, dict[str, Verdict]] = {}
    for (grader, name), grade in latest.items():
        if name in scored:
            by_grader.setdefault(grader, {})[name] = grade.verdict
    if not by_grader and not stale:
        return None
    counts = dict.fromkeys([*get_args(Verdict), "split"], 0)
    for name in scored:
        votes = Counter(verdicts[name] for verdicts in by_grader.values() if name in verdicts).most_common()
        if votes:
            counts["split" if len(votes) > 1 and votes[0][1] == votes[1][1] else votes[0][0]] += 1
    kappa = []
    for graders in itertools.combinations(sorted(by_grader), 2):
        one, other = (by_grader[grader] for grader in graders)
        if both := [name for name in scored if name in one and name in other]:
            value = cohen_kappa([one[name] for name in both], [other[name] for name in both])
            kappa.append({"graders": list(graders), "value": value, "n": len(both)})
    decided = counts["base"] + counts["tuned"]
    rate, p = {"value": None, "low": None, "high": None, "n": decided}, None
    if decided:
        test = binomtest(counts["tuned"], decided)
        low, high = test.proportion_ci(run.config.evaluation.confidence_level, method="exact")
        rate |= {"value": counts["tuned"] / decided, "low": float(low), "high": float(high)}
        p = float(test.pvalue)
    tallies = {grader: dict(Counter(verdicts.values())) for grader, verdicts in by_grader.items()}
    graded = {"n": sum(counts.values()), "of": len(scored), "counts": counts, "win_rate": rate, "p": p}
    return graded | {"graders": tallies, "kappa": kappa, "stale": stale}


def describe(graded: Mapping[str, Any] | None) -> str:
    """What `win_rate` gave, in words, one fact a line."""
    if graded is None:
        return "nothing is graded yet"
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in graded["counts"].items())
    lines = [f"{graded['n']} of {graded['of']} scored questions graded by {', '.join(graded['graders']) or 'nobody'}: {counts}"]
    if (rate := graded["win_rate"])["n"]:
        share = f"{format_interval(rate)} of {rate['n']} decided pairs"
        lines.append(f"tuned judged better in {share} (Clopper-Pearson interval), p = {graded['p']:.2g}")
    for kappa in graded["kappa"]:
        value = "undefined" if kappa["value"] is None else f"{kappa['value']:.2f}"
        lines.append(f"Cohen's kappa of {' and '.join(kappa['graders'])}: {value}, on {kappa['n']} questions that both graded")
    if graded["stale"]:
        lines.append(f"not counted: {graded['stale']} judgement(s) of answers that have changed since")
    return "\n".join(lines)


# --- the page --------------------------------------------------------------------------------------------------------


class Desk:
    """One grader's session. The page holds nothing but a pair's token, so a click means the pair it was made on, also after
    a restart; all else comes from the file."""

    def __init__(self, run: Run, grader: str):
        self.run, self.grader, self.pairs = run, grader, read_pairs(run)
        self.by_token = {pair.token: pair for pair in self.pairs}
        latest, self.stale = counted(self.pairs, read_grades(run))
        self.judged = {name: grade for (who, name), grade in latest.items() if who == grader}
        self._lock = threading.Lock()  # gradio calls from several threads

    def next_pair(self, after: Pair | None = None) -> Pair | None:
        """The first ungraded pair behind `after`, then from the beginning; None if all are graded."""
        at = self.pairs.index(after) + 1 if after else 0
        return next((pair for pair in self.pairs[at:] + self.pairs[:at] if pair.id not in self.judged), None)

    def previous_pair(self, shown: Pair | None) -> Pair | None:
        """The pair judged before the one shown, or the last judged if that is not judged yet; None if there is none."""
        names = list(self.judged)
        before = names[: names.index(shown.id)] if shown and shown.id in names else names
        return next((pair for pair in self.pairs if pair.id in before[-1:]), None)

    def judge(self, pair: Pair, choice: str, note: str) -> None:
        """Keep a judgement; `choice` is one of CHOICES. Raises OSError if it cannot be written."""
        now = datetime.now(UTC).replace(microsecond=0)
        verdict = dict(zip("ab", pair.shown, strict=True)).get(choice, choice)
        kept = {"note": note.strip(), "shown_as_a": pair.shown[0], "grader": self.grader, "at": now, "answers": pair.digest}
        grade = Grade(id=pair.id, verdict=verdict, **kept)
        with self._lock:
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
            said = dict(zip(pair.shown, "ab", strict=True)).get(grade.verdict, grade.verdict)
            tags.append(f"you said: {CHOICES[said]}")
        marks = "".join(f'<span class="tag">{html.escape(tag)}</span>' for tag in tags if tag)
        return f"<p>Question {self.pairs.index(pair) + 1} of {len(self.pairs)}, {progress} {marks}</p>"


def _plain(text: str, kind: str = "", missing: str = "") -> str:
    """HTML that shows a text as it is. The marks of gradio's own templates ($, {, }) are escaped too."""
    escaped = html.escape(text).translate({ord(mark): f"&#{ord(mark)};" for mark in "${}"})
    return f'<div class="text {kind}">{escaped}</div>' if text.strip() else f'<div class="missing">{missing}</div>'


def build_page(desk: Desk) -> gradio.Blocks:
    """The page over a desk. Every click gives the whole view anew, so nothing of the last question stays behind."""
    import gradio as gr

    def view(pair: Pair | None, say: str = "") -> list[Any]:
        around = [
            say + desk.heading(pair),
            gr.Column(visible=pair is not None),
            gr.Button(visible=bool(desk.previous_pair(pair))),
        ]
        folded = [gr.Accordion(open=False)] * 2
        if pair is None:
            return ["", *around, *[""] * 6, *folded, ""]
        both = [pair.answers[side] for side in pair.shown]
        texts = [_plain(answer["answer"], missing="no answer after the thinking") for answer in both]
        thoughts = [_plain(answer["thinking"], missing="no thinking") for answer in both]
        note = desk.judged[pair.id].note if pair.id in desk.judged else ""
        return [pair.token, *around, _plain(pair.question["Question"], "question"), *texts, *thoughts, "", *folded, note]

    def answer(act: str, token: str, note: str = "") -> Any:
        pair = desk.by_token.get(token)
        if act == "reference":
            return _plain(f"Reference response: {pair.question['Response']}") if pair else ""
        if token and not pair:
            return view(desk.next_pair(), "<p><b>The answers have changed since you saw them: nothing was kept.</b></p>")
        if act == "back":
            return view(desk.previous_pair(pair) or pair)
        if pair and act in CHOICES:
            try:
                desk.judge(pair, act, note)
            except OSError as error:
                raise gr.Error(f"Not kept: {GRADES} cannot be written ({error.strerror})", print_exception=False) from error
        return view(desk.next_pair(pair))

    with gr.Blocks(title="Blind grading", analytics_enabled=False) as page:
        token, heading = gr.Textbox(visible="hidden"), gr.HTML()
        with gr.Column() as body:
            question, texts, thoughts, folds = gr.HTML(), [], [], []
            with gr.Row():
                for letter in "AB":
                    with gr.Column(min_width=320, variant="panel"):
                        gr.HTML(f"<h3>Answer {letter}</h3>")
                        texts.append(gr.HTML())
                        with gr.Accordion(f"Thinking of {letter}", open=False) as fold:
                            thoughts.append(gr.HTML())
                        folds.append(fold)
            show, expected = gr.Button("Show the reference response", size="sm"), gr.HTML()
            note = gr.Textbox(label="Note", placeholder="optional", lines=2)
            with gr.Row():
                buttons = {act: gr.Button(text, variant="primary", min_width=120) for act, text in CHOICES.items()}
            buttons["skip"] = gr.Button("Skip for now")
        buttons["back"] = gr.Button("Back to the previous judgement")
        whole = [token, heading, body, buttons["back"], question, *texts, *thoughts, expected, *folds, note]
        quick = {"queue": False, "show_progress": "hidden"}
        for act, button in buttons.items():
            button.click(partial(answer, act), [token, note], whole, api_name=act, **quick)
        show.click(partial(answer, "reference"), token, expected, api_name="reference", **quick)
        page.load(partial(answer, "current", ""), None, whole, api_name="current", **quick)
    return page


def serve(run: Run, port: int = 0, open_browser: bool = False, grader: str = "grader") -> None:
    """Serve the grading page on 127.0.0.1 until interrupted, going on at this grader's first ungraded question.

    `port` 0: any free one; the address is printed. Raises RunError or GradingError, in one line, if the run has no answers or
    no question, the name is empty or the port is taken."""
    if not grader.strip():
        raise GradingError("the grader needs a name: give one with --grader, or leave it out")
    desk = Desk(run, grader.strip())
    listener = web.listen(port, GradingError)
    progress = f"of {len(desk.pairs)} questions judged by {desk.grader}"
    print(f"{len(desk.judged)} {progress}; judgements go to {run.path / GRADES}")
    if desk.stale:
        print(f"not counted: {desk.stale} judgement(s) of answers that have changed since")
    web.serve(build_page(desk), listener, "grading page", CSS, run.path, open_browser)
    print(f"{len(desk.judged)} {progress}")
