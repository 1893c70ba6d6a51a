r"""The finite part of next-token prediction: the shares inside components, where no margin decides.

On the cyclic subspace the log-loss of the reduced data, each sequence cut to the tokens in the component of its
label, is smooth, strictly convex and grows in every direction: a direction along which it did not would keep every
label at least as high as its competitors, which around a cycle means equal logits in the whole component, and only 0
does that. So its minimum exists, is unique, and Newton's method with backtracking finds it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attsvm.errors import InvalidInputError, NotConvergedError
from attsvm.selection.arrays import Array
from attsvm.selection.graph import TokenPriorityGraph
from attsvm.selection.next_token import CyclicSubspace, cyclic_subspace, moderate, read_embeddings

__all__ = ["GraphFinitePart", "graph_finite_part"]


@dataclass(frozen=True, kw_only=True)
class GraphFinitePart:
    """The minimiser of the log-loss over the cyclic subspace.

    Attributes
    ----------
    W
        (d, d), of the embeddings' kind, dtype and device; 0 where the graph is acyclic.
    loss
        Mean log-loss over all sequences, cut to the component of the label.
    decrement
        Newton's decrement at W: the root of ``g^T H^-1 g`` with gradient g and Hessian H of the loss. It does not
        depend on the scale of the embeddings; the loss stands about half its square above the minimum.
    iterations
        Newton steps.
    """

    W: Any
    loss: float
    decrement: float
    iterations: int


def graph_finite_part(
    embeddings: Array, sequences: Array, labels: Array, *, tol: float = 1e-10, max_iterations: int = 200
) -> GraphFinitePart:
    r"""Find the finite part $W^{fin}$ of attention trained to predict the next token.

    Minimises, over the span of all $(e_i - e_j)\, e_k^\top$ with i, j in one component of the graph of k,

    $$\frac1n \sum_{i=1}^n -\log \sum_{t :\, x_{it} = e_{y_i}} \mathrm{softmax}(\bar X_i W \bar x_i)_t ,$$

    with $\bar X_i$ the tokens of sequence i that are in the component of its label $y_i$, and $\bar x_i$ its last
    token.

    Parameters
    ----------
    embeddings
        (K, d), one row a token id.
    sequences, labels
        As in :class:`~attsvm.selection.TokenPriorityGraph`. Repeated ids and repeated sequences count as often as they
        occur.
    tol
        Stop when Newton's decrement is at most this. Must be in (0, 1).
    max_iterations
        Newton steps at most.

    Returns
    -------
    GraphFinitePart
        The minimiser; orthogonal to the Graph-SVM solution.

    Raises
    ------
    InvalidInputError
        If an argument is not what it must be.
    NotConvergedError
        If the tolerance was not reached: embeddings of one component, or of last tokens, are too nearly dependent for
        float64. Its ``solution`` is the best result found.

    Notes
    -----
    The minimum exists for every input, since each label of a component is a competitor of others around a cycle.
    Newton's method with backtracking; with D the dimension of the subspace a step costs ``D^3`` and one product
    (tokens, D) x (D, D) for each last token.

    References
    ----------
    Li, Huang, Ildiz, Rawat, Oymak. "Mechanics of Next Token Prediction with Self-Attention", 2024. arXiv:2403.08081.

    Examples
    --------
    >>> E = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    >>> part = graph_finite_part(E, [[0, 1, 2], [1, 0, 2], [0, 1, 2]], labels=[0, 1, 0])
    >>> part.W[:2, 2].round(4)
    array([ 0.3466, -0.3466])
    """
    where = "graph_finite_part"
    if not (isinstance(tol, (int, float, np.floating)) and 0 < tol < 1):
        raise InvalidInputError(f"{where}: tol must be in (0, 1), got {tol!r}.")
    whole = isinstance(max_iterations, (int, np.integer)) and not isinstance(max_iterations, bool)
    if not (whole and max_iterations >= 0):
        raise InvalidInputError(f"{where}: max_iterations must be an integer >= 0, got {max_iterations!r}.")
    E, kind = read_embeddings(embeddings, where)
    graph = TokenPriorityGraph(sequences, labels, d_vocab=len(E))
    E, power = moderate(E.double())
    subspace = cyclic_subspace(graph, E)
    samples = _reduced_samples(graph, subspace, E)
    start = E.new_zeros(subspace.dimension)
    c, loss, decrement, steps = _newton(samples, start, tol=float(tol), max_iterations=int(max_iterations))
    W = (subspace.matrix_of_values(c) / power / power).to(kind.dtype)
    if bool(W.isinf().any()) or (bool(c.any()) and not bool(W.any())):
        raise InvalidInputError(
            f"{where}: embeddings must be of a size whose inverse square {kind.dtype} holds, got {power:.0e}."
        )
    result = GraphFinitePart(W=kind.back(W), loss=loss, decrement=decrement, iterations=steps)
    if not decrement <= tol:
        carried: Any = result
        raise NotConvergedError(
            f"{where}: Newton's decrement stands at {decrement:.1e} after {steps} steps, above tol = {tol:.1e}. "
            "Embeddings of tokens that compete, or of last tokens, may be too nearly dependent.",
            carried,
        )
    return result


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """The reduced samples of one last token, merged where they are the same."""

    features: Tensor  # (m, D): logit of x - x' by the unknowns, for its m tokens x and x' the first of x's component
    token: Tensor  # (S, T): rows of features, 0 where padded
    log_count: Tensor  # (S, T): how often the token occurs, -inf where padded
    label: Tensor  # (S,): place of the label in the sample
    weight: Tensor  # (S,): share of the sequences

    def parts(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (S,) and the probabilities (S, T) of tokens at the coordinates c."""
        scores = (self.features @ c)[self.token] + self.log_count
        log_p = scores.log_softmax(-1)
        return -log_p.gather(-1, self.label[:, None])[:, 0], log_p.exp()

    def slopes(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (D,) and Hessian (D, D) of the weighted loss."""
        _, p = self.parts(c)
        m = len(self.features)
        excess = p.scatter_add(-1, self.label[:, None], -torch.ones_like(p[:, :1])) * self.weight[:, None]
        pull = p.new_zeros(m).index_add_(0, self.token.flatten(), excess.flatten())
        shares = p.new_zeros(len(p), m).scatter_add_(1, self.token, p)
        spread = -(shares * self.weight[:, None]).T @ shares
        spread.diagonal().add_(self.weight @ shares)
        return self.features.T @ pull, self.features.T @ spread @ self.features


def _reduced_samples(graph: TokenPriorityGraph, subspace: CyclicSubspace, E: Tensor) -> list[_Samples]:
    """For each last token, its sequences cut to the component of the label; those cut to one token have no loss."""
    merged: dict[int, Counter[tuple[int, tuple[tuple[int, int], ...]]]] = {}
    for ids, label in zip(graph.sequences, graph.labels):
        component = set(graph.component(ids[-1], label))
        counts = Counter(token for token in ids if token in component)
        if len(counts) > 1:
            merged.setdefault(ids[-1], Counter())[label, tuple(sorted(counts.items()))] += 1
    groups = []
    for last, samples in sorted(merged.items()):
        tokens = sorted({token for _, counts in samples for token, _ in counts})
        row = {token: place for place, token in enumerate(tokens)}
        # Softmax sees differences only, and taken early they keep the digits of embeddings that are nearly equal.
        anchors = [graph.component(last, token)[0] for token in tokens]
        pad = torch.nn.utils.rnn.pad_sequence
        places = [torch.tensor([row[token] for token, _ in counts]) for _, counts in samples]
        counted = [torch.tensor([float(count) for _, count in counts]).double() for _, counts in samples]
        labels = [[token for token, _ in counts].index(label) for label, counts in samples]
        groups.append(
            _Samples(
                features=subspace.logits_of_values(E[tokens] - E[anchors], E[last], last),
                token=pad(places, batch_first=True).to(E.device),
                log_count=pad(counted, batch_first=True).log().to(E.device),
                label=torch.tensor(labels, device=E.device),
                weight=torch.tensor(list(samples.values()), device=E.device).double() / len(graph.sequences),
            )
        )
    return groups


def _newton(samples: list[_Samples], c: Tensor, *, tol: float, max_iterations: int) -> tuple[Tensor, float, float, int]:
    """Coordinates, loss, Newton's decrement and steps, from the start ``c`` (D,)."""
    loss, steps = _loss(samples, c), 0
    while True:
        slope, curvature = torch.zeros_like(c), c.new_zeros(len(c), len(c))
        for group in samples:
            g, H = group.slopes(c)
            slope, curvature = slope + g, curvature + H
        direction = _newton_direction(curvature, slope)
        square = float(slope @ direction)
        # A square below 0, or NaN, is no decrement: nothing is claimed then.
        decrement = math.sqrt(square) if square >= 0.0 else math.inf
        if decrement <= tol or steps == max_iterations:
            return c, loss, decrement, steps
        after = _backtrack(samples, c, loss, direction, square)
        if after is None:
            return c, loss, decrement, steps
        c, loss = after
        steps += 1


def _backtrack(
    samples: list[_Samples], c: Tensor, loss: float, direction: Tensor, decrease: float
) -> tuple[Tensor, float] | None:
    """The longest of the steps 1, 1/2, 1/4, ... that lowers the loss as a Newton step should; None if none does."""
    length = 1.0
    while length > 1e-12:
        new = c - length * direction
        value = _loss(samples, new)
        # Close to the minimum the decrease is below the rounding of the loss.
        if value <= loss - 1e-4 * length * decrease + 1e-15 * (1.0 + abs(loss)):
            return new, value
        length /= 2
    return None


def _loss(samples: list[_Samples], c: Tensor) -> float:
    return float(sum(group.weight @ group.parts(c)[0] for group in samples))


def _newton_direction(curvature: Tensor, slope: Tensor) -> Tensor:
    """``H^-1 g``; rounding may cost the Hessian its smallest eigenvalues, a ridge gives them back. NaN if none does."""
    for ridge in (0.0, 1e-15, 1e-13, 1e-11, 1e-9):
        # Relative to each coordinate's own size, since embeddings may differ much in theirs.
        factor, info = torch.linalg.cholesky_ex(curvature + ridge * curvature.diagonal().diag())
        if int(info) == 0:
            return torch.cholesky_solve(slope[:, None], factor)[:, 0]
    return torch.full_like(slope, torch.nan)
