"""The numbers of 2306.13596: max-margin prompt vectors, and the paths of its four figures."""

from __future__ import annotations

import json

import pytest

from attsvm.experiments.recipes import find_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["maxmargin-single", "maxmargin-multi", "maxmargin-loss", "maxmargin-joint"])
def test_every_number_is_met(name: str) -> None:
    recipe = find_recipe(name)
    records = [{"case": case.name, "trial": 0, **recipe.run(case, [0])[0]} for case in recipe.cases]
    summary = recipe.summarize(json.loads(json.dumps(records).replace("NaN", "null")))
    assert [(n.text, n.ours) for n in summary.numbers if n.verdict == "differs"] == []
    assert sum(n.verdict == "met" for n in summary.numbers) >= 8


def test_values_of_the_four_problems() -> None:
    single, multi, joint = (
        find_recipe(name).run(find_recipe(name).cases[0], [0])[0]
        for name in ("maxmargin-single", "maxmargin-multi", "maxmargin-joint")
    )
    assert single["half"] == pytest.approx([0.49505, 0.5], abs=5e-6)
    assert multi["half_with_score"] == pytest.approx(0.31319, abs=5e-6)
    x, y = joint["solutions"]["tight"]
    assert (x * x + y * y) / 2 == pytest.approx(0.94444, abs=5e-6)
    assert (x, y) == pytest.approx((4 / 3, 1 / 3), abs=1e-6)
