"""Everything that can be checked before expensive work: one line per check, or one error.

Notebook 01 makes all the checks, `medcot run` and `medcot train` those that ask no network, `medcot doctor` for each profile,
and `medcot kaggle build` what can be known here about another machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medcot_utils.config import RunConfig
from medcot_utils.machine import disk, hardware, secrets


@dataclass(frozen=True)
class Check:
    """A check that passed."""

    name: str  # profile, model, training, data, questions, tracker, hub, gguf, disk
    line: str


def preflight(config: RunConfig, run_dir: Path | None, online: bool = True) -> list[Check]:
    """Check everything that a run of these settings needs, after handing the secrets on to the clients that read them.

    Args:
        run_dir: where the run is or will be kept; None if it will be on another machine, of which only settings and shipped
            files can be checked here.
        online: False leaves to notebook 01 what may ask the network.

    Raises:
        MedcotError: of the first check that fails, saying what is wrong and what to do."""
    if run_dir is not None:
        secrets.hand_on_secrets(config.secrets)
    return [Check(name, check()) for name, check in checks(config, run_dir, online).items()]


def checks(config: RunConfig, run_dir: Path | None, online: bool = True) -> dict[str, Callable[[], str]]:
    """Return the checks of `preflight` by name, not yet made. Each returns its line or raises a MedcotError."""
    # Here, because doctor must work where only a part of the stack is installed.
    from medcot_utils.data.rows import check_data
    from medcot_utils.evaluation.comparison import check_questions
    from medcot_utils.export.gguf import check_gguf
    from medcot_utils.export.hub.push import check_hub
    from medcot_utils.models.checks import check_model, is_at_hand
    from medcot_utils.training.schedule import check_schedule
    from medcot_utils.training.tracking import check_tracker

    here = run_dir is not None
    known: dict[str, tuple[bool, Callable[[], str]]] = {  # {name: (whether it can be made, the check)}
        "profile": (here, lambda: hardware.check_profile(config.profile)),
        "model": (here and (online or is_at_hand(config.model)), lambda: check_model(config.model)),
        "training": (here, lambda: check_schedule(config.training)),
        "data": (online or _data_is_at_hand(config, here), lambda: check_data(config)),
        "questions": (online or _questions_are_at_hand(config, here), lambda: check_questions(config)),
        "tracker": (here, lambda: check_tracker(config)),  # may ask for a key, which papermill's kernels cannot
        "hub": (here and online, lambda: check_hub(config)),
        "gguf": (here, lambda: check_gguf(config)),
        "disk": (here and online, lambda: disk.check_room(config, run_dir)),  # asks the Hub for an unknown model's size
    }
    return {name: check for name, (possible, check) in known.items() if possible}


def _data_is_at_hand(config: RunConfig, here: bool) -> bool:
    return here if config.dataset.path else config.dataset.name == "shipped"


def _questions_are_at_hand(config: RunConfig, here: bool) -> bool:
    files = all(task == "shipped" or (here and task.endswith(".jsonl")) for task in config.evaluation.mcq_tasks)
    return files and config.evaluation.embedding_model is None
