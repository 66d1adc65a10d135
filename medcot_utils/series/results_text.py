"""The demo's parts of the README and docs/results.md: tables, and sentences that depend on the verdicts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medcot_utils.evaluation.claims import CANNOT_TELL, CLAIMS, DOES_NOT, HOLDS
from medcot_utils.evaluation.comparison import metric_lines, verdict
from medcot_utils.evaluation.decisions import SMALLEST
from medcot_utils.evaluation.headline import headline_rows
from medcot_utils.evaluation.intervals import format_interval, is_clear
from medcot_utils.evaluation.merged import AS_MEASURED
from medcot_utils.evaluation.merged import LABELS as MERGED_LABELS
from medcot_utils.evaluation.metrics import METRICS
from medcot_utils.machine.paths import GIB

if TYPE_CHECKING:
    from medcot_utils.evaluation.comparison import ComparedMetric, MetricLine, Metrics
    from medcot_utils.evaluation.mcq.readings import McqReading
    from medcot_utils.series.results import Demo

DIFFERS = "differs between machines"
_WIDTH = 140
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_READINGS = {"as they answer": "metrics", "forced closing": "forced"}
_MERGED_INTO = {"base_16bit": "the 16-bit base", "dequantized_4bit": "the unpacked 4-bit weights"}


@dataclass(frozen=True)
class _Text:
    """Hold a run's numbers, and the keys of the verdicts that differ between machines."""

    demo: Demo
    differing: Collection[str]

    def metrics(self, reading: str) -> Metrics:
        """Return the metrics of a reading; an empty dict if it was not measured."""
        return self.demo["metrics"].get(_READINGS[reading]) or {}

    def verdict(self, key: str, text: str) -> str:
        """Return a verdict, or the words that say it differs between machines."""
        return DIFFERS if key in self.differing else text

    def change(self, reading: str, name: str, unit: str = "") -> str:
        """Return how a metric changed as the end of a sentence, as in `rose from 0.00 to 1.00`."""
        metric = self.metrics(reading).get(name)
        if metric is None:
            return "was not measured"
        base, tuned = (format_interval({**metric[side], "low": None}) + unit for side in ("base", "tuned"))
        if f"{reading}/{name}" in self.differing:
            return f"went from {base} to {tuned} (the verdict {DIFFERS})"
        said = verdict(name, metric)
        if said.startswith(("rose", "fell")):
            return f"{said.split(',')[0]} from {base} to {tuned}"
        return f"shows no difference ({base} and {tuned})" if said.startswith("no difference") else f"cannot be compared ({said})"


def write_parts(demo: Demo, differing: Collection[str]) -> dict[str, str]:
    """Return {name: Markdown} of every part of the documents.

    Args:
        differing: what `results.differing` returns; these verdicts become `differs between machines`."""
    text = _Text(demo, differing)
    writers: dict[str, Callable[[_Text], str]] = {
        "caption": _caption,
        "time": _time,
        "table": _readme_table,
        "conditions": _conditions,
        "loss": _loss,
        "answers": _answers,
        "choice": _choice,
        "merged": _merged,
        "claims": _claims,
        "amounts": _amounts,
        "conclusions": _conclusions,
    }
    return {name: write(text) for name, write in writers.items()}


# --- README ------------------------------------------------------------------------------------------------------------


def _caption(text: _Text) -> str:
    steps, n_questions = text.demo["plan"]["steps"], text.demo["metrics"]["n_questions"]
    begin = f"The demo: SmolLM2-135M-Instruct in 4 bits, {steps} training steps, {n_questions} held-out questions (`make demo`)."
    end = "No number here shows whether the medicine in an answer is right. Read the answers."
    return _filled(f"*{' '.join([begin, *_findings(text), end])}*")


def _findings(text: _Text) -> list[str]:
    """Return one sentence each on form, similarity, loss, and merged model."""
    found = [f"The share of greedy answers that close their thinking {text.change('as they answer', 'closed_think_rate')}."]
    if text.metrics("forced closing"):
        rouge, chrf = (text.change("forced closing", name) for name in ("rouge_l", "chrf"))
        found.append(f"With unclosed thinking closed for both models, ROUGE-L against the references {rouge}, and chrF {chrf}.")
    return [*found, *_of_loss(text)[:1], *_of_merged(text)]


