"""What a run leaves: the path of W, and what it says about the selection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attsvm.dynamics.verdict import Verdict, judge
from attsvm.errors import InvalidInputError
from attsvm.selection.geometry import correlation
from attsvm.selection.norms import Norm
from attsvm.selection.problem import TokenSelection
from attsvm.solvers.solution import Solution
from attsvm.solvers.solve import solve

__all__ = ["Trajectory"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """The record of ``descend``. Arrays are of the problem's kind; a batch adds a leading B to all but ``steps``.

    Attributes
    ----------
    steps
        (records,) int64: the steps at which the path was recorded, 0 first.
    W
        (records, d, d).
    loss, norm, attention_mass
        (records,): the loss, ``||W||_F``, and the mean probability of the most probable token.
    selected
        (n, Q) int64: the most probable token of each query at the end; -1 for a query with nothing allowed.
    probabilities
        (n, Q, T): attention at the end.
    K, Q
        (d, m) at the end for ``parameterization="KQ"``, otherwise None.
    problem
        The given problem with the final tokens selected.
    scores
        (n, Q, T).
    parameterization
        ``"W"`` or ``"KQ"``.
    stalled
        Whether the last step changed nothing: the gradient was exactly 0 (or underflowed, with plain descent).
    """

    steps: Any
    W: Any
    loss: Any
    norm: Any
    attention_mass: Any
    selected: Any
    probabilities: Any
    K: Any
    Q: Any
    problem: TokenSelection
    scores: Tensor
    parameterization: str
    stalled: Any
    _solutions: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def own_norm(self) -> Norm:
        """The norm whose max-margin solution the theory sets for this parameterisation."""
        return "fro" if self.parameterization == "W" else "nuc"

    def solution(self, norm: Norm | None = None, **options: Any) -> Any:
        """Max-margin solution for the tokens selected at the end (a tuple of them for a batch), computed once.

        Parameters
        ----------
        norm
            Default: the norm of this parameterisation.
        **options
            Passed to :func:`attsvm.solve` the first time; failures are reported in the status.
        """
        norm = self.own_norm if norm is None else norm
        if norm not in self._solutions:
            options = {"on_failure": "ignore", **options}
            each = [solve(problem, norm, **options) for problem in _members(self.problem)]
            self._solutions[norm] = tuple(each) if self.problem.is_batch else each[0]
        return self._solutions[norm]

    def correlation(self, solution: Solution | Any) -> Any:
        """Cosine of W with a solution (or a matrix) at every record, (records,) or (B, records); NaN where W is 0.

        Parameters
        ----------
        solution
            A Solution, a matrix (d, d), or for a batch a tuple of B of them.
        """
        if not self.problem.is_batch:
            return correlation(self.W, getattr(solution, "W", solution))
        if not isinstance(solution, (tuple, list)) or len(solution) != len(self.problem):
            raise InvalidInputError(f"correlation: solution must be a tuple of {len(self.problem)} for this batch.")
        rows = [correlation(W, getattr(s, "W", s)) for W, s in zip(self.W, solution, strict=True)]
        return torch.stack(rows) if isinstance(rows[0], Tensor) else np.stack(rows)

    @property
    def verdict(self) -> Any:
        """The :class:`Verdict` of the run; a tuple of them for a batch. Solves the max-margin problem if needed."""
        if "verdict" not in self._solutions:
            found = self.solution()
            if not self.problem.is_batch:
                verdict: Any = judge(self.problem, self.scores, found, mass=float(self.attention_mass[-1]))
            else:
                verdict = tuple(
                    judge(problem, self.scores[b], found[b], mass=float(self.attention_mass[b, -1]))
                    for b, problem in enumerate(_members(self.problem))
                )
            self._solutions["verdict"] = verdict
        return self._solutions["verdict"]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdicts as a tuple, of one for a single problem."""
        return self.verdict if isinstance(self.verdict, tuple) else (self.verdict,)


def _members(problem: TokenSelection) -> list[TokenSelection]:
    return [problem[b] for b in range(len(problem))] if problem.is_batch else [problem]
