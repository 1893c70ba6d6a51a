"""Newton's method for the nuclear norm, alone and beside the solvers that converge from everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from attsvm.selection import TokenSelection, certify
from attsvm.solvers import Status, manifold
from attsvm.solvers.frobenius import frobenius_iterates
from attsvm.solvers.loop import Iterate, Limits, Outcome, drive
from attsvm.solvers.manifold import finished, manifold_iterates
from attsvm.solvers.primal_dual import primal_dual_iterates
from attsvm.solvers.reference import solve_reference
from attsvm.solvers.rows import Rows, compile_rows
from attsvm.solvers.splitting import splitting_iterates
from attsvm.solvers.view import RowView
from contract.problems import NAMED, sphere_problem


def near(rows: Rows) -> Outcome:
    """The Frobenius solution to a hundredth, where other norms begin."""
    outcome = drive(RowView(rows=rows), frobenius_iterates(rows), norm="fro", tol=1e-2, limits=Limits())
    assert outcome.status is Status.OPTIMAL
    return outcome


def driven(rows: Rows, iterates: Iterator[Iterate], *, tol: float, iterations: int | None = None) -> Outcome:
    return drive(RowView(rows=rows), iterates, norm="nuc", tol=tol, limits=Limits(iterations=iterations))


def together(rows: Rows, *, tol: float, step_cost: float = 1e7) -> Outcome:
    """Splitting with the finish, from the Frobenius solution."""
    start = near(rows)
    steps = splitting_iterates(rows, W=start.W, dual=start.dual)
    newton = finished(steps, rows, step_cost=step_cost, W=start.W, dual=start.dual)
    return driven(rows, newton, tol=tol, iterations=3000)


def value_of(problem: TokenSelection, *, tol: float = 1e-9, digits: float = 1e-9) -> float:
    """The certified value, whose gap must come below ``tol``."""
    rows = compile_rows(problem)
    outcome = together(rows, tol=tol)
    assert outcome.status is Status.OPTIMAL
    duals = rows.scatter(outcome.dual, ties=False), rows.scatter(outcome.dual, ties=True)
    proof = certify(problem, rows.expand(outcome.W), *duals, norm="nuc")
    assert proof.feasible
    assert proof.gap <= tol + digits
    return float(proof.upper_bound)


@pytest.mark.parametrize("sizes", [(50, 20, 40, 0), (12, 6, 8, 1), (20, 30, 20, 0)])
def test_the_gap_is_squared_by_a_step(sizes: tuple[int, int, int, int]) -> None:
    rows = compile_rows(sphere_problem(*sizes))
    start = near(rows)
    first = next(i for i in splitting_iterates(rows, W=start.W, dual=start.dual) if i.dual is not None)
    assert first.W is not None
    assert first.dual is not None
    outcome = driven(rows, manifold_iterates(rows, W=first.W, dual=first.dual), tol=1e-9)
    gaps = [check[1] for check in outcome.history]
    assert outcome.status is Status.OPTIMAL
    assert len(gaps) <= 8
    assert gaps[-1] <= 100.0 * gaps[-2] ** 2 + 1e-12
    assert gaps[-2] <= 100.0 * gaps[-3] ** 2


def test_far_fewer_steps_than_the_first_order_method_by_itself() -> None:
    rows = compile_rows(sphere_problem(20, 30, 20, 0))
    start = near(rows)

    def steps() -> Iterator[Iterate]:
        return primal_dual_iterates(rows, "nuc", W=start.W, dual=start.dual)

    newton = finished(steps(), rows, step_cost=1e7, W=start.W, dual=start.dual)
    fast = driven(rows, newton, tol=1e-9)
    assert fast.status is Status.OPTIMAL
    alone = driven(rows, steps(), tol=1e-9, iterations=100 * fast.iterations)
    assert alone.status is Status.ITERATION_LIMIT


@pytest.mark.parametrize("name", sorted(name for name, named in NAMED.items() if named.feasible and named.value("nuc")))
def test_named_problems_have_their_known_values(name: str) -> None:
    named = NAMED[name]
    assert value_of(named.build()) == pytest.approx(named.value("nuc"), rel=1e-8 + named.digits)


def generic(n: int, T: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, queries, and a token for each query that some matrix selects."""
    g = np.random.default_rng(seed)
    X, Z, W = g.normal(size=(n, T, d)), g.normal(size=(n, 1, d)), g.normal(size=(d, d))
    return X, Z, np.einsum("ntd,de,nqe->nqt", X, W, Z).argmax(-1)


def repeated() -> TokenSelection:
    """Every row twice: multipliers are not unique."""
    X, Z, best = generic(5, 6, 4, 0)
    return TokenSelection(np.concatenate([X, X]), np.concatenate([Z, Z]), np.concatenate([best, best]))


def twins() -> TokenSelection:
    """The tokens that are not selected come twice."""
    X, Z, best = generic(5, 4, 4, 1)
    return TokenSelection(np.concatenate([X, X + 1e-300], 1), Z, best)


