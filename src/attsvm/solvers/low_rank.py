r"""The nuclear norm with a bound on the rank: a local method from several starts.

With ``W = K Q^T``, K (p, m) and Q (q, m), $\|W\|_* \le (\|K\|^2 + \|Q\|^2) / 2$ with equality when both factors come
from one singular-value decomposition, so the problem is

$$\min_{K, Q} \; \tfrac12 \|K\|^2 + \tfrac12 \|Q\|^2 \quad \text{s.t.} \quad \langle A_r, K Q^T \rangle \ge c_r .$$

It is not convex. A step of sequential quadratic programming changes both factors together, by the (k, h) that minimise

$$\langle K, k \rangle + \langle Q, h \rangle + \tfrac{1 + \mu}{2} (\|k\|^2 + \|h\|^2) - \gamma \langle G, k h^T \rangle
\quad \text{s.t.} \quad \langle A_r, K Q^T + k Q^T + K h^T \rangle \ge c_r ,$$

where $G = \sum l A$ belongs to the multipliers so far. With $\gamma = 1$ this is the curvature of the Lagrangian, which
is convex only where G has no singular value above 1; the model takes half of it and cuts larger values off, which
leaves a linear rate of about a half and needs no luck. As rows are of rank one the Gram matrix of the program is a sum
of elementwise products. Unlike turns of K alone and Q alone, which can stop where neither moves without the other, the
fixed points are stationary. W is then scaled to satisfy every row (or moved, where scaling does not help) and taken if
its norm fell. Before a start satisfies the rows, slack has a price that rises.

References
----------
Nocedal, Wright. "Numerical Optimization", 2006, chapter 18.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from attsvm.solvers import coordinate
from attsvm.solvers.loop import Iterate, Limits, Outcome, drive, scale_to_fit
from attsvm.solvers.newton import MAX_WORKING_SET, worst
from attsvm.solvers.repair import rigid
from attsvm.solvers.rows import Floats, Ints, Rows
from attsvm.solvers.solution import Status
from attsvm.solvers.view import RowView

__all__ = ["low_rank", "truncated"]

STARTS = 6
"""The truncated convex solution and perturbations of it, in turn with random factors of its size."""

AGREEMENT = 3
"""The search ends when this many starts have led to the best value."""

STEPS = 300
"""Steps from one start at most."""

CURVATURE = 0.5
"""The part of the curvature of the rows that the model takes."""

RIDGE = 1e-4
"""How strongly multipliers are held where they are, relative to the diagonal of a Gram matrix."""

APPROACHES = 8
"""Times that the price of slack rises, by a factor of 4."""

CORRECTIONS = 10
"""Steps towards the nearest matrix that satisfies every row at most."""

NEWTON_STEPS = 60
"""Factorisations for one quadratic program at most; it takes about ten."""

ROOM = 4e-12
"""How far beyond its bound a row is put that scaling cannot help, relative to its size and the norm of W."""


def low_rank(rows: Rows, *, W: Floats, dual: Floats, rank: int, tol: float, limits: Limits) -> Outcome:
    """The best matrix of at most the given rank that several starts lead to.

    Parameters
    ----------
    rows
        A feasible problem with hard margin.
    W, dual
        Solution (p, q) and multipliers (R,) of the problem without the bound.
    rank
        The bound, >= 1.
    tol, limits
        As in :func:`~attsvm.solvers.loop.drive`.

    Returns
    -------
    Outcome
        ``lower`` is the bound of the convex problem. Status OPTIMAL if it is met, LOCAL if the search came to its end
        with a matrix that satisfies the rows, else what stopped it. If no start led to one, ``upper`` is inf, the
        status ITERATION_LIMIT, and W the matrix of this rank with the smallest worst violation that was seen.
    """
    search = _Search(rows=rows, W=truncated(W, rank), rank=rank)
    outcome = drive(RowView(rows=rows), search.iterates(dual), norm="nuc", tol=tol, limits=limits)
    found = math.isfinite(outcome.upper)
    if outcome.status is Status.ITERATION_LIMIT and search.ended and found:
        outcome.status = Status.LOCAL
    outcome.W = truncated(outcome.W if found else search.nearest, rank)  # without what rounding added
    return outcome


@dataclass(kw_only=True)
class _Search:
    """The search from all starts, one after the other."""

    rows: Rows
    W: Floats  # the truncated convex solution
    rank: int
    nearest: Floats = field(init=False)
    """The matrix with the smallest worst violation so far."""
    shortfall: float = math.inf
    ended: bool = False

    def iterates(self, dual: Floats) -> Iterator[Iterate]:
        """Matrices that satisfy the rows, or none in their place: a repair from outside would raise the rank."""
        self._note(self.W)
        yield Iterate(W=_restored(self.rows, self.W, self.rank), dual=dual, step=0)
        generator = np.random.default_rng(0)
        ends: list[float] = []
        step = 0
        for start in range(STARTS):
            factors = []
            for factor in _factors(self.W, self.rank):
                noise = generator.standard_normal(factor.shape) * float(np.linalg.norm(factor)) / math.sqrt(factor.size)
                factors.append(noise if start % 2 else factor + 0.25 * start * noise)
            end = math.inf
            for W, size in _descend(self.rows, *factors, best=min(ends, default=math.inf)):
                step, end = step + 1, size
                self._note(W)
                yield Iterate(W=W if math.isfinite(size) else None, dual=None, step=step)
            ends.append(end)
            if math.isfinite(min(ends)) and sum(end <= (1.0 + 1e-6) * min(ends) for end in ends) == AGREEMENT:
                break
        self.ended = True

    def _note(self, W: Floats) -> None:
        short = _shortfall(self.rows, W, coordinate.values(self.rows, W))
        if short < self.shortfall:
            self.nearest, self.shortfall = W, short


def truncated(W: Floats, rank: int) -> Floats:
    """The nearest matrix to ``W`` (p, q) of at most this rank."""
    K, Q = _factors(W, rank)
    return K @ Q.T


def _factors(W: Floats, rank: int) -> tuple[Floats, Floats]:
    """Balanced factors (p, m) and (q, m) of the truncated ``W``."""
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(s[:rank])
    return U[:, :rank] * root, Vh[:rank].T * root


def _nuclear(W: Floats) -> float:
    return float(np.linalg.svd(W, compute_uv=False).sum())


def _shortfall(rows: Rows, W: Floats, values: Floats) -> float:
    """Largest violation of a row, relative to its size and the norm of W; negative where all hold with room."""
    short = rows.rhs - values
    short = np.where(rows.tie, np.abs(short), short)
    return float((short / rows.size).max()) / max(float(np.linalg.norm(W)), 1e-300)


def _descend(rows: Rows, K: Floats, Q: Floats, *, best: float) -> Iterator[tuple[Floats, float]]:
    """Matrices from one start and their norms (inf before the rows hold); ends early if ``best`` is out of reach."""
    rank = K.shape[1]
    W = _restored(rows, np.ascontiguousarray(K @ Q.T), rank)
    if W is None:
        for approach in _approach(rows, K, Q):
            yield approach, math.inf
            W = _restored(rows, approach, rank)
            if W is not None:
                break
        else:
            return
    dual, mu, quiet, sizes = np.zeros(rows.n_rows), 1.0, 0, [_nuclear(W)]
    while len(sizes) <= STEPS and quiet < 5 and mu < 1e6:
        yield W, sizes[-1]
        K, Q = _factors(W, rank)
        K, Q, dual = _step(rows, K, Q, dual, mu=mu, held=RIDGE * _weight(rows, K, Q), anchor=dual)
        found = _restored(rows, np.ascontiguousarray(K @ Q.T), rank)
        size = math.inf if found is None else _nuclear(found)
        if found is None or size >= sizes[-1]:
            mu *= 5.0
            continue
        quiet = 0 if size < (1.0 - 1e-8) * sizes[-1] else quiet + 1
        W, mu = found, max(0.3 * mu, 1e-4)
        sizes.append(size)
        if len(sizes) > 10 and size - best > 5.0 * (sizes[-11] - size):
            return  # fifty more steps like the last ten would not get there


def _approach(rows: Rows, K: Floats, Q: Floats) -> Iterator[Floats]:
    """Matrices (p, q) on the way to the rows: squared slack has a price that rises when the steps become small."""
    rank, dual, mu = K.shape[1], np.zeros(rows.n_rows), 1.0
    held = 0.1 * _weight(rows, K, Q)
    for _ in range(APPROACHES):
        now = _price(rows, K, Q, held)
        for _ in range(5):
            new_K, new_Q, dual = _step(rows, K, Q, dual, mu=mu, held=held, anchor=np.zeros_like(dual))
            new = _price(rows, new_K, new_Q, held)
            if new >= now:
                mu *= 5.0
                continue
            W, mu, fell, now = np.ascontiguousarray(new_K @ new_Q.T), max(0.3 * mu, 1e-3), now - new, new
            yield W
            K, Q = _factors(W, rank)
            if fell < 0.05 * now:
                break
        held = held / 4.0


def _price(rows: Rows, K: Floats, Q: Floats, held: Floats) -> float:
    """What the factors and their squared slack cost."""
    short = rows.rhs - coordinate.values(rows, np.ascontiguousarray(K @ Q.T))
    short = np.where(rows.tie, short, short.clip(min=0.0))
    return 0.5 * float((K * K).sum() + (Q * Q).sum() + (short * short / held).sum())


def _weight(rows: Rows, K: Floats, Q: Floats) -> Floats:
    """About the diagonal (R,) of the Gram matrix of the linearised rows."""
    mean = float((K * K).sum()) / len(K) + float((Q * Q).sum()) / len(Q)
    return np.asarray(mean * rows.size**2)


def _step(
    rows: Rows, K: Floats, Q: Floats, dual: Floats, *, mu: float, held: Floats, anchor: Floats
) -> tuple[Floats, Floats, Floats]:
    """The factors after one step, and the multipliers (R,) of its quadratic program; ``dual`` are those before it.

    Multipliers are held at ``anchor`` with the weights ``held``, which is slack at a price: the program has a solution
    even where the linearised rows have none, and a tame Gram matrix. Where they stay, the slack is 0.
    """
    W = np.ascontiguousarray(K @ Q.T)
    values = coordinate.values(rows, W)
    unit = np.maximum(np.abs(rows.rhs), 1e-3 * float(np.linalg.norm(W)) * rows.size)
    model = _Model.of(coordinate.combine(rows, dual), mu)
    down = model.solved(K, Q)  # without rows the step would be its negative
    target = rows.rhs - values + _linear(rows, K, Q, *down) + held * anchor
    near = values < rows.rhs + 0.1 * unit
    short = (rows.rhs - values) / rows.size
    member = rows.tie | (dual > 0) | worst(near, short, limit=100 + 2 * (K.size + Q.size))
    while True:
        index = member.nonzero()[0]
        dual = np.where(member, dual, 0.0)
        scale, tie = torch.from_numpy(np.sqrt(held[index])), torch.from_numpy(rows.tie[index])
        gram = _gram(rows, index, K, Q, model).div_(scale).div_(scale[:, None])
        guess = torch.from_numpy(dual[index]) * scale
        dual[index] = (_multipliers(gram, torch.from_numpy(target[index]) / scale, tie, guess) / scale).numpy()
        G = coordinate.combine(rows, dual)
        k, h = model.solved(G @ Q - K, G.T @ K - Q)
        short = rows.rhs - values - _linear(rows, K, Q, k, h)
        entering = ~member & (short > 1e-6 * unit)
        if not entering.any() or len(index) > MAX_WORKING_SET:
            return K + k, Q + h, dual
        member |= worst(entering, short / rows.size, limit=max(100, len(index) // 2))


def _linear(rows: Rows, K: Floats, Q: Floats, k: Floats, h: Floats) -> Floats:
    """The change of the rows (R,) to first order in the changes ``k`` and ``h`` of the factors."""
    return coordinate.values(rows, np.ascontiguousarray(k @ Q.T + K @ h.T))


@dataclass(frozen=True, kw_only=True)
class _Model:
    """The inverse of the model's curvature, ``(1 + mu) I - gamma [[0, G], [G^T, 0]]``, in blocks."""

    left: Floats  # (p, p)
    right: Floats  # (q, q)
    cross: Floats  # (p, q)

    @classmethod
    def of(cls, G: Floats, mu: float) -> _Model:
        """Invert it in the bases of the singular vectors of ``G`` (p, q)."""
        U, g, Vh = np.linalg.svd(G, full_matrices=False)
        g, own = CURVATURE * np.minimum(g, 1.0), 1.0 + mu
        beyond = own / (own * own - g * g) - 1.0 / own
        return cls(
            left=(U * beyond) @ U.T + np.eye(len(U)) / own,
            right=(Vh.T * beyond) @ Vh + np.eye(Vh.shape[1]) / own,
            cross=(U * (g / (own * own - g * g))) @ Vh,
        )

    def solved(self, k: Floats, h: Floats) -> tuple[Floats, Floats]:
        """The inverse times a pair (p, m), (q, m)."""
        return self.left @ k + self.cross @ h, self.right @ h + self.cross.T @ k


