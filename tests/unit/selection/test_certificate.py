from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.selection import TokenSelection, certify, check_ray, constraints
from attsvm.solvers import solve
from contract.problems import E1, E2, NAMED, ZERO, select

NORMS: list[Any] = ["fro", "nuc", "op", 1.0, 1.5, 3.0, math.inf]


def one_row(**options: Any) -> TokenSelection:
    """W[0, 0] >= 1."""
    return select([[E1, ZERO]], [E1], [0], **options)


def two_corners() -> TokenSelection:
    """W[0, 0] >= 1 and W[1, 1] >= 1."""
    return NAMED["the identity matrix"].build()


def duals_for(problem: TokenSelection, values: list[float]) -> np.ndarray:
    """Multipliers on the asked rows in order, rubbish elsewhere."""
    duals = np.full(problem.selected.shape, 123.0)
    duals[problem.tensors.asked.numpy()] = values
    return duals


@pytest.mark.parametrize("norm", NORMS)
def test_one_row_has_value_one_in_every_norm(norm: Any) -> None:
    problem = one_row()
    proof = certify(problem, np.diag([1.0, 0.0]), duals_for(problem, [7.0]), norm=norm)
    assert proof.feasible
    assert (proof.upper_bound, proof.lower_bound, proof.gap) == pytest.approx((1.0, 1.0, 0.0), abs=1e-15)
    assert proof.smallest_margin == pytest.approx(1.0)


IDENTITY_VALUES = {
    "fro": math.sqrt(2),
    "nuc": 2.0,
    "op": 1.0,
    1.0: 2.0,
    1.5: 2 ** (2 / 3),
    3.0: 2 ** (1 / 3),
    math.inf: 1.0,
}


@pytest.mark.parametrize("norm", NORMS)
def test_two_corners_have_the_norm_of_the_identity(norm: Any) -> None:
    """Equal multipliers prove it in every norm: their combination is aligned with the identity."""
    problem = two_corners()
    proof = certify(problem, np.eye(2), duals_for(problem, [0.3, 0.3]), norm=norm)
    value = IDENTITY_VALUES[norm]
    assert (proof.upper_bound, proof.lower_bound) == pytest.approx((value, value), rel=1e-14)
    assert proof.gap == pytest.approx(0.0, abs=1e-14)
    assert proof.complementarity == pytest.approx(0.0, abs=1e-14)


def test_bounds_of_other_multipliers_are_lower() -> None:
    """Weights 1 and 2 combine to diag(1, 2): 3 / sqrt(5) for Frobenius, 3 / 2 for nuclear, 3 / 3 for operator."""
    problem = two_corners()
    for norm, bound in (("fro", 3 / math.sqrt(5)), ("nuc", 1.5), ("op", 1.0)):
        assert certify(problem, np.eye(2), duals_for(problem, [1.0, 2.0]), norm=norm).lower_bound == pytest.approx(
            bound
        )


def test_the_matrix_is_scaled_until_its_smallest_margin_fits() -> None:
    problem = two_corners()
    proof = certify(problem, np.diag([4.0, 8.0]), duals_for(problem, [0.0, 0.0]))
    assert (proof.scale, proof.upper_bound) == pytest.approx((0.25, math.sqrt(5)))
    assert proof.lower_bound == 0.0
    assert proof.gap == 1.0
    assert proof.smallest_margin == pytest.approx(1.0)


@pytest.mark.parametrize("W", [np.zeros((2, 2)), -np.eye(2), np.diag([1.0, 0.0]), np.diag([1.0, -1e-300])])
def test_a_matrix_that_fails_a_row_proves_nothing(W: np.ndarray) -> None:
    proof = certify(two_corners(), W, duals_for(two_corners(), [1.0, 1.0]))
    assert not proof.feasible
    assert (proof.upper_bound, proof.gap) == (math.inf, math.inf)
    assert proof.lower_bound == pytest.approx(math.sqrt(2))


def test_negative_multipliers_and_those_of_no_row_count_as_zero() -> None:
    problem = two_corners()
    proof = certify(problem, np.eye(2), duals_for(problem, [1.0, -5.0]))
    assert proof.lower_bound == pytest.approx(1.0)
    assert certify(problem, np.eye(2), -duals_for(problem, [1.0, 1.0])).lower_bound == 0.0


