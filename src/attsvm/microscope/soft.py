r"""Heads that keep several tokens: a finite part that shares attention among them, a direction that drops the rest.

Theory writes trained attention as $W \approx R\, W^{mm} + W^{fin}$: the finite part lies in the span of
$(x_t - x_\tau) z^\top$ over tokens t, tau that one query keeps, where it sets how the kept tokens share attention, and
the direction in the complement, where kept tokens are level. Here the head's own matrix is split in the same two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attsvm.microscope.heads import Space, head_problem
from attsvm.microscope.sampled import TRAIN, ModuleSample
from attsvm.selection import TokenSelection, correlation
from attsvm.solvers import Status, solve

if TYPE_CHECKING:
    from attsvm.microscope.residual import ResidualHead

__all__ = ["SoftSplit", "split_soft"]

SHARE = 0.5
"""A token is kept if its weight is at least this share of the largest."""
MOST_QUERIES = 32
MOST_PAIRS = 300
MOST_ROWS = 8_000
"""Queries times keys of the solve."""


@dataclass(frozen=True, kw_only=True)
class SoftSplit:
    r"""The two parts of a head's own matrix.

    Attributes
    ----------
    queries
        Queries looked at.
    kept
        Tokens that a query keeps, on average: those with at least half of the largest weight.
    dimension
        Of the finite subspace.
    finite_share
        $\|W^{fin}\|_F^2 / \|W\|_F^2$.
    directional_correlation
        Cosine of the directional part and the max-margin solution that keeps the same sets; None where no matrix does,
        or no query keeps several.
    status, gap
        Of that solve.
    """

    queries: int
    kept: float
    dimension: int
    finite_share: float
    directional_correlation: float | None
    status: str | None
    gap: float | None

    def record(self) -> dict[str, Any]:
        """What ``result.json`` keeps."""
        return dict(vars(self))


def split_soft(
    sample: ModuleSample,
    head: int,
    *,
    space: Space,
    residual: ResidualHead | None = None,
    max_seconds: float = 20.0,
) -> SoftSplit | None:
    """Split the matrix of a head whose queries keep several tokens.

    Parameters
    ----------
    sample
        The module's sample.
    head
        Query head, from 0.
    space
        ``"score"`` or ``"residual"``.
    residual
        The head's matrices, for the residual space.
    max_seconds
        For the solve.

    Returns
    -------
    SoftSplit or None
        None where every query keeps one token, offsets decide too, or the pairs fill the whole space, so that there is
        no directional part.
    """
    posed = head_problem(sample, head, space=space, part=TRAIN, residual=residual)
    if posed is None or posed.problem.offsets is not None:
        return None
    t = posed.problem.tensors
    weights = posed.problem.logits(posed.own).softmax(-1)
    kept = (
        (weights >= SHARE * weights.amax(-1, keepdim=True)) & t.allowed & torch.from_numpy(posed.rows >= 0)[..., None]
    )
    kept &= (t.allowed & ~kept).any(-1, keepdim=True)
    most = min(MOST_QUERIES, max(1, MOST_ROWS // kept.shape[-1]))
    rows = kept.any(-1).nonzero()[:most]
    only = torch.zeros(kept.shape[:2], dtype=torch.bool)
    only[rows[:, 0], rows[:, 1]] = True
    kept &= only[..., None]
    pairs, queries = _pairs(t.tokens, t.queries, kept)
    if not len(pairs) or min(len(pairs), MOST_PAIRS) >= posed.own.numel():
        return None
    finite, dimension = _projection(posed.own, pairs[:MOST_PAIRS], queries[:MOST_PAIRS])
    direction = posed.own - finite
    found = solve(
        TokenSelection(t.tokens, t.queries, kept, allowed=t.allowed),
        "fro",
        tol=1e-3,
        max_seconds=max_seconds,
        on_failure="ignore",
    )
    if found.status is Status.INTERRUPTED:
        raise KeyboardInterrupt
    usable = bool(np.isfinite(found.upper_bound)) and bool(found.W.any())
    return SoftSplit(
        queries=len(rows),
        kept=float(kept.sum() / len(rows)),
        dimension=dimension,
        finite_share=float(finite.square().sum() / posed.own.square().sum()),
        directional_correlation=float(correlation(found.W, direction)) if usable else None,
        status=found.status.name,
        gap=float(found.gap) if usable else None,
    )


def _pairs(X: Tensor, Z: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Differences (P, d) of each further kept token and the first of its query, and the queries (P, d)."""
    first = kept.int().argmax(-1, keepdim=True)
    more = kept & (torch.arange(kept.shape[-1]) != first)
    sequence, query, token = more.nonzero(as_tuple=True)
    return X[sequence, token] - X[sequence, first[sequence, query, 0]], Z[sequence, query]


def _projection(W: Tensor, pairs: Tensor, queries: Tensor) -> tuple[Tensor, int]:
    """Projection of W on the span of pair x query^T, and its dimension, from the Gram matrix of the products."""
    gram = (pairs @ pairs.T) * (queries @ queries.T)
    values, vectors = torch.linalg.eigh(gram)
    good = values > 1e-10 * values[-1]
    inner = ((pairs @ W) * queries).sum(-1)
    weights = vectors[:, good] @ ((vectors[:, good].T @ inner) / values[good])
    return (pairs * weights[:, None]).T @ queries, int(good.sum())
