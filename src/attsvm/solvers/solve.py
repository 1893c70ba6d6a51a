"""The entry point: check the request, choose the solver, certify what it returns."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any, Literal

import numpy as np
import torch

from attsvm.errors import InfeasibleError, InvalidInputError, NotConvergedError, UnsupportedError
from attsvm.selection.arrays import Array, as_float
from attsvm.selection.certificate import Certificate, certify, check_ray
from attsvm.selection.constraints import combine_rows, tied
from attsvm.selection.norms import Norm, check_norm, dual_norm
from attsvm.selection.problem import TokenSelection
from attsvm.solvers.frobenius import frobenius_iterates
from attsvm.solvers.loop import Outcome, Progress, run_loop
from attsvm.solvers.newton import MAX_WORKING_SET
from attsvm.solvers.primal_dual import nuclear_iterates
from attsvm.solvers.rows import Floats, Rows, compile_rows
from attsvm.solvers.solution import Ray, Solution, Status
from attsvm.solvers.splitting import splitting_iterates

__all__ = ["solve"]

Failure = Literal["raise", "warn", "ignore"]


def solve(
    problem: TokenSelection,
    norm: Norm = "fro",
    *,
    rank: int | None = None,
    penalty: float = math.inf,
    tol: float = 1e-6,
    max_seconds: float | None = None,
    max_iterations: int | None = None,
    method: str = "auto",
    center: Array | None = None,
    warm_start: Solution | None = None,
    on_failure: Failure = "raise",
    progress: Progress | None = None,
) -> Solution:
    r"""Find the key-query matrix of smallest norm that selects the given tokens.

    Solves, with $\alpha_i$ the selected token of query $i$,

    $$\min_W \|W\| \quad\text{s.t.}\quad (x_{i\alpha_i} - x_{it})^\top W z_i \ge 1
    \quad \text{for all } i \text{ and allowed } t \ne \alpha_i ,$$

    with the margins, offsets and ties of the problem where it has them.

    Parameters
    ----------
    problem
        The selection; a batch is solved one problem after the other. Not modified.
    norm
        ``"fro"`` (Frobenius) or ``"nuc"`` (nuclear).
    rank
        Bound on the rank of W. Void, and accepted, when it is not below the smaller of d and the number of queries.
    penalty
        inf for the hard margin.
    tol
        Stop when ``(upper_bound - lower_bound) / upper_bound`` is at most this. Must be > 0.
    max_seconds, max_iterations
        Limits; at a limit the best solution found so far is what counts.
    method
        ``"auto"``; for ``"fro"`` also ``"coordinate"`` (coordinate descent alone), for ``"nuc"`` also
        ``"primal-dual"`` and ``"splitting"``.
    center
        Not supported yet.
    warm_start
        A solution of a problem with the same shape, to begin from.
    on_failure
        What to do when the status is not OPTIMAL: ``"raise"`` an exception that carries the solution, ``"warn"``,
        or ``"ignore"``.
    progress
        Called with (iterations, gap) at every check.

    Returns
    -------
    Solution
        ``W`` (d, d), ``duals`` (n, Q, T), ``status``, bounds recomputed from them in float64. Arrays have the kind,
        dtype and device of the tokens; the work is done, and the bounds hold, in float64.

    Raises
    ------
    InfeasibleError
        If no ``W`` separates the selected tokens; carries the ray and the sequences that prove it.
    NotConvergedError
        If a limit or Ctrl-C came before the tolerance; carries the best solution found.
    InvalidInputError, UnsupportedError
        If an argument is not what it must be, or asks for what this version cannot do.

    Notes
    -----
    Frobenius: block dual coordinate descent, then a proximal Newton method on the rows that matter. Nuclear: the
    Frobenius solver first, to prove feasibility and to start from, then restarted primal-dual hybrid gradient with
    singular-value thresholding, or Douglas-Rachford splitting where few rows are active and nearly parallel. All work
    in span(token differences) x span(queries) when that is smaller.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898.

    Examples
    --------
    >>> solve(TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0])).W
    array([[1., 0.],
           [0., 0.]])
    """
    norm = _check_request(problem, norm, rank, penalty, tol, method, center, on_failure)
    _check_limits(max_seconds, max_iterations)
    began = time.monotonic()
    options: dict[str, Any] = {
        "norm": norm,
        "tol": tol,
        "max_seconds": max_seconds,
        "max_iterations": max_iterations,
        "method": method,
        "progress": progress,
    }
    if problem.is_batch:
        if warm_start is not None:
            raise UnsupportedError("solve: warm_start is not supported for a batch of problems.")
        solution = _stack([_solve_one(problem[b], warm_start=None, **options) for b in range(len(problem))], began)
    else:
        solution = _solve_one(problem, warm_start=warm_start, **options)
    return _report(solution, on_failure)


def _check_request(
    problem: Any, norm: Any, rank: Any, penalty: Any, tol: Any, method: Any, center: Any, on_failure: Any
) -> Norm:
    if not isinstance(problem, TokenSelection):
        raise InvalidInputError(f"solve: problem must be a TokenSelection, got {type(problem).__name__}.")
    checked = check_norm(norm, where="solve")
    if checked not in ("fro", "nuc"):
        raise UnsupportedError(f'solve: norm must be "fro" or "nuc" in this version, got {norm!r}.')
    if not (isinstance(penalty, (int, float)) and penalty > 0):
        raise InvalidInputError(f"solve: penalty must be > 0 (inf for the hard margin), got {penalty!r}.")
    if not math.isinf(penalty):
        raise UnsupportedError(f"solve: penalty must be inf in this version (hard margin), got {penalty}.")
    if not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise InvalidInputError(f"solve: tol must be in (0, 1), got {tol!r}.")
    if on_failure not in ("raise", "warn", "ignore"):
        raise InvalidInputError(f'solve: on_failure must be "raise", "warn" or "ignore", got {on_failure!r}.')
    methods = ("auto", "coordinate") if checked == "fro" else ("auto", "splitting", "primal-dual")
    if method not in methods:
        raise InvalidInputError(f"solve: method must be one of {', '.join(methods)} for this norm, got {method!r}.")
    if center is not None:
        raise UnsupportedError("solve: center is not supported in this version.")
    n, Q, _, d = problem.shape
    if rank is not None:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise InvalidInputError(f"solve: rank must be an integer >= 1, got {rank!r}.")
        if rank < min(n * Q, d):
            raise UnsupportedError(
                f"solve: rank must be at least min(queries, d) = {min(n * Q, d)} in this version, got {rank}."
            )
    return checked


def _check_limits(max_seconds: Any, max_iterations: Any) -> None:
    for name, value in (("max_seconds", max_seconds), ("max_iterations", max_iterations)):
        if value is not None and not (isinstance(value, (int, float)) and value >= 0):
            raise InvalidInputError(f"solve: {name} must be >= 0 or None, got {value!r}.")


def _solve_one(
    problem: TokenSelection,
    *,
    norm: Norm,
    tol: float,
    max_seconds: float | None,
    max_iterations: int | None,
    method: str,
    warm_start: Solution | None,
    progress: Progress | None,
) -> Solution:
    began = time.monotonic()
    rows = compile_rows(problem)
    if rows.broken.size or _asks_nothing(rows):
        return _trivial(problem, rows, norm, began)
    start, W_start = _warm(rows, problem, warm_start)

    def left() -> float | None:
        return None if max_seconds is None else max(0.0, max_seconds - (time.monotonic() - began))

    if norm == "fro":
        name = "coordinate" if method == "coordinate" else "coordinate+newton"
        outcome = run_loop(
            rows,
            frobenius_iterates(rows, start=start, method=method),
            norm=norm,
            tol=0.9 * tol,
            max_seconds=left(),
            max_iterations=max_iterations,
            progress=progress,
        )
        return _finish(problem, rows, outcome, norm, tol, name, began)
    # Feasibility does not depend on the norm, and the Frobenius solver settles it fastest.
    outcome = run_loop(
        rows,
        frobenius_iterates(rows, start=None if W_start is not None else start),
        norm="fro",
        tol=1e-2,
        max_seconds=left(),
        max_iterations=max_iterations,
    )
    if outcome.status is not Status.OPTIMAL:
        return _finish(problem, rows, outcome, norm, tol, "coordinate+newton", began)
    W0 = outcome.W if W_start is None else W_start
    dual0 = outcome.dual if start is None else start
    iterates = {"splitting": splitting_iterates, "primal-dual": nuclear_iterates}
    name = _nuclear_method(rows, dual0) if method == "auto" else method
    nuclear = run_loop(
        rows,
        iterates[name](rows, W=W0, dual=dual0),
        norm=norm,
        tol=0.9 * tol,
        max_seconds=left(),
        max_iterations=max_iterations,
        progress=progress,
    )
    return _finish(problem, rows, nuclear, norm, tol, name, began)


def _nuclear_method(rows: Rows, dual: Floats) -> str:
    """Splitting where the factorisation of its working set is cheap beside the steps that it saves."""
    p, q = rows.tokens.shape[2], rows.queries.shape[1]
    members = 1.5 * float((dual != 0).sum())
    spectrum = 20.0 * p * q * min(p, q)
    splitting = members**3 / 3.0 + spectrum
    primal_dual = 8.0 * rows.n_rows * p + spectrum
    return "splitting" if members <= MAX_WORKING_SET and splitting <= 40.0 * primal_dual else "primal-dual"


def _asks_nothing(rows: Rows) -> bool:
    """Whether W = 0 satisfies every row."""
    return bool(np.all(np.where(rows.tie, rows.rhs == 0.0, rows.rhs <= 0.0)))


def _warm(rows: Rows, problem: TokenSelection, warm: Solution | None) -> tuple[Floats | None, Floats | None]:
    """Multipliers (R,) and matrix (p, q) of an earlier solution, if there is one."""
    if warm is None:
        return None, None
    shape = tuple(problem.tensors.selected.shape)
    duals = as_float(warm.duals, "warm_start.duals", where="solve").cpu().double().numpy()
    if duals.shape != shape:
        raise InvalidInputError(f"solve: warm_start must have duals of shape {shape}, got {duals.shape}.")
    ties = as_float(warm.equality_duals, "warm_start.equality_duals", where="solve").cpu().double().numpy()
    W = as_float(warm.W, "warm_start.W", where="solve").cpu().double().numpy()
    start, matrix = rows.gather(duals, ties), rows.reduce(W)
    # An empty solution, such as an early interrupt leaves, is no place to begin.
    return (start, matrix) if np.any(start) and np.any(matrix) else (None, None)


def _finish(
    problem: TokenSelection, rows: Rows, outcome: Outcome, norm: Norm, tol: float, method: str, began: float
) -> Solution:
    """Certify in float64, from W and duals alone, and put the answer into the user's kind."""
    W = rows.expand(outcome.W)
    duals, ties = rows.scatter(outcome.dual, ties=False), rows.scatter(outcome.dual, ties=True)
    ray = None
    if outcome.ray is not None:
        ray = _ray(problem, rows.scatter(outcome.ray, ties=False), rows.scatter(outcome.ray, ties=True))
    proof = certify(problem, W, duals, ties, norm=norm)
    status = outcome.status
    if status is Status.OPTIMAL and not proof.gap <= tol:
        status = Status.ITERATION_LIMIT
    if status in (Status.ITERATION_LIMIT, Status.TIME_LIMIT) and proof.gap <= tol:
        status = Status.OPTIMAL
    if status is Status.INFEASIBLE and ray is None:
        status = Status.ITERATION_LIMIT
    factor = _fit_duals(problem, duals + ties, norm, proof)
    return _solution(
        problem,
        proof.scale * W,
        factor * duals,
        factor * ties,
        proof=proof,
        status=status,
        norm=norm,
        iterations=outcome.iterations,
        seconds=time.monotonic() - began,
        method=method,
        ray=ray,
        history=tuple(outcome.history),
    )


