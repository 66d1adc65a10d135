"""The model card: measured numbers, data, license, and limits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from medcot_utils.config import RunConfig
from medcot_utils.data.words import guess_language
from medcot_utils.evaluation.comparison import metric_lines
from medcot_utils.evaluation.intervals import format_interval
from medcot_utils.evaluation.merged import LABELS as MERGED_LABELS
from medcot_utils.evaluation.merged_column import describe_merged, read_merged
from medcot_utils.evaluation.metrics import METRICS
from medcot_utils.evaluation.report import make_environment
from medcot_utils.export.merged import find_trained_pair
from medcot_utils.models.embedded import PREFIX, describe_model, find_hub_address
from medcot_utils.plain_text import escape_markdown, keep_intervals
from medcot_utils.run.sources import with_commits_used

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from medcot_utils.evaluation.measured import Measured
    from medcot_utils.evaluation.merged import MergedMeasured
    from medcot_utils.run.directory import Run


_MERGED_INTO = {
    "base_16bit": "the 16-bit base",
    "dequantized_4bit": "the 4-bit weights that it was trained beside, unpacked to 16 bits",
}


def model_card(run: Run, kind: str | None = None, addresses: dict[str, str] | None = None, tag: str | None = None) -> str:
    """Return the README.md of a repository: the run's measured numbers, data, license, and limits, and metadata for the Hub.

    Args:
        kind: adapter, merged, gguf, or one (all in one repository). Default: one if the hub settings push to one repository,
            else merged.
        addresses: {artifact: its repository}, for the code that loads it. Default: as the hub settings say.
        tag: the revision in that code.

    Raises:
        RunError: if an artifact that it reads is missing."""
    from huggingface_hub import ModelCard, ModelCardData
    from markupsafe import Markup

    config = with_commits_used(run.config, run.manifest())
    measured, check, report = run.read("metrics"), run.read("export_check"), run.read("data_report")
    merged, plan = read_merged(run), run.read("plan")
    kind = kind or ("one" if config.hub.repo_id and config.hub.layout == "one" else "merged")
    if addresses is None:
        pushed = [name for name in config.hub.artifacts if name != "gguf" or config.export.gguf] if config.hub.repo_id else []
        addresses = config.hub.addresses(pushed, config.hub.repo_id)
    base = find_hub_address(config.model.name)
    if kind == "gguf":
        base = addresses.get("merged", base)
    trained = find_trained_pair(check)
    trained_name = trained["b"]
    license_data = _license(config)
    language = find_language(config, (question["Response"] for question in run.read("questions") if question["scored"]))
    data = ModelCardData(
        **license_data,
        language=language,
        library_name={"adapter": "peft", "gguf": None}.get(kind, "transformers"),
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation={"adapter": "adapter", "gguf": "quantized"}.get(kind, "finetune") if base else None,
        datasets=None if config.dataset.path or config.dataset.name == "shipped" else [config.dataset.name],
        tags=["medical", "chain-of-thought", "reasoning", "lora", "sft", *(["gguf"] if "gguf" in (kind, *addresses) else [])],
        model_name=addresses.get(kind, next(iter(addresses.values()), f"{describe_model(config.model.name)}, tuned")),
        eval_results=_eval_results(config, measured, None if kind == "adapter" else merged, trained_name),
    )

    def show(value: object) -> str:
        return value if isinstance(value, Markup) else escape_markdown(keep_intervals(value))

    # ModelCard.from_template would escape nothing.
    environment = make_environment(Path(__file__).parent, finalize=show)
    card = environment.get_template("model_card.md.j2").render(
        card_data=Markup(data.to_yaml()),
        config=config,
        base=describe_model(config.model.name),
        licence=license_data.get("license_name", license_data["license"]),
        source=_data_source(config),
        language=language,
        metrics=metric_lines(measured["metrics"]),
        forced=metric_lines(measured.get("forced")),
        losses=measured.get("losses"),
        readings=measured.get("mcq_readings", []),
        merged=merged,
        merged_metrics=metric_lines(merged["metrics"] if merged else None, MERGED_LABELS),
        merged_forced=metric_lines(merged.get("forced") if merged else None, MERGED_LABELS),
        merged_line=describe_merged(run),
        merged_into=_MERGED_INTO[check.get("merge_into", config.export.merge_into)],
        names=METRICS,
        interval=format_interval,
        notes=measured["notes"],
        n_questions=measured["n_questions"],
        multiple_choice="mcq_accuracy" in measured["metrics"],
        confidence=f"{100 * config.evaluation.confidence_level:g}",
        plan=plan,
        trainable=f"{plan['trainable_parameters']:,}",
        check=check,
        trained_name=trained_name,
        trained=trained,
        kind=kind,
        addresses=addresses,
        tag=tag,
        repeats=len({repeat["train_id"] for repeat in report["repeats"]}),
        repeats_dropped=report["repeats_dropped"],
    )
    return str(ModelCard(card))


def find_language(config: RunConfig, texts: Iterable[str]) -> str | None:
    """Return the language code of the data; None if it is unknown.

    It is hub.language; else that of the shipped cases, or of a Hub subset whose name is a language (`en`, `zh_mix`); else a guess
    from the script of the texts."""
    if config.hub.language:
        return config.hub.language
    if not config.dataset.path:
        if config.dataset.name == "shipped":
            return "en"
        if named := re.fullmatch(r"([a-z]{2})(_mix)?", config.dataset.subset or ""):
            return named[1]
    return guess_language(texts)


def _license(config: RunConfig) -> dict[str, str]:
    """Return the base model's license in the Hub's metadata. Tuned and merged weights are under it too."""
    name = config.model.name
    if name.startswith(PREFIX):
        return {"license": "apache-2.0"}
    if name.lower().endswith("deepseek-r1-distill-llama-8b"):
        return {"license": "llama3.1"}  # DeepSeek's model card: derived from Llama 3.1 8B, under its license
    where = find_hub_address(name)
    link = {"license_link": f"https://huggingface.co/{where}"} if where else {}
    return {"license": "other", "license_name": "as-the-base-model"} | link


def _eval_results(config: RunConfig, measured: Measured, merged: MergedMeasured | None, trained_name: str) -> list[EvalResult]:
    """Return the metrics for the Hub's model-index, each with its interval and the base's value.

    They are those of the merged model, which people load, if it was measured; else the tuned model's. The index has room for only
    one model."""
    from huggingface_hub import EvalResult

    of_hub = not config.dataset.path and config.dataset.name != "shipped"
    confidence = round(100 * config.evaluation.confidence_level)
    model, found = ("merged 16-bit model", merged) if merged else (trained_name, measured)
    return [
        EvalResult(
            task_type="text-generation",
            task_name=f"medical questions with reasoning, measured on the {model}",
            dataset_type=config.dataset.name if of_hub else "medcot-shipped" if not config.dataset.path else "local-file",
            dataset_name=f"{_data_source(config)}; {found['n_questions']} held-out questions",
            dataset_config=config.dataset.subset if of_hub else None,
            dataset_revision=config.dataset.revision if of_hub else None,
            metric_type=name,
            metric_name=METRICS[name].label,
            metric_value=round(metric["tuned"]["value"], 4),
            metric_args={
                f"interval_{confidence}": _rounded(metric["tuned"]["low"], metric["tuned"]["high"]),
                "base_value": _rounded(measured["metrics"][name]["base"]["value"])[0],
            },
            verified=False,
        )
        for name, metric in found["metrics"].items()
        if math.isfinite(metric["tuned"]["value"]) and name in measured["metrics"]
    ]


def _rounded(*values: float | None) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in values]


def _data_source(config: RunConfig) -> str:
    if config.dataset.path:
        return f"a local file, {Path(config.dataset.path).name}"
    if config.dataset.name == "shipped":
        return "the cases shipped with medcot, written for teaching"
    return f"{config.dataset.name} at revision {config.dataset.revision}"
