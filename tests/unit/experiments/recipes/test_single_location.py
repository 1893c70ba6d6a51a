from __future__ import annotations

import dataclasses

import pytest

from attsvm.experiments.recipes import Case
from attsvm.experiments.recipes.single_location import CASES, CHECK, NAMES, RECIPE, THEORY

from .trials import check_page, number, run_cases, same_alone


def shorter(case: Case, steps: int) -> Case:
    return dataclasses.replace(case, values={**case.values, "steps": min(steps, case.values.get("steps", 0))})


def test_settings_are_the_published_ones() -> None:
    """arXiv:2410.01537, official code: five settings, 30 repetitions."""
    assert RECIPE.trials == 30
    runs = {case.name[1]: case.values for case in CASES[:5]}
    assert [runs[key]["d"] for key in "abcde"] == [400, 400, 400, 400, 80]
    assert [runs[key]["sharpness"] for key in "abcde"] == [0.1, 0.9, 0.1, 1.0, 2.0]
    assert [runs[key]["rate"] for key in "abcde"] == [4e-3, 1e-3, 4e-3, 4e-3, 1e-3]
    assert [runs[key]["steps"] for key in "abcde"] == [20_000, 120_000, 20_000, 120_000, 200_000]
    assert [runs[key]["decay"] for key in "abcde"] == [0.0, 0.0, 0.0, 1e-4, 1e-4]
    assert {values["L"] for values in runs.values()} == {10}
    assert (runs["e"]["batch"], runs["e"]["noise"]) == (5, 0.1)


def test_page_of_two_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attsvm.experiments.recipes.single_location.SAMPLES", 50_000)
    records = run_cases(RECIPE, 2, [CASES[0], *(shorter(case, 2_000) for case in CASES[1:])])
    summary = check_page(RECIPE, records)
    for part in ("(a) on M, λ=0.1: smallest |kappa|", "(a) on M, λ=0.1: smallest |nu|", "distance to M", "d=8, L=4"):
        assert number(summary, part).verdict == "met"
    for part in ("largest difference in standard errors", "d=10^10", "best linear predictor, any d"):
        assert number(summary, part).verdict == "met"
    # 2,000 of 200,000 steps of SGD are not enough, and the page says so.
    assert number(summary, "(e) SGD, falling λ: smallest |kappa|").verdict == "differs"
    assert number(summary, "(c) spheres, λ=0.1: share").verdict == "not published"
    assert len(summary.tables[0].rows) == 5


def test_runs_with_swapped_roles_are_told_from_aligned_ones() -> None:
    """With lambda=0.1 some starts end at k = ±v*; their risk is nearly that of the aligned runs."""
    records = run_cases(RECIPE, 6, [CASES[2]])
    row = RECIPE.summarize(records).tables[0].rows[0]
    aligned, swapped = row[2], row[3]
    assert isinstance(aligned, int)
    assert isinstance(swapped, int)
    assert aligned + swapped == 6
    assert aligned > 0
    assert swapped > 0
    assert max(one["risk"][-1] for one in records) < 0.25 * records[0]["linear"]


def test_a_trial_is_the_same_alone() -> None:
    for case in CASES[:5]:
        same_alone(RECIPE, shorter(case, 200), range(3))
    assert {case.name for case in CASES} == {*NAMES.values(), CHECK, THEORY}
