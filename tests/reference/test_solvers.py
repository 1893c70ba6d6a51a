"""Our solvers and the literal statement of the problem in CVXPY, on random problems of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.selection import TokenSelection, certify, check_ray
from attsvm.solvers import Status, solve
from contract.problems import NAMED, sphere_problem

pytest.importorskip("cvxpy", reason="extra [reference] is not installed")

from attsvm.solvers.reference import solve_reference

pytestmark = pytest.mark.reference

Drawn = dict[str, Any]


def draw(r: np.random.Generator, *, n: int | None = None, T: int | None = None, d: int | None = None) -> Drawn:
    n = n or int(r.integers(1, 5))
    T = T or int(r.integers(2, 6))
    d = d or int(r.integers(2, 6))
    return {
        "tokens": r.normal(size=(n, T, d)),
        "queries": r.normal(size=(n, d)),
        "selected": r.integers(0, T, n),
    }


def duplicated(r: np.random.Generator) -> TokenSelection:
    drawn = draw(r)
    drawn["tokens"][:, -1] = drawn["tokens"][:, 0]
    return TokenSelection(**drawn)


def collinear(r: np.random.Generator) -> TokenSelection:
    drawn = draw(r)
    line = r.normal(size=drawn["tokens"].shape[2])
    return TokenSelection(**{**drawn, "tokens": r.normal(size=(*drawn["tokens"].shape[:2], 1)) * line})


def zero_query(r: np.random.Generator) -> TokenSelection:
    drawn = draw(r)
    drawn["queries"][r.integers(len(drawn["queries"]))] = 0.0
    return TokenSelection(**drawn)


def equal_queries(r: np.random.Generator) -> TokenSelection:
    drawn = draw(r, n=3, T=3, d=4)
    drawn["queries"][:] = drawn["queries"][0]
    return TokenSelection(**drawn)


def sequence(r: np.random.Generator, *, causal: bool) -> TokenSelection:
    n, T, d = int(r.integers(1, 4)), int(r.integers(2, 5)), int(r.integers(2, 5))
    selected = [[int(r.integers(0, k + 1 if causal else T)) for k in range(T)] for _ in range(n)]
    return TokenSelection.sequence(r.normal(size=(n, T, d)), selected, causal=causal)


def with_offsets(r: np.random.Generator, **sizes: int) -> TokenSelection:
    drawn = draw(r, **sizes)
    return TokenSelection(**drawn, offsets=r.normal(size=drawn["tokens"].shape[:2]))


def several(r: np.random.Generator, *, offsets: bool) -> TokenSelection:
    drawn = draw(r, T=int(r.integers(3, 6)))
    n, T, _ = drawn["tokens"].shape
    chosen = np.zeros((n, 1, T), dtype=bool)
    for row in chosen[:, 0]:
        row[r.permutation(T)[: r.integers(1, T)]] = True
    b = r.normal(size=(n, T)) if offsets else None
    return TokenSelection(drawn["tokens"], drawn["queries"], chosen, offsets=b)


def margins(r: np.random.Generator) -> TokenSelection:
    drawn = draw(r)
    n, T, _ = drawn["tokens"].shape
    wanted = 3.0 * r.random((n, 1, T)) * (r.random((n, 1, T)) < 0.8)
    return TokenSelection(**drawn, margin=wanted)


def masked(r: np.random.Generator) -> TokenSelection:
    lengths = r.integers(1, 6, size=4)
    d = int(r.integers(2, 6))
    tokens = [r.normal(size=(length, d)) for length in lengths]
    return TokenSelection(tokens, r.normal(size=(4, d)), [int(r.integers(length)) for length in lengths])


KINDS: dict[str, Callable[[np.random.Generator], TokenSelection]] = {
    "plain": lambda r: TokenSelection(**draw(r)),
    "tight": lambda r: TokenSelection(**draw(r, n=4, T=5, d=int(r.integers(2, 4)))),
    "duplicated tokens": duplicated,
    "collinear tokens": collinear,
    "n = 1": lambda r: TokenSelection(**draw(r, n=1)),
    "T = 2": lambda r: TokenSelection(**draw(r, T=2)),
    "zero query": zero_query,
    "equal queries": equal_queries,
    "sequence": lambda r: sequence(r, causal=False),
    "causal": lambda r: sequence(r, causal=True),
    "offsets": with_offsets,
    "offsets, tight": lambda r: with_offsets(r, n=4, T=5, d=2),
    "several selected": lambda r: several(r, offsets=False),
    "several selected and offsets": lambda r: several(r, offsets=True),
    "margins": margins,
    "masked": masked,
}
FROBENIUS = [(kind, seed) for kind in KINDS for seed in range(13)]
NUCLEAR = [(kind, seed) for kind in KINDS for seed in range(4)]


def compare(kind: str, seed: int, norm: Any) -> None:
    problem = KINDS[kind](np.random.default_rng([seed, list(KINDS).index(kind)]))
    reference = solve_reference(problem, norm)
    assert reference.status in ("optimal", "optimal_inaccurate", "infeasible", "infeasible_inaccurate")
    solution = solve(problem, norm, tol=1e-7, on_failure="ignore")
    if reference.value == math.inf:
        assert solution.status is Status.INFEASIBLE
        assert check_ray(problem, solution.ray.weights, solution.ray.equality_weights).valid
    else:
        assert solution.status is Status.OPTIMAL
        np.testing.assert_allclose(solution.upper_bound, reference.value, rtol=1e-5, atol=1e-6)
        if norm == "fro":  # the minimiser is unique
            np.testing.assert_allclose(solution.W, reference.W, atol=1e-3 * reference.value + 1e-6)


@pytest.mark.parametrize("kind, seed", FROBENIUS)
def test_frobenius(kind: str, seed: int) -> None:
    compare(kind, seed, "fro")


@pytest.mark.parametrize("kind, seed", NUCLEAR)
def test_nuclear(kind: str, seed: int) -> None:
    compare(kind, seed, "nuc")


def test_the_random_problems_are_of_both_outcomes() -> None:
    outcomes = [
        solve(KINDS[kind](np.random.default_rng([seed, list(KINDS).index(kind)])), on_failure="ignore").status
        for kind, seed in FROBENIUS
    ]
    assert len(outcomes) >= 200
    assert min(outcomes.count(Status.OPTIMAL), outcomes.count(Status.INFEASIBLE)) >= 40


# ------------------------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("norm", ["fro", "nuc"])
@pytest.mark.parametrize("name", NAMED)
def test_the_reference_knows_the_named_problems(name: str, norm: Any) -> None:
    np.testing.assert_allclose(solve_reference(NAMED[name].build(), norm).value, NAMED[name].value(norm), atol=1e-4)


@pytest.mark.parametrize("norm, value", [("op", 1.0), (1, 2.0), (3, 2 ** (1 / 3)), (math.inf, 1.0)])
def test_the_reference_in_other_norms(norm: Any, value: float) -> None:
    """The identity: W[0, 0] >= 1 and W[1, 1] >= 1."""
    answer = solve_reference(NAMED["the identity matrix"].build(), norm)
    assert answer.value == pytest.approx(value, rel=1e-6)
    assert answer.status == "optimal"


@pytest.mark.parametrize("norm", ["op", 1, 1.5, 3, math.inf])
def test_certificates_of_other_norms_hold_for_the_reference(norm: Any, rng: np.random.Generator) -> None:
    """No multipliers prove more than the reference reaches, and its matrix certifies what it says."""
    problem = sphere_problem(3, 4, 4, 0)
    answer = solve_reference(problem, norm)
    for _ in range(50):
        proof = certify(problem, answer.W, rng.random((3, 1, 4)) ** 4, norm=norm)
        assert proof.upper_bound == pytest.approx(answer.value, rel=1e-5)
        assert proof.lower_bound <= proof.upper_bound * (1 + 1e-12)


def test_scs_agrees_with_clarabel() -> None:
    problem = sphere_problem(3, 4, 5, 0)
    for norm in ("fro", "nuc"):
        values = [solve_reference(problem, norm, solver=name).value for name in ("CLARABEL", "SCS")]  # type: ignore[arg-type]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_what_the_reference_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = TokenSelection(np.ones((2, 1, 2, 2)), np.ones((2, 1, 2)), np.zeros((2, 1), dtype=int))
    with pytest.raises(UnsupportedError, match="one problem at a time"):
        solve_reference(batch)
    with pytest.raises(InvalidInputError, match="norm must be"):
        solve_reference(batch[0], "l2")  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "cvxpy", None)
    with pytest.raises(UnsupportedError, match=r"needs CVXPY.*attsvm\[reference\]"):
        solve_reference(batch[0])
