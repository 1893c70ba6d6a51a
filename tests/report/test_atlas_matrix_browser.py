"""Matrix and lines of one head in headless Chromium, from a file, with the network off."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report.atlas_heads import (
    SVG,
    Opened,
    Truth,
    browser,
    cell_place,
    eventually,
    folders,
    matrix,
    open_head,
    read_cell,
    readout,
    svg_of,
)

__all__ = ["browser", "folders", "open_head"]

pytestmark = pytest.mark.browser


def test_cells_are_read_by_pointer_and_keyboard(open_head: Opened) -> None:
    page, truth = open_head(), Truth("plain")
    for x, y in ((0.3, 0.3), (0.7, 0.5), (0.95, 0.95)):
        i, j, weight = read_cell(page, x, y)
        assert weight == pytest.approx(truth.weights[i, j], abs=6e-4)
        twin = re.search(r"in the twin (< )?([\d.]+)$", page.locator(".hd-cell").inner_text())
        assert twin is not None
        assert float(twin[2]) == pytest.approx(truth.twin[i, j], abs=6e-4)
    for at in ((0, 0), (3, 20), (17, 8), (23, 23)):
        assert read_cell(page, *cell_place(page, *at, 24))[:2] == at
    page.locator(".hd-tokens").first.locator(".hd-token").nth(4).click()
    page.mouse.move(0, 0)
    matrix(page).focus()
    page.keyboard.press("ArrowRight")
    assert "selected" in page.locator(".hd-cell").inner_text()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert "(5), key “[CLS]” (0)" in page.locator(".hd-cell").inner_text()
    assert page.locator("#announcer").inner_text().startswith("query ")
    page.keyboard.press("Enter")
    assert "(5) selects" in readout(page)
    assert page.url.endswith("#L0.H1")


def test_matrix_shows_the_weights_as_colours(open_head: Opened) -> None:
    page, truth = open_head(), Truth("plain")
    page.get_by_role("button", name="Marks").click()
    page.wait_for_timeout(60)
    i, j = np.unravel_index(truth.weights.argmax(), truth.weights.shape)
    page.evaluate(
        "void (window.lightness = (i, j, n) => { const canvas = document.querySelector('.hd-matrix');"
        " const wide = canvas.clientWidth, left = Math.round(Math.max(54, Math.min(92, wide * 0.18)));"
        " const cell = (wide - left - 10) / n, top = cell >= 11 ? 74 : 36, ratio = canvas.width / wide;"
        " const copy = canvas.cloneNode(), context = copy.getContext('2d', { willReadFrequently: true });"
        " context.drawImage(canvas, 0, 0);"
        " const [x, y] = [left + (j + 0.5) * cell, top + (i + 0.5) * (canvas.clientHeight - 8 - top) / n];"
        " const [r, g, b] = context.getImageData(Math.round(x * ratio), Math.round(y * ratio), 1, 1).data;"
        " return 0.2126 * r + 0.7152 * g + 0.0722 * b; })"
    )

    def light(row: int, column: int) -> float:
        return page.evaluate("([i, j]) => window.lightness(i, j, 24)", [int(row), int(column)])  # type: ignore[no-any-return]

    chosen = int(page.locator(".hd-tokens").first.locator(".hd-query").get_attribute("data-i"))
    row = next(k for k in range(24) if k != chosen)
    order = np.argsort(truth.weights[row])
    values = [light(row, int(order[k])) for k in (0, 16, 23)]
    assert values[0] > values[1] > values[2]
    assert light(int(i), int(j)) < 60
    page.get_by_role("button", name="Dark theme").click()
    page.wait_for_timeout(60)
    assert light(int(i), int(j)) > 180
    assert light(row, int(order[0])) < 60


def test_zoom_by_button_wheel_brush_and_keys(open_head: Opened) -> None:
    page = open_head("long")
    canvas = matrix(page)
    assert read_cell(page, 0.97, 0.97)[0] > 480
    page.get_by_role("button", name="Zoom in").click()
    page.get_by_role("button", name="Zoom in").click()
    i, j, _ = read_cell(page, 0.2, 0.1)
    assert 100 < i < 256
    assert 100 < j < 256
    page.get_by_role("button", name="Show the whole matrix").click()
    assert max(read_cell(page, 0.2, 0.1)[:2]) < 100
    box = canvas.bounding_box()
    place = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    # The wheel scrolls the page until somebody works in the matrix.
    page.mouse.move(*place(0.6, 0.6))
    canvas.focus()
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(80)
    zoomed = read_cell(page, 0.97, 0.97)
    assert max(zoomed[:2]) < 480
    page.keyboard.press("0")
    page.keyboard.press("+")
    assert max(read_cell(page, 0.97, 0.97)[:2]) < 480
    page.keyboard.press("0")
    page.mouse.move(*place(0.5, 0.5))
    page.mouse.down()
    page.mouse.move(*place(0.55, 0.55), steps=4)
    page.mouse.up()
    first, last = read_cell(page, 0.2, 0.2), read_cell(page, 0.97, 0.97)
    assert 15 < last[0] - first[0] < 60
    assert 15 < last[1] - first[1] < 60
    page.get_by_label("Drag").select_option("pan")
    page.mouse.move(*place(0.5, 0.5))
    page.mouse.down()
    page.mouse.move(*place(0.7, 0.7), steps=4)
    page.mouse.up()
    moved = read_cell(page, 0.97, 0.97)
    assert moved[0] < last[0]
    assert moved[1] < last[1]
    canvas.dblclick()
    assert max(read_cell(page, 0.97, 0.97)[:2]) > 480


def test_wheel_over_an_idle_matrix_scrolls_the_page(open_head: Opened) -> None:
    page = open_head("long")
    matrix(page).scroll_into_view_if_needed()
    box = matrix(page).bounding_box()
    before = page.evaluate("scrollY")
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.mouse.wheel(0, 200)
    page.wait_for_timeout(200)
    assert page.evaluate("scrollY") > before


def test_both_matrices_zoom_together(open_head: Opened) -> None:
    page = open_head("long")
    twin = "document.querySelectorAll('.hd-matrix')[1].toDataURL().length"
    page.wait_for_timeout(60)
    before = page.evaluate(twin)
    page.get_by_role("button", name="Zoom in").click()
    page.wait_for_timeout(60)
    assert page.evaluate(twin) != before


def test_pictures_of_the_matrix(open_head: Opened) -> None:
    page, truth = open_head(scheme="dark"), Truth("plain")
    with page.expect_download() as started:
        page.get_by_role("button", name="Save the head as PNG").click()
    content = Path(started.value.path()).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 800
    assert height > 800
    root, text = svg_of(page, "Save the head as SVG")
    assert root.tag == SVG + "svg"
    assert "var(" not in text
    assert "class=" not in text
    cells = [one for one in root.iter(SVG + "rect") if float(one.get("stroke-width", "1").removesuffix("px")) == 1.5]
    assert len(cells) == 24
    assert len(list(root.iter(SVG + "rect"))) >= 24 * 24 + 24 + int(truth.support.sum())
    words = [one.text for one in root.iter(SVG + "text")]
    assert words.count("[CLS]") == 2


def test_long_matrix_is_a_picture_in_its_svg(open_head: Opened) -> None:
    root, _ = svg_of(open_head("long"), "Save the head as SVG")
    (image,) = root.iter(SVG + "image")
    assert (image.get("href") or "").startswith("data:image/png;base64,")
    assert len(list(root.iter(SVG + "rect"))) < 20


def test_line_view(open_head: Opened) -> None:
    page, truth = open_head(), Truth("plain")
    page.get_by_role("radio", name="Lines").check(force=True)
    page.get_by_role("combobox", name="Lines").select_option("50")
    view = page.locator(".hd-lines").first
    eventually(page, lambda: 20 < view.locator(".hd-line:not(.hd-own)").count() <= 50)
    i = int(page.locator(".hd-tokens").first.locator(".hd-query").get_attribute("data-i"))
    assert view.locator(".hd-own").count() == min(12, int((truth.weights[i] >= 1e-4).sum()))
    assert view.locator(".hd-sel").count() == 1
    view.focus()
    page.keyboard.press("ArrowDown")
    assert f"({i + 1}) selects" in readout(page)
    root, text = svg_of(page, "Save the head as SVG")
    assert len(list(root.iter(SVG + "line"))) > 20
    assert "var(" not in text


def test_long_line_view_draws_what_is_in_view(open_head: Opened) -> None:
    page = open_head("long")
    page.get_by_role("radio", name="Lines").check(force=True)
    view = page.locator(".hd-lines").first
    eventually(page, lambda: view.locator(".hd-q").count() == 1)
    assert view.locator(".hd-line-word").count() < 100
    view.evaluate("box => { box.scrollTop = 0; }")
    eventually(page, lambda: "[CLS]" in view.locator(".hd-line-word").first.text_content())
    assert page.locator(".hd-lines").nth(1).evaluate("box => box.scrollTop") == 0


def test_long_text_is_drawn_at_once(open_head: Opened) -> None:
    page = open_head("long")
    spent = page.evaluate(
        "() => new Promise((done) => { const start = performance.now();"
        " const box = [...document.querySelectorAll('select')].find((one) => one.querySelector('[value=log]'));"
        " box.value = 'log'; box.dispatchEvent(new Event('change'));"
        " requestAnimationFrame(() => setTimeout(() => done(performance.now() - start))); })"
    )
    # Generous: a busy machine; a drawing made of 262,144 elements takes many seconds.
    assert spent < 1500


def test_two_fingers_zoom_and_one_scrolls_the_page(browser: Any, folders: dict[str, Path]) -> None:
    context = browser.new_context(offline=True, viewport={"width": 400, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto((folders["long"] / "report.html").as_uri() + "#L0.H1")
    page.locator(".hd-readout", has_text="Query").first.wait_for()
    assert read_cell(page, 0.9, 0.9)[0] > 400
    driver, box = context.new_cdp_session(page), matrix(page).bounding_box()
    x, y = box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"]

    def touch(kind: str, *points: tuple[float, float]) -> None:
        fingers = [{"x": px, "y": py, "id": i} for i, (px, py) in enumerate(points)]
        driver.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
        page.wait_for_timeout(20)

    touch("touchStart", (x - 20, y - 20))
    touch("touchStart", (x - 20, y - 20), (x + 20, y + 20))
    for step in range(1, 8):
        touch("touchMove", (x - 20 - 8 * step, y - 20 - 8 * step), (x + 20 + 8 * step, y + 20 + 8 * step))
    touch("touchEnd")
    assert page.evaluate("visualViewport.scale") == 1
    first, last = read_cell(page, 0.3, 0.3), read_cell(page, 0.9, 0.9)
    assert 20 < last[0] - first[0] < 200
    before = page.evaluate("scrollY")
    touch("touchStart", (x, y))
    for step in range(1, 12):
        touch("touchMove", (x, y - 12 * step))
    touch("touchEnd")
    eventually(page, lambda: page.evaluate("scrollY") > before + 40)
    context.close()