def test_with_offsets_the_matrix_is_taken_as_it_is() -> None:
    problem = one_row(offsets=np.array([[0.25, 0.0]]))
    assert certify(problem, np.diag([0.75, 0.0]), duals_for(problem, [1.0])).gap == pytest.approx(0.0)
    assert certify(problem, np.diag([1.5, 0.0]), duals_for(problem, [1.0])).upper_bound == pytest.approx(1.5)
    short = certify(problem, np.diag([0.75 - 1e-12, 0.0]), duals_for(problem, [1.0]))
    assert (short.feasible, short.upper_bound) == (False, math.inf)
    assert short.lower_bound == pytest.approx(0.75)


def test_offsets_that_suffice_leave_zero_and_no_gap() -> None:
    problem = one_row(offsets=np.array([[3.0, 0.0]]))
    proof = certify(problem, np.zeros((2, 2)), duals_for(problem, [1.0]))
    assert (proof.feasible, proof.upper_bound, proof.lower_bound, proof.gap) == (True, 0.0, 0.0, 0.0)


def test_margins_weigh_the_bound() -> None:
    problem = NAMED["a margin for each token"].build()
    proof = certify(problem, [[3.0, 0.0], [4.0, 0.0]], duals_for(problem, [3.0, 4.0]))
    assert (proof.upper_bound, proof.lower_bound) == pytest.approx((5.0, 5.0))


def test_ties_need_multipliers_of_either_sign() -> None:
    """Tokens e1 and e2 selected, 0 dropped: the row (1, 0) twice, less the tie (1, -1), is (1, 1)."""
    problem = NAMED["two selected"].build()
    W = np.array([[1.0, 0.0], [1.0, 0.0]])
    duals, ties = np.zeros((1, 1, 3)), np.zeros((1, 1, 3))
    duals[0, 0, 2], ties[0, 0, 1] = 2.0, -1.0
    proof = certify(problem, W, duals, ties)
    assert (proof.upper_bound, proof.lower_bound, proof.worst_tie) == pytest.approx((math.sqrt(2), math.sqrt(2), 0.0))
    assert certify(problem, W, duals).lower_bound == pytest.approx(1.0)
    broken = certify(problem, W + np.diag([1e-6, 0.0]), duals, ties)
    assert (broken.feasible, broken.upper_bound) == (False, math.inf)
    assert broken.worst_tie == pytest.approx(1e-6 / 2, rel=1e-3)


def test_rows_that_ask_for_zero_cannot_be_scaled_into_force() -> None:
    problem = NAMED["a row that asks for 0"].build()
    duals = duals_for(problem, [1.0, 1.0])
    assert certify(problem, [[1.0, 0.0], [1.0, 0.0]], duals).upper_bound == pytest.approx(math.sqrt(2))
    assert certify(problem, [[1.0, 0.0], [0.9, 0.0]], duals).upper_bound == math.inf


def test_nothing_asked_is_proved_by_zero() -> None:
    problem = NAMED["one token"].build()
    proof = certify(problem, np.zeros((2, 2)), np.zeros((1, 1, 1)))
    assert (proof.upper_bound, proof.gap, proof.smallest_margin) == (0.0, 0.0, math.inf)


def test_kkt_residuals_vanish_at_the_optimum_only() -> None:
    problem = two_corners()
    best = certify(problem, np.eye(2), duals_for(problem, [2.0, 2.0]))
    assert (best.stationarity, best.complementarity) == pytest.approx((0.0, 0.0), abs=1e-15)
    off = certify(problem, np.diag([1.0, 2.0]), duals_for(problem, [1.0, 1.0]))
    assert off.stationarity > 0.1
    assert off.complementarity == pytest.approx(0.5)
    assert math.isnan(certify(problem, np.eye(2), duals_for(problem, [1.0, 1.0]), norm="nuc").stationarity)


def test_a_common_part_of_the_tokens_is_no_matter(rng: np.random.Generator) -> None:
    X, Z = np.round(rng.normal(size=(3, 4, 3)), 3), rng.normal(size=(3, 3))
    W, duals, offsets = rng.normal(size=(3, 3)), rng.random((3, 1, 4)), rng.normal(size=(3, 4))
    X[:, 1:] = X[:, :1] - X[:, 1:]
    near = certify(TokenSelection(X, Z, [0] * 3, offsets=offsets), W, duals)
    far = certify(TokenSelection(X + 2.0**30, Z, [0] * 3, offsets=offsets), W, duals)
    assert far.lower_bound == pytest.approx(near.lower_bound, rel=1e-5)
    assert far.complementarity == pytest.approx(near.complementarity, rel=1e-5)


