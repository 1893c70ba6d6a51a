"""The page in headless Chromium, from a file, with the network off."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from attsvm.report import read_page, render_run
from attsvm.report.page import Page
from report.fake_run import make_hostile, make_infeasible, make_run, write

CHROMIUM = Path("/usr/bin/chromium")
WIDTHS = (1280, 400)

pytestmark = pytest.mark.browser


def _missing(reason: str) -> None:
    """Skip, or fail where a browser is required."""
    if os.environ.get("ATTSVM_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    if not CHROMIUM.exists():
        _missing(f"{CHROMIUM} is not installed")
    with sync_playwright() as driver:
        started = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three rendered runs: an ordinary one, a hostile one and an infeasible one."""
    made = {}
    for name, change in (("plain", None), ("hostile", make_hostile), ("infeasible", make_infeasible)):
        result, arrays = make_run()
        if change is not None:
            change(result, arrays)
        made[name] = write(tmp_path_factory.mktemp(name) / "run", result, arrays)
        render_run(made[name])
    return made


@pytest.fixture(scope="module")
def record(folders: dict[str, Path]) -> Page:
    return read_page(folders["plain"])


class Opened:
    """Opens pages and fails the test on a console message, an error or a request."""

    def __init__(self, browser: Any, folders: dict[str, Path]) -> None:
        self.browser, self.folders = browser, folders
        self.contexts: list[Any] = []
        self.trouble: list[str] = []

    def __call__(self, name: str = "plain", *, width: int = 1280, scheme: str = "light") -> Any:
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
        page.goto(address)
        return page

    def _request(self, url: str, address: str) -> None:
        # The page itself, the empty icon, and files made in the page for a download are not requests to anyone.
        if url != address and not url.startswith(("data:,", "blob:")):
            self.trouble.append(f"request: {url}")


@pytest.fixture
def open_page(browser: Any, folders: dict[str, Path]) -> Iterator[Opened]:
    opened = Opened(browser, folders)
    yield opened
    for context in opened.contexts:
        context.close()
    assert opened.trouble == []


def column(page: Any, name: str) -> list[str]:
    return page.locator(f"#sentence-table tbody td.c-{name}").all_inner_texts()  # type: ignore[no-any-return]


def table(download: Any) -> list[dict[str, str]]:
    """Read a downloaded CSV file; its fields may be longer than the csv module expects."""
    usual = csv.field_size_limit(2_000_000)
    try:
        return list(csv.DictReader(io.StringIO(Path(download.path()).read_text(encoding="utf-8-sig"))))
    finally:
        csv.field_size_limit(usual)


def counted(page: Any) -> str:
    return page.locator("#sentence-count").inner_text()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["plain", "hostile", "infeasible"])
def test_fits_the_window(open_page: Opened, name: str) -> None:
    page = open_page(name)
    page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function(f"document.querySelector('.plot').clientWidth < {width}")
        assert_nothing_sticks_out(page, width)


def assert_nothing_sticks_out(page: Any, width: int) -> None:
    wide = page.evaluate(
        "[document.documentElement.scrollWidth, ...[...document.querySelectorAll('main *')]"
        ".filter((one) => !one.closest('pre, .value-table, svg, .formula'))"
        ".map((one) => one.getBoundingClientRect().right)]"
    )
    assert max(wide) <= width + 0.5


def test_hostile_text_is_text(open_page: Opened) -> None:
    page = open_page("hostile")
    row = page.locator("#sentence-table tbody tr").nth(1)
    assert row.locator(".token bdi").first.inner_text() == "</script><script>window.pwned=1</script>"
    row.get_by_role("button", name="Text", exact=True).click()
    assert row.locator(".raw").inner_text().startswith("</script><script>window.pwned=1</script>⟨U+202E⟩␊<img")
    page.locator("#tooltip").wait_for(state="hidden")
    row.locator(".token").nth(1).hover()
    assert "<img src=x" in page.locator("#tooltip").inner_text()
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0


def test_long_text_is_cut_until_asked_for(open_page: Opened) -> None:
    row = open_page("hostile").locator("#sentence-table tbody tr").first
    row.get_by_role("button", name="Text", exact=True).click()
    assert len(row.locator(".raw bdi").inner_text()) == 601
    row.get_by_role("button", name="Show all 1,000,000 characters").click()
    assert len(row.locator(".raw bdi").text_content()) == 1_000_000


def test_right_to_left_sentence_turns_only_itself(open_page: Opened) -> None:
    page = open_page("hostile")
    directions = page.locator(".tokens").evaluate_all("all => all.map((one) => one.dir)")
    assert directions[2] == "rtl"
    assert set(directions[:2] + directions[3:]) == {"ltr"}


