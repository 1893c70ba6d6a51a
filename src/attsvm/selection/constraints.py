r"""The rows of a problem as formulas on its tensors, in float64, for one problem or a batch.

A row belongs to a query and a dropped token t: with a the first token that the query selects it reads
$\langle (x_a - x_t) z^\top, W\rangle \ge c$; for the other selected tokens it is a tie, with $=$. Weights, values and
right-hand sides of rows are arrays (…, n, Q, T), meaningful where a row is. Nothing here knows a solver.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attsvm.selection.problem import ProblemTensors

__all__ = [
    "combine_rows",
    "in_double",
    "parts",
    "representatives",
    "required",
    "row_sizes",
    "row_values",
    "tied",
]

PART_BYTES = 64 * 2**20
"""Size of the float64 copies that are alive at a time when a problem is read in parts."""


def in_double(t: ProblemTensors) -> ProblemTensors:
    """The problem in float64, with the tokens of a sequence less the one that its first query selects first.

    Only differences of tokens matter; without the part that they share, sums over them round less.
    """
    tokens = t.tokens.to(torch.float64)
    own = representatives(t.selected)[..., 0, None, None]
    return t._replace(
        tokens=tokens - torch.take_along_dim(tokens, own, -2),
        queries=t.queries.to(torch.float64),
        offsets=None if t.offsets is None else t.offsets.to(torch.float64),
    )


def parts(
    t: ProblemTensors, *, part_bytes: int = PART_BYTES, double: bool = False
) -> Iterator[tuple[slice, ProblemTensors]]:
    """The problem in float64, some sequences at a time, so that no copy of all tokens is made.

    Yields the sequences as a slice of the axis n, and their part of every tensor. ``double`` says that ``t`` is from
    :func:`in_double` already.
    """
    n, Q, T = t.selected.shape[-3:]
    lead = t.selected.shape[0] if t.selected.ndim == 4 else 1
    each = 8 * lead * T * (2 * t.tokens.shape[-1] + 6 * Q)
    step = max(1, part_bytes // each)
    for begin in range(0, n, step):
        chosen = slice(begin, min(begin + step, n))
        part = t.cut((..., chosen, slice(None), slice(None)))
        yield chosen, part if double else in_double(part)


def representatives(selected: Tensor) -> Tensor:
    """Index (…, n, Q) of the first selected token of each query; 0 where there is none."""
    return selected.to(torch.int8).argmax(-1)


def tied(selected: Tensor) -> Tensor:
    """(…, n, Q, T) booleans: selected tokens other than the first of their query."""
    first = torch.zeros_like(selected).scatter_(-1, representatives(selected).unsqueeze(-1), True)
    return selected & ~first


def required(t: ProblemTensors, center: Tensor | None = None) -> Tensor:
    """``c`` (…, n, Q, T): margin (0 for ties) less the offset difference to the first selected token.

    With a ``center`` (d, d), what is asked of the change from it.
    """
    asked = torch.where(t.asked, t.margin.expand(t.asked.shape), torch.zeros((), dtype=torch.float64))
    used = t.asked | tied(t.selected)
    if t.offsets is not None:
        own = t.offsets.gather(-1, representatives(t.selected).unsqueeze(-1))
        asked = asked - torch.where(used, own - t.offsets, torch.zeros((), dtype=torch.float64))
    if center is not None:
        asked = asked - torch.where(used, row_values(t, center), torch.zeros((), dtype=torch.float64))
    return asked


def _over_sequences(W: Tensor) -> Tensor:
    """One matrix as it is; a matrix for each problem (B, d, d) broadcast over sequences."""
    return W if W.ndim == 2 else W.unsqueeze(1)


def combine_rows(t: ProblemTensors, weights: Tensor) -> Tensor:
    """``sum over rows of weight * (x_first - x_t) z^T`` (…, d, d), for weights on margin rows and ties."""
    first = representatives(t.selected).unsqueeze(-1)
    coefficients = (-weights).scatter_add(-1, first, weights.sum(-1, keepdim=True))
    pooled = (coefficients @ t.tokens).flatten(-3, -2)
    return pooled.mT @ t.queries.flatten(-3, -2)


def row_values(t: ProblemTensors, W: Tensor) -> Tensor:
    """``(x_first - x_t)^T W z`` (…, n, Q, T), offsets not included."""
    values = (t.queries @ _over_sequences(W).mT) @ t.tokens.mT
    return values.gather(-1, representatives(t.selected).unsqueeze(-1)) - values


def row_sizes(t: ProblemTensors) -> Tensor:
    """``||x_first - x_t|| ||z||`` (…, n, Q, T), computed from the differences; ``t`` must be from :func:`in_double`."""
    sizes = torch.empty(t.selected.shape, dtype=torch.float64, device=t.tokens.device)
    first = representatives(t.selected)
    for q in range(t.selected.shape[-2]):
        # The token of the first query has been subtracted already.
        differences = t.tokens - torch.take_along_dim(t.tokens, first[..., q, None, None], -2) if q else t.tokens
        sizes[..., q, :] = torch.linalg.vector_norm(differences, dim=-1)
    query_sizes: Tensor = torch.linalg.vector_norm(t.queries, dim=-1, keepdim=True)
    return sizes * query_sizes
