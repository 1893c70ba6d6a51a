"""What was asked of ``solve``: checked once, here, with messages that name the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.selection.arrays import as_float
from attsvm.selection.norms import Norm, check_norm
from attsvm.selection.problem import TokenSelection
from attsvm.selection.reading import require_finite
from attsvm.solvers.loop import Progress
from attsvm.solvers.rows import Floats
from attsvm.solvers.solution import Solution

__all__ = ["Request"]

_METHODS = {
    "fro": ("auto", "coordinate", "newton"),
    "others": ("auto", "newton", "splitting", "primal-dual"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of ``solve`` but the problem; see there."""

    norm: Norm
    rank: int | None
    penalty: float
    tol: float
    max_seconds: float | None
    max_iterations: int | None
    max_bytes: int | None
    method: str
    center: Floats | None  # (d, d) or (B, d, d)
    warm_start: Solution | None
    progress: Progress | None
    checkpoint: Callable[[Solution], None] | None
    group: Any

    @classmethod
    def checked(cls, problem: Any, **asked: Any) -> Request:
        """The request, or an InvalidInputError that names the argument."""
        if not isinstance(problem, TokenSelection):
            raise InvalidInputError(f"solve: problem must be a TokenSelection, got {type(problem).__name__}.")
        norm = check_norm(asked["norm"], where="solve")
        penalty, tol = asked["penalty"], asked["tol"]
        if not (_is_number(penalty) and penalty > 0):
            raise InvalidInputError(f"solve: penalty must be > 0 (inf for the hard margin), got {penalty!r}.")
        if not (_is_number(tol) and 0 < tol < 1):
            raise InvalidInputError(f"solve: tol must be in (0, 1), got {tol!r}.")
        for name in ("max_seconds", "max_iterations"):
            if asked[name] is not None and not (_is_number(asked[name]) and asked[name] >= 0):
                raise InvalidInputError(f"solve: {name} must be >= 0 or None, got {asked[name]!r}.")
        if asked["max_bytes"] is not None and not (_is_number(asked["max_bytes"]) and asked["max_bytes"] >= 2**20):
            raise InvalidInputError(
                f"solve: max_bytes must be at least {2**20} (1 MiB) or None, got {asked['max_bytes']!r}."
            )
        _check_method(norm, asked["method"])
        _check_rank(norm, asked["rank"], penalty)
        if asked["rank"] is not None and asked["group"] is not None:
            raise UnsupportedError("solve: rank is not supported with process_group.")
        for name in ("progress", "checkpoint"):
            if asked[name] is not None and not callable(asked[name]):
                raise InvalidInputError(f"solve: {name} must be callable or None, got {asked[name]!r}.")
        if asked["warm_start"] is not None and not isinstance(asked["warm_start"], Solution):
            raise InvalidInputError(
                f"solve: warm_start must be a Solution or None, got {type(asked['warm_start']).__name__}."
            )
        center = _center(problem, asked.pop("center"))
        return cls(**{**asked, "norm": norm, "penalty": float(penalty), "center": center})

    @property
    def is_soft(self) -> bool:
        """Whether slack is allowed."""
        return math.isfinite(self.penalty)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _check_method(norm: Norm, method: Any) -> None:
    methods = _METHODS["fro" if norm == "fro" else "others"]
    if method not in methods:
        raise InvalidInputError(f"solve: method must be one of {', '.join(methods)} for this norm, got {method!r}.")


def _check_rank(norm: Norm, rank: Any, penalty: float) -> None:
    if rank is None:
        return
    if not isinstance(rank, (int, np.integer)) or isinstance(rank, bool) or rank < 1:
        raise InvalidInputError(f"solve: rank must be an integer >= 1, got {rank!r}.")
    if norm != "nuc":
        raise InvalidInputError(f'solve: rank must be None unless norm is "nuc", got {rank!r} with norm={norm!r}.')
    if math.isfinite(penalty):
        raise InvalidInputError(f"solve: rank must be None for the soft margin, got {rank!r} with penalty={penalty:g}.")


def _center(problem: TokenSelection, center: Any) -> Floats | None:
    if center is None:
        return None
    d = problem.shape[-1]
    tensor = as_float(center, "center", where="solve").cpu().double()
    shapes = [(d, d)] if not problem.is_batch else [(d, d), (problem.batch_size, d, d)]
    if tuple(tensor.shape) not in shapes:
        raise InvalidInputError(f"solve: center must have shape {shapes[-1]}, got {tuple(tensor.shape)}.")
    require_finite(tensor, "center", "solve")
    return np.ascontiguousarray(tensor.numpy())
