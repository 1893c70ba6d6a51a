from __future__ import annotations

import dataclasses

import pytest
import torch

from attsvm.experiments.recipes import mirror
from attsvm.experiments.recipes.mirror import RECIPE, divergence

from .trials import check_page, number, run_cases, same_alone


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "EPOCHS", {1.75: 1500, 2.0: 2000, 3.0: 3000})


@pytest.mark.usefixtures("short")
def test_four_trials() -> None:
    records = run_cases(RECIPE, 4, RECIPE.cases[:1])
    records += run_cases(RECIPE, 1, RECIPE.cases[1:])
    summary = check_page(RECIPE, records)
    for text in ("own run selects (as published), steps", "iterate selects, steps"):
        assert number(summary, text).verdict == "met"  # smallest on the diagonal
    for p in (1.75, 2.0):
        assert number(summary, f"joint, l_{p:g}: sequences").verdict == "met"
    for record in records[:4]:
        published, exact = record["published"], record["exact"]
        # The published steps come to rest; those without underflow go on.
        assert published["norm"]["1.75"] < 200 < 600 < exact["norm"]["1.75"]
        assert published["norm"]["3"] == exact["norm"]["3"]
        for p in ("1.75", "2", "3"):
            assert exact["own"][f"{p}-{p}"] == exact["same"][f"{p}-{p}"]
        assert exact["absent"]["1.75"] > exact["absent"]["3"]


@pytest.mark.usefixtures("short")
def test_a_trial_is_the_same_alone() -> None:
    small = dataclasses.replace(RECIPE.cases[0], values={"n": 3, "T": 4, "d": 5, "std": 1.0})
    same_alone(RECIPE, small, range(1, 4))


def test_divergence_of_the_definition() -> None:
    p, generator = 1.75, torch.Generator().manual_seed(0)
    target, W = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    u, w = (M / M.abs().pow(p).sum() ** (1 / p) for M in (target, W))
    potential = [float(M.abs().pow(p).sum() / p) for M in (u, w)]
    slope = w.sign() * w.abs() ** (p - 1)
    expected = potential[0] - potential[1] - float((slope * (u - w)).sum())
    assert float(divergence(target, W, p)) == pytest.approx(expected, abs=1e-12)
    assert float(divergence(target, 7.0 * target, p)) == pytest.approx(0.0, abs=1e-12)
    assert float(divergence(target, -target, 2.0)) == pytest.approx(2.0, abs=1e-12)
