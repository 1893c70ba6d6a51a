"""The server of ``attsvm serve``: what it answers, to whom, and what it refuses; and what a live answer says."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.microscope.live import EXAMPLE, LiveModel, TooLongError
from attsvm.microscope.server import Limits, LiveServer, live_server
from attsvm.report.live_page import LivePage, live_answer
from unit.microscope.tiny_tokenizers import HOSTILE, SENTENCES, tiny, trained

PAGE = LivePage(content=b"<!doctype html><title>page</title>", policy="default-src 'none'")
Answer = Callable[[str, str | None], dict[str, Any]]


def echo(text: str, target: str | None) -> dict[str, Any]:
    return {"text": text, "target": target}


@contextmanager
def serving(answer: Answer = echo, **limits: Any) -> Iterator[LiveServer]:
    server = LiveServer(PAGE, answer, limits=Limits(**limits))
    with running(server):
        yield server


@contextmanager
def running(server: LiveServer) -> Iterator[LiveServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Reply:
    """What came back."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def refused(self, status: int, *words: str) -> None:
        """Assert that it is one sentence as JSON, with these words."""
        assert self.status == status, self.body
        assert self.headers["Content-Type"] == "application/json"
        assert self.json.keys() == {"error"}
        sentence = self.json["error"]
        assert sentence.endswith("."), sentence
        assert "\n" not in sentence
        assert "Traceback" not in sentence
        assert [word for word in words if word not in sentence] == [], sentence


