"""Measure the merged model: its answers to the run's questions, and its loss on all held-out rows."""

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
    """Load the merged model from its files, once for all of notebook 07, and return (model, tokenizer).

    If the model does not fit in memory and its loss is measured, the loss is computed first, layer by layer, because the loaded
    model leaves too little memory for that."""
    import torch

    folder, dtype = run.require("merged"), find_check_dtype(run)
    if run.wants("merged_loss") and not fits_in_memory(count_weight_bytes(folder, dtype)):
        _get_losses(run, lambda *what: layerwise_losses(folder, dtype, *what))
    model, tokenizer = load_unquantized(folder, dtype)
    if not torch.cuda.is_available():
        from medcot_utils.models.plain_weights import use_grouped_decode

        use_grouped_decode(model)  # the other models answer this way on a CPU too
    return model.eval(), tokenizer


def measure_merged(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> MergedMeasured | None:
    """Measure the merged model's greedy answers and its loss on all held-out rows, and compare both with the tuned model's.

    This makes the artifacts merged_answers, merged_loss, and merged_metrics. Return None if evaluation.measure_merged is false.
    By default, a model that fits on the GPUs is asked all questions, and any other model none. evaluation.merged_questions sets
    another number. Raises GenerationError and TimeBudgetReached as `answer_questions` does."""
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
    # A model that is spread over GPUs has no slots. In 4 bits it was on one, so the setting may ask for slots.
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    generation = config.generation.model_copy(update={"cache_implementation": "dynamic"} if spread else {})
    return answer_questions(
        model,
        tokenizer,
        questions,
        generation,
        config.prompt.newline_after_think,
        config.seed,
        answer_tokens=config.evaluation.answer_tokens,
        journal=run.journal("merged_answers"),
    )


def _choose_questions(run: Run, model: PreTrainedModel) -> list[Question]:
    """Return the questions for the merged model: all of the run's questions, or the first scored ones."""
    questions, limit = run.read("questions"), run.config.evaluation.merged_questions
    if limit is None:
        return questions if is_held(model) else []
    return [question for question in questions if question["scored"]][:limit]


def is_held(model: PreTrainedModel) -> bool:
    """Return whether all weights of a loaded model are on its device, so that none must be copied from RAM to a GPU."""
    return "cpu" not in getattr(model, "hf_device_map", {}).values()


def _why_not_asked(run: Run) -> str:
    if run.config.evaluation.merged_questions == 0:
        return "evaluation.merged_questions is 0"
    weights = count_weight_bytes(run.require("merged"), find_check_dtype(run))
    return f"needs {gib_needed(weights):.1f} GiB of GPU memory"


def _compare(run: Run, answers: Sequence[AnswerRecord], losses: Sequence[RowLoss], why_not: str | None) -> MergedMeasured:
    """Compare both models on the questions and rows that count, which no training row repeats."""
    scored = evaluation.score_merged(run.read("questions"), run.read("tuned_answers"), answers, run.read("data_report"))
    tuned = [record for record in run.read("held_out_loss") if record["model"] == "tuned"]
    counted = [record for record in [*tuned, *losses] if record["id"] not in scored.repeated_by]
    return evaluation.compare_merged(scored.counted, counted, run.config.evaluation, run.config.seed, why_not)
