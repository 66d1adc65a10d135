"""Count the decoding steps for 100 answers of mixed length, as on a T4: float16, 4 bits, 14.5 GiB.

A model of random weights never ends an answer. Here it does, because the output weights of the end token are doubled. `run.py`
calls this for this checkout and for another one."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from run import REHEARSAL

ANSWERS = 100
END_FACTOR = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="a .jsonl file with Question")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--set", action="append", default=[], help="a further setting")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from medcot_utils.config import load_config
    from medcot_utils.models.engine import get_engine

    settings = [*REHEARSAL, f"model.name={options.model}", f"generation.max_new_tokens={options.max_new_tokens}", *options.set]
    config = load_config("article", settings)
    engine = get_engine(config.model, fast_answers=True)
    import torch

    from medcot_utils.models.generation import answer_questions

    model, tokenizer = engine.load(config.model)
    model = engine.for_inference(model)
    head, rows_at_once = model.get_output_embeddings(), []
    with torch.no_grad():
        head.weight[tokenizer.eos_token_id] *= END_FACTOR

    def note_rows(layer, given, logits) -> None:
        rows_at_once.append(logits.shape[0])

    head.register_forward_hook(note_rows)  # it does not see the steps that a recorded graph repeats
    replay, replays = torch.cuda.CUDAGraph.replay, []
    torch.cuda.CUDAGraph.replay = lambda graph: (replays.append(1), replay(graph))
    with Path(options.rows).open(encoding="utf-8") as lines:
        questions = [{"id": str(i), "Question": json.loads(line)["Question"]} for i, line in enumerate(lines)][:ANSWERS]
    began = time.perf_counter()
    records = answer_questions(model, tokenizer, questions, config.generation, False, config.seed)
    seconds, lengths = time.perf_counter() - began, sorted(record["completion_tokens"] for record in records)
    result = {
        "answers": len(records),
        "tokens": sum(lengths),
        "shortest, median, longest": [lengths[0], lengths[len(lengths) // 2], lengths[-1]],
        "rows_at_once": max(rows_at_once),
        "decoding_steps": len(rows_at_once) + len(replays),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(sum(lengths) / seconds, 1),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }
    options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
