"""Serve the chat as a local page: tuned and base model side by side, with folded thinking, and all texts as plain text.

gradio's ChatInterface has only one column, and the fold of Chatbot's `reasoning_tags` cannot say how long the thinking took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from medcot_utils.cli import web
from medcot_utils.models.chat import WARNING, Answer, Chat, ChatError, Who, choose_sides
from medcot_utils.plain_text import say
from medcot_utils.run.directory import Run

if TYPE_CHECKING:
    import gradio

# gradio's fold is a button, and its arrow is a button without a name inside it. Only the arrow's picture stays visible.
CSS = """
.message { white-space: pre-wrap; overflow-wrap: anywhere; }
.thought-group .arrow button { visibility: hidden; }
.thought-group .arrow svg { visibility: visible; }
"""


def build_column(question: str, answer: Answer, most_tokens: int) -> list[gradio.ChatMessage]:
    """Return the messages of one model's column: the question, the thinking in its own fold, and the answer.

    `most_tokens`: as in `Answer.explain_missing`. Texts are escaped, because gradio renders HTML tags even if Markdown is off."""
    from gradio import ChatMessage

    ended = answer.done or answer.seconds_thinking is not None
    fold = {"title": answer.summarize_thinking(), "status": "done"} if ended else {"title": "thinking", "status": "pending"}
    messages = [
        ChatMessage(web.escape(question), role="user"),
        ChatMessage(web.escape(answer.thinking or "..."), metadata=fold),
    ]
    if answer.text or answer.done:
        messages.append(ChatMessage(web.escape(answer.text or answer.explain_missing(most_tokens))))
    return messages


def build_page(chat: Chat, base_too: bool) -> gradio.Blocks:
    """Build the page of a chat. The model answers each question by itself, so each answer replaces the one before."""
    import gradio as gr

    def ask(question: str, with_base: bool) -> Iterator[list[list]]:
        columns: dict[Who, list] = {"base": [], "tuned": []}
        try:
            if len(question) > web.MOST_CHARACTERS:  # only the browser enforces the text box's own limit
                raise ChatError(f"the question is too long: at most {web.MOST_CHARACTERS:,} characters")
            for who in choose_sides(with_base):
                for answer in chat.stream(question, who):
                    columns[who] = build_column(question, answer, chat.most_tokens)
                    yield list(columns.values())
        except ChatError as error:
            raise gr.Error(web.escape(str(error)), print_exception=False) from error

    with gr.Blocks(title="medcot chat", analytics_enabled=False) as page:
        gr.HTML(
            f"<h1>medcot chat</h1><p><b>{WARNING}</b> The model answers each question by itself, without the ones before.</p>"
        )
        with gr.Row():
            how = {"render_markdown": False, "height": 460, "sanitize_html": True, "buttons": []}
            base = gr.Chatbot(label="base model", visible=base_too, **how)
            tuned = gr.Chatbot(label="tuned model", **how)
        question = gr.Textbox(label="Question", lines=3, placeholder="a clinical question", max_length=web.MOST_CHARACTERS)
        with gr.Row():
            send, stop = gr.Button("Ask", variant="primary"), gr.Button("Stop")
        both = gr.Checkbox(label="Also the base model", value=base_too)
        both.change(lambda on: gr.Chatbot(visible=on), both, base, api_name=False, queue=False)
        # Only one answer at a time, because the adapter is on or off for all of them.
        asked = send.click(ask, [question, both], [base, tuned], api_name="ask", concurrency_limit=1)
        stop.click(None, cancels=[asked], api_name=False)
    return page


def serve(run: Run, base_too: bool, port: int, open_browser: bool) -> None:
    """Load the run's model, and serve the chat on 127.0.0.1 until interrupted.

    Before anything is loaded, raises ChatError if the port is taken, and RunError if there is no adapter."""
    listener = web.listen(port, ChatError)
    say(WARNING)
    chat = Chat.open(run)
    web.serve(build_page(chat, base_too), listener, "chat page", CSS, run.path, open_browser)