def test_sorting_by_each_column(open_page: Opened, record: Page) -> None:
    page = open_page()
    values = record.parameterizations[0].values
    keys: dict[str, Any] = {
        "index": lambda i: i,
        "label": lambda i: record.sentences[i].label,
        "margin": lambda i: values[i].smallest_margin,
        "trained": lambda i: values[i].smallest_trained_margin,
        "attention": lambda i: values[i].attention,
        "length": lambda i: record.sentences[i].n_tokens,
        "differs": lambda i: values[i].selected != record.sentences[i].optimal,
    }
    page.locator("[data-sort=label]").click()
    for name in ("margin", "trained", "attention", "length", "differs", "label", "index"):
        for order in ("ascending", "descending"):
            page.locator(f"[data-sort={name}]").click()
            assert page.locator(f"th.c-{name}").get_attribute("aria-sort") == order
            expected = sorted(range(60), key=keys[name], reverse=False)
            if order == "descending":
                expected.sort(key=keys[name], reverse=True)
            assert column(page, "index") == [str(i) for i in expected[:20]], (name, order)


def test_filters_and_counts(open_page: Opened, record: Page) -> None:
    page = open_page()
    values = record.parameterizations[0].values
    assert counted(page) == "Showing 1–20 of 60 sentences."
    differ = [i for i, one in enumerate(record.sentences) if one.optimal != values[i].selected]
    assert differ
    page.locator("#filter-agreement").select_option("differ")
    assert column(page, "index") == [str(i) for i in differ]
    assert set(column(page, "differs")) == {"no"}
    page.locator("#filter-agreement").select_option("agree")
    assert f"of {60 - len(differ)} sentences (60 in all)" in counted(page)
    page.locator("#filter-agreement").select_option("all")
    page.locator("#filter-label").select_option(label="positive")
    assert counted(page) == "Showing 1–20 of 30 sentences (60 in all)."
    page.locator("#filter-text").fill("BRILLiant")
    both = [i for i, one in enumerate(record.sentences) if one.label == "positive" and "brilliant" in one.tokens]
    assert both
    assert column(page, "index") == [str(i) for i in both[:20]]
    page.locator("#filter-text").fill("no such words")
    assert counted(page) == "No sentence matches (60 in all)."
    assert column(page, "index") == []


def test_pages(open_page: Opened) -> None:
    page = open_page()
    page.get_by_role("button", name="Last", exact=True).click()
    assert counted(page) == "Showing 41–60 of 60 sentences."
    assert column(page, "index")[0] == "40"
    assert page.get_by_role("button", name="Next", exact=True).is_disabled()


def test_switching_the_parameterization(open_page: Opened, record: Page) -> None:
    page = open_page()
    one, two = (one.values for one in record.parameterizations)
    other = next(i for i in range(20) if one[i].selected != two[i].selected)
    marked = page.locator("#sentence-table tbody tr").nth(other).locator(".t-selected bdi")
    assert marked.inner_text() == record.sentences[other].tokens[one[other].selected or 0]
    page.get_by_role("radio", name="(K, Q)").check(force=True)
    assert marked.inner_text() == record.sentences[other].tokens[two[other].selected or 0]


