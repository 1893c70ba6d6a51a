"""``attsvm serve``: a page on this machine where one types a text and sees the heads answer."""

from __future__ import annotations

import contextlib
import html
import os
import signal
import tempfile
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from attsvm.cli.terminal import say
from attsvm.microscope.live import LiveModel
from attsvm.microscope.server import LiveServer, live_server

__all__ = ["serve_command"]


def serve_command(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face model: a folder, a .gguf file, or an id.", show_default=False)
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or id of the tokenizer. Default: the model's.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(help="Port of 127.0.0.1; 0 takes a free one.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Tokens that a text may have.")] = 256,
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "float64"], typer.Option(help="Number format of the model.")
    ] = "float32",
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the link and nothing else.")] = False,
) -> None:
    """Type a text in the browser and see at once which tokens each head selects.

    Prints a link that holds a token. Only this machine can reach the page, and no text is kept. Ctrl-C ends it.
    """
    if not quiet:
        say(f"Loading {model} and reading a first text ...")
    live = LiveModel(model, tokenizer, max_tokens=max_tokens, device=device, dtype=dtype)
    server = live_server(live, port=port)
    # To be ended is what it runs for: no error.
    with contextlib.suppress(KeyboardInterrupt), _closing(server), contextlib.ExitStack() as stack:
        stack.enter_context(_terminated_politely())
        print(server.address, flush=True)
        if not quiet:
            say("Open the link in a browser on this machine. Ctrl-C ends it.")
        if open_page:
            stack.enter_context(_opened(server.address))
        server.serve_forever()
    if not quiet:
        say("Ended.")


@contextlib.contextmanager
def _closing(server: LiveServer) -> Iterator[None]:
    try:
        yield
    finally:
        server.server_close()


@contextlib.contextmanager
def _terminated_politely() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _opened(address: str) -> Iterator[None]:
    """The browser is sent to a file that leads to the page: arguments of a command can be read by other users."""
    handle, name = tempfile.mkstemp(prefix="attsvm-", suffix=".html")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:  # for this user alone, as mkstemp makes it
            file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(address)}">\n')
        webbrowser.open(Path(name).as_uri())
        yield
    finally:
        Path(name).unlink(missing_ok=True)
