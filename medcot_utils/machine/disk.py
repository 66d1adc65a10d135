"""Disk space: what a run will need and where, compared with what is free before anything is downloaded or merged, and one clear
error if a disk is full after all."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medcot_utils.config import RunConfig
from medcot_utils.errors import MedcotError
from medcot_utils.machine import environment, paths
from medcot_utils.machine.paths import GIB
from medcot_utils.machine.weight_files import INDEX, SINGLE, read_weight_map, weight_files

if TYPE_CHECKING:
    import pandas as pd

# Parameters of the models of the profiles, and of LoRA at r = 16 on the seven projections.
_PARAMETERS = {
    "unsloth/DeepSeek-R1-Distill-Llama-8B": (8.03e9, 41.9e6),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1.777e9, 18.5e6),
    "embedded:smollm2-135m-instruct": (134.5e6, 4.9e6),
    "embedded:tiny-random-llama": (3e6, 0.1e6),
}
# Downloads whose size the parameters do not say (bytes).
_DOWNLOADS = {"unsloth/deepseek-r1-distill-llama-8b-unsloth-bnb-4bit": 5.96e9}
# Bytes a parameter of a GGUF file, scales included: types that the converter writes, and types quantized from its f16.
GGUF_CONVERTED = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07}
GGUF_QUANTIZED = {"q6_k": 0.83, "q5_k_m": 0.72, "q5_k_s": 0.70, "q4_k_m": 0.62, "q4_k_s": 0.59, "q3_k_m": 0.51}
_BESIDE = 1.1  # what is written beside the weights: tokenizer, index, and room for the file system's own


class DiskError(MedcotError):
    """There is or was too little room; the message says how much, where, and what to do."""


@dataclass(frozen=True)
class Need:
    """GiB that a part of the run will still need at a place; None where nobody can say."""

    what: str
    place: str
    folder: Path
    gib: float | None


# --- a full disk ---------------------------------------------------------------------------------------------------


@contextmanager
def full_disk_told(what: str, folder: Path) -> Iterator[None]:
    """Turn the error of a full disk, whichever library met it, into one DiskError that says where, and what is left."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MedcotError) or not is_disk_full(error):
            raise
        raise DiskError(
            f"the disk of {folder.name}/ is full ({paths.disk_free_gib(folder):.2f} GiB free): {what} could not be written; "
            f"the artifacts made before are kept whole. {paths.MORE_ROOM}. The same command or notebook resumes there"
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an exception, or one that it comes from, is about a full disk or a quota used up."""
    # torch's own writer loses the errno (it finds its file shorter than what it wrote); safetensors and pyarrow keep the text.
    texts = ("No space left on device", "Disk quota exceeded", "os error 28", "inline_container.cc", "PytorchStreamWriter failed")
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- what is needed ------------------------------------------------------------------------------------------------


def needs(config: RunConfig, run_dir: Path) -> list[Need]:
    """Return what the whole series will still write for these settings, less the files that are there already."""
    hub = _hub_cache()
    parameters, trainable = model_sizes(config)
    weights = None if parameters is None else 2 * parameters
    found = list(_downloads(config, weights, hub))
    if trainable is not None:
        # Each checkpoint has its optimizer; a new one is written before the oldest goes, and so is the adapter.
        checkpoint = 4 + (2 if config.training.optim.endswith("8bit") else 8)
        written = trainable * (checkpoint * (config.training.save_total_limit + 1) + 8)
        found.append(_need("checkpoints and adapter", "run directory", run_dir, written, run_dir / "checkpoints"))
    found.append(_need("rows, answers, notebooks, report", "run directory", run_dir, 5e7 if _shipped(config) else 3e8))
    found += export_needs(config, run_dir, parameters)
    return found


def export_needs(config: RunConfig, run_dir: Path, parameters: float | None, anew: bool = False) -> list[Need]:
    """Return what notebook 07 writes: the merged 16-bit model, and the GGUF files if asked for. `anew`: an older file stays
    until the new one is whole, so it is not subtracted."""
    place, folder = _large_place(run_dir)
    size = None if parameters is None else parameters * 2 * _BESIDE
    merged = _need("merged 16-bit model", place, folder, size, None if anew else folder / "merged")
    return [merged, *gguf_needs(config, run_dir, parameters, anew)]


def gguf_needs(config: RunConfig, run_dir: Path, parameters: float | None, anew: bool = True) -> list[Need]:
    """Return what the GGUF asked for takes: its file, and beside a quantized one the f16 that it is made from."""
    kind = config.export.gguf
    kinds = [] if kind is None else [kind] if kind in GGUF_CONVERTED else ["f16", kind]
    (place, folder), sizes = _large_place(run_dir), GGUF_CONVERTED | GGUF_QUANTIZED
    return [
        _need(
            f"GGUF {kind}",
            place,
            folder,
            None if parameters is None else parameters * sizes[kind] * _BESIDE,
            None if anew else folder / "gguf",
        )
        for kind in kinds
    ]


def _large_place(run_dir: Path) -> tuple[str, Path]:
    scratch = paths.scratch_dir(run_dir)
    return ("run directory" if scratch == run_dir else "scratch disk"), scratch


def still_to_export(config: RunConfig, run_dir: Path, parameters: float) -> list[Need]:
    """Return what an export needs now, by the counted parameters: its files, and the 16-bit base if it is not here yet."""
    base = [need for need in _downloads(config, 2 * parameters, _hub_cache()) if need.what == "base model, 16 bits"]
    return base + export_needs(config, run_dir, parameters, anew=True)


def model_sizes(config: RunConfig) -> tuple[float | None, float | None]:
    """Return the parameters of the base and those that LoRA trains; None for what only the loaded model can tell."""
    name = config.model.name
    known = _PARAMETERS.get(name)
    if known is None:
        held = _folder_or_hub_bytes(name, config.model.revision)
        if held is None:
            return None, None
        known = (held / 2, 0.006 * held / 2)
    share = config.lora.r / 16 * len(config.lora.target_modules) / 7
    return known[0], known[1] * share


def _downloads(config: RunConfig, weights: float | None, hub: Path) -> Iterator[Need]:
    model = config.model
    if model.name.startswith("embedded:"):
        yield _need("base model", "model cache", paths.cache_dir(), weights, paths.cache_dir())
    elif not Path(model.name).is_dir():
        whole = _DOWNLOADS.get(model.name, weights)
        if _reads_16bit_base(config):
            yield _need("base model, 16 bits", "Hub cache", hub, whole, _in_hub_cache(hub, "models", model.name))
        if model.quantized_name and model.engine != "transformers":
            quantized = _DOWNLOADS.get(model.quantized_name) or _folder_or_hub_bytes(
                model.quantized_name, model.quantized_revision
            )
            held = _in_hub_cache(hub, "models", model.quantized_name)
            yield _need("base model, 4 bits", "Hub cache", hub, quantized, held)
    if not _shipped(config) and not config.dataset.path:
        yield _need("data set", "Hub cache", hub, 2.5e8, _in_hub_cache(hub, "datasets", config.dataset.name))


def _reads_16bit_base(config: RunConfig) -> bool:
    """Return whether a run may load its 16-bit weights: not if all it does is done with the pre-quantized copy."""
    copied = config.model.engine != "transformers" and config.model.load_in_4bit and config.model.quantized_name is not None
    return not copied or config.export.merge_into == "base_16bit" or config.evaluation.base_16bit_loss


def _need(what: str, place: str, folder: Path, size: float | None, held: Path | None = None) -> Need:
    there = paths.folder_gib(held) if held else 0.0
    return Need(what, place, folder, None if size is None else max(0.0, size / GIB - there))


def _shipped(config: RunConfig) -> bool:
    return config.dataset.name == "shipped" and not config.dataset.path


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def check_hub_cache(config: RunConfig) -> None:
    """Raise PlatformError if the model must be downloaded and nothing can be written where the Hub's client keeps it."""
    name = config.model.name
    if not (name.startswith("embedded:") or Path(name).is_dir() or _in_hub_cache(_hub_cache(), "models", name).exists()):
        environment.require_writable(_hub_cache(), "HF_HOME", "downloads")


def _in_hub_cache(hub: Path, kind: str, name: str) -> Path:
    return hub / f"{kind}--{name.replace('/', '--')}" / "blobs"


def _folder_or_hub_bytes(name: str, revision: str | None) -> float | None:
    """Bytes of the safetensors files that transformers would load of a model, in a folder or by what the Hub says of it; None
    where neither can be asked, or there are none."""
    if Path(name).is_dir():
        return sum(file.stat().st_size for file in weight_files(Path(name))) or None
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=10)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        if SINGLE in sizes or INDEX not in sizes:
            return sizes.get(SINGLE)
        index = Path(hf_hub_download(name, INDEX, revision=revision))
        return sum(sizes.get(file, 0) for file in set(read_weight_map(index).values()))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return None  # no network, no such model, no right: what fails for it says so itself
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "requests"):
            return None
        raise


