"""The recipes on attention that keeps several tokens, with the published numbers of trials."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attsvm.experiments.recipes import Case, Number, Recipe, Record, find_recipe

pytestmark = pytest.mark.slow


def trials_of(recipe: Recipe, case: Case) -> list[Record]:
    """All trials of a case, or as many as it takes to accept the published number."""
    wanted, found, accepted = case.trials or recipe.trials, [], 0
    for seed, record in _each(recipe, case):
        found.append({"case": case.name, "trial": seed, **record})
        accepted += bool(record.get("accepted", True)) if recipe.scan else 1
        if accepted == wanted:
            break
    assert accepted == wanted
    return found


def _each(recipe: Recipe, case: Case) -> Iterator[tuple[int, Record]]:
    first = recipe.first_seed
    count = recipe.scan or case.trials or recipe.trials
    for begin in range(first, first + count, recipe.chunk):
        seeds = range(begin, min(begin + recipe.chunk, first + count))
        yield from zip(seeds, recipe.run(case, seeds), strict=True)


def numbers_of(recipe: Recipe, cases: list[Case]) -> dict[str, Number]:
    records = [record for case in cases for record in trials_of(recipe, case)]
    return {number.text: number for number in recipe.summarize(records).numbers}


@pytest.mark.parametrize("d", [4, 6, 8, 10])
def test_figure_7(d: int) -> None:
    """1 - correlation of the three predictors within 20 % of 2308.16898, in order; W_fin orthogonal to W_mm."""
    recipe = find_recipe("tfsvm-fig7")
    numbers = numbers_of(recipe, [case for case in recipe.cases if case.name == f"d={d}"])
    assert len(numbers) >= 8
    for name in ("W^fin + C W^mm", "W^1token"):
        number = numbers[f"d={d}: 1 - correlation with {name}, step 2000, mean"]
        assert number.ours == pytest.approx(number.published, rel=0.2)
    # Two of 500 runs at d = 10, with W^mm nearly orthogonal to W, make up a third of that mean.
    missed = ["d=10: 1 - correlation with W^mm, step 2000, mean"] if d == 10 else []
    assert [number.text for number in numbers.values() if number.verdict != "met"] == missed


def test_figure_6() -> None:
    """One sequence: s is the simplex projection of gamma / (2 lambda) to 2e-3, counts match in at least 92 %."""
    recipe = find_recipe("tfsvm-fig6")
    numbers = numbers_of(recipe, list(recipe.cases))
    assert len(numbers) >= 35
    assert [number.text for number in numbers.values() if number.verdict != "met"] == []


@pytest.mark.parametrize("name, low, high", [("ntp-global", 0.9854, 0.9864), ("ntp-local", 0.9965, 0.9995)])
def test_next_token_prediction(name: str, low: float, high: float) -> None:
    """Mean correlation .986 with the Graph-SVM, .998 with the SVM of the tokens that are kept (2403.08081)."""
    recipe = find_recipe(name)
    numbers = list(numbers_of(recipe, list(recipe.cases)).values())
    assert numbers[0].ours is not None
    assert low <= numbers[0].ours <= high
    assert [number.text for number in numbers if number.verdict == "differs"] == []
