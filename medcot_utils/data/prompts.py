"""Hold the article's two prompt templates, join prompt and completion, and parse `<think>`."""

from __future__ import annotations

import re
from dataclasses import dataclass

INSTRUCTION = """Below is an instruction that describes a task, paired with an input that provides further context.
Write a response that appropriately completes the request.
Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a logical \
and accurate response.

### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.
Please answer the following medical question.

### Question:
{}

### Response:
"""

# As in the article. The inference prompt stops at `<think>`; the training text continues with a newline. Some tokenizers join
# it to the tag's `>`, so that the prompt ends in tokens that training never showed. `newline_after_think` fixes that.
INFERENCE_TEMPLATE = INSTRUCTION + "<think>{}"
TRAINING_TEMPLATE = INSTRUCTION + "<think>\n{}\n</think>\n{}"

ARTICLE_QUESTION = (
    "A 61-year-old woman with a long history of involuntary urine loss during activities like coughing or sneezing but no "
    "leakage at night undergoes a gynecological exam and Q-tip test. Based on these findings, what would cystometry most "
    "likely reveal about her residual volume and detrusor contractions?"
)
# The data set's own answer (row 0 of train[0:500] in the article's day).
ARTICLE_ANSWER = "Normal residual volume and no involuntary detrusor contractions."


def inference_prompt(question: str, newline_after_think: bool = True) -> str:
    """Return the text that a model continues. It ends inside the opened `<think>`."""
    return INFERENCE_TEMPLATE.format(question, "\n" if newline_after_think else "")


def training_text(question: str, complex_cot: str, response: str, eos_token: str) -> str:
    """Return one training example: prompt, reasoning, answer, and the EOS token that teaches the model to stop."""
    return TRAINING_TEMPLATE.format(question, complex_cot, response) + eos_token


@dataclass(frozen=True)
class ParsedCompletion:
    """Hold a completion taken apart. `closed` counts the `</think>` tags; thinking and answer are stripped."""

    thinking: str
    answer: str
    closed: int

    @property
    def well_formed(self) -> bool:
        """Return whether the tag is closed exactly once, with text on both sides of it."""
        return self.closed == 1 and bool(self.thinking) and bool(self.answer)


TAG = re.compile(r"</?think>")


def parse_completion(completion: str, opened: bool = True) -> ParsedCompletion:
    """Split a completion into thinking and answer. `opened`: the prompt has opened the tag already.

    If the tag is never closed, everything is thinking. If it is closed but never opened, the text before it is thinking. If
    it is neither, everything is the answer. The first `</think>` ends the thinking; other tags are removed from the text, and
    every closing one is counted."""
    closed, preface, body = completion.count("</think>"), "", completion
    if not opened and "<think>" in completion:
        preface, _, body = completion.partition("<think>")
    elif not opened and not closed:
        return ParsedCompletion("", completion.strip(), 0)
    thinking, _, answer = body.partition("</think>")
    thinking, answer = TAG.sub("", thinking).strip(), TAG.sub("", f"{preface}{answer}").strip()
    return ParsedCompletion(thinking, answer, closed)
