"""The page of ``attsvm serve`` in headless Chromium: what is typed changes what is seen, and nothing else happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from attsvm.microscope.live import LiveModel
from attsvm.microscope.server import Limits, LiveServer, live_server
from report.test_browser import browser
from unit.microscope.tiny_tokenizers import HOSTILE, tiny, trained

__all__ = ["browser"]

pytestmark = pytest.mark.browser

WIDTHS = (1280, 400)


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


@pytest.fixture(scope="module")
def encoder() -> Iterator[LiveServer]:
    with running(live_server(LiveModel(tiny("bert"), trained("bert"), max_tokens=60))) as server:
        yield server


@pytest.fixture(scope="module")
def pair() -> Iterator[LiveServer]:
    with running(live_server(LiveModel(tiny("t5"), trained("t5"), max_tokens=60))) as server:
        yield server


class Opened:
    """Opens pages; an error, a dialog or a request to anywhere else fails the test."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.contexts: list[Any] = []
        self.trouble: list[str] = []
        self.expected: Callable[[str], bool] = lambda text: False

    def __call__(self, server: LiveServer, address: str = "", *, width: int = 1280, scheme: str = "light") -> Any:
        context = self.browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
            accept_downloads=True,
        )
        self.contexts.append(context)
        page = context.new_page()
        own = f"http://127.0.0.1:{server.server_port}/"
        page.on("console", lambda message: self._said(message.text))
        page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.trouble.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: self._request(request.url, own))
        page.goto(server.address + address)
        return page

    def _said(self, text: str) -> None:
        if not self.expected(text):
            self.trouble.append(f"console: {text}")

    def _request(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:,", "blob:")):
            self.trouble.append(f"request: {url[:200]}")


@pytest.fixture
def open_page(browser: Any) -> Iterator[Opened]:
    opened = Opened(browser)
    yield opened
    for context in opened.contexts:
        context.close()
    assert opened.trouble == []


def until(page: Any, reached: str | Callable[[], bool]) -> None:
    """Wait; the page's own policy does not let Playwright wait inside the page."""
    deadline = time.monotonic() + 20
    while not (page.evaluate(reached) if isinstance(reached, str) else reached()):
        assert time.monotonic() < deadline, f"never came there: {reached}"
        page.wait_for_timeout(10)


def write(page: Any, text: str, field: str = "#live-text") -> None:
    """Put a text in, and wait for the picture that it gives."""
    page.evaluate("document.getElementById('live-time').textContent = ''")
    page.fill(field, text)
    until(page, "document.getElementById('live-time').textContent !== ''")


def cells(page: Any) -> list[str]:
    return page.locator(".head-grid a.cell").evaluate_all("all => all.map((one) => one.getAttribute('aria-label'))")  # type: ignore[no-any-return]


def tokens(page: Any) -> list[str]:
    return page.locator(".head-pane [class*=hd-token] bdi").all_inner_texts()  # type: ignore[no-any-return]


def test_map_recolours(open_page: Opened, encoder: LiveServer) -> None:
    page = open_page(encoder)
    before = cells(page)
    assert len(before) == 8
    write(page, "quick quick quick")
    after = cells(page)
    assert len(after) == 8
    assert before != after
    assert "5 tokens." in page.locator("#live-said").inner_text()
    write(page, page.locator("#live-text").evaluate("one => one.defaultValue"))
    assert cells(page) == before, "the same text, the same map"


def test_typed_letter_by_letter(open_page: Opened, encoder: LiveServer) -> None:
    """Whatever the answers overtake, what is shown at last is what stands there at last."""
    page = open_page(encoder)
    write(page, "a quick fox")
    at_once = cells(page)
    write(page, "dog")
    page.fill("#live-text", "")
    page.locator("#live-text").press_sequentially("a quick fox", delay=5)
    until(page, lambda: cells(page) == at_once)
    assert page.locator("#live-error").is_hidden()
    assert page.evaluate("document.activeElement.id") == "live-text"


def test_chosen_head_stays(open_page: Opened, encoder: LiveServer) -> None:
    page = open_page(encoder)
    page.locator("a.cell[data-head='L1.H2']").click()
    page.locator(".head-pane canvas").first.wait_for()
    write(page, "the lazy dog jumps")
    assert page.url.endswith("#L1.H2")
    assert page.locator(".head-pane h2").inner_text() == "Head L1.H2"
    until(page, "document.querySelector('.head-pane').innerText.includes('lazy')")
    assert page.evaluate("document.activeElement.id") == "live-text"
    page.get_by_label("Next head").click()
    until(page, "document.querySelector('.head-pane h2').innerText === 'Head L1.H3'")
    write(page, "a fox")
    assert page.locator(".head-pane h2").inner_text() == "Head L1.H3"


@pytest.mark.parametrize("view", ["table", "compare", "similarity", "record"])
def test_other_views_stay(open_page: Opened, encoder: LiveServer, view: str) -> None:
    page = open_page(encoder, f"#{view}")
    write(page, "brown foxes jump")
    assert page.url.endswith(f"#{view}")
    assert page.locator(f"[data-view={view}]").get_attribute("aria-current") == "page"
    assert page.locator("#view table, #view canvas, #record-view:not([hidden]) dl").count() > 0


def test_two_heads_beside_each_other_stay(open_page: Opened, encoder: LiveServer) -> None:
    page = open_page(encoder, "#L0.H1~L1.H0")
    write(page, "brown foxes jump")
    assert page.locator(".head-pane h2").all_inner_texts() == ["Head L0.H1", "Head L1.H0"]


def test_where_the_reader_is_stays(open_page: Opened, encoder: LiveServer) -> None:
    page = open_page(encoder, "#L0.H0", width=400)
    until(page, "document.documentElement.scrollHeight > 2500")
    page.wait_for_timeout(300)
    page.evaluate("scrollTo(0, 700)")
    # As from another field: a text field that is typed into is scrolled to.
    page.evaluate(
        "const box = document.getElementById('live-text'); box.value = 'the lazy dog jumps';"
        "box.dispatchEvent(new Event('input'))"
    )
    until(page, "document.getElementById('live-time').textContent !== ''")
    page.wait_for_timeout(700)
    assert abs(page.evaluate("scrollY") - 700) < 30


def test_too_long_and_nothing(open_page: Opened, encoder: LiveServer) -> None:
    open_page.expected = lambda text: "413" in text  # the browser itself notes a refused request
    page = open_page(encoder)
    before = cells(page)
    page.fill("#live-text", "a " * 70)
    until(page, "!document.getElementById('live-error').hidden")
    assert page.locator("#live-error").inner_text() == "Text must have at most 60 tokens, got more."
    assert cells(page) == before
    page.fill("#live-text", "  ")
    until(page, "document.getElementById('live-error').innerText.startsWith('Type a text')")
    write(page, "a fox")
    assert page.locator("#live-error").is_hidden()


def test_hostile_texts_are_texts(open_page: Opened, encoder: LiveServer) -> None:
    page = open_page(encoder, "#L0.H0")
    for text in [text[:55] for text in HOSTILE if "\ud800" not in text]:
        write(page, text)
        page.locator(".head-pane canvas").first.wait_for()
    assert page.evaluate(
        "window.pwned === undefined && document.querySelectorAll('main script, main img').length === 0"
    )


def test_encoder_decoder(open_page: Opened, pair: LiveServer) -> None:
    page = open_page(pair)
    assert page.locator(".grid-figure").count() == 3
    before = cells(page)
    write(page, "the lazy dog", "#live-target")
    given = cells(page)
    assert [one for one, other in zip(before, given, strict=True) if one == other and one.startswith("encoder")]
    assert [one for one, other in zip(before, given, strict=True) if one != other and one.startswith("cross")]
    write(page, "", "#live-target")
    assert cells(page) == before, "an empty target is what the model writes"
    assert "what the model itself writes" in page.locator("#live-said").inner_text()


def test_server_that_has_ended(open_page: Opened) -> None:
    open_page.expected = lambda text: "ERR_CONNECTION_REFUSED" in text or "ERR_CONNECTION_RESET" in text
    with running(LiveServer(_page_of_tiny(), _never)) as server:
        page = open_page(server)
    page.fill("#live-text", "a fox")
    until(page, "document.getElementById('live-error').innerText.includes('does not answer')")


def test_waits_when_it_is_too_fast(open_page: Opened) -> None:
    open_page.expected = lambda text: "429" in text
    live = LiveModel(tiny("bert"), trained("bert"), max_tokens=60)
    with running(live_server(live, limits=Limits(per_second=2.0, burst=1))) as server:
        page = open_page(server)
        write(page, "a fox")
        write(page, "a quick dog")
        assert "jump" not in page.locator("#live-text").input_value()
        assert page.locator("#live-error").is_hidden()


def _page_of_tiny() -> Any:
    from attsvm.report.live_page import live_page

    live = LiveModel(tiny("bert"), trained("bert"), max_tokens=60)
    first = live.answer(live.example)
    return live_page(first.record, first.arrays, max_tokens=60, has_target=False)


def _never(text: str, target: str | None) -> dict[str, Any]:
    raise AssertionError("it has ended")


def test_fits_the_window(open_page: Opened, pair: LiveServer) -> None:
    for address in ("", "#cross.L0.H1", "#record"):
        for width in WIDTHS:
            page = open_page(pair, address, width=width)
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels(open_page: Opened, pair: LiveServer, scheme: str) -> None:
    page = open_page(pair, scheme=scheme)
    assert page.get_by_label("Source text").get_attribute("id") == "live-text"
    assert page.get_by_label("Target text, which the decoder reads").get_attribute("id") == "live-target"
    assert page.locator("#live-error").get_attribute("role") == "alert"
    assert page.evaluate("document.activeElement.id") == "live-text"


def test_nothing_is_kept_in_the_browser(open_page: Opened, encoder: LiveServer) -> None:
    page = open_page(encoder)
    write(page, "a quick fox")
    kept = page.evaluate("[document.cookie, Object.keys(sessionStorage).length, Object.keys(localStorage).length]")
    assert kept == ["", 0, 0]


def test_from_key_to_picture(open_page: Opened, minilm: Path) -> None:
    """12 tokens of MiniLM, on the map and on the page of a head: under 300 ms on a machine that does nothing else."""
    with running(live_server(LiveModel(minilm))) as server:
        for address in ("", "#L2.H3"):
            page = open_page(server, address)
            times = []
            for word in ("cat", "dog", "fox", "cow", "hen", "owl"):
                write(page, f"the black {word} ate the mouse because it was so")
                times.append(int(page.locator("#live-time").inner_text().split(" ms")[0]))
            assert "12 tokens." in page.locator("#live-said").inner_text()
            print(f"from key to picture {address or 'map'}: {sorted(times)} ms")
            assert min(times) < 300