def _fit_duals(problem: TokenSelection, weights: Floats, norm: Norm, proof: Certificate) -> float:
    """The factor that makes the duals fit W: ``W = G`` for Frobenius, dual norm 1 for the others."""
    if not (math.isfinite(proof.lower_bound) and proof.lower_bound > 0):
        return 1.0
    t = problem.tensors
    t = t._replace(tokens=t.tokens.double(), queries=t.queries.double())
    slope = dual_norm(combine_rows(t, torch.from_numpy(weights).to(t.tokens.device)), norm)
    wanted = proof.upper_bound if norm == "fro" and math.isfinite(proof.upper_bound) else 1.0
    return wanted / slope


def _ray(problem: TokenSelection, weights: Floats, ties: Floats) -> Ray | None:
    """The checked ray, or None when the check refuses it."""
    largest = max(float(np.abs(weights).max()), float(np.abs(ties).max()))
    weights, ties = weights / largest, ties / largest
    check = check_ray(problem, weights, ties)
    if not check.valid:
        return None
    back = problem.kind.back
    return Ray(
        weights=back(torch.from_numpy(weights)),
        equality_weights=back(torch.from_numpy(ties)),
        sequences=check.sequences,
        residual=check.residual,
    )


def _trivial(problem: TokenSelection, rows: Rows, norm: Norm, began: float) -> Solution:
    """Problems settled without a solver: a row that no W can satisfy, or W = 0 satisfies all."""
    d = problem.shape[-1]
    zero = np.zeros(rows.shape)
    ray = None
    if rows.broken.size:
        weights, ties = zero.copy(), zero.copy()
        place = tuple(rows.broken[:, 0])
        is_tie = bool(tied(problem.tensors.selected)[place])
        (ties if is_tie else weights)[place] = 1.0
        ray = _ray(problem, weights, ties)
        if ray is None and is_tie:
            ties[place] = -1.0
            ray = _ray(problem, weights, ties)
    return _solution(
        problem,
        np.zeros((d, d)),
        zero,
        zero,
        proof=certify(problem, np.zeros((d, d)), zero, zero, norm=norm),
        status=Status.OPTIMAL if ray is None else Status.INFEASIBLE,
        norm=norm,
        iterations=0,
        seconds=time.monotonic() - began,
        method="none needed",
        ray=ray,
        history=(),
    )


