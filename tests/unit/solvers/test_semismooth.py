"""The method of multipliers: the same answer by every way of solving its linear systems."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attsvm.selection.problem import TokenSelection
from attsvm.solvers import gram
from attsvm.solvers.gram import Gram
from attsvm.solvers.loop import Limits, Outcome, drive
from attsvm.solvers.operator import CompiledOperator, LinearRows, RowOperator
from attsvm.solvers.rows import Rows, compile_rows
from attsvm.solvers.semismooth import multiplier_iterates
from attsvm.solvers.solution import Status
from attsvm.solvers.view import RowView


def random_problem(seed: int = 3, *, several: bool = False) -> TokenSelection:
    generator = np.random.default_rng(seed)
    n, Q, T, d = 14, 2, 6, 9
    tokens, queries = generator.normal(size=(n, T, d)), generator.normal(size=(n, Q, d))
    scores = np.einsum("ntd,de,nqe->nqt", tokens, generator.normal(size=(d, d)), queries)
    selected = scores == scores.max(-1, keepdims=True)
    if several:
        selected[:3, 0, :2] = True
    return TokenSelection(tokens, queries, selected)


def contradiction() -> TokenSelection:
    """Two sequences that contradict each other, and one that has nothing to do with them."""
    tokens = [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]]
    return TokenSelection(tokens, [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0, 0, 0])


def operators(rows: Rows) -> dict[str, LinearRows]:
    return {"compiled": CompiledOperator.of(rows), "torch": RowOperator.of(rows)}


def solved(rows: Rows, operator: LinearRows, *, max_bytes: float = 1e9, tol: float = 1e-12) -> Outcome:
    iterates = multiplier_iterates(rows, operator, first=1.0, max_bytes=max_bytes)
    return drive(RowView(rows=rows), iterates, norm="fro", tol=tol, limits=Limits(iterations=400))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", ["compiled", "torch"])
def test_operators_are_adjoint_and_agree_with_the_rows(kind: str, several: bool) -> None:
    rows = compile_rows(random_problem(several=several))
    operator = operators(rows)[kind]
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows.tokens.shape[2], rows.queries.shape[1], generator=generator, dtype=torch.float64)
    dual = torch.randn(rows.n_rows, generator=generator, dtype=torch.float64)
    index = torch.arange(rows.n_rows)
    D, Z = operator.factors(index)
    torch.testing.assert_close(operator.forward(W), ((D @ W) * Z).sum(1))
    torch.testing.assert_close(operator.adjoint(dual), (D * dual[:, None]).T @ Z)
    torch.testing.assert_close(torch.linalg.vector_norm(D, dim=1), torch.ones(rows.n_rows, dtype=torch.float64))


@pytest.mark.parametrize(("large", "eps"), [(10**9, 1e-3), (2, 1e-3), (2, 1e-5)])
def test_gram_solves_its_system_in_either_precision(monkeypatch: pytest.MonkeyPatch, large: int, eps: float) -> None:
    monkeypatch.setattr(gram, "LARGE", large)
    rows = compile_rows(random_problem())
    operator = CompiledOperator.of(rows)
    index = torch.arange(0, rows.n_rows, 3)
    D, Z = operator.factors(index)
    matrix = (D @ D.T) * (Z @ Z.T) + eps * torch.eye(len(index), dtype=torch.float64)
    rhs = torch.linspace(-1.0, 1.0, len(index), dtype=torch.float64)
    system = Gram.of(operator, index, eps)
    assert system.is_exact == (large == 10**9)
    assert system.factor.dtype == (torch.float32 if large == 2 and eps == 1e-3 else torch.float64)
    x = system.solve(rhs, wanted=0.0)
    assert float((matrix @ x - rhs).norm()) <= 1e-12 * float(rhs.norm())
    assert system.adapted(index.clone(), eps) is system
    assert system.adapted(index, 0.1 * eps) is None


def test_a_few_changed_rows_are_solved_for_by_the_old_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "LARGE", 2)
    monkeypatch.setattr(gram, "MOST_CHANGED", 5)
    rows = compile_rows(random_problem())
    operator = CompiledOperator.of(rows)
    eps, first = 1e-3, torch.arange(0, rows.n_rows, 3)
    system = Gram.of(operator, first, eps)
    left = torch.cat([first[1:7], first[8:]])
    both = torch.cat([left, torch.tensor([1, 7, 50])]).sort().values
    for index in (left, torch.cat([first, torch.tensor([4])]).sort().values, both, first):
        adapted = system.adapted(index, eps)
        assert adapted is not None
        assert adapted.factor is system.factor
        system = adapted
        D, Z = operator.factors(index)
        matrix = (D @ D.T) * (Z @ Z.T) + eps * torch.eye(len(index), dtype=torch.float64)
        rhs = torch.linspace(-1.0, 1.0, len(index), dtype=torch.float64)
        rough = system.solve(rhs, wanted=1e-3)
        assert float((matrix @ rough - rhs).norm()) <= 1e-3  # one step: the factor is nearly exact for these rows
        assert float((matrix @ system.solve(rhs, wanted=0.0) - rhs).norm()) <= 1e-12 * float(rhs.norm())
    assert system.adapted(torch.arange(rows.n_rows), eps) is None


@pytest.mark.parametrize("penalty", [np.inf, 0.2])
@pytest.mark.parametrize("several", [False, True])
def test_every_way_to_solve_the_systems_gives_the_same_matrix(
    monkeypatch: pytest.MonkeyPatch, several: bool, penalty: float
) -> None:
    rows = compile_rows(random_problem(several=several), penalty=penalty)
    expected = solved(rows, CompiledOperator.of(rows))
    assert expected.status is Status.OPTIMAL
    found = {
        "torch": solved(rows, RowOperator.of(rows)),
        "gradients": solved(rows, CompiledOperator.of(rows), max_bytes=0.0),
    }
    monkeypatch.setattr(gram, "LARGE", 2)
    found["single"] = solved(rows, CompiledOperator.of(rows))
    for name, outcome in found.items():
        assert outcome.status is Status.OPTIMAL, name
        assert np.abs(outcome.W - expected.W).max() <= 1e-8 * np.abs(expected.W).max(), name


@pytest.mark.parametrize("max_bytes", [1e9, 0.0])
def test_runaway_multipliers_name_the_contradiction(max_bytes: float) -> None:
    rows = compile_rows(contradiction())
    outcome = solved(rows, RowOperator.of(rows), max_bytes=max_bytes)
    assert outcome.status is Status.INFEASIBLE
    assert outcome.ray is not None
    weights = rows.scatter(outcome.ray, ties=False).max((1, 2))
    assert weights[2] <= 1e-9 * weights[0]
    assert weights[0] == pytest.approx(weights[1], rel=1e-9)


def test_multipliers_stay_within_their_bounds() -> None:
    rows = compile_rows(random_problem(), penalty=0.05)
    for _, iterate in zip(range(30), multiplier_iterates(rows, CompiledOperator.of(rows)), strict=False):
        if iterate.W is not None and iterate.dual is not None:
            assert iterate.dual.min() >= 0.0
            assert iterate.dual.max() <= 0.05 * (1.0 + 1e-15)
