"""The recipe of the regularisation paths, with few trials and steps."""

from __future__ import annotations

import pytest

from attsvm.experiments.recipes import regpath
from attsvm.experiments.recipes.regpath import LOCAL, RECIPE

from .trials import check_page, number, run_cases, same_alone


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regpath, "STEPS", 300)
    monkeypatch.setattr(regpath, "STARTS", 3)


def test_the_path_of_w_and_of_keys_and_queries() -> None:
    records = run_cases(RECIPE, 2, RECIPE.cases[:2])
    summary = check_page(RECIPE, records)
    for part in (
        "W, seed 0, R = 40",
        "W, seed 0, R = 320",
        "KQ, seed 0, R = 80",
        "W, R = 640",
        "distance of the nuclear",
    ):
        assert number(summary, part).verdict == "met", part
    assert number(summary, "W, exponential").verdict == "differs"  # it was not run


def test_the_local_path() -> None:
    case = next(case for case in RECIPE.cases if case.name in LOCAL)
    records = run_cases(RECIPE, 8, [case])
    accepted = [record for record in records if record["accepted"]]
    assert 1 <= len(accepted) < 8
    summary = check_page(RECIPE, records)
    assert number(summary, "W, local, R = 320").verdict == "met"
    assert number(summary, "W, local: share").ours == 1.0


def test_a_trial_is_the_same_alone() -> None:
    same_alone(RECIPE, RECIPE.cases[1], [0, 1])
