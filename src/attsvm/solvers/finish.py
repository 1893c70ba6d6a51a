"""From what a solver found to the answer: certified in float64, in the user's kind of arrays."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from attsvm.selection.certificate import Certificate, certify, check_ray
from attsvm.selection.norms import Norm, dual_norm
from attsvm.selection.problem import TokenSelection
from attsvm.solvers.loop import Outcome
from attsvm.solvers.request import Request
from attsvm.solvers.rows import Floats
from attsvm.solvers.solution import Ray, Solution, Status
from attsvm.solvers.view import RowView

__all__ = ["finished", "stacked", "trivial"]


def finished(
    problem: TokenSelection, view: RowView, outcome: Outcome, request: Request, *, method: str, began: float
) -> Solution:
    """Certify an outcome in float64, from W and duals alone, and put the answer into the user's kind."""
    rows, norm, tol = view.rows, request.norm, request.tol
    change = rows.expand(outcome.W)
    W = change if request.center is None else request.center + change
    duals, ties = rows.scatter(outcome.dual, ties=False), rows.scatter(outcome.dual, ties=True)
    if request.is_soft and rows.broken.size:
        # Rows that no W can serve pay for their whole slack, and their multipliers say so.
        duals[tuple(rows.broken)] = request.penalty
    ray = None
    if outcome.ray is not None:
        ray = _ray(problem, rows.scatter(outcome.ray, ties=False), rows.scatter(outcome.ray, ties=True), request, view)
    proof = certify(
        problem, W, duals, ties, norm=norm, penalty=request.penalty, center=request.center, group=view.group
    )
    status = outcome.status
    if status is Status.OPTIMAL and not proof.gap <= tol:
        status = Status.ITERATION_LIMIT
    if status in (Status.ITERATION_LIMIT, Status.TIME_LIMIT) and proof.gap <= tol:
        status = Status.OPTIMAL
    if status is Status.INFEASIBLE and ray is None:
        status = Status.ITERATION_LIMIT
    factor = 1.0 if request.is_soft else _fit_duals(view, outcome.dual, norm, proof)
    return _solution(
        problem,
        proof.scale * W,
        factor * duals,
        factor * ties,
        proof=proof,
        status=status,
        norm=norm,
        penalty=request.penalty,
        iterations=outcome.iterations,
        seconds=time.monotonic() - began,
        method=method,
        ray=ray,
        history=tuple(outcome.history),
    )


def _fit_duals(view: RowView, dual: Floats, norm: Norm, proof: Certificate) -> float:
    """The factor that makes the duals fit W: ``W = G`` for Frobenius, dual norm 1 for the others."""
    if not (math.isfinite(proof.lower_bound) and proof.lower_bound > 0):
        return 1.0
    slope = dual_norm(torch.from_numpy(view.combine(dual)), norm)
    wanted = proof.upper_bound if norm == "fro" and math.isfinite(proof.upper_bound) else 1.0
    return wanted / slope if slope > 0 else 1.0


def _ray(problem: TokenSelection, weights: Floats, ties: Floats, request: Request, view: RowView) -> Ray | None:
    """The checked ray, or None when the check refuses it."""
    largest = view.most(max(float(np.abs(weights).max()), float(np.abs(ties).max())))
    weights, ties = weights / largest, ties / largest
    # What a solver leaves on sequences that have no part in the proof is small; without them it names the guilty ones.
    for share in (1e-2, 1e-4, 1e-6, 0.0):
        kept, kept_ties = (np.where(np.abs(part) >= share, part, 0.0) for part in (weights, ties))
        check = check_ray(problem, kept, kept_ties, center=request.center, group=view.group)
        if check.valid:
            break
    else:
        return None
    weights, ties = kept, kept_ties
    back = problem.kind.back
    return Ray(
        weights=back(torch.from_numpy(weights)),
        equality_weights=back(torch.from_numpy(ties)),
        sequences=check.sequences,
        residual=check.residual,
    )


def trivial(problem: TokenSelection, view: RowView, request: Request, *, began: float) -> Solution:
    """Problems settled without a solver: a row that no W can satisfy, or W = 0 satisfies all."""
    d, rows = problem.shape[-1], view.rows
    W = np.zeros((d, d)) if request.center is None else request.center
    duals, ties = np.zeros(rows.shape), np.zeros(rows.shape)
    ray = None
    if view.total(float(rows.fatal.sum())) > 0:
        for index in rows.fatal.nonzero()[0][:1]:
            place = tuple(rows.broken[:, index])
            (ties if rows.broken_tie[index] else duals)[place] = np.sign(rows.broken_rhs[index])
        ray = _ray(problem, duals, ties, request, view)
        duals, ties = np.zeros(rows.shape), np.zeros(rows.shape)
    elif request.is_soft:
        duals[tuple(rows.broken)] = request.penalty
    proof = certify(
        problem, W, duals, ties, norm=request.norm, penalty=request.penalty, center=request.center, group=view.group
    )
    return _solution(
        problem,
        W,
        duals,
        ties,
        proof=proof,
        status=Status.OPTIMAL if ray is None else Status.INFEASIBLE,
        norm=request.norm,
        penalty=request.penalty,
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


def stacked(solutions: list[Solution], began: float) -> Solution:
    """Solutions of a batch as one: arrays stacked, numbers as tuples."""
    first = solutions[0]
    join = torch.stack if isinstance(first.W, torch.Tensor) else np.stack

    def each(name: str) -> tuple[Any, ...]:
        return tuple(getattr(solution, name) for solution in solutions)

    arrays: dict[str, Any] = {name: join(each(name)) for name in ("W", "duals", "equality_duals", "support")}
    numbers: dict[str, Any] = {
        name: each(name) for name in ("status", "upper_bound", "lower_bound", "margin", "iterations", "ray")
    }
    return Solution(
        **arrays,
        **numbers,
        norm=first.norm,
        penalty=first.penalty,
        seconds=time.monotonic() - began,
        method=first.method,
    )
