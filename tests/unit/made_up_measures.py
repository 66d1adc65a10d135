"""Metrics of the shape that notebooks 06 and 07 record, with everything measured, made up without a model."""

from __future__ import annotations

from medcot_utils.evaluation.metrics import METRICS
from medcot_utils.run.artifacts import STEPS

# {metric: (base, tuned, half of the interval)}, as a small model's demo might give them.
NATURAL = {
    "eval_loss": (3.99, 3.18, 0.11),
    "perplexity": (54.3, 24.1, 6.0),
    "closed_think_rate": (0.0, 1.0, 0.13),
    "finished_rate": (0.33, 1.0, 0.18),
    "answered_rate": (0.0, 1.0, 0.13),
    "thinking_tokens": (198.0, 82.0, 30.0),
    "thinking_words": (117.0, 61.0, 33.0),
    "answer_tokens": (0.0, 36.0, 5.0),
    "answer_words": (0.0, 26.0, 4.0),
    "completion_words": (117.0, 87.0, 33.0),
    "bullet_rate": (0.17, 0.0, 0.15),
    "one_paragraph_rate": (0.33, 1.0, 0.17),
    "rouge_l": (0.0, 0.16, 0.03),
    "chrf": (0.0, 0.23, 0.03),
    "mcq_accuracy": (0.0, 0.0, 0.16),
    "mcq_letter": (0.25, 0.28, 0.11),
    "mcq_likelihood": (0.40, 0.38, 0.12),
}
FORCED = {
    name: value
    for name, value in NATURAL.items()
    if name not in ("eval_loss", "perplexity", "mcq_accuracy", "mcq_letter", "mcq_likelihood")
} | {
    "answered_rate": (1.0, 1.0, 0.13),
    "answer_tokens": (71.0, 36.0, 9.0),
    "answer_words": (52.0, 26.0, 9.0),
    "completion_words": (169.0, 87.0, 33.0),
    "one_paragraph_rate": (0.08, 1.0, 0.15),
    "rouge_l": (0.13, 0.16, 0.035),
    "chrf": (0.27, 0.23, 0.04),
}
N = {"eval_loss": 40, "perplexity": 40, "mcq_accuracy": 20, "mcq_letter": 60, "mcq_likelihood": 60}


MERGED = {
    "eval_loss": (3.18, 3.06, 0.11),
    "perplexity": (24.1, 21.3, 6.0),
    "closed_think_rate": (1.0, 0.71, 0.17),
    "finished_rate": (1.0, 0.88, 0.15),
    "answered_rate": (1.0, 0.92, 0.12),
    "thinking_tokens": (82.0, 121.0, 25.0),
    "answer_tokens": (36.0, 34.0, 5.0),
    "bullet_rate": (0.0, 0.0, 0.13),
    "one_paragraph_rate": (1.0, 1.0, 0.13),
    "rouge_l": (0.16, 0.15, 0.03),
    "chrf": (0.23, 0.22, 0.03),
}


def estimate(value, half, n=24):
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def metric(base, tuned, half, n=24):
    """A metric of two models. Whether it differs is clear if half of the interval is less than the difference."""
    difference = estimate(tuned - base, half, n) | {"needed": 30 if tuned != base else None, "spread": half}
    return {"base": estimate(base, half, n), "tuned": estimate(tuned, half, n), "difference": difference}


def metrics(values):
    return {name: metric(*value, N.get(name, 24)) for name, value in values.items()}


def reading(name, base, tuned, n, abstained=0):
    sides = {
        side: estimate(value, 0.12, n) | {"p": 0.5 if abstained < n else None, "abstained": abstained}
        for side, value in (("base", base), ("tuned", tuned))
    }
    difference = estimate(tuned - base, 0.15, n) | {"p": 0.8, "alpha": 0.05, "changed": 0.2, "needed": 900}
    return (
        {"task": "shipped", "reading": name, "measures": f"what {name} reads", "n": n, "chance": 0.25}
        | sides
        | {"difference": difference}
    )


def measured():
    """The content of metrics.json but its claims, of a run with every setting that measures more."""
    natural = metrics(NATURAL)
    natural["thinking_tokens"]["cut"] = {"base": 16, "tuned": 0, "answers": 24}
    return {
        "n_questions": 24,
        "metrics": natural,
        "forced": metrics(FORCED),
        "notes": [],
        "n_samples": 0,
        "sampled": None,
        "n_answered": 0,
        "answered": {},
        "n_contaminated": 0,
        "contaminated": None,
        "losses": {
            "base_16bit": estimate(3.6, 0.1, 40),
            "base": estimate(3.99, 0.11, 40),
            "tuned": estimate(3.18, 0.11, 40),
            "rounding": estimate(0.39, 0.04, 40) | {"needed": 6, "spread": 0.1},
            "learning": estimate(-0.42, 0.04, 40) | {"needed": 6, "spread": 0.1},
            "share": estimate(0.48, 0.04, 40),
        },
        "mcq_readings": [
            reading("strict", 0.0, 0.0, 20, abstained=20),
            reading("letter", 0.25, 0.28, 60),
            reading("likelihood", 0.4, 0.38, 60),
        ],
    }


def claims():
    """A claim of each kind of verdict."""
    kinds = {
        "A": ("holds with 40 rows", None),
        "B": ("does not hold with 24 questions, forced closing: the length went the other way", None),
        "C": ("can't tell with 24 questions: about 90 would tell", 90),
    }
    more = {"tested_by": "the loss", "result": "2.00 to 1.50", "reading": "held-out rows", "n": 24}
    return [
        {"claim": f"Claim {name}", "verdict": verdict, "needed": needed, "answered_result": "none beside"} | more
        for name, (verdict, needed) in kinds.items()
    ]


def merged(not_measured=None):
    """The content of merged_metrics.json."""
    found = metrics(MERGED)
    if not_measured:
        found = {"eval_loss": found["eval_loss"]}
    verdicts = [
        {"about": "form", "metric": "closed_think_rate", "verdict": "differs: fell, worse", "margin": 0.1, "n": 24},
        {"about": "loss", "metric": "eval_loss", "verdict": "behaves as measured", "margin": 0.01, "n": 40},
    ]
    return {
        "n_questions": 0 if not_measured else 24,
        "metrics": found,
        "same_answers": 0,
        "not_measured": not_measured,
        "verdicts": [one | {"needed": None} for one in verdicts],
        "behaves": "no",
        "summary": "Does the merged model behave as measured? Form: no, fewer answers close their thinking. Loss: yes.",
    }


def demo():
    """The content of docs/demo.json."""
    found = measured()
    known = {reading: {name: one for name, one in found[reading].items() if name in METRICS} for reading in ("metrics", "forced")}
    return {
        "commit": "0123456789ab",
        "machine": {"processor": "x86_64 with AVX2", "cores": 2},
        "seconds": {name: 60.0 for name in STEPS},
        "peak_memory_mb": 2560,
        "settings": {"max_new_tokens": 256, "answer_tokens": 96, "confidence_level": 0.95, "merge_into": "base_16bit"},
        "plan": {"rows": 120, "steps": 30, "effective_batch": 4},
        "metrics": found | known | {"claims": claims()},
        "merged": merged(),
    }
