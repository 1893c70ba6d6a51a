"""A problem as the solvers read it: rows grouped in blocks, one block a query, in float64 NumPy arrays.

Row r of block b says ``<(x_a - x_t) z^T, W> >= rhs_r`` (or ``=`` for a tie), with a the block's first selected
token. Rows are never expanded to d x d; tokens are stored once, however many queries look at them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attsvm.selection.constraints import in_double, parts, representatives, required, row_sizes, tied
from attsvm.selection.problem import ProblemTensors, TokenSelection

__all__ = ["Rows", "basis", "compile_rows"]

BASIS_BYTES = 64 * 2**20
"""Size of the copies that are made while looking for dependent tokens."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one problem, in a reduced basis: ``W = left @ W_reduced @ right.T``.

    Attributes
    ----------
    tokens
        (n, T, p) in the left basis.
    queries
        (m, q): the query of each block, in the right basis.
    sequence, first, start
        (m,), (m,), (m + 1,): each block's sequence, its first selected token, and where its rows begin.
    token, tie, rhs
        (R,): each row's token t, whether it is an equality, and its right-hand side.
    size
        (R,): ``||x_a - x_t|| ||z||``.
    place
        (3, R): sequence, query and token of each row.
    left, right
        (d, p) and (d, q) with orthonormal columns, or None for the identity.
    broken
        Places (3, k) of rows that no matrix can satisfy: of zero size, but asking for something.
    broken_rhs, broken_tie
        (k,): their right-hand sides, and which are ties.
    penalty
        Price C of a unit of slack, which bounds the multipliers of the margin rows; inf for the hard margin.
    anchor
        Frobenius norm of the centre, if there is one: what W is added to, and rounded with, at the end.
    """

    tokens: Floats
    queries: Floats
    sequence: Ints
    first: Ints
    start: Ints
    token: Ints
    tie: Bools
    rhs: Floats
    size: Floats
    place: Ints
    left: Floats | None
    right: Floats | None
    broken: Ints
    broken_rhs: Floats
    broken_tie: Bools
    shape: tuple[int, int, int]
    has_offsets: bool
    penalty: float = math.inf
    anchor: float = 0.0

    @property
    def fatal(self) -> Bools:
        """(k,): the broken rows that settle the problem: with slack, only ties do."""
        return self.broken_tie if math.isfinite(self.penalty) else np.ones_like(self.broken_tie)

    @property
    def n_rows(self) -> int:
        """Number of rows R."""
        return len(self.token)

    @property
    def block(self) -> Ints:
        """(R,): the block of each row."""
        return np.repeat(np.arange(len(self.sequence)), np.diff(self.start))

    def differences(self, rows: Ints) -> Floats:
        """``x_a - x_t`` (k, p) of the given rows."""
        block = self.block[rows]
        i = self.sequence[block]
        return self.tokens[i, self.first[block]] - self.tokens[i, self.token[rows]]

    def of_sequences(self, sequences: Ints) -> tuple[Ints, Rows]:
        """The rows of some sequences: their numbers (k,) among all, and a problem of their own."""
        blocks = np.flatnonzero(np.isin(self.sequence, sequences))
        counts = np.diff(self.start)[blocks]
        index = np.flatnonzero(np.isin(self.block, blocks))
        return index, replace(
            self,
            queries=self.queries[blocks],
            sequence=self.sequence[blocks],
            first=self.first[blocks],
            start=np.append(0, np.cumsum(counts)),
            token=self.token[index],
            tie=self.tie[index],
            rhs=self.rhs[index],
            size=self.size[index],
            place=np.ascontiguousarray(self.place[:, index]),
        )

    def expand(self, W: Floats) -> Floats:
        """A matrix of the reduced basis (p, q) as (d, d)."""
        if self.left is not None:
            W = self.left @ W
        return W if self.right is None else W @ self.right.T

    def reduce(self, W: Floats) -> Floats:
        """The part of a matrix (d, d) that the rows see, in the reduced basis (p, q)."""
        if self.left is not None:
            W = self.left.T @ W
        return np.ascontiguousarray(W if self.right is None else W @ self.right)

    def scatter(self, weights: Floats, *, ties: bool) -> Floats:
        """Row weights (R,) as (n, Q, T): those of the ties, or those of the margin rows."""
        full = np.zeros(self.shape)
        chosen = self.tie == ties
        full[tuple(self.place[:, chosen])] = weights[chosen]
        return full

    def gather(self, duals: Floats, equality_duals: Floats) -> Floats:
        """The inverse of :meth:`scatter`: (n, Q, T) multipliers as row weights (R,)."""
        index = tuple(self.place)
        return np.asarray(np.where(self.tie, equality_duals[index], np.maximum(duals[index], 0.0)))


def compile_rows(
    problem: TokenSelection, *, reduce: bool = True, penalty: float = math.inf, center: Floats | None = None
) -> Rows:
    """Read the rows of a single problem.

    Parameters
    ----------
    problem
        Not a batch.
    reduce
        Whether to work in the span of the token differences x the span of the queries, which holds the minimiser
        for the Frobenius, nuclear and operator norms, when that is smaller.
    penalty
        Price of a unit of slack.
    center
        (d, d): rows are those of the change from it.
    """
    t = in_double(problem.tensors)
    ties = tied(t.selected)
    place = _numpy((t.asked | ties).nonzero()).T
    X, Z = _numpy(t.tokens), _numpy(t.queries)
    tie = _numpy(ties)[tuple(place)]
    size, rhs = _measured(t, place, center)
    first = _numpy(representatives(t.selected))
    empty = size == 0.0
    broken = empty & np.where(tie, rhs != 0.0, rhs > 0.0)
    keep = ~empty
    i, q, token = place[:, keep]
    # Rows come in the order of their queries, so that a block begins wherever the query changes.
    query_id = i * Z.shape[1] + q
    start = np.append(np.flatnonzero(np.diff(query_id, prepend=-1)), len(i))
    b_seq, b_query = i[start[:-1]], q[start[:-1]]
    queries = Z[b_seq, b_query]
    left = right = None
    if reduce and keep.any():
        differences = None if len(i) >= X.shape[2] else X[i, first[i, q]] - X[i, token]
        left = basis(differences) if differences is not None else basis(X.reshape(-1, X.shape[2]))
        right = basis(queries)
    return Rows(
        tokens=np.ascontiguousarray(X if left is None else X @ left),
        queries=np.ascontiguousarray(queries if right is None else queries @ right),
        sequence=b_seq,
        first=first[b_seq, b_query],
        start=start.astype(np.int64),
        token=token,
        tie=tie[keep],
        rhs=rhs[keep],
        size=size[keep],
        place=place if keep.all() else place[:, keep],
        left=left,
        right=right,
        broken=place[:, broken],
        broken_rhs=rhs[broken],
        broken_tie=tie[broken],
        shape=(X.shape[0], Z.shape[1], X.shape[1]),
        has_offsets=t.offsets is not None or center is not None,
        penalty=penalty,
        anchor=0.0 if center is None else float(np.linalg.norm(center)),
    )


def _measured(t: ProblemTensors, place: Ints, center: Floats | None) -> tuple[Floats, Floats]:
    """Size and right-hand side (R,) of the rows at ``place``, read some sequences at a time."""
    middle = None if center is None else torch.from_numpy(center).to(t.tokens.device)
    size, rhs = np.empty(place.shape[1]), np.empty(place.shape[1])
    for chosen, part in parts(t, double=True):
        begin, end = np.searchsorted(place[0], [chosen.start, chosen.stop])
        i, q, token = place[:, begin:end]
        where = (i - chosen.start, q, token)
        size[begin:end] = _numpy(row_sizes(part))[where]
        rhs[begin:end] = _numpy(required(part, middle))[where]
    return size, rhs


def basis(vectors: Floats) -> Floats | None:
    """Orthonormal columns (d, k) that span the given rows (m, d), or None when they span everything."""
    m, d = vectors.shape
    if m < d:
        return np.asarray(np.linalg.qr(vectors.T)[0])
    lengths = np.sqrt(np.einsum("md,md->m", vectors, vectors))
    # Unit vectors, so that no scale is taken for dependence; the Gram matrix sees only half of the digits, and
    # settles the usual case, where nothing is dependent.
    gram = np.zeros((d, d))
    step = max(1, BASIS_BYTES // (8 * d))
    for begin in range(0, m, step):
        unit = _unit(vectors[begin : begin + step], lengths[begin : begin + step])
        gram += unit.T @ unit
    spectrum = np.linalg.eigvalsh(gram)
    if spectrum[0] > 1e-9 * spectrum[-1]:
        return None
    triangle: Floats = np.zeros((0, d))
    for begin in range(0, m, step):
        unit = _unit(vectors[begin : begin + step], lengths[begin : begin + step])
        triangle = np.asarray(np.linalg.qr(np.vstack([triangle, unit]), mode="r"))
    _, values, directions = np.linalg.svd(triangle)
    kept = int((values > 1e-13 * values[0] * math.sqrt(m)).sum())
    return None if kept == d else np.ascontiguousarray(directions[:kept].T)


def _unit(vectors: Floats, lengths: Floats) -> Floats:
    return np.asarray(vectors / np.where(lengths > 0.0, lengths, 1.0)[:, None])


def _numpy(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().numpy()