def _of_loss(text: _Text) -> list[str]:
    losses = text.demo["metrics"].get("losses")
    if losses is None:
        return []
    if losses["share"] is None:
        return ["The held-out loss did not fall clearly."]
    value = losses["share"]["value"]
    share = "None" if value <= 0 else "All" if value >= 1 else f"{100 * value:.0f} %"
    rounding = f"{share} of the fall of the held-out loss only makes up for the cost of rounding the base to 4 bits."
    learning = losses["learning"]
    if not is_clear(learning):
        return [rounding, "No difference from the 16-bit base's loss is shown."]
    side = "below" if learning["value"] < 0 else "above"
    return [rounding, f"The tuned model's loss is {abs(learning['value']):.2f} {side} the 16-bit base's."]


def _of_merged(text: _Text) -> list[str]:
    merged = text.demo["merged"]
    if merged is None:
        return []
    if any(f"merged model/{one['metric']}" in text.differing for one in merged["verdicts"]):
        return [f"The verdict on the merged model, which people load, {DIFFERS}."]
    if merged["behaves"] == "yes":
        return ["The merged model, which people load, behaves as measured."]
    if merged["behaves"] == "no":
        return ["The merged model, which people load, does not behave as measured."]
    shown: dict[str, bool] = {}
    for one in merged["verdicts"]:
        shown[one["about"]] = shown.get(one["about"], True) and one["verdict"] == AS_MEASURED
    alike, open_ = (", ".join(about for about in shown if shown[about] is wanted) for wanted in (True, False))
    unknown = f"{merged['n_questions']} questions cannot show whether the merged model, which people load, behaves as measured"
    return [f"{unknown} in {open_}" + (f"; in {alike.replace(', ', ' and ')} it does." if alike else ".")]


def _time(text: _Text) -> str:
    minutes, machine = sum(text.demo["seconds"].values()) / 60, text.demo["machine"]
    memory = f"{text.demo['peak_memory_mb'] * 1e6 / GIB:.1f} GiB"
    return _filled(
        f"`make demo` took {minutes:.0f} minutes on {_count(machine['cores'])} CPU cores ({machine['processor']}) and at most "
        f"{memory} per notebook, after the install."
    )


def _readme_table(text: _Text) -> str:
    rows = []
    for row in headline_rows(text.demo["metrics"]):
        said = text.verdict(f"{row.reading}/{row.name}", verdict(row.name, row.compared))
        rows.append((row.label, f"{_arrow(row.compared)}: {said}"))
    return _table(["demo", "base → tuned", "made by"], [(*row, "`make demo`") for row in rows])


def _choice_key(one: McqReading) -> str:
    return f"multiple choice/{one['task']}/{one['reading']}"


def _arrow(metric: ComparedMetric) -> str:
    base, tuned = (format_interval({**metric[side], "low": None}) for side in ("base", "tuned"))
    return f"{base} → {tuned}, difference {format_interval(metric['difference'])}"


# --- docs/results.md ---------------------------------------------------------------------------------------------------


def _conditions(text: _Text) -> str:
    settings, machine, plan = text.demo["settings"], text.demo["machine"], text.demo["plan"]
    closing = f", and of at most {settings['answer_tokens']} more with forced closing" if settings["answer_tokens"] else ""
    loss = text.metrics("as they answer").get("eval_loss")
    rows = f" The loss is over {loss['base']['n']} held-out rows." if loss else ""
    n_questions = text.demo["metrics"]["n_questions"]
    return _filled(
        f"A run of the demo made these numbers at commit `{text.demo['commit']}`, on {_count(machine['cores'])} CPU cores "
        f"({machine['processor']}): {plan['rows']} training rows, {plan['steps']} steps of {plan['effective_batch']} rows, "
        f"{n_questions} scored questions, answers of at most {settings['max_new_tokens']} tokens{closing}."
        f"{rows} Intervals are at {100 * settings['confidence_level']:g} %. [demo.json](demo.json) holds them all."
    )


def _loss(text: _Text) -> str:
    losses = text.demo["metrics"].get("losses")
    if losses is None:
        return "The 16-bit base's loss was not taken."
    rows = [
        ("16-bit base", format_interval(losses["base_16bit"])),
        ("4-bit base", format_interval(losses["base"])),
        ("tuned", format_interval(losses["tuned"])),
        ("4-bit base minus 16-bit base: what rounding cost", format_interval(losses["rounding"])),
        ("tuned minus 16-bit base: what was learned beyond that", format_interval(losses["learning"])),
    ]
    if (merged := text.demo["merged"]) and "eval_loss" in merged["metrics"]:
        rows.insert(3, ("merged", format_interval(merged["metrics"]["eval_loss"]["tuned"])))
    return _table(["held-out loss", "nats per trained token"], rows) + "\n\n" + _filled(" ".join(_of_loss(text)))


