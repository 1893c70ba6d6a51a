from __future__ import annotations

from attsvm.experiments.recipes.tfsvm_fig4 import RECIPE

from .trials import check_page, number, run_cases, same_alone

QUICK = [case for case in RECIPE.cases if case.values["T"] == 4 and case.values["d"] in (2, 10)]


def test_thirty_trials_of_four_cases() -> None:
    records = run_cases(RECIPE, 30, QUICK)
    summary = check_page(RECIPE, records)
    assert all(record["local"] or not record["optimal"] for record in records)
    assert all(record["feasible"] for record in records)
    for part in ("global: share of runs, n=2, T=4, d=10", "all support: share of runs, n=2, T=4, d=10"):
        assert number(summary, part).verdict == "met"


def test_a_trial_is_the_same_alone() -> None:
    for case in QUICK[:1] + QUICK[-1:]:
        same_alone(RECIPE, case, range(5))
