"""The changes between two configurations, and since an artifact was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from medcot_utils.config import RunConfig, setting_names
from medcot_utils.run.artifacts import ARTIFACTS

if TYPE_CHECKING:
    from medcot_utils.run.directory import Run


def describe_changes(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Return `setting old -> new` for every setting of `before` that has another value in `after`."""
    changed = [name for name, value in before.items() if name in after and after[name] != value]
    return [f"{name} {_show(before[name])} -> {_show(after[name])}" for name in changed]


def describe_new_settings(before: RunConfig, after: RunConfig) -> list[str]:
    """Return `setting old -> new` for every setting that is another one in the second configuration."""
    names = setting_names()
    return describe_changes(before.leaves(names), after.leaves(names))


def _show(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _describe_input(key: str, before: bool, now: bool) -> str:
    """Return what is new about an input: its content, or that it is one at all, which the setting `Artifact.when` decides."""
    if key not in ARTIFACTS:
        return f"{key} changed"
    artifact = ARTIFACTS[key]
    if before and now:
        return f"{artifact.file} changed"
    return f"{artifact.file} is {'asked for now' if now else 'no longer asked for'} ({artifact.when})"


def why_stale(run: Run, name: str) -> list[str]:
    """Return why an artifact must be made again, one reason each; never empty for one that is not fresh."""
    artifact, entry = ARTIFACTS[name], run.manifest()["artifacts"].get(name)
    if entry is None:
        return [f"{artifact.file} is not there yet"]
    reasons = describe_changes(entry.get("settings", {}), run.config.leaves(artifact.settings))
    absent = [source for source in filter(run.wants, artifact.inputs) if source not in run.manifest()["artifacts"]]
    if absent:
        return [f"{ARTIFACTS[source].file} is not there" for source in absent]
    digests = run.input_digests(artifact, entry["inputs"])
    changed = [key for key in {**entry["inputs"], **digests} if entry["inputs"].get(key) != digests.get(key)]
    reasons += [_describe_input(key, key in entry["inputs"], key in digests) for key in changed]
    if not reasons and entry["fingerprint"] != run.fingerprint(name, entry["inputs"]):
        made_anew = "settings" in entry  # the same ones as today
        return [f"this version makes {artifact.file} differently" if made_anew else "settings changed"]
    return reasons or [f"{artifact.file} is missing, or differs from its record"]
