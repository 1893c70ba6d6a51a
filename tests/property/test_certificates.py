"""No certificate is ever wrong, whatever it is given; and answers do not depend on how a problem is written down."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attsvm.selection import TokenSelection, certify
from attsvm.solvers import Solution, Status, solve

norms = st.sampled_from(["fro", "nuc"])
seeds = st.integers(0, 2**32 - 1)
TOL = 1e-7
HUGE = 1e5


@st.composite
def problems(draw: st.DrawFn, *, plain: bool = False) -> TokenSelection:
    """Small problems with coarse coordinates, so that duplicates, collinear tokens and zero queries do occur."""
    n, T, d = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    r = np.random.default_rng(draw(seeds))
    coarse = draw(st.booleans())

    def numbers(*shape: int) -> np.ndarray:
        return r.integers(-2, 3, shape).astype(float) if coarse else r.normal(size=shape)

    X, Z = numbers(n, T, d), numbers(n, d)
    options: dict[str, Any] = {}
    if not plain:
        if draw(st.booleans()):
            # Never coarse: a feasible set without interior has no matrix whose rows all hold in float64.
            options["offsets"] = r.normal(size=(n, T))
        if draw(st.booleans()):
            options["margin"] = r.integers(0, 3, (n, 1, T)).astype(float)
    if draw(st.booleans()):
        selected = r.random((n, 1, T)) < 0.4
        return TokenSelection(X, Z, selected, **options)
    return TokenSelection(X, Z, r.integers(-1, T, n), **options)


def solved(problem: TokenSelection, norm: Any, **options: Any) -> Solution:
    solution = solve(problem, norm, **{"tol": TOL, "on_failure": "ignore", "max_iterations": 20_000, **options})
    assert solution.status in (Status.OPTIMAL, Status.INFEASIBLE) or options
    return solution


def same_answer(problem: TokenSelection, other: TokenSelection, norm: Any, *, factor: float = 1.0) -> None:
    first, second = solved(problem, norm), solved(other, norm)
    # Rows that nearly contradict each other are as hard as the rounding of their entries.
    assume(first.upper_bound < HUGE or first.upper_bound == math.inf)
    assert first.status is second.status
    np.testing.assert_allclose(second.upper_bound, factor * first.upper_bound, rtol=3 * TOL, atol=1e-9)


def arrays(problem: TokenSelection) -> dict[str, Any]:
    """The arguments that make the same problem again."""
    return {
        "tokens": problem.tokens,
        "queries": problem.queries,
        "selected": problem.selected,
        "allowed": problem.allowed,
        "offsets": problem.offsets,
        "margin": problem.margin,
    }


def permuted(problem: TokenSelection, seed: int) -> TokenSelection:
    order = np.random.default_rng(seed).permutation(problem.shape[2])
    parts = arrays(problem)
    parts["tokens"] = parts["tokens"][:, order]
    for name in ("selected", "allowed", "offsets", "margin"):
        if isinstance(parts[name], np.ndarray):
            parts[name] = parts[name][..., order]
    return TokenSelection(**parts)


def padded(problem: TokenSelection, *, left: int, right: int) -> TokenSelection:
    parts = arrays(problem)

    def fill(value: np.ndarray, axis: int, content: Any) -> np.ndarray:
        widths = [(left, right) if k == axis % value.ndim else (0, 0) for k in range(value.ndim)]
        return np.pad(value, widths, constant_values=content)

    parts["tokens"] = fill(parts["tokens"], -2, np.nan)
    for name, content in (("selected", False), ("allowed", False), ("offsets", np.nan), ("margin", 7.0)):
        if isinstance(parts[name], np.ndarray):
            parts[name] = fill(parts[name], -1, content)
    return TokenSelection(**parts)


# ------------------------------------------------------------------------------- certificates


@pytest.mark.reference
@settings(max_examples=100)
@given(problems(), norms, st.integers(0, 40), seeds)
def test_no_certificate_is_ever_wrong(problem: TokenSelection, norm: Any, iterations: int, seed: int) -> None:
    """Bounds of unfinished solves, random multipliers and random matrices enclose the optimum of the reference."""
    pytest.importorskip("cvxpy", reason="extra [reference] is not installed")
    from attsvm.solvers.reference import solve_reference

    reference = solve_reference(problem, norm)
    value = reference.value
    # Beyond this a generic solver cannot tell a large matrix from none.
    assume(value < HUGE or value == math.inf)
    # The reference minimises a square, to 1e-9 or so: near 0 it knows the root of that only.
    slack = 0.0 if math.isinf(value) else 1e-7 * value + 1e-9 / max(value, 1e-5)
    partial = solved(problem, norm, max_iterations=iterations)
    r = np.random.default_rng(seed)
    shape, d = problem.selected.shape, problem.shape[-1]
    proofs = [certify(problem, partial.W, partial.duals, partial.equality_duals, norm=norm)]
    for _ in range(5):
        sparse = r.exponential(size=shape) ** 3 * (r.random(shape) < 0.7)
        noisy = partial.W + r.normal(size=(d, d)) * 10.0 ** r.uniform(-8, 1)
        proofs.append(certify(problem, noisy, sparse, r.normal(size=shape), norm=norm))
    for lower, upper in [(p.lower_bound, p.upper_bound) for p in proofs] + [(partial.lower_bound, partial.upper_bound)]:
        assert lower <= value + slack
        assert upper >= min(value, HUGE) - slack


@settings(max_examples=60)
@given(problems(), norms, seeds)
def test_no_multipliers_beat_a_matrix(problem: TokenSelection, norm: Any, seed: int) -> None:
    """Any lower bound is below any upper bound, to rounding; where one is infinite the other is, or proves nothing."""
    solution = solved(problem, norm)
    r = np.random.default_rng(seed)
    shape = problem.selected.shape
    for sharpness in (0.0, 0.3, 3.0):
        duals = np.asarray(solution.duals) + sharpness * r.random(shape)
        ties = np.asarray(solution.equality_duals) + sharpness * r.normal(size=shape)
        proof = certify(problem, solution.W, duals, ties, norm=norm)
        if solution.status is Status.OPTIMAL:
            assert proof.lower_bound <= solution.upper_bound * (1 + 1e-9)
        else:
            assert proof.upper_bound == math.inf


@settings(max_examples=60)
@given(problems(), norms)
def test_solutions_prove_themselves(problem: TokenSelection, norm: Any) -> None:
    solution = solved(problem, norm)
    if solution.status is Status.INFEASIBLE:
        assert solution.ray is not None
        return
    assert solution.gap <= TOL
    margins = problem.margins(solution.W)
    wanted = np.broadcast_to(problem.margin, margins.shape)
    assert (margins >= wanted - 1e-8 * (1 + solution.upper_bound)).all()


# ------------------------------------------------------------------------------- other ways to write it down


@settings(max_examples=30)
@given(problems(), norms, seeds)
def test_the_order_of_tokens_is_no_matter(problem: TokenSelection, norm: Any, seed: int) -> None:
    same_answer(problem, permuted(problem, seed), norm)


@settings(max_examples=30)
@given(problems(), norms, seeds)
def test_the_order_of_sequences_is_no_matter(problem: TokenSelection, norm: Any, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(problem.shape[0])
    parts = {name: value[order] if isinstance(value, np.ndarray) else value for name, value in arrays(problem).items()}
    same_answer(problem, TokenSelection(**parts), norm)


@settings(max_examples=30)
@given(problems(), norms, seeds)
def test_rotations_are_no_matter(problem: TokenSelection, norm: Any, seed: int) -> None:
    d = problem.shape[-1]
    U, V = (np.linalg.qr(M)[0] for M in np.random.default_rng(seed).normal(size=(2, d, d)))
    parts = arrays(problem)
    parts["tokens"], parts["queries"] = parts["tokens"] @ U, parts["queries"] @ V
    # Rotated duplicates agree to rounding only, where they would be asked to differ.
    assume(len(problem.merged) == 0)
    same_answer(problem, TokenSelection(**parts), norm)


@settings(max_examples=30)
@given(problems(), norms, st.floats(1e-3, 1e3))
def test_longer_queries_need_a_smaller_matrix(problem: TokenSelection, norm: Any, scale: float) -> None:
    parts = arrays(problem)
    parts["queries"] = scale * parts["queries"]
    same_answer(problem, TokenSelection(**parts), norm, factor=1 / scale)


@settings(max_examples=30)
@given(problems(plain=True), norms, st.floats(1e-3, 1e3))
def test_the_matrix_grows_with_the_margin(problem: TokenSelection, norm: Any, margin: float) -> None:
    same_answer(problem, TokenSelection(**{**arrays(problem), "margin": margin}), norm, factor=margin)


@settings(max_examples=30)
@given(problems(), norms, seeds)
def test_duplicates_of_dropped_or_selected_tokens_add_nothing(problem: TokenSelection, norm: Any, seed: int) -> None:
    """A copy of a token that is not selected repeats a row; a copy of a selected one is merged."""
    token = int(np.random.default_rng(seed).integers(problem.shape[2]))
    parts = arrays(problem)
    parts["tokens"] = np.concatenate([parts["tokens"], parts["tokens"][:, [token]]], axis=1)
    for name in ("allowed", "offsets", "margin"):
        if isinstance(parts[name], np.ndarray):
            parts[name] = np.concatenate([parts[name], parts[name][..., [token]]], axis=-1)
    copies = np.zeros_like(parts["selected"][..., :1])
    parts["selected"] = np.concatenate([parts["selected"], copies], axis=-1)
    same_answer(problem, TokenSelection(**parts), norm)


@settings(max_examples=30)
@given(problems(), norms, st.integers(0, 3), st.integers(0, 3))
def test_padding_on_either_side_is_no_matter(problem: TokenSelection, norm: Any, left: int, right: int) -> None:
    same_answer(problem, padded(problem, left=left, right=right), norm)
