"""Make every possible check before expensive work: one line per check, or one error.

Notebook 01 makes all checks. `medcot run` and `medcot train` make those that need no network, `medcot doctor` makes them for each
profile, and `medcot kaggle build` makes those that are possible here for another machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medcot_utils.config import SECRETS_STAY_OUT, ConfigError, RunConfig, overrides_of
from medcot_utils.machine import disk, environment, hardware, paths, redaction, secrets


@dataclass(frozen=True)
class Check:
    """Hold a check that passed."""

    name: str  # profile, model, training, data, questions, answers, tracker, hub, gguf, disk
    line: str


def preflight(config: RunConfig, run_dir: Path | None, online: bool = True) -> list[Check]:
    """Check everything that a run with these settings needs, after passing on the secrets to the clients that read them.

    Args:
        run_dir: the run directory, which need not exist yet; None for a run on another machine, for which only settings and
            shipped files can be checked here.
        online: False leaves checks that may need the network to notebook 01.

    Raises:
        ConfigError: if a setting holds a secret that is known here; the message does not repeat it.
        MedcotError: the error of the first check that fails, which says what is wrong and what to do."""
    if run_dir is not None:
        secrets.hand_on_secrets(config.secrets)
    _refuse_secrets(config)
    return [Check(name, check()) for name, check in checks(config, run_dir, online).items()]


def _refuse_secrets(config: RunConfig) -> None:
    pairs = [pair.partition("=") for pair in overrides_of(config)]  # a profile's own values are public
    texts = {f"setting {name}": value for name, _, value in pairs if not name.startswith("secrets.")}
    if found := redaction.name_holders(texts, redaction.secrets_at_hand()):
        raise ConfigError(f"{'; '.join(found)}. {SECRETS_STAY_OUT}")


def checks(config: RunConfig, run_dir: Path | None, online: bool = True) -> dict[str, Callable[[], str]]:
    """Return {name: check} for `preflight`. Each check returns its line or raises a MedcotError when it is called."""
    # The imports are here, because `medcot doctor` must work with only a part of the stack installed.
    from medcot_utils.data.rows import check_data
    from medcot_utils.evaluation.comparison import check_questions
    from medcot_utils.evaluation.mcq.run import list_prompts
    from medcot_utils.export.gguf import check_gguf
    from medcot_utils.export.hub.push import check_hub
    from medcot_utils.models.checks import check_answers, check_model, is_at_hand
    from medcot_utils.models.embedded import is_made
    from medcot_utils.training.schedule import check_schedule
    from medcot_utils.training.tracking import check_tracker

    here = run_dir is not None
    asked = config if online else _with_questions_at_hand(config, here)
    with_data, forced = online or _data_is_at_hand(config, here), config.evaluation.answer_tokens is not None
    with_model = is_at_hand(config.model) and is_made(config.model.name)  # notebook 01 makes an embedded model
    known: dict[str, tuple[bool, Callable[[], str]]] = {  # {name: (whether the check is possible, the check)}
        "profile": (here, lambda: _check_machine(config, run_dir)),
        "model": (here and (online or is_at_hand(config.model)), lambda: check_model(config.model)),
        "training": (here, lambda: check_schedule(config.training)),
        "data": (with_data, lambda: check_data(config)),
        "questions": (bool(asked), lambda: check_questions(asked)),
        "answers": (
            forced and here and (online or (with_model and with_data)),
            lambda: check_answers(config, list_prompts(asked) if asked else ()),
        ),
        "tracker": (here, lambda: check_tracker(config)),  # it may ask the user for a key, which papermill's kernels cannot
        "hub": (here and online, lambda: check_hub(config)),
        "gguf": (here, lambda: check_gguf(config)),
        "disk": (here and online, lambda: disk.check_room(config, run_dir)),  # it asks the Hub for an unknown model's size
    }
    return {name: check for name, (possible, check) in known.items() if possible}


def _check_machine(config: RunConfig, run_dir: Path) -> str:
    line = hardware.check_profile(config.profile)
    if config.training.num_processes not in (1, "auto"):
        hardware.require_gpus(config.training.num_processes)
    check_environment(config, run_dir)
    return line


def check_environment(config: RunConfig, run_dir: Path) -> None:
    """Check the environment of a run.

    Raises PlatformError if a local folder is missing, if the Hub's client cannot use the proxy, or if a cache or scratch folder
    cannot be written or could have been filled by other users."""
    from medcot_utils.models import embedded

    environment.check_local_paths(config)
    if environment.asks_the_hub(config):
        environment.check_proxies()
    if not embedded.is_made(config.model.name):
        environment.require_writable(paths.cache_dir(), "MEDCOT_CACHE", "the embedded model")
    disk.check_hub_cache(config)
    if (scratch := paths.scratch_dir(run_dir)) != run_dir:
        environment.require_writable(scratch, "MEDCOT_SCRATCH", "the merged model")


def _data_is_at_hand(config: RunConfig, here: bool) -> bool:
    return here if config.dataset.path else config.dataset.name == "shipped"


def _with_questions_at_hand(config: RunConfig, here: bool) -> RunConfig | None:
    """Return the configuration with only the multiple-choice tasks that can be checked offline; None to leave out the check.

    These are `shipped`, local files, and unknown names, which the check refuses. The check is left out if there are no local
    files and unknown names, unless `shipped` is the only task and there is no embedding model."""
    from medcot_utils.evaluation.mcq.run import TASK_NAMES

    given = config.evaluation
    known = [task for task in given.mcq_tasks if task == "shipped"]
    own = [task for task in given.mcq_tasks if task not in TASK_NAMES and (here or not task.endswith(".jsonl"))]
    whole = len(known) == len(given.mcq_tasks) and given.embedding_model is None
    if not own and not whole:
        return None
    offline = given.model_copy(update={"mcq_tasks": (*known, *own), "embedding_model": None})
    return config.model_copy(update={"evaluation": offline})
