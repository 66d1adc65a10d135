"""The merged model: made from the adapter, and verified against what it was merged from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from medcot_utils.config import GenerationSettings, RunConfig
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.errors import MedcotError
from medcot_utils.machine import disk, paths
from medcot_utils.models.generation import complete
from medcot_utils.models.losses import row_losses
from medcot_utils.models.merge_check import WeightCheck, compare_weights, find_weight_fault
from medcot_utils.models.merging import load_base, load_unquantized
from medcot_utils.run.files import sha256_of

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from medcot_utils.models.engine import Engine
    from medcot_utils.run.directory import Run


class ExportError(MedcotError):
    """The merged model does not agree with what it was made from; the message says by how much."""


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, folder: Path) -> None:
    """Save the adapter and its tokenizer to `folder`, with the base model named as the configuration names it.

    PEFT itself writes where the base was loaded from, which for an embedded model is a folder of this machine. It also writes
    the names of the trained modules in an order that changes from process to process."""
    for peft_config in model.peft_config.values():
        peft_config.base_model_name_or_path, peft_config.revision = config.model.name, config.model.revision
        if isinstance(peft_config.target_modules, set):
            peft_config.target_modules = sorted(peft_config.target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # an empty template; the run's own card comes in notebook 07


def save_merged(engine: Engine, run: Run) -> Path:
    """Merge the run's adapter into its 16-bit base as the artifact `merged`, only if something changed, and return its folder.

    Raises DiskError, before anything is downloaded or loaded, if a disk has too little room for the merged model, the GGUF
    files asked for, and the 16-bit base that is still to be downloaded."""
    adapter = run.require("adapter")
    if not run.is_fresh("merged"):
        wanted = disk.still_to_export(run.config, run.path, run.read("plan")["total_parameters"])
        disk.require_room(wanted)
        for need in wanted:
            free = paths.disk_free_gib(need.folder)
            print(f"{need.what} ({need.place}): {need.gib or 0:.2f} GiB needed, {free:.1f} GiB free")
        if paths.ends_with_the_session(paths.scratch_dir(run.path)) and run.config.hub.repo_id is None:
            print("The merged model will lie on a disk that ends with this session: set hub.repo_id, and it is pushed to the Hub")
    return run.get_or_make(
        "merged", lambda: lambda folder: engine.merge(run.config.model, adapter, folder, run.config.export.dtype)
    )


# --- verify --------------------------------------------------------------------------------------------------------


class ModelPair(TypedDict):
    """Two reloaded models compared on the same prompts. Differences are absolute, of log-probabilities (nats)."""

    a: str
    b: str
    mean_logprob_difference: float
    max_logprob_difference: float
    same_greedy: int  # prompts on which both begin their greedy answers alike, up to a tie within the tolerance
    prompts: int


class WrittenFile(TypedDict):
    """A file of the adapter or of the merged model."""

    file: str
    bytes: int
    sha256: str


class ExportCheck(TypedDict):
    """The artifact `export_check`."""

    tolerance: float  # export.logits_tolerance by the rounding of the merged dtype
    ok: bool  # the weights are right; the first pair's mean difference is within the tolerance, its greedy answers the same
    weights: NotRequired[WeightCheck]  # not in checks of earlier versions
    pairs: list[ModelPair]  # merged and 16-bit base + adapter first
    held_out_loss: dict[str, float]  # nats per token of the merged and the trained model
    held_out_rows: int
    files: list[WrittenFile]


@dataclass(frozen=True)
class Probe:
    """What one model says to one question."""

    logprobs: torch.Tensor  # (positions, vocabulary), of the reference's reasoning
    greedy: list[int]  # token ids of its own answer
    steps: torch.Tensor  # (answer tokens, vocabulary), log-probabilities of each step of its own answer


def verify_export(engine: Engine, run: Run) -> ExportCheck:
    """Compare the merged weights with base + adapter one by one. Then reload three models one after the other and compare them
    on the first held-out questions: the merged one, the 16-bit base + adapter it must equal, and the 4-bit base + adapter that
    was trained.

    The losses are computed on the first export.check_rows held-out rows."""
    config, adapter, merged_dir = run.config, run.require("adapter"), run.require("merged")
    asked = [question for question in run.read("questions") if question["scored"]][: config.export.check_prompts]
    # (prompt, the reference's reasoning)
    texts = [(inference_prompt(q["Question"], config.prompt.newline_after_think), q["Complex_CoT"]) for q in asked]
    dtype = _comparison_dtype(run.read("plan")["total_parameters"], config)
    weights, tolerance = compare_weights(config.model, adapter, merged_dir), scale_tolerance(config)

    rows = run.read("held_out_rows")
    rows = rows.select(range(min(config.export.check_rows, len(rows))))
    outputs: dict[str, list[Probe]] = {}
    losses = {}
    merged, tokenizer = load_unquantized(merged_dir, dtype)
    outputs["merged"] = _probe(merged, tokenizer, texts, config)
    losses["merged"] = _mean_loss(merged, rows, config)
    del merged
    base, tokenizer = load_base(config.model, dtype, adapter)
    outputs["16-bit base + adapter"] = _probe(base, tokenizer, texts, config)
    del base
    trained, tokenizer = engine.load(config.model, adapter)
    trained_name = "4-bit base + adapter" if config.model.load_in_4bit else "loaded base + adapter"
    outputs[trained_name] = _probe(engine.for_inference(trained), tokenizer, texts, config)
    losses[trained_name] = _mean_loss(trained, rows, config)

    pairs = [_compare_pair(outputs, a, b, tolerance) for a, b in itertools.combinations(outputs, 2)]
    exact = pairs[0]
    same = exact["mean_logprob_difference"] <= tolerance and exact["same_greedy"] == exact["prompts"]
    return {
        "tolerance": tolerance,
        "ok": same and find_weight_fault(weights) is None,
        "weights": weights,
        "pairs": pairs,
        "held_out_loss": losses,
        "held_out_rows": len(rows),
        "files": _written_files(run),
    }


def _comparison_dtype(parameters: int, config: RunConfig) -> str:
    # In float32 only the rounding of the merged weights is left to see; a large model is compared at 16 bits for its size.
    return "float32" if parameters < 1e9 else config.export.dtype


def scale_tolerance(config: RunConfig) -> float:
    """Return the allowed mean difference of log-probabilities: export.logits_tolerance is that of float16; bfloat16 rounds
    eight times as coarsely. Weights are held to their exact rounding in `compare_weights`; this finds a folder that loads as
    another model."""
    import torch

    coarser = torch.finfo(getattr(torch, config.export.dtype)).eps / torch.finfo(torch.float16).eps
    return config.export.logits_tolerance * max(1.0, coarser)


def greedy_settings(config: RunConfig) -> GenerationSettings:
    """Return the run's generation settings for the greedy tokens of an export check."""
    greedy = {"max_new_tokens": config.export.check_new_tokens, "do_sample": False, "cache_implementation": "dynamic"}
    return config.generation.model_copy(update=greedy)


