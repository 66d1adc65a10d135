"""The artifacts of a run, with what each is made from: the one table that decides what is skipped and what is redone."""

from __future__ import annotations

from dataclasses import dataclass

from medcot_utils.config import TrainingSettings
from medcot_utils.machine.paths import PACKAGE

SHIPPED_CASES, SHIPPED_MCQ = PACKAGE / "data" / "cases.jsonl", PACKAGE / "data" / "mcq.jsonl"
PROGRESS = "progress.jsonl"  # beside the checkpoints: what training notes of its steps (training/progress.py)


@dataclass(frozen=True)
class Artifact:
    """One file or folder of a run. Its content depends on `settings` and `inputs` alone."""

    step: str
    file: str
    settings: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    reads_dataset: bool = False
    large: bool = False  # kept on the scratch disk where the platform has one
    version: int = 1  # raised when the code that makes it changes what it means
    when: str | None = None  # made only if this setting is neither None nor false

    @property
    def reads_model(self) -> bool:
        """Whether the base model or its tokenizer is loaded for it."""
        return self.step != SETUP and not {"model", "model.name"}.isdisjoint(self.settings)

    @property
    def asks_mcq(self) -> bool:
        """Whether the multiple-choice questions are asked for it."""
        return self.step != SETUP and "evaluation.mcq_tasks" in self.settings

    @property
    def measures(self) -> bool:
        """Whether answers are measured for it, with the embedding model if there is one."""
        return self.step != SETUP and "evaluation" in self.settings


SETUP, _BASELINE, _DATA, _LORA = "01_setup", "02_baseline_inference", "03_dataset_prep", "04_lora_config"
_TRAINING, _COMPARISON, _EXPORT = "05_training", "06_comparison", "07_export"

_RESULTS = ("profile", "seed", "model", "prompt", "dataset", "lora", "training", "generation", "evaluation", "export")
# The last three change no result, but notebook 01 looks whether they can be used.
_ALL = (*_RESULTS, "hub", "tracking", "secrets")
_ANSWERS = ("model", "prompt", "generation", "evaluation.n_samples", "evaluation.answer_tokens", "seed")
_MCQ = (
    *("model", "prompt", "evaluation.mcq_tasks", "evaluation.mcq_limit", "evaluation.mcq_max_new_tokens"),
    *("evaluation.answer_tokens", "seed"),
)
_MERGED_ANSWERS = ("prompt", "generation", "evaluation.answer_tokens", "evaluation.merged_questions", "export.dtype", "seed")
_TEXT = ("model.name", "model.revision", "model.max_seq_length", "prompt", "dataset", "seed")
# How the work is shared out and when it pauses, which changes no result beyond rounding.
_HOW = {"batch_plan", "padding", "num_processes", "max_hours"}
_CHECK = tuple(f"export.{name}" for name in ("dtype", "logits_tolerance", "check_prompts", "check_rows", "check_new_tokens"))
_LOSS = ("model", "lora", *(f"training.{name}" for name in TrainingSettings.model_fields if name not in _HOW), "seed")

