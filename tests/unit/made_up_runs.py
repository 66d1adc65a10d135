"""Runs made up without a model, up to the export check, and a reader of the pages that are made of them."""

from __future__ import annotations

from html.parser import HTMLParser

import made_up_measures

from medcot_utils import evaluation
from medcot_utils.config import load_config
from medcot_utils.data.prompts import TAG
from medcot_utils.evaluation.metrics import METRICS

_MERGE = "export.merge_into=base_16bit"
# The answers as the models give them by themselves, and no model beside the two.
CONFIG = load_config(
    "smoke",
    ["evaluation.answer_tokens=null", "evaluation.base_16bit_loss=false", "evaluation.measure_merged=false", _MERGE],
)
# Everything that a run can measure.
MORE = load_config(
    "smoke", ["evaluation.answer_tokens=12", "evaluation.base_16bit_loss=true", "evaluation.measure_merged=true", _MERGE]
)
# Closes the page's own script, makes a new one, fetches a picture, leaves an attribute, and ends a line within a script.
ATTACK = (
    """</script><script>alert("x")</script> see <img src="https://evil.example/x.png" onerror='alert(1)'> & "quoted" """
    "'so'\u2028> end"
)
QUESTIONS = [{"id": "article", "scored": False, "specialty": "the article's question", "Question": "Which?", "Response": "This."}]
QUESTIONS += [
    {"id": f"q{i}", "scored": True, "specialty": "cardiology", "Question": f"Which valve, {i} < 9?", "Response": "The mitral."}
    for i in range(4)
]
QUESTIONS = [question | {"Complex_CoT": "The murmur is systolic."} for question in QUESTIONS]
CHECK = {
    "tolerance": 0.05,
    "ok": True,
    "pairs": [
        {"a": "merged", "b": "16-bit base + adapter", "mean_logprob_difference": 0.00123, "same_greedy": 3, "prompts": 3},
        {"a": "merged", "b": "4-bit base + adapter", "mean_logprob_difference": 0.234, "same_greedy": 1, "prompts": 3},
    ],
    "held_out_loss": {"merged": 1.8123, "4-bit base + adapter": 1.9456},
    "held_out_rows": 8,
    "files": [],
}


def answer(question, answer_text, closed, thinking="so & so", sample=0):
    return {
        "id": question["id"],
        "sample": sample,
        "prompt": question["Question"],
        "thinking": TAG.sub("", thinking),
        "answer": TAG.sub("", answer_text),
        "completion": f"{thinking}\n</think>\n{answer_text}" if answer_text else thinking,
        "well_formed": closed,
        "finished": closed,
        "closed": int(closed),
        "thinking_tokens": 7,
        "answer_tokens": 5,
        "completion_tokens": 13,
        "seconds": 0.1,
    }


def choice(label, index, right):
    """An answer as earlier versions recorded it too: with the strict reading alone."""
    question = {"id": f"m{index}", "options": {"A": "Aortic.", "B": "Mitral."}, "answer": "B", "specialty": "cardiology"}
    return {"model": label, "task": "shipped", **question, "correct": right, "abstained": False}


