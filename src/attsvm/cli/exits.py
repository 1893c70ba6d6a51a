"""How errors become exit codes: 0 ok, 1 failed, 2 usage or bad input, 3 infeasible or unsupported, 130 interrupted."""

from __future__ import annotations

from attsvm.errors import InfeasibleError, InvalidInputError, UnsupportedError

__all__ = ["exit_code"]


def exit_code(error: BaseException) -> int:
    """The exit code of an error."""
    if isinstance(error, InvalidInputError):
        return 2
    if isinstance(error, (InfeasibleError, UnsupportedError)):
        return 3
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 1
