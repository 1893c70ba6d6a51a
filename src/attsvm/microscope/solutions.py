"""The max-margin solution of a head's own selections, and how it compares with the head."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attsvm.microscope.heads import HeadProblem, Space, head_problem
from attsvm.microscope.sampled import HELD_OUT, TRAIN, ModuleSample
from attsvm.selection import correlation
from attsvm.solvers import Solution, Status, solve

if TYPE_CHECKING:
    from attsvm.microscope.residual import ResidualHead

__all__ = [
    "HeadSolution",
    "NullSolution",
    "SolutionSettings",
    "effective_number",
    "effective_rank",
    "numerical_rank",
    "solve_head",
    "solve_null",
]

Array = npt.NDArray[Any]
HeadNorm = Literal["fro", "nuc"]

TOLERANCE = {"fro": 1e-9, "nuc": 1e-5}
"""Relative gaps. Newton's method ends far below what it is asked; first-order steps of the nuclear norm do not."""
NULL_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class SolutionSettings:
    """How heads are solved.

    Attributes
    ----------
    max_seconds
        For each solve.
    null
        Whether random matrices are put through the same.
    seed
        Of the random matrices.
    """

    max_seconds: float = 60.0
    null: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class HeadSolution:
    r"""One max-margin solution of one head.

    Attributes
    ----------
    space, norm
        Where, and in which norm.
    status, gap, seconds
        Of the solve.
    n_queries, n_constraints, n_near_ties
        Queries that ask, rows in force, and queries left out because their two largest logits are too close.
    n_support
        Tokens with a positive multiplier.
    size
        Norm of the solution.
    correlation
        Cosine of the solution and the head's own matrix.
    null_correlation
        The same cosine for the solution of the selections of a random matrix with the head's singular values.
    recovery
        Cosine of that solution and the random matrix itself: what ``correlation`` is for a matrix that nobody trained.
    heldout, heldout_n
        Share of held-out queries for which the solution selects the head's own key, and their number.
    heldout_effective_n
        How many independent queries would tell the share as well; fewer than ``heldout_n`` where the queries of one
        window succeed and fail together.
    heldout_chance
        The mean of one over the number of keys of those queries.
    rank, effective_rank
        Of the solution: singular values above 1e-6 of the largest; exponential of the entropy of their shares.
    own_rank, own_effective_rank
        Of the head's own matrix.
    own_spectrum, spectrum
        Singular values, the largest scaled to 1.
    note
        What limits the result, or empty.
    W
        (d, d) float64, or None where there is no solution.
    support
        (rows, 2): sampled query and key position of every support token.
    """

    space: Space
    norm: HeadNorm
    status: str
    gap: float
    seconds: float
    n_queries: int
    n_constraints: int
    n_near_ties: int
    n_support: int = 0
    size: float | None = None
    correlation: float | None = None
    null_correlation: float | None = None
    recovery: float | None = None
    heldout: float | None = None
    heldout_n: int = 0
    heldout_effective_n: float | None = None
    heldout_chance: float | None = None
    rank: int | None = None
    effective_rank: float | None = None
    own_rank: int | None = None
    own_effective_rank: float | None = None
    own_spectrum: tuple[float, ...] = ()
    spectrum: tuple[float, ...] = ()
    note: str = ""
    W: Array | None = field(default=None, repr=False)
    support: Array = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64), repr=False)

    def record(self) -> dict[str, Any]:
        """What ``result.json`` keeps."""
        left_out = ("W", "support", "spectrum", "own_spectrum")
        return {name: value for name, value in vars(self).items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class NullSolution:
    """The max-margin solution of the selections of a random matrix.

    Attributes
    ----------
    W
        (d, d): the solution.
    recovery
        Its cosine with the random matrix.
    """

    W: Tensor
    recovery: float


def solve_head(
    sample: ModuleSample,
    head: int,
    *,
    space: Space,
    norm: HeadNorm,
    residual: ResidualHead | None = None,
    settings: SolutionSettings | None = None,
    null: NullSolution | None = None,
) -> HeadSolution | None:
    """Solve the max-margin problem of one head's selections and compare the solution with the head.

    Parameters
    ----------
    sample
        The module's sample.
    head
        Query head, from 0.
    space
        ``"score"`` or ``"residual"``.
    norm
        ``"fro"`` or ``"nuc"``.
    residual
        The head's matrices, for the residual space.
    settings
        Limits, and whether a random matrix is put through the same.
    null
        The solution of a random matrix that serves several heads; default one of this head's own.

    Returns
    -------
    HeadSolution or None
        None where no query of the sample has a clear choice between keys.
    """
    settings = settings or SolutionSettings()
    posed = head_problem(sample, head, space=space, part=TRAIN, residual=residual)
    if posed is None:
        return None
    began = time.monotonic()
    solution = _solve(posed, norm, TOLERANCE[norm], settings.max_seconds)
    own_values = _singular_values(posed.own)
    found: dict[str, Any] = {
        "space": space,
        "norm": norm,
        "status": solution.status.name,
        "gap": float(solution.gap),
        "n_queries": int(posed.problem.tensors.selected.any(-1).sum()),
        "n_constraints": posed.problem.n_constraints,
        "n_near_ties": posed.near_ties,
        "own_rank": numerical_rank(own_values),
        "own_effective_rank": effective_rank(own_values),
        "own_spectrum": _scaled(own_values),
    }
    if not _usable(solution):
        note = f"{solution.status.sentence}"
        return HeadSolution(**found, seconds=time.monotonic() - began, note=note)
    values = _singular_values(solution.W)
    asked = head_problem(sample, head, space=space, part=HELD_OUT, residual=residual)
    found |= _compared(posed, solution, asked, sample.window)
    found |= {
        "size": float(solution.upper_bound),
        "rank": numerical_rank(values),
        "effective_rank": effective_rank(values),
        "spectrum": _scaled(values),
        "W": solution.W.numpy(),
        "support": _support(posed, solution),
        "n_support": int(solution.support.sum()),
        "note": "" if solution.status is Status.OPTIMAL else solution.status.sentence,
    }
    if settings.null:
        null = null or solve_null(posed, norm, settings, seed=(settings.seed, *_seed(sample, head)))
    if null is not None:
        found |= {"null_correlation": float(correlation(null.W, posed.own)), "recovery": null.recovery}
    return HeadSolution(**found, seconds=time.monotonic() - began)


def _solve(posed: HeadProblem, norm: HeadNorm, tol: float, max_seconds: float) -> Solution:
    solution = solve(posed.problem, norm, tol=tol, max_seconds=max_seconds, on_failure="ignore")
    if solution.status is Status.INTERRUPTED:
        raise KeyboardInterrupt  # what was found so far must not count as the head's solution
    return solution


def _usable(solution: Solution) -> bool:
    """Whether there is a W that separates."""
    return math.isfinite(solution.upper_bound) and bool(solution.W.any())


def _compared(posed: HeadProblem, solution: Solution, asked: HeadProblem | None, window: Array) -> dict[str, Any]:
    found: dict[str, Any] = {"correlation": float(correlation(solution.W, posed.own))}
    if asked is None:
        return found
    wanted = asked.selected
    clear = wanted >= 0
    allowed = asked.problem.tensors.allowed
    chosen = asked.problem.logits(solution.W).argmax(-1)
    right = (chosen == wanted)[clear].double()
    return found | {
        "heldout": float(right.mean()),
        "heldout_n": int(clear.sum()),
        "heldout_effective_n": effective_number(right.numpy(), window[asked.rows[clear.numpy()]]),
        "heldout_chance": float((1.0 / allowed.sum(-1)[clear]).mean()),
    }


def effective_number(right: Array, window: Array) -> float:
    r"""How many independent queries would tell a share as well as these, of which those of a window may go together.

    The number n over the design effect, the ratio of the variance of the share between windows (as in
    :mod:`~attsvm.microscope.statistics`) to $p (1 - p) / n$, where that is more than 1.

    Parameters
    ----------
    right
        (n,) zeros and ones.
    window
        (n,) the window of each.

    Examples
    --------
    >>> effective_number(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1]))
    1.0
    """
    n, share = len(right), right.mean()
    _, where = np.unique(window, return_inverse=True)
    hits, queries = np.bincount(where, right), np.bincount(where)
    K, alone = len(queries), share * (1 - share) / n
    if K < 2 or alone == 0:
        return float(n)
    between = K / (K - 1) * np.square(hits - share * queries).sum() / n**2
    return float(n / max(1.0, between / alone))


def solve_null(
    posed: HeadProblem, norm: HeadNorm, settings: SolutionSettings, *, seed: tuple[int, ...]
) -> NullSolution | None:
    """Solve for the selections of a random matrix with the head's singular values, on the same queries and keys.

    Parameters
    ----------
    posed
        The head's problem.
    norm
        ``"fro"`` or ``"nuc"``.
    settings
        Limits.
    seed
        Of the random matrix.

    Returns
    -------
    NullSolution or None
        None where nothing is clear to the random matrix, or the solve found no W in its time.
    """
    drawn = _random_like(posed.own, np.random.default_rng(seed))
    other = posed.under(drawn)
    if other is None:
        return None
    solution = _solve(other, norm, NULL_TOLERANCE, settings.max_seconds)
    if not _usable(solution):
        return None
    return NullSolution(W=solution.W, recovery=float(correlation(solution.W, drawn)))


def _seed(sample: ModuleSample, head: int) -> tuple[int, ...]:
    return crc32(sample.info.name.encode()), head


def _random_like(own: Tensor, generator: np.random.Generator) -> Tensor:
    """A matrix with the singular values of ``own`` between random orthonormal directions."""
    values = _singular_values(own)
    values = values[values > 1e-12 * values[:1]]
    rank = len(values)
    left, right = (
        np.linalg.qr(generator.standard_normal((size, rank)))[0] * np.sign(generator.standard_normal(rank))
        for size in own.shape
    )
    return torch.from_numpy(left * values @ right.T)


def _singular_values(W: Tensor) -> Array:
    """Singular values, largest first."""
    values: Array = torch.linalg.svdvals(W.double()).numpy()
    return values


def numerical_rank(values: Array) -> int:
    """Singular values above 1e-6 of the largest."""
    return int((values > 1e-6 * values.max(initial=0.0)).sum())


def effective_rank(values: Array) -> float:
    r"""$\exp(-\sum_i p_i \log p_i)$ with $p_i$ the share of singular value i in their sum.

    References
    ----------
    Roy, Vetterli. "The effective rank: a measure of effective dimensionality", 2007.

    Examples
    --------
    >>> round(effective_rank(np.array([1.0, 1.0, 0.0])), 12)
    2.0
    """
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _scaled(values: Array, most: int = 64) -> tuple[float, ...]:
    """The first singular values, the largest scaled to 1, in four digits."""
    top = values[:most] / values[0] if values.size and values[0] > 0 else values[:0]
    return tuple(float(f"{value:.4g}") for value in top)


def _support(posed: HeadProblem, solution: Solution) -> Array:
    """(rows, 2): sampled query and key position of every support token."""
    sequence, query, token = solution.support.nonzero(as_tuple=True)
    pairs: Array = np.stack([posed.rows[sequence.numpy(), query.numpy()], token.numpy()], 1)
    return pairs
