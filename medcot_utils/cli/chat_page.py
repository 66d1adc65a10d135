"""The chat as a page of this machine: tuned and base model side by side, thinking folded, everything shown as plain text."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from medcot_utils.cli import web
from medcot_utils.models.chat import WARNING, Answer, Chat, ChatError, Who
from medcot_utils.run.directory import Run

if TYPE_CHECKING:
    import gradio

CSS = ".message { white-space: pre-wrap; overflow-wrap: anywhere; }"


def shown(question: str, answer: Answer, done: bool) -> list[dict[str, Any]]:
    """What a column shows of one answer: the question, the thinking in a fold of its own, the answer; as HTML that shows each
    text as it is, since gradio takes tags for tags without Markdown too."""
    thinking = answer.thinking.strip() or "..."
    folded = {
        "title": answer.folded() if done or answer.answer else "thinking",
        "status": "done" if done or answer.answer else "pending",
    }
    messages = [
        {"role": "user", "content": html.escape(question)},
        {"role": "assistant", "content": html.escape(thinking), "metadata": folded},
    ]
    if answer.answer.strip() or done:
        text = answer.answer.strip() or "(no answer after the thinking)"
        messages.append({"role": "assistant", "content": html.escape(text)})
    return messages


def build_page(chat: Chat, base_too: bool) -> gradio.Blocks:
    """The page over a chat. Each question stands alone, so that each answer replaces the one before."""
    import gradio as gr

    def ask(question: str, with_base: bool) -> Iterator[list[Any]]:
        columns: dict[Who, list[dict[str, Any]]] = {"base": [], "tuned": []}
        for who in ("base", "tuned") if with_base else ("tuned",):
            answer = Answer()
            try:
                for part, text in chat.stream(question, who):
                    answer.add(part, text)
                    columns[who] = shown(question, answer, done=False)
                    yield [columns["base"], columns["tuned"]]
            except ChatError as error:
                raise gr.Error(str(error), print_exception=False) from error
            columns[who] = shown(question, answer, done=True)
            yield [columns["base"], columns["tuned"]]

    with gr.Blocks(title="medcot chat", analytics_enabled=False) as page:
        gr.HTML(f"<p><b>{WARNING}</b> Each question stands alone.</p>")
        with gr.Row():
            how = {"render_markdown": False, "height": 460, "sanitize_html": True, "buttons": []}
            base = gr.Chatbot(label="base model", visible=base_too, **how)
            tuned = gr.Chatbot(label="tuned model", **how)
        question = gr.Textbox(label="Question", lines=3, placeholder="a clinical question", max_length=20_000)
        with gr.Row():
            send, stop = gr.Button("Ask", variant="primary"), gr.Button("Stop")
        both = gr.Checkbox(label="The base model too", value=base_too)
        both.change(lambda on: gr.Chatbot(visible=on), both, base, api_name=False, queue=False)
        # One answer at a time: the adapter is on or off for all who ask.
        asked = send.click(ask, [question, both], [base, tuned], api_name="ask", concurrency_limit=1)
        stop.click(None, cancels=[asked], api_name=False)
    return page


def serve(run: Run, base_too: bool, port: int, open_browser: bool) -> None:
    """Load the run's model and serve the chat on 127.0.0.1 until interrupted.

    Raises ChatError if the port is taken, and RunError if there is no adapter, before anything is loaded."""
    listener = web.listen(port, ChatError)
    print(WARNING)
    chat = Chat.open(run)
    web.serve(build_page(chat, base_too), listener, "chat page", CSS, run.path, open_browser)
