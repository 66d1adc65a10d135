"""Export: merge, verify against what it was merged from, and write the model card."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot_utils.config import RunConfig
from medcot_utils.data.prompts import inference_prompt
from medcot_utils.errors import MedcotError
from medcot_utils.machine import disk, paths
from medcot_utils.models.generation import complete
from medcot_utils.models.losses import row_losses
from medcot_utils.models.merging import load_base, load_unquantized

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from medcot_utils.models.engine import Engine
    from medcot_utils.run.directory import Run


class ExportError(MedcotError):
    """An exported model does not agree with what it was made from; the message says by how much."""


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, folder: Path) -> None:
    """The adapter and its tokenizer into `folder`, with the base model named as the configuration names it.

    PEFT writes where the base was loaded from, which for an embedded model is a folder of this machine, and the names of
    the trained modules in an order that is another one in each process."""
    for peft_config in model.peft_config.values():
        peft_config.base_model_name_or_path, peft_config.revision = config.model.name, config.model.revision
        if isinstance(peft_config.target_modules, set):
            peft_config.target_modules = sorted(peft_config.target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # an empty template; the run's own card comes in notebook 07


def save_merged(engine: Engine, run: Run) -> Path:
    """Merge the run's adapter into its 16-bit base as the artifact `merged`; made again only if something changed.

    Raises DiskError before anything is downloaded or loaded when a disk has too little room for the merged model, the GGUF
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


def verify_export(engine: Engine, run: Run) -> dict[str, Any]:
    """Reload three models one after the other and compare them on the first held-out questions: the merged one, the
    16-bit base + adapter it must equal, and the 4-bit base + adapter that was trained.

    Returns {tolerance, ok, pairs: [{a, b, max_logprob_difference, mean_logprob_difference, same_greedy, prompts}],
    held_out_loss: {model: nats per token}, held_out_rows, files}. ok is False when merged and 16-bit base + adapter differ
    by more than the tolerance in mean, or in a greedy token."""
    config, adapter, merged_dir = run.config, run.require("adapter"), run.require("merged")
    texts = [q for q in run.read("questions") if q["scored"]][: config.export.check_prompts]
    prompts = [inference_prompt(q["Question"], config.prompt.newline_after_think) for q in texts]
    dtype = _comparison_dtype(run.read("plan")["total_parameters"], config)

    rows = run.read("held_out_rows")
    rows = rows.select(range(min(config.export.check_rows, len(rows))))
    outputs, losses = {}, {}
    merged, tokenizer = load_unquantized(merged_dir, dtype)
    outputs["merged"] = _probe(merged, tokenizer, prompts, texts, config)
    losses["merged"] = _mean_loss(merged, rows, config)
    del merged
    base, tokenizer = load_base(config.model, dtype, adapter)
    outputs["16-bit base + adapter"] = _probe(base, tokenizer, prompts, texts, config)
    del base
    trained, tokenizer = engine.load(config.model, adapter)
    trained_name = "4-bit base + adapter" if config.model.load_in_4bit else "loaded base + adapter"
    outputs[trained_name] = _probe(engine.for_inference(trained), tokenizer, prompts, texts, config)
    losses[trained_name] = _mean_loss(trained, rows, config)

    pairs = [_differ(outputs, a, b) for a, b in itertools.combinations(outputs, 2)]
    exact = pairs[0]
    ok = exact["mean_logprob_difference"] <= config.export.logits_tolerance and exact["same_greedy"] == exact["prompts"]
    return {
        "tolerance": config.export.logits_tolerance,
        "ok": ok,
        "pairs": pairs,
        "held_out_loss": losses,
        "held_out_rows": len(rows),
        "files": _files(run),
    }


def _comparison_dtype(parameters: int, config: RunConfig) -> str:
    # In float32 only the rounding of the merged weights is left to see; a large model is compared at 16 bits for its size.
    return "float32" if parameters < 1e9 else config.export.dtype


def _probe(
    model: Any, tokenizer: Any, prompts: list[str], questions: list[dict[str, Any]], config: RunConfig
) -> list[dict[str, Any]]:
    import torch

    model.eval()
    # All prompts in one batch: where part of the model waits in the machine's memory, each step moves it to the card once.
    greedy = {"max_new_tokens": config.export.check_new_tokens, "do_sample": False, "cache_implementation": "dynamic"}
    settings = config.generation.model_copy(update=greedy)
    completions = complete(model, tokenizer, prompts, settings)
    found = []
    for prompt, question, completion in zip(prompts, questions, completions, strict=True):
        ids = tokenizer(prompt + question["Complex_CoT"], return_tensors="pt").to(model.device)
        start = len(tokenizer(prompt)["input_ids"])
        with torch.inference_mode():
            # From the prompt's last position on: what the model says of the reasoning, not of the question it was given.
            logits = model(**ids).logits[0, start - 1 :]
            logprobs = logits.float().log_softmax(-1).cpu()
        found.append({"logprobs": logprobs, "greedy": completion})
    return found


def _mean_loss(model: Any, rows: Any, config: RunConfig) -> float:
    records = row_losses(model, rows, config.training.per_device_eval_batch_size, "check")
    return sum(record["nll"] for record in records) / sum(record["tokens"] for record in records)


def _differ(outputs: dict[str, list[dict[str, Any]]], a: str, b: str) -> dict[str, Any]:
    gaps = [(x["logprobs"] - y["logprobs"]).abs() for x, y in zip(outputs[a], outputs[b], strict=True)]
    same = sum(x["greedy"] == y["greedy"] for x, y in zip(outputs[a], outputs[b], strict=True))
    return {
        "a": a,
        "b": b,
        "mean_logprob_difference": float(sum(gap.mean() for gap in gaps) / len(gaps)),
        "max_logprob_difference": float(max(gap.max() for gap in gaps)),
        "same_greedy": same,
        "prompts": len(gaps),
    }


def _files(run: Run) -> list[dict[str, Any]]:
    from medcot_utils.run.files import sha256_of

    folders = [run.require("adapter"), run.require("merged")]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    described = []
    for file in files:
        digest, size = sha256_of(file)
        described.append({"file": f"{file.parent.name}/{file.name}", "bytes": size, "sha256": digest})
    return described


def require_agreement(check: dict[str, Any]) -> None:
    """Raises ExportError when the merged model is not what it was merged from."""
    if not check["ok"]:
        exact = check["pairs"][0]
        raise ExportError(
            f"the merged model differs from the 16-bit base + adapter: mean log-probability difference "
            f"{exact['mean_logprob_difference']:.2g} (allowed {check['tolerance']:.2g}), same greedy answer on "
            f"{exact['same_greedy']} of {exact['prompts']} prompts. The merged folder is kept; do not publish it"
        )


# --- model card ----------------------------------------------------------------------------------------------------
