"""Next-token prediction with the log-loss: the first data sets of the published stream."""

from __future__ import annotations

import json

import pytest
import torch
from matplotlib.figure import Figure

from attsvm.experiments.recipes.next_token import draw_corpora
from attsvm.experiments.recipes.ntp_global import PUBLISHED, RECIPE, STEPS


def test_data_sets_are_those_of_the_published_notebooks() -> None:
    """Ids and labels as the notebooks print them: the first of both, the second of each."""
    first = [[1, 2, 5, 4], [5, 0, 1, 2], [4, 5, 3, 1], [3, 5, 0, 2], [3, 1, 0, 4], [5, 1, 3, 0]]
    on_global, on_local = draw_corpora([0, 1], unused_layers=1), draw_corpora([1], unused_layers=2)
    assert on_global.ids[0].tolist() == first
    assert on_global.labels.tolist() == [[1, 5, 5, 0, 1, 3], [5, 0, 4, 4, 0, 3]]
    assert on_local.labels[0].tolist() == [3, 0, 5, 2, 2, 4]
    assert float(on_global.init[0].var()) == pytest.approx(0.0415, abs=5e-5)


def test_every_data_set_is_what_the_theory_asks_for() -> None:
    """Distinct ids, a label of the sequence, a cycle; the same data in any company, and beyond the stream."""
    seeds = [3, 0, 250, 17]
    data = draw_corpora(seeds, unused_layers=1)
    assert (data.ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert (data.hits.sum(-1) == 1).all()
    torch.testing.assert_close(data.embeddings.norm(dim=-1), torch.ones(4, 6).double())
    assert not any(data.graph(b).is_acyclic for b in range(4))
    for place, seed in enumerate(seeds):
        alone = draw_corpora([seed], unused_layers=1)
        assert torch.equal(alone.ids[0], data.ids[place])
        assert torch.equal(alone.init[0], data.init[place])
    together = data.together()
    assert torch.equal(together, together.mT)
    assert together.diagonal(dim1=-2, dim2=-1).all()
    assert (data.with_label().sum(-1) > 1).any()


def test_runs_are_the_published_ones() -> None:
    """The correlations that the notebook prints, run by run, to its five digits or nearly so."""
    found = RECIPE.run(RECIPE.cases[0], [0, 1, 2])
    for record, published in zip(found, PUBLISHED, strict=False):
        assert record["correlation"][-1] == pytest.approx(published, abs=3e-5)
        assert 0.0 <= record["predicted"] - record["correlation"][-1] < 6e-4
        # Half a step is as close as steps of fixed length come.
        assert record["distance"] < 0.0075
        assert record["own"] > 0.99
        assert len(record["correlation"]) == len(record["drift"]) == len(record["component"]) == len(STEPS)
    records = [{"case": RECIPE.cases[0].name, "trial": trial, **record} for trial, record in enumerate(found)]
    records = json.loads(json.dumps(records, allow_nan=False))
    summary = RECIPE.summarize(records)
    assert {number.text: number.verdict for number in summary.numbers}[
        f"probability of the component of the label, step {STEPS[-1]}"
    ] == "met"
    assert len(summary.tables[0].rows) == 3
    figure = Figure()
    RECIPE.draw(figure, records)
    assert len(figure.axes) == 3
    RECIPE.summarize([])
