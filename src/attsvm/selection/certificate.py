r"""What W and the duals prove, recomputed in float64 from the problem alone.

This module is the judge: it knows the problem, a matrix and multipliers, and nothing of how they were found.
With rows $r$ over queries and dropped tokens, $A_r = (x_a - x_t) z^\top$ and $c_r$ the margin asked for less
the offset difference $b_a - b_t$,

* any W with $\langle A_r, W\rangle \ge c_r$ for all r gives the upper bound $\|W\|$;
* any $\lambda \ge 0$ gives the lower bound $\sum \lambda_r c_r / \|\sum \lambda_r A_r\|_*$;
* $\lambda \ge 0$ with $\sum \lambda_r A_r = 0$ and $\sum \lambda_r c_r > 0$ proves that no W exists.

With slack at a price C per unit, the soft margin,

* any W gives the upper bound $\tfrac12\|W\|^2 + C \sum_r \max(0, c_r - \langle A_r, W\rangle)$;
* any $0 \le \lambda \le C$ gives the lower bound
  $\sum \lambda_r c_r - \tfrac12 \|\sum \lambda_r A_r\|_*^2$.

Where a query selects several tokens, the row is taken for the first of them, and the ties of the others to it
are rows with multipliers of either sign; ties have no slack. With a centre W0 all of this is said of ``W - W0``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.selection.arrays import Array, as_float
from attsvm.selection.constraints import combine_rows, parts, required, row_sizes, row_values, tied
from attsvm.selection.norms import Norm, check_norm, dual_norms, matrix_norms

if TYPE_CHECKING:
    from attsvm.selection.problem import ProblemTensors, TokenSelection

__all__ = ["RAY_TOLERANCE", "TIE_TOLERANCE", "Certificate", "RayCheck", "believable", "certify", "check_ray"]

RAY_TOLERANCE = 1e-9
"""Largest size of a ray's combination, relative to the sum of the sizes of its terms."""

TIE_TOLERANCE = 1e-10
"""Largest difference of tied logits (and shortfall of rows that ask for 0), relative to ``||W||_F`` and the row."""

ROUNDING = 2e-14
"""Size, relative to ``||W||_F`` and the row, of a margin that may be nothing but rounding."""

SUM_ROUNDING = 4.5e-16
"""Rounding of a sum, relative to the sizes of its terms: two units of float64."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Bounds on the smallest objective, and how far W and the duals are from an exact pair.

    Numbers for one problem, NumPy arrays (B,) for a batch. The objective is the norm (of ``W - center`` where there is
    a centre), and for the soft margin half its square plus the price of the slack.

    Attributes
    ----------
    feasible
        Whether W, after the rescaling that the problem allows, satisfies every row in float64, with margins that
        neither rounding nor the tolerance of the ties could feign.
    scale
        The factor that W was multiplied by: the smallest one that makes every margin row hold; 1 where the problem
        has offsets, a centre or slack.
    upper_bound
        Objective of the rescaled W; +inf when it is not feasible.
    lower_bound
        Dual bound; 0 when the duals prove nothing, +inf when they prove infeasibility.
    gap
        ``(upper_bound - lower_bound) / upper_bound``; 0 when both are 0, +inf when the upper bound is.
    smallest_margin
        Smallest margin of the rescaled W, in logits; +inf when nothing is asked.
    worst_tie
        Largest difference of tied logits under the rescaled W, relative to ``||W||_F`` and the row's size.
    complementarity
        ``sum(duals * (margins - asked)) / sum(duals * asked)``: 0 at the optimum. With slack,
        ``penalty * sum(slack)`` is added to the numerator.
    stationarity
        ``||W - G||_F / ||W||_F`` with G the combination of the rows, for the hard margin with duals scaled to fit: 0
        at the optimum of the Frobenius norm, of no meaning for other norms (NaN).
    """

    feasible: Any
    scale: Any
    upper_bound: Any
    lower_bound: Any
    gap: Any
    smallest_margin: Any
    worst_tie: Any
    complementarity: Any
    stationarity: Any


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


def believable(norm: Any, largest_row: Any, largest_asked: Any, *, tolerant: Any) -> Any:
    """Whether margins of the size asked for stand out from rounding, for a matrix of this Frobenius norm.

    Parameters
    ----------
    norm
        ``||W||_F``; a number or a tensor, as the others.
    largest_row
        Largest size of a row.
    largest_asked
        Largest right-hand side.
    tolerant
        Whether the problem has ties or rows that ask for 0, which hold to TIE_TOLERANCE only: a matrix large enough
        would make any margin out of that.
    """
    noise = (tolerant * 100.0 * TIE_TOLERANCE + (1 - tolerant) * ROUNDING) * norm * largest_row
    return (largest_asked <= 0.0) | (noise <= largest_asked)


