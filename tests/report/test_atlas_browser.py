"""The map, the keys and the table of ``attsvm inspect`` in headless Chromium, from a file, with the network off."""

from __future__ import annotations

import numpy as np
import pytest

from report.atlas_pages import (
    Opened,
    await_heading,
    await_panes,
    column,
    home,
    means,
    open_page,
    record,
)
from report.fake_atlas import Result
from report.test_browser import browser, table

__all__ = ["browser", "home", "open_page", "record"]

pytestmark = pytest.mark.browser


def test_the_map_shows_every_head_and_leads_to_it(open_page: Opened, record: Result) -> None:
    page = open_page()
    assert page.locator("#map-measure").input_value() == "score.fro.correlation"
    cells = page.locator(".head-grid a.cell")
    expected = means(record, "score.fro.correlation")
    assert cells.all_inner_texts() == [f"{value:.2f}" for value in expected.values()]
    assert cells.evaluate_all("all => all.map((one) => one.dataset.head)") == list(expected)
    estimate = record["heads"][5]["values"]["score.fro.correlation"]
    spoken = f"{estimate['mean']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"
    assert spoken in (cells.nth(5).get_attribute("aria-label") or "")
    highest = max(expected, key=lambda label: expected[label])
    assert page.locator(".extremes a").first.inner_text() == highest
    cells.nth(5).click()
    await_heading(page, "Head L1.H1")
    assert page.url.endswith("#L1.H1")
    page.go_back()
    await_heading(page, "Map of all heads")


def test_colours_follow_the_measure(open_page: Opened, record: Result) -> None:
    page = open_page()
    lightness = "one => getComputedStyle(one).backgroundColor.match(/[0-9.]+/g).map(Number)"
    for key in ("entropy", "score.fro.correlation"):
        page.locator("#map-measure").select_option(key)
        values = means(record, key)
        rows = [page.locator(f"a.cell[data-head='{label}']").evaluate(lightness) for label in values]
        # Lightness of viridis rises with the value.
        light = [0.2126 * (r / 255) ** 2.2 + 0.7152 * (g / 255) ** 2.2 + 0.0722 * (b / 255) ** 2.2 for r, g, b in rows]
        order = np.argsort(list(values.values()))
        assert np.all(np.diff(np.array(light)[order]) > -1e-3)
        assert light[order[0]] < 0.05 < 0.7 < light[order[-1]]
    assert page.locator(".colour-legend").inner_text().split()[0] != "0.000"
    page.locator("#map-scale").select_option("full")
    assert page.locator(".colour-legend").inner_text().split()[0] == "0.000"
    # By rank the middle of the values is the middle of the colours.
    page.locator("#map-scale").select_option("rank")
    values = means(record, "score.fro.correlation")
    third = sorted(values, key=lambda label: values[label])[3]
    shown = page.locator(f"a.cell[data-head='{third}']").evaluate(lightness)
    assert shown == pytest.approx([59, 82, 139], abs=8)


def test_kinds_of_heads_have_colours(open_page: Opened, record: Result) -> None:
    page = open_page()
    page.locator("#map-measure").select_option("(kinds)")
    for index, head in enumerate(record["heads"]):
        name = {"mixed": ""}.get(head["head_kind"], head["head_kind"].replace("_", " "))
        assert page.locator("a.cell").nth(index).inner_text() == name
    legend = page.locator(".kind-legend").inner_text()
    for kind in {head["head_kind"] for head in record["heads"]} - {"mixed"}:
        assert f"{kind.replace('_', ' ')} ({sum(head['head_kind'] == kind for head in record['heads'])})" in legend


def test_values_with_intervals_on_hover_and_focus(open_page: Opened, record: Result) -> None:
    page = open_page()
    page.locator("a.cell[data-head='L1.H2']").hover()
    shown = page.locator("#tooltip").inner_text()
    estimate = record["heads"][6]["values"]["score.fro.correlation"]
    assert f"{estimate['low']:.3f} to {estimate['high']:.3f}" in shown
    page.locator("a.cell[data-head='L0.H1']").focus()
    assert page.locator("#tooltip").inner_text().startswith("L0.H1")
    page.keyboard.press("Escape")
    assert page.locator("#tooltip").is_hidden()


def test_arrows_walk_along_the_map(open_page: Opened) -> None:
    page = open_page()
    page.locator("a.cell[tabindex='0']").focus()
    for key, head in (
        ("ArrowRight", "L0.H1"),
        ("ArrowDown", "L1.H1"),
        ("End", "L1.H3"),
        ("ArrowRight", "L1.H3"),
        ("ArrowUp", "L0.H3"),
        ("ArrowUp", "L0.H3"),
        ("Home", "L0.H0"),
    ):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.head") == head
    assert page.locator("a.cell[tabindex='0']").count() == 1
    page.keyboard.press("Enter")
    await_heading(page, "Head L0.H0")


def test_keys_move_between_heads_and_views(open_page: Opened) -> None:
    page = open_page("plain", "L0.H3")
    for key, expected in (
        ("ArrowRight", "Head L1.H0"),
        ("ArrowLeft", "Head L0.H3"),
        ("Shift+ArrowDown", "Head L1.H3"),
        ("Shift+ArrowUp", "Head L0.H3"),
        ("t", "All heads"),
        ("s", "Similarity of heads"),
        ("c", "Comparison of two layers"),
        ("m", "Map of all heads"),
    ):
        page.keyboard.press(key)
        await_heading(page, expected)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "heads-find"
    # A letter in a field is text.
    page.keyboard.type("mt")
    await_heading(page, "All heads")


