r"""What W and the duals prove, recomputed in float64 from the problem alone.

This module is the judge: it knows the problem, a matrix and multipliers, and nothing of how they were found.
With rows $r$ over queries and dropped tokens, $A_r = (x_a - x_t) z^\top$ and $c_r$ the margin asked for less
the offset difference $b_a - b_t$,

* any W with $\langle A_r, W\rangle \ge c_r$ for all r gives the upper bound $\|W\|$;
* any $\lambda \ge 0$ gives the lower bound $\sum \lambda_r c_r / \|\sum \lambda_r A_r\|_*$;
* $\lambda \ge 0$ with $\sum \lambda_r A_r = 0$ and $\sum \lambda_r c_r > 0$ proves that no W exists.

Where a query selects several tokens, the row is taken for the first of them, and the ties of the others to it
are rows with multipliers of either sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.selection import geometry
from attsvm.selection.arrays import Array, as_float
from attsvm.selection.norms import Norm, check_norm, dual_norm, matrix_norm

if TYPE_CHECKING:
    from attsvm.selection.problem import ProblemTensors, TokenSelection

__all__ = ["RAY_TOLERANCE", "Certificate", "RayCheck", "certify", "check_ray", "combine_rows"]

RAY_TOLERANCE = 1e-9
"""Largest size of a ray's combination, relative to the sum of the sizes of its terms."""

TIE_TOLERANCE = 1e-10
"""Largest difference of tied logits (and shortfall of rows that ask for 0), relative to ``||W||_F`` and the row."""

ROUNDING = 2e-14
"""Size, relative to ``||W||_F`` and the row, of a margin that may be nothing but rounding."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Bounds on the smallest norm, and how far W and the duals are from an exact pair.

    Attributes
    ----------
    feasible
        Whether W, after the rescaling that the problem allows, satisfies every row in float64, with margins that
        neither rounding nor the tolerance of the ties could feign.
    scale
        The factor that W was multiplied by: the smallest one that makes every margin row hold where the problem
        has no offsets, 1 where it has.
    upper_bound
        Norm of the rescaled W; +inf when it is not feasible.
    lower_bound
        Dual bound; 0 when the duals prove nothing, +inf when they prove infeasibility.
    gap
        ``(upper_bound - lower_bound) / upper_bound``; 0 when both are 0, +inf when the upper bound is.
    smallest_margin
        Smallest margin of the rescaled W, in logits; +inf when nothing is asked.
    worst_tie
        Largest difference of tied logits under the rescaled W, relative to ``||W||_F`` and the row's size.
    complementarity
        ``sum(duals * (margins - asked)) / sum(duals * asked)`` after scaling the duals to fit W: 0 at the optimum.
    stationarity
        ``||W - G||_F / ||W||_F`` with G the combination of the rows, duals scaled to fit: 0 at the optimum of the
        Frobenius norm, of no meaning for other norms (NaN).
    """

    feasible: bool
    scale: float
    upper_bound: float
    lower_bound: float
    gap: float
    smallest_margin: float
    worst_tie: float
    complementarity: float
    stationarity: float


@dataclass(frozen=True, kw_only=True)
class RayCheck:
    """Whether multipliers prove that no matrix exists.

    Attributes
    ----------
    valid
        All margin multipliers are >= 0, the residual is at most 1e-9 and the value is positive.
    residual
        Size of ``sum(ray * A)`` relative to the sum of the sizes of its terms.
    value
        ``sum(ray * c)`` with the ray's largest entry scaled to 1.
    sequences
        The sequences that have a positive multiplier.
    """

    valid: bool
    residual: float
    value: float
    sequences: tuple[int, ...]


def _double(problem: TokenSelection) -> ProblemTensors:
    if problem.is_batch:
        raise UnsupportedError("certify: a batch is certified one problem at a time; pass problem[b].")
    t = problem.tensors
    return t._replace(
        tokens=centred(t.tokens),
        queries=t.queries.to(torch.float64),
        offsets=None if t.offsets is None else t.offsets.to(torch.float64),
    )


def centred(tokens: Tensor) -> Tensor:
    """Tokens (n, T, d) in float64, less the first of their sequence.

    Only differences of tokens matter; without the part that they share, sums over them round less.
    """
    tokens = tokens.to(torch.float64)
    return tokens - tokens[..., :1, :]


def representatives(selected: Tensor) -> Tensor:
    """Index (n, Q) of the first selected token of each query; 0 where there is none."""
    return selected.to(torch.int8).argmax(-1)


def tied(selected: Tensor) -> Tensor:
    """(n, Q, T) booleans: selected tokens other than the first of their query."""
    first = torch.zeros_like(selected).scatter_(-1, representatives(selected).unsqueeze(-1), True)
    return selected & ~first


