"""Scores, intervals, verdicts, and the report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules={"mcq"},
    submod_attrs={
        "scored_set": ["score", "score_merged"],
        "comparison": [
            "compare",
            "compare_sampled",
            "metrics_table",
            "conclusions",
            "needed_table",
        ],
        "merged": ["compare_merged", "merged_table", "merged_verdicts_table"],
        "loss": ["compare_loss_bars", "losses_table"],
        "measured": ["Measured", "measure"],
        "claims": ["judge", "claims_table"],
        "report": ["build_report"],
    },
)
