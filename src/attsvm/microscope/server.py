"""A page on this machine that answers what is typed into it; nothing outside the machine can reach it.

Who may ask: the browser that was given the link, whose token is random and new for each start. Requests must name this
server as their host, so that no other site can reach it under a name of its own (DNS rebinding), and a text must come
from this server's own page (``Origin``), as JSON. One text is computed at a time; nothing of it is kept.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitedTooLong
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from attsvm.errors import AttSVMError, InvalidInputError
from attsvm.microscope.live import LiveModel, TooLongError
from attsvm.report.live_page import LivePage, live_answer, live_page

__all__ = ["HOST", "Limits", "LiveServer", "live_server"]

HOST = "127.0.0.1"
"""The only address that the server listens at."""

_LOG = logging.getLogger(__name__)
_FIELDS = ("text", "target")
_LINGER_BYTES = 2**22

Answer = Callable[[str, str | None], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for.

    Attributes
    ----------
    bytes
        Longest body of a request.
    per_second, burst
        Texts: so many at once, and then so many a second.
    seconds
        For a request to arrive whole, and for an answer to be taken.
    waiting
        Texts that may wait for the one that is computed.
    connections
        Connections at a time.
    compute_seconds
        That a request waits for its answer.
    """

    bytes: int = 32_768
    per_second: float = 20.0
    burst: int = 40
    seconds: float = 10.0
    waiting: int = 4
    connections: int = 32
    compute_seconds: float = 120.0


class _Refusal(Exception):  # noqa: N818 - it is an answer, and not always an error of this program
    """What a request is answered instead: a status and one sentence."""

    def __init__(self, status: HTTPStatus, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class LiveServer(ThreadingHTTPServer):
    """Serves one page and answers texts. It listens when it is made; :meth:`serve_forever` answers.

    Parameters
    ----------
    page
        The page.
    answer
        Called with a text and a target, or None, from one thread only; returns what JSON can hold.
    port
        Where to listen; 0 takes a free one.
    limits
        What a client may ask for.

    Raises
    ------
    InvalidInputError
        If the port cannot be taken.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, page: LivePage, answer: Answer, *, port: int = 0, limits: Limits | None = None) -> None:
        if not 0 <= port <= 65535:
            raise InvalidInputError(f"serve: port must be in [0, 65535], got {port}.")
        self.page, self.limits = page, limits or Limits()
        self.token = secrets.token_urlsafe(32)
        self._answer = answer
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="attsvm-model")
        self._rate = _Rate(self.limits.per_second, self.limits.burst)
        self._pending = threading.BoundedSemaphore(1 + self.limits.waiting)
        self._open = threading.BoundedSemaphore(self.limits.connections)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise InvalidInputError(
                f"serve: port must be one that can be listened at, got {port} ({error.strerror or error})."
            ) from error

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names under which a browser may know this server."""
        return tuple(f"{name}:{self.server_port}" for name in (HOST, "localhost"))

    @property
    def address(self) -> str:
        """The link with its token."""
        return f"http://{HOST}:{self.server_port}/?token={self.token}"

    def is_token(self, given: str) -> bool:
        """Compare in a time that does not tell how much is right."""
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())

    def compute(self, text: str, target: str | None) -> dict[str, Any]:
        """The answer to a text, when its turn has come."""
        if wait := self._rate.take():
            raise _Refusal(
                HTTPStatus.TOO_MANY_REQUESTS, "Too many texts at once: wait a moment.", Retry_After=f"{wait:.2f}"
            )
        if not self._pending.acquire(blocking=False):
            raise _Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE, "The model is busy with other texts: wait a moment.", Retry_After="1"
            )
        try:
            future = self._worker.submit(self._answer, text, target)
        except RuntimeError as error:  # the server is being closed
            self._pending.release()
            raise _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "The server is closing.") from error
        future.add_done_callback(lambda _: self._pending.release())
        return self._outcome(future)

    def _outcome(self, future: Future[dict[str, Any]]) -> dict[str, Any]:
        try:
            return future.result(self.limits.compute_seconds)
        except TooLongError as error:
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _sentence(error)) from error
        except AttSVMError as error:
            raise _Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, _sentence(error)) from error
        except WaitedTooLong as error:
            future.cancel()
            raise _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "The model takes too long over this text.") from error
        except Exception as error:
            # Not the message, which may hold the text.
            _LOG.warning("serve: a text could not be answered (%s).", type(error).__name__)
            raise _Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "The model could not read this text.") from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, or hang up when there are too many."""
        if not self._open.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._open.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing that a client does is worth a traceback: it hung up, or was too slow."""

    def server_close(self) -> None:
        """Stop listening, and wait for the text that is being computed."""
        super().server_close()
        self._worker.shutdown(wait=True, cancel_futures=True)


def live_server(live: LiveModel, *, port: int = 0, limits: Limits | None = None) -> LiveServer:
    """Make the server of a model; the example is computed, so that the first text does not wait for compilers.

    Parameters
    ----------
    live
        The model.
    port
        Where to listen; 0 takes a free one.
    limits
        What a client may ask for.
    """
    first = live.answer(live.example)
    page = live_page(first.record, first.arrays, max_tokens=live.max_tokens, has_target=live.has_target)

    def answer(text: str, target: str | None) -> dict[str, Any]:
        found = live.answer(text, target)
        return {**live_answer(found.record, found.arrays), "seconds": round(found.seconds, 4)}

    return LiveServer(page, answer, port=port, limits=limits)


