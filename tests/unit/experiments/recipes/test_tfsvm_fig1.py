from __future__ import annotations

import pytest

from attsvm.experiments.recipes.planar import CASES
from attsvm.experiments.recipes.tfsvm_fig1 import RECIPE, draw_data

from .trials import check_page, number, run_cases


def test_every_number_is_met() -> None:
    summary = check_page(RECIPE, run_cases(RECIPE, 1))
    assert len(summary.numbers) == 35
    assert {one.text: one.ours for one in summary.numbers if one.verdict != "met"} == {}


def test_another_seed_is_not_compared() -> None:
    records = [{"case": case.name, "trial": 5, **RECIPE.run(case, [5])[0]} for case in CASES]
    summary = check_page(RECIPE, records)
    assert {one.verdict for one in summary.numbers} == {"not published"}
    assert number(summary, "corr. of W^mm and W^mm_*").ours != pytest.approx(0.93624, abs=1e-3)


def test_optimal_tokens_are_set() -> None:
    draws = draw_data(3)
    assert draws.tokens[0, :, 0].tolist() == [[1.0, 0.5], [1.0, -0.5]]
    assert draws.optimal.tolist() == [[0, 0]]
