"""``attsvm serve`` as a process: its link, its answers, what it refuses, and how it ends."""

from __future__ import annotations

import json
import signal
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("transformers")

from cli.commands import Commands, Running
from unit.microscope.tiny_tokenizers import tiny, trained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = trained("bert")
    tiny("bert", d_vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Served:
    """A server that runs, and its link."""

    def __init__(self, running: Running) -> None:
        self.running = running
        running.until(lambda: running.out.read_text().endswith("\n"))
        self.link = running.out.read_text().strip()
        parts = urlsplit(self.link)
        self.origin, self.port = f"http://{parts.netloc}", parts.port
        self.token = parts.query.removeprefix("token=")

    def ask(self, text: str, **changes: str) -> tuple[int, Any]:
        """A text as the page sends it, but for the changes."""
        headers = {"Origin": self.origin, "Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        body = json.dumps({"text": text}).encode()
        return self.open(urllib.request.Request(f"{self.origin}/", body, {**headers, **changes}))

    def page(self, link: str | None = None, **headers: str) -> tuple[int, Any]:
        return self.open(urllib.request.Request(link or self.link, headers=headers))

    def open(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                kind, body = reply.headers.get_content_type(), reply.read()
                return reply.status, json.loads(body) if kind == "application/json" else body.decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())["error"]

    def end(self, number: int = signal.SIGINT) -> Any:
        self.running.signal(number)
        return self.running.wait()


@pytest.fixture(scope="module")
def served(shared: Commands, model: Path) -> Iterator[Served]:
    server = Served(shared.start("serve", str(model), "--max-tokens", "30", threads=1))
    yield server
    done = server.end()
    assert done.code == 0
    assert done.out == server.link + "\n"


def test_link_is_of_this_machine(served: Served) -> None:
    assert urlsplit(served.link).hostname == "127.0.0.1"
    assert len(served.token) >= 43


def test_page_and_answer(served: Served) -> None:
    status, page = served.page()
    assert status == 200
    assert "tiny-bert" in page
    status, answer = served.ask("the quick brown fox")
    assert status == 200
    assert len(answer["atlas"]["heads"]) == 8
    assert answer["atlas"]["meta"]["shown"][0]["text"] == "the quick brown fox"


def test_strangers(served: Served) -> None:
    for status, sentence in (
        served.page(f"{served.origin}/"),
        served.page(f"{served.link}x"),
        served.ask("fox", Authorization="Bearer x"),
        served.ask("fox", Origin="http://evil.example"),
        served.ask("fox", Host="evil.example"),
        served.page(Host=f"evil.example:{served.port}"),
    ):
        assert status == 403
        assert sentence.endswith(".")


def test_too_long_and_too_fast(served: Served) -> None:
    assert served.ask("a " * 60) == (413, "Text must have at most 30 tokens, got more.")
    assert served.ask("a" * 40_000)[0] == 413
    replies = [served.ask("") for _ in range(3)]
    assert replies == [(422, "Type a text: there is nothing to read.")] * 3
    statuses = {served.ask("a " * 60)[0] for _ in range(120)}
    assert 429 in statuses
    assert statuses <= {413, 429}


def test_port_in_use(attsvm: Commands, served: Served, model: Path) -> None:
    attsvm("serve", str(model), "--port", str(served.port), "-q").failed(2, "port", str(served.port), "in use")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends(attsvm: Commands, model: Path, number: int) -> None:
    server = Served(attsvm.start("serve", str(model), "-q", threads=1))
    done = server.end(number)
    assert (done.code, done.err) == (0, "")
    with pytest.raises(urllib.error.URLError):
        server.page()


def no_browser() -> None:
    """Keep what the browser would be given, as it is given."""
    import webbrowser

    def note(address: str) -> bool:
        file = Path(address.removeprefix("file://"))
        Path("opened.json").write_text(json.dumps([address, file.read_text(), stat.S_IMODE(file.stat().st_mode)]))
        return True

    webbrowser.open = note


def test_browser_is_given_no_token_on_its_command_line(attsvm: Commands, model: Path) -> None:
    server = Served(attsvm.start("serve", str(model), "--open", threads=1, before=no_browser))
    note = attsvm.home / "opened.json"
    server.running.until(lambda: note.exists() and note.read_text().endswith("]"))
    address, content, mode = json.loads(note.read_text())
    assert server.token not in address
    assert f"url={server.link}" in content
    assert mode == 0o600
    assert server.end().code == 0
    assert not Path(address.removeprefix("file://")).exists()


def test_bad_arguments(attsvm: Commands, model: Path, tmp_path: Path) -> None:
    attsvm("serve", str(tmp_path / "absent"), "-q").failed(2, "serve: ", "absent")
    attsvm("serve", str(model), "--max-tokens", "1", "-q").failed(2, "max_tokens", "got 1")
    attsvm("serve", str(model), "--port", "70000", "-q").failed(2, "port", "70000")


def test_model_of_pictures(attsvm: Commands, tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    tiny("vit").save_pretrained(folder)
    attsvm("serve", str(folder), "-q").failed(3, "must read texts", "attsvm inspect")
