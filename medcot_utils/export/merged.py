"""Make the merged model from the adapter and its base, and verify it against both."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing's own on Python 3.11

from medcot_utils.config import GenerationSettings, RunConfig
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.errors import MedcotError
from medcot_utils.machine import disk, paths
from medcot_utils.machine.gpu import release_gpu_memory
from medcot_utils.models.engine import compute_dtype
from medcot_utils.models.generation import complete
from medcot_utils.models.losses import mean_loss, row_losses
from medcot_utils.models.merge_check import WeightCheck, compare_weights, find_weight_fault
from medcot_utils.models.merging import MergeBase, load_base, merge, open_16bit_base
from medcot_utils.plain_text import say
from medcot_utils.run.files import sha256_of_each

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from medcot_utils.models.engine import Engine
    from medcot_utils.run.directory import Run

MergeTarget = Literal["base_16bit", "dequantized_4bit"]


class ExportError(MedcotError):
    """Say how much the merged model differs from what it was made from."""


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, folder: Path) -> None:
    """Save the adapter and its tokenizer to `folder`, with the base model's name from the configuration.

    PEFT itself writes where the base was loaded from, which is a local folder for an embedded model. It also writes the names of
    the trained modules in an order that differs between processes."""
    for peft_config in model.peft_config.values():
        peft_config.base_model_name_or_path, peft_config.revision = config.model.name, config.model.revision
        if isinstance(peft_config.target_modules, set):
            peft_config.target_modules = sorted(peft_config.target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # an empty template; notebook 07 makes the run's own model card


def save_merged(engine: Engine, run: Run) -> Path:
    """Merge the run's adapter into its base as the artifact `merged` if something changed, and return its folder.

    export.merge_into names the base. Raises DiskError, before anything is downloaded or loaded, if a disk has too little room for
    the merged model, the GGUF files, and a base that must still be downloaded. Raises MergeError as `merging.merge` does."""
    config, adapter = run.config, run.require("adapter")
    if not run.is_fresh("merged"):
        wanted = disk.still_to_export(config, run.path, run.read("plan")["total_parameters"])
        disk.require_room(wanted)
        for need in wanted:
            free = paths.disk_free_gib(need.folder)
            say(f"{need.what} ({need.place}): {need.gib or 0:.2f} GiB needed, {free:.1f} GiB free")
        if paths.ends_with_the_session(paths.scratch_dir(run.path)) and config.hub.repo_id is None:
            say("The merged model will be on a disk that is lost when this session ends: set hub.repo_id to push it to the Hub")
    return run.get_or_make(
        "merged",
        lambda: lambda folder: merge(config.model, adapter, folder, config.export.dtype, open_merge_base(engine, config)),
    )


def find_merge_target(config: RunConfig) -> MergeTarget:
    """Return the base that the adapter is added to: export.merge_into, or the 16-bit base if the base is not quantized."""
    return config.export.merge_into if config.model.load_in_4bit else "base_16bit"


def open_merge_base(engine: Engine, config: RunConfig) -> MergeBase:
    """Return the weights that the adapter is added to; see `find_merge_target`."""
    dequantized = find_merge_target(config) == "dequantized_4bit"
    return engine.open_dequantized(config.model) if dequantized else open_16bit_base(config.model)


# --- verify --------------------------------------------------------------------------------------------------------


class ModelPair(TypedDict):
    """Hold the comparison of two reloaded models on the same prompts. Differences of log-probabilities are absolute, in nats."""

    a: str
    b: str
    mean_logprob_difference: float
    max_logprob_difference: float
    same_greedy: int  # prompts on which both greedy answers begin with the same tokens, up to a tie within the tolerance
    prompts: int


class WrittenFile(TypedDict):
    """Hold a file of the adapter or of the merged model."""

    file: str
    bytes: int
    sha256: str


class ExportCheck(TypedDict):
    """Hold the artifact `export_check`.

    The first of `pairs` must agree: the merged model, and its base + adapter before the merge. If that base is the 16-bit one,
    the trained model is another model, and two more pairs say how far away it is."""

    tolerance: float  # export.logits_tolerance, scaled by the rounding of the dtypes
    ok: bool  # whether the weights are right, and the first pair agrees in mean difference and greedy answers
    weights: NotRequired[WeightCheck]  # absent in checks of earlier versions
    merge_into: NotRequired[MergeTarget]  # absent in checks of earlier versions, which means base_16bit
    pairs: list[ModelPair]
    held_out_loss: dict[str, float]  # nats per token of the merged and the trained model
    held_out_rows: int
    files: list[WrittenFile]


@dataclass(frozen=True)
class Probe:
    """Hold one model's log-probabilities and greedy answer to one question."""

    logprobs: torch.Tensor  # (positions, vocabulary), log-probabilities on the reference's reasoning
    greedy: list[int]  # token ids of the model's own answer
    steps: torch.Tensor  # (answer tokens, vocabulary), log-probabilities at each step of its own answer


