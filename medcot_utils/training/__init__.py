"""The trainer and what watches it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "trainer": ["sft_arguments", "explain_arguments", "plan_training", "train"],
        "batch_plan": [
            "count_processes",
            "memory_parts",
            "batch_plans",
            "choose_plans",
            "plans_table",
            "step_plan",
        ],
        "callbacks": ["skipped_steps", "tabulate_log"],
        "progress": ["measured_memory_gb"],
        "launch": ["train_in_processes"],
        "reference_runs": ["reference_differences", "reference_band", "compare_with_reference"],
        "tracking": ["make_tracking_callbacks", "record_comparison", "describe_tracking"],
    },
)