def required(t: ProblemTensors) -> Tensor:
    """``c`` (n, Q, T): margin (0 for ties) less the offset difference to the first selected token."""
    asked = torch.where(t.asked, t.margin.expand(t.asked.shape), torch.zeros((), dtype=torch.float64))
    if t.offsets is None:
        return asked
    own = t.offsets.gather(-1, representatives(t.selected).unsqueeze(-1))
    used = t.asked | tied(t.selected)
    return asked - torch.where(used, own - t.offsets, torch.zeros((), dtype=torch.float64))


def combine_rows(t: ProblemTensors, weights: Tensor) -> Tensor:
    """``sum over rows of weight * (x_first - x_t) z^T`` (d, d), for weights (n, Q, T) on margin rows and ties."""
    first = representatives(t.selected).unsqueeze(-1)
    coefficients = (-weights).scatter_add(-1, first, weights.sum(-1, keepdim=True))
    return torch.einsum("nqd,nqe->de", coefficients @ t.tokens, t.queries)


def row_values(t: ProblemTensors, W: Tensor) -> Tensor:
    """``(x_first - x_t)^T W z`` (n, Q, T), offsets not included."""
    values = (t.queries @ W.mT) @ t.tokens.mT
    return values.gather(-1, representatives(t.selected).unsqueeze(-1)) - values


def row_sizes(t: ProblemTensors) -> Tensor:
    """``||x_first - x_t|| ||z||`` (n, Q, T), computed from the differences."""
    n, Q, T = t.selected.shape
    sizes = torch.empty((n, Q, T), dtype=torch.float64, device=t.tokens.device)
    first = representatives(t.selected)
    for q in range(Q):
        own = torch.take_along_dim(t.tokens, first[:, q, None, None], -2)
        sizes[:, q] = torch.linalg.vector_norm(t.tokens - own, dim=-1)
    query_sizes: Tensor = torch.linalg.vector_norm(t.queries, dim=-1, keepdim=True)
    return sizes * query_sizes


def believable(norm: float, largest_row: float, largest_asked: float, *, tolerant: bool) -> bool:
    """Whether margins of the size asked for stand out from rounding, for a matrix of this Frobenius norm.

    Parameters
    ----------
    norm
        ``||W||_F``.
    largest_row
        Largest size of a row.
    largest_asked
        Largest right-hand side.
    tolerant
        Whether the problem has ties or rows that ask for 0, which hold to TIE_TOLERANCE only: a matrix large enough
        would make any margin out of that.
    """
    noise = (100.0 * TIE_TOLERANCE if tolerant else ROUNDING) * norm * largest_row
    return largest_asked <= 0.0 or noise <= largest_asked


def _weights(t: ProblemTensors, duals: Array, equality_duals: Array | None, where: str) -> tuple[Tensor, Tensor]:
    """Margin weights clipped to >= 0 and tie weights, zero where no row is."""
    shape = tuple(t.selected.shape)
    parts = []
    for name, value, rows in (("duals", duals, t.asked), ("equality_duals", equality_duals, tied(t.selected))):
        tensor = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        if value is not None:
            tensor = as_float(value, name, where=where, device=rows.device).to(torch.float64)
        if tuple(tensor.shape) != shape:
            raise InvalidInputError(f"{where}: {name} must have shape {shape}, got {tuple(tensor.shape)}.")
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInputError(f"{where}: {name} must be finite.")
        parts.append(torch.where(rows, tensor, torch.zeros((), dtype=torch.float64)))
    return parts[0].clamp(min=0.0), parts[1]


def check_ray(problem: TokenSelection, ray: Array, equality_ray: Array | None = None) -> RayCheck:
    """Check multipliers that are said to prove infeasibility.

    Parameters
    ----------
    problem
        A single problem.
    ray
        (n, Q, T); entries that are negative count as 0.
    equality_ray
        (n, Q, T) multipliers of the ties, of either sign.
    """
    t = _double(problem)
    margin_part, tie_part = _weights(t, ray, equality_ray, "check_ray")
    largest = max(float(margin_part.amax()), float(tie_part.abs().amax()))
    if largest == 0.0:
        return RayCheck(valid=False, residual=math.inf, value=0.0, sequences=())
    weights = (margin_part + tie_part) / largest
    terms = float((weights.abs() * row_sizes(t)).sum())
    size = matrix_norm(combine_rows(t, weights), "fro")
    residual = 0.0 if terms == 0.0 else size / terms
    demands = weights * required(t)
    value = float(demands.sum())
    positive = value > RAY_TOLERANCE * float(demands.abs().sum())
    named = weights.abs().amax((-2, -1)) > RAY_TOLERANCE
    return RayCheck(
        valid=residual <= RAY_TOLERANCE and positive,
        residual=residual,
        value=value,
        sequences=tuple(int(i) for i in named.nonzero().flatten()),
    )


