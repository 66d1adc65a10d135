"""The steps after `medcot kaggle build`, and what the session returns and loses."""

from __future__ import annotations

from pathlib import Path

from medcot_utils.config import RunConfig, load_config
from medcot_utils.run.artifacts import ARTIFACTS
from medcot_utils.series.kaggle.accelerators import find_accelerator
from medcot_utils.series.kaggle.build import Built, describe_secrets
from medcot_utils.series.kaggle.metadata import PLACEHOLDER_OWNER


def list_next_steps(built: Built, folder: Path) -> list[str]:
    """Return the steps from a built notebook to a fetched run, one line each, then what the session returns and loses."""
    config = load_config("article" if built.profile == "auto" else built.profile, built.settings)
    owner, _, slug = built.metadata.id.partition("/")
    kernel = f"{'NAME' if owner == PLACEHOLDER_OWNER else owner}/{slug}"
    page, place = f"https://www.kaggle.com/code/{kernel}", "" if folder == Path() else f" --folder {folder}"
    early = ", and ends in notebook 01 without the secret of step 4" if config.hub.repo_id else ""
    steps = [
        _verify(built),
        "a token, once: make one at https://www.kaggle.com/settings/api and set KAGGLE_API_TOKEN to it",
        f"push: medcot kaggle push{place}; the session starts at once{_machine(built)}{early}",
        f"secrets ({describe_secrets(config)}): a push cannot attach them. Open {page}/edit, attach them under Add-ons > "
        f"Secrets, then push again; they stay attached",
        f"look: medcot kaggle status{place or f' {kernel}'}, or the log at {page}",
        f"fetch, when it has ended: medcot kaggle output{place or f' {kernel}'} --run-dir runs/kaggle",
    ]
    return [*(f"{number}. {step}" for number, step in enumerate(steps, 1)), *_what_stays(config)]


def _verify(built: Built) -> str:
    gives = "neither Internet nor a GPU" if built.metadata.enable_gpu else "no Internet"
    return f"a phone number, once: verify yours at https://www.kaggle.com/settings; without it Kaggle gives {gives}"


def _machine(built: Built) -> str:
    if not built.metadata.machine_shape:
        return ", without a GPU"
    found = find_accelerator(built.metadata.machine_shape)
    limits = "" if found.given_to_all else "; Kaggle gives it only to participants of some competitions"
    return f" on {found.describe()}{limits}"


def _what_stays(config: RunConfig) -> list[str]:
    large = [name for name, made in ARTIFACTS.items() if made.large and (made.when is None or config.get(made.when))]
    sent = [name for name in large if config.hub.repo_id and name in config.hub.artifacts]
    lost = [name for name in large if name not in sent]
    lines = ["comes back: adapter, answers, scores, report, executed notebooks, and checkpoints while the training needs them"]
    if sent:
        lines.append(f"goes only to the Hub ({config.hub.repo_id}), because it is not in the output: {', '.join(sent)}")
    if lost:
        lines.append(
            f"ends with the session, because it is on the session's scratch disk, not in the output: {', '.join(lost)}. To keep "
            f"it, build with --set hub.repo_id=NAME/MODEL and attach the Hub's secret; or make it again from the fetched run "
            f"with medcot run"
        )
    return lines