def test_a_margin_made_of_rounding_proves_nothing() -> None:
    """w >= 1 and -w >= 1: a matrix that leaves both rows a positive rounding error would do, scaled by 1e17."""
    X = np.array([[[0.3, 0.1], [0.0, 0.0], [0.6, 0.2]]])
    problem = TokenSelection(X, [[0.7, 0.1]], [0])
    r = np.random.default_rng(0)
    for _ in range(2000):
        w = np.array([1.0, -3.0]) * r.normal() * (1 + r.integers(-4, 5, 2) * 2.0**-52)
        assert not certify(problem, np.outer(w, r.normal(size=2)), np.zeros((1, 1, 3))).feasible


def test_a_margin_made_of_the_tolerance_of_ties_proves_nothing() -> None:
    """Tokens 0 and 1 tied, token 2 below them, all on a line: impossible, but nearly done by a nearly level matrix."""
    problem = select([[ZERO, [1.0, 0.0], [-1.0, 0.0]]], [E1], [[[True, True, False]]])
    for level in (1e-9, 1e-11, 1e-13):
        assert not certify(problem, [[level, 0.0], [1.0, 0.0]], np.zeros((1, 1, 3))).feasible


# ------------------------------------------------------------------------------- rays


def opposite() -> TokenSelection:
    """w >= 1 and -w >= 1."""
    return NAMED["opposite wishes"].build()


def test_a_true_ray_is_accepted_and_names_its_sequences() -> None:
    problem = select([[E1, ZERO], [E2, ZERO], [ZERO, E1]], [E1, E1, E1], [0, 0, 0])
    check = check_ray(problem, duals_for(problem, [4.0, 0.0, 4.0]))
    assert (check.valid, check.sequences) == (True, (0, 2))
    assert check.residual == 0.0
    assert check.value == pytest.approx(2.0)
    assert certify(problem, np.eye(2), duals_for(problem, [4.0, 0.0, 4.0])).lower_bound == math.inf


@pytest.mark.parametrize("weights", [[1.0, 1.0 + 1e-8], [1.0, 0.0], [0.0, 0.0], [-1.0, -1.0]])
def test_a_false_ray_is_refused(weights: list[float]) -> None:
    check = check_ray(opposite(), duals_for(opposite(), weights))
    assert not check.valid
    assert certify(opposite(), np.eye(2), duals_for(opposite(), weights)).lower_bound < math.inf


def test_a_combination_that_promises_nothing_is_no_ray() -> None:
    problem = select([[E1, ZERO], [ZERO, E1]], [E1, E1], [0, 0], offsets=np.array([[2.0, 0.0], [0.0, 0.0]]))
    # The rows cancel, but ask for -1 and 1: w = -1 satisfies both.
    assert not check_ray(problem, duals_for(problem, [1.0, 1.0])).valid
    assert certify(problem, [[-1.0, 0.0], [0.0, 0.0]], duals_for(problem, [1.0, 1.0])).feasible


def test_a_ray_may_use_ties_alone() -> None:
    problem = select([[E1, E1, ZERO]], [E1], [[[True, True, False]]], offsets=np.array([[0.0, 1.0, 0.0]]))
    ties = np.zeros((1, 1, 3))
    for sign in (1.0, -1.0):
        ties[0, 0, 1] = sign
        check = check_ray(problem, np.zeros((1, 1, 3)), ties)
        assert check.valid == (sign > 0)


# ------------------------------------------------------------------------------- bad input


