"""Next-token prediction as token selection: Graph-SVM, and the subspace in which tokens of a component compete."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.selection.arrays import Array, Kind, as_float, kind_of
from attsvm.selection.graph import TokenPriorityGraph
from attsvm.selection.problem import TokenSelection
from attsvm.selection.reading import as_came, require_finite

__all__ = ["CyclicSubspace", "cyclic_subspace", "graph_selection", "moderate", "read_embeddings"]

DEPENDENT = 1e-13
"""Smallest eigenvalue of a Gram matrix of unit vectors, relative to the largest, that is not taken for rounding."""


def graph_selection(embeddings: Array, sequences: Array, labels: Array) -> TokenSelection:
    r"""The selection problem of next-token prediction, whose solution is the Graph-SVM.

    With $e_j$ the embedding of token j, the rows are, for each sequence with last token k and label y, and each
    other token j in it,

    $$(e_y - e_j)^\top W e_k = 0 \;\text{ if y and j reach each other in the graph of k}, \; \ge 1 \;\text{ if not.}$$

    Parameters
    ----------
    embeddings
        (K, d), one row a token id.
    sequences, labels
        As in :class:`TokenPriorityGraph`.

    Returns
    -------
    TokenSelection
        One sequence for each sample: its distinct tokens in increasing order of id, the embedding of its last token
        as the query, and as selected tokens those in the component of the label. Samples that say the same are
        merged; the order is that of their first occurrence.

    Raises
    ------
    InvalidInputError
        If an id has no embedding, two tokens that occur have equal embeddings, or the sequences or labels are not what
        they must be.

    References
    ----------
    Li, Huang, Ildiz, Rawat, Oymak. "Mechanics of Next Token Prediction with Self-Attention", 2024. arXiv:2403.08081.

    Examples
    --------
    >>> problem = graph_selection([[1.0, 0.0], [0.0, 1.0]], sequences=[[0, 1], [1, 0, 1]], labels=[0, 0])
    >>> problem.selected
    array([[[ True, False]]])
    """
    where = "graph_selection"
    E, kind = read_embeddings(embeddings, where)
    graph = TokenPriorityGraph(sequences, labels, d_vocab=len(E))
    _require_distinct(E, graph, where)
    samples: dict[tuple[int, tuple[int, ...], tuple[bool, ...]], None] = {}
    for ids, label in zip(graph.sequences, graph.labels):
        distinct = tuple(sorted(set(ids)))
        together = set(graph.component(ids[-1], label))
        samples[ids[-1], distinct, tuple(token in together for token in distinct)] = None
    index = _padded([torch.tensor(distinct) for _, distinct, _ in samples], -1).to(E.device)
    selected = _padded([torch.tensor(chosen) for _, _, chosen in samples], False).to(E.device)
    last = torch.tensor([k for k, _, _ in samples], device=E.device)
    real = index >= 0
    tokens = torch.where(real[..., None], E[index.clamp(min=0)], torch.zeros((), dtype=E.dtype, device=E.device))
    return TokenSelection(as_came(tokens, kind), E[last], selected, allowed=real)


def _padded(rows: list[Tensor], filler: Any) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)


def read_embeddings(embeddings: Array, where: str) -> tuple[Tensor, Kind]:
    """Embeddings (K, d) as a tensor, and what they came as."""
    E = as_float(embeddings, "embeddings", where=where)
    if E.ndim != 2 or 0 in E.shape:
        raise InvalidInputError(
            f"{where}: embeddings must have shape (K, d), one row a token id, got {tuple(E.shape)}."
        )
    require_finite(E, "embeddings", where)
    return E, kind_of(embeddings)


def _require_distinct(E: Tensor, graph: TokenPriorityGraph, where: str) -> None:
    """Refuse two tokens that no matrix can tell apart."""
    used = sorted({token for ids in graph.sequences for token in ids})
    _, member, counts = torch.unique(E[used], dim=0, return_inverse=True, return_counts=True)
    if bool((counts > 1).any()):
        twins = (member == int(counts.argmax())).nonzero().flatten().tolist()[:2]
        raise InvalidInputError(
            f"{where}: embeddings must differ between tokens, those of {used[twins[0]]} and {used[twins[1]]} are equal."
        )


class CyclicSubspace:
    r"""The span of all $(e_i - e_j)\, e_k^\top$ with i and j in one component of the graph of k.

    Kept as factors: with unit columns $b_r$ and $q_r$, and an orthonormalising matrix V (R, dimension), the basis
    matrices are $\sum_r V_{rc}\, b_r q_r^\top$. They are never built unless :meth:`basis` is asked for.

    Make one with :func:`cyclic_subspace`.
    """

    def __init__(self, left: Tensor, right: Tensor, last: Tensor, kind: Kind) -> None:
        self._left, self._right, self._last, self._kind = left, right, last, kind
        gram = (left.T @ left) * (right.T @ right)
        values, vectors = torch.linalg.eigh(gram)
        keep = values > DEPENDENT * len(values) * (values[-1] if len(values) else 0.0)
        self._mix: Tensor = vectors[:, keep] / values[keep].sqrt()
        # Independent rows take any values, so each is a coordinate; dependent ones are limited to the range.
        self._free: Tensor = torch.eye(len(values)).to(gram) if bool(keep.all()) else vectors[:, keep]

    @property
    def dimension(self) -> int:
        """Dimension of the subspace; 0 for acyclic graphs."""
        return int(self._mix.shape[1])

    def coordinates(self, W: Array) -> Any:
        """Coordinates (dimension,) of the projection of ``W`` in the orthonormal basis.

        Parameters
        ----------
        W
            (d, d) any matrix, or (…, d, d).
        """
        return self._kind.back(self._coordinates(self._read(W)))

    def matrix(self, coordinates: Array) -> Any:
        """The matrix (d, d) of the subspace with these coordinates.

        Parameters
        ----------
        coordinates
            (dimension,), or (…, dimension).
        """
        c = as_float(coordinates, "coordinates", where="CyclicSubspace.matrix", device=self._mix.device).double()
        if c.ndim == 0 or c.shape[-1] != self.dimension:
            raise InvalidInputError(
                f"CyclicSubspace.matrix: coordinates must have length {self.dimension}, got shape {tuple(c.shape)}."
            )
        return self._kind.back(self._matrix(c))

    def project(self, W: Array) -> Any:
        """The nearest matrix of the subspace, in the Frobenius norm.

        Parameters
        ----------
        W
            (d, d) any matrix, or (…, d, d).
        """
        M = self._read(W)
        near = self._matrix(self._coordinates(M))
        # The mixing matrix comes from a Gram matrix, which squares its condition; a second pass takes that back.
        return self._kind.back(near + self._matrix(self._coordinates(M - near)))

    def basis(self) -> Any:
        """The orthonormal basis matrices (dimension, d, d)."""
        return self.matrix(torch.eye(self.dimension, dtype=torch.float64))

    def logits_of_values(self, differences: Tensor, query: Tensor, last: int) -> Tensor:
        r"""The logits $x^\top W e_k$ as a linear map (m, dimension) of the free values of W.

        W is known by its values $b_r^\top W q_r$, which keep the last tokens apart where the rows are independent: a
        better coordinate system for a loss than :meth:`coordinates`, whatever the sizes of the embeddings.

        Parameters
        ----------
        differences
            (m, d) in float64, differences of embeddings inside components of the graph of k.
        query
            (d,), the embedding of k.
        last
            The last token k.
        """
        own = self._last == last
        products: Tensor = (differences @ self._left[:, own]) * torch.linalg.vector_norm(query)
        return products @ self._free[own]

    def matrix_of_values(self, values: Tensor) -> Tensor:
        """The matrix (d, d) of the subspace with these free values (dimension,), in float64.

        Parameters
        ----------
        values
            (dimension,), as :meth:`logits_of_values` takes them.
        """
        wanted = self._free @ values
        W = self._matrix(wanted @ self._mix)
        return W + self._matrix((wanted - self._values(W)) @ self._mix)  # as in project

    def _values(self, W: Tensor) -> Tensor:
        inner: Tensor = (self._left * (W @ self._right)).sum(-2)
        return inner

    def _coordinates(self, W: Tensor) -> Tensor:
        return self._values(W) @ self._mix

    def _matrix(self, c: Tensor) -> Tensor:
        weighted: Tensor = self._left * (c @ self._mix.T)[..., None, :]
        return weighted @ self._right.T

    def _read(self, W: Array) -> Tensor:
        M = as_float(W, "W", where="CyclicSubspace", device=self._mix.device).double()
        d = self._left.shape[0]
        if M.ndim < 2 or tuple(M.shape[-2:]) != (d, d):
            raise InvalidInputError(f"CyclicSubspace: W must have shape ({d}, {d}), got {tuple(M.shape)}.")
        return M

    def __repr__(self) -> str:
        d = self._left.shape[0]
        return f"CyclicSubspace(dimension={self.dimension} of {d * d})"


def cyclic_subspace(graph: TokenPriorityGraph, embeddings: Array) -> CyclicSubspace:
    r"""The span of $(e_i - e_j)\, e_k^\top$ over all last tokens k and all i, j in one component of the graph of k.

    Parameters
    ----------
    graph
        The token-priority graph.
    embeddings
        (K, d), one row a token id.

    Returns
    -------
    CyclicSubspace
        Projections and coordinates of the embeddings' kind, dtype and device; the work is done in float64.

    Raises
    ------
    InvalidInputError
        If an id of the graph has no embedding.

    Notes
    -----
    With r_k the dimension of the differences in the graph of k and R their sum, the Gram matrix (R, R) is
    diagonalised once; a projection costs ``d^2 R``. Nothing of size d^2 x d^2 is built.

    Examples
    --------
    >>> graph = TokenPriorityGraph([[0, 1, 2], [1, 0, 2]], labels=[0, 1])
    >>> subspace = cyclic_subspace(graph, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> subspace.dimension
    1
    >>> subspace.project([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).round(12)
    array([[ 0. ,  0. ,  0.5],
           [ 0. ,  0. , -0.5],
           [ 0. ,  0. ,  0. ]])
    """
    where = "cyclic_subspace"
    if not isinstance(graph, TokenPriorityGraph):
        raise InvalidInputError(f"{where}: graph must be a TokenPriorityGraph, got {type(graph).__name__}.")
    E, kind = read_embeddings(embeddings, where)
    largest = max(token for ids in graph.sequences for token in ids)
    if largest >= len(E):
        raise InvalidInputError(f"{where}: embeddings must have a row for every id, id {largest} has none of {len(E)}.")
    E, _ = moderate(E.double())
    left, right = ([E.new_zeros(E.shape[1], 0)] for _ in range(2))
    lasts: list[int] = []
    for last in graph.last_tokens:
        size = float(torch.linalg.vector_norm(E[last]))
        pairs = [(c[0], j) for c in graph.components(last) for j in c[1:]]
        if not pairs or size == 0.0:
            continue
        i, j = torch.tensor(pairs, device=E.device).T
        columns = _orthonormal((E[i] - E[j]).T)
        left.append(columns)
        right.append((E[last] / size)[:, None].expand(-1, columns.shape[1]))
        lasts += [last] * columns.shape[1]
    owners = torch.tensor(lasts, dtype=torch.int64, device=E.device)
    return CyclicSubspace(torch.cat(left, 1), torch.cat(right, 1), owners, kind)


def moderate(E: Tensor) -> tuple[Tensor, float]:
    """E over a power of two, largest entry in [1, 2), and that power: nothing is rounded, and no product overflows."""
    power = math.ldexp(1.0, math.frexp(float(E.abs().amax()))[1] - 1)
    return E / power, power


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the span of the given ones; lengths do not count, only directions."""
    sizes = torch.linalg.vector_norm(columns, dim=0)
    columns = columns[:, sizes > 0] / sizes[sizes > 0]
    U, values, _ = torch.linalg.svd(columns, full_matrices=False)
    return U[:, values > 1e-12 * values.amax()] if len(values) else columns