def _answers(text: _Text) -> str:
    natural, forced = (metric_lines(text.metrics(reading)) for reading in _READINGS)
    head = ["metric", "base", "tuned", "difference", "verdict"]
    if forced:
        head += ["forced: base", "forced: tuned", "forced: difference", "forced: verdict"]
    rows = [
        (METRICS[name].label, *_cells(text, "as they answer", name, natural), *_cells(text, "forced closing", name, forced))
        for name in METRICS
        if (name in natural or name in forced) and not name.startswith("mcq")
    ]
    return _table(head, [row[: len(head)] for row in rows])


def _cells(text: _Text, reading: str, name: str, lines: Mapping[str, MetricLine]) -> tuple[str, ...]:
    if name not in lines:
        return ("",) * 4
    line = lines[name]
    return line.base, line.tuned, line.difference, text.verdict(f"{reading}/{name}", line.verdict)


def _choice(text: _Text) -> str:
    rows = []
    for one in text.demo["metrics"].get("mcq_readings", []):
        sides = [
            f"{format_interval(side)}, {'none read' if side['p'] is None else 'p = ' + format(side['p'], '.3f')}"
            + (f", {side['abstained']} abstained" if side["abstained"] else "")
            for side in (one["base"], one["tuned"])
        ]
        said = text.verdict(_choice_key(one), verdict("mcq_accuracy", one))
        difference = f"{format_interval(one['difference'])}, p = {one['difference'].get('p', 1):.3f}"
        rows.append((one["reading"], one["measures"], str(one["n"]), f"{one['chance']:.2f}", *sides, difference, said))
    if not rows:
        return "No multiple-choice question was asked."
    head = ["reading", "what it measures", "questions", "chance", "base right", "tuned right", "difference", "verdict"]
    return _table(head, rows)


def _merged(text: _Text) -> str:
    merged = text.demo["merged"]
    if merged is None:
        return "The merged model was not measured."
    into = f"The adapter was merged into {_MERGED_INTO[text.demo['settings']['merge_into']]}. "
    unasked = f" Its answers were not measured: {merged['not_measured']}." if merged["not_measured"] else ""
    lines = metric_lines(merged["metrics"], MERGED_LABELS)
    rows = [(line.metric.label, line.base, line.tuned, line.difference, line.verdict) for line in lines.values()]
    judged = [
        f"- {one['about']}, by {METRICS[one['metric']].text}: {text.verdict('merged model/' + one['metric'], one['verdict'])}"
        for one in merged["verdicts"]
    ]
    head = ["metric", "tuned, as measured", "merged", "difference", "verdict"]
    return "\n\n".join([_filled(into + _of_merged(text)[0] + unasked), "\n".join(judged), _table(head, rows)])


def _claims(text: _Text) -> str:
    rows = [
        (claim["claim"], claim["result"], text.verdict(f"claim/{claim['claim']}", claim["verdict"]))
        for claim in text.demo["metrics"]["claims"]
    ]
    return _table(["claim", "base to tuned", "verdict"], rows)


def _amounts(text: _Text) -> str:
    claimed = {name for claim in CLAIMS for name in claim.expected}
    merged = text.demo["merged"]
    margins = {one["metric"]: one["margin"] for one in merged["verdicts"] if one["margin"]} if merged else {}
    rows = [
        (
            METRICS[name].label,
            f"{SMALLEST[name]:g}" if name in claimed else "",
            f"{margins[name]:.2g}" if name in margins else "",
        )
        for name in METRICS
        if name in claimed or name in margins
    ]
    return _table(["metric", "claims", "merged model"], rows)


def _conclusions(text: _Text) -> str:
    claims = text.demo["metrics"]["claims"]
    verdicts = [text.verdict(f"claim/{claim['claim']}", claim["verdict"]) for claim in claims]
    counts = {kind: sum(one.startswith(kind) for one in verdicts) for kind in (HOLDS, DOES_NOT, CANNOT_TELL, DIFFERS)}
    said = {
        HOLDS: "{} hold{s}",
        DOES_NOT: "{} do{es} not hold",
        CANNOT_TELL: "{} cannot be decided with these questions",
        DIFFERS: "the verdict on {} differs between machines",
    }
    parts = [said[kind].format(_count(n), s="s" * (n == 1), es="es" * (n == 1)) for kind, n in counts.items() if n]
    on_claims = f"The article makes {_count(len(claims))} claims: {_listed(parts)}."
    return "\n".join(f"- {sentence}" for sentence in [*_findings(text), on_claims])


# --- Markdown ----------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _count(n: int) -> str:
    return _NUMBERS[n] if n < len(_NUMBERS) else str(n)


def _listed(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])}, and {parts[-1]}" if len(parts) > 2 else " and ".join(parts)