def test_shapes_and_values_are_checked() -> None:
    problem = one_row()
    for W, duals, message in (
        (np.eye(3), np.zeros((1, 1, 2)), r"W must have shape \(2, 2\)"),
        (np.eye(2) * np.nan, np.zeros((1, 1, 2)), "W must be finite"),
        (np.eye(2), np.zeros((1, 2)), r"duals must have shape \(1, 1, 2\), got \(1, 2\)"),
        (np.eye(2), np.full((1, 1, 2), np.inf), "duals must be finite"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            certify(problem, W, duals)
    with pytest.raises(InvalidInputError, match="equality_duals must have shape"):
        certify(problem, np.eye(2), np.zeros((1, 1, 2)), np.zeros(3))
    with pytest.raises(InvalidInputError, match="certify: norm must be"):
        certify(problem, np.eye(2), np.zeros((1, 1, 2)), norm="spectral")  # type: ignore[arg-type]


def test_a_batch_is_certified_as_its_members_are(rng: np.random.Generator) -> None:
    X, Z, chosen = rng.normal(size=(5, 3, 4, 6)), rng.normal(size=(5, 3, 6)), rng.integers(4, size=(5, 3))
    batch = TokenSelection(X, Z, chosen)
    W, duals = rng.normal(size=(5, 6, 6)), rng.random((5, 3, 1, 4))
    W[0] = solve(batch[0]).W
    for norm, penalty, center in (
        ("fro", math.inf, None),
        ("nuc", 2.0, None),
        ("op", math.inf, W[1]),
        (1.0, 0.5, W[2]),
    ):
        all_at_once = certify(batch, W, duals, norm=norm, penalty=penalty, center=center)  # type: ignore[arg-type]
        for b in range(5):
            one = certify(batch[b], W[b], duals[b], norm=norm, penalty=penalty, center=center)  # type: ignore[arg-type]
            for name, value in vars(one).items():
                assert getattr(all_at_once, name)[b] == pytest.approx(value, rel=1e-12, nan_ok=True), name
    with pytest.raises(UnsupportedError, match="one problem at a time"):
        check_ray(batch, duals)


def test_the_soft_margin_by_hand() -> None:
    """One row <A, W> >= 1 of size 1 and price C: W = min(1, C) A, objective min(1/2, C - C^2/2)."""
    problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0])
    for C, size, value in ((4.0, 1.0, 0.5), (0.25, 0.25, 0.25 - 0.25**2 / 2)):
        proof = certify(problem, np.diag([size, 0.0]), duals_for(problem, [9.0 if C < 1 else 1.0]), penalty=C)
        assert proof.upper_bound == pytest.approx(value, rel=1e-15)
        assert proof.lower_bound == pytest.approx(value, rel=1e-15)
        assert proof.complementarity == pytest.approx(0.0, abs=1e-14)
        assert proof.scale == 1.0


def test_bounds_of_the_change_from_a_centre(rng: np.random.Generator) -> None:
    """With offsets X W0 z the change is a problem of its own; the certificate must say the same of both."""
    X, Z = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 5))
    W0, W, duals = rng.normal(size=(5, 5)), 9.0 * rng.normal(size=(5, 5)), rng.random((3, 1, 4))
    plain = TokenSelection(X, Z, [0, 1, 2])
    shifted = TokenSelection(X, Z, [0, 1, 2], offsets=np.asarray(plain.logits(W0)))
    for norm in ("fro", "nuc", 3.0):
        moved = certify(plain, W0 + W, duals, norm=norm, center=W0)  # type: ignore[arg-type]
        offset = certify(shifted, W, duals, norm=norm)  # type: ignore[arg-type]
        assert moved.lower_bound == pytest.approx(offset.lower_bound, rel=1e-12)
        assert moved.upper_bound == pytest.approx(offset.upper_bound, rel=1e-12)
        assert moved.smallest_margin == pytest.approx(offset.smallest_margin, rel=1e-10)


def test_reading_in_parts_changes_nothing(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    X, chosen = rng.normal(size=(7, 4, 5)), rng.random((7, 4, 4)) > 0.7
    problem = TokenSelection.sequence(X, chosen, causal=False, offsets=rng.normal(size=(7, 4, 4)))
    W, duals, ties = rng.normal(size=(5, 5)), rng.random((7, 4, 4)), rng.normal(size=(7, 4, 4))
    whole = certify(problem, W, duals, ties, penalty=3.0)
    monkeypatch.setattr(constraints.parts, "__kwdefaults__", {"part_bytes": 1, "double": False})
    assert len(list(constraints.parts(problem.tensors))) == 7
    apart = certify(problem, W, duals, ties, penalty=3.0)
    for name, value in vars(whole).items():
        assert getattr(apart, name) == pytest.approx(value, rel=1e-12, nan_ok=True), name


def test_float32_problems_are_certified_in_float64(rng: np.random.Generator) -> None:
    X, Z = rng.normal(size=(2, 3, 3)).astype(np.float32), rng.normal(size=(2, 3)).astype(np.float32)
    W, duals = rng.normal(size=(3, 3)), rng.random((2, 1, 3))
    single = certify(TokenSelection(X, Z, [0, 1]), W, duals)
    double = certify(TokenSelection(X.astype(float), Z.astype(float), [0, 1]), W, duals)
    assert single == double