def fill(
    run,
    repeats=(),
    trained_on=(),
    questions=QUESTIONS,
    base=("", False),
    tuned=(ATTACK, True),
    thinking="so & so",
    notes=(),
    loss=1.5,
    rows=1,
):
    """A run's artifacts up to the comparison and the export check, written as the notebooks write them, without a model.

    base, tuned: the answer to every question, and whether its reasoning is closed, or what gives both for a question.
    `trained_on`: ids set apart."""
    from datasets import Dataset

    rows = Dataset.from_list([{"id": f"t{rows}", "Question": "a", "input_ids": [0, 9, 40, 41], "labels": [-100, -100, 40, 41]}])
    run.write("questions", questions)
    base_answers, tuned_answers = (
        [answer(question, *(side(question) if callable(side) else side), thinking) for question in questions]
        + [answer(question, "A sampled one.", True, "hm", sample=1) for question in questions]
        for side in (base, tuned)
    )
    mcq = [[choice(label, index, right) for index in range(8)] for label, right in (("base", False), ("tuned", True))]
    run.write("base_answers", base_answers)
    run.write("base_mcq", mcq[0])
    run.write("train_rows", rows)
    run.write("held_out_rows", rows)
    data_report = {"repeats": list(repeats), "repeats_dropped": not trained_on}
    run.write("data_report", data_report)
    run.write("plan", {"rows": 117, "effective_batch": 4, "steps": 6, "trainable_parameters": 32768, "total_parameters": 10**9})
    run.write("adapter", lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"0" * 1000))
    run.write("training_log", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.75}])
    held_out = [
        {"model": label, "id": f"h{i}", "nll": 10.0 * loss, "tokens": 10}
        for label, loss in (("base", 2.0), ("tuned", loss))
        for i in range(8)
    ]
    run.write("held_out_loss", held_out)
    if run.wants("base_16bit_loss"):
        run.write("base_16bit_loss", [{"model": "base_16bit", "id": f"h{i}", "nll": 18.0, "tokens": 10} for i in range(8)])
    run.write("tuned_answers", tuned_answers)
    run.write("tuned_mcq", mcq[1])

    settings, seed = run.config.evaluation, run.config.seed
    scored = evaluation.score(questions, base_answers, tuned_answers, data_report)
    metrics = evaluation.compare(scored.counted, held_out, settings, seed)
    metrics |= evaluation.mcq.compare_mcq(*mcq, set(), settings)
    sampled = evaluation.compare_sampled(scored.counted, settings, seed)
    answered = evaluation.compare(scored.answered, [], settings, seed)
    measured = evaluation.Measured(
        n_questions=len(scored.counted),
        metrics=metrics,
        claims=evaluation.judge(metrics, answered, sampled, ["t9"] if scored.apart else []),
        notes=list(notes),
        n_samples=1,
        sampled=sampled,
        n_answered=len(scored.answered),
        answered=answered,
        n_contaminated=len(scored.apart),
        contaminated=evaluation.compare(scored.apart, [], settings, seed) or None,
    )
    run.write("metrics", measured)
    run.write("merged", lambda folder: (folder / "model.safetensors").write_bytes(b"0"))
    run.write("export_check", CHECK)
    return run


def retrain(run):
    """Write what notebooks 05 and 06 make of another adapter: the merged model is then that of the adapter before."""
    later = ("training_log", "held_out_loss", "base_16bit_loss", "tuned_answers", "tuned_mcq", "metrics")
    made = {name: run.read(name) for name in later}
    run.write("adapter", lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"1" * 1000))
    for name, value in made.items():
        run.write(name, value)
    return run


class Tags(HTMLParser):
    """The tags of a page, its texts, and every address that a browser would fetch for it."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.attributes, self.ids, self.text, self.scripts = [], [], set(), [], "", ""
        self.options = {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href", "data", "action", "poster")]
        if tag == "select":
            self.options[dict(attrs)["id"]] = []
        elif tag == "option":
            self.options[next(reversed(self.options))].append("")

    def handle_data(self, text):
        if self.tags and self.tags[-1] == "script":
            self.scripts += text
        else:
            self.text += text
        if self.tags and self.tags[-1] == "option":
            self.options[next(reversed(self.options))][-1] += text.strip("\n")


def known(metrics):
    return {name: metric for name, metric in metrics.items() if name in METRICS}


def fill_more(run, base_forced=ATTACK, closed_by="budget", merged=True, not_measured=None):
    """A run with configuration MORE: what `fill` writes, then forced answers, the 16-bit base and the merged model."""
    forced = {"closed_by": closed_by, "answer": base_forced, "answer_tokens": 5, "finished": True}
    fill(run, tuned=("The mitral valve.", True), thinking="A murmur, I think.")
    run.write("base_answers", [record | {"forced": forced} for record in run.read("base_answers")])
    itself = {"closed_by": "itself", "answer": "The mitral valve.", "answer_tokens": 5, "finished": True}
    run.write("tuned_answers", [record | {"forced": itself} for record in run.read("tuned_answers")])
    measured = made_up_measures.measured()
    readings = {reading: known(measured[reading]) for reading in ("metrics", "forced")}
    run.write("metrics", measured | readings | {"claims": made_up_measures.claims()})
    for name in ("merged", "export_check"):
        run.write(name, CHECK if name == "export_check" else lambda folder: (folder / "model.safetensors").write_bytes(b"0"))
    if merged:
        asked = [] if not_measured else [answer(question, "The merged one.", True) for question in QUESTIONS]
        run.write("merged_answers", asked)
        run.write("merged_loss", [{"model": "merged", "id": f"h{i}", "nll": 15.0, "tokens": 10} for i in range(8)])
        run.write("merged_metrics", made_up_measures.merged(not_measured))
    return run
