"""Chat with a run's tuned model: one answer at a time, streamed, with the thinking apart from the answer.

The terminal and the page of `medcot chat` both show what `Chat.stream` yields. The pieces come from transformers'
TextIteratorStreamer. It cannot stop a generation and does not pass on errors, so this module does both."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from medcot_utils.data.prompts import inference_prompt, parse_completion
from medcot_utils.data.words import split_words
from medcot_utils.errors import MedcotError
from medcot_utils.models.engine import get_engine
from medcot_utils.models.generation import generate_arguments
from medcot_utils.run.directory import Run

if TYPE_CHECKING:
    import torch
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

WARNING = "Not for clinical use: this model was tuned to study form and style. Its medicine can be wrong in any way."
Who = Literal["tuned", "base"]
_CUT_TAG = re.compile(r"</?[think]{0,5}$")


def choose_sides(base_too: bool) -> tuple[Who, ...]:
    """Return the models to ask, in the order in which their answers are shown."""
    return ("base", "tuned") if base_too else ("tuned",)


class ChatError(MedcotError):
    """Say why a question cannot be answered. The chat itself continues."""


@dataclass(frozen=True)
class Answer:
    """Hold an answer as far as it has been generated.

    `seconds_thinking` is None until the thinking has ended. `done` is true once the answer is complete."""

    thinking: str = ""
    text: str = ""
    seconds_thinking: float | None = None
    done: bool = False

    def explain_missing(self, most_tokens: int) -> str:
        """Return a line for an answer without text: nothing came after the thinking, or the thinking did not end. `most_tokens`
        is the budget of thinking and answer together; the model may have stopped before."""
        if self.seconds_thinking is not None:
            return "(no answer after the thinking)"
        return (
            f"(no answer: the thinking was not finished. The budget is {most_tokens} tokens, generation.max_new_tokens; a "
            f"tuned model best answers what resembles its training rows)"
        )

    def summarize_thinking(self) -> str:
        """Return one line on the thinking: its length in words, and how long it took or that it did not end."""
        words = len(split_words(self.thinking))
        if self.seconds_thinking is None:
            return f"thinking, not finished: {words} words"
        return f"thinking: {words} words, {self.seconds_thinking:.1f} s"


def grow_answer(pieces: Iterable[str]) -> Iterator[Answer]:
    """Yield the answer after each piece of a completion whose `<think>` the prompt has opened; the last one is `done`.

    `parse_completion` parses it, as it does scored answers. The start of a tag is held back until the next piece."""
    began, completion, answer = time.perf_counter(), "", Answer()
    for piece in pieces:
        completion += piece
        parsed = parse_completion(_CUT_TAG.sub("", completion))
        seconds = answer.seconds_thinking
        if parsed.closed and seconds is None:
            seconds = time.perf_counter() - began
        answer = Answer(parsed.thinking, parsed.answer, seconds)
        yield answer
    parsed = parse_completion(completion)
    yield replace(answer, thinking=parsed.thinking, text=parsed.answer, done=True)


class Chat:
    """Answer questions with a run's tuned model, loaded once.

    The base model is the same model with its adapter turned off. If the training also changed biases of the base (lora.bias),
    the base model is loaded separately."""

    def __init__(self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.run, self.model, self.tokenizer = run, model, tokenizer
        self.most_tokens = run.config.generation.max_new_tokens  # of an answer with its thinking
        self._base: PreTrainedModel | None = None
        self._busy = threading.Lock()  # one answer at a time: the adapter is on or off for everyone

    @classmethod
    def open(cls, run: Run) -> Chat:
        """Load base and adapter with the run's engine. Raises RunError, which names the notebook, if there is no adapter."""
        adapter = run.require("adapter")
        engine = get_engine(run.config.model)
        model, tokenizer = engine.load(run.config.model, adapter)
        return cls(run, engine.for_inference(model), tokenizer)

    def stream(self, question: str, who: Who = "tuned", stop: threading.Event | None = None) -> Iterator[Answer]:
        """Yield the growing answer to one question, generated with the run's prompt and generation settings.

        Setting `stop`, or closing the iterator, ends the answer after the current token. Raises ChatError, before the model is
        asked, if the question is empty or leaves no room for an answer. Errors of the generation are raised here too."""
        return self._stream(self._encode(question), who, stop or threading.Event())

    def _stream(self, inputs: BatchEncoding, who: Who, stop: threading.Event) -> Iterator[Answer]:
        with contextlib.closing(self._pieces(inputs, who, stop)) as pieces:
            yield from grow_answer(pieces)

    def choose_model(self, who: Who) -> tuple[PreTrainedModel, contextlib.AbstractContextManager[None]]:
        """Return the model that answers, and the context manager in which it must generate."""
        if who == "tuned":
            return self.model, contextlib.nullcontext()
        if self.run.config.lora.bias == "none":
            return self.model, self.model.disable_adapter()
        if self._base is None:
            engine = get_engine(self.run.config.model)
            self._base = engine.for_inference(engine.load(self.run.config.model)[0])
        return self._base, contextlib.nullcontext()

    def _encode(self, question: str) -> BatchEncoding:
        if not question.strip():
            raise ChatError("the question is empty")
        config = self.run.config
        prompt = inference_prompt(question.strip(), config.prompt.newline_after_think)
        inputs = self.tokenizer([prompt], return_tensors="pt")
        length, room = inputs["input_ids"].shape[1], config.model.max_seq_length
        if length >= room:
            raise ChatError(f"the question is too long: with the prompt it has {length} tokens; model.max_seq_length is {room}")
        return inputs.to(self.model.device)

    def _pieces(self, inputs: BatchEncoding, who: Who, stop: threading.Event) -> Iterator[str]:
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        closed = threading.Event()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments = generate_arguments(self.run.config.generation, self.tokenizer)
        room = self.model.config.get_text_config().max_position_embeddings - inputs["input_ids"].shape[1]
        arguments["max_new_tokens"] = min(arguments["max_new_tokens"], room)

        def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((ids.shape[0],), stop.is_set() or closed.is_set(), device=ids.device)

        def generate() -> None:
            torch.manual_seed(self.run.config.seed)
            with torch.inference_mode():
                model.generate(**inputs, **arguments, streamer=streamer, stopping_criteria=StoppingCriteriaList([enough]))

        model, adapter = self.choose_model(who)
        with self._busy, adapter, ThreadPoolExecutor(1) as pool:
            made = pool.submit(generate)
            made.add_done_callback(lambda _: streamer.end())  # a failed generation leaves the stream open
            try:
                yield from streamer
            finally:
                closed.set()
            made.result()
