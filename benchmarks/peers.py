"""The peers, each in the formulation and with the options that suit it best; none is charged for preparing its input.

For the Frobenius norm the quadratic programs come in two forms: ``primal``, ``min ||w||^2 / 2`` over d^2 variables
with one dense row for each constraint, and ``gram``, its dual ``min l' G l / 2 - sum(l)`` over ``l >= 0`` with the
Gram matrix G of the rows. The second has a variable for each constraint and no dense constraint.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import cvxpy
import numpy as np
import piqp
import torch
from numpy.typing import NDArray
from sklearn.svm import LinearSVC
from torch import Tensor

from attsvm.selection import TokenSelection, certify
from benchmarks.harness import Answer, Peer
from benchmarks.problems import expanded_rows

__all__ = ["GradientPeer", "cvxpy_nuclear", "cvxpy_quadratic", "cvxpy_loop", "liblinear", "piqp_gram"]

Floats = NDArray[np.float64]
Form = Literal["primal", "gram"]

MANY = 10_000_000
"""More iterations than any of these runs can make: only accuracy or time ends them."""

OPTIONS: dict[str, Callable[[float, float], dict[str, Any]]] = {
    # faer factorises in blocks of columns, several times as fast as the default on dense matrices.
    "CLARABEL": lambda tol, limit: {
        "tol_gap_abs": tol,
        "tol_gap_rel": tol,
        "tol_feas": tol,
        "time_limit": limit,
        "direct_solve_method": "faer",
        "max_threads": 1,
    },
    "OSQP": lambda tol, limit: {"eps_abs": tol, "eps_rel": tol, "time_limit": limit, "max_iter": MANY},
    "SCS": lambda tol, limit: {"eps_abs": tol, "eps_rel": tol, "time_limit_secs": limit, "max_iters": MANY},
}
"""Options of CVXPY's solvers for a tolerance and a limit in seconds."""


def liblinear(problem: TokenSelection) -> Peer:
    """LIBLINEAR's dual coordinate descent, through scikit-learn, on the explicit d^2 features.

    A separator without intercept needs two classes: every second row is negated, half the rows of the usual trick of
    giving each row with both signs. C stands for the hard margin.
    """
    A, d = expanded_rows(problem), problem.shape[-1]
    signs = np.where(np.arange(len(A)) % 2 == 0, 1.0, -1.0)
    A *= signs[:, None]

    def peer(tol: float, limit: float) -> Answer:
        machine = LinearSVC(
            loss="hinge", dual=True, fit_intercept=False, C=1e6, tol=tol, max_iter=100_000, random_state=0
        )
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whether it converged is seen from the certificate
            machine.fit(A, signs)
        spent = time.perf_counter() - began
        steps = int(np.max(machine.n_iter_))
        status = "converged" if steps < machine.max_iter else "iteration limit"
        return Answer(W=machine.coef_.reshape(d, d), seconds=spent, iterations=steps, status=status)

    return peer


def piqp_gram(problem: TokenSelection) -> Peer:
    """PIQP's dense interior-point method on the dual with the Gram matrix of the rows."""
    A = expanded_rows(problem)
    G, d = A @ A.T, problem.shape[-1]

    def peer(tol: float, limit: float) -> Answer:
        solver = piqp.DenseSolver()
        for name in ("eps_abs", "eps_rel", "eps_duality_gap_abs", "eps_duality_gap_rel"):
            setattr(solver.settings, name, tol)
        began = time.perf_counter()
        solver.setup(G, -np.ones(len(A)), x_l=np.zeros(len(A)))
        status = solver.solve()
        spent = time.perf_counter() - began
        duals = np.maximum(solver.result.x, 0.0)
        return Answer(
            W=(duals @ A).reshape(d, d),
            duals=_as_duals(problem, duals),
            seconds=spent,
            iterations=int(solver.result.info.iter),
            status=status.name.removeprefix("PIQP_").lower(),
        )

    return peer


