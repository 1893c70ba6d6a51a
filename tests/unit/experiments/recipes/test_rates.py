from __future__ import annotations

import pytest
import torch

from attsvm.experiments.recipes import rates
from attsvm.experiments.recipes.rates import RECIPE, misalignment, tilted

from .trials import check_page, number, run_cases, same_alone


def test_four_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "STEPS", 300)
    monkeypatch.setattr(rates, "SHOWN", [*(step for step in rates.SHOWN if step < 300), 300])
    monkeypatch.setattr(rates, "WINDOW", (50, 300))
    summary = check_page(RECIPE, run_cases(RECIPE, 4))
    assert [n.text for n in summary.numbers if n.verdict == "differs"] == []
    assert number(summary, "orthonormal, NGD: 1 - smallest").ours == pytest.approx(0.1394, abs=1e-4)
    # The angle to the solution falls like 1 / norm of W, and the norm grows by 0.1 a step.
    assert number(summary, "NGD: exponent").ours == pytest.approx(2.0, abs=0.05)


def test_a_trial_is_the_same_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "STEPS", 30)
    monkeypatch.setattr(rates, "SHOWN", [0, 1, 30])
    for case in RECIPE.cases[4:]:
        same_alone(RECIPE, case, range(3))


def test_tilted_tokens_meet_the_bound() -> None:
    noise = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = tilted(torch.eye(12, dtype=torch.float64), noise, 0.05)
    products = (rows @ rows.T).fill_diagonal_(0.0).abs()
    assert float(products.max()) == pytest.approx(0.05, rel=1e-9)
    torch.testing.assert_close(torch.linalg.vector_norm(rows, dim=-1), torch.ones(12, dtype=torch.float64))


def test_misalignment_of_tiny_angles() -> None:
    W = torch.tensor([[[[1.0, 1e-10], [0.0, 0.0]]]], dtype=torch.float64)
    assert float(misalignment(W, W[:, 0] * torch.tensor([2.0, 0.0]))) == pytest.approx(5e-21, rel=1e-6, abs=0.0)
