"""Load a model's tokenizer in the form that the series needs, for any family of models.

Training texts contain their EOS, and prompts end inside `<think>`, so a tokenizer must add nothing after a text. Answers are
parsed by their `<think>` tags, so a decoded text must show them. The pad token must have a row in the model's embedding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from medcot_utils.data.prompts import inference_prompt, training_text
from medcot_utils.errors import MedcotError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_CODE = "medcot runs no code that comes with a model. Name a model whose code is in transformers"
# {words in a library's refusal to run code: what code it is}
_REFUSED = {
    "trust_remote_code": "its own code (auto_map in a .json file of its folder)",
    "`kernels` is either not installed": "code from a hub (attn_implementation in its config.json)",
}
THINK_TAGS = ("<think>", "</think>")


class ModelError(MedcotError):
    """Say why a model, its tokenizer, or its files cannot be used in the series, and what to do."""


def load_tokenizer_from(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model source, prepared by `prepare_tokenizer`.

    Raises ModelError as that does, and if the tokenizer needs its own code."""
    from transformers import AutoConfig, AutoTokenizer

    named = {"revision": revision, "trust_remote_code": False}
    with own_code_refused(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **named)
        rows = AutoConfig.from_pretrained(source, **named).get_text_config().vocab_size
    return prepare_tokenizer(tokenizer, rows)


@contextmanager
def own_code_refused(source: str | Path) -> Iterator[None]:
    """Raise ModelError if what the block loads, with `trust_remote_code=False`, needs its own code or code from a hub."""
    try:
        yield
    except (ValueError, RuntimeError, ImportError) as error:  # Unsloth raises the second, transformers the third
        for word, code in _REFUSED.items():
            if word in str(error):
                raise ModelError(f"{source} needs {code}: {NO_CODE}") from error
        raise


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> PreTrainedTokenizerBase:
    """Prepare a tokenizer in place, and return it.

    It then adds no EOS after a text, and `<think>` and `</think>` are ordinary tokens, because decoding leaves out control
    tokens. If it has no pad token, or one beyond the `rows` of the model's embedding, EOS becomes the pad token (as in TRL).

    Raises:
        ModelError: if the tokenizer gives no offsets, has no EOS token, cannot be kept from adding EOS, or encodes the series'
            own prompt with a token that the embedding lacks."""
    name = Path(tokenizer.name_or_path).name
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: its tokenizer is a slow one (Python only), and labels need the offsets of a fast one")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: its tokenizer names no EOS token (eos_token in tokenizer_config.json), so no answer would end")
    _put_no_eos_after(tokenizer)
    _show_think_tags(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    text = training_text("", "", "", tokenizer.eos_token)
    if beyond := sorted({token for token in tokenizer(text)["input_ids"] if token >= rows}):
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        raise ModelError(
            f"{name}: its tokenizer writes {token!r} as token {beyond[0]}, and the model's embedding has {rows} rows: tokens "
            f"were added without resizing it. Use the tokenizer that belongs to these weights"
        )
    return tokenizer


def ends_in_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer adds its EOS after a text."""
    return tokenizer(inference_prompt("a"))["input_ids"][-1] == tokenizer.eos_token_id


def _put_no_eos_after(tokenizer: PreTrainedTokenizerBase) -> None:
    if not ends_in_eos(tokenizer):
        return
    tokenizer._add_eos_token = False  # this value is saved; its setter would drop a processor that adds more than BOS and EOS
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = stored["post_processor"].get("processors", [stored["post_processor"]])
    for template in (step for step in steps if step["type"] == "TemplateProcessing"):
        for kind in ("single", "pair"):
            template[kind] = [part for part in template[kind] if part.get("SpecialToken", {}).get("id") != tokenizer.eos_token]
    _restore(tokenizer, stored)
    if ends_in_eos(tokenizer):
        raise ModelError(
            f"{Path(tokenizer.name_or_path).name}: its tokenizer ends every text, even prompts, with {tokenizer.eos_token!r}, "
            f"after which a model writes something new. Save it without (add_eos_token: false)"
        )


def _show_think_tags(tokenizer: PreTrainedTokenizerBase) -> None:
    if not any(token.special and token.content in THINK_TAGS for token in tokenizer.added_tokens_decoder.values()):
        return
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in stored["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in THINK_TAGS
    tokenizer._extra_special_tokens = [token for token in tokenizer._extra_special_tokens if str(token) not in THINK_TAGS]
    _restore(tokenizer, stored)


def _restore(tokenizer: PreTrainedTokenizerBase, stored: dict[str, object]) -> None:
    # transformers has no method for this; its own `train_new_from_iterator` sets the same attribute.
    from tokenizers import Tokenizer

    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(stored))