def _probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]], config: RunConfig
) -> list[Probe]:

    model.eval()
    # All prompts in one batch: if part of the model stays in RAM, each step moves it to the GPU once.
    completions = complete(model, tokenizer, [prompt for prompt, _ in texts], greedy_settings(config))
    found = []
    for (prompt, reasoning), completion in zip(texts, completions, strict=True):
        asked, ended = tokenizer(prompt)["input_ids"], tokenizer.eos_token_id
        if ended in completion:  # behind it is the batch's padding
            completion = completion[: completion.index(ended) + 1]
        # From the prompt's last position on: what the model says of the reasoning, not of the question it was given.
        logprobs = _logprobs(model, tokenizer(prompt + reasoning)["input_ids"], len(asked) - 1)
        found.append(Probe(logprobs, completion, _logprobs(model, asked + completion, len(asked) - 1)))
    return found


def _logprobs(model: PreTrainedModel, token_ids: list[int], start: int) -> torch.Tensor:
    """Return the log-probabilities (positions from `start` on, vocabulary) that a model gives after each token, on the CPU."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([token_ids], device=model.device)).logits[0, start:]
        return logits.float().log_softmax(-1).cpu()


def _mean_loss(model: PreTrainedModel, rows: Dataset, config: RunConfig) -> float:
    records = row_losses(model, rows, config.training.per_device_eval_batch_size, "check")
    return sum(record["nll"] for record in records) / sum(record["tokens"] for record in records)


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
    """Return whether two greedy answers are the same, or part where both models hold the two tokens for equally likely.

    There the last digit decides, and each of a hundred tokens of a right merge may be such a one."""
    for at, (x, y) in enumerate(zip(one.greedy, other.greedy, strict=False)):
        if x != y:
            return all(abs(float(probe.steps[at, x] - probe.steps[at, y])) <= 2 * tolerance for probe in (one, other))
    return len(one.greedy) == len(other.greedy)


def _written_files(run: Run) -> list[WrittenFile]:
    folders = [run.require("adapter"), run.require("merged")]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    digests = [sha256_of(file) for file in files]
    return [
        {"file": f"{file.parent.name}/{file.name}", "bytes": size, "sha256": digest}
        for file, (digest, size) in zip(files, digests, strict=True)
    ]


def require_agreement(check: ExportCheck) -> None:
    """Raise ExportError if the merged model is not what it was merged from."""
    if not check["ok"]:
        exact = check["pairs"][0]
        weights = find_weight_fault(check["weights"]) if "weights" in check else None
        raise ExportError(
            f"the merged model differs from the 16-bit base + adapter: {f'{weights}; ' if weights else ''}mean log-probability "
            f"difference {exact['mean_logprob_difference']:.2g} (allowed {check['tolerance']:.2g}), same greedy answer on "
            f"{exact['same_greedy']} of {exact['prompts']} prompts. The merged folder is kept; do not publish it"
        )
