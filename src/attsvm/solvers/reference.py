"""The same problems in CVXPY, written down literally: slow, and the specification that the solvers are tested against.

Needs the extra ``[reference]``. Nothing here is shared with the solvers: the rows are built from the problem's
tensors, expanded to d x d, and handed over as one constraint matrix.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attsvm.errors import UnsupportedError
from attsvm.selection.norms import Norm, check_norm
from attsvm.selection.problem import TokenSelection

__all__ = ["ReferenceAnswer", "solve_reference"]

Floats = NDArray[np.float64]

_OPTIONS: dict[str, dict[str, Any]] = {
    "CLARABEL": {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-9, "tol_feas": 1e-9, "max_iter": 200},
    "SCS": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 200_000},
}


@dataclass(frozen=True, kw_only=True)
class ReferenceAnswer:
    """What the generic solver says.

    Attributes
    ----------
    W
        (d, d) float64; None when the solver returned no matrix.
    value
        Norm of W (of ``W - center``), for the soft margin half its square plus the price of the slack; +inf when the
        problem is infeasible, NaN when the solver gave up.
    status
        CVXPY's word: ``"optimal"``, ``"optimal_inaccurate"``, ``"infeasible"``, ...
    """

    W: Floats | None
    value: float
    status: str


def solve_reference(
    problem: TokenSelection,
    norm: Norm = "fro",
    *,
    penalty: float = math.inf,
    center: Any = None,
    solver: str | None = None,
) -> ReferenceAnswer:
    """Find the matrix of smallest norm that selects the given tokens, with CVXPY.

    Parameters
    ----------
    problem
        A single problem (index a batch first).
    norm
        ``"fro"``, ``"nuc"``, ``"op"`` or p >= 1 (entrywise).
    penalty
        Price of a unit of slack; inf for the hard margin.
    center
        (d, d) from which the change is measured; default 0.
    solver
        A solver that CVXPY knows. Default: ``"CLARABEL"``, with tolerances near 1e-9.

    Raises
    ------
    UnsupportedError
        If CVXPY is not installed, or for a batch.

    Notes
    -----
    d^2 variables and one dense row for each pair of a selected and a dropped token. Rows are divided by their size, and
    all right-hand sides by the largest one (W is multiplied by it at the end); neither changes anything but accuracy.
    """
    norm = check_norm(norm, where="solve_reference")
    if problem.is_batch:
        raise UnsupportedError("solve_reference: a batch is solved one problem at a time; pass problem[b].")
    try:
        import cvxpy
    except ImportError as error:
        raise UnsupportedError(
            "solve_reference: needs CVXPY, which is not installed. Install it with: pip install 'attsvm[reference]'."
        ) from error
    d = problem.shape[-1]
    W = cvxpy.Variable((d, d))
    flat = cvxpy.vec(W, order="C")
    middle = np.zeros((d, d)) if center is None else np.asarray(center, dtype=np.float64)
    margin_rows, required, sizes, pair = _margin_rows(problem)
    tie_rows, tied_to = _tie_rows(problem)
    required, tied_to = required - margin_rows @ middle.ravel(), tied_to - tie_rows @ middle.ravel()
    scale = max(np.abs(required).max(initial=0.0), np.abs(tied_to).max(initial=0.0)) or 1.0
    constraints, price = [], 0.0
    if len(required) and math.isinf(penalty):
        constraints.append(margin_rows @ flat >= required / scale)
    elif len(required):
        # One slack for each query and dropped token, however many tokens are selected.
        slack = cvxpy.Variable(int(pair.max()) + 1, nonneg=True)
        constraints.append(margin_rows @ flat + cvxpy.multiply(1.0 / sizes, slack[pair]) >= required / scale)
        price = penalty / scale * cvxpy.sum(slack)
    if len(tied_to):
        constraints.append(tie_rows @ flat == tied_to / scale)
    objective = _objective(cvxpy, W, flat, norm)
    if math.isfinite(penalty):
        objective = (objective if norm == "fro" else 0.5 * cvxpy.square(objective)) + price
    program = cvxpy.Problem(cvxpy.Minimize(objective), constraints)
    chosen = solver or "CLARABEL"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inaccuracy is in the status
            program.solve(solver=chosen, **_OPTIONS.get(chosen, {}))
    except cvxpy.SolverError:
        return ReferenceAnswer(W=None, value=math.nan, status="solver_error")
    status = str(program.status)
    if status.startswith("infeasible"):
        return ReferenceAnswer(W=None, value=math.inf, status=status)
    if W.value is None:
        return ReferenceAnswer(W=None, value=math.nan, status=status)
    found = scale * np.asarray(W.value, dtype=np.float64)
    value = _value(found, norm)
    if math.isfinite(penalty):
        value = scale**2 * float(program.value)
    return ReferenceAnswer(W=found + middle, value=value, status=status)


def _objective(cvxpy: Any, W: Any, flat: Any, norm: Norm) -> Any:
    """An increasing function of the norm; for ``"fro"`` half the square, which makes the program quadratic."""
    if norm == "fro":
        return 0.5 * cvxpy.sum_squares(W)
    if norm == "nuc":
        return cvxpy.normNuc(W)
    return cvxpy.sigma_max(W) if norm == "op" else cvxpy.pnorm(flat, norm)


def _value(W: Floats, norm: Norm) -> float:
    if isinstance(norm, str):
        order: Any = {"fro": "fro", "nuc": "nuc", "op": 2}[norm]
        return float(np.linalg.norm(W, order))
    return float(np.linalg.norm(W.ravel(), norm))


def _margin_rows(problem: TokenSelection) -> tuple[Floats, Floats, Floats, Any]:
    """``<row, W> >= required`` for each query, selected token a and token t that it must beat.

    (R, d * d), (R,), the sizes (R,) that the rows were divided by, and the number (R,) of the pair of query and t.
    """
    t = problem.tensors
    pairs = t.selected[..., :, None] & t.asked[..., None, :]
    sequence, query, own, other = pairs.nonzero().numpy(force=True).T
    margin = np.broadcast_to(t.margin.numpy(force=True), t.asked.shape)[sequence, query, other]
    _, pair = np.unique(np.stack([sequence, query, other]), axis=1, return_inverse=True)
    return *_rows(problem, sequence, query, own, other, margin), pair.ravel()


def _tie_rows(problem: TokenSelection) -> tuple[Floats, Floats]:
    """``<row, W> = required`` for each selected token that is not the first of its query."""
    t = problem.tensors
    sequence, query, other = t.selected.nonzero().numpy(force=True).T
    own = t.selected.numpy(force=True).argmax(-1)[sequence, query]
    later = own != other
    sequence, query, own, other = sequence[later], query[later], own[later], other[later]
    rows, required, _ = _rows(problem, sequence, query, own, other, np.zeros(len(other)))
    return rows, required


def _rows(
    problem: TokenSelection, sequence: Any, query: Any, own: Any, other: Any, value: Any
) -> tuple[Floats, Floats, Floats]:
    """Rows ``(x_own - x_other) z^T`` of unit size, what they are compared with (value less b_own - b_other), sizes."""
    t = problem.tensors
    X, Z = (array.numpy(force=True).astype(np.float64) for array in (t.tokens, t.queries))
    if t.offsets is not None:
        b = t.offsets.numpy(force=True).astype(np.float64)
        value = value - (b[sequence, query, own] - b[sequence, query, other])
    difference = X[sequence, own] - X[sequence, other]
    z = Z[sequence, query]
    size = np.linalg.norm(difference, axis=1) * np.linalg.norm(z, axis=1)
    size[size == 0.0] = 1.0
    rows = (difference / size[:, None])[:, :, None] * z[:, None, :]
    return rows.reshape(len(value), X.shape[-1] ** 2), np.asarray(value / size), size
