from __future__ import annotations

import pytest

from attsvm.experiments.recipes.maxmargin_joint import RECIPE, draw_tokens, solutions

from .trials import check_page, run_cases


def test_published_start_and_another() -> None:
    summary = check_page(RECIPE, run_cases(RECIPE, 2))
    assert [n.text for n in summary.numbers if n.verdict == "differs"] == []


def test_solutions() -> None:
    tight, relaxed = solutions(draw_tokens(1.0)), solutions(draw_tokens(1.5))
    assert tight["tight"] == pytest.approx([4 / 3, 1 / 3], abs=1e-6)
    assert tight["relaxed"] == pytest.approx(tight["tight"], abs=1e-6)  # all three are support vectors of v
    assert tight["v"] == pytest.approx([0.0, 1.0], abs=1e-6)
    assert relaxed["tight"] == pytest.approx([1.25, 0.25], abs=1e-6)
    assert relaxed["relaxed"] == pytest.approx([1.0, 0.0], abs=1e-6)
