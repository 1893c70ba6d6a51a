"""Solutions as a trajectory needs them: members of a batch one by one, and diagonal ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from attsvm.selection.problem import TokenSelection
from attsvm.solvers.solution import Solution
from attsvm.solvers.solve import solve

__all__ = ["solve_diagonal", "split"]

ARRAYS = ("W", "duals", "equality_duals", "support")
NUMBERS = ("status", "upper_bound", "lower_bound", "margin", "iterations", "ray")


def split(solution: Solution) -> tuple[Solution, ...]:
    """The solutions of the members of a batch."""
    count = len(solution.status)
    each = [
        {name: getattr(solution, name)[b] for name in (*ARRAYS, *NUMBERS) if getattr(solution, name) is not None}
        for b in range(count)
    ]
    return tuple(dataclasses.replace(solution, **own, seconds=solution.seconds / count) for own in each)


def solve_diagonal(problem: TokenSelection, **options: Any) -> Solution:
    r"""The diagonal matrix of smallest $l_1$ norm that selects the given tokens.

    $x^\top \mathrm{diag}(w)\, z = (x \odot z)^\top w$, so this is the entrywise $l_1$ problem for tokens
    $x_{it} \odot z_{iq}$ with one query that is the same everywhere. Tokens that no diagonal matrix can tell apart are
    not asked to be.

    Parameters
    ----------
    problem
        The selection; a single problem or a batch.
    **options
        Passed to :func:`attsvm.solve`.
    """
    t = problem.tensors
    *lead, n, Q, T = t.selected.shape
    d = t.tokens.shape[-1]
    products = (t.tokens.unsqueeze(-3) * t.queries.unsqueeze(-2)).reshape(*lead, n * Q, T, d)
    first = torch.zeros_like(t.queries).reshape(*lead, n * Q, d)
    first[..., 0] = 1.0
    # A query with nothing allowed asks nothing, but a sequence needs a token.
    silent = ~t.allowed.any(-1, keepdim=True)
    expanded = TokenSelection(
        products,
        first,
        _apart(t.selected),
        allowed=_apart(t.allowed | silent),
        offsets=None if t.offsets is None else _apart(t.offsets),
        margin=_apart(t.margin) if t.margin.ndim else float(t.margin),
    )
    found = solve(expanded, 1.0, **options)
    back = problem.kind.back

    def together(name: str) -> Any:
        value = getattr(found, name)
        return None if value is None else back(torch.as_tensor(value).reshape(t.selected.shape))

    W = torch.diag_embed(torch.as_tensor(found.W)[..., 0])
    arrays = {name: together(name) for name in ARRAYS[1:]}
    return dataclasses.replace(found, W=back(W), **arrays)


def _apart(value: Tensor) -> Tensor:
    """(…, n, Q, T) as (…, n Q, 1, T): every query a sequence of its own."""
    return value.flatten(-3, -2).unsqueeze(-2)
