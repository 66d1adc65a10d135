"""Merge weights, check them, and publish them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "measured": ["open_merged", "measure_merged"],
        "merged": ["save_adapter", "save_merged", "probe_references", "verify_export", "require_agreement"],
        "model_card": ["model_card"],
        "gguf": ["save_gguf", "verify_gguf", "require_gguf_agreement"],
        "hub.push": ["publish"],
        "hub.records": ["push_table"],
    },
)
