"""The merged model measured: it is asked the run's questions, and its loss is taken on all held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from medcot_utils import evaluation
from medcot_utils.export.merged import find_check_dtype
from medcot_utils.models.generation import answer_questions
from medcot_utils.models.layerwise import layerwise_losses
from medcot_utils.models.losses import RowLoss, row_losses
from medcot_utils.models.merging import load_unquantized
from medcot_utils.models.placement import count_weight_bytes, fits_in_memory, gib_needed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from medcot_utils.data.rows import Question
    from medcot_utils.evaluation.merged import MergedMeasured
    from medcot_utils.models.records import AnswerRecord
    from medcot_utils.run.directory import Run


def open_merged(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model, tokenizer) of the merged model, loaded from its files: once for all of notebook 07.

    If it is measured and memory does not hold it, its loss is taken before that, layer by layer: what is loaded of it takes
    the room that this needs."""
    import torch

    folder, dtype = run.require("merged"), find_check_dtype(run)
    if run.wants("merged_loss") and not fits_in_memory(count_weight_bytes(folder, dtype)):
        _get_losses(run, lambda *what: layerwise_losses(folder, dtype, *what))
    model, tokenizer = load_unquantized(folder, dtype)
    if not torch.cuda.is_available():
        from medcot_utils.models.plain_weights import use_grouped_decode

        use_grouped_decode(model)  # as the other models answer on a CPU
    return model.eval(), tokenizer


def measure_merged(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> MergedMeasured | None:
    """Ask the merged model the run's questions, greedily, take its loss on all held-out rows, and compare both with the tuned
    model's: the artifacts merged_answers, merged_loss and merged_metrics. Return None if evaluation.measure_merged is off.

    A model that the GPUs hold is asked all questions, another one none, unless evaluation.merged_questions says how many."""
    if not run.wants("merged_metrics"):
        return None
    losses = _get_losses(run, lambda *what: row_losses(model, *what))
    answers = run.get_or_make("merged_answers", lambda: _answer(run, model, tokenizer))
    why_not = None if answers else _why_not_asked(run)
    return run.get_or_make("merged_metrics", lambda: _compare(run, answers, losses, why_not))


def _get_losses(run: Run, take: Callable[..., list[RowLoss]]) -> list[RowLoss]:
    batch_size = run.config.training.per_device_eval_batch_size
    return run.get_or_make("merged_loss", lambda: take(run.read("held_out_rows"), batch_size, "merged"))


def _answer(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[AnswerRecord]:
    config, questions = run.config, _choose_questions(run, model)
    if not questions:
        return []
    return answer_questions(
        model,
        tokenizer,
        questions,
        config.generation,
        config.prompt.newline_after_think,
        config.seed,
        answer_tokens=config.evaluation.answer_tokens,
        journal=run.journal("merged_answers"),
    )


def _choose_questions(run: Run, model: PreTrainedModel) -> list[Question]:
    """Return what the merged model is asked: all of the run's questions, or the first scored ones."""
    questions, limit = run.read("questions"), run.config.evaluation.merged_questions
    if limit is None:
        return questions if is_held(model) else []
    return [question for question in questions if question["scored"]][:limit]


def is_held(model: PreTrainedModel) -> bool:
    """Return whether no weight of a loaded model waits in RAM for its turn on a GPU."""
    return "cpu" not in getattr(model, "hf_device_map", {}).values()


def _why_not_asked(run: Run) -> str:
    if run.config.evaluation.merged_questions == 0:
        return "evaluation.merged_questions is 0"
    weights = count_weight_bytes(run.require("merged"), find_check_dtype(run))
    return f"needs {gib_needed(weights):.1f} GiB of GPU memory"


def _compare(run: Run, answers: Sequence[AnswerRecord], losses: Sequence[RowLoss], why_not: str | None) -> MergedMeasured:
    """Compare on the questions and rows that count: no training row repeats them."""
    scored = evaluation.score_merged(run.read("questions"), run.read("tuned_answers"), answers, run.read("data_report"))
    tuned = [record for record in run.read("held_out_loss") if record["model"] == "tuned"]
    counted = [record for record in [*tuned, *losses] if record["id"] not in scored.repeated_by]
    return evaluation.compare_merged(scored.counted, counted, run.config.evaluation, run.config.seed, why_not)