@dataclass(frozen=True)
class References:
    """Hold what the merged model is compared with.

    weights: the comparison of the merged weights with base + adapter. probes: {reference model: its probe of each question}; the
    model that the merged one must equal comes first. trained, loss: the name of the trained model, and its loss on the check's
    rows, in nats per token."""

    weights: WeightCheck
    probes: dict[str, list[Probe]]
    trained: str
    loss: float


def probe_references(engine: Engine, run: Run) -> References | None:
    """Compare the merged weights with base + adapter one by one, and probe the models that the merged one is compared with.

    These are its 16-bit base + adapter, if it was merged into that base, and the base + adapter that was trained. Each is loaded,
    probed, and dropped. Return None, and load no model, if the export was checked before."""
    if run.is_fresh("export_check"):
        return None
    config, adapter, target = run.config, run.require("adapter"), find_merge_target(run.config)
    weights = compare_weights(config.model, adapter, run.require("merged"), open_merge_base(engine, config))
    texts, probes = _check_texts(run), {}
    if target == "base_16bit":
        base, tokenizer = load_base(config.model, find_check_dtype(run), adapter)
        probes["16-bit base + adapter"] = _probe(base, tokenizer, texts, config)
        del base
    model, tokenizer = engine.load(config.model, adapter)
    trained = "4-bit base + adapter" if config.model.load_in_4bit else "loaded base + adapter"
    probes[trained] = _probe(engine.for_inference(model), tokenizer, texts, config)
    loss = mean_loss(row_losses(model, select_check_rows(run), config.training.per_device_eval_batch_size, "check"))
    del model
    release_gpu_memory()
    return References(weights, probes, trained, loss)


def verify_export(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, references: References) -> ExportCheck:
    """Compare the merged model, loaded from its files, with the references on the first export.check_prompts scored questions.

    Losses are computed on the first export.check_rows held-out rows, in nats per token."""
    config, tolerance = run.config, scale_tolerance(run.config)
    outputs = {"merged": _probe(model, tokenizer, _check_texts(run), config)} | references.probes
    rows = select_check_rows(run)
    records = run.read("merged_loss") if run.wants("merged_loss") and run.is_fresh("merged_loss") else None
    if records is None:
        records = row_losses(model, rows, config.training.per_device_eval_batch_size, "check")
    pairs = [_compare_pair(outputs, a, b, tolerance) for a, b in itertools.combinations(outputs, 2)]
    exact = pairs[0]
    same = exact["mean_logprob_difference"] <= tolerance and exact["same_greedy"] == exact["prompts"]
    return {
        "tolerance": tolerance,
        "ok": same and find_weight_fault(references.weights) is None,
        "weights": references.weights,
        "merge_into": find_merge_target(config),
        "pairs": pairs,
        "held_out_loss": {"merged": mean_loss(records[: len(rows)]), references.trained: references.loss},
        "held_out_rows": len(rows),
        "files": _written_files(run),
    }


def find_trained_pair(check: ExportCheck) -> ModelPair:
    """Return the comparison of the merged model with the trained model. `b` is the latter's name, as in `held_out_loss`."""
    (trained,) = check["held_out_loss"].keys() - {"merged"}
    return next(pair for pair in check["pairs"] if (pair["a"], pair["b"]) == ("merged", trained))


def find_check_dtype(run: Run) -> str:
    """Return the name of the dtype in which the merged model is loaded, checked, and measured."""
    # In float32, only the rounding of the merged weights shows. A large model is compared in 16 bits because of its size.
    return "float32" if run.read("plan")["total_parameters"] < 1e9 else run.config.export.dtype


def _check_texts(run: Run) -> list[tuple[str, str]]:
    """Return (prompt, the reference's reasoning) for each of the first export.check_prompts scored questions."""
    asked = [question for question in run.read("questions") if question["scored"]][: run.config.export.check_prompts]
    newline = run.config.prompt.newline_after_think
    return [(inference_prompt(question["Question"], newline), question["Complex_CoT"]) for question in asked]


