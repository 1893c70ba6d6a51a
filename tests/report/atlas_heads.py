"""Pages of single heads to test in headless Chromium: made-up runs, what they hold, and how to open and read them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from attsvm.report.atlas_render import render_atlas
from report.fake_atlas import HOSTILE, T5, Arrays, Result, make_atlas, write_atlas
from report.test_browser import browser

__all__ = [
    "HOSTILE",
    "SVG",
    "Opened",
    "Truth",
    "browser",
    "cell_place",
    "csv_of",
    "eventually",
    "folders",
    "matrix",
    "open_head",
    "queries_csv",
    "read_cell",
    "readout",
    "svg_of",
]

SVG = "{http://www.w3.org/2000/svg}"
ARABIC = ("مرحبا", "بالعالم", "هذا", "نص")

Change = Callable[[Result, Arrays], None]


def without_twin_and_support(result: Result, arrays: Arrays) -> None:
    for name in [name for name in arrays if name.endswith((".support", ".twin_index", ".twin_weight"))]:
        del arrays[name]
    for shown in result["shown"]:
        shown["support_known"] = False


def bare(result: Result, arrays: Arrays) -> None:
    """Nothing was solved, and a query attends to nothing."""
    without_twin_and_support(result, arrays)
    for head in result["heads"]:
        head |= {"solutions": [], "spectra": {}, "top_tokens": [], "soft": None}
    arrays["shown.0.0.pattern"][:, 3] = 0
    arrays["shown.0.0.selected"][:, 3] = -1
    arrays["shown.0.0.margin"][:] = np.inf


def arabic(result: Result, _: Arrays) -> None:
    for shown in result["shown"]:
        source = shown["source"]
        source["tokens"] = [
            token if special else ARABIC[i % 4]
            for i, (token, special) in enumerate(zip(source["tokens"], source["special"], strict=True))
        ]


PLANS: dict[str, tuple[dict[str, Any], tuple[Change, ...]]] = {
    "plain": ({"n_tokens": 24}, ()),
    "hostile": ({"n_tokens": 24, "hostile": True}, ()),
    "arabic": ({"n_tokens": 12, "stacks": (("encoder", 1, 2),)}, (arabic,)),
    "t5": ({"stacks": T5, "n_tokens": 20, "n_target": 12}, ()),
    "vit": ({"pictures": True, "n_tokens": 26, "stacks": (("encoder", 1, 2),)}, ()),
    "lone": ({"n_tokens": 16, "stacks": (("decoder", 1, 2),)}, (without_twin_and_support,)),
    "bare": ({"n_tokens": 16, "stacks": (("encoder", 1, 2),)}, (bare,)),
    "long": ({"n_tokens": 512, "n_shown": 1, "stacks": (("encoder", 1, 2),)}, ()),
}
FIRST = {"t5": "cross.L0.H1"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (changes, edits) in PLANS.items():
        made[name] = write_atlas(tmp_path_factory.mktemp(name) / "run", None, *edits, **changes)
        render_atlas(made[name])
    return made


class Opened:
    """Opens heads; a console message, an error, a dialog or a request elsewhere fails the test."""

    def __init__(self, browser: Any, folders: dict[str, Path]) -> None:
        self.browser, self.folders = browser, folders
        self.contexts: list[Any] = []
        self.trouble: list[str] = []

    def __call__(self, name: str = "plain", head: str = "", *, width: int = 1280, scheme: str = "light") -> Any:
        context = self.browser.new_context(
            offline=True,
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
            accept_downloads=True,
        )
        self.contexts.append(context)
        page = context.new_page()
        address = (self.folders[name] / "report.html").as_uri()
        page.on("console", lambda message: self.trouble.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.trouble.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: self._request(request.url, address))
        page.goto(f"{address}#{head or FIRST.get(name, 'L0.H1')}")
        page.locator(".hd-readout", has_text="Query").first.wait_for()
        return page

    def _request(self, url: str, address: str) -> None:
        if url.split("#")[0] != address and not url.startswith(("data:", "blob:")):
            self.trouble.append(f"request: {url[:200]}")


@pytest.fixture
def open_head(browser: Any, folders: dict[str, Path]) -> Iterator[Opened]:
    opened = Opened(browser, folders)
    yield opened
    for context in opened.contexts:
        context.close()
    assert opened.trouble == []


class Truth:
    """One head of one module and shown text, from the records."""

    def __init__(self, name: str, module: int = 0, head: int = 1, shown: int = 0) -> None:
        changes, edits = PLANS[name]
        result, arrays = make_atlas(None, **changes)
        for edit in edits:
            edit(result, arrays)
        prefix = f"shown.{shown}.{module}."
        self.result = result
        self.record = next(one for one in result["heads"] if one["module"] == module and one["head"] == head)
        self.weights = (arrays[prefix + "pattern"][head] / 255.0) ** 2
        self.selected = arrays[prefix + "selected"][head]
        self.margin = arrays[prefix + "margin"][head].astype(np.float64)
        self.support = arrays.get(prefix + "support", arrays[prefix + "pattern"])[head] > 0
        self.twin = np.zeros_like(self.weights)
        if prefix + "twin_index" in arrays:
            index, weight = arrays[prefix + "twin_index"][head], arrays[prefix + "twin_weight"][head]
            np.put_along_axis(self.twin, index.astype(np.int64), (weight / 255.0) ** 2, -1)
        sides = [result["modules"][module][side] for side in ("query_side", "key_side")]
        self.queries, self.keys = (result["shown"][shown][side] for side in sides)


def csv_of(page: Any, button: str) -> list[dict[str, str]]:
    with page.expect_download() as started:
        page.get_by_role("button", name=button).first.click()
    text = Path(started.value.path()).read_text(encoding="utf-8-sig")
    return list(csv.DictReader(io.StringIO(text)))


def svg_of(page: Any, button: str) -> tuple[ElementTree.Element, str]:
    with page.expect_download() as started:
        page.get_by_role("button", name=button).first.click()
    text = Path(started.value.path()).read_text(encoding="utf-8")
    assert started.value.suggested_filename.endswith(".svg")
    return ElementTree.fromstring(text), text


def queries_csv(page: Any) -> list[dict[str, str]]:
    return csv_of(page, "Save selections and margins of all queries as CSV")


def readout(page: Any) -> str:
    return page.locator(".hd-readout").first.inner_text()  # type: ignore[no-any-return]


def matrix(page: Any, which: int = 0) -> Any:
    return page.locator(".hd-matrix").nth(which)


def read_cell(page: Any, x: float, y: float) -> tuple[int, int, float]:
    """Query, key and weight under a place of the first matrix, in shares of its width and height."""
    canvas = matrix(page)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 1, box["y"] + 1)
    page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
    found = re.search(r"\((\d+)\), key .*\((\d+)\): weight (< )?([\d.]+)", page.locator(".hd-cell").inner_text())
    assert found is not None
    return int(found[1]), int(found[2]), 0.0 if found[3] else float(found[4])


def cell_place(page: Any, i: int, j: int, n: int) -> tuple[float, float]:
    """Where the middle of a cell of the whole first matrix of n queries and keys is, as ``read_cell`` takes it."""
    canvas = matrix(page)
    canvas.scroll_into_view_if_needed()
    wide, high = canvas.bounding_box()["width"], canvas.bounding_box()["height"]
    left = round(max(54, min(92, wide * 0.18)))
    cell = (wide - left - 10) / n
    top = 74 if cell >= 11 else 36
    return (left + (j + 0.5) * cell) / wide, (top + (i + 0.5) * (high - 8 - top) / n) / high


def eventually(page: Any, said: Callable[[], bool]) -> None:
    """Wait up to 3 s for something; the page forbids the evaluation that Playwright's own wait needs."""
    for _ in range(60):
        if said():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not happen")