ARTIFACTS: dict[str, Artifact] = {
    "machine": Artifact(SETUP, "machine.json", _ALL),
    "questions": Artifact(
        _BASELINE,
        "questions.jsonl",
        ("model.name", "model.revision", "dataset", "evaluation.num_questions", "seed"),
        reads_dataset=True,
    ),
    "base_answers": Artifact(_BASELINE, "base_answers.jsonl", _ANSWERS, ("questions",)),
    "base_mcq": Artifact(_BASELINE, "base_mcq.jsonl", _MCQ),
    "train_rows": Artifact(_DATA, "train_rows.parquet", _TEXT, ("questions",), reads_dataset=True),
    "held_out_rows": Artifact(_DATA, "held_out_rows.parquet", _TEXT, ("questions",), reads_dataset=True),
    "data_report": Artifact(_DATA, "data_report.json", _TEXT, ("questions",), reads_dataset=True),
    "plan": Artifact(_LORA, "plan.json", _LOSS, ("train_rows",)),
    "adapter": Artifact(_TRAINING, "adapter", _LOSS, ("train_rows", "held_out_rows")),
    "training_log": Artifact(_TRAINING, "training_log.jsonl", _LOSS, ("train_rows", "held_out_rows")),
    "held_out_loss": Artifact(_TRAINING, "held_out_loss.jsonl", ("model",), ("held_out_rows", "adapter")),
    "tuned_answers": Artifact(_COMPARISON, "tuned_answers.jsonl", _ANSWERS, ("questions", "adapter")),
    "tuned_mcq": Artifact(_COMPARISON, "tuned_mcq.jsonl", _MCQ, ("adapter",)),
    "base_16bit_loss": Artifact(
        _COMPARISON, "base_16bit_loss.jsonl", ("model",), ("held_out_rows",), when="evaluation.base_16bit_loss"
    ),
    "metrics": Artifact(
        _COMPARISON,
        "metrics.json",
        ("evaluation", "seed"),
        (
            *("questions", "base_answers", "tuned_answers", "base_mcq", "tuned_mcq"),
            *("held_out_loss", "base_16bit_loss", "data_report", "train_rows"),
        ),
        version=3,
    ),
    "report": Artifact(
        _COMPARISON,
        "report.html",
        ("profile",),
        ("metrics", "base_answers", "tuned_answers", "training_log", "data_report", "plan"),
    ),
    "merged": Artifact(_EXPORT, "merged", ("model", "export.dtype", "export.merge_into"), ("adapter",), large=True),
    "export_check": Artifact(
        _EXPORT, "export_check.json", (*_CHECK, "prompt"), ("merged", "adapter", "questions", "held_out_rows")
    ),
    "merged_answers": Artifact(
        _EXPORT, "merged_answers.jsonl", _MERGED_ANSWERS, ("questions", "merged"), when="evaluation.measure_merged"
    ),
    "merged_loss": Artifact(
        _EXPORT, "merged_loss.jsonl", ("export.dtype",), ("held_out_rows", "merged"), when="evaluation.measure_merged"
    ),
    "merged_metrics": Artifact(
        _EXPORT,
        "merged_metrics.json",
        ("evaluation", "seed"),
        ("questions", "tuned_answers", "held_out_loss", "data_report", "merged_answers", "merged_loss"),
        when="evaluation.measure_merged",
    ),
    "gguf": Artifact(
        _EXPORT,
        "gguf",
        ("export.gguf", "model.max_seq_length", "prompt", "generation.temperature", "generation.top_p"),
        ("merged",),
        large=True,
        when="export.gguf",
    ),
    "gguf_check": Artifact(
        _EXPORT,
        "gguf_check.json",
        ("export.gguf", "export.dtype", "export.check_prompts", "export.check_new_tokens", "prompt"),
        ("gguf", "merged", "questions", "plan"),
        when="export.gguf",
    ),
    "model_card": Artifact(
        _EXPORT,
        "MODEL_CARD.md",
        # Where it is pushed to stands in the model card; and a push that is asked for later makes notebook 07 run again.
        ("profile", "dataset", "hub.repo_id", "hub.layout", "hub.artifacts", "hub.language"),
        ("export_check", "metrics", "merged_metrics", "plan", "training_log", "data_report"),
        version=2,
    ),
}


# What a notebook reads beside the inputs of what it makes: it only shows this, or asks with it.
_SHOWN = {_TRAINING: {"plan"}, _EXPORT: {"base_answers"}}


@dataclass(frozen=True)
class Step:
    """A notebook: what it makes, and what it reads of the notebooks before it."""

    makes: tuple[str, ...]
    reads: tuple[str, ...]


def _steps() -> dict[str, Step]:
    steps = {}
    for step in (SETUP, _BASELINE, _DATA, _LORA, _TRAINING, _COMPARISON, _EXPORT):
        makes = tuple(name for name, artifact in ARTIFACTS.items() if artifact.step == step)
        reads = {source for name in makes for source in ARTIFACTS[name].inputs if ARTIFACTS[source].step != step}
        steps[step] = Step(makes, tuple(sorted(reads | _SHOWN.get(step, set()))))
    return steps


STEPS: dict[str, Step] = _steps()