def _weights(t: ProblemTensors, duals: Array, equality_duals: Array | None, where: str) -> tuple[Tensor, Tensor]:
    """Margin weights clipped to >= 0 and tie weights, zero where no row is."""
    shape = tuple(t.selected.shape)
    checked = []
    for name, value, rows in (("duals", duals, t.asked), ("equality_duals", equality_duals, tied(t.selected))):
        tensor = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        if value is not None:
            tensor = as_float(value, name, where=where, device=rows.device).to(torch.float64)
        if tuple(tensor.shape) != shape:
            raise InvalidInputError(f"{where}: {name} must have shape {shape}, got {tuple(tensor.shape)}.")
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInputError(f"{where}: {name} must be finite.")
        checked.append(torch.where(rows, tensor, torch.zeros((), dtype=torch.float64)))
    return checked[0].clamp(min=0.0), checked[1]


def check_ray(
    problem: TokenSelection,
    ray: Array,
    equality_ray: Array | None = None,
    *,
    center: Array | None = None,
    group: Any = None,
) -> RayCheck:
    """Check multipliers that are said to prove infeasibility.

    Parameters
    ----------
    problem
        A single problem (index a batch first).
    ray
        (n, Q, T); entries that are negative count as 0.
    equality_ray
        (n, Q, T) multipliers of the ties, of either sign.
    center
        As in :func:`certify`.
    group
        As in :func:`certify`. The sequences are those of this process.
    """
    if problem.is_batch:
        raise UnsupportedError("check_ray: a ray is checked for one problem at a time; pass problem[b].")
    margin_part, tie_part = _weights(problem.tensors, ray, equality_ray, "check_ray")
    largest = float(_reduced(torch.stack([margin_part.amax(), tie_part.abs().amax()]).amax(), group, "max"))
    if largest == 0.0:
        return RayCheck(valid=False, residual=math.inf, value=0.0, sequences=())
    weights = (margin_part + tie_part) / largest
    middle = None if center is None else problem.matrix(center, "check_ray").to(torch.float64)
    d = problem.shape[-1]
    sums = torch.zeros(3, dtype=torch.float64, device=weights.device)
    combination = torch.zeros((d, d), dtype=torch.float64, device=weights.device)
    for chosen, t in parts(problem.tensors):
        some = weights[chosen]
        demands = some * required(t, middle)
        sums += torch.stack([(some.abs() * row_sizes(t)).sum(), demands.sum(), demands.abs().sum()])
        combination += combine_rows(t, some)
    terms, value, demanded = _reduced(sums, group, "sum").tolist()
    size = float(torch.linalg.vector_norm(_reduced(combination, group, "sum")))
    residual = 0.0 if terms == 0.0 else size / terms
    named = weights.abs().amax((-2, -1)) > RAY_TOLERANCE
    return RayCheck(
        valid=residual <= RAY_TOLERANCE and value > RAY_TOLERANCE * demanded,
        residual=residual,
        value=value,
        sequences=tuple(int(i) for i in named.nonzero().flatten()),
    )


def _reduced(value: Tensor, group: Any, how: str) -> Tensor:
    """The sum or the largest over the processes of a group; the value itself where there is none."""
    if group is not None:
        from torch import distributed  # not part of every build of torch

        value = value.contiguous()
        distributed.all_reduce(value, distributed.ReduceOp.SUM if how == "sum" else distributed.ReduceOp.MAX, group)
    return value


