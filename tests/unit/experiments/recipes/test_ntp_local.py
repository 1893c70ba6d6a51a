"""Next-token prediction with the squared loss: the first data sets of the published stream."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure

from attsvm.experiments.recipes.ntp_local import GLOBAL, LOCAL, RECIPE, STEPS


def test_runs_go_where_the_published_ones_go() -> None:
    """The same selections: a run that is not frozen at the end agrees to four digits, the others come closer."""
    *found, beyond = RECIPE.run(RECIPE.cases[0], [0, 1, 2, 101])
    # A trial is the same in any chunk.
    alone = RECIPE.run(RECIPE.cases[0], [101])[0]
    assert len(alone["local"]) == len(STEPS)
    assert beyond["local"] == pytest.approx(alone["local"], abs=1e-10)
    assert found[1]["local"][-1] == pytest.approx(LOCAL[1], abs=2e-4)
    assert found[1]["global"][-1] == pytest.approx(GLOBAL[1], abs=2e-4)
    for record, local, other in zip(found, LOCAL, GLOBAL, strict=False):
        assert local - 2e-4 <= record["local"][-1] <= 1.0
        assert record["global"][-1] == pytest.approx(other, abs=0.02)
        assert not record["ambiguous"]
        assert 6 <= record["kept"] <= 8
    records = [{"case": RECIPE.cases[0].name, "trial": trial, **record} for trial, record in enumerate(found)]
    records = json.loads(json.dumps(records, allow_nan=False))
    summary = RECIPE.summarize(records)
    assert summary.numbers[2].verdict == "met"
    assert [row[0] for row in summary.tables[0].rows] == [0, 1, 2]
    figure = Figure()
    RECIPE.draw(figure, records)
    assert len(figure.axes) == 2
    RECIPE.summarize([])
