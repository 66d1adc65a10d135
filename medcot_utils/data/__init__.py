"""Prepare rows, prompts and tokens; the shipped files lie here too."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "account": ["describe_uses", "list_uses", "tabulate_uses"],
        "rows": ["load_rows", "validate_rows", "split_rows", "choose_questions", "drop_repeats"],
        "tokens": ["add_text_column", "tokenize_rows", "check_labels", "summarize_preparation"],
        "contamination": ["find_repeats", "tabulate_repeats"],
        "prompts": ["ARTICLE_QUESTION", "INFERENCE_TEMPLATE", "TRAINING_TEMPLATE"],
    },
)