@dataclass(kw_only=True)
class _Totals:
    """Sums (B,) and largest values (B,) over the rows of each problem."""

    combination: Tensor  # (B, d, d): sum(weight * A)
    sums: Tensor  # (6, B): weight * asked, weight * value, slack, |weight * asked|, |weight| * size, size
    most: Tensor  # (8, B): see _most

    @classmethod
    def over(cls, t: ProblemTensors, W: Tensor, weights: Tensor, center: Tensor | None, scales: bool) -> _Totals:
        """Read a batch (B, …) of problems, some sequences at a time; ``W`` (B, d, d) is the change from the centre."""
        lead, d = W.shape[0], W.shape[-1]
        totals = cls(
            combination=W.new_zeros(lead, d, d),
            sums=W.new_zeros(6, lead),
            most=W.new_full((8, lead), -math.inf),
        )
        size = torch.linalg.vector_norm(W, dim=(-2, -1))[:, None, None, None]
        for chosen, part in parts(t):
            asked, values, some = required(part, center), row_values(part, W), weights[:, chosen]
            short = torch.where(part.asked, asked - values, torch.zeros((), dtype=torch.float64))
            sizes, promises = row_sizes(part), some * asked
            counted = sizes * part.asked
            over_rows = [promises, some * values, short.clamp(min=0.0), promises.abs(), some.abs() * sizes, counted]
            totals.sums += torch.stack([value.sum((-3, -2, -1)) for value in over_rows])
            totals.combination += combine_rows(part, some)
            totals.most = torch.maximum(totals.most, _most(part, asked, values, short, sizes, size, scales))
        return totals

    def reduced(self, group: Any) -> _Totals:
        """Over all processes."""
        return _Totals(
            combination=_reduced(self.combination, group, "sum"),
            sums=_reduced(self.sums, group, "sum"),
            most=_reduced(self.most, group, "max"),
        )


def _most(
    t: ProblemTensors, asked: Tensor, values: Tensor, short: Tensor, sizes: Tensor, size: Tensor, scales: bool
) -> Tensor:
    """Largest over the rows (8, B): factor that W needs, whether a margin row or a tie fails for good, error of a tie,
    size of a row, right-hand side, whether a row holds to a tolerance only, and minus the smallest margin.
    """
    ties = tied(t.selected)
    rows = t.asked | ties
    unit = sizes * size
    positive = t.asked & (asked > 0)
    allowance = torch.where(asked == 0, TIE_TOLERANCE * unit, torch.zeros((), dtype=torch.float64))
    if not scales:
        ratio = torch.ones_like(values)
        failing = t.asked & (short > allowance)
    else:
        ratio = (asked / values).masked_fill(~positive, 0.0)
        failing = (t.asked & (asked == 0) & (short > allowance)) | (positive & (values <= 0))
    error = ((values - asked).abs() / unit).masked_fill(~(ties & (unit > 0)), 0.0)
    impossible = ties & (unit == 0) & (asked != 0)
    loose = (rows & (asked == 0)) | ties
    # The margin counts from the smallest selected logit, which is below the first one by what a tie is off.
    beyond = values - asked
    lowest = beyond.masked_fill(~ties, 0.0).amax(-1, keepdim=True).clamp(min=0.0)
    margins = (beyond + t.margin - lowest).masked_fill(~t.asked, math.inf)
    columns = [
        ratio.nan_to_num(posinf=math.inf),
        failing.double(),
        impossible.double(),
        error,
        sizes * rows,
        asked.masked_fill(~rows, -math.inf),
        loose.double(),
        -margins,
    ]
    return torch.stack([column.amax((-3, -2, -1)) for column in columns])


