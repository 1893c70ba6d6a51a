r"""A head of a real model as a max-margin problem: in the space of its queries and keys, or of the residual stream.

*Score space*: tokens are the head's keys and queries its queries, as they enter the product, after any rotation. The
head's own matrix is then ``scale * I``. This is exact for every model.

*Residual space*: tokens and queries are what the projections are given, with a constant 1 appended for their biases,
and the head's own matrix is $W = \mathrm{scale}\, W_K W_Q^\top$, the matrix of the theory. It exists where nothing but
a linear map stands between the two: no rotation of positions, no norm of queries and keys.

In both, additive logits (relative bias, ALiBi) are offsets, and an attention sink is one more token, 0, whose offset is
its score. A soft cap changes no order of logits and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attsvm.microscope.sampled import ModuleSample
from attsvm.selection import TokenSelection

if TYPE_CHECKING:
    from attsvm.microscope.residual import ResidualHead

__all__ = ["NEAR_TIE", "HeadProblem", "Space", "head_problem", "sample_vectors"]

Array = npt.NDArray[Any]
Space = Literal["score", "residual"]

NEAR_TIE = 1e-3
"""Logits of float32 models are not told apart below this: such a query selects nothing."""

_SLACK = 0.1 * NEAR_TIE
"""What is left to rounding of the margin that a head reaches, where offsets decide, too."""

_TOGETHER = 16
"""Queries of one window that share a sequence; a window with more is repeated, which costs less than padding."""


@dataclass(frozen=True, kw_only=True)
class HeadProblem:
    """The problem of one head and part of the sample, in float64.

    Attributes
    ----------
    problem
        Queries keep the key that the head's own logits rank first; near ties and queries with one key ask nothing.
    own
        (d, d): the head's own matrix, the logits being ``problem.logits(own)``.
    space
        Which space it is.
    rows
        (n, Q): which query of the sample stands where, -1 for padding.
    queries
        Sampled queries of the part.
    near_ties
        How many of them are left out because their two largest logits lie within :data:`NEAR_TIE`.
    base
        The problem without its selection.
    """

    problem: TokenSelection
    own: Tensor
    space: Space
    rows: Array
    queries: int
    near_ties: int
    base: _Posed

    def under(self, W: Tensor) -> HeadProblem | None:
        """The same queries and keys, with what ``W`` ranks first selected; None where nothing is clear."""
        return self.base.under(W, space=self.space, own=self.own, rows=self.rows)

    @property
    def selected(self) -> Tensor:
        """(n, Q) index of the selected key, -1 where nothing is asked."""
        chosen = self.problem.tensors.selected
        return torch.where(chosen.any(-1), chosen.int().argmax(-1), -1)


def head_problem(
    sample: ModuleSample, head: int, *, space: Space, part: int, residual: ResidualHead | None = None
) -> HeadProblem | None:
    """Pose one head as a :class:`~attsvm.TokenSelection`.

    Parameters
    ----------
    sample
        The module's sample.
    head
        Query head, from 0.
    space
        ``"score"`` or ``"residual"``.
    part
        Which part of the sample asks.
    residual
        The head's matrices, for the residual space.

    Returns
    -------
    HeadProblem or None
        None where no query of the part has two keys that it could tell apart.

    Notes
    -----
    With offsets, a common margin of 1 may be out of reach, since scaling W does not scale them. Then every row asks for
    what the head's own matrix achieves, less a tenth of :data:`NEAR_TIE`, but for no more than 1.
    """
    mine = np.flatnonzero(sample.part == part)
    if not mine.size:
        return None
    keys, queries, own = sample_vectors(sample, head, space, residual)
    rows, windows = _sequences(sample.window, mine)
    n, Q = rows.shape
    has_sink = sample.sinks is not None
    lengths = (sample.start[1:] - sample.start[:-1])[windows]
    T = int(lengths.max()) + has_sink
    tokens = torch.zeros(n, T, keys.shape[1], dtype=torch.float64)
    for index, window in enumerate(windows):
        tokens[index, : lengths[index]] = keys[sample.start[window] : sample.start[window + 1]]
    allowed = _per_row(sample.allowed, head, rows, T)
    offsets = None if sample.offsets is None else _per_row(sample.offsets, head, rows, T)
    if has_sink:
        assert sample.sinks is not None
        sink = torch.arange(T) == torch.from_numpy(lengths)[:, None]
        allowed |= sink[:, None]
        offsets = torch.zeros(n, Q, T, dtype=torch.float64) if offsets is None else offsets
        offsets = torch.where(sink[:, None], float(sample.sinks[head]), offsets)
    asking = torch.from_numpy(rows >= 0)
    at = torch.from_numpy(rows.clip(min=0))
    Z = torch.where(asking[..., None], queries[at], 0.0)
    # A padded query needs a key to look at, though it asks nothing.
    allowed = torch.where(asking[..., None], allowed, torch.arange(T) == 0)
    base = _Posed(tokens=tokens, queries=Z, allowed=allowed, offsets=offsets, asking=asking)
    return base.under(own, space=space, own=own, rows=rows)


@dataclass(frozen=True, kw_only=True)
class _Posed:
    """Everything of a problem but what its queries select."""

    tokens: Tensor
    queries: Tensor
    allowed: Tensor
    offsets: Tensor | None
    asking: Tensor

    def under(self, W: Tensor, *, space: Space, own: Tensor, rows: Array) -> HeadProblem | None:
        """The problem whose queries keep what ``W`` ranks first."""
        selected, ties, asked = _selection(self, W)
        if not asked:
            return None
        problem = TokenSelection(self.tokens, self.queries, selected, allowed=self.allowed, offsets=self.offsets)
        if self.offsets is not None:
            reached = problem.margins(W)
            # A token that stands twice asks for what offsets alone decide: asked for all of it, rounding would refuse.
            reached = (reached - _SLACK).clamp(max=1.0)
            problem = problem.with_margin(torch.where(torch.isfinite(reached), reached, 1.0))
        return HeadProblem(
            problem=problem, own=own, space=space, rows=rows, queries=int(self.asking.sum()), near_ties=ties, base=self
        )


def sample_vectors(
    sample: ModuleSample, head: int, space: Space, residual: ResidualHead | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (S, d), queries (N, d) and the head's own matrix."""
    if space == "score":
        group = sample.info.n_heads // sample.info.n_kv_heads
        keys, queries = torch.from_numpy(sample.k[head // group]).double(), torch.from_numpy(sample.q[head]).double()
        return keys, queries, sample.scale * torch.eye(keys.shape[1], dtype=torch.float64)
    assert residual is not None
    assert sample.key_input is not None
    assert sample.query_input is not None
    return _with_one(sample.key_input), _with_one(sample.query_input), residual.W.double()


def _with_one(inputs: Array) -> Tensor:
    x = torch.from_numpy(inputs).double()
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def _sequences(window: Array, mine: Array) -> tuple[Array, Array]:
    """Queries (n, Q) of the sample in sequences of one window each, -1 for padding, and the window of each sequence."""
    order = mine[np.argsort(window[mine], kind="stable")]
    cut = np.flatnonzero(np.diff(window[order])) + 1
    groups = [part[i : i + _TOGETHER] for part in np.split(order, cut) for i in range(0, len(part), _TOGETHER)]
    rows = np.full((len(groups), max(map(len, groups))), -1)
    for index, group in enumerate(groups):
        rows[index, : len(group)] = group
    return rows, window[rows[:, 0]]


def _per_row(whole: Array, head: int, rows: Array, T: int) -> Tensor:
    """(n, Q, T) of a quantity (1 or H, N, longest)."""
    part = whole[head if whole.shape[0] > 1 else 0][rows.clip(min=0)]
    made = np.zeros((*rows.shape, T), dtype=bool if part.dtype == np.bool_ else np.float64)
    shared = min(T, part.shape[-1])
    made[..., :shared] = part[..., :shared]
    return torch.from_numpy(made)


def _selection(base: _Posed, W: Tensor) -> tuple[Tensor, int, int]:
    """The key that the logits under W rank first, -1 where it is not clear; how many near ties; how many ask."""
    logits = (base.tokens @ W @ base.queries.transpose(-1, -2)).transpose(-1, -2)
    logits = logits if base.offsets is None else logits + base.offsets
    best = logits.masked_fill(~base.allowed, -torch.inf).topk(min(2, logits.shape[-1]), -1)
    choice = base.asking & (base.allowed.sum(-1) > 1)
    clear = choice & (best.values[..., 0] - best.values[..., -1] > NEAR_TIE)
    selected = torch.where(clear, best.indices[..., 0], -1)
    return selected, int((choice & ~clear).sum()), int(clear.sum())
