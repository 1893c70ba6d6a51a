"""The entry point: check the request, choose the solver, certify what it returns."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from attsvm.errors import InfeasibleError, InvalidInputError, NotConvergedError, UnsupportedError
from attsvm.selection.arrays import Array, as_float
from attsvm.selection.norms import Norm
from attsvm.selection.problem import TokenSelection
from attsvm.solvers.batched import batch_pays, solve_batch
from attsvm.solvers.finish import finished, stacked, trivial
from attsvm.solvers.frobenius import frobenius_iterates
from attsvm.solvers.loop import Iterate, Limits, Outcome, Progress, drive
from attsvm.solvers.low_rank import low_rank
from attsvm.solvers.manifold import finished as with_newton
from attsvm.solvers.norms import method_for, norm_iterates, step_cost
from attsvm.solvers.request import Request
from attsvm.solvers.rows import Floats, Rows, compile_rows
from attsvm.solvers.solution import Solution, Status
from attsvm.solvers.suspects import watched
from attsvm.solvers.view import RowView

__all__ = ["Failure", "reported", "solve"]

Failure = Literal["raise", "warn", "ignore"]

CHECKPOINT_SECONDS = 15.0
"""Time between two calls of ``checkpoint``."""


def solve(
    problem: TokenSelection,
    norm: Norm = "fro",
    *,
    rank: int | None = None,
    penalty: float = math.inf,
    tol: float = 1e-6,
    max_seconds: float | None = None,
    max_iterations: int | None = None,
    max_bytes: int | None = None,
    method: str = "auto",
    center: Array | None = None,
    warm_start: Solution | None = None,
    on_failure: Failure = "raise",
    progress: Progress | None = None,
    checkpoint: Callable[[Solution], None] | None = None,
    process_group: Any = None,
) -> Solution:
    r"""Find the key-query matrix of smallest norm that selects the given tokens.

    Solves, with $\alpha_i$ the selected token of query $i$,

    $$\min_W \|W\| \quad\text{s.t.}\quad (x_{i\alpha_i} - x_{it})^\top W z_i \ge 1
    \quad \text{for all } i \text{ and allowed } t \ne \alpha_i ,$$

    with the margins, offsets and ties of the problem where it has them; with a finite penalty C the soft margin

    $$\min_{W,\, \xi \ge 0} \tfrac12 \|W\|^2 + C \sum \xi_{it} \quad\text{s.t.}\quad
    (x_{i\alpha_i} - x_{it})^\top W z_i \ge 1 - \xi_{it} .$$

    Parameters
    ----------
    problem
        The selection. A batch of B problems gives B answers; small ones are solved together. Not modified.
    norm
        ``"fro"`` (Frobenius), ``"nuc"`` (nuclear), ``"op"`` (largest singular value), or p >= 1, inf included, for
        the entrywise l_p norm.
    rank
        Bound on the rank of W, for ``"nuc"``. Below the rank of the minimiser the problem is not convex: the best
        matrix found is returned, with the lower bound of the convex problem and the status LOCAL. With a centre it is
        the rank of the change.
    penalty
        Price C of a unit of slack; inf for the hard margin. Ties inside selected sets have no slack.
    tol
        Stop when ``(upper_bound - lower_bound) / upper_bound`` is at most this. Must be > 0.
    max_seconds, max_iterations
        Limits; at a limit the best solution found so far is what counts.
    max_bytes
        Memory that the solver may use for its matrices, beyond the problem itself. Default: 1.5 GiB.
    method
        ``"auto"``; for ``"fro"`` also ``"coordinate"`` (coordinate descent alone) and ``"newton"``, for the others
        ``"newton"``, ``"splitting"`` and ``"primal-dual"``.
    center
        (d, d): minimise ``||W - center||`` instead, the smallest change of a given matrix.
    warm_start
        A solution of a problem with the same shape, to begin from.
    on_failure
        What to do when the status is not OPTIMAL: ``"raise"`` an exception that carries the solution, ``"warn"``,
        or ``"ignore"``. LOCAL is no failure.
    progress
        Called with (iterations, gap) at every check.
    checkpoint
        Called with the best solution so far about every 15 seconds; ``warm_start`` takes it.
    process_group
        A ``torch.distributed`` group. Every process passes its own sequences and the same other arguments; all get
        the same W, bounds and status, and the duals of their own sequences.

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
    Frobenius: block dual coordinate descent, then a semismooth Newton method on the multipliers. Other norms: the
    Frobenius solver first, to prove feasibility and to start from, then restarted primal-dual hybrid gradient with
    the norm's proximal map, Douglas-Rachford splitting, or a proximal Newton method, whichever counted operations
    favour. All but l_p work in span(token differences) x span(queries) when that is smaller. Tokens on a CUDA device
    are solved there for the Frobenius norm.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898.
    Julistiono, Tarzanagh, Azizan. "Optimizing Attention with Mirror Descent", 2024. arXiv:2410.14581 (l_p norms).

    Examples
    --------
    >>> solve(TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0])).W
    array([[1., 0.],
           [0., 0.]])
    """
    request = Request.checked(
        problem,
        norm=norm,
        rank=rank,
        penalty=penalty,
        tol=tol,
        max_seconds=max_seconds,
        max_iterations=max_iterations,
        max_bytes=max_bytes,
        method=method,
        center=center,
        warm_start=warm_start,
        progress=progress,
        checkpoint=checkpoint,
        group=process_group,
    )
    if on_failure not in ("raise", "warn", "ignore"):
        raise InvalidInputError(f'solve: on_failure must be "raise", "warn" or "ignore", got {on_failure!r}.')
    solution = _solve_batch(problem, request) if problem.is_batch else _solve_one(problem, request)
    return reported(solution, on_failure)


def _solve_batch(problem: TokenSelection, request: Request) -> Solution:
    """The problems of a batch."""
    for name in ("warm_start", "checkpoint", "group"):
        if getattr(request, name) is not None:
            argument = "process_group" if name == "group" else name
            raise UnsupportedError(f"solve: {argument} is not supported for a batch of problems.")
    began, interrupted = time.monotonic(), False

    def alone(b: int) -> Solution:
        nonlocal interrupted
        one = dataclasses.replace(request, max_seconds=0.0 if interrupted else _left(request, began))
        if request.center is not None and request.center.ndim == 3:
            one = dataclasses.replace(one, center=request.center[b])
        solution = _solve_one(problem[b], one)
        if interrupted and solution.status is Status.TIME_LIMIT:
            solution = dataclasses.replace(solution, status=Status.INTERRUPTED)
        interrupted |= solution.status is Status.INTERRUPTED
        return solution

    norm, penalty = request.norm, request.penalty
    plain = request.center is None and request.rank is None and request.method == "auto"
    if not (plain and batch_pays(problem, norm, penalty)):
        return stacked([alone(b) for b in range(len(problem))], began)
    outcome = solve_batch(
        problem,
        norm=norm,
        penalty=penalty,
        tol=request.tol,
        max_seconds=request.max_seconds,
        max_iterations=request.max_iterations,
        progress=request.progress,
    )
    rest = {int(b): alone(int(b)) for b in outcome.pending}
    return outcome.solution(problem, norm=norm, penalty=penalty, alone=rest, began=began)


def _left(request: Request, began: float) -> float | None:
    """Seconds left of the limit."""
    if request.max_seconds is None:
        return None
    return max(0.0, request.max_seconds - (time.monotonic() - began))


def _solve_one(problem: TokenSelection, request: Request) -> Solution:
    began = time.monotonic()
    # The l_p norms depend on the basis; with several processes all must have the same one.
    reduce = isinstance(request.norm, str) and request.group is None
    rows = compile_rows(problem, reduce=reduce, penalty=request.penalty, center=request.center)
    view = RowView(rows=rows, group=request.group)
    if view.total(float(rows.fatal.sum() + (not _asks_nothing(rows)))) == 0 or view.total(float(rows.fatal.sum())) > 0:
        return trivial(problem, view, request, began=began)
    start, W_start = _warm(view, problem, request)
    work = _Work(problem=problem, view=view, request=request, began=began)
    if request.norm == "fro":
        return work.finish(*work.frobenius(start, tol=0.9 * request.tol, last=True))
    # Feasibility does not depend on the norm, and the Frobenius solver settles it fastest.
    outcome, name = work.frobenius(None if W_start is not None else start, tol=1e-2, last=False)
    if outcome.status is not Status.OPTIMAL:
        return work.finish(*work.rank_bound(outcome, name))
    W0, dual0 = (outcome.W, outcome.dual) if W_start is None or start is None else (W_start, start)
    return work.finish(*work.rank_bound(*work.other_norm(W0, dual0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """One problem while it is being solved."""

    problem: TokenSelection
    view: RowView
    request: Request
    began: float

    def frobenius(self, start: Floats | None, *, tol: float, last: bool) -> tuple[Outcome, str]:
        """The Frobenius-norm problem and the name of the method; ``last`` unless another norm follows."""
        method = self.request.method if last else "auto"
        device = self.problem.tensors.tokens.device
        device = device if device.type == "cuda" else torch.device("cpu")  # elsewhere there is no float64
        if self.request.group is not None or device.type != "cpu":
            method = "newton"
        name = {"coordinate": "coordinate", "newton": "newton"}.get(method, "coordinate+newton")
        iterates = frobenius_iterates(
            self.view.rows,
            start=start,
            method=method,
            max_bytes=self.request.max_bytes,
            device=device,
            group=self.request.group,
        )
        if not self.request.is_soft:
            iterates = watched(iterates, self.view.rows, frobenius_iterates)
        return self._drive(iterates, "fro", tol, name, last=last), name

    def other_norm(self, W: Floats, dual: Floats) -> tuple[Outcome, str]:
        """The problem in the norm asked for, from a feasible matrix and multipliers."""
        rows, norm, group = self.view.rows, self.request.norm, self.request.group
        name = self.request.method
        automatic = name == "auto"
        if automatic:
            name = "primal-dual" if group is not None else method_for(rows, dual, norm)
        steps = norm_iterates(rows, norm, W=W, dual=dual, method=name, group=group)
        if automatic and norm == "nuc" and group is None and not self.request.is_soft:
            steps = with_newton(steps, rows, step_cost=step_cost(rows, dual, name), W=W, dual=dual)
            name += "+newton"
        tol = 0.9 * self.request.tol
        if self.request.rank is not None:  # what is below the tolerance would count as rank
            tol = min(0.3 * tol, 1e-7)
        return self._drive(steps, norm, tol, name, last=True), name

    def rank_bound(self, outcome: Outcome, name: str) -> tuple[Outcome, str]:
        """The best matrix of at most the rank asked for, from the answer without that bound."""
        rank = self.request.rank
        sizes = np.linalg.svd(outcome.W, compute_uv=False)
        if rank is None or not np.any(sizes[rank:] > 1e-12 * sizes[:1]):
            return outcome, name
        limits = self._limits(name, last=True)
        bound = low_rank(
            self.view.rows, W=outcome.W, dual=outcome.dual, rank=rank, tol=0.9 * self.request.tol, limits=limits
        )
        bound.iterations += outcome.iterations
        if outcome.status is Status.INTERRUPTED:
            bound.status = Status.INTERRUPTED
        return bound, f"{name}+low-rank"

    def finish(self, outcome: Outcome, method: str) -> Solution:
        """The answer."""
        return finished(self.problem, self.view, outcome, self.request, method=method, began=self.began)

    def _drive(self, iterates: Iterator[Iterate], norm: Norm, tol: float, method: str, *, last: bool) -> Outcome:
        return drive(self.view, iterates, norm=norm, tol=tol, limits=self._limits(method, last=last))

    def _limits(self, method: str, *, last: bool) -> Limits:
        request = self.request
        return Limits(
            seconds=request.max_seconds,
            iterations=request.max_iterations,
            began=self.began,
            progress=request.progress if last else None,
            keep=self._keeper(method) if request.checkpoint is not None and last else None,
        )

    def _keeper(self, method: str) -> Callable[[Outcome], None]:
        """Hands the best so far to ``checkpoint`` now and then."""
        told = time.monotonic()

        def keep(best: Outcome) -> None:
            nonlocal told
            if self.view.most(time.monotonic() - told) > CHECKPOINT_SECONDS:
                assert self.request.checkpoint is not None
                self.request.checkpoint(self.finish(dataclasses.replace(best, status=Status.INTERRUPTED), method))
                told = time.monotonic()

        return keep


def _asks_nothing(rows: Rows) -> bool:
    """Whether W = 0 satisfies every row."""
    return bool(np.all(np.where(rows.tie, rows.rhs == 0.0, rows.rhs <= 0.0)))


def _warm(view: RowView, problem: TokenSelection, request: Request) -> tuple[Floats | None, Floats | None]:
    """Multipliers (R,) and matrix (p, q) of an earlier solution, if there is one."""
    warm, rows = request.warm_start, view.rows
    if warm is None:
        return None, None
    shape = tuple(problem.tensors.selected.shape)
    duals = as_float(warm.duals, "warm_start.duals", where="solve").cpu().double().numpy()
    if duals.shape != shape:
        raise InvalidInputError(f"solve: warm_start must have duals of shape {shape}, got {duals.shape}.")
    ties = as_float(warm.equality_duals, "warm_start.equality_duals", where="solve").cpu().double().numpy()
    W = as_float(warm.W, "warm_start.W", where="solve").cpu().double().numpy()
    start = np.where(rows.tie, rows.gather(duals, ties), np.minimum(rows.gather(duals, ties), request.penalty))
    matrix = rows.reduce(W if request.center is None else W - request.center)
    # An empty solution, such as an early interrupt leaves, is no place to begin.
    useful = view.total(float(np.any(start))) > 0 and bool(np.any(matrix))
    return (start, matrix) if useful else (None, None)


def reported(solution: Solution, on_failure: Failure, *, where: str = "solve: ", carried: Any = None) -> Solution:
    """Raise or warn unless every status is OPTIMAL or LOCAL; the exception carries ``carried``, or the solution."""
    statuses = solution.status if isinstance(solution.status, tuple) else (solution.status,)
    failed = [index for index, status in enumerate(statuses) if status not in (Status.OPTIMAL, Status.LOCAL)]
    if not failed or on_failure == "ignore":
        return solution
    index = failed[0]
    place = f"problem {index} of the batch: " if len(statuses) > 1 else ""
    ray = solution.ray[index] if isinstance(solution.ray, tuple) else solution.ray
    message = f"{where}{place}{statuses[index].sentence}"
    if ray is not None:
        named = ", ".join(map(str, ray.sequences[:10])) + (", ..." if len(ray.sequences) > 10 else "")
        message += f" Sequences in the proof: {named}."
    else:
        gap = solution.gap[index] if isinstance(solution.gap, tuple) else solution.gap
        if math.isinf(gap) and solution.method.endswith("low-rank"):
            message += " No matrix of the rank asked for was found that satisfies every row; one may exist."
        else:
            message += f" The gap reached is {gap:.2e}."
    if on_failure == "warn":
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return solution
    kind = InfeasibleError if statuses[index] is Status.INFEASIBLE else NotConvergedError
    raise kind(message, solution if carried is None else carried)
