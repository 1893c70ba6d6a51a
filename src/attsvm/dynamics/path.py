r"""Regularisation paths: the best matrix within a ball, as the ball grows.

For W the ball is $\|W\|_F \le R$, for (K, Q) it is $\|K\|_F^2 + \|Q\|_F^2 \le 2R$, which for $W = K Q^\top$ is
$\|W\|_* \le R$. The theory: as R grows, $W_R / R$ turns towards the max-margin solution of the ball's norm. Losses of
different starts differ by less than float64 holds once R is large, so they are compared by

$$\log (L(W) - \inf L), \qquad \inf L = \tfrac1n \sum_{i} \ell(\max_t \gamma_{it}),$$

computed from log-probabilities without forming the difference.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attsvm.dynamics.cone import Cone, into_ball, into_nuclear_ball
from attsvm.dynamics.layer import Data, gradient, log_probabilities
from attsvm.dynamics.losses import Loss, find_loss
from attsvm.dynamics.parameters import Parameters, based_queries
from attsvm.dynamics.start import read_data
from attsvm.errors import InvalidInputError
from attsvm.selection.arrays import Array
from attsvm.selection.geometry import correlation
from attsvm.selection.norms import Norm, matrix_norms
from attsvm.selection.problem import TokenSelection
from attsvm.selection.reading import read_scores
from attsvm.solvers.solve import solve
from attsvm.threads import threads_for

__all__ = ["RegularizationPath", "regularization_path"]

STEP, SLOWING = 0.05, 40.0
"""Length of the first step relative to R, and the number of steps after which it has halved."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RegularizationPath:
    """The best matrices found for growing bounds; a batch adds a leading B to all but ``radii``.

    Attributes
    ----------
    radii
        (R,) bounds on the norm, ascending.
    W
        (R, d, d).
    loss
        (R,): the loss at W.
    log_gap
        (R,): natural logarithm of the loss minus its infimum over all matrices, exact where the difference underflows.
    norm
        (R,): Frobenius norm of W, or nuclear norm for (K, Q).
    selected
        (R, n, Q): the token of highest logit.
    parameterization
        ``"W"`` or ``"KQ"``.
    """

    radii: Any
    W: Any
    loss: Any
    log_gap: Any
    norm: Any
    selected: Any
    parameterization: str

    def correlation(self, solution: Any) -> Any:
        """Cosine of every W with a solution or matrix (d, d), (R,); for a batch with a tuple of B, (B, R)."""
        if not isinstance(solution, (tuple, list)):
            return correlation(self.W, getattr(solution, "W", solution))
        rows = [torch.as_tensor(correlation(W, getattr(s, "W", s))) for W, s in zip(self.W, solution, strict=True)]
        stacked = torch.stack(rows)
        return stacked if isinstance(self.W, Tensor) else stacked.numpy()