def several() -> TokenSelection:
    """Two selected tokens in every second sequence, which some matrix ties."""
    g = np.random.default_rng(2)
    X, Z, W = g.normal(size=(4, 6, 5)), g.normal(size=(4, 1, 5)), g.normal(size=(5, 5))
    best = np.einsum("ntd,de,nqe->nqt", X, W, Z).argmax(-1)[:, 0]
    mask = np.zeros((4, 1, 7), dtype=bool)
    mask[np.arange(4), 0, best] = True
    mask[::2, 0, 6] = True
    seen, free = (W @ Z[:, 0, :, None])[..., 0], g.normal(size=(4, 5))
    free -= seen * ((seen * free).sum(1) / (seen * seen).sum(1))[:, None]
    # Beside the selected token for even sequences, far below it for odd ones.
    second = X[np.arange(4), best] + np.where(np.arange(4)[:, None] % 2 == 0, 0.3 * free, -seen)
    return TokenSelection(np.concatenate([X, second[:, None]], 1), Z, mask)


def shifted() -> TokenSelection:
    """Offsets, some of which satisfy their rows by themselves."""
    X, Z, best = generic(6, 5, 5, 3)
    return TokenSelection(X, Z, best, offsets=2.0 * np.random.default_rng(8).normal(size=(6, 1, 5)))


def one_query() -> TokenSelection:
    X, Z, _ = generic(5, 4, 4, 4)
    Z[:] = Z[:1]
    return TokenSelection(X, Z, np.einsum("ntd,de,nqe->nqt", X, np.eye(4), Z).argmax(-1))


def one_dimension() -> TokenSelection:
    X = np.array([[[1.0], [0.0], [-1.0]], [[3.0], [0.5], [-2.0]]])
    return TokenSelection(X, np.array([[2.0], [0.25]]), np.array([0, 0]))


def flat() -> TokenSelection:
    """Tokens in a plane, queries in space: the reduced matrix is not square."""
    X, Z, _ = generic(4, 5, 6, 5)
    X[..., 2:] = 0.0
    W = np.random.default_rng(7).normal(size=(6, 6))
    return TokenSelection(X, Z, np.einsum("ntd,de,nqe->nqt", X, W, Z).argmax(-1))


def zeros() -> TokenSelection:
    """Half of the rows ask for 0."""
    X, Z, best = generic(5, 5, 5, 6)
    return TokenSelection(X, Z, best, margin=np.round(np.random.default_rng(6).random((5, 1, 5))))


@pytest.mark.parametrize(
    "build", [repeated, twins, several, shifted, one_query, one_dimension, flat, zeros], ids=lambda f: f.__name__
)
def test_odd_problems_reach_the_value_of_the_reference(build: Callable[[], TokenSelection]) -> None:
    pytest.importorskip("cvxpy")
    problem = build()
    assert value_of(problem) == pytest.approx(solve_reference(problem, "nuc").value, rel=1e-7)


def test_repeated_rows_change_nothing() -> None:
    X, Z, best = generic(5, 6, 4, 0)
    assert value_of(repeated()) == pytest.approx(value_of(TokenSelection(X, Z, best)), rel=1e-8)


@pytest.mark.parametrize("start", ["rank one", "full rank", "far too large", "zero"])
def test_a_bad_start_ends_soon_and_spoils_nothing(start: str) -> None:
    generator = np.random.default_rng(0)
    rows = compile_rows(sphere_problem(6, 8, 10, 0))
    shape = rows.tokens.shape[2], rows.queries.shape[1]
    matrices = {
        "rank one": np.outer(generator.normal(size=shape[0]), generator.normal(size=shape[1])),
        "full rank": generator.normal(size=shape),
        "far too large": 1e12 * generator.normal(size=shape),
        "zero": np.zeros(shape),
    }
    found = list(manifold_iterates(rows, W=matrices[start], dual=generator.random(rows.n_rows)))
    assert len(found) < 100
    assert all(np.isfinite(i.W).all() and np.isfinite(i.dual).all() for i in found)  # type: ignore[arg-type]
    outcome = driven(rows, iter(found), tol=1e-9)
    value = NAMED["sphere, seed 0"].value("nuc")
    assert outcome.lower <= value * (1.0 + 1e-7)
    assert outcome.upper >= value * (1.0 - 1e-7)


def test_no_multipliers_no_step() -> None:
    rows = compile_rows(sphere_problem(6, 8, 10, 0))
    assert list(manifold_iterates(rows, W=np.eye(10)[:, : rows.queries.shape[1]], dual=np.zeros(rows.n_rows))) == []


def test_the_soft_margin_passes_through() -> None:
    rows = compile_rows(sphere_problem(6, 8, 10, 0), penalty=0.5)
    W, dual = np.ones((rows.tokens.shape[2], rows.queries.shape[1])), np.ones(rows.n_rows)
    given = [Iterate(W=W, dual=dual, step=step) for step in (1, 2, 40)]
    passed = list(finished(iter(given), rows, step_cost=1e9, W=W, dual=dual))
    assert [(i.W is W, i.dual is dual, i.step) for i in passed] == [(True, True, step) for step in (1, 2, 40)]


def test_a_working_set_that_is_too_large_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "MAX_WORKING_SET", 3)
    rows = compile_rows(sphere_problem(6, 8, 10, 0))
    start = near(rows)
    given = [Iterate(W=start.W, dual=start.dual, step=step) for step in (5, 50)]
    assert [i.step for i in finished(iter(given), rows, step_cost=1e9, W=start.W, dual=start.dual)] == [5, 50]


def test_steps_rise_and_a_second_run_is_the_same() -> None:
    rows = compile_rows(sphere_problem(12, 6, 8, 1))
    first, second = (together(rows, tol=1e-10, step_cost=1e4) for _ in range(2))
    steps = [check[0] for check in first.history]
    assert steps == sorted(steps)
    assert first.history == second.history
    np.testing.assert_array_equal(first.W, second.W)
    assert math.isfinite(first.upper)
