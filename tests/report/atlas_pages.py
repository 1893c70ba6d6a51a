"""Runs of ``attsvm inspect`` in headless Chromium: folders, pages, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attsvm.records import RunFolder
from attsvm.report import render_atlas, render_comparison
from report.fake_atlas import T5, Result, write_atlas

WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered runs: an encoder, an encoder-decoder, pictures, hostile texts, and two comparisons."""
    made = tmp_path_factory.mktemp("atlas")
    plans: dict[str, dict[str, Any]] = {
        "plain": {},
        "tuned": {"seed": 5},
        "deeper": {"seed": 6, "stacks": (("encoder", 4, 4),)},
        "both": {"stacks": T5},
        "pictures": {"pictures": True, "n_tokens": 17},
        "hostile": {"hostile": True, "n_tokens": 24},
        "empty": {"values": False, "n_shown": 0, "twin": False, "support": False},
    }
    for name, plan in plans.items():
        render_atlas(write_atlas(made / name, name=name, **plan))
    for second in ("tuned", "deeper"):
        (made / f"with-{second}").mkdir()
        render_comparison(made / "plain", made / second, made / f"with-{second}" / "report.html")
    return made


class Opened:
    """Opens pages; a console message, an error, a dialog or a request elsewhere fails the test."""

    def __init__(self, browser: Any, home: Path) -> None:
        self.browser, self.home = browser, home
        self.contexts: list[Any] = []
        self.trouble: list[str] = []

    def __call__(self, name: str = "plain", view: str = "", *, width: int = 1280, scheme: str = "light") -> Any:
        context = self.browser.new_context(
            offline=True,
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
            accept_downloads=True,
        )
        self.contexts.append(context)
        page = context.new_page()
        address = (self.home / name / "report.html").as_uri()
        page.on("console", lambda message: self.trouble.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.trouble.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: self._request(request.url, address))
        page.goto(f"{address}#{view}" if view else address)
        return page

    def _request(self, url: str, address: str) -> None:
        if url.partition("#")[0] != address and not url.startswith(("data:", "blob:")):
            self.trouble.append(f"request: {url[:200]}")


@pytest.fixture
def open_page(browser: Any, home: Path) -> Iterator[Opened]:
    opened = Opened(browser, home)
    yield opened
    for context in opened.contexts:
        context.close()
    assert opened.trouble == []


@pytest.fixture(scope="module")
def record(home: Path) -> Result:
    return RunFolder(home / "plain").read_result()


def means(record: Result, key: str) -> dict[str, float]:
    return {head["label"]: head["values"][key]["mean"] for head in record["heads"]}


def column(page: Any, name: str, which: str = "heads") -> list[str]:
    return page.locator(f"#{which} tbody [data-name='{name}']").all_inner_texts()  # type: ignore[no-any-return]


def go(page: Any, view: str) -> None:
    """Open a view of the same page, and wait for it."""
    page.goto(page.url.partition("#")[0] + f"#{view}")
    place = (
        f"[data-view={view}][aria-current]" if "." not in view else f".head-pane h2:has-text('{view.split('~')[0]}')"
    )
    page.locator(place).first.wait_for()


def await_panes(page: Any, *texts: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator(".head-pane h2")).to_have_text([f"Head {text}" for text in texts])


def await_heading(page: Any, text: str) -> None:
    page.locator("#view h2").first.and_(page.get_by_role("heading", name=text, exact=True)).wait_for()
