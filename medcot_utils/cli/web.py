"""Serve a page on 127.0.0.1 only, with nothing loaded from elsewhere: the grading page and the chat page."""

from __future__ import annotations

import html
import os
import socket
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from medcot_utils.errors import MedcotError
from medcot_utils.plain_text import say, show_controls

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
# The browser itself refuses anything from elsewhere, even if a later gradio asks for it. Its templates need inline and eval.
CONTENT_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"


def escape(text: str) -> str:
    """Return HTML that shows a text as it is. The marks of gradio's own templates ($, {, }) are escaped too."""
    return html.escape(show_controls(text)).translate({ord(mark): f"&#{ord(mark)};" for mark in "${}"})


def listen(port: int, error_class: type[MedcotError]) -> socket.socket:
    """Return a listening socket on 127.0.0.1; `port` 0 means any free one. Raises `error_class`, in one line, if it is taken."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        why = os.strerror(error.errno)
        raise error_class(f"port {port} on {HOST} cannot be used ({why}): choose another with --port, or leave it out") from error


def serve(page: gradio.Blocks, listener: socket.socket, what: str, css: str, keep_out: Path, open_browser: bool) -> None:
    """Serve a page until interrupted, and print its address. No file below `keep_out` can be fetched through it."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    # Mounted, not launched: launch() takes host, sharing and proxies from the environment, and asks its own address there.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    hidden = {"footer_links": [], "run_history": False, "blocked_paths": [str(keep_out.absolute())], "enable_monitoring": False}
    plain = {"ssr_mode": False, "mcp_server": False, "theme": theme, "css": css}
    app = gr.mount_gradio_app(FastAPI(), page, "/", **hidden, **plain)
    # An open page holds a connection forever: do not wait for it.
    headers = [("Content-Security-Policy", CONTENT_POLICY)]
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", headers=headers, timeout_graceful_shutdown=1))
    address = f"http://{HOST}:{listener.getsockname()[1]}/"
    say(f"{what}: {address} (Ctrl-C ends it)", flush=True)
    if open_browser:
        webbrowser.open(address)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return
