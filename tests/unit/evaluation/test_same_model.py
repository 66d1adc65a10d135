"""A model compared with itself: independently sampled answers, closing forced, differ as rarely as the level says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from medcot_utils.config import load_config
from medcot_utils.evaluation import metrics
from medcot_utils.evaluation.comparison import compare, is_shown
from medcot_utils.evaluation.scored_set import AnsweredQuestion, force_closing
from medcot_utils.run.artifacts import SHIPPED_CASES

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "same_model.py"
SETTINGS = load_config("smoke").evaluation  # 95 %, 500 resamples
QUESTIONS, SAMPLES, PAIRS = 24, 6, 200
BUDGET = 80  # words of thinking
WORDS = [f"w{i}" for i in range(300)]


@pytest.fixture(scope="module")
def same_model():
    spec = importlib.util.spec_from_file_location("same_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def answers_measured_once(monkeypatch):
    """The same few hundred answers are drawn again and again."""
    measure, known = metrics.measure_answer, {}

    def measured(record, question):
        key = (question["id"], *(record[name] for name in ("thinking", "answer", "closed", "finished", "well_formed")))
        if key not in known:
            known[key] = measure(record, question)
        return known[key]

    monkeypatch.setattr(metrics, "measure_answer", measured)


def questions():
    cases = [json.loads(line) for line in SHIPPED_CASES.read_text(encoding="utf-8").splitlines()[:QUESTIONS]]
    return [{"id": f"q{i}", "Question": case["Question"], "Response": case["Response"]} for i, case in enumerate(cases)]


def pool(asked, seed=5, longer=1.0, listed=1.0):
    """Sampled answers of one model that differ as real ones do: skewed lengths, cut, looped, listed, copied, empty.

    Each question has its own habits. longer, listed: what a shifted model multiplies them by."""
    generator = np.random.default_rng(seed)
    samples = []
    for question in asked:
        length, close, lists, like = generator.lognormal(4, 0.5), *generator.beta(1, 1, size=3)
        samples.append([sampled(generator, question, length * longer, close, lists * listed, like) for _ in range(SAMPLES)])
    return samples


def sampled(generator, question, length, close, lists, like):
    words = max(1, int(generator.lognormal(np.log(length), 0.4)))
    loop = generator.random() < 0.2
    thinking = list(generator.choice(WORDS[: 6 if loop else 300], size=min(words, BUDGET)))
    itself = words < BUDGET and generator.random() < close
    reference = question["Response"].split()
    size = int(generator.lognormal(3, 0.6))
    answer = [reference[i % len(reference)] if generator.random() < like else generator.choice(WORDS) for i in range(size)]
    if generator.random() < 0.3:
        answer = question["Question"].split()[: generator.integers(8, 20)] + answer
    written = " ".join(answer) if generator.random() > lists else "- " + "\n- ".join(answer)
    written = "" if generator.random() < 0.05 else written
    finished = bool(generator.random() < 0.7)
    closed_by = "itself" if itself else "budget" if words >= BUDGET else "end"
    forced = {"closed_by": closed_by, "answer": written, "answer_tokens": len(answer), "finished": finished}
    return {
        "thinking": " ".join(thinking),
        "answer": written if itself else "",
        "completion": " ".join(thinking),
        "thinking_tokens": len(thinking),
        "answer_tokens": len(answer) if itself else 0,
        "closed": int(itself),
        "well_formed": itself and bool(written),
        "finished": finished if itself else closed_by == "end",
        "forced": forced,
    }


@pytest.mark.simulation
def test_200_comparisons_of_a_model_with_itself_show_few_differences(same_model):
    # 10 of 200 are expected at 95 %; 19 or more come up once in 150 metrics. Shares are judged more strictly.
    asked = questions()
    samples = pool(asked)
    found = same_model.count_differences(asked, samples, SETTINGS, PAIRS)
    print(found)
    assert set(found) == {name for name in metrics.METRICS if not name.startswith(("mcq_", "embedding_", "eval_", "perpl"))}
    assert max(found.values()) <= 18
    assert sum(found.values()) > 10, "a comparison that never shows anything would pass too"


def test_a_shifted_model_is_told_from_the_one_it_was_shifted_from():
    asked = questions()
    sides = {"base": pool(asked, listed=0.2), "tuned": pool(asked, seed=6, longer=0.2, listed=2.0)}
    pairs = [
        AnsweredQuestion(question, {model: samples[i][0] for model, samples in sides.items()}, {})
        for i, question in enumerate(asked)
    ]
    found = compare(force_closing(pairs), [], SETTINGS, 7)
    assert found["thinking_words"]["cut"]["base"] > 0 == found["thinking_words"]["cut"]["tuned"]
    assert is_shown("thinking_words", found["thinking_words"]) and found["thinking_words"]["difference"]["value"] < -10
    assert is_shown("bullet_rate", found["bullet_rate"]) and found["bullet_rate"]["difference"]["value"] > 0.2


def test_the_script_prints_how_many_comparisons_show_a_difference(same_model, monkeypatch, capsys, tmp_path):
    asked = [question | {"scored": True} for question in questions()]
    records = [
        record | {"id": question["id"], "sample": k}
        for question, samples in zip(asked, pool(asked), strict=True)
        for k, record in enumerate(samples)
    ]

    class MadeUpRun:
        config = load_config("smoke")

        @classmethod
        def open(cls, folder):
            return cls()

        def read(self, name):
            return {"questions": asked, "base_answers": records}[name]

    monkeypatch.setattr("medcot_utils.run.Run", MadeUpRun)
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["same_model.py", "RUN", "--pairs", "3", "--out", str(out)])
    same_model.main()
    written = json.loads(out.read_text())
    assert (written["questions"], written["samples"], written["pairs"]) == (QUESTIONS, SAMPLES - 1, 3), (
        "the greedy one is no draw"
    )
    assert f"most: {max(written['differences'].values())} of 3" in capsys.readouterr().out
