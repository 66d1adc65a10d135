"""Load a model and generate answers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batch_check": ["check_batches"],
        "engine": ["get_engine", "load_tokenizer"],
        "generation": ["generate_arguments", "own_generation_settings", "make_streamer", "answer_questions"],
        "layerwise": ["base_16bit_losses", "describe_16bit_base"],
        "losses": ["mean_loss", "row_losses"],
        "merging": ["load_unquantized"],
        "other_gpus": ["OtherGpus"],
        "records": ["make_record", "show_text"],
    },
)
