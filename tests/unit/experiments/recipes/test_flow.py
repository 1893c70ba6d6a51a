from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from attsvm.experiments.recipes.flow import RECIPE, draw_aligned
from attsvm.solvers import solve

from .trials import check_page, run_cases, same_alone

SHORT = [dataclasses.replace(case, values={**case.values, "length": 12.0}) for case in RECIPE.cases]


def test_three_trials_of_short_curves() -> None:
    records = run_cases(RECIPE, 3, SHORT)
    check_page(RECIPE, records)
    by_case = {case.name: [r for r in records if r["case"] == case.name] for case in RECIPE.cases}
    # On aligned data the full flow is the diagonal one, and its nuclear norm the l_1 norm.
    pairs = zip(by_case["(K, Q), aligned"], by_case["diagonal, aligned"], strict=True)
    for full, diagonal in pairs:
        assert full["own"][1:] == pytest.approx(diagonal["own"][1:], abs=1e-3)
        assert full["excess"][-1] == pytest.approx(diagonal["excess"][-1], abs=1e-3)
    for found in by_case.values():
        ended = [r for r in found if r["best"] and r["feasible"]]
        assert ended
        for record in ended:
            first = next(value for value in record["excess"] if value is not None)
            assert -1e-5 < record["excess"][-1] < first


def test_a_trial_is_the_same_alone() -> None:
    for case in SHORT[2:]:
        same_alone(RECIPE, case, range(2))


def test_aligned_data_have_a_diagonal_nuclear_solution_of_least_l1_norm() -> None:
    data = draw_aligned([4], n=3, T=3, d=8)
    nuclear = solve(data.problem(data.best), "nuc", tol=1e-8)
    entries = solve(data.diagonal_problem(data.best), 1.0, tol=1e-8)
    assert nuclear.upper_bound[0] == pytest.approx(entries.upper_bound[0], rel=1e-6)


def test_gradients_of_a_diagonal_matrix_are_diagonal_on_aligned_data() -> None:
    data = draw_aligned([4], n=3, T=3, d=8)
    X, z = data.tokens[0], data.queries[0]
    w = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)
    s = torch.softmax(torch.einsum("ntd,nd->nt", X, w * z), -1)
    weights = s * (data.scores[0] - (s * data.scores[0]).sum(-1, keepdim=True))
    gradient = torch.einsum("nt,ntd,ne->de", weights, X, z)
    off = gradient - torch.diag(gradient.diagonal())
    assert float(off.abs().max()) < 1e-12 * float(np.abs(gradient.numpy()).max())
