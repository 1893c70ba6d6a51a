"""The exception tree. Every error a user can cause derives from :class:`AttSVMError`.

The command line turns these into one sentence and an exit code; the library raises them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attsvm.solvers.solution import Solution

__all__ = [
    "AttSVMError",
    "InfeasibleError",
    "InvalidInputError",
    "NotConvergedError",
    "RecordError",
    "UnsupportedError",
]


class AttSVMError(Exception):
    """Base of all errors raised on purpose by attsvm."""


class InvalidInputError(AttSVMError, ValueError):
    """An argument or a file is not what it must be; the message names it."""


class UnsupportedError(AttSVMError):
    """The request is meaningful, but this version or this installation cannot do it."""


class RecordError(AttSVMError):
    """A run folder or one of its files is missing, damaged, foreign or in use."""


class _SolutionError(AttSVMError):
    """An error that carries what was computed before it was raised."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[type[_SolutionError], tuple[str, Solution]]:
        # Exceptions cross process borders by pickling their arguments; the default forgets the solution.
        return type(self), (str(self), self.solution)


class InfeasibleError(_SolutionError):
    """No key-query matrix separates the selected tokens; ``solution.ray`` proves it."""


class NotConvergedError(_SolutionError):
    """A limit or an interrupt came before the tolerance; ``solution`` is the best one found."""
