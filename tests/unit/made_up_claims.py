"""Differences that no model made, and what the claims' verdicts on them are."""

from __future__ import annotations

from medcot_utils.evaluation.claims import CLAIMS, judge

BY_METRIC = {next(iter(claim.expected)): claim.text for claim in CLAIMS}


def made(value, low, high, n=20, **test):
    sides = {side: {"value": 1.0, "low": 0.9, "high": 1.1, "n": n} for side in ("base", "tuned")}
    return sides | {"difference": {"value": value, "low": low, "high": high, "n": n, "spread": 0.5, "needed": 40} | test}


def judged_record(metric, records):
    return next(record for record in records if record["claim"] == BY_METRIC[metric])


def verdict_of(metric, metrics):
    return judged_record(metric, judge(metrics, metrics, {}))["verdict"]