def certify(
    problem: TokenSelection,
    W: Array,
    duals: Array,
    equality_duals: Array | None = None,
    *,
    norm: Norm = "fro",
    penalty: float = math.inf,
    center: Array | None = None,
    group: Any = None,
) -> Certificate:
    """Bounds on the smallest objective of a matrix that selects the tokens, from ``W`` and ``duals`` alone.

    Parameters
    ----------
    problem
        One problem, or a batch of B.
    W
        (d, d), any finite matrix; (B, d, d) for a batch.
    duals
        (n, Q, T), with a leading B for a batch; entries that are negative, or where nothing is asked, count as 0, and
        entries above ``penalty`` count as it.
    equality_duals
        (n, Q, T) multipliers of the ties inside selected sets, of either sign.
    norm
        ``"fro"``, ``"nuc"``, ``"op"`` or p >= 1.
    penalty
        Price of a unit of slack; inf for the hard margin.
    center
        (d, d): the matrix from which the change is measured. Default: 0.
    group
        Where the sequences are spread over processes: their ``torch.distributed`` group. Every process passes its own
        sequences and the same ``W``, and gets the certificate of the whole.

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
    matrix = problem.matrix(W, "certify").to(torch.float64)
    middle = None if center is None else problem.matrix(center, "certify").to(torch.float64)
    margin_part, tie_part = _weights(problem.tensors, duals, equality_duals, "certify")
    margin_part = margin_part.clamp(max=penalty)
    t = problem.tensors if problem.is_batch else _as_batch(problem.tensors)
    change = matrix if middle is None else matrix - middle
    change = change.expand(len(t.selected), *change.shape[-2:])
    weights = (margin_part + tie_part).reshape(t.selected.shape)
    scales = t.offsets is None and middle is None and math.isinf(penalty)
    totals = _Totals.over(t, change, weights, middle, scales).reduced(group)
    anchor = 0.0 if middle is None else torch.linalg.vector_norm(middle, dim=(-2, -1))
    proof = _bounds(totals, change, norm, penalty, anchor)
    for b in proof.pop("suspect").nonzero().flatten().tolist():
        # A combination this small is rounding: it proves infeasibility, or nothing.
        one, rays = (
            (problem[b], (margin_part[b], tie_part[b])) if problem.is_batch else (problem, (margin_part, tie_part))
        )
        if check_ray(one, *rays, center=middle, group=group).valid:
            proof["lower_bound"][b], proof["gap"][b] = math.inf, -math.inf
    return Certificate(
        **{name: value.cpu().numpy() if problem.is_batch else value.item() for name, value in proof.items()}
    )


def _as_batch(t: ProblemTensors) -> ProblemTensors:
    """One problem as a batch of one."""
    return t._replace(
        tokens=t.tokens[None],
        queries=t.queries[None],
        allowed=t.allowed[None],
        selected=t.selected[None],
        asked=t.asked[None],
        offsets=None if t.offsets is None else t.offsets[None],
        margin=t.margin if t.margin.ndim == 0 else t.margin[None],
    )


def _bounds(totals: _Totals, W: Tensor, norm: Norm, penalty: float, anchor: Any) -> dict[str, Tensor]:
    """The numbers of the certificate, (B,) each, and which lower bounds may be rounding (``suspect``).

    ``anchor`` is the Frobenius norm of the centre, on which the right-hand sides were rounded.
    """
    soft = math.isfinite(penalty)
    promised, weighted, slack, demanded, terms, sizes = totals.sums
    ratio, failing, impossible, worst_tie, largest_row, largest_asked, loose, least = totals.most
    size = torch.linalg.vector_norm(W, dim=(-2, -1))
    stands_out = believable(ratio * size, largest_row, largest_asked, tolerant=loose)
    feasible = (impossible == 0) & (worst_tie <= TIE_TOLERANCE)
    if not soft:
        feasible &= (failing == 0) & torch.isfinite(ratio) & stands_out
    # Rows that no scaling helps ask for the factor 1, if they ask for anything.
    scale = torch.where(feasible, ratio, 1.0)
    norms, slope = matrix_norms(W, norm), dual_norms(totals.combination, norm)
    if soft:
        slack = slack + SUM_ROUNDING * sizes * (size + anchor)
    upper = torch.where(feasible, 0.5 * norms**2 + penalty * slack if soft else scale * norms, math.inf)
    # What rounding may have added to the promise, or taken from the combination, counts against the bound.
    sure, most = promised - SUM_ROUNDING * (demanded + anchor * terms), slope + SUM_ROUNDING * terms
    if soft:
        lower = (sure - 0.5 * most**2).clamp(min=0.0)
        suspect = torch.zeros_like(feasible)
        fit = torch.ones_like(slope)
    else:
        lower = torch.where((sure > 0) & (slope > 0), sure / most, 0.0)
        suspect = (promised > 0) & ((slope == 0) | (promised >= 1e12 * slope))
        fit = torch.where((slope > 0) & torch.isfinite(upper), upper / slope, 1.0)
    gap = torch.where(torch.isfinite(upper), (upper - lower) / upper, math.inf)
    excess = scale * weighted - promised + (penalty * slack if soft else 0.0)
    distance = torch.linalg.vector_norm(
        scale[:, None, None] * W - fit[:, None, None] * totals.combination, dim=(-2, -1)
    )
    off = torch.where(scale * size > 0, distance / (scale * size), 0.0)
    return {
        "feasible": feasible,
        "scale": scale,
        "upper_bound": upper,
        "lower_bound": lower,
        "gap": torch.where((upper == 0) & (lower == 0), 0.0, gap),
        "smallest_margin": torch.where(torch.isinf(least), math.inf, -scale * least),
        "worst_tie": worst_tie,
        "complementarity": torch.where(promised > 0, excess / promised, 0.0),
        "stationarity": off if norm == "fro" else torch.full_like(off, math.nan),
        "suspect": suspect,
    }
