"""Every method for every norm, hard and soft: the named problems with known answers, and the choice of the method."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from attsvm.solvers import Status, proximal_newton
from attsvm.solvers.frobenius import frobenius_iterates
from attsvm.solvers.loop import Limits, Outcome, drive
from attsvm.solvers.norms import method_for, norm_iterates
from attsvm.solvers.rows import Rows, compile_rows
from attsvm.solvers.view import RowView
from contract.problems import NAMED, sphere_problem

PRICE = 0.5
NORMS: list[Any] = ["nuc", "op", 1.0, 1.5, 3.0, math.inf]
METHODS = {"newton": 1e-9, "primal-dual": 1e-6, "splitting": 1e-5}
"""The tolerance that is asked of each."""

FEASIBLE = [name for name, named in NAMED.items() if named.feasible]
FEW = ["a margin for each token", "two selected", "a tie against an offset", "figure one"]
CASES = [
    *(("newton", name) for name in FEASIBLE),
    *((method, name) for method in METHODS if method != "newton" for name in FEW),
    ("primal-dual", "sphere, seed 0"),
]

every_norm = pytest.mark.parametrize("norm", NORMS, ids=str)


def solved(rows: Rows, norm: Any, method: str, tol: float) -> Outcome:
    """From a rough solution of the Frobenius norm, as ``solve`` does it."""
    start = drive(RowView(rows=rows), frobenius_iterates(rows), norm="fro", tol=1e-2, limits=Limits())
    iterates = norm_iterates(rows, norm, W=start.W, dual=start.dual, method=method)
    return drive(RowView(rows=rows), iterates, norm=norm, tol=tol, limits=Limits())


def asks(rows: Rows) -> bool:
    return bool((np.where(rows.tie, rows.rhs != 0.0, rows.rhs > 0.0)).any())


@every_norm
@pytest.mark.parametrize("method, name", CASES)
def test_known_values(name: str, norm: Any, method: str) -> None:
    named = NAMED[name]
    for penalty in (math.inf, PRICE):
        if math.isfinite(penalty) and named.soft is None and norm not in named.soft_values:
            continue
        rows = compile_rows(named.build(), reduce=isinstance(norm, str), penalty=penalty)
        if not asks(rows):
            continue
        value = named.value(norm) if math.isinf(penalty) else named.soft_value(norm)
        outcome = solved(rows, norm, method, METHODS[method])
        assert outcome.status is Status.OPTIMAL
        assert outcome.upper == pytest.approx(value, rel=METHODS[method] + named.digits)
        assert outcome.lower == pytest.approx(value, rel=METHODS[method] + named.digits)


@pytest.mark.parametrize("p", [1.02, 1.2, 8.0, 50.0])
@pytest.mark.parametrize("penalty", [1e-3, 0.5, 1e3, math.inf])
def test_newton_reaches_the_last_digits_for_every_p(p: float, penalty: float) -> None:
    outcome = solved(compile_rows(sphere_problem(6, 8, 10, 1), reduce=False, penalty=penalty), p, "newton", 1e-9)
    assert outcome.status is Status.OPTIMAL
    assert outcome.iterations <= 300


@pytest.mark.parametrize("norm", ["op", 1.0, 3.0, math.inf])
def test_an_almost_infeasible_problem(norm: Any) -> None:
    """The same direction is asked for by two rows that are all but opposite."""
    tokens = np.array([[[1.0, 0.0], [0.0, 0.0]], [[-1.0, 1e-3], [0.0, 0.0]]])
    problem = type(sphere_problem(1, 2, 2, 0))(tokens, np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 0]))
    # W e1 = (a, b) with a >= 1 and 1e-3 b >= 1 + a.
    value = {"op": math.hypot(1.0, 2000.0), 1.0: 2001.0, 3.0: (1.0 + 2000.0**3) ** (1 / 3), math.inf: 2000.0}[norm]
    outcome = solved(compile_rows(problem, reduce=isinstance(norm, str)), norm, "newton", 1e-8)
    assert outcome.status is Status.OPTIMAL
    assert outcome.upper == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("norm", ["op", 1.0, 1.5, math.inf])
def test_two_runs_agree_bit_for_bit(norm: Any) -> None:
    rows = compile_rows(sphere_problem(6, 8, 10, 2), reduce=False, penalty=2.0)
    first, second = (solved(rows, norm, "newton", 1e-8) for _ in range(2))
    np.testing.assert_array_equal(first.W, second.W)
    np.testing.assert_array_equal(first.dual, second.dual)


def test_multipliers_stay_in_the_box() -> None:
    rows = compile_rows(sphere_problem(6, 8, 10, 0), reduce=False, penalty=0.05)
    start = drive(RowView(rows=rows), frobenius_iterates(rows), norm="fro", tol=1e-2, limits=Limits())
    for method in METHODS:
        offers = norm_iterates(rows, 3.0, W=start.W, dual=start.dual, method=method)
        for _, offer in zip(range(6), offers, strict=False):
            assert offer.dual is None or (offer.dual.min() >= 0.0 and offer.dual.max() <= 0.05 * (1.0 + 1e-12))


def test_newton_hands_over_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compile_rows(sphere_problem(6, 8, 10, 0), reduce=False)
    monkeypatch.setattr(proximal_newton, "MAX_ROWS", 3)
    outcome = solved(rows, 1.5, "newton", 1e-6)
    assert outcome.status is Status.OPTIMAL
    assert outcome.iterations % 20 == 0  # only the primal-dual method checks every 20 iterations


def test_the_method_is_chosen_by_size() -> None:
    rows = compile_rows(sphere_problem(6, 8, 10, 0), reduce=False)
    few, many = np.zeros(rows.n_rows), np.ones(rows.n_rows)
    few[:5] = 1.0
    assert method_for(rows, few, 3.0) == "newton"
    assert method_for(rows, few, "nuc") == "splitting"
    # The same rows with tokens of a dimension at which they cannot be expanded.
    wide = dataclasses.replace(rows, tokens=np.zeros((6, 8, 3000)), queries=np.zeros((6, 3000)))
    assert method_for(wide, many, 3.0) == "primal-dual"
