from __future__ import annotations

import dataclasses

from attsvm.experiments.recipes import Case
from attsvm.experiments.recipes.depth import CASES, RECIPE

from .trials import check_page, number, run_cases, same_alone


def shorter(case: Case, steps: int) -> Case:
    return dataclasses.replace(case, values={**case.values, "steps": steps})


def test_cases_are_all_variants() -> None:
    kinds = [(one.values["depth"], one.values["residual"], bool(one.values["mlp"])) for one in CASES]
    expected = [(depth, residual, mlp) for depth in (2, 4) for mlp in (False, True) for residual in (0, 1)]
    assert kinds == [(1, 0, False), *expected]


def test_layers_of_four_trials() -> None:
    records = run_cases(RECIPE, 4, [CASES[0], CASES[2]])
    summary = check_page(RECIPE, records)
    assert number(summary, "1 layer: correlation").verdict == "met"
    smallest = number(summary, "2 layers, residual: smallest").ours
    assert smallest is not None
    assert smallest > 0.9
    assert number(summary, "4 layers, plain").ours is None
    # The SVM of all queries asks for more than training has a reason to make.
    for one in records[4:]:
        assert one["all"][0] < one["used"][0]
        assert max(abs(value) for value in one["used_null"]) < min(one["used"])
        assert one["used_status"] == ["optimal", "optimal"]


def test_layers_that_have_nothing_left_to_select_are_counted() -> None:
    """Four layers without residuals: the tokens of the last one become copies of each other."""
    records = run_cases(RECIPE, 3, [CASES[7]])
    check_page(RECIPE, records)
    assert [one["used_status"][3] for one in records] == ["empty"] * 3
    assert [one["used"][3] for one in records] == [None] * 3
    rows = RECIPE.summarize(records).tables[1].rows
    assert [row[4] for row in rows if row[0] == CASES[7].name][3] == 3


def test_a_trial_is_the_same_alone() -> None:
    for case in (CASES[1], CASES[8]):
        same_alone(RECIPE, shorter(case, 60), range(3))
