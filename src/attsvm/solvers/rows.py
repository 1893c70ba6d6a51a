"""A problem as the solvers read it: rows grouped in blocks, one block a query, in float64 NumPy arrays.

Row r of block b says ``<(x_a - x_t) z^T, W> >= rhs_r`` (or ``=`` for a tie), with a the block's first selected
token. Rows are never expanded to d x d; tokens are stored once, however many queries look at them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attsvm.selection.constraints import centred, representatives, required, tied
from attsvm.selection.problem import TokenSelection

__all__ = ["Rows", "compile_rows"]

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
        (k,) places (3, k) of rows that no matrix can satisfy (zero size, positive right-hand side).
    penalty
        Price C of a unit of slack, which bounds the multipliers of the margin rows; inf for the hard margin.
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
    shape: tuple[int, int, int]
    has_offsets: bool
    penalty: float = math.inf

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


def _basis(vectors: Floats) -> Floats | None:
    """Orthonormal columns that span the given rows, or None when there are as many rows as dimensions."""
    return None if vectors.shape[0] >= vectors.shape[1] else np.asarray(np.linalg.qr(vectors.T)[0])


def compile_rows(problem: TokenSelection, *, reduce: bool = True) -> Rows:
    """Read the rows of a single problem.

    Parameters
    ----------
    problem
        Not a batch.
    reduce
        Whether to work in the span of the token differences x the span of the queries, which holds the minimiser
        for the Frobenius, nuclear and operator norms, when that is smaller.
    """
    t = problem.tensors
    ties = tied(t.selected)
    used = t.asked | ties
    place = used.nonzero().cpu().numpy().T
    X = _double(centred(t.tokens))
    Z = _double(t.queries)
    rhs = required(t._replace(offsets=None if t.offsets is None else t.offsets.double())).cpu().numpy()[tuple(place)]
    tie = ties.cpu().numpy()[tuple(place)]
    first = representatives(t.selected).cpu().numpy()
    i, q, token = place
    differences = X[i, first[i, q]] - X[i, token]
    size = np.sqrt(np.einsum("rk,rk->r", differences, differences)) * np.linalg.norm(Z, axis=-1)[i, q]
    empty = size == 0.0
    broken = empty & np.where(tie, rhs != 0.0, rhs > 0.0)
    keep = ~empty
    i, q, token = i[keep], q[keep], token[keep]
    query_id = i * Z.shape[1] + q
    blocks, start = np.unique(query_id, return_index=True)
    b_seq, b_query = blocks // Z.shape[1], blocks % Z.shape[1]
    queries = Z[b_seq, b_query]
    left = _basis(differences[keep]) if reduce and keep.any() else None
    right = _basis(queries) if reduce and keep.any() else None
    return Rows(
        tokens=np.ascontiguousarray(X if left is None else X @ left),
        queries=np.ascontiguousarray(queries if right is None else queries @ right),
        sequence=b_seq,
        first=first[b_seq, b_query],
        start=np.append(start, len(i)).astype(np.int64),
        token=token,
        tie=tie[keep],
        rhs=rhs[keep],
        size=size[keep],
        place=np.stack([i, q, token]),
        left=left,
        right=right,
        broken=place[:, broken],
        shape=(X.shape[0], Z.shape[1], X.shape[1]),
        has_offsets=t.offsets is not None,
    )


def _double(tensor: Any) -> Floats:
    return np.asarray(tensor.detach().to(device="cpu", dtype=torch.float64).numpy())
