"""Blind grading: a person says which answer is better without being told which model wrote it.

Judgments are written to grades.jsonl in the run directory, one line per click. `cli/grading_page.py` shows the page."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import AwareDatetime, BaseModel

from medcot_utils.data.contamination import contaminated
from medcot_utils.errors import MedcotError
from medcot_utils.evaluation.intervals import Estimate, format_interval
from medcot_utils.models.records import by_sample
from medcot_utils.plain_text import say
from medcot_utils.run.directory import Run
from medcot_utils.run.files import write_atomic

if TYPE_CHECKING:
    from medcot_utils.data.rows import Question
    from medcot_utils.models.records import AnswerRecord

GRADES = "grades.jsonl"

Side = Literal["base", "tuned"]
Verdict = Literal["base", "tuned", "tie", "both_wrong"]
SIDES: tuple[Side, Side] = get_args(Side)


class GradingError(MedcotError):
    """Say why the run's answers cannot be graded or the page cannot be served, and what to do."""


class Grade(BaseModel):
    """Hold one judgment: a line of grades.jsonl. `answers` is the digest of the judged pair (see `Pair`)."""

    id: str
    verdict: Verdict
    note: str
    shown_as_a: Side
    grader: str
    at: AwareDatetime
    answers: str


@dataclass(frozen=True)
class Pair:
    """Hold a question with both models' answers; `shown` are the models behind A and B.

    digest: sha256 of question, thinking, and answers, base first. token: the same with A first. The page names the pair by
    its token, because the digest would reveal which of A and B is base."""

    id: str
    question: Question
    answers: Mapping[Side, AnswerRecord]
    shown: tuple[Side, Side]
    digest: str
    token: str


def read_pairs(run: Run) -> list[Pair]:
    """Return the run's questions with both answers, in their order; questions that are only shown (`scored: false`) come last.

    The run's seed and the question's id decide which model is A, so it is the same for every grader and session.
    Raises RunError, which names the notebook to run, if answers are missing, and GradingError if they do not match the
    questions."""
    # Only the greedy answers: sampled ones follow them in the same file.
    answers = {side: {record["id"]: record for record in by_sample(run.read(f"{side}_answers"))[0]} for side in SIDES}
    questions = run.read("questions")
    if not questions:
        raise GradingError(f"{run.name}/ holds no question: run notebook 02_baseline_inference again with some")
    if any(question["id"] not in answers[side] for question in questions for side in SIDES):
        raise GradingError(f"the answers in {run.name}/ are to other questions: run notebooks 02 and 06 again")
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
    """Return every judgment in the run, oldest first; an empty list if there is no file.

    Unreadable lines, as a crash leaves them, are counted in a message and skipped. They stay in the file. Raises GradingError
    if the file cannot be read."""
    path, grades, unreadable = run.path / GRADES, [], 0
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise GradingError(f"{run.display(path)} cannot be read ({error.strerror}): move it away, or make it readable") from error
    for line in lines:
        try:
            grades += [Grade.model_validate_json(line)] if line.strip() else []
        except ValueError:
            unreadable += 1
    if unreadable:
        say(f"{run.display(path)}: {unreadable} line(s) set aside, cut off while being written or altered by hand")
    return grades