def cvxpy_quadratic(problem: TokenSelection, solver: str, form: Form = "gram") -> Peer:
    """CVXPY on a quadratic program; the time is that of the solver with its set-up, without CVXPY's compilation."""
    A, d = expanded_rows(problem), problem.shape[-1]
    if form == "primal":
        w = cvxpy.Variable(d * d)
        rows = A @ w >= 1.0
        program = cvxpy.Problem(cvxpy.Minimize(0.5 * cvxpy.sum_squares(w)), [rows])
        return _cvxpy(problem, program, solver, lambda: (w.value, rows.dual_value))
    multipliers = cvxpy.Variable(len(A), nonneg=True)
    square = cvxpy.quad_form(multipliers, cvxpy.psd_wrap(A @ A.T))
    program = cvxpy.Problem(cvxpy.Minimize(0.5 * square - cvxpy.sum(multipliers)))

    def found() -> tuple[Any, Any]:
        value = multipliers.value
        return (None, None) if value is None else (np.maximum(value, 0.0) @ A, value)

    return _cvxpy(problem, program, solver, found)


def cvxpy_nuclear(problem: TokenSelection, solver: str = "SCS") -> Peer:
    """CVXPY on the nuclear norm, all rows as one matrix; the time is that of the solver with its set-up."""
    A, d = expanded_rows(problem), problem.shape[-1]
    W = cvxpy.Variable((d, d))
    rows = A @ cvxpy.vec(W, order="C") >= 1.0
    program = cvxpy.Problem(cvxpy.Minimize(cvxpy.normNuc(W)), [rows])
    return _cvxpy(problem, program, solver, lambda: (W.value, rows.dual_value))


def _cvxpy(problem: TokenSelection, program: cvxpy.Problem, solver: str, found: Callable[[], tuple[Any, Any]]) -> Peer:
    """A CVXPY program as a peer; ``found`` reads matrix and multipliers from it."""
    d = problem.shape[-1]

    def peer(tol: float, limit: float) -> Answer:
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # accuracy is seen from the certificate
                # Otherwise CVXPY begins with the factors and the solution of the last run.
                program.solve(solver=solver, warm_start=False, **OPTIONS[solver](tol, limit))
        except cvxpy.SolverError:
            # Without any iterate when its time is up: all that is known is the wall time.
            spent = time.perf_counter() - began
            return Answer(W=None, seconds=spent, iterations=0, status="solver error", stopped=spent >= limit)
        stats = program.solver_stats
        spent = _solver_seconds(solver, stats)
        W, duals = found()
        return Answer(
            W=None if W is None else np.asarray(W).reshape(d, d),
            duals=None if duals is None else _as_duals(problem, duals),
            seconds=spent,
            iterations=int(stats.num_iters or 0),
            status=str(program.status),
            stopped=spent >= 0.98 * limit,
        )

    return peer


def _solver_seconds(solver: str, stats: Any) -> float:
    """Set-up and solution; Clarabel and OSQP count their set-up as part of the solution."""
    spent = float(stats.solve_time)
    return spent + float(stats.setup_time) if solver == "SCS" else spent


def _as_duals(problem: TokenSelection, values: Floats) -> Floats:
    """Multipliers of the expanded rows as (n, Q, T)."""
    duals = np.zeros(tuple(problem.tensors.selected.shape))
    duals[problem.tensors.asked.numpy()] = values
    return duals