def _gram(rows: Rows, index: Ints, K: Floats, Q: Floats, model: _Model) -> Tensor:
    """Inner products (k, k) of the linearised rows, in the metric of the model."""
    D, Z = rows.differences(index), rows.queries[rows.block[index]]
    X, Y = D @ K, Z @ Q
    mixed = (D @ model.cross @ Z.T) * (Y @ X.T)
    return torch.from_numpy((D @ model.left @ D.T) * (Y @ Y.T) + (Z @ model.right @ Z.T) * (X @ X.T) + mixed + mixed.T)


def _multipliers(gram: Tensor, target: Tensor, tie: Tensor, guess: Tensor) -> Tensor:
    """``argmin l^T K l / 2 + ||max(0, target - K l)||^2 / 2`` (k,), without the max for ties.

    This is Newton's method on the primal objective, whose exact line searches make it end: unlike an exchange of the
    active rows alone it cannot cycle, which here, with more rows than unknowns, it would.
    """
    answer = guess
    values = gram @ answer
    for _ in range(NEWTON_STEPS):
        free = tie | (target > values)
        index = free.nonzero().flatten()
        system = gram[index][:, index]
        system.diagonal().add_(1.0)
        new = torch.zeros_like(answer)
        factor = torch.linalg.cholesky_ex(system)[0]
        new[index] = torch.cholesky_solve(target[index, None], factor)[:, 0]
        reached = gram @ new
        if bool(((tie | (target > reached)) == free).all()):
            return new
        change, moved = new - answer, reached - values
        step = _line_search(float(change @ values), float(change @ moved), target - values, moved, tie)
        answer, values = answer + step * change, values + step * moved
    return torch.where(tie, answer, answer.clamp(min=0.0))