def test_tooltip_by_hover_and_by_keyboard(open_page: Opened, record: Page) -> None:
    page = open_page()
    tip, row = page.locator("#tooltip"), page.locator("#sentence-table tbody tr").first
    values = record.parameterizations[0].values[0]
    support = values.support[0]
    row.locator(f"[data-t='{support}']").hover()
    hovered = tip.inner_text()
    assert "support token" in hovered
    assert re.search(r"margin\s+1\b", hovered)
    page.mouse.move(0, 0)
    tip.wait_for(state="hidden")
    # One Tab stop a sentence, at the selected token; the arrows walk from there.
    page.locator("[data-sort=differs]").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.t") == str(values.selected)
    assert "selected" in tip.inner_text()
    for _ in range(abs(support - (values.selected or 0))):
        page.keyboard.press("ArrowRight" if support > (values.selected or 0) else "ArrowLeft")
    assert tip.inner_text() == hovered
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tooltip"
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_skip_link_is_the_first_stop(open_page: Opened) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_marks_differ_without_colour(open_page: Opened) -> None:
    styles = open_page().evaluate(
        "Object.fromEntries(['selected', 'optimal', 'support'].map((state) => {"
        "  const one = document.querySelector(`.legend .t-${state}`);"
        "  const style = getComputedStyle(one);"
        "  return [state, [style.borderStyle, style.textDecorationStyle, style.textDecorationLine, style.fontWeight,"
        "    one.querySelector('.mark')?.textContent ?? ''].join(' ')];"
        "}))"
    )
    assert len(set(styles.values())) == 3
    assert "◆" in styles["selected"]
    assert "double" in styles["optimal"]
    assert "dashed" in styles["support"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_follows_the_system_and_the_button(open_page: Opened, scheme: str) -> None:
    page = open_page(scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every((c) => c > 127)"
    assert page.evaluate(brightness) == (scheme == "light")
    page.get_by_role("button", name=f"{other} theme").click()
    assert page.evaluate(brightness) == (scheme == "dark")
    page.reload()
    assert page.evaluate(brightness) == (scheme == "dark")


def test_csv_holds_the_filtered_sentences(open_page: Opened, record: Page) -> None:
    page = open_page()
    page.locator("#filter-label").select_option(label="negative")
    page.locator("[data-sort=length]").click()
    with page.expect_download() as started:
        page.locator("#csv").click()
    assert started.value.suggested_filename == "movie-reviews-sentences.csv"
    rows = table(started.value)
    expected = sorted((i for i in range(60) if i % 2 == 0), key=lambda i: record.sentences[i].n_tokens)
    assert [int(row["index"]) for row in rows] == expected
    for row, i in zip(rows, expected, strict=True):
        sentence, values = record.sentences[i], record.parameterizations[1].values[i]
        assert (row["text"], row["label"]) == (sentence.text, sentence.label)
        assert row["optimal_token"] == sentence.tokens[sentence.optimal or 0]
        assert int(row["KQ.selected_index"]) == values.selected
        assert float(row["KQ.attention"]) == pytest.approx(values.attention)
        assert int(row["W.n_support"]) == len(record.parameterizations[0].values[i].support)


def test_csv_defuses_formulas(open_page: Opened) -> None:
    page = open_page("hostile")
    with page.expect_download() as started:
        page.locator("#csv").click()
    rows = table(started.value)
    assert rows[1]["label"] == "'=cmd|'/C calc'!A0"
    assert len(rows[0]["text"]) == 1_000_000


def test_svg_download_stands_alone(open_page: Opened) -> None:
    page = open_page(scheme="dark")
    with page.expect_download() as started:
        page.locator("[data-chart=correlation-W] [data-action=svg]").click()
    text = Path(started.value.path()).read_text(encoding="utf-8")
    assert started.value.suggested_filename == "movie-reviews-correlation-W.svg"
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text
    assert "class=" not in text
    # Light colours whatever the theme of the page.
    assert "rgb(0, 103, 168)" in text
    assert "Frobenius solution" in text


def test_chart_values_by_keyboard_and_as_a_table(open_page: Opened) -> None:
    page = open_page()
    figure = page.locator("[data-chart=correlation-W]")
    figure.locator(".plot").focus()
    page.keyboard.press("End")
    read = "training step 2,000: Frobenius solution 0.962, nuclear solution 0.714"
    assert figure.locator(".readout").inner_text() == read
    figure.get_by_role("button", name="as a table").click()
    assert figure.locator(".value-table tbody tr").last.inner_text().split() == ["2000", "0.962", "0.714"]
    assert "ends at 0.962" in figure.locator("svg").get_attribute("aria-label")


def test_every_chart_is_drawn_at_both_step_scales(open_page: Opened) -> None:
    page = open_page()
    line = page.locator("[data-chart=norm] path.line").first
    before = line.get_attribute("d")
    assert page.locator(".chart svg").count() == page.locator(".chart").count() == 9
    page.get_by_role("button", name="Linear steps").click()
    assert line.get_attribute("d") != before
    assert "NaN" not in page.content()


def test_proof_button_lists_the_named_sentences(open_page: Opened) -> None:
    page = open_page("infeasible")
    page.get_by_role("button", name="Show all of them in the list").click()
    assert column(page, "index") == ["3", "11"]
    assert set(column(page, "margin")) == {"–"}


def test_command_is_copied(open_page: Opened) -> None:
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button = page.get_by_role("button", name="Copy the command")
    button.click()
    page.wait_for_function("document.querySelector('[data-copy=command]').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "attsvm verify --seed 0 --output-dir runs/movie-reviews"


def test_five_thousand_sentences_stay_usable(open_page: Opened, tmp_path: Path) -> None:
    open_page.folders = open_page.folders | {"large": write(tmp_path / "run", *make_run(5000))}
    render_run(open_page.folders["large"])
    page = open_page("large")
    assert counted(page) == "Showing 1–20 of 5,000 sentences."
    assert page.locator(".token").count() < 20 * 70
    spent = page.evaluate(
        "() => { const start = performance.now();"
        " document.querySelector('[data-sort=attention]').click();"
        " const box = document.getElementById('filter-text'); box.value = 'dull';"
        " box.dispatchEvent(new Event('input')); return performance.now() - start; }"
    )
    assert "(5,000 in all)" in counted(page)
    # Generous: a busy machine; drawing all rows instead of one page takes many seconds.
    assert spent < 3000
