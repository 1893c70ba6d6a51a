"""Figure 7 of 2308.16898 with few trials."""

from __future__ import annotations

import json

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from attsvm.experiments.recipes.draws import draw_layer_init
from attsvm.experiments.recipes.recipe import Record
from attsvm.experiments.recipes.relu_descent import EPSILON, ReLUData, draw_relu_data, published_descent
from attsvm.experiments.recipes.tfsvm_fig7 import NO_NEGATIVE, RECIPE, STEPS

CASES = {case.name: case for case in RECIPE.cases}


def records_of(name: str, seeds: range) -> list[Record]:
    found = RECIPE.run(CASES[name], seeds)
    return [{"case": name, "trial": seed, **one} for seed, one in zip(seeds, found, strict=True)]


def plain_descent(data: ReLUData, W: Tensor, steps: int) -> Tensor:
    """The published step by autograd."""
    W = W.clone().requires_grad_()
    for _ in range(steps):
        s = torch.einsum("bitd,bde,bie->bit", data.tokens, W, data.queries).softmax(-1)
        hidden = torch.einsum("bit,bitd,bde->bie", s, data.tokens, data.V)
        loss = torch.nn.functional.softplus(-data.labels * hidden.relu().sum(-1)).mean(-1)
        (slope,) = torch.autograd.grad(loss.sum(), W)
        change = 0.1 * slope / (slope.norm(dim=(-2, -1), keepdim=True) + EPSILON)
        W = (W - change).detach().requires_grad_()
    return W.detach()


def test_data_are_drawn_in_the_published_order() -> None:
    """V, tokens, labels, queries from the generator of the seed; in float32, then float64."""
    data = draw_relu_data([5], n=3, T=4, d=6)
    generator = torch.Generator().manual_seed(5)
    V, X = torch.randn(6, 6, generator=generator), torch.randn(3, 4, 6, generator=generator)
    Y, Z = torch.randn(3, generator=generator), torch.randn(3, 6, generator=generator)
    torch.testing.assert_close(data.V[0].float(), V / V.norm())
    torch.testing.assert_close(data.tokens[0].float(), X / X.norm(dim=-1, keepdim=True))
    assert data.labels[0].tolist() == [1.0 if y > 0 else -1.0 for y in Y]
    torch.testing.assert_close(data.queries[0].float(), Z / Z.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("d", [4, 10])
def test_compiled_steps_are_those_of_autograd(d: int) -> None:
    """The same path to 1e-9 over 150 steps, and attention that belongs to the last matrix."""
    data, start = draw_relu_data(range(1, 9), n=3, T=4, d=d), draw_layer_init(range(1, 9), d=d, count=1)[0]
    path, attention = published_descent(data, start, steps=150, record_every=50)
    torch.testing.assert_close(path[:, 0], start)
    for record, steps in enumerate((50, 100, 150), 1):
        torch.testing.assert_close(path[:, record], plain_descent(data, start, steps), rtol=0.0, atol=1e-9)
    logits = torch.einsum("bitd,bde,bie->bit", data.tokens, path[:, -1], data.queries)
    torch.testing.assert_close(attention, logits.softmax(-1))


def test_runs_that_count_are_those_of_the_thresholds() -> None:
    """Every seed has a record, and a seed without a negative label is not trained."""
    seeds = range(1, 81)
    records = records_of("d=4", seeds)
    labels = draw_relu_data(seeds, n=3, T=4, d=4).labels
    for record, own in zip(records, labels, strict=True):
        assert (record.get("reason") == NO_NEGATIVE) == bool((own > 0).all())
        if record["accepted"]:
            assert len(record["equivalent"]) == len(STEPS)
            assert 0.0 <= record["masked"] <= 1e-6
            assert record["cosine"] < 1e-8
            assert 1.0 <= record["tokens"] < 4.0
            assert record["equivalent"][-1] <= record["direction"][-1] + 1e-12
    assert 6 <= sum(record["accepted"] for record in records) <= 26


def test_a_trial_is_the_same_in_any_chunk() -> None:
    """Bit by bit: a ReLU that switches makes a new run out of a last bit."""
    together = RECIPE.run(CASES["d=6"], range(1, 41))
    apart = [record for begin in (1, 8, 30) for record in RECIPE.run(CASES["d=6"], range(begin, begin + 7))]
    assert together[:14] + together[29:36] == apart


def test_summary_and_figure() -> None:
    """From records as they are after JSON; a case without records has no number, a case without accepted runs none."""
    records = json.loads(
        json.dumps(records_of("d=4", range(1, 121)) + records_of("d=10", range(1, 6)), allow_nan=False)
    )
    summary = RECIPE.summarize(records)
    texts = [number.text for number in summary.numbers]
    assert any(text.startswith("d=4: 1 - correlation") for text in texts)
    assert not any(text.startswith("d=6") for text in texts)
    by_text = {number.text: number for number in summary.numbers}
    assert by_text["d=4: seeds that are accepted"].verdict == "met"
    ratio = by_text["d=4: smaller of the ratios of successive predictors, which are in order above 1"]
    assert ratio.verdict == "met"
    for table in summary.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    figure = Figure()
    RECIPE.draw(figure, records)
    assert len(figure.axes) == 8
    RECIPE.draw(Figure(), [])


def test_the_step_without_epsilon_goes_further() -> None:
    """The same data: its runs do not freeze."""
    exact = [record for record in records_of("d=6, step without epsilon", range(1, 61)) if record["accepted"]]
    frozen = [record for record in records_of("d=6", range(1, 61)) if record["accepted"]]
    assert exact
    assert frozen
    least = [min(record["masked"] for record in runs) for runs in (exact, frozen)]
    assert least[0] < 0.01 * least[1]
