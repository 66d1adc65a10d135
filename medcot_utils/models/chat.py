"""Talking with a run's tuned model: one answer at a time, streamed, the thinking told from the answer as it comes."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from medcot_utils.data.prompts import inference_prompt
from medcot_utils.errors import MedcotError
from medcot_utils.models.generation import generate_arguments
from medcot_utils.run.directory import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WARNING = "Not for clinical use: this model was tuned to study form and style, and its medicine can be wrong in every way."
Who = Literal["tuned", "base"]
Part = Literal["thinking", "answer"]
_TAG = re.compile(r"</?think>")


class ChatError(MedcotError):
    """A question cannot be answered as asked; the message says why. The chat itself goes on."""


def split_thinking(pieces: Iterable[str]) -> Iterator[tuple[Part, str]]:
    """Pieces of a completion whose `<think>` the prompt has opened, each with what it is a piece of, as soon as that is certain.

    As `parse_completion` does it: the first `</think>` ends the thinking, other tags are left out."""
    part: Part = "thinking"
    held = ""
    for piece in pieces:
        held += piece
        while tag := _TAG.search(held):
            if before := held[: tag.start()]:
                yield part, before
            held = held[tag.end() :]
            if tag[0] == "</think>":
                part = "answer"
        # What may yet become a tag waits for the next piece.
        keep = next((n for n in range(7, 0, -1) if "</think>".startswith(held[-n:]) or "<think>".startswith(held[-n:])), 0)
        keep = min(keep, len(held))
        if ready := held[: len(held) - keep]:
            yield part, ready
        held = held[len(held) - keep :]
    if held:
        yield part, held


class Chat:
    """A run's tuned model, loaded once. The base model is the same one with its adapter switched off."""

    def __init__(self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.run, self.model, self.tokenizer = run, model, tokenizer
        self._busy = threading.Lock()  # one answer at a time: the adapter is on or off for all

    @classmethod
    def open(cls, run: Run) -> Chat:
        """Load base and adapter as the run's engine does. Raises RunError naming the notebook if there is no adapter."""
        from medcot_utils.models.engine import get_engine

        adapter = run.require("adapter")
        engine = get_engine(run.config.model)
        model, tokenizer = engine.load(run.config.model, adapter)
        return cls(run, engine.for_inference(model), tokenizer)

    def stream(self, question: str, who: Who = "tuned") -> Iterator[tuple[Part, str]]:
        """The answer to one question, piece by piece, as ("thinking" | "answer", text); the run's prompt and generation settings.

        Closing the iterator stops the generation. Raises ChatError, before the model is asked, for an empty question or one
        that leaves no room for an answer; what fails within the generation is raised here too."""
        return self._stream(self._inputs(question), who)

    def _stream(self, inputs: Any, who: Who) -> Iterator[tuple[Part, str]]:
        with contextlib.closing(self._pieces(inputs, who)) as pieces:
            yield from split_thinking(pieces)

    def _inputs(self, question: str) -> Any:
        if not question.strip():
            raise ChatError("the question is empty")
        config = self.run.config
        prompt = inference_prompt(question.strip(), config.prompt.newline_after_think)
        inputs = self.tokenizer([prompt], return_tensors="pt")
        length, room = inputs["input_ids"].shape[1], config.model.max_seq_length
        if length >= room:
            raise ChatError(f"the question is too long: with the prompt {length} tokens, and model.max_seq_length is {room}")
        return inputs.to(self.model.device)

    def _pieces(self, inputs: Any, who: Who) -> Iterator[str]:
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        stopped, failed = threading.Event(), []
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments = generate_arguments(self.run.config.generation, self.tokenizer)
        room = self.model.config.get_text_config().max_position_embeddings - inputs["input_ids"].shape[1]
        arguments["max_new_tokens"] = min(arguments["max_new_tokens"], room)

        def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((ids.shape[0],), stopped.is_set(), device=ids.device)

        def generate() -> None:
            try:
                torch.manual_seed(self.run.config.seed)
                with torch.inference_mode():
                    self.model.generate(
                        **inputs, **arguments, streamer=streamer, stopping_criteria=StoppingCriteriaList([enough])
                    )
            except BaseException as error:  # noqa: BLE001 - handed to the thread that reads, and raised there
                failed.append(error)
                streamer.end()

        with self._busy, self._as(who):
            worker = threading.Thread(target=generate, daemon=True)
            worker.start()
            try:
                yield from streamer
            finally:
                stopped.set()
                worker.join()
        if failed:
            raise failed[0]

    def _as(self, who: Who) -> Any:
        return self.model.disable_adapter() if who == "base" else contextlib.nullcontext()


class Answer:
    """What has come of an answer so far: thinking, answer, and seconds since it was asked."""

    def __init__(self) -> None:
        self.thinking = self.answer = ""
        self.began = time.perf_counter()
        self.thought_for: float | None = None

    def add(self, part: Part, text: str) -> None:
        """Append a piece of `Chat.stream`."""
        if part == "thinking":
            self.thinking += text
        else:
            self.thought_for = self.thought_for or time.perf_counter() - self.began
            self.answer += text

    def folded(self) -> str:
        """The thinking as one line: its length, and how long it took; what to say where it never ended."""
        words = len(self.thinking.split())
        if self.thought_for is None:
            return f"thinking, not finished: {words} words"
        return f"thinking: {words} words, {self.thought_for:.1f} s"
