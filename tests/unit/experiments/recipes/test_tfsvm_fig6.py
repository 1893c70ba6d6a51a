"""Figure 6 of 2308.16898 with few trials."""

from __future__ import annotations

import json
import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from attsvm.experiments.recipes.recipe import Record
from attsvm.experiments.recipes.tfsvm_fig6 import RECIPE, project_to_simplex

CASES = {case.name: case for case in RECIPE.cases}


def records_of(name: str, seeds: range) -> list[Record]:
    found = RECIPE.run(CASES[name], seeds)
    return [{"case": name, "trial": seed, **one} for seed, one in zip(seeds, found, strict=True)]


def test_projection_is_the_nearest_distribution(generator: torch.Generator) -> None:
    """y - p is one number where p > 0, and smaller elsewhere: the conditions of the nearest point of the simplex."""
    y = 3.0 * torch.randn(200, 7, generator=generator, dtype=torch.float64)
    p = project_to_simplex(y)
    torch.testing.assert_close(p.sum(-1), torch.ones(200).double())
    assert (p >= 0).all()
    level = (y - p).masked_fill(p <= 0, math.inf).amin(-1, keepdim=True)
    assert ((y - p - level).abs()[p > 0] < 1e-12).all()
    assert ((y - level)[p <= 0] < 1e-12).all()
    torch.testing.assert_close(project_to_simplex(torch.tensor([0.2, 0.3, 0.5])), torch.tensor([0.2, 0.3, 0.5]))


@pytest.mark.parametrize("penalty, count", [(0.01, 1.1), (0.2, 2.6), (1.0, 6.4)])
def test_attention_is_the_projection_of_the_scores(penalty: float, count: float) -> None:
    """One sequence: as many tokens as the projection, and the same probabilities."""
    records = records_of(f"n=1, lambda={penalty}", range(8))
    error = torch.tensor([record["error"] for record in records])
    assert float(error.median()) < 2e-3
    same = [record["tokens"] == record["projection"] for record in records]
    assert sum(same) >= 6
    assert sum(record["tokens"] for record in records) / 8 == pytest.approx(count, abs=0.6)


def test_three_predictors_are_in_order_and_a_summary_is_drawn() -> None:
    """A round through JSON loses nothing that the summary needs; cases without records are left out."""
    name = "n=3, lambda=0.05"
    records = json.loads(json.dumps(records_of(name, range(24)), allow_nan=False))
    kept = [record for record in records if record["accepted"]]
    assert 6 <= len(kept) < 24
    assert {record["reason"] for record in records if not record["accepted"]} <= {"unsettled", "nothing masked"}
    last = {field: torch.tensor([record[field][-1] for record in kept]) for field in ("equivalent", "direction", "one")}
    assert (last["equivalent"] <= last["direction"] + 1e-12).all()
    assert float(last["direction"].mean()) < float(last["one"].mean())
    assert float(last["equivalent"].mean()) < 0.01
    summary = RECIPE.summarize(records)
    assert all(number.text.startswith("n=3, lambda=0.05") for number in summary.numbers)
    assert all(number.verdict == "met" for number in summary.numbers)
    figure = Figure()
    RECIPE.draw(figure, records)
    assert len(figure.axes) == 3


def test_a_trial_is_the_same_in_any_chunk() -> None:
    """Alone and together."""
    name = "n=3, lambda=0.05"
    together, alone = records_of(name, range(4)), [records_of(name, range(seed, seed + 1))[0] for seed in range(4)]
    for one, other in zip(together, alone, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, list):
                torch.testing.assert_close(torch.tensor(value), torch.tensor(other[key]), rtol=0.0, atol=1e-10)


def test_nothing_at_all_gives_an_empty_summary() -> None:
    """No record: no number, no error, and a figure."""
    assert RECIPE.summarize([]).numbers == []
    figure = Figure()
    RECIPE.draw(figure, [])


def test_more_tokens_with_a_larger_penalty() -> None:
    """The projection of the same scores keeps more."""
    scores: Tensor = torch.linspace(-0.5, 0.5, 10).double()
    counts = [int((project_to_simplex(scores / (2 * penalty)) > 0).sum()) for penalty in (0.01, 0.1, 0.5, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] > 4