def cvxpy_loop(
    problem: TokenSelection, solver: str, *, nuclear: bool, tol: float, once: bool
) -> tuple[list[Answer], float]:
    """Solve a batch of problems of one shape one by one.

    With ``once`` by one parametrised program that is compiled on the first; otherwise each by a program of its own, as
    a loop over problems is usually written.

    Returns the answers, whose seconds are the wall time of putting a problem in and of ``program.solve``, and the
    median time of the solver alone.
    """
    d = problem.shape[-1]
    W = cvxpy.Variable((d, d))
    objective = cvxpy.Minimize(cvxpy.normNuc(W) if nuclear else 0.5 * cvxpy.sum_squares(W))
    options = OPTIONS[solver](tol, 60.0)
    if solver == "CLARABEL":
        del options["direct_solve_method"]  # nothing to gain from blocks at this size

    def program_for(A: Any) -> cvxpy.Problem:
        return cvxpy.Problem(objective, [A @ cvxpy.vec(W, order="C") >= 1.0])

    rows = cvxpy.Parameter(expanded_rows(problem[0]).shape)
    program = program_for(rows)
    assert program.is_dpp()
    rows.value = expanded_rows(problem[0])
    program.solve(solver=solver, **options)
    answers, alone = [], []
    for b in range(len(problem)):
        expanded = expanded_rows(problem[b])
        began = time.perf_counter()
        if once:
            rows.value = expanded
        else:
            program = program_for(expanded)
        program.solve(solver=solver, **options)
        spent = time.perf_counter() - began
        alone.append(_solver_seconds(solver, program.solver_stats))
        steps = int(program.solver_stats.num_iters)
        answers.append(Answer(W=np.asarray(W.value), seconds=spent, iterations=steps, status=program.status))
    return answers, float(np.median(alone))


class GradientPeer:
    """Accelerated projected gradient with restarts on the dual, in torch, float64.

    Maximises ``sum(l) - ||sum(l A)||^2 / 2`` over ``l >= 0`` with steps 1 / L; momentum starts anew when it points the
    wrong way (O'Donoghue and Candes, 2015). A step costs two products with the token differences and two with the
    queries (n, d); neither the differences nor L are charged to it.
    """

    CHECK_EVERY = 50

    def __init__(self, problem: TokenSelection) -> None:
        t = problem.tensors
        self.problem = problem
        self.Z = t.queries[:, 0]
        own = t.tokens[torch.arange(len(t.tokens)), t.selected[:, 0].to(torch.int64).argmax(-1)]
        self.asked = t.asked[:, 0].to(torch.float64)
        self.D = (own[:, None] - t.tokens) * self.asked[..., None]
        self.step = 1.0 / (1.02 * self._lipschitz())

    def combine(self, weights: Tensor) -> Tensor:
        """``sum(l A)`` (d, d)."""
        return torch.bmm(weights[:, None, :], self.D)[:, 0].T @ self.Z

    def values(self, W: Tensor) -> Tensor:
        """``<A, W>`` (n, T)."""
        return torch.bmm(self.D, (self.Z @ W.T)[..., None])[..., 0]

    def _lipschitz(self) -> float:
        """Largest eigenvalue of the Gram matrix, by 100 steps of the power method."""
        weights, size = self.asked.clone(), 0.0
        for _ in range(100):
            weights = weights / weights.norm()
            weights = self.values(self.combine(weights))
            size = float(weights.norm())
        return size

    def __call__(self, tol: float, limit: float) -> Answer:
        """Run until the certified gap is ``tol``; the check, every 50 steps, is off the clock."""
        weights = ahead = torch.zeros_like(self.asked)
        momentum, spent, steps, gap = 1.0, 0.0, 0, math.inf
        while gap > tol and spent < limit:
            began = time.perf_counter()
            for _ in range(self.CHECK_EVERY):
                slope = self.asked - self.values(self.combine(ahead))
                new = (ahead + self.step * slope).clamp_(min=0.0)
                move = new - weights
                if torch.vdot((ahead - new).flatten(), move.flatten()) > 0:
                    momentum = 1.0
                longer = 0.5 + math.sqrt(0.25 + momentum**2)
                ahead = new + (momentum - 1.0) / longer * move
                weights, momentum = new, longer
            spent += time.perf_counter() - began
            steps += self.CHECK_EVERY
            W, duals = self.combine(weights).numpy(), weights[:, None].numpy()
            gap = float(certify(self.problem, W, duals).gap)
        status = "converged" if gap <= tol else "time limit"
        return Answer(W=W, duals=duals, seconds=spent, iterations=steps, status=status, stopped=gap > tol)
