"""Solutions along a path: of prices of slack, or of margins, each started from the one before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.selection.norms import Norm
from attsvm.selection.problem import TokenSelection
from attsvm.solvers.solution import Solution, Status
from attsvm.solvers.solve import Failure, reported, solve

__all__ = ["SolutionPath", "solve_path"]


@dataclass(frozen=True, kw_only=True)
class SolutionPath:
    """The solutions along a path.

    Attributes
    ----------
    parameter
        ``"penalty"`` or ``"margin"``.
    values
        (k,) its values, in the order in which they were given.
    solutions
        The k solutions; fewer if Ctrl-C came.
    """

    parameter: str
    values: NDArray[np.float64]
    solutions: tuple[Solution, ...]

    def __len__(self) -> int:
        return len(self.solutions)

    def __iter__(self) -> Iterator[Solution]:
        return iter(self.solutions)

    def __getitem__(self, index: int) -> Solution:
        return self.solutions[index]

    @property
    def status(self) -> tuple[Status, ...]:
        """How each solve ended."""
        return tuple(solution.status for solution in self.solutions)

    @property
    def upper_bound(self) -> NDArray[np.float64]:
        """(k,) objectives reached."""
        return np.array([solution.upper_bound for solution in self.solutions])

    @property
    def lower_bound(self) -> NDArray[np.float64]:
        """(k,) dual bounds."""
        return np.array([solution.lower_bound for solution in self.solutions])

    @property
    def margin(self) -> NDArray[np.float64]:
        """(k,) smallest margins, in logits."""
        return np.array([solution.margin for solution in self.solutions])

    @property
    def n_support(self) -> NDArray[np.int64]:
        """(k,) numbers of support tokens."""
        return np.array([int(solution.support.sum()) for solution in self.solutions])


def solve_path(
    problem: TokenSelection,
    norm: Norm = "fro",
    *,
    penalties: Sequence[float] | None = None,
    margins: Sequence[float] | None = None,
    on_failure: Failure = "raise",
    **options: Any,
) -> SolutionPath:
    """Solve for several prices of slack, or several margins, each from the solution before.

    Parameters
    ----------
    problem
        One selection, not a batch. Not modified.
    norm
        As in :func:`~attsvm.solvers.solve`.
    penalties
        Prices C of a unit of slack, > 0, inf for the hard margin. Neighbours should be near each other: the order
        given is the order in which they are solved.
    margins
        Margins to ask for in place of the problem's, >= 0. Either this or ``penalties``.
    on_failure
        What to do, after the whole path, when a status is not OPTIMAL; the exception carries the path as
        ``solution``.
    options
        Other arguments of :func:`~attsvm.solvers.solve`: ``tol``, ``max_seconds`` (for each solve), ``center``,
        ``penalty`` (along a path of margins), ...

    Returns
    -------
    SolutionPath
        A sequence of solutions.

    Raises
    ------
    InfeasibleError, NotConvergedError
        As in :func:`~attsvm.solvers.solve`.
    InvalidInputError
        If both or none of ``penalties`` and ``margins`` are given, or a value is not what it must be.

    Examples
    --------
    >>> problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0])
    >>> solve_path(problem, penalties=[0.25, 0.5, 2.0]).upper_bound
    array([0.21875, 0.375  , 0.5    ])
    """
    if isinstance(problem, TokenSelection) and problem.is_batch:
        raise UnsupportedError("solve_path: a batch is solved one problem at a time; pass problem[b].")
    if (penalties is None) == (margins is None):
        raise InvalidInputError("solve_path: either penalties or margins must be given, and not both.")
    parameter, given = ("penalty", penalties) if margins is None else ("margin", margins)
    values = _checked(given, parameter)
    if parameter in options:
        raise InvalidInputError(f"solve_path: {parameter} must not be given beside a path of it.")
    solutions: list[Solution] = []
    warm = options.pop("warm_start", None)
    for value in values.tolist():
        one, extra = (problem.with_margin(value), {}) if parameter == "margin" else (problem, {"penalty": value})
        found = solve(one, norm, warm_start=warm, on_failure="ignore", **options, **extra)
        solutions.append(found)
        if found.status is Status.INTERRUPTED:
            break
        # What an infeasible or empty solve leaves is no place to begin.
        warm = found if math.isfinite(found.upper_bound) else None
    path = SolutionPath(parameter=parameter, values=values, solutions=tuple(solutions))
    failed = [k for k, status in enumerate(path.status) if status not in (Status.OPTIMAL, Status.LOCAL)]
    if failed and on_failure != "ignore":
        where = f"solve_path: at {parameter} {values[failed[0]]:g}: "
        reported(path[failed[0]], on_failure, where=where, carried=path)
    return path


def _checked(given: Any, parameter: str) -> NDArray[np.float64]:
    name = "penalties" if parameter == "penalty" else "margins"
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"solve_path: {name} must be a list of numbers, got {given!r}.") from error
    if values.ndim != 1 or values.size == 0:
        raise InvalidInputError(f"solve_path: {name} must be a list of at least one number, got {given!r}.")
    fine = values > 0 if parameter == "penalty" else (values >= 0) & np.isfinite(values)
    if not fine.all():
        wanted = "> 0" if parameter == "penalty" else "finite and >= 0"
        raise InvalidInputError(f"solve_path: {name} must be {wanted}, got {values[~fine][0]:g}.")
    return values