def select_check_rows(run: Run) -> Dataset:
    """Return the first export.check_rows held-out rows."""
    rows = run.read("held_out_rows")
    return rows.select(range(min(run.config.export.check_rows, len(rows))))


def scale_tolerance(config: RunConfig) -> float:
    """Return the allowed mean difference of log-probabilities, in nats.

    It is export.logits_tolerance for float16, and eight times that for bfloat16, which rounds eight times as coarsely.
    `compare_weights` checks the exact rounding of weights. This tolerance finds a folder that loads as another model. For a merge
    into the dequantized base, the other model of the pair is the trained one, which computes in the run's own dtype."""
    import torch

    dtypes = [getattr(torch, config.export.dtype)]
    if find_merge_target(config) == "dequantized_4bit":
        dtypes.append(compute_dtype(config.model))
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return config.export.logits_tolerance * max(1.0, coarsest / torch.finfo(torch.float16).eps)


def greedy_settings(config: RunConfig) -> GenerationSettings:
    """Return the run's generation settings for the greedy tokens of an export check."""
    greedy = {"max_new_tokens": config.export.check_new_tokens, "do_sample": False, "cache_implementation": "dynamic"}
    return config.generation.model_copy(update=greedy)


def _probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]], config: RunConfig
) -> list[Probe]:

    model.eval()
    # All prompts are in one batch: if a part of the model stays in RAM, each step copies it to the GPU once.
    completions = complete(model, tokenizer, [prompt for prompt, _ in texts], greedy_settings(config))
    found = []
    for (prompt, reasoning), completion in zip(texts, completions, strict=True):
        asked, ended = tokenizer(prompt)["input_ids"], tokenizer.eos_token_id
        if ended in completion:  # the batch's padding follows it
            completion = completion[: completion.index(ended) + 1]
        # These begin at the prompt's last position: they are about the reasoning, not about the question.
        logprobs = _logprobs(model, tokenizer(prompt + reasoning)["input_ids"], len(asked) - 1)
        found.append(Probe(logprobs, completion, _logprobs(model, asked + completion, len(asked) - 1)))
    return found


def _logprobs(model: PreTrainedModel, token_ids: list[int], start: int) -> torch.Tensor:
    """Return a model's log-probabilities of the next token (positions from `start` on, vocabulary), on the CPU."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([token_ids], device=model.device)).logits[0, start:]
        return logits.float().log_softmax(-1).cpu()


def _compare_pair(outputs: dict[str, list[Probe]], a: str, b: str, tolerance: float) -> ModelPair:
    probes = list(zip(outputs[a], outputs[b], strict=True))
    gaps = [(x.logprobs - y.logprobs).abs() for x, y in probes]
    return {
        "a": a,
        "b": b,
        "mean_logprob_difference": float(sum(gap.mean() for gap in gaps) / len(gaps)),
        "max_logprob_difference": float(max(gap.max() for gap in gaps)),
        "same_greedy": sum(_begin_alike(x, y, tolerance) for x, y in probes),
        "prompts": len(gaps),
    }


def _begin_alike(one: Probe, other: Probe, tolerance: float) -> bool:
    """Return whether two greedy answers are the same up to a token where both models find both choices equally likely.

    There, rounding decides. Even after a correct merge, this can happen at any of a hundred tokens."""
    for at, (x, y) in enumerate(zip(one.greedy, other.greedy, strict=False)):
        if x != y:
            return all(abs(float(probe.steps[at, x] - probe.steps[at, y])) <= 2 * tolerance for probe in (one, other))
    return len(one.greedy) == len(other.greedy)


def _written_files(run: Run) -> list[WrittenFile]:
    folders = [run.require("adapter"), run.require("merged")]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    return [
        {"file": f"{file.parent.name}/{file.name}", "bytes": size, "sha256": digest}
        for file, (digest, size) in zip(files, sha256_of_each(files), strict=True)
    ]


def require_agreement(check: ExportCheck) -> None:
    """Raise ExportError if the merged model does not agree with what it was made from."""
    if not check["ok"]:
        exact = check["pairs"][0]
        weights = find_weight_fault(check["weights"]) if "weights" in check else None
        raise ExportError(
            f"the merged model differs from the {exact['b']}: {f'{weights}; ' if weights else ''}mean log-probability "
            f"difference {exact['mean_logprob_difference']:.2g} (allowed {check['tolerance']:.2g}), same greedy answer on "
            f"{exact['same_greedy']} of {exact['prompts']} prompts. The merged folder is kept; do not publish it"
        )