def _rescale(t: ProblemTensors, values: Tensor, asked: Tensor, tolerance: Tensor) -> float:
    """The factor that makes W meet its rows: without offsets the smallest one, with offsets 1; NaN if none does."""
    rows = t.asked
    shortfall = torch.where(rows, asked - values, torch.zeros((), dtype=torch.float64))
    if t.offsets is not None:
        return math.nan if bool((shortfall > torch.where(asked == 0, tolerance, 0.0)).any()) else 1.0
    positive = rows & (asked > 0)
    if bool((rows & (asked == 0) & (shortfall > tolerance)).any()) or bool((values[positive] <= 0).any()):
        return math.nan
    return float((asked[positive] / values[positive]).amax()) if bool(positive.any()) else 0.0


def certify(
    problem: TokenSelection,
    W: Array,
    duals: Array,
    equality_duals: Array | None = None,
    *,
    norm: Norm = "fro",
) -> Certificate:
    """Bounds on the smallest norm of a matrix that selects the tokens, from ``W`` and ``duals`` alone.

    Parameters
    ----------
    problem
        A single problem (index a batch first).
    W
        (d, d), any finite matrix.
    duals
        (n, Q, T); entries that are negative, or where nothing is asked, count as 0.
    equality_duals
        (n, Q, T) multipliers of the ties inside selected sets, of either sign.
    norm
        ``"fro"``, ``"nuc"``, ``"op"`` or p >= 1.

    Returns
    -------
    Certificate
        All values in float64, whatever the problem's dtype.

    Raises
    ------
    InvalidInputError
        If a shape does not fit or a value is not finite.
    """
    norm = check_norm(norm, where="certify")
    t = _double(problem)
    matrix = problem.matrix(W, "certify").to(torch.float64)
    margin_part, tie_part = _weights(t, duals, equality_duals, "certify")
    weights = margin_part + tie_part
    asked, values = required(t), row_values(t, matrix)
    size, sizes, are_ties = matrix_norm(matrix, "fro"), row_sizes(t), tied(t.selected)
    slack_unit = sizes * size
    scale = _rescale(t, values, asked, TIE_TOLERANCE * slack_unit)
    ties = are_ties & (slack_unit > 0)
    worst_tie = float(((values - asked).abs() / slack_unit)[ties].amax()) if bool(ties.any()) else 0.0
    impossible = are_ties & (slack_unit == 0) & (asked != 0)
    rows = t.asked | are_ties
    stands_out = believable(
        scale * size,
        float((sizes * rows).amax()),
        float((asked * rows).amax()),
        tolerant=bool((rows & (asked == 0)).any() or are_ties.any()),
    )
    feasible = not math.isnan(scale) and worst_tie <= TIE_TOLERANCE and not bool(impossible.any()) and stands_out
    if not feasible:
        scale = 1.0
    upper = scale * matrix_norm(matrix, norm) if feasible else math.inf
    combination = combine_rows(t, weights)
    promised = float((weights * asked).sum())
    slope = dual_norm(combination, norm)
    lower = _lower_bound(problem, promised, slope, margin_part, tie_part)
    fit = upper / slope if slope > 0 and math.isfinite(upper) else 1.0
    gap = 0.0 if upper == lower == 0.0 else (upper - lower) / upper if math.isfinite(upper) else math.inf
    asked_rows = t.asked
    margin_values = geometry.margins(t, scale * matrix)
    excess = torch.where(asked_rows, weights * (scale * values - asked), torch.zeros((), dtype=torch.float64))
    distance = float(torch.linalg.vector_norm(scale * matrix - fit * combination))
    return Certificate(
        feasible=feasible,
        scale=scale,
        upper_bound=upper,
        lower_bound=lower,
        gap=gap,
        smallest_margin=float(margin_values.amin()),
        worst_tie=worst_tie,
        complementarity=float(excess.sum()) / promised if promised > 0 else 0.0,
        stationarity=(distance / (scale * size) if scale * size > 0 else 0.0) if norm == "fro" else math.nan,
    )


def _lower_bound(problem: TokenSelection, promised: float, slope: float, margin: Any, ties: Any) -> float:
    if promised <= 0.0:
        return 0.0
    if slope > 0.0 and promised / slope < 1e12:
        return promised / slope
    # A combination this small is rounding: it proves infeasibility, or nothing.
    if check_ray(problem, margin, ties).valid:
        return math.inf
    return promised / slope if slope > 0.0 else 0.0
