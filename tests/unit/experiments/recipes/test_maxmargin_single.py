from __future__ import annotations

import pytest

from attsvm.experiments.recipes.maxmargin_single import RECIPE

from .trials import check_page, run_cases


def test_published_starts() -> None:
    records = run_cases(RECIPE, 2)
    summary = check_page(RECIPE, records)
    assert [n.text for n in summary.numbers if n.verdict == "differs"] == []
    assert records[0]["half"] == pytest.approx([0.5 / 1.01, 0.5], abs=1e-9)
    # From (0, y): below y = -0.5 the second best token wins, but only where the third is worse than it.
    assert records[0]["selected"] == [0] * 6
    local = next(r for r in records if r["case"] == "local")
    assert local["selected"] == [0, 0, 0, 0, 1, 1]


def test_plain_float32_stands_still() -> None:
    local = run_cases(RECIPE, 1, RECIPE.cases[1:])[0]
    for rounded, exact in zip(local["float32"][4:], local["shown"][4:], strict=True):
        assert rounded[0] < 17.0 < 19.5 < exact[0]


def test_other_trials_draw_their_starts() -> None:
    first, second = (r["starts"] for r in run_cases(RECIPE, 3, RECIPE.cases[:1])[1:])
    assert first != second
    assert RECIPE.run(RECIPE.cases[0], [2])[0]["starts"] == second
