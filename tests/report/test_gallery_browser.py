"""The gallery in headless Chromium, from files, with the network off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from attsvm.report import render_gallery
from report.fake_gallery import make_trials, write_gallery
from report.test_browser import browser, table

__all__ = ["browser"]

pytestmark = pytest.mark.browser

WIDTHS = (1280, 400)
FINISHED = ("tfsvm-fig2", "tfsvm-fig10", "rates", "hostile")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_gallery(tmp_path_factory.mktemp("gallery") / "reproduce")
    render_gallery(made)
    return made


class Opened:
    """Opens pages of the gallery; a console message, an error or a request elsewhere fails the test."""

    def __init__(self, browser: Any, home: Path) -> None:
        self.browser, self.home = browser, home
        self.contexts: list[Any] = []
        self.trouble: list[str] = []

    def __call__(self, name: str = "index.html", *, width: int = 1280, scheme: str = "light") -> Any:
        context = self.browser.new_context(
            offline=True,
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
            accept_downloads=True,
        )
        self.contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: self.trouble.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.trouble.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: self._request(request.url))
        page.goto((self.home / name).as_uri())
        return page

    def _request(self, url: str) -> None:
        inside = url.startswith(self.home.as_uri()) and url.endswith(".html")
        if not inside and not url.startswith(("data:", "blob:")):
            self.trouble.append(f"request: {url[:200]}")


@pytest.fixture
def open_page(browser: Any, home: Path) -> Iterator[Opened]:
    opened = Opened(browser, home)
    yield opened
    for context in opened.contexts:
        context.close()
    assert opened.trouble == []


def cells(page: Any, name: str, which: str = "number-table") -> list[str]:
    return page.locator(f"#{which} tbody td[data-name='{name}']").all_inner_texts()  # type: ignore[no-any-return]


def counted(page: Any, which: str = "number-table") -> str:
    return page.locator(f"#{which}-count").inner_text()  # type: ignore[no-any-return]


def test_a_card_leads_to_its_page_and_back(open_page: Opened) -> None:
    page = open_page()
    assert page.locator(".recipe").count() == 6
    page.get_by_role("link", name="Rates of four optimisers").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Rates of four optimisers"
    page.get_by_role("link", name="All figures").click()
    assert page.get_by_role("heading", level=1).inner_text() == "7 of 10 compared numbers are met."
    page.locator(".thumbnail").nth(1).click()
    assert page.get_by_role("heading", level=1).inner_text() == "Global convergence, as in tfsvm-fig10"


def test_thumbnails_are_drawn(open_page: Opened) -> None:
    sizes = open_page().locator(".thumbnail img").evaluate_all("all => all.map((one) => one.naturalWidth)")
    assert len(sizes) == 2
    assert min(sizes) > 1000


@pytest.mark.parametrize("verdict", ["met", "differs", "not published"])
def test_filter_by_verdict(open_page: Opened, verdict: str) -> None:
    page = open_page()
    assert counted(page) == "14 numbers."
    every = cells(page, "Verdict")
    page.locator("#number-table-filter").select_option(label=verdict)
    assert cells(page, "Verdict") == [verdict] * every.count(verdict)
    assert counted(page) == f"{every.count(verdict)} numbers (14 in all)."
    page.locator("#number-table-filter").select_option(label="all")
    assert cells(page, "Verdict") == every


def test_find_in_rows(open_page: Opened) -> None:
    page = open_page()
    page.get_by_label("Find").fill("RATES")
    assert cells(page, "Recipe") == ["rates"]
    page.get_by_label("Find").fill("no such row")
    assert counted(page) == "No number matches (14 in all)."


def test_sorting_numbers(open_page: Opened) -> None:
    page = open_page("tfsvm-fig10/report.html")
    listed = cells(page, "Ours")
    for order, expected in (
        ("ascending", ["3.200 × 10⁻⁷", "0.84996", "0.9934", "1.000"]),
        ("descending", ["1.000", "0.9934", "0.84996", "3.200 × 10⁻⁷"]),
    ):
        page.get_by_role("button", name="Ours").click()
        assert cells(page, "Ours") == expected
        assert page.locator("#number-table th", has_text="Ours").get_attribute("aria-sort") == order
    # What is missing comes last in both orders.
    for _ in range(2):
        page.get_by_role("button", name="Published", exact=True).click()
        assert cells(page, "Published")[2:] == ["–", "–"]
    assert sorted(cells(page, "Ours")) == sorted(listed)
    assert page.locator("#number-table [aria-sort]").count() == 1


def test_names_sort_by_the_numbers_in_them(open_page: Opened) -> None:
    page = open_page()
    page.get_by_role("button", name="Recipe").click()
    assert list(dict.fromkeys(cells(page, "Recipe"))) == ["hostile", "rates", "tfsvm-fig2", "tfsvm-fig10"]


def test_trials_sort_filter_and_turn_pages(open_page: Opened) -> None:
    page = open_page("tfsvm-fig10/report.html")
    trials = make_trials()
    assert counted(page, "trial-table") == "Showing 1–50 of 120 trials."
    page.get_by_role("button", name="Last", exact=True).click()
    assert counted(page, "trial-table") == "Showing 101–120 of 120 trials."
    assert cells(page, "trial", "trial-table") == [str(one["trial"]) for one in trials[100:]]
    assert page.evaluate("document.activeElement.textContent") in {"First", "Previous"}
    page.locator("#trial-table-filter").select_option(label="d=10")
    page.get_by_role("button", name="correlation").click()
    page.get_by_role("button", name="correlation").click()
    expected = sorted((one for one in trials if one["case"] == "d=10"), key=lambda one: -one["correlation"])
    assert cells(page, "trial", "trial-table") == [str(one["trial"]) for one in expected[:50]]
    assert counted(page, "trial-table") == "Showing 1–50 of 60 trials (120 in all)."


def test_csv_of_trials_holds_all_digits_as_filtered_and_sorted(open_page: Opened) -> None:
    page = open_page("tfsvm-fig10/report.html")
    page.locator("#trial-table-filter").select_option(label="d=4")
    page.get_by_role("button", name="rank").click()
    with page.expect_download() as started:
        page.locator("#trial-table-csv").click()
    assert started.value.suggested_filename == "tfsvm-fig10-trials.csv"
    rows = table(started.value)
    trials = [one for one in make_trials() if one["case"] == "d=4"]
    expected = sorted(trials, key=lambda one: (one["rank"] is None, one["rank"]))
    assert [int(row["trial"]) for row in rows] == [one["trial"] for one in expected]
    for row, one in zip(rows, expected, strict=True):
        assert float(row["correlation"]) == one["correlation"]
        assert row["rank"] == ("" if one["rank"] is None else str(one["rank"]))
        assert row["feasible"] == str(one["feasible"]).lower()


def test_csv_of_numbers(open_page: Opened) -> None:
    page = open_page()
    page.locator("#number-table-filter").select_option(label="differs")
    with page.expect_download() as started:
        page.locator("#number-table-csv").click()
    assert started.value.suggested_filename == "reproduce-numbers.csv"
    rows = table(started.value)
    assert [row["Recipe"] for row in rows] == ["tfsvm-fig2", "tfsvm-fig10", "hostile"]
    assert {(row["Published"], row["Ours"], row["Range"], row["Verdict"]) for row in rows} == {
        ("0.9", "0.84996", "0.85 to 0.95", "differs")
    }


def test_hostile_text_is_text_and_its_formula_is_defused(open_page: Opened) -> None:
    page = open_page("hostile/report.html")
    assert page.get_by_role("heading", level=1).inner_text().startswith("</script><script>window.pwned=1</script>")
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    with page.expect_download() as started:
        page.locator("#trial-table-csv").click()
    (row,) = table(started.value)
    assert row["trial"] == str(2**70)
    assert "'=cmd|'/C calc'!A0" in row.values()


@pytest.mark.parametrize("name", ["index.html", *(f"{one}/report.html" for one in FINISHED)])
def test_fits_the_window(open_page: Opened, name: str) -> None:
    page = open_page(name)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        wide = page.evaluate(
            "[document.documentElement.scrollWidth, ...[...document.querySelectorAll('main *')]"
            ".filter((one) => !one.closest('pre, svg, .picture, .wide, thead'))"
            ".map((one) => one.getBoundingClientRect().right)]"
        )
        assert max(wide) <= width + 0.5


def test_sorting_on_a_phone(open_page: Opened) -> None:
    page = open_page("tfsvm-fig10/report.html", width=400)
    tools = page.locator("#number-table-tools")
    tools.get_by_label("Sort by").select_option(label="Ours")
    assert cells(page, "Ours")[0] == "3.200 × 10⁻⁷"
    tools.get_by_role("button", name="Ascending").click()
    assert cells(page, "Ours")[0] == "1.000"
    # A heading cannot be reached where it is not shown.
    assert page.locator("#number-table thead").evaluate("(one) => getComputedStyle(one).visibility") == "hidden"


def test_keyboard(open_page: Opened) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    # The picture is a link for the pointer only: the title beside it is the same link.
    assert page.evaluate("document.activeElement.closest('h2') !== null")
    page.keyboard.press("Enter")
    page.wait_for_url("**/report.html")
    page.get_by_role("button", name="Ours").focus()
    page.keyboard.press("Enter")
    assert cells(page, "Ours")[0] == "3.200 × 10⁻⁷"
    assert page.evaluate("document.activeElement.textContent").startswith("Ours")


def test_every_control_has_a_name(open_page: Opened) -> None:
    for name in ("index.html", "tfsvm-fig10/report.html"):
        page = open_page(name)
        unnamed = page.evaluate(
            "[...document.querySelectorAll('button, select, input, a, [tabindex=\"0\"]')].filter((one) => "
            "!one.hidden && !one.closest('[aria-hidden=true]') && !one.textContent.trim() && !one.labels?.length "
            "&& !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby')).map((one) => one.outerHTML)"
        )
        assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_figure_follows_the_theme(open_page: Opened, scheme: str) -> None:
    page = open_page("tfsvm-fig10/report.html", scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    colors = (
        "['#ffffff', '#0067a8'].map((c) => getComputedStyle(document.querySelector(`.picture [fill=\"${c}\"]`)).fill)"
    )
    shown = {"light": ["rgb(255, 255, 255)", "rgb(0, 103, 168)"], "dark": ["rgb(27, 30, 36)", "rgb(99, 184, 242)"]}
    assert page.evaluate(colors) == shown[scheme]
    page.get_by_role("button", name=f"{other} theme").click()
    assert page.evaluate(colors) == shown[other]


def test_numbers_are_there_without_scripts(browser: Any, home: Path) -> None:
    context = browser.new_context(offline=True, java_script_enabled=False)
    page = context.new_page()
    page.goto((home / "tfsvm-fig10" / "report.html").as_uri())
    assert page.locator("#number-table tbody tr").count() == 4
    assert page.locator("#number-table-tools").is_hidden()
    assert page.locator("#trial-table").is_hidden()
    assert page.locator("#trials noscript").count() == 1
    context.close()
