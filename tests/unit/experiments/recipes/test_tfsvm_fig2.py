from __future__ import annotations

from attsvm.experiments.recipes.tfsvm_fig2 import RECIPE, draw_data

from .trials import check_page, number, run_cases


def test_each_parameterisation_goes_to_its_own_solution() -> None:
    summary = check_page(RECIPE, run_cases(RECIPE, 1))
    for which, own, other in (("W", "Frobenius", "nuclear"), ("KQ", "nuclear", "Frobenius")):
        near = number(summary, f"training {which}: corr. with the {own}").ours
        far = number(summary, f"training {which}: corr. with the {other}").ours
        assert near is not None
        assert far is not None
        assert near > 0.999
        assert far < 0.92
    assert {one.verdict for one in summary.numbers} == {"not published"}


def test_sequences_lie_on_two_sides() -> None:
    draws = draw_data(1)
    assert draws.tokens.shape == (1, 2, 3, 2)
    assert bool((draws.tokens[0, 0, :, 0] < draws.tokens[0, 1, :, 0]).all())
