"""Serve a page (grading or chat) to this user, only on 127.0.0.1, and without loading anything from elsewhere.

Any user of the machine can reach its ports, and so can any website that is open in a browser there. So each request must have
the token from the address, and must name this machine and this page as its host and origin."""

from __future__ import annotations

import contextlib
import hmac
import html
import os
import re
import secrets
import socket
import tempfile
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medcot_utils.errors import MedcotError
from medcot_utils.plain_text import say, show_controls

if TYPE_CHECKING:
    import gradio
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = "127.0.0.1"
MOST_CHARACTERS = 20_000  # of a text that is typed on a page
_MOST_BYTES = 1 << 20  # of a request; such a text takes a quarter of it if each character is escaped
# The browser refuses anything from elsewhere, even if a later gradio asks for it. gradio's templates need inline and eval.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",  # the address holds the token
}
# A heading names the page and needs only one line of space.
_CSS = "h1, h2 { font-size: 1.1rem; font-weight: 600; margin: 0; }"
# The requests of the page's buttons. gradio's other requests, such as uploads, are refused.
_POSTS = re.compile(r"gradio_api/(queue/join|run/\w+|call/\w+|cancel|reset)/?")


class Guard:
    """Pass the user's own requests on to the page, and answer all others with the reason why they are refused."""

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. If the body is too long, the page's read of it fails with error 413."""
        from starlette.responses import PlainTextResponse

        if scope["type"] == "http" and (refused := self._refuse(scope)):
            await PlainTextResponse(f"{refused}\n", 403)(scope, receive, send)
        else:
            await self.app(scope, _bounded(receive), send)

    def _refuse(self, scope: Scope) -> str | None:
        from starlette.datastructures import Headers

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        token, _, inside = scope["path"].removeprefix("/").partition("/")
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", host):
            return "this page answers only to 127.0.0.1 and localhost"  # any other name could belong to anyone (DNS rebinding)
        if origin is not None and origin != f"http://{host}":
            return "this page accepts nothing from other pages"
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return "this page needs the whole address that medcot printed at its last start"
        if scope["method"] not in ("GET", "HEAD") and not (scope["method"] == "POST" and _POSTS.fullmatch(inside)):
            return "this page takes only questions and judgments"
        return None


def _bounded(receive: Receive) -> Receive:
    from starlette.exceptions import HTTPException

    read = 0

    async def receive_bounded() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > _MOST_BYTES:
            raise HTTPException(413)
        return message

    return receive_bounded


def escape(text: str) -> str:
    """Return HTML that shows a text unchanged. The characters of gradio's own templates ($, {, }) are escaped too."""
    return html.escape(show_controls(text)).translate({ord(mark): f"&#{ord(mark)};" for mark in "${}"})


def listen(port: int, error_class: type[MedcotError]) -> socket.socket:
    """Return a listening socket on 127.0.0.1. `port` 0 means any free port. Raises `error_class`, in one line, if it is taken."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        why = os.strerror(error.errno)
        raise error_class(f"port {port} on {HOST} cannot be used ({why}): choose another with --port, or leave it out") from error


def serve(page: gradio.Blocks, listener: socket.socket, what: str, css: str, keep_out: Path, open_browser: bool) -> None:
    """Serve a page until interrupted, and print its address, which is enough to use it.

    No file below `keep_out` can be fetched through the page."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    # The page is mounted, because gradio's launch() reads host, sharing, and proxies from the environment and requests its own
    # address through them.
    token = secrets.token_hex()
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    # gradio's own colors have too little contrast for the white text on buttons and for the placeholder of an empty box.
    theme.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
    hidden = {"footer_links": [], "run_history": False, "blocked_paths": [str(keep_out.absolute())], "enable_monitoring": False}
    plain = {"ssr_mode": False, "mcp_server": False, "theme": theme, "css": _CSS + css}
    app = Guard(gr.mount_gradio_app(FastAPI(), page, f"/{token}", **hidden, **plain), token)
    # h11 limits the size of headers. An open page holds a connection forever, so do not wait for it at the end.
    how = {"http": "h11", "ws": "none", "log_level": "warning", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, headers=[*_HEADERS.items()], **how))
    address = f"http://{HOST}:{listener.getsockname()[1]}/{token}/"
    say(f"{what}: {address} (only for you; Ctrl-C ends it)", flush=True)
    with _shown_in_browser(address) if open_browser else contextlib.nullcontext():
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            return


@contextlib.contextmanager
def _shown_in_browser(address: str) -> Iterator[None]:
    """Open an address in the browser through a file that only this user can read, since anyone can read its command line."""
    with tempfile.NamedTemporaryFile("w", prefix="medcot-", suffix=".html") as door:
        door.write(f'<meta http-equiv="refresh" content="0; url={address}">')
        door.flush()
        webbrowser.open(Path(door.name).as_uri())
        yield