# --- compared ------------------------------------------------------------------------------------------------------


def _disk_key(folder: Path) -> tuple[int, bool]:
    device, place = paths.disk_of(folder)
    return device, paths.under_quota(place)


def shortages(wanted: Iterable[Need]) -> list[str]:
    """Return one line for each disk with too little room for all its needs together; needs of unknown size count as none."""
    disks: dict[tuple[int, bool], list[Need]] = {}
    for need in wanted:
        if need.gib:
            disks.setdefault(_disk_key(need.folder), []).append(need)
    lines = []
    for there in disks.values():
        total, free = sum(need.gib or 0 for need in there), paths.disk_free_gib(there[0].folder)
        if total > free:
            parts = ", ".join(f"{need.what} {need.gib:.2f}" for need in sorted(there, key=lambda need: -(need.gib or 0)))
            where = " and ".join(sorted({need.place for need in there}))
            lines.append(f"{total:.2f} GiB needed for the {where} ({parts}), {free:.2f} GiB free")
    return lines


def require_room(wanted: Iterable[Need]) -> None:
    """Raise DiskError if a disk has too little room for all its needs together."""
    if lines := shortages(wanted):
        raise DiskError(f"too little disk: {'; '.join(lines)}. {paths.MORE_ROOM}")


def check_room(config: RunConfig, run_dir: Path) -> str:
    """Return one line on the GiB that a run still needs on disk. Raises DiskError if a disk has too little room for it."""
    wanted = needs(config, run_dir)
    require_room(wanted)
    unknown = "".join(f", and an unknown size for the {need.what}" for need in wanted if need.gib is None)
    return f"{sum(need.gib or 0.0 for need in wanted):.2f} GiB needed, and there is room for it{unknown}"


def disk_table(config: RunConfig, run_dir: Path) -> pd.DataFrame:
    """Return what a run still needs on disk and what is free there, in GiB. Raises DiskError if it is too little."""
    import pandas as pd

    wanted = needs(config, run_dir)
    require_room(wanted)
    lines = [
        {
            "what": need.what,
            "place": need.place,
            "needed (GiB)": "unknown" if need.gib is None else f"{need.gib:.2f}",
            "free there (GiB)": f"{paths.disk_free_gib(need.folder):.1f}",
        }
        for need in wanted
    ]
    return pd.DataFrame(lines).set_index("what")