def _solution(
    problem: TokenSelection, W: Floats, duals: Floats, ties: Floats, *, proof: Certificate, **others: Any
) -> Solution:
    back = problem.kind.back
    infeasible = others["status"] is Status.INFEASIBLE
    return Solution(
        W=back(torch.from_numpy(W)),
        upper_bound=proof.upper_bound,
        lower_bound=math.inf if infeasible else proof.lower_bound,
        duals=back(torch.from_numpy(duals)),
        equality_duals=back(torch.from_numpy(ties)),
        support=back(torch.from_numpy(duals > 0)),
        margin=proof.smallest_margin,
        **others,
    )


def _stack(solutions: list[Solution], began: float) -> Solution:
    """Solutions of a batch as one: arrays stacked, numbers as tuples."""
    first = solutions[0]
    join = torch.stack if isinstance(first.W, torch.Tensor) else np.stack

    def each(name: str) -> tuple[Any, ...]:
        return tuple(getattr(solution, name) for solution in solutions)

    arrays = {name: join(each(name)) for name in ("W", "duals", "equality_duals", "support")}
    numbers = {name: each(name) for name in ("status", "upper_bound", "lower_bound", "margin", "iterations", "ray")}
    return Solution(
        **arrays, **numbers, norm=first.norm, seconds=time.monotonic() - began, method=first.method, history=()
    )


def _report(solution: Solution, on_failure: Failure) -> Solution:
    """Raise or warn unless every status is OPTIMAL."""
    statuses = solution.status if isinstance(solution.status, tuple) else (solution.status,)
    failed = [index for index, status in enumerate(statuses) if status is not Status.OPTIMAL]
    if not failed or on_failure == "ignore":
        return solution
    index = failed[0]
    where = f"problem {index} of the batch: " if len(statuses) > 1 else ""
    ray = solution.ray[index] if isinstance(solution.ray, tuple) else solution.ray
    message = f"solve: {where}{statuses[index].sentence}"
    if ray is not None:
        named = ", ".join(map(str, ray.sequences[:10])) + (", ..." if len(ray.sequences) > 10 else "")
        message += f" Sequences in the proof: {named}."
    else:
        gap = solution.gap[index] if isinstance(solution.gap, tuple) else solution.gap
        message += f" The gap reached is {gap:.2e}."
    if on_failure == "warn":
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return solution
    if statuses[index] is Status.INFEASIBLE:
        raise InfeasibleError(message, solution)
    raise NotConvergedError(message, solution)