def regularization_path(
    problem: TokenSelection,
    scores: Array,
    radii: Sequence[float],
    *,
    parameterization: Literal["W", "KQ"] = "W",
    rank: int | None = None,
    loss: str = "logistic",
    cone: float | Literal["auto"] | None = None,
    starts: int = 6,
    steps: int = 4000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RegularizationPath:
    r"""Minimise the loss over balls of growing norm, and over the part of them in a cone.

    Solves, for each R, $\min \frac1n \sum_{i,q} \ell(\gamma_{iq}^\top \mathrm{softmax}(X_i W z_{iq} + b_{iq}))$ over
    $\|W\|_F \le R$, or over $\|K\|_F^2 + \|Q\|_F^2 \le 2R$ with $W = K Q^\top$.

    Parameters
    ----------
    problem
        Tokens, queries, what is allowed, and offsets. ``selected`` matters for a cone only. A batch makes B paths.
    scores
        (n, T) or (n, Q, T), with a leading B for a batch.
    radii
        Bounds R > 0, ascending.
    parameterization
        ``"W"`` or ``"KQ"``.
    rank
        Columns of K and Q; default d.
    loss
        ``"logistic"``, ``"exponential"`` or ``"correlation"``.
    cone
        None: all matrices. Otherwise the opening eps > 0 of the cone around the selection of ``problem`` to stay in,
        as in :mod:`attsvm.dynamics.cone`; ``"auto"`` is half of what its max-margin solution has, which is positive
        where the selection is locally optimal. With (K, Q) the search is then over W in the nuclear-norm ball, and
        ``rank`` must be None.
    starts
        Starts of each R: the solution for the previous R, W = 0 (the centre of the cone, for a cone), and random ones.
    steps
        Steps of each start.
    seed
        For the random starts.
    progress
        Called with (radii done, radii) after each R.

    Returns
    -------
    RegularizationPath
        Computed in float64; arrays of the problem's kind and dtype.

    Raises
    ------
    InvalidInputError
        If an argument is not what it must be, or no matrix lies in the cone.

    Notes
    -----
    The problem is not convex. Each start follows the normalised gradient, which does not underflow, with steps of
    $0.05 R / (1 + k/40)$ and a projection onto the ball (and the cone) after each; of all starts that of the least
    loss counts. Cost: ``starts * steps`` gradients for each R, all starts and problems at once.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898, global and
    local regularisation paths.

    Examples
    --------
    >>> problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0])
    >>> path = regularization_path(problem, [[1.0, 0.0]], [2.0, 4.0], steps=200)
    >>> path.W[-1].round(6) + 0.0
    array([[4., 0.],
           [0., 0.]])
    """
    bounds = _check(problem, radii, parameterization, rank, cone, starts, steps, seed)
    rule = find_loss(loss, where="regularization_path")
    many, values = _repeated(problem, scores, starts)
    data, _ = read_data(many, values, None)
    queries, basis = based_queries(data.queries)
    data = data._replace(queries=queries)
    region = centre = None
    if cone is not None:
        centre, reach = _centre(problem, basis, starts, "fro" if parameterization == "W" else "nuc")
        opening = None if cone == "auto" else cone
        region = Cone(many.tensors, data.scores, data.queries, centre=centre, reach=reach, opening=opening)
        _check_cone(region, starts)
    draw = torch.Generator().manual_seed(seed)
    columns = problem.shape[-1] if rank is None else rank
    nuclear = parameterization == "KQ"
    search: _Search
    if nuclear and cone is None:
        search = _FactorSearch(data, basis, rule, starts=starts, steps=steps, draw=draw, rank=columns)
    else:
        search = _MatrixSearch(
            data, basis, rule, starts=starts, steps=steps, draw=draw, region=region, centre=centre, nuclear=nuclear
        )
    n, Q, T, d = problem.shape
    found = []
    with threads_for(4.0 * len(problem) * starts * n * Q * T * d):
        for k, radius in enumerate(bounds):
            found.append(search.best(radius))
            if progress is not None:
                progress(k + 1, len(bounds))
    W, loss_values, gaps, selected = (torch.stack(parts, 1) for parts in zip(*found, strict=True))

    def out(value: Tensor) -> Any:
        return problem.kind.back(value if problem.is_batch else value[0])

    return RegularizationPath(
        radii=problem.kind.back(torch.tensor(bounds, dtype=torch.float64)),
        W=out(W),
        loss=out(loss_values),
        log_gap=out(gaps),
        norm=out(matrix_norms(W, "nuc" if nuclear else "fro")),
        selected=out(selected),
        parameterization=parameterization,
    )


def log_gap(data: Data, keys: Tensor, loss: Loss) -> Tensor:
    """Logarithm (B,) of the loss minus its infimum, at ``keys`` = W z; exact however small the difference is."""
    logs = log_probabilities(data, keys)
    allowed = data.allowed & data.active.unsqueeze(-1)
    best = data.scores.masked_fill(~allowed, -math.inf).amax(-1, keepdim=True)
    best = torch.where(data.active.unsqueeze(-1), best, torch.zeros_like(best))
    short = (best - data.scores).clamp(min=0.0).masked_fill(~allowed, 0.0)
    # How far the output is below the best score: a sum of terms >= 0, so nothing cancels.
    log_drop = torch.logsumexp(logs + short.log(), -1)
    best, drop = best.squeeze(-1), log_drop.exp()
    # Below 1e-6 the difference is the slope times the drop to ten digits, and loses as many when it is formed.
    formed = (loss.value(best - drop) - loss.value(best)).clamp(min=torch.finfo(drop.dtype).tiny).log()
    terms = torch.where(drop > 1e-6, formed, (-loss.slope(best)).log() + log_drop)
    terms = terms.masked_fill(~data.active, -math.inf)
    return torch.logsumexp(terms.flatten(1), -1) - math.log(data.queries.shape[1])


class _Search(ABC):
    """Finds the best matrix for one radius after the other, starting each from the last and from anywhere."""

    def __init__(
        self, data: Data, basis: Tensor | None, loss: Loss, *, starts: int, steps: int, draw: torch.Generator
    ) -> None:
        self.data, self.basis, self.loss = data, basis, loss
        self.starts, self.steps, self.draw = starts, steps, draw
        self.n_runs, self.d = data.store.shape[0], data.store.shape[-1]
        self.previous: tuple[float, tuple[Tensor, ...]] | None = None

    def best(self, radius: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W (B, d, d) of the least loss, its loss and log-gap (B,), and what it selects (B, n, Q)."""
        tensors = self.project(self.start(radius), radius)
        for k in range(self.steps):
            parameters = self.parameters(tensors)
            g = gradient(self.data, parameters.keys(self.data.queries), self.loss)
            slopes = parameters.slopes(g, self.data.queries)
            # The largest entry first, so that no square leaves the range of float64.
            top = torch.stack([slope.flatten(1).abs().amax(-1) for slope in slopes]).amax(0).view(-1, 1, 1)
            slopes = tuple(slope / torch.where(top > 0, top, 1.0) for slope in slopes)
            size = sum(slope.square().sum((-2, -1), keepdim=True) for slope in slopes)
            rate = STEP * self.reach(radius) / (1.0 + k / SLOWING) / torch.as_tensor(size).sqrt().clamp(min=1e-300)
            tensors = self.project(tuple(t - rate * s for t, s in zip(tensors, slopes, strict=True)), radius)
        parameters = self.parameters(tensors)
        keys = parameters.keys(self.data.queries)
        gaps, at_end = log_gap(self.data, keys, self.loss), gradient(self.data, keys, self.loss)
        gaps = gaps.masked_fill(~self.admits(tensors, radius), math.inf)
        W = parameters.matrix()
        # The first of equals, whatever the sizes: argmin breaks ties by position.
        least = gaps.view(-1, self.starts).argmin(-1)
        chosen = torch.arange(0, self.n_runs, self.starts, device=least.device) + least
        self.previous = radius, tuple(t[chosen].repeat_interleave(self.starts, 0) for t in tensors)
        if not bool(torch.isfinite(gaps[chosen]).all()):
            raise InvalidInputError("regularization_path: cone must hold a matrix; none was found, lower its opening.")
        selected = torch.where(self.data.active, at_end.selected, torch.full_like(at_end.selected, -1))
        return W[chosen], at_end.loss[chosen], gaps[chosen], selected[chosen]

    def start(self, radius: float) -> tuple[Tensor, ...]:
        """One start a run: the previous solution, then zero, then random ones."""
        fresh = self.fresh(radius)
        if self.previous is None:
            return fresh
        before, tensors = self.previous
        factor = self.reach(radius) / self.reach(before)
        first = (torch.arange(self.n_runs, device=fresh[0].device) % self.starts == 0).view(-1, 1, 1)
        return tuple(torch.where(first, factor * old, new) for old, new in zip(tensors, fresh, strict=True))

    def random(self, columns: int, rows: int) -> Tensor:
        """Gaussian matrices (B * starts, rows, columns), the same for every problem of a batch."""
        values = torch.randn(self.starts, rows, columns, generator=self.draw, dtype=torch.float64)
        return values.repeat(self.n_runs // self.starts, 1, 1).to(self.data.queries.device)

    def parameters(self, tensors: tuple[Tensor, ...]) -> Parameters:
        """The tensors as parameters of the layer."""
        right = tensors[1] if len(tensors) == 2 else None
        return Parameters(left=tensors[0], right=right, basis=self.basis, outside=torch.zeros(()))

    @abstractmethod
    def fresh(self, radius: float) -> tuple[Tensor, ...]:
        """Starts that owe nothing to the previous radius; the second of each problem is (nearly) 0."""

    @abstractmethod
    def project(self, tensors: tuple[Tensor, ...], radius: float) -> tuple[Tensor, ...]:
        """The nearest point that is allowed."""

    @abstractmethod
    def reach(self, radius: float) -> float:
        """Norm of the tensors on the boundary."""

    def admits(self, tensors: tuple[Tensor, ...], radius: float) -> Tensor:
        """(B,): which runs ended at a point that is allowed."""
        return torch.ones(self.n_runs, dtype=torch.bool, device=tensors[0].device)


class _MatrixSearch(_Search):
    """Over W in the Frobenius ball or the nuclear one, and in a cone if there is one."""

    def __init__(self, *given: Any, region: Cone | None, centre: Tensor | None, nuclear: bool, **options: Any) -> None:
        super().__init__(*given, **options)
        self.region, self.centre, self.nuclear = region, centre, nuclear

    def fresh(self, radius: float) -> tuple[Tensor, ...]:
        W = self.random(self.data.queries.shape[-1], self.d)
        W = radius * W / torch.linalg.vector_norm(W, dim=(-2, -1), keepdim=True)
        still = torch.zeros_like(W)
        if self.centre is not None:
            # Near the middle: a cone is thin, and what a random matrix is projected to is its edge.
            still = radius * self.centre
            W = still + 0.3 * W
        second = torch.arange(self.n_runs, device=W.device) % self.starts == min(1, self.starts - 1)
        return (torch.where(second.view(-1, 1, 1), still, W),)

    def project(self, tensors: tuple[Tensor, ...], radius: float) -> tuple[Tensor, ...]:
        if self.region is not None:
            return (self.region.project(tensors[0], radius, nuclear=self.nuclear),)
        return (into_nuclear_ball(tensors[0], radius) if self.nuclear else into_ball(tensors[0], radius),)

    def reach(self, radius: float) -> float:
        return radius

    def admits(self, tensors: tuple[Tensor, ...], radius: float) -> Tensor:
        if self.region is None:
            return super().admits(tensors, radius)
        return self.region.holds(tensors[0], radius)


class _FactorSearch(_Search):
    """Over (K, Q) with ``||K||^2 + ||Q||^2 <= 2 R``."""

    def __init__(self, *given: Any, rank: int, **options: Any) -> None:
        super().__init__(*given, **options)
        self.rank = rank

    def fresh(self, radius: float) -> tuple[Tensor, ...]:
        K, Q = self.random(self.rank, self.d), self.random(self.rank, self.data.queries.shape[-1])
        size = (K.square().sum((-2, -1), keepdim=True) + Q.square().sum((-2, -1), keepdim=True)).sqrt()
        second = torch.arange(self.n_runs, device=K.device) % self.starts == min(1, self.starts - 1)
        scale = torch.where(second.view(-1, 1, 1), 0.01, self.reach(radius)) / size
        return scale * K, scale * Q

    def project(self, tensors: tuple[Tensor, ...], radius: float) -> tuple[Tensor, ...]:
        both = into_ball(torch.cat(tensors, 1), self.reach(radius))
        return both[:, : self.d], both[:, self.d :]

    def reach(self, radius: float) -> float:
        return math.sqrt(2.0 * radius)


def _repeated(problem: TokenSelection, scores: Array, starts: int) -> tuple[TokenSelection, Tensor]:
    """A batch with every problem ``starts`` times in a row, and its scores (B * starts, n, Q, T)."""
    t = problem.tensors
    values = read_scores(scores, t.allowed, where="regularization_path")
    parts = (t.tokens, t.queries, t.selected, t.allowed, values, t.offsets)
    many = [
        None if part is None else (part if problem.is_batch else part.unsqueeze(0)).repeat_interleave(starts, 0)
        for part in parts
    ]
    tokens, queries, selected, allowed, repeated, offsets = many
    assert repeated is not None
    return TokenSelection(tokens, queries, selected, allowed=allowed, offsets=offsets), repeated


def _centre(problem: TokenSelection, basis: Tensor | None, starts: int, norm: Norm) -> tuple[Tensor, Tensor]:
    """Max-margin directions (B * starts, d, r) of norm 1 in the basis, the middle of the cones; and margins (B,)."""
    W = torch.as_tensor(solve(problem, norm, on_failure="ignore").W).to(torch.float64)
    W = (W if problem.is_batch else W.unsqueeze(0)).repeat_interleave(starts, 0)
    margin = 1.0 / matrix_norms(W, norm).clamp(min=torch.finfo(W.dtype).tiny)
    W = W * margin.view(-1, 1, 1)
    return W if basis is None else W @ basis, margin


def _check_cone(region: Cone, starts: int) -> None:
    """The cone must hold the max-margin direction that it is drawn around."""
    inside = (region.opening > 0) & (region.opening <= region.depth)
    if not bool(inside.all()):
        b = int((~inside).int().argmax())
        whose = f"problem {b // starts}" if len(inside) > starts else "this selection"
        raise InvalidInputError(
            f"regularization_path: cone must be at most {float(region.depth[b]):.3g} for {whose}, got "
            f"{float(region.opening[b]):.3g}. A selection that is not locally optimal has no cone."
        )


def _check(
    problem: Any, radii: Any, parameterization: Any, rank: Any, cone: Any, starts: Any, steps: Any, seed: Any
) -> list[float]:
    where = "regularization_path"
    if not isinstance(problem, TokenSelection):
        raise InvalidInputError(f"{where}: problem must be a TokenSelection, got {type(problem).__name__}.")
    if parameterization not in ("W", "KQ"):
        raise InvalidInputError(f'{where}: parameterization must be "W" or "KQ", got {parameterization!r}.')
    bounds = [float(radius) for radius in np.ravel(np.asarray(radii, dtype=float))]
    if not bounds or not all(0 < radius < math.inf for radius in bounds) or sorted(set(bounds)) != bounds:
        raise InvalidInputError(f"{where}: radii must be finite, > 0 and ascending, got {bounds}.")
    if rank is not None and (parameterization == "W" or cone is not None):
        raise InvalidInputError(f'{where}: rank must be None for parameterization="W" and for a cone, got {rank!r}.')
    for name, value, least in (("rank", rank, 1), ("starts", starts, 1), ("steps", steps, 1), ("seed", seed, 0)):
        if value is None and name == "rank":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidInputError(f"{where}: {name} must be an integer >= {least}, got {value!r}.")
    if cone is not None and cone != "auto" and not (isinstance(cone, (int, float)) and 0 < cone < math.inf):
        raise InvalidInputError(f'{where}: cone must be > 0 and finite, "auto" or None, got {cone!r}.')
    if cone is not None and bool((problem.tensors.selected.sum(-1) > 1).any()):
        raise InvalidInputError(f"{where}: problem must select one token a query for a cone.")
    return bounds
