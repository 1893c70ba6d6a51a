"""The page of one head in headless Chromium, from a file, with the network off: text, numbers and tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm.report.atlas_render import ATLAS_SCRIPTS, render_comparison
from report.atlas_heads import (
    HOSTILE,
    SVG,
    Opened,
    Truth,
    browser,
    csv_of,
    eventually,
    folders,
    open_head,
    queries_csv,
    read_cell,
    readout,
    svg_of,
)
from report.fake_atlas import make_atlas, write_atlas

__all__ = ["browser", "folders", "open_head"]

pytestmark = pytest.mark.browser


def test_no_script_takes_a_name_of_another() -> None:
    # In one scope the later of two functions of a name silently replaces the first.
    assets = Path(__file__).parents[2] / "src" / "attsvm" / "report" / "assets"
    pattern = re.compile(r"^(?:async )?(?:const|let|class|function\*?) +(\w+)", re.MULTILINE)
    names = [name for file in ATLAS_SCRIPTS for name in pattern.findall((assets / file).read_text(encoding="utf-8"))]
    assert len(names) > 100
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_chosen_query_and_what_it_selects(open_head: Opened) -> None:
    page, truth = open_head(), Truth("plain")
    tokens = page.locator(".hd-tokens").first.locator(".hd-token")
    assert tokens.count() == 24
    for i in (5, 17):
        tokens.nth(i).click()
        j = int(truth.selected[i])
        assert f"Query “{truth.queries['tokens'][i].strip()}” ({i}) selects" in readout(page)
        assert f"({j}) with weight {truth.weights[i, j]:.3f}" in readout(page)
        assert tokens.nth(i).get_attribute("aria-selected") == "true"
        assert page.locator(".hd-tokens").first.locator(".hd-selected").get_attribute("data-i") == str(j)
        marked = (
            page.locator(".hd-tokens").first.locator(".hd-support").evaluate_all("all => all.map((t) => t.dataset.i)")
        )
        assert [int(t) for t in marked] == np.flatnonzero(truth.support[i]).tolist()


def test_arrow_keys_walk_the_queries_and_stay_on_the_head(open_head: Opened) -> None:
    page = open_head()
    tokens = page.locator(".hd-tokens").first.locator(".hd-token")
    tokens.nth(5).click()
    for key, at in (("ArrowRight", 6), ("ArrowLeft", 5), ("Home", 0), ("End", 23)):
        page.keyboard.press(key)
        assert tokens.nth(at).get_attribute("aria-selected") == "true"
        assert page.evaluate("document.activeElement.dataset.i") == str(at)
    page.keyboard.press("ArrowUp")
    assert int(page.evaluate("document.activeElement.dataset.i")) < 23
    assert page.url.endswith("#L0.H1")
    assert page.locator(".hd-tokens").first.locator("[tabindex='0']").count() == 1


def test_selections_of_all_queries_as_csv(open_head: Opened) -> None:
    rows, truth = queries_csv(open_head()), Truth("plain")
    assert [int(row["selected"]) for row in rows] == truth.selected.tolist()
    for i, row in enumerate(rows):
        assert float(row["weight"]) == pytest.approx(truth.weights[i, truth.selected[i]], rel=1e-5)
        assert float(row["margin"]) == pytest.approx(truth.margin[i], rel=1e-3)
        assert int(row["n_support"]) == int(truth.support[i].sum())
        assert int(row["twin_selected"]) == int(truth.twin[i].argmax())
        assert float(row["twin_weight"]) == pytest.approx(truth.twin[i].max(), rel=1e-5)
        assert (row["same"] == "true") == (truth.twin[i].argmax() == truth.selected[i])


def test_agreement_with_the_twin(open_head: Opened) -> None:
    page, truth = open_head(), Truth("plain")
    same = truth.twin.argmax(-1) == truth.selected
    assert 0 < same.sum() < 24
    assert f"({same.sum()} of 24)" in page.get_by_text("Head and twin select the same").inner_text()
    marked = page.locator(".hd-tokens").first.locator(".hd-differs").evaluate_all("all => all.map((t) => t.dataset.i)")
    assert [int(t) for t in marked] == np.flatnonzero(~same).tolist()
    page.locator(".hd-tokens").first.locator(".hd-token").first.click()
    page.get_by_role("button", name="Next query that differs").click()
    assert page.locator(".hd-tokens").first.locator(".hd-query").get_attribute("data-i") == marked[marked[0] == "0"]
    assert "instead" in readout(page)


def test_words_sum_over_keys_and_average_over_queries(open_head: Opened) -> None:
    page, truth = open_head(), Truth("plain")
    words, specials = truth.queries["words"], truth.queries["special"]
    groups: list[list[int]] = []
    for at, word in enumerate(words):
        if groups and word >= 0 and words[groups[-1][-1]] == word:
            groups[-1].append(at)
        else:
            groups.append([at])
    assert any(len(group) > 1 for group in groups)
    merged = np.array([[truth.weights[np.ix_(rows, keys)].sum(1).mean() for keys in groups] for rows in groups])
    page.get_by_label("Whole words").check()
    rows = queries_csv(page)
    assert [int(row["query"]) for row in rows] == [group[0] for group in groups]
    assert [float(row["weight"]) for row in rows] == pytest.approx(merged.max(-1).tolist(), rel=1e-4)
    starts = {group[0]: i for i, group in enumerate(groups)}
    assert [starts[int(row["selected"])] for row in rows] == merged.argmax(-1).tolist()
    # Without the special tokens the rest of each query is scaled to sum to 1, before words are made.
    page.get_by_label("Hide special tokens").check()
    kept = [i for i, special in enumerate(specials) if not special]
    shares = np.zeros_like(truth.weights)
    shares[:, kept] = truth.weights[:, kept] / truth.weights[:, kept].sum(-1, keepdims=True)
    real = [group for group in groups if not specials[group[0]]]
    merged = np.array([[shares[np.ix_(rows, keys)].sum(1).mean() for keys in real] for rows in real])
    rows = queries_csv(page)
    assert [float(row["weight"]) for row in rows] == pytest.approx(merged.max(-1).tolist(), rel=1e-4)
    assert page.locator(".hd-tokens").first.locator(".hd-special").count() == 0


def test_choices_stay_from_head_to_head(open_head: Opened) -> None:
    page = open_head()
    page.get_by_label("Hide special tokens").check()
    page.locator(".hd-tokens").first.locator(".hd-token").nth(3).click()
    page.get_by_label("Colour scale").select_option("log")
    page.evaluate("location.hash = '#L0.H2'")
    page.get_by_role("heading", name="Head L0.H2").wait_for()
    eventually(page, lambda: "(4)" in readout(page))
    assert page.get_by_label("Hide special tokens").is_checked()
    assert page.get_by_label("Colour scale").input_value() == "log"


def test_another_shown_text(open_head: Opened) -> None:
    page, truth = open_head(), Truth("plain", shown=1)
    choice = page.get_by_label("Shown text")
    choice.focus()
    choice.select_option("1")
    first = truth.queries["tokens"][1].strip()
    eventually(page, lambda: page.locator(".hd-token[data-i='1']").first.inner_text() == first)
    assert choice.evaluate("box => box === document.activeElement")
    assert [int(row["selected"]) for row in queries_csv(page)] == truth.selected.tolist()


def test_margins_and_singular_values(open_head: Opened) -> None:
    page, truth = open_head(), Truth("plain")
    chart = page.locator(".hd-chart").first
    titles = chart.locator(".hd-bin title").all_text_contents()
    assert sum(int(re.search(r": (\d+) quer", title)[1]) for title in titles) == 24  # type: ignore[index]
    assert f"median {np.median(truth.margin):.3g}" in chart.locator(".hd-note").last.inner_text()
    spectrum = page.locator(".hd-chart").nth(1)
    assert spectrum.locator("polyline").count() == 3
    before = spectrum.locator("polyline").first.get_attribute("points")
    spectrum.get_by_role("button", name="Logarithmic").click()
    assert spectrum.locator("polyline").first.get_attribute("points") != before
    rows = csv_of(page, "Save the singular values as CSV")
    assert [float(row["own"]) for row in rows] == pytest.approx(truth.record["spectra"]["own"], rel=1e-5)
    root, _ = svg_of(page, "Save the chart “Singular values” as SVG")
    assert "score space, Frobenius norm" in [one.text for one in root.iter(SVG + "text")]


def test_tables_hold_the_record(open_head: Opened) -> None:
    page, truth = open_head(), Truth("plain")
    rows = {row["measure"]: row for row in csv_of(page, "Save the table “Values over the corpus” as CSV")}
    assert set(rows) == set(truth.record["values"])
    for key, value in truth.record["values"].items():
        for name in ("mean", "low", "high"):
            assert float(rows[key][name]) == pytest.approx(value[name], rel=1e-5)
    solutions = {row["property"]: row for row in csv_of(page, "Save the table “Max-margin solutions” as CSV")}
    for solution in truth.record["solutions"]:
        column = f"{solution['space']}.{solution['norm']}"
        for key in ("correlation", "heldout", "n_support", "gap", "null_correlation"):
            assert float(solutions[key][column]) == pytest.approx(solution[key], rel=1e-5)
        assert solutions["status"][column] == "optimal"
    tokens = csv_of(page, "Save the table “Tokens that it selects most” as CSV")
    assert [row["token"] for row in tokens] == [token for token, _ in truth.record["top_tokens"]]
    first = truth.result["measures"][0]["key"]
    shown = page.locator(".hd-table").first.locator("tbody tr").first.inner_text()
    assert f"{truth.record['values'][first]['mean']:.3g}" in shown


def test_values_that_are_not_known(open_head: Opened) -> None:
    page = open_head("t5")
    rows = page.locator(".hd-table").first.locator("tbody tr").all_inner_texts()
    assert any(row.startswith("Distance") and "–" in row for row in rows)


def test_cross_attention_asks_from_the_target(open_head: Opened) -> None:
    page = open_head("t5")
    module = next(one["index"] for one in Truth("t5").result["modules"] if one["kind"] == "cross")
    truth = Truth("t5", module=module)
    assert page.locator("[role=listbox] .hd-token").count() == 12
    assert page.locator("[role=list] .hd-token").count() == 2 * 20
    assert [int(row["selected"]) for row in queries_csv(page)] == truth.selected.tolist()
    page.locator("[role=listbox] .hd-token").nth(2).click()
    page.keyboard.press("ArrowRight")
    assert "(3) selects" in readout(page)
    assert page.locator("[role=list] .hd-selected").first.get_attribute("data-i") == str(truth.selected[3])
    i, j, weight = read_cell(page, 0.6, 0.6)
    assert weight == pytest.approx(truth.weights[i, j], abs=6e-4)


def test_patches_on_the_picture(open_head: Opened) -> None:
    page, truth = open_head("vit"), Truth("vit")
    picture = page.locator(".hd-picture").first
    assert picture.locator(".hd-patch").count() == 25
    picture.locator(".hd-patch").nth(7).click(force=True)
    assert "“r1c2” (8) selects" in readout(page)
    picture.focus()
    page.keyboard.press("ArrowDown")
    assert "“r2c2” (13) selects" in readout(page)
    shades = np.array(
        [
            float(v)
            for v in picture.locator(".hd-patch").evaluate_all("all => all.map((p) => p.getAttribute('fill-opacity'))")
        ]
    )
    expected = truth.weights[13, 1:]
    assert shades.argmin() == expected.argmax()
    assert (np.diff(shades[np.argsort(expected)]) <= 1e-3).all()
    page.locator(".hd-picture-box").first.locator(".hd-token").first.click()
    assert "“[CLS]” (0) selects" in readout(page)
    assert page.get_by_label("Whole words").is_disabled()


def test_head_without_twin_support_or_solutions(open_head: Opened) -> None:
    page = open_head("lone")
    assert page.locator(".hd-tokens").count() == 1
    assert page.locator(".hd-matrix:visible").count() == 1
    assert "No max-margin twin" in page.locator(".hd-note").all_inner_texts()[1]
    bare_page = open_head("bare")
    bare_page.locator(".hd-token[data-i='3']").first.click()
    assert "attends to nothing" in readout(bare_page)
    assert "no margin" in bare_page.locator(".hd-chart").first.inner_text()
    assert "No singular values" in bare_page.locator(".hd-chart").nth(1).inner_text()
    assert "No max-margin solution" in bare_page.locator("main").inner_text()
    assert queries_csv(bare_page)[3]["selected"] == ""
    assert "NaN" not in bare_page.locator("main").inner_text()


def test_hostile_tokens_are_text(open_head: Opened) -> None:
    page = open_head("hostile")
    texts = page.locator(".hd-tokens").first.locator(".hd-token bdi").all_text_contents()
    assert HOSTILE[0] in texts
    assert HOSTILE[1] in texts
    assert not any("\u202e" in text or "\u200b" in text for text in texts)
    page.locator(".hd-tokens").first.locator(".hd-token").nth(1).hover()
    assert HOSTILE[0][:40] in page.locator("#tooltip").inner_text()
    page.mouse.move(0, 0)
    page.locator("#tooltip").wait_for(state="hidden")
    page.get_by_label("Whole words").check()
    page.get_by_role("radio", name="Lines").check(force=True)
    svg_of(page, "Save the head as SVG")
    rows = queries_csv(page)
    assert any(row["query_token"] == "'" + HOSTILE[4] for row in rows)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, script:not([type]) ~ script:not([type])").count() == 0


def test_right_to_left_text_runs_to_the_left(open_head: Opened) -> None:
    page = open_head("arabic")
    box = page.locator(".hd-tokens").first
    assert box.get_attribute("dir") == "rtl"
    box.locator(".hd-token").nth(3).click()
    page.keyboard.press("ArrowLeft")
    assert box.locator(".hd-query").get_attribute("data-i") == "4"
    edges = box.locator(".hd-token").evaluate_all("all => all.slice(1, 4).map((t) => t.getBoundingClientRect().left)")
    assert edges == sorted(edges, reverse=True)


@pytest.mark.parametrize("name", ["plain", "hostile", "t5", "vit"])
@pytest.mark.parametrize("width", [1280, 400])
def test_fits_the_window(open_head: Opened, name: str, width: int) -> None:
    page = open_head(name, width=width)
    for view in ("Lines", "Matrix"):
        page.get_by_role("radio", name=view).check(force=True)
        page.wait_for_timeout(60)
        wide = page.evaluate(
            "[document.documentElement.scrollWidth, ...[...document.querySelectorAll('main .hd-part *, .hd-title *')]"
            ".filter((one) => !one.closest('.wide, .hd-lines, svg'))"
            ".map((one) => one.getBoundingClientRect().right)]"
        )
        assert max(wide) <= width + 0.5


def test_every_control_has_a_name(open_head: Opened) -> None:
    for name in ("plain", "vit", "t5"):
        page = open_head(name)
        unnamed = page.evaluate(
            "[...document.querySelectorAll(['button', 'select', 'input', 'canvas', '[tabindex=\"0\"]', '[role]']"
            ".map((one) => `main ${one}`).join())].filter((one) => !(one.ariaLabel || one.textContent.trim()"
            " || one.getAttribute('aria-labelledby') || one.labels?.length))"
            ".map((one) => one.outerHTML.slice(0, 90))"
        )
        assert unnamed == []
        assert page.locator("[id]").evaluate_all("all => all.map((one) => one.id)") == list(
            dict.fromkeys(page.locator("[id]").evaluate_all("all => all.map((one) => one.id)"))
        )


def test_strongest_keys_are_found_in_the_text(open_head: Opened) -> None:
    page, truth = open_head("long"), Truth("long")
    i = int(page.locator(".hd-tokens").first.locator(".hd-query").get_attribute("data-i"))
    names = page.locator(".hd-top").first.locator("button")
    positions = [int(re.search(r" (\d+)", text)[1]) for text in names.locator("small").all_text_contents()]  # type: ignore[index]
    assert positions == np.argsort(-truth.weights[i], kind="stable")[:5].tolist()
    far = max(positions, key=lambda at: abs(at - i))
    names.nth(positions.index(far)).click()
    found = page.locator(".hd-tokens").first.locator(".hd-found")
    assert found.get_attribute("data-i") == str(far)
    top, bottom = page.locator(".hd-tokens").first.evaluate(
        "(box, at) => { const one = box.children[at].getBoundingClientRect(), all = box.getBoundingClientRect();"
        " return [one.top - all.top, all.bottom - one.bottom]; }",
        far,
    )
    assert min(top, bottom) >= 0


def test_two_runs_share_the_query(browser: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_atlas(tmp_path / name, n_tokens=24, seed=seed, stacks=(("encoder", 1, 2),), name=name)
    render_comparison(tmp_path / "a", tmp_path / "b", tmp_path / "both.html")
    page = browser.new_page()
    page.goto((tmp_path / "both.html").as_uri() + "#L0.H1")
    page.locator(".hd-readout", has_text="Query").nth(1).wait_for()
    page.locator(".hd-tokens").first.locator(".hd-token").nth(7).click()
    assert "(7) selects" in page.locator(".head-page").nth(1).locator(".hd-readout").first.inner_text()
    own, other = (
        make_atlas(n_tokens=24, seed=s, stacks=(("encoder", 1, 2),))[1]["shown.0.0.selected"][1] for s in (0, 1)
    )
    said = f"The two heads select the same for {(own == other).sum()} of 24 queries."
    eventually(page, lambda: page.get_by_text(said).count() == 2)
    page.close()
