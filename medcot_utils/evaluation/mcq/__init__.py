"""Multiple choice: the questions, the lm-eval tasks that ask them (the YAML files here), and the scores."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run": ["run_tasks"],
        "readings": ["compare_readings", "readings_table"],
        "scores": [
            "compare_mcq",
            "overview",
            "published_scores",
            "seen_in_training",
            "specialty_table",
            "split_seen",
        ],
    },
)
