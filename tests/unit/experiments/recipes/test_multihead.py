from __future__ import annotations

import dataclasses

import pytest
import torch

from attsvm.experiments.recipes.multihead import DATA, RECIPE, draw_mixture

from .trials import check_page, number, run_cases, same_alone

HEADS, SAMPLES = RECIPE.cases[:4], RECIPE.cases[4:]


def test_mixture() -> None:
    tokens, labels = draw_mixture(0, n=50, **DATA)
    assert tokens.shape == (50, 8, 32)
    assert set(labels.tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(tokens.norm(dim=-1), torch.full((50, 8), 2.0, dtype=torch.float64))
    means = 2.0 * torch.eye(2, 32, dtype=torch.float64)
    own = (tokens == means[(labels < 0).long()].unsqueeze(1)).all(-1)
    other = (tokens == means[(labels > 0).long()].unsqueeze(1)).all(-1)
    assert own.sum(1).tolist() == [2] * 50
    assert not other.any()


def test_exponents_of_two_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attsvm.experiments.recipes.multihead.TEST", 200)
    records = run_cases(RECIPE, 2, [HEADS[0], HEADS[1], *SAMPLES[:4]])
    summary = check_page(RECIPE, records)
    for part in ("H=1: exponent", "H=2: exponent", "H=4: exponent of test loss"):
        assert number(summary, part).verdict == "met"
    assert number(summary, "H=8: exponent").verdict == "differs"  # no record of it
    assert all(one["loss"][-1] < 0.01 for one in records)
    low, high = summary.tables[0].rows[0][3:5]
    assert isinstance(low, float)
    assert isinstance(high, float)
    assert low < 1.2 < high + 0.3


def test_a_trial_is_the_same_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attsvm.experiments.recipes.multihead.TEST", 50)
    same_alone(RECIPE, dataclasses.replace(HEADS[2], values={**HEADS[2].values, "steps": 40}), range(3))
    same_alone(RECIPE, SAMPLES[1], range(3))
