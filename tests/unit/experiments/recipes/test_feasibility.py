from __future__ import annotations

import pytest

from attsvm.experiments.recipes.feasibility import RECIPE

from .trials import check_page, run_cases, same_alone


def test_twenty_trials() -> None:
    records = run_cases(RECIPE, 20)
    summary = check_page(RECIPE, records)
    assert {one.text: one.ours for one in summary.numbers if one.verdict != "met"} == {}
    promised = [one for one in summary.numbers if one.source == "feasibility theorem"]
    assert len(promised) == 18
    assert {one.ours for one in promised} == {1.0}


@pytest.mark.parametrize("kind", ["cross", "self", "causal", "full", "every self"])
def test_a_trial_is_the_same_alone(kind: str) -> None:
    case = next(case for case in RECIPE.cases if case.values["attention"] == kind)
    same_alone(RECIPE, case, range(3))
