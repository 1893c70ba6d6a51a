"""Comparisons, records and all views of ``attsvm inspect`` in headless Chromium, with the network off."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm.records import RunFolder
from attsvm.report import render_atlas
from attsvm.report.atlas_build import pack, read_atlas
from attsvm.report.atlas_page import blobs, payload
from attsvm.report.render import bundle, embed_json
from report.atlas_pages import (
    WIDTHS,
    Opened,
    await_panes,
    column,
    go,
    home,
    means,
    open_page,
    record,
)
from report.fake_atlas import BERT, Result, write_atlas
from report.test_browser import browser, table

__all__ = ["browser", "home", "open_page", "record"]

pytestmark = pytest.mark.browser

VIEWS = ("map", "table", "compare", "similarity", "record", "L1.H1", "L0.H0~L1.H1")


def test_the_reader_gives_back_the_arrays(browser: Any, home: Path) -> None:
    """The scripts that unpack the patterns, without the rest of the page, against the arrays of the run."""
    atlas = read_atlas(home / "both")
    packed = pack([atlas])
    data = embed_json(payload([atlas.result], packed.n_shown))
    html = (
        f'<p id="announcer"></p><script type="application/json" id="data">{data}</script>'
        f'<script type="application/json" id="blobs">{embed_json(blobs([atlas], packed))}</script>'
    )
    context = browser.new_context(offline=True)
    opened = context.new_page()
    opened.set_content(html)
    opened.add_script_tag(content=bundle(["core.js", "atlas_data.js"]) + "window.read = atlases;")
    read = """async ([s, m]) => Object.fromEntries(Object.entries(await read[0].shown(s, m))
        .map(([key, value]) => [key, ArrayBuffer.isView(value) ? [...value] : value]))"""
    for s in range(2):
        for module in atlas.result.modules:
            got = opened.evaluate(read, [s, module.index])
            arrays = {
                name: atlas.arrays[f"shown.{s}.{module.index}.{name}"]
                for name in ("pattern", "selected", "margin", "support", "twin_index", "twin_weight")
            }
            assert (got["H"], got["Tq"], got["Tk"]) == arrays["pattern"].shape
            for ours, theirs in (("pattern", "pattern"), ("selected", "selected"), ("support", "support")):
                assert got[ours] == arrays[theirs].ravel().tolist()
            assert got["margin"] == arrays["margin"].astype(np.float16).ravel().tolist()
            # The twin's weights come largest first; equal ones may change places, zeros are left out.
            assert got["K"] == np.count_nonzero(arrays["twin_weight"], -1).max()
            twin = np.array(got["twinWeight"]).reshape(*arrays["selected"].shape, got["K"])
            assert np.array_equal(twin, arrays["twin_weight"][..., : got["K"]])
            index = np.array(got["twinIndex"]).reshape(twin.shape)
            dense = np.zeros(arrays["pattern"].shape, np.uint8)
            np.put_along_axis(dense, arrays["twin_index"].astype(np.int64), arrays["twin_weight"], -1)
            found = np.take_along_axis(dense, np.maximum(index, 0), -1)
            assert np.array_equal(np.where(index >= 0, found, 0), twin)
            assert np.array_equal(index >= 0, twin > 0)
    similar = opened.evaluate("async () => [...await read[0].similarity()]")
    assert np.abs(np.array(similar) - atlas.arrays["similarity"].ravel()).max() <= 0.5 / 250 + 1e-6
    assert opened.evaluate("read[0].weight(128)") == pytest.approx((128 / 255) ** 2, rel=1e-6)
    context.close()


def test_the_similarity_of_heads(open_page: Opened, home: Path) -> None:
    page = open_page("plain", "similarity")
    page.locator("#similar-0-head").select_option(label="L1.H1")
    values = RunFolder(home / "plain").read_arrays()["similarity"][5]
    labels = [f"L{i // 4}.H{i % 4}" for i in range(12)]
    order = [i for i in np.argsort(-np.round(250 * values), kind="stable") if i != 5]
    assert page.locator("#similar-0-nearest tbody td:first-child").all_inner_texts() == [labels[i] for i in order[:10]]
    pixels = """one => [...one.getContext('2d').getImageData(0, 0, one.width, one.height).data]"""
    canvas = page.locator(".similar-matrix")
    drawn = np.array(canvas.evaluate(pixels)).reshape(12, 12, 4)
    assert np.array_equal(drawn, drawn.transpose(1, 0, 2))
    assert (drawn[range(12), range(12)] == [253, 231, 37, 255]).all()
    page.locator("#similar-0-order").select_option("chain")
    again = np.array(canvas.evaluate(pixels)).reshape(12, 12, 4)
    assert sorted(map(tuple, again.reshape(-1, 4))) == sorted(map(tuple, drawn.reshape(-1, 4)))
    page.locator("#similar-0-nearest").get_by_role("link", name="compare").first.click()
    await_panes(page, "L1.H1", labels[order[0]])


def test_two_layers_of_one_run(open_page: Opened, record: Result) -> None:
    page = open_page("plain", "compare")
    # What the choice says is what is drawn.
    assert page.locator("#compare-measure").input_value() == "score.fro.correlation"
    assert page.locator("#view .explanation").inner_text().startswith("Correlation (score, Frobenius)")
    page.locator("#compare-a").select_option("0.0")
    page.locator("#compare-b").select_option("0.2")
    page.locator("#compare-measure").select_option("margin")
    values = means(record, "margin")
    differences = {f"L0.H{h} ~ L2.H{h}": values[f"L2.H{h}"] - values[f"L0.H{h}"] for h in range(4)}
    expected = sorted(differences, key=lambda pair: -abs(differences[pair]))
    assert column(page, "Heads", "pairs") == expected
    shown = [float(text.replace("−", "-").replace("+", "")) for text in column(page, "Difference", "pairs")]
    assert shown == pytest.approx([differences[pair] for pair in expected], rel=5e-3)
    page.get_by_role("link", name=expected[0]).first.click()
    await_panes(page, *expected[0].split(" ~ "))


def test_two_runs_beside_each_other(open_page: Opened, home: Path, record: Result) -> None:
    other = RunFolder(home / "tuned").read_result()
    page = open_page("with-tuned", "compare")
    a, b = means(record, "score.fro.correlation"), means(other, "score.fro.correlation")
    expected = sorted(a, key=lambda label: -abs(b[label] - a[label]))
    assert column(page, "Heads", "pairs") == expected
    apart = [
        one["label"]
        for one, two in zip(record["heads"], other["heads"], strict=True)
        if one["values"]["score.fro.correlation"]["high"] < two["values"]["score.fro.correlation"]["low"]
        or two["values"]["score.fro.correlation"]["high"] < one["values"]["score.fro.correlation"]["low"]
    ]
    marked = page.locator("#pairs tr.marked th").all_inner_texts()
    assert sorted(marked) == sorted(apart)
    with page.expect_download() as started:
        page.locator("#pairs-csv").click()
    rows = table(started.value)
    assert [row["first head"] for row in rows] == expected
    for row in rows:
        assert float(row["Difference"]) == pytest.approx(b[row["first head"]] - a[row["first head"]], abs=2e-6)
    # The map of differences leads to both heads.
    page.keyboard.press("m")
    page.locator("a.cell[data-head='L1.H1']").click()
    await_panes(page, "L1.H1", "L1.H1")
    assert page.locator(".head-page .eyebrow").all_inner_texts() == ["A: plain", "B: tuned"]


def test_the_same_selections_of_two_runs(open_page: Opened, home: Path) -> None:
    page = open_page("with-tuned", "compare")
    page.locator("#compare-measure").select_option("(same)")
    page.locator("#pairs").wait_for()
    arrays = [RunFolder(home / name).read_arrays() for name in ("plain", "tuned")]
    expected = {}
    for layer in range(3):
        selected = [np.concatenate([one[f"shown.{s}.{layer}.selected"] for s in range(2)], 1) for one in arrays]
        for head in range(4):
            expected[f"L{layer}.H{head}"] = float((selected[0][head] == selected[1][head]).mean())
    shown = dict(zip(column(page, "Heads", "pairs"), column(page, "Same selections", "pairs"), strict=True))
    assert {label: float(value) for label, value in shown.items()} == pytest.approx(expected, abs=6e-4)
    # Those that differ most come first.
    assert list(shown.values()) == sorted(shown.values())


def test_runs_of_different_depth(open_page: Opened) -> None:
    page = open_page("with-deeper")
    assert "4 heads of B: deeper" in page.locator("#view .notice").inner_text()
    go(page, "L3.H1")
    await_panes(page, "L3.H1")
    assert page.locator(".head-page .eyebrow").inner_text() == "B: deeper"
    go(page, "table")
    page.locator("#table-run").select_option(label="B: deeper")
    assert len(column(page, "Head")) == 16


def test_the_record_and_its_data(open_page: Opened, record: Result) -> None:
    page = open_page("plain", "record")
    text = page.locator("#record-view").inner_text()
    for expected in (record["model"]["notes"][0], record["corpus"]["notes"][0], "2.4 × 10⁻⁷", record["command"]):
        assert expected in text
    with page.expect_download() as started:
        page.get_by_role("button", name="Download the data as JSON").click()
    assert started.value.suggested_filename == "plain.json"
    again = json.loads(Path(started.value.path()).read_text(encoding="utf-8"))
    assert [head["label"] for head in again["heads"]] == [head["label"] for head in record["heads"]]
    assert again["corpus"] == record["corpus"]


def test_hostile_text_is_text_in_every_view(open_page: Opened) -> None:
    page = open_page("hostile")
    for view in ("map", "table", "compare", "similarity", "record", "L0.H0"):
        go(page, view)
    page.locator(".head-pane").get_by_text("window.pwned=2").first.wait_for()
    go(page, "map")
    page.locator("a.cell").first.hover()
    assert "<script>window" in page.locator("#tooltip").inner_text()
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[src=x]").count() == 0


def test_a_run_without_values_or_texts_opens(open_page: Opened) -> None:
    page = open_page("empty")
    assert page.locator("#map-measure").input_value() == "(kinds)"
    for view in ("table", "compare", "similarity", "record", "L0.H0"):
        go(page, view)


@pytest.mark.parametrize("name", ["plain", "with-tuned", "hostile", "pictures"])
@pytest.mark.parametrize("width", WIDTHS)
def test_fits_the_window(open_page: Opened, name: str, width: int) -> None:
    page = open_page(name, width=width)
    for view in VIEWS:
        go(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        out = page.evaluate(
            "[...document.querySelectorAll('main > :not([hidden]) *')]"
            ".filter((one) => !one.closest('pre, svg, canvas, .wide, .scroller, .hd-scroll, .unseen, select'))"
            ".filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5).map((one) => one.className)"
        )
        assert out == [], view


@pytest.mark.parametrize("name", ["plain", "with-tuned"])
def test_every_control_has_a_name(open_page: Opened, name: str) -> None:
    page = open_page(name)
    for view in VIEWS:
        go(page, view)
        unnamed = page.evaluate(
            "[...document.querySelectorAll('button, select, input, a, canvas, [tabindex=\"0\"]')].filter((one) => "
            "!one.hidden && !one.closest('[aria-hidden=true], dialog') && !one.textContent.trim() && "
            "!one.labels?.length && !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby'))"
            ".map((one) => one.outerHTML.slice(0, 200))"
        )
        assert unnamed == [], view
        doubled = page.evaluate(
            "Object.entries([...document.querySelectorAll('[id]')].reduce((seen, { id }) => "
            "({ ...seen, [id]: (seen[id] ?? 0) + 1 }), {})).filter(([, times]) => times > 1).map(([id]) => id)"
        )
        assert doubled == [], view


def test_the_record_is_there_without_scripts(browser: Any, home: Path) -> None:
    context = browser.new_context(offline=True, java_script_enabled=False)
    page = context.new_page()
    page.goto((home / "plain" / "report.html").as_uri())
    assert "attsvm inspect models/plain" in page.locator("#record-view").inner_text()
    assert "need JavaScript" in page.locator("main").inner_text()
    context.close()


@pytest.mark.slow
def test_a_large_page_opens_fast(browser: Any, tmp_path: Path) -> None:
    """144 heads at 512 tokens: under 16 MB, and open in under 3 seconds."""
    path = write_atlas(tmp_path / "large", stacks=BERT, n_tokens=512, n_shown=1)
    page_file = render_atlas(path)
    assert page_file.stat().st_size < 6_000_000
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(page_file.as_uri())
    page.locator("a.cell").first.wait_for()
    # Counted by the browser itself, from the start of the navigation.
    assert page.evaluate("performance.now()") < 3000
    page.evaluate("location.hash = 'L11.H11'")
    page.locator(".head-pane h2", has_text="L11.H11").wait_for()
    context.close()


def test_the_page_works_in_the_frame_of_a_notebook(browser: Any, home: Path, tmp_path: Path) -> None:
    """A frame that has no origin and no address of its own, as notebooks show it."""
    text = escape((home / "both" / "report.html").read_text(encoding="utf-8"), quote=True)
    outer = tmp_path / "notebook.html"
    frame = f'<iframe srcdoc="{text}" sandbox="allow-scripts allow-downloads"></iframe>'
    outer.write_text(f"<!doctype html>{frame}", encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto(outer.as_uri())
    inside = page.frame_locator("iframe")
    inside.locator("a.cell").nth(3).click()
    inside.get_by_role("heading", name="Head encoder.L0.H3").wait_for()
    inside.get_by_role("link", name="Table", exact=True).click()
    inside.get_by_role("heading", name="All heads").wait_for()
    with page.expect_download() as started:
        inside.locator("#heads-csv").click()
    assert started.value.suggested_filename == "both-heads.csv"
    inside.locator("#heads-csv").press("m")
    inside.get_by_role("heading", name="Map of all heads").wait_for()
    assert trouble == []
    context.close()