def _line_search(slope: float, curvature: float, short: Tensor, moved: Tensor, tie: Tensor) -> float:
    """The s in [0, 1] with the least ``slope s + curvature s^2 / 2 + ||max(0, short - s moved)||^2 / 2``."""
    low, high = 0.0, 1.0
    for s in (1.0, *[math.nan] * 40):
        s = 0.5 * (low + high) if math.isnan(s) else s
        left = short - s * moved
        if slope + curvature * s < float(torch.where(tie, left, left.clamp(min=0.0)) @ moved):
            low = s
        else:
            high = s
        if low == 1.0:
            break
    return high


def _restored(rows: Rows, W: Floats, rank: int) -> Floats | None:
    """A matrix with the row space of ``W`` that satisfies every row, or None: scaled, or the nearest one."""
    values = coordinate.values(rows, W)
    if not rigid(rows).any():
        factor = scale_to_fit(rows, values)
        return factor * W if math.isfinite(factor) else None
    if _shortfall(rows, W, values) > 0.1:
        return None
    V = np.linalg.svd(W)[2][:rank].T
    unit = rows.size * float(np.linalg.norm(W))
    goal = np.where(rows.tie, rows.rhs, rows.rhs + ROOM * unit)
    member = rows.tie | (values < goal + 0.1 * unit)
    first, start, dual = W @ V @ V.T, values, np.zeros(rows.n_rows)
    for _ in range(CORRECTIONS):
        if not np.any(np.where(rows.tie, np.abs(goal - values), goal - values) > 0.5 * ROOM * unit):
            return W
        index = member.nonzero()[0]
        D, Y = rows.differences(index), rows.queries[rows.block[index]] @ V
        scale, tie = torch.from_numpy(1e-3 * rows.size[index]), torch.from_numpy(rows.tie[index])
        gram = torch.from_numpy((D @ D.T) * (Y @ Y.T)).div_(scale).div_(scale[:, None])
        held = torch.from_numpy(dual[index]) * scale
        target = torch.from_numpy((goal - start)[index]) / scale + held
        dual[index] = (_multipliers(gram, target, tie, held) / scale).numpy()
        W = np.ascontiguousarray(first + coordinate.combine(rows, dual) @ V @ V.T)
        values = coordinate.values(rows, W)
        member |= values < goal
    return None