def append_grade(run: Run, grade: Grade) -> None:
    """Add a judgment to the file. It is on the disk when this returns. Raises OSError if it cannot be written."""
    path = run.path / GRADES
    if not path.exists():
        write_atomic(path, "")  # makes the new name durable too
    with path.open("a+b") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
        torn = stream.read(1) not in (b"", b"\n")  # a crash cut off the last line, so begin a new one
        stream.write(b"\n" * torn + grade.model_dump_json().encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def latest_grades(pairs: Sequence[Pair], grades: Sequence[Grade]) -> tuple[dict[tuple[str, str], Grade], int]:
    """Return ({(grader, question id): the judgment that counts, newest last}, how many no longer count).

    A grader's last judgment of a question counts. A judgment of answers that have changed since does not. The second number
    leaves it out if its grader has judged the new answers."""
    digests, latest = {pair.id: pair.digest for pair in pairs}, {}
    for grade in grades:
        if digests.get(grade.id) == grade.answers:
            latest.pop((grade.grader, grade.id), None)
            latest[grade.grader, grade.id] = grade
    return latest, len({(grade.grader, grade.id) for grade in grades} - latest.keys())


# --- the result ------------------------------------------------------------------------------------------------------


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return the agreement of two graders beyond chance, at most 1; None (undefined) if both gave a single verdict throughout.

    It is (observed - expected) / (1 - expected), where `expected` is the agreement by chance, from each grader's shares of
    the verdicts (Cohen 1960, doi:10.1177/001316446002000104)."""
    n, one, other = len(first), Counter(first), Counter(second)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    expected = sum(one[name] * other[name] for name in one) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


@dataclass(frozen=True)
class Kappa:
    """Hold Cohen's kappa of two graders on the `n` questions that both graded; `value` is None if kappa is undefined."""

    graders: tuple[str, str]
    value: float | None
    n: int


@dataclass(frozen=True)
class GradingResult:
    """Hold how a run's answers were judged, over the scored questions that no training row repeats.

    A question counts once, whatever its number of graders, so that pairs stay independent. Its verdict is the one that most
    graders gave, or `split` if two verdicts lead with the same number.

    of: the number of scored questions. counts: {base, tuned, tie, both_wrong, split: graded questions}.
    win_rate: the share of tuned among the decided pairs, with its exact (Clopper-Pearson) interval at
    evaluation.confidence_level; p: the exact two-sided p against a fair coin. Both are None if no pair is decided.
    graders: {name: {verdict: how often}}. stale: the number of judgments of answers that have changed since, which do not
    count."""

    of: int
    counts: Mapping[str, int]
    win_rate: Estimate | None
    p: float | None
    graders: Mapping[str, Mapping[Verdict, int]]
    kappas: Sequence[Kappa]
    stale: int

    @property
    def n(self) -> int:
        """Return how many questions were graded."""
        return sum(self.counts.values())


def summarize_grades(run: Run) -> GradingResult | None:
    """Return how often the tuned model's answer was judged better; None if nothing is graded.

    Raises RunError or GradingError as `read_pairs` does."""
    if not (grades := read_grades(run)):
        return None
    pairs = read_pairs(run)
    latest, stale = latest_grades(pairs, grades)
    seen = contaminated(run.read("data_report"))
    scored = [pair.id for pair in pairs if pair.question["scored"] and pair.id not in seen]
    by_grader: dict[str, dict[str, Verdict]] = {}
    for (grader, name), grade in latest.items():
        if name in scored:
            by_grader.setdefault(grader, {})[name] = grade.verdict
    if not by_grader and not stale:
        return None
    counts = _count_verdicts(scored, list(by_grader.values()))
    win_rate, p = _estimate_win_rate(counts["tuned"], counts["base"], run.config.evaluation.confidence_level)
    tallies = {grader: dict(Counter(verdicts.values())) for grader, verdicts in by_grader.items()}
    return GradingResult(len(scored), counts, win_rate, p, tallies, _kappas(scored, by_grader), stale)


def _count_verdicts(scored: Sequence[str], by_grader: Sequence[Mapping[str, Verdict]]) -> dict[str, int]:
    counts = dict.fromkeys([*get_args(Verdict), "split"], 0)
    for name in scored:
        votes = Counter(verdicts[name] for verdicts in by_grader if name in verdicts).most_common()
        if votes:
            counts["split" if len(votes) > 1 and votes[0][1] == votes[1][1] else votes[0][0]] += 1
    return counts


def _estimate_win_rate(won: int, lost: int, confidence_level: float) -> tuple[Estimate | None, float | None]:
    from scipy.stats import binomtest

    if not won + lost:
        return None, None
    test = binomtest(won, won + lost)
    low, high = test.proportion_ci(confidence_level, method="exact")
    return {"value": won / (won + lost), "low": float(low), "high": float(high), "n": won + lost}, float(test.pvalue)


def _kappas(scored: Sequence[str], by_grader: Mapping[str, Mapping[str, Verdict]]) -> list[Kappa]:
    kappas = []
    for graders in itertools.combinations(sorted(by_grader), 2):
        one, other = (by_grader[grader] for grader in graders)
        if both := [name for name in scored if name in one and name in other]:
            value = cohen_kappa([one[name] for name in both], [other[name] for name in both])
            kappas.append(Kappa(graders, value, len(both)))
    return kappas


def describe_grades(result: GradingResult | None) -> str:
    """Return the result of `summarize_grades` as text, one fact per line."""
    if result is None:
        return "nothing is graded yet"
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in result.counts.items())
    lines = [f"{result.n} of {result.of} scored questions graded by {', '.join(result.graders) or 'nobody'}: {counts}"]
    if result.win_rate:
        share = f"{format_interval(result.win_rate)} of {result.win_rate['n']} decided pairs"
        lines.append(f"tuned judged better in {share} (Clopper-Pearson interval), p = {result.p:.2g}")
    for kappa in result.kappas:
        value = "undefined" if kappa.value is None else f"{kappa.value:.2f}"
        lines.append(f"Cohen's kappa of {' and '.join(kappa.graders)}: {value}, on {kappa.n} questions that both graded")
    if result.stale:
        lines.append(f"not counted: {result.stale} judgment(s) of answers that have changed since")
    return "\n".join(lines)
