"""Count how often the comparison shows a difference that does not exist, between sampled answers of one and the same model.

    python benchmarks/same_model.py RUN [--model base] [--answers SAMPLED.jsonl] [--pairs 200] [--out RESULT.json]

RUN has finished notebook 06 with evaluation.answer_tokens set and evaluation.n_samples of 2 or more; 4 or more are better.
At a confidence level of 95 %, 10 of 200 comparisons are expected for each metric; 19 or more occur once in 150."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medcot_utils.evaluation.comparison import compare
from medcot_utils.evaluation.intervals import is_clear
from medcot_utils.evaluation.scored_set import AnsweredQuestion, force_closing

if TYPE_CHECKING:
    from medcot_utils.config import EvaluationSettings
    from medcot_utils.data.rows import Question
    from medcot_utils.models.records import AnswerRecord


def count_differences(
    questions: Sequence[Question],
    samples: Sequence[Sequence[AnswerRecord]],
    settings: EvaluationSettings,
    pairs: int = 200,
    seed: int = 3407,
) -> dict[str, int]:
    """Return {metric: in how many of `pairs` comparisons it shows a difference}, with forced closing.

    A length counts even if its verdict would be "can't tell" because answers were cut, because only intervals are counted.

    Args:
        samples: for each question, two or more sampled answers of the same model. Each comparison draws two of them at random
            as the answers of base and tuned."""
    generator, shown = np.random.default_rng(seed), Counter()
    for pair in range(pairs):
        drawn = []
        for question, records in zip(questions, samples, strict=True):
            base, tuned = generator.choice(len(records), size=2, replace=False)
            drawn.append(AnsweredQuestion(question, {"base": records[base], "tuned": records[tuned]}, {}))
        metrics = compare(force_closing(drawn) or drawn, [], settings, seed + pair)
        shown.update({name: int(is_clear(metric["difference"])) for name, metric in metrics.items()})
    return dict(shown)


def main() -> None:
    from medcot_utils.run import Run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--model", choices=["base", "tuned"], default="base")
    parser.add_argument("--answers", help="records of sampled answers to the run's questions, instead of the run's own")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--out")
    options = parser.parse_args()
    run = Run.open(options.run)
    if options.answers:
        records = [json.loads(line) for line in Path(options.answers).read_text(encoding="utf-8").splitlines()]
    else:
        records = run.read(f"{options.model}_answers")
    questions = [question for question in run.read("questions") if question["scored"]]
    by_id: dict[str, list[AnswerRecord]] = {}
    for record in records:
        if record["sample"] > 0:  # the greedy answer is not a sample
            by_id.setdefault(record["id"], []).append(record)
    samples = [by_id.get(question["id"], []) for question in questions]
    if min(map(len, samples)) < 2:
        parser.error("two or more sampled answers to each question are needed: set evaluation.n_samples")
    found = count_differences(questions, samples, run.config.evaluation, options.pairs, run.config.seed)
    result = {"questions": len(questions), "samples": min(map(len, samples)), "pairs": options.pairs, "differences": found}
    for name, count in found.items():
        print(f"{name:24} {count:4} of {options.pairs}")
    print(f"most: {max(found.values())} of {options.pairs}")
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