class _Rate:
    """Tokens that drip into a bucket; a text takes one."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second, self._burst = per_second, float(burst)
        self._left, self._at = float(burst), time.monotonic()
        self._lock = threading.Lock()

    def take(self) -> float:
        """Take one; the seconds to wait if there is none, else 0."""
        with self._lock:
            now = time.monotonic()
            self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
            self._at = now
            if self._left < 1.0:
                return max((1.0 - self._left) / self._per_second, 0.01)
            self._left -= 1.0
            return 0.0


class _Patient(io.RawIOBase):
    """A connection that is read until a moment, however slowly its bytes come."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """One request on one connection."""

    server: LiveServer
    protocol_version = "HTTP/1.0"
    _has_answered = False

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Patient(self.connection, self.server.limits.seconds))

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client is too slow, or gone
            self.close_connection = True

    def do_GET(self) -> None:
        self._guarded(self._page)

    def do_POST(self) -> None:
        self._guarded(self._text)

    def _guarded(self, respond: Callable[[], None]) -> None:
        try:
            self._check()
            respond()
        except _Refusal as refusal:
            self._refuse(refusal.status, refusal.sentence, refusal.headers)
            self._linger()
        except OSError:  # the client is gone
            raise
        except Exception as error:
            _LOG.warning("serve: a request could not be answered (%s).", type(error).__name__)
            if not self._has_answered:
                self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "The request could not be answered.")

    def _page(self) -> None:
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page.content)

    def _text(self) -> None:
        found = self.server.compute(*self._sentence())
        self._send(HTTPStatus.OK, "application/json", _json(found))

    # ---------------------------------------------------------------- what is checked

    def _check(self) -> None:
        """Host, origin, place and token, in this order; what is wrong is said without saying what would be right."""
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            raise _Refusal(HTTPStatus.FORBIDDEN, "This server answers under its own name only.")
        origins = self.headers.get_all("Origin", [])
        own = [f"http://{self.headers['Host']}"]
        if origins != own and (origins or self.command == "POST"):
            raise _Refusal(HTTPStatus.FORBIDDEN, "This server answers its own page only.")
        if self.command == "POST" and self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise _Refusal(HTTPStatus.FORBIDDEN, "This server answers its own page only.")
        parts = urlsplit(self.path)
        if parts.path != "/":
            raise _Refusal(HTTPStatus.NOT_FOUND, "There is one page here, at /.")
        scheme, _, header = self.headers.get("Authorization", "").partition(" ")
        given = [header] if self.command == "POST" and scheme == "Bearer" else []
        if self.command == "GET":
            given = parse_qs(parts.query).get("token", [])
        if len(given) != 1 or not self.server.is_token(given[0]):
            raise _Refusal(HTTPStatus.FORBIDDEN, "Open the link that attsvm serve printed: it holds a token.")

    def _sentence(self) -> tuple[str, str | None]:
        """The text and the target in the body."""
        limit = self.server.limits.bytes
        if self.headers.get_content_type() != "application/json":
            raise _Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A text must come as application/json.")
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) != 1 or not re.fullmatch("[0-9]{1,15}", lengths[0]):
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "A text must come with its length.")
        length = int(lengths[0])
        if length > limit:
            raise _Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A text must have at most {limit} bytes as JSON, got {length}."
            )
        try:
            body = self.rfile.read(length)
        except TimeoutError as error:
            raise _Refusal(HTTPStatus.REQUEST_TIMEOUT, "The text came too slowly.") from error
        try:
            given = json.loads(body) if len(body) == length else None
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict) or not given.keys() <= set(_FIELDS):
            raise _Refusal(HTTPStatus.BAD_REQUEST, 'A text must come as {"text": ...} or {"text": ..., "target": ...}.')
        text, target = (given.get(name) for name in _FIELDS)
        if not isinstance(text, str) or not (target is None or isinstance(target, str)):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "Text and target must be strings.")
        if not text.strip() or (target is not None and not target.strip()):
            raise _Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, "Type a text: there is nothing to read.")
        return text, target

    # ---------------------------------------------------------------- what is sent

    def _refuse(self, status: HTTPStatus, sentence: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, "application/json", _json({"error": sentence}), headers)

    def _send(self, status: HTTPStatus, kind: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.close_connection = self._has_answered = True
        self.connection.settimeout(self.server.limits.seconds)
        self.send_response(status)
        policy = self.server.page.policy if kind.startswith("text/html") else "default-src 'none'"
        safe = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
            "Connection": "close",
        }
        for name, value in {**safe, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _linger(self) -> None:
        """Take in what still comes: closing before that could reset the connection and lose the answer."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            rest = _Patient(self.connection, min(1.0, self.server.limits.seconds))
            taken = 0
            while taken < _LINGER_BYTES and (part := rest.read(65_536)):
                taken += len(part)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Errors of the protocol itself, in the same form."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and POST are answered.", {"Allow": "GET, POST"})
        else:
            self._refuse(status, f"{status.phrase}.")

    def version_string(self) -> str:
        """Who answers, and not with which Python."""
        return "attsvm"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep no record of who asked what."""


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _sentence(error: AttSVMError) -> str:
    """The message without the name of the command."""
    text = str(error).removeprefix("serve: ")
    return text[:1].upper() + text[1:]