@pytest.mark.parametrize("label", ["encoder.L1.H2", "decoder.L0.H3", "cross.L0.H2"])
def test_deep_links(open_page: Opened, label: str) -> None:
    page = open_page("both", label)
    await_heading(page, f"Head {label}")
    assert page.locator("#head-choice").input_value() == label
    assert page.title().startswith(label)
    assert page.locator("#overview").is_hidden()


def test_one_navigation_for_encoder_decoder_and_cross(open_page: Opened) -> None:
    page = open_page("both")
    assert page.locator(".grid-figure h3").all_inner_texts() == ["Encoder", "Decoder", "Cross-attention"]
    assert page.locator("a.cell").count() == 24
    page.locator("a.cell[data-head='decoder.L1.H3']").click()
    page.get_by_role("link", name="Next head: cross.L0.H0").click()
    await_heading(page, "Head cross.L0.H0")
    page.locator("#head-choice").select_option("encoder.L0.H1")
    await_heading(page, "Head encoder.L0.H1")
    assert page.locator("#head-choice optgroup").evaluate_all("all => all.map((one) => one.label)")[-1] == (
        "Cross-attention layer 1"
    )
    # A measure that cross-attention has not.
    page.locator("#head-choice").blur()
    page.keyboard.press("m")
    page.locator("#map-measure").select_option("previous")
    assert page.locator("[data-kind=cross] a.cell.unknown").count() == 8
    assert page.locator("[data-kind=encoder] a.cell.unknown").count() == 0


def test_an_unknown_head_says_so(open_page: Opened) -> None:
    for name in ("L9.H9", "constructor", "%E0%A4%A", "L0.H0~L9.H9"):
        page = open_page("plain", name)
        assert "This page has no head called" in page.locator("#view .notice").inner_text()
        assert page.locator("a.cell").count() == 12
    # Where the kind was left out, the heads of that name are offered.
    page = open_page("both", "L1.H2")
    page.locator("#view .notice").get_by_role("link", name="cross.L1.H2").click()
    await_panes(page, "cross.L1.H2")


def test_the_table_sorts_by_every_column(open_page: Opened, record: Result) -> None:
    page = open_page("plain", "table")
    titles = {measure["title"]: measure["key"] for measure in record["measures"]}
    for title, key in titles.items():
        values = means(record, key)
        for descending in (True, False):
            page.locator(f"#heads [data-key='{key}']").click()
            expected = sorted(values, key=lambda label: values[label], reverse=descending)
            assert column(page, "Head") == expected, title
            order = page.locator("#heads [aria-sort]")
            assert (order.count(), order.get_attribute("aria-sort")) == (1, "descending" if descending else "ascending")
            assert page.evaluate("document.activeElement.dataset.key") == key
    page.locator("#heads [data-key='(kind)']").click()
    assert column(page, "Kind") == sorted(column(page, "Kind"))


def test_the_table_filters(open_page: Opened, record: Result) -> None:
    page = open_page("plain", "table")
    page.locator("#heads-find").fill("l1.h")
    assert column(page, "Head") == [f"L1.H{head}" for head in range(4)]
    assert page.locator("#heads-count").inner_text() == "4 heads (12 in all)."
    page.locator("#heads-find").fill("")
    kind = record["heads"][0]["head_kind"].replace("_", " ")
    page.locator("#heads-kind").select_option(label=kind)
    assert set(column(page, "Kind")) == {kind}
    page.locator("#heads-kind").select_option(label="all")
    values = means(record, "score.fro.heldout")
    page.locator("#heads-number").select_option("score.fro.heldout")
    page.locator("#heads-limit").fill("0.5")
    assert set(column(page, "Head")) == {label for label, value in values.items() if value >= 0.5}
    page.locator("#heads-side").select_option("most")
    assert set(column(page, "Head")) == {label for label, value in values.items() if value <= 0.5}
    page.locator("#heads-find").fill("no such head")
    assert page.locator("#heads-count").inner_text() == "No head matches (12 in all)."


def test_csv_holds_what_is_shown(open_page: Opened, record: Result) -> None:
    page = open_page("plain", "table")
    page.locator("#heads-find").fill("L2")
    page.locator("#heads [data-key=entropy]").click()
    with page.expect_download() as started:
        page.locator("#heads-csv").click()
    assert started.value.suggested_filename == "plain-heads.csv"
    rows = table(started.value)
    heads = [head for head in record["heads"] if head["layer"] == 2]
    heads.sort(key=lambda head: -head["values"]["entropy"]["mean"])
    assert [row["head"] for row in rows] == [head["label"] for head in heads]
    for row, head in zip(rows, heads, strict=True):
        for key, estimate in head["values"].items():
            assert float(row[key]) == pytest.approx(estimate["mean"], rel=1e-5)
            assert float(row[f"{key}.low"]) == pytest.approx(estimate["low"], rel=1e-5)
            assert int(row[f"{key}.n"]) == estimate["n"]
