"""Compare answers on one GPU and on all: the project's own call with the same questions, in seconds, and whether records agree.

    python benchmarks/gpus.py --model PATH --rows FILE --out benchmarks/results/NAME-gpus.json

The settings are those of a T4: float16, 14.5 GiB, 16 rows per batch. The time to load the other GPUs' processes is separate."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from run import REHEARSAL, environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or Hub id; benchmarks/make_random_8b.py makes one")
    parser.add_argument("--rows", required=True, help="a .jsonl file with Question")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], help="a setting that overrides those of profile article and a T4")
    options = parser.parse_args()
    from medcot_utils.config import load_config
    from medcot_utils.models.engine import get_engine

    settings = [*REHEARSAL, f"model.name={options.model}", f"generation.batch_size={options.batch_size}"]
    config = load_config("article", [*settings, f"generation.max_new_tokens={options.max_new_tokens}", *options.set])
    engine = get_engine(config.model, fast_answers=True)
    from medcot_utils.models.generation import answer_questions
    from medcot_utils.models.other_gpus import OtherGpus

    with Path(options.rows).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    questions = [{"id": str(i), "Question": rows[i % len(rows)]["Question"]} for i in range(options.answers)]
    began = time.perf_counter()
    model, tokenizer = engine.load(config.model)
    model = engine.for_inference(model)
    found: dict[str, Any] = {"environment": environment(), "settings": settings, "answers": options.answers}
    found["seconds_to_load_here"] = round(time.perf_counter() - began, 1)

    def answer(others: OtherGpus | None = None, asked: list[dict[str, str]] = questions) -> tuple[float, list[Any]]:
        began = time.perf_counter()
        records = answer_questions(model, tokenizer, asked, config.generation, False, config.seed, others=others)
        return round(time.perf_counter() - began, 2), [{**record, "seconds": None} for record in records]

    answer(asked=questions[: options.batch_size])  # the first call compiles
    found["seconds_on_one"], expected = answer()
    others = OtherGpus(engine, config.model)
    found["gpus"] = 1 + others.count_for(-(-options.answers // options.batch_size))
    began = time.perf_counter()
    for worker in others._start(found["gpus"] - 1):
        worker._connection.poll(None)  # a notebook would answer meanwhile
    found["seconds_until_others_are_loaded"] = round(time.perf_counter() - began, 1)
    # The first call compiles.
    found["seconds_of_their_first_call"], _ = answer(others, questions[: found["gpus"] * options.batch_size])
    found["seconds_on_all"], again = answer(others)
    others.close()
    found["times_as_fast"] = round(found["seconds_on_one"] / found["seconds_on_all"], 3)
    found["records_equal"] = expected == again
    pairs = zip(expected, again, strict=True)
    found["answers_that_differ"] = sum(one["completion"] != other["completion"] for one, other in pairs)
    found["tokens"] = sum(record["completion_tokens"] for record in again)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if key not in ("environment", "settings")}))


if __name__ == "__main__":
    main()
