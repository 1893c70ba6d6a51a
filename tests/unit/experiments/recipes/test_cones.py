from __future__ import annotations

from attsvm.experiments.recipes.cones import RECIPE

from .trials import check_page, number, run_cases, same_alone

CONES, FIRST, ZERO = RECIPE.cases[:2], RECIPE.cases[2:4], RECIPE.cases[4:]


def test_cones_of_forty_trials() -> None:
    records = run_cases(RECIPE, 40, CONES)
    summary = check_page(RECIPE, records)
    assert any(record["local"] for record in records)
    for R in (10, 30):
        shown = {one.text: one for one in summary.numbers if one.text.endswith(f"R0={R}")}
        assert shown[f"locally optimal: share that stays, R0={R}"].ours == 1.0
        assert shown[f"not locally optimal: share that stays, R0={R}"].ours == 0.0
    assert all(record["stays"] for record in records if record["local"])
    assert min(record["final"] for record in records if record["local"]) > 0.99


def test_first_step_of_thirty_trials() -> None:
    records = run_cases(RECIPE, 30, FIRST[:1])
    summary = check_page(RECIPE, records)
    good = [record for record in records if record["separates"]]
    assert 2 <= len(good) <= 12
    assert all(record["iota"] > 0 for record in good)
    for R in (5, 20, 50, 100):
        text = f"first step R={R}, n=4, T=6, d=8: share that ends at the optimal tokens"
        assert number(summary, text).ours == 1.0
    assert all("global 5" not in record for record in records if not record["separates"])


def test_from_zero_of_twenty_trials() -> None:
    records = run_cases(RECIPE, 20, ZERO[:1])
    summary = check_page(RECIPE, records)
    shown = [one for one in summary.numbers if one.text.startswith("from 0, n=4, T=6, d=4:")]
    assert [one.verdict for one in shown] == ["met"] * 3
    assert shown[1].ours == sum(record["global"] for record in records) / 20


def test_a_trial_is_the_same_alone() -> None:
    for case in (CONES[0], FIRST[0], ZERO[0]):
        same_alone(RECIPE, case, range(5))