def origin(server: LiveServer, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{server.server_port}"


def send(
    server: LiveServer, body: Any = None, *, path: str = "/", method: str = "POST", **changes: str | None
) -> Reply:
    """A request as the page makes it, but for the changes; None leaves a header out."""
    headers: dict[str, str | None] = {
        "Origin": origin(server),
        "Content-Type": "application/json",
        "Authorization": f"Bearer {server.token}",
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    content = body if isinstance(body, bytes) else json.dumps({"text": "a fox"} if body is None else body).encode()
    request = urllib.request.Request(
        origin(server) + path,
        data=content if method == "POST" else None,
        headers={name: value for name, value in headers.items() if value is not None},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return Reply(reply.status, reply.headers, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.headers, error.read())


def get(server: LiveServer, path: str | None = None, **changes: str | None) -> Reply:
    plain: dict[str, str | None] = {"Origin": None, "Content_Type": None, "Authorization": None, **changes}
    return send(server, path=f"/?token={server.token}" if path is None else path, method="GET", **plain)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serving(per_second=1e6, burst=10**6) as made:
        yield made


# ------------------------------------------------------------------------------------------------------ who is answered


def test_listens_on_this_machine_only(server: LiveServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.family == socket.AF_INET


def test_page_and_text(server: LiveServer) -> None:
    page = get(server)
    assert (page.status, page.body) == (200, PAGE.content)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert send(server, {"text": "a fox", "target": "ein Fuchs"}).json == {"text": "a fox", "target": "ein Fuchs"}
    assert send(server, {"text": "שלום \u202e\x00</script>"}).json["text"] == "שלום \u202e\x00</script>"
    assert send(server, Host=f"localhost:{server.server_port}", Origin=origin(server, "localhost")).status == 200


@pytest.mark.parametrize("ask", [get, send])
def test_headers(server: LiveServer, ask: Callable[[LiveServer], Reply]) -> None:
    for reply in (ask(server), ask(server, Host="elsewhere.example")):  # type: ignore[call-arg]
        assert reply.headers["Cache-Control"] == "no-store"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Referrer-Policy"] == "no-referrer"
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in reply.headers["Content-Security-Policy"]
        assert "Set-Cookie" not in reply.headers
        assert not [name for name in reply.headers if name.startswith("Access-Control")]
        assert reply.headers["Server"] == "attsvm"


def test_tokens_differ_and_are_long(server: LiveServer) -> None:
    with serving() as other:
        assert other.token != server.token
        assert len(other.token) >= 43
        assert other.address == f"http://127.0.0.1:{other.server_port}/?token={other.token}"


WRONG_TOKENS = ["", "x", "é", "%00", "{token}x", "{token}&token={token}", "{upper}"]


@pytest.mark.parametrize("token", WRONG_TOKENS)
def test_page_needs_the_token(server: LiveServer, token: str) -> None:
    wrong = token.format(token=server.token, upper=server.token.swapcase())
    get(server, f"/?token={urllib.request.quote(wrong, safe='=&%')}").refused(403, "token")


def test_page_without_any_token(server: LiveServer) -> None:
    get(server, "/").refused(403, "token")
    get(server, "/", Authorization=f"Bearer {server.token}").refused(403, "token")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer x", "Basic {token}", "{token}", "Bearer {upper}"])
def test_text_needs_the_token(server: LiveServer, header: str | None) -> None:
    given = header and header.format(token=server.token, upper=server.token.swapcase())
    send(server, Authorization=given).refused(403, "token")
    send(server, path=f"/?token={server.token}", Authorization=given).refused(403, "token")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1",
        "127.0.0.1:1",
        "evil.example:{port}",
        "127.0.0.1.evil.example:{port}",
        "0.0.0.0:{port}",
    ],
)
def test_host_must_be_its_own(server: LiveServer, host: str) -> None:
    named = host.format(port=server.server_port)
    get(server, Host=named).refused(403, "own name")
    send(server, Host=named, Origin=f"http://{named}").refused(403, "own name")


@pytest.mark.parametrize("lines", [[], ["127.0.0.1:{port}", "evil.example"], ["evil.example", "127.0.0.1:{port}"]])
def test_host_must_be_there_once(server: LiveServer, lines: list[str]) -> None:
    hosts = "".join(f"Host: {line.format(port=server.server_port)}\r\n" for line in lines)
    reply = raw(server, f"GET /?token={server.token} HTTP/1.1\r\n{hosts}\r\n".encode())
    assert b" 403 " in reply.splitlines()[0]


@pytest.mark.parametrize(
    "given",
    [None, "null", "http://evil.example", "https://127.0.0.1:{port}", "http://127.0.0.1", "http://localhost:{port}"],
)
def test_text_must_come_from_its_own_page(server: LiveServer, given: str | None) -> None:
    send(server, Origin=given and given.format(port=server.server_port)).refused(403, "own page")


def test_page_of_another_site(server: LiveServer) -> None:
    get(server, Origin="http://evil.example").refused(403, "own page")
    send(server, Sec_Fetch_Site="cross-site").refused(403, "own page")
    send(server, Sec_Fetch_Site="same-site").refused(403, "own page")
    assert send(server, Sec_Fetch_Site="same-origin").status == 200


@pytest.mark.parametrize(
    "path", ["/index.html", "/../etc/passwd", "/?token={token}/..", "//evil.example/?token={token}", "/favicon.ico"]
)
def test_there_is_one_page(server: LiveServer, path: str) -> None:
    reply = get(server, path.format(token=server.token))
    assert reply.status in (403, 404)
    reply.refused(reply.status)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods(server: LiveServer, method: str) -> None:
    reply = send(server, method=method)
    reply.refused(405, "GET and POST")
    assert reply.headers["Allow"] == "GET, POST"


def test_head_has_no_body(server: LiveServer) -> None:
    reply = send(server, method="HEAD")
    assert (reply.status, reply.body) == (405, b"")


# ----------------------------------------------------------------------------------------------------- what is accepted

BAD_BODIES = [b"", b"{", b"[]", b"null", b'"a fox"', b'{"text": "a", "more": 1}', b"\xff\xfe", b"[" * 20_000]
NO_STRINGS = [{}, {"target": "a"}, {"text": None}, {"text": 3}, {"text": ["a"]}, {"text": "a", "target": 3}]


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_body_must_be_an_object(server: LiveServer, body: bytes) -> None:
    send(server, body).refused(400, '{"text": ...}')


@pytest.mark.parametrize("body", NO_STRINGS, ids=range(len(NO_STRINGS)))
def test_text_must_be_a_string(server: LiveServer, body: Any) -> None:
    send(server, body).refused(400, "strings")


@pytest.mark.parametrize("body", [{"text": ""}, {"text": " \n\t"}, {"text": "a", "target": " "}])
def test_text_must_not_be_empty(server: LiveServer, body: Any) -> None:
    send(server, body).refused(422, "nothing to read")


def test_kind_must_be_json(server: LiveServer) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        send(server, Content_Type=kind).refused(415, "application/json")
    assert send(server, Content_Type="application/json; charset=utf-8").status == 200


def test_too_many_bytes(server: LiveServer) -> None:
    limit = server.limits.bytes
    send(server, {"text": "x" * limit}).refused(413, str(limit))
    send(server, b"x" * 3_000_000).refused(413, "3000000")
    body = json.dumps({"text": "x"}).encode()
    exact = json.dumps({"text": "x" * (limit - len(body) + 1)}).encode()
    assert len(exact) == limit
    assert send(server, exact).status == 200


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "1_0", "٣", "9" * 40, ""])
def test_length_must_be_a_number(server: LiveServer, length: str) -> None:
    reply = raw(server, head(server, f"Content-Length: {length}".encode()) + b'{"text": "a"}')
    assert b" 411 " in reply.splitlines()[0]


