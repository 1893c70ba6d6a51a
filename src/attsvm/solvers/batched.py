"""Thousands of small problems at once: compiled solvers go through the batch, one certificate covers all of it.

What one problem costs alone is mostly the calls of its operations, not their arithmetic. Here a batch is read by a few
operations on all of it, then solved member by member in compiled code, where a problem stays in the cache, and judged
by one call of :func:`attsvm.certify`. A member does not see the others, so it gets the same answer alone and in any
batch. Members that are out of the ordinary, such as scales that float64 can hardly hold, are left to the solvers of
single problems.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attsvm.selection.certificate import RAY_TOLERANCE, Certificate, certify
from attsvm.selection.constraints import combine_rows, in_double, representatives, required, row_sizes, tied
from attsvm.selection.norms import Norm
from attsvm.selection.problem import TokenSelection
from attsvm.solvers.loop import Progress
from attsvm.solvers.rows import Floats, Ints
from attsvm.solvers.small_frobenius import FAILED, LIMIT, RAY, SOLVED, solve_frobenius
from attsvm.solvers.small_kernels import workspace
from attsvm.solvers.small_manifold import spectral_workspace
from attsvm.solvers.small_nuclear import solve_nuclear
from attsvm.solvers.solution import Ray, Solution, Status

__all__ = ["BatchOutcome", "batch_pays", "solve_batch"]

MAX_ROWS = {"fro": 256, "nuc": 96}
"""Rows of a member up to which its quadratic programs, with dense matrices of that size, are quick."""

MAX_DIMENSION = {"fro": 128, "nuc": 32}
"""Largest dimension of the tokens."""

ROUNDS = 2000
"""Rounds of pivoting (or steps) after which a member is given up, unless a limit is given."""

PART = 64
"""Members that are solved between two looks at the clock."""

_TIME = 10
_INTERRUPTED = 11
_STATUS = {
    SOLVED: Status.OPTIMAL,
    RAY: Status.INFEASIBLE,
    LIMIT: Status.ITERATION_LIMIT,
    FAILED: Status.ITERATION_LIMIT,
    _TIME: Status.TIME_LIMIT,
    _INTERRUPTED: Status.INTERRUPTED,
}


@dataclass(frozen=True, kw_only=True)
class BatchOutcome:
    """The answers to a batch of B problems.

    Attributes
    ----------
    W
        (B, d, d), scaled so that its rows hold; 0 where there is none.
    duals, equality_duals
        (B, n, Q, T), scaled to fit W.
    status
        How each problem ended.
    upper_bound, lower_bound, margin
        (B,), from the certificate.
    iterations
        (B,): rounds of pivoting, or steps of Newton's method.
    rays
        The checked proof of each infeasible problem, None for the others.
    pending
        Members that must be solved alone: nothing was found for them, or not to the tolerance, without a limit being
        the reason.
    """

    W: Floats
    duals: Floats
    equality_duals: Floats
    status: tuple[Status, ...]
    upper_bound: Floats
    lower_bound: Floats
    margin: Floats
    iterations: Ints
    rays: tuple[Ray | None, ...]
    pending: Ints

    def solution(
        self, problem: TokenSelection, *, norm: Norm, penalty: float, alone: dict[int, Solution], began: float
    ) -> Solution:
        """The answers as a Solution, with those of members that were solved ``alone`` put in their place."""
        W, duals, ties = self.W, self.duals, self.equality_duals
        numbers: dict[str, Any] = {
            "status": list(self.status),
            "upper_bound": self.upper_bound.tolist(),
            "lower_bound": self.lower_bound.tolist(),
            "margin": self.margin.tolist(),
            "iterations": self.iterations.tolist(),
            "ray": list(self.rays),
        }
        for b, one in alone.items():
            for mine, theirs in ((W, one.W), (duals, one.duals), (ties, one.equality_duals)):
                mine[b] = torch.as_tensor(theirs).detach().cpu().double().numpy()
            for name, values in numbers.items():
                values[b] = getattr(one, name)
        back = problem.kind.back
        return Solution(
            W=back(torch.from_numpy(W)),
            duals=back(torch.from_numpy(duals)),
            equality_duals=back(torch.from_numpy(ties)),
            support=back(torch.from_numpy(duals > 0)),
            **{name: tuple(values) for name, values in numbers.items()},
            norm=norm,
            penalty=penalty,
            seconds=time.monotonic() - began,
            method="batched",
        )


def batch_pays(problem: TokenSelection, norm: Norm, penalty: float) -> bool:
    """Whether the members of a batch are small enough, and the norm is one, to be solved together.

    Parameters
    ----------
    problem
        Any problem.
    norm
        ``"fro"``, or ``"nuc"`` with hard margin; the others are not solved together.
    penalty
        Price of a unit of slack.
    """
    if not problem.is_batch or norm not in MAX_ROWS or (norm == "nuc" and math.isfinite(penalty)):
        return False
    t = problem.tensors
    if 0 in t.selected.shape or t.tokens.shape[-1] > MAX_DIMENSION[norm]:
        return False
    return int((t.asked | t.selected).sum((-3, -2, -1)).max()) <= MAX_ROWS[norm]


def solve_batch(
    problem: TokenSelection,
    *,
    norm: Norm,
    penalty: float = math.inf,
    tol: float = 1e-6,
    max_seconds: float | None = None,
    max_iterations: int | None = None,
    progress: Progress | None = None,
) -> BatchOutcome:
    """Solve the problems of a batch together.

    Parameters
    ----------
    problem
        A batch for which :func:`batch_pays`.
    norm
        ``"fro"`` or ``"nuc"``.
    penalty
        Price of a unit of slack; inf for the hard margin, the only one for ``"nuc"``.
    tol
        Relative gap to reach.
    max_seconds
        Limit for the whole batch; members that were not begun by then end with TIME_LIMIT.
    max_iterations
        Limit for each member.
    progress
        Called with (iterations so far, part of the batch still to do).
    """
    work = _Work.read(problem, penalty)
    limit = ROUNDS if max_iterations is None else int(max_iterations)
    _run(work, norm, penalty, 0.9 * tol, limit, max_seconds, progress)
    shape = tuple(problem.tensors.selected.shape)
    duals, ties = work.duals.reshape(shape), work.ties.reshape(shape)
    rays = _rays(problem, work.code, duals, ties)
    empty = (work.code != SOLVED) & (work.code != LIMIT)
    duals[empty], ties[empty] = 0.0, 0.0
    proof = certify(problem, work.W, duals, ties, norm=norm, penalty=penalty)
    _settle(work.code, proof, rays, tol, limited=max_iterations is not None)
    infeasible = work.code == RAY
    scale = np.asarray(proof.scale)
    work.W *= scale[:, None, None]
    if norm == "fro" and math.isinf(penalty):
        duals *= scale[:, None, None, None]
        ties *= scale[:, None, None, None]
    return BatchOutcome(
        W=work.W,
        duals=duals,
        equality_duals=ties,
        status=tuple(map(_STATUS.__getitem__, work.code.tolist())),
        upper_bound=proof.upper_bound,
        lower_bound=np.where(infeasible, math.inf, proof.lower_bound),
        margin=proof.smallest_margin,
        iterations=work.rounds,
        rays=rays,
        pending=np.flatnonzero(work.code == FAILED),
    )


def _settle(code: Ints, proof: Certificate, rays: tuple[Ray | None, ...], tol: float, *, limited: bool) -> None:
    """What the judge says in place of what the solvers said, in ``code`` (B,)."""
    proven = np.asarray(proof.gap <= tol)
    code[proven & ((code == LIMIT) | (code == FAILED))] = SOLVED
    code[~proven & (code == SOLVED)] = FAILED
    if not limited:
        code[code == LIMIT] = FAILED
    refused = np.flatnonzero(code == RAY)
    code[[b for b in refused if rays[b] is None]] = FAILED


# ------------------------------------------------------------------------------------------------- the compiled part


@dataclass(kw_only=True)
class _Work:
    """What the compiled solvers read and write; members (axis 0) may be cut out."""

    problems: tuple[Any, ...]  # X, Z, asked, tie, first, rhs
    fixed: bool  # whether W must hold as it is
    exact: bool  # whether some rows must
    rows: int  # most rows of a member
    W: Floats  # (B, d, d)
    duals: Floats  # (B, n Q T)
    ties: Floats  # (B, n Q T)
    code: Ints  # (B,)
    rounds: Ints  # (B,)

    @classmethod
    def read(cls, problem: TokenSelection, penalty: float) -> _Work:
        """The whole batch as contiguous arrays, in float64."""
        t = problem.tensors
        double = in_double(t)
        tie = tied(t.selected)
        B, n, Q, T = t.selected.shape
        arrays = (double.tokens, double.queries, t.asked, tie, representatives(t.selected), required(double))
        d = t.tokens.shape[-1]
        rhs = arrays[-1]
        return cls(
            problems=tuple(np.ascontiguousarray(array.detach().cpu().numpy()) for array in arrays),
            fixed=t.offsets is not None,
            exact=t.offsets is not None or bool((tie | (t.asked & (rhs == 0))).any()),
            rows=int((t.asked | tie).sum((-3, -2, -1)).max()),
            W=np.zeros((B, d, d)),
            duals=np.zeros((B, n * Q * T)),
            ties=np.zeros((B, n * Q * T)),
            code=np.full(B, FAILED),
            rounds=np.zeros(B, dtype=np.int64),
        )

    def part(self, chosen: slice) -> tuple[Any, ...]:
        """The problems of some members, and where their answers go."""
        outputs = (self.W, self.duals, self.ties, self.code, self.rounds)
        return tuple(array[chosen] for array in self.problems), tuple(array[chosen] for array in outputs)


def _run(
    work: _Work,
    norm: Norm,
    penalty: float,
    tol: float,
    limit: int,
    seconds: float | None,
    progress: Progress | None,
) -> None:
    """Go through the batch in parts; at a limit of time or Ctrl-C the rest is left as it is."""
    began, B = time.monotonic(), len(work.code)
    n, d, Q = work.problems[0].shape[1], work.problems[0].shape[3], work.problems[1].shape[2]
    parts = [slice(begin, min(begin + PART, B)) for begin in range(0, B, PART)]

    def solver() -> Callable[[slice], slice]:
        """One with a workspace of its own."""
        room = workspace(work.rows, n * Q, d)
        spectral = spectral_workspace(work.rows, n * Q, d) if norm == "nuc" else None

        def run(chosen: slice) -> slice:
            problems, outputs = work.part(chosen)
            if spectral is None:
                solve_frobenius(problems, penalty, work.fixed, tol, limit, room, *outputs)
            else:
                solve_nuclear(problems, work.fixed, work.exact, tol, limit, spectral, room, *outputs)
            return chosen

        return run

    code = work.code
    code[:] = _TIME
    done = 0
    try:
        for chosen in _each(parts, solver):
            done += chosen.stop - chosen.start
            if progress is not None:
                progress(int(work.rounds.sum()), 1.0 - done / B)
            if seconds is not None and time.monotonic() - began > seconds:
                break
    except KeyboardInterrupt:
        code[code == _TIME] = _INTERRUPTED


def _each(parts: list[slice], solver: Callable[[], Callable[[slice], slice]]) -> Iterator[slice]:
    """Solve the parts, on as many threads as torch has, and yield each when it is done."""
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        run = solver()
        yield from map(run, parts)
        return
    runs = [solver() for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        # As many parts at a time as there are threads, each on a workspace of its own.
        for begin in range(0, len(parts), threads):
            yield from pool.map(lambda run, part: run(part), runs, parts[begin : begin + threads])


# --------------------------------------------------------------------------------------------------------------- rays


def _rays(problem: TokenSelection, code: Ints, duals: Floats, ties: Floats) -> tuple[Ray | None, ...]:
    """The rays that the judge's criterion accepts, for all members at once."""
    rays: list[Ray | None] = [None] * len(code)
    chosen = np.flatnonzero(code == RAY)
    if not chosen.size:
        return tuple(rays)
    index = torch.from_numpy(chosen)
    t = in_double(problem.tensors.cut(index.to(problem.tensors.tokens.device)))
    device = t.tokens.device
    margin = torch.where(t.asked.cpu(), torch.from_numpy(duals[chosen]), 0.0).clamp(min=0.0)
    tie = torch.where(tied(t.selected).cpu(), torch.from_numpy(ties[chosen]), 0.0)
    largest = torch.maximum(margin.amax((1, 2, 3)), tie.abs().amax((1, 2, 3))).clamp(min=1e-300)[:, None, None, None]
    margin, tie = margin / largest, tie / largest
    weights = (margin + tie).to(device)
    demands = weights * required(t)
    terms = (weights.abs() * row_sizes(t)).sum((1, 2, 3))
    size = torch.linalg.vector_norm(combine_rows(t, weights), dim=(-2, -1))
    residual = torch.where(terms > 0.0, size / terms, 0.0)
    valid = (residual <= RAY_TOLERANCE) & (demands.sum((1, 2, 3)) > RAY_TOLERANCE * demands.abs().sum((1, 2, 3)))
    named = (weights.abs().amax((-2, -1)) > RAY_TOLERANCE).cpu().numpy()
    back = problem.kind.back
    for k in valid.nonzero().flatten().tolist():
        rays[chosen[k]] = Ray(
            weights=back(margin[k]),
            equality_weights=back(tie[k]),
            sequences=tuple(np.flatnonzero(named[k]).tolist()),
            residual=float(residual[k]),
        )
    return tuple(rays)
