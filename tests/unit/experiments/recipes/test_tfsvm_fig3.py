from __future__ import annotations

from attsvm.experiments.recipes.tfsvm_fig3 import RECIPE

from .trials import check_page, number, run_cases, same_alone

QUICK = [case for case in RECIPE.cases if case.values["n"] == 10 and case.values["d"] in (2, 4, 10)]


def test_twenty_trials_of_three_cases() -> None:
    records = run_cases(RECIPE, 20, QUICK)
    summary = check_page(RECIPE, records)
    nuclear = number(summary, "mean rank of W^mm_*, n=10, T=5, d=10,")
    assert nuclear.verdict == "met"
    assert nuclear.published == 9.1
    for part in ("W^mm outside", "W^mm_* outside", "||W^mm||_F^2", "||W^mm_*||_*"):
        assert number(summary, part).verdict == "met"
    for record in records:
        if record["feasible"]:
            assert record["rank_nuc"] <= record["rank_fro"] <= 10


def test_infeasible_problems_count_as_one_only_in_the_artefact() -> None:
    records = [{"case": QUICK[0].name, "trial": 0, "feasible": False}]
    records.append({**run_cases(RECIPE, 1, QUICK[2:])[0], "case": QUICK[0].name, "trial": 1})
    row = next(row for row in RECIPE.summarize(records).tables[0].rows if row[:3] == [10, 5, 2])
    assert row[3:6] == [0.5, 10.0, 5.5]


def test_a_trial_is_the_same_alone() -> None:
    same_alone(RECIPE, QUICK[1], range(4))