@pytest.mark.parametrize(
    "lines", [b"X: y", b"Content-Length: 13\r\nContent-Length: 13", b"Content-Length: 13\r\nTransfer-Encoding: chunked"]
)
def test_length_must_be_there_once(server: LiveServer, lines: bytes) -> None:
    assert b" 411 " in raw(server, head(server, lines) + b'{"text": "a"}').splitlines()[0]


def head(server: LiveServer, *lines: bytes) -> bytes:
    """The head of a request as the page makes it, with the length to be said."""
    own = f"127.0.0.1:{server.server_port}"
    first = f"POST / HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\nContent-Type: application/json\r\n"
    return b"".join(
        [
            first.encode(),
            f"Authorization: Bearer {server.token}\r\n".encode(),
            *(line + b"\r\n" for line in lines),
            b"\r\n",
        ]
    )


def raw(server: LiveServer, content: bytes, *, seconds: float = 10.0) -> bytes:
    """Send bytes and read to the end."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=seconds) as connection:
        connection.sendall(content)
        received = b""
        while part := connection.recv(65_536):
            received += part
        return received


@pytest.mark.parametrize(
    "content", [b"\r\n\r\n", b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 70_000 + b"\r\n\r\n"]
)
def test_no_protocol(server: LiveServer, content: bytes) -> None:
    reply = raw(server, content)
    assert b"Traceback" not in reply
    assert b" 200 " not in reply.splitlines()[0] if reply else True
    assert get(server).status == 200


# ------------------------------------------------------------------------------------------------------- how much, when


def test_rate() -> None:
    with serving(per_second=2.0, burst=3) as server:
        assert [send(server).status for _ in range(3)] == [200, 200, 200]
        reply = send(server)
        reply.refused(429, "wait")
        assert 0 < float(reply.headers["Retry-After"]) <= 0.5
        assert get(server).status == 200, "the page itself is not counted"
        send(server, Authorization="Bearer x").refused(403)
        time.sleep(float(reply.headers["Retry-After"]) + 0.05)
        assert send(server).status == 200


def test_strangers_do_not_use_up_the_rate() -> None:
    with serving(per_second=0.01, burst=1) as server:
        for _ in range(5):
            send(server, Authorization="Bearer x").refused(403)
        assert send(server).status == 200


def test_one_text_at_a_time() -> None:
    at_once: list[int] = []
    inside = 0

    def slow(text: str, target: str | None) -> dict[str, Any]:
        nonlocal inside
        inside += 1
        at_once.append(inside)
        time.sleep(0.05)
        inside -= 1
        return {"text": text}

    with serving(slow, waiting=8) as server:
        replies = together(6, lambda k: send(server, {"text": str(k)}))
    assert sorted(reply.json["text"] for reply in replies) == list("012345")
    assert at_once == [1] * 6


def test_busy() -> None:
    gate = threading.Event()
    started = threading.Event()

    def blocked(text: str, target: str | None) -> dict[str, Any]:
        started.set()
        gate.wait(20)
        return {}

    with serving(blocked, waiting=0) as server:
        first = threading.Thread(target=send, args=(server,))
        first.start()
        started.wait(20)
        reply = send(server)
        gate.set()
        first.join()
        reply.refused(503, "busy")
        assert reply.headers["Retry-After"] == "1"
        assert send(server).status == 200


def together(count: int, ask: Callable[[int], Reply]) -> list[Reply]:
    replies: list[Reply] = []
    threads = [threading.Thread(target=lambda k=k: replies.append(ask(k))) for k in range(count)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def test_an_answer_that_takes_too_long() -> None:
    gate = threading.Event()

    def blocked(text: str, target: str | None) -> dict[str, Any]:
        gate.wait(20)
        return {}

    with serving(blocked, compute_seconds=0.1) as server:
        send(server).refused(503, "too long")
        gate.set()


@pytest.mark.parametrize("part", [b"", b"POST / HT", b"POST / HTTP/1.1\r\nHost: x"])
def test_slow_client_is_hung_up_on(part: bytes) -> None:
    with serving(seconds=0.3) as server:
        began = time.monotonic()
        assert raw(server, part) == b""
        assert 0.2 < time.monotonic() - began < 5
        assert get(server).status == 200


def test_slow_body() -> None:
    with serving(seconds=0.3) as server:
        reply = raw(server, head(server, b"Content-Length: 100") + b'{"te')
        assert b" 408 " in reply.splitlines()[0]


def test_drop_by_drop_is_slow_too() -> None:
    """The time is for the whole request: a byte now and then does not extend it."""
    with serving(seconds=0.5) as server, socket.create_connection(("127.0.0.1", server.server_port), 10) as connection:
        taken = 0
        with suppress(OSError):
            while taken < 200:
                connection.sendall(b"G")
                taken += 1
                time.sleep(0.05)
        assert 0 < taken < 100


def test_too_many_connections() -> None:
    with serving(connections=2, seconds=1.0) as server:
        idle = [socket.create_connection(("127.0.0.1", server.server_port), 10) for _ in range(2)]
        time.sleep(0.2)
        with pytest.raises((OSError, http.client.HTTPException)):
            get(server)
        for connection in idle:
            connection.close()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                assert get(server).status == 200
                return
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
        pytest.fail("the places were never free again")


def test_errors_are_one_sentence(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    errors = {
        "long": TooLongError("serve: text must be short."),
        "bad": InvalidInputError("serve: text must be good."),
        "x": RuntimeError("secret"),
    }

    def failing(text: str, target: str | None) -> dict[str, Any]:
        raise errors[text]

    with serving(failing) as server:
        send(server, {"text": "long"}).refused(413, "Text must be short.")
        send(server, {"text": "bad"}).refused(422, "Text must be good.")
        reply = send(server, {"text": "x"})
        reply.refused(500, "could not read")
        assert b"secret" not in reply.body
        send(server, {"text": "other"}).refused(500)
    assert capfd.readouterr() == ("", ""), "nothing of what is asked is written anywhere"
    assert [record.getMessage() for record in caplog.records] == [
        "serve: a text could not be answered (RuntimeError).",
        "serve: a text could not be answered (KeyError).",
    ]


@pytest.mark.parametrize("answer", [{"a": object()}, {"a": float("nan")}], ids=["object", "nan"])
def test_what_json_cannot_hold(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda text, target: answer) as server:
        send(server).refused(500, "could not be answered")
        assert get(server).status == 200
    assert len(caplog.records) == 1


def test_port_in_use(server: LiveServer) -> None:
    with pytest.raises(
        InvalidInputError, match=f"serve: port must be one that can be listened at, got {server.server_port}"
    ):
        LiveServer(PAGE, echo, port=server.server_port)
    with pytest.raises(InvalidInputError, match=r"port must be in \[0, 65535\], got 70000"):
        LiveServer(PAGE, echo, port=70_000)


# ---------------------------------------------------------------------------------------------------------- live models


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return trained("bert")  # made once: of equally frequent pieces, each training may take others


@pytest.fixture(scope="module")
def bert(tokenizer: Any) -> LiveModel:
    return LiveModel(tiny("bert"), tokenizer, max_tokens=60)


def test_measures_are_those_of_the_model(bert: LiveModel, tokenizer: Any) -> None:
    model = tiny("bert")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**tokenizer(SENTENCES[0], return_tensors="pt"), output_attentions=True).attentions
    found = bert.answer(SENTENCES[0])
    for head in found.record["heads"]:
        weights = attentions[head["layer"]][0, head["head"]]
        top = weights.max(-1)
        assert head["values"]["top_probability"]["mean"] == pytest.approx(float(top.values.mean()), abs=1e-5)
        pattern = found.arrays[f"shown.0.{head['module']}.pattern"][head["head"]]
        assert np.abs((pattern / 255.0) ** 2 - weights.numpy()).max() < 0.004 + 1e-6
    assert found.record["check"]["max_difference"] < 1e-5
    assert found.record["corpus"]["n_tokens"] == attentions[0].shape[-1]
    assert found.record["shown"][0]["source"]["tokens"][0] == "[CLS]"


def test_nothing_is_kept_of_a_text(bert: LiveModel) -> None:
    before = bert.answer(SENTENCES[0])
    bert.answer(SENTENCES[1])
    after = bert.answer(SENTENCES[0])
    assert before.record == after.record
    assert before.arrays.keys() == after.arrays.keys()
    for name, array in before.arrays.items():
        assert np.array_equal(array, after.arrays[name], equal_nan=array.dtype.kind == "f"), name


@pytest.mark.parametrize("text", [text for text in HOSTILE if "\ud800" not in text] + ["a", "half \ud800 of a pair"])
def test_hostile_texts(bert: LiveModel, text: str) -> None:
    found = bert.answer(text[:58])
    packed = live_answer(found.record, found.arrays)
    json.dumps(packed, allow_nan=False).encode("utf-8")
    assert "\u202e" not in json.dumps(packed, ensure_ascii=False)


def test_too_many_tokens(bert: LiveModel) -> None:
    with pytest.raises(TooLongError, match="serve: text must have at most 60 tokens"):
        bert.answer("a " * 59)
    assert bert.answer("a " * 58).record["corpus"]["n_tokens"] == 60


def test_no_more_than_the_model_takes() -> None:
    assert LiveModel(tiny("bert", n_ctx=32), trained("bert"), max_tokens=256).max_tokens == 32
    with pytest.raises(InvalidInputError, match="serve: max_tokens must be at least 2, got 1"):
        LiveModel(tiny("bert"), trained("bert"), max_tokens=1)


def test_example_is_cut_where_it_is_too_long(tokenizer: Any) -> None:
    live = LiveModel(tiny("bert"), tokenizer, max_tokens=12)
    assert EXAMPLE.startswith(live.example)
    assert live.answer(live.example).record["corpus"]["n_tokens"] <= 12
    with pytest.raises(InvalidInputError, match="serve: max_tokens must be at least 3 for this model, got 2"):
        LiveModel(tiny("bert"), tokenizer, max_tokens=2)


def test_encoder_takes_no_target(bert: LiveModel) -> None:
    with pytest.raises(InvalidInputError, match="serve: target must be left out"):
        bert.answer("a fox", "ein Fuchs")


def test_pictures_are_not_typed() -> None:
    with pytest.raises(UnsupportedError, match="serve: model must read texts"):
        LiveModel(tiny("vit"))


def test_encoder_decoder() -> None:
    live = LiveModel(tiny("t5"), trained("t5"), max_tokens=60)
    assert live.has_target
    found = live.answer("a quick fox", "the lazy dog")
    kinds = {head["kind"] for head in found.record["heads"]}
    assert kinds == {"encoder", "decoder", "cross"}
    target = found.record["shown"][0]["target"]["tokens"]
    assert "".join(target[1:]).replace("␣", " ").split() == ["the", "lazy", "dog"]
    own = live.answer("a quick fox")
    assert own.record["corpus"]["notes"] == ["Targets are what the model itself writes, at most 32 tokens."]
    live_answer(own.record, own.arrays)
    with pytest.raises(TooLongError, match="text and its target"):
        live.answer("a quick fox", "dog " * 80)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders(family: str) -> None:
    live = LiveModel(tiny(family), trained(family), max_tokens=60)
    found = live.answer(SENTENCES[0])
    for index, module in enumerate(found.record["modules"]):
        pattern = found.arrays[f"shown.0.{index}.pattern"]
        assert pattern.shape[0] == module["n_heads"]
        assert not np.triu(pattern, 1).any(), "no query attends to what comes after it"


def test_server_of_a_model(bert: LiveModel) -> None:
    with running(live_server(bert)) as server:
        page = get(server)
        assert bert.example in page.body.decode()
        policy = page.headers["Content-Security-Policy"]
        assert "connect-src 'self'" in policy
        assert "unsafe" not in policy
        reply = send(server, {"text": SENTENCES[1]})
        assert reply.status == 200
        assert len(reply.json["atlas"]["heads"]) == 8
        assert {blob["layout"]["m"] for blob in reply.json["patterns"]["blobs"]} == {0, 1}
        assert reply.json["seconds"] > 0
        send(server, {"text": "a " * 70}).refused(413, "at most 60 tokens")
        send(server, {"text": "fox", "target": "dog"}).refused(422, "Target must be left out")


def test_minilm_answers_at_once(minilm: Path) -> None:
    live = LiveModel(minilm)
    live.answer(EXAMPLE)
    seconds = min(live.answer(f"The black cat ate {count} mice because it was hungry.").seconds for count in range(8))
    assert seconds < 0.3, "from key to picture is to take less"
