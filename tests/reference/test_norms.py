"""Every norm but Frobenius, with hard and soft margin, against the literal statement of the problem in CVXPY."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from attsvm.solvers import Status
from attsvm.solvers.frobenius import frobenius_iterates
from attsvm.solvers.loop import Limits, Outcome, drive
from attsvm.solvers.norms import norm_iterates
from attsvm.solvers.rows import compile_rows
from contract.problems import sphere_problem
from reference.test_solvers import KINDS

pytest.importorskip("cvxpy", reason="extra [reference] is not installed")

from attsvm.solvers.reference import solve_reference
from attsvm.solvers.view import RowView

pytestmark = pytest.mark.reference

NORMS: list[Any] = ["nuc", "op", 1.0, 1.25, 3.0, math.inf]
PENALTIES = [math.inf, 0.3]


def solved(problem: Any, norm: Any, penalty: float) -> Outcome | None:
    """The outcome; None where W = 0 will do."""
    rows = compile_rows(problem, reduce=isinstance(norm, str), penalty=penalty)
    assert not rows.fatal.any()
    if not np.where(rows.tie, rows.rhs != 0.0, rows.rhs > 0.0).any():
        return None
    start = drive(RowView(rows=rows), frobenius_iterates(rows), norm="fro", tol=1e-2, limits=Limits())
    if start.status is Status.INFEASIBLE:
        return start
    iterates = norm_iterates(rows, norm, W=start.W, dual=start.dual, method="newton")
    return drive(RowView(rows=rows), iterates, norm=norm, tol=1e-8, limits=Limits())


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero query"])
def test_the_same_values(kind: str, norm: Any) -> None:
    for seed, penalty in ((0, math.inf), (1, math.inf), (2, 0.3)):
        problem = KINDS[kind](np.random.default_rng([seed, list(KINDS).index(kind)]))
        reference = solve_reference(problem, norm, penalty=penalty)
        assert reference.status in ("optimal", "optimal_inaccurate", "infeasible", "infeasible_inaccurate")
        outcome = solved(problem, norm, penalty)
        if outcome is None:
            assert reference.value == pytest.approx(0.0, abs=1e-5)
        elif reference.value == math.inf:
            assert outcome.status is Status.INFEASIBLE
        else:
            assert outcome.status is Status.OPTIMAL
            np.testing.assert_allclose([outcome.upper, outcome.lower], reference.value, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_on_the_sphere(norm: Any, penalty: float) -> None:
    problem = sphere_problem(6, 8, 10, 3)
    reference = solve_reference(problem, norm, penalty=penalty)
    outcome = solved(problem, norm, penalty)
    assert outcome is not None
    assert outcome.status is Status.OPTIMAL
    np.testing.assert_allclose([outcome.upper, outcome.lower], reference.value, rtol=1e-6)
