"""The max-margin twin of a head on the texts that are shown: where attention would go under the solution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attsvm.microscope.heads import sample_vectors
from attsvm.microscope.sampled import ModuleSample
from attsvm.microscope.solutions import HeadSolution

if TYPE_CHECKING:
    from attsvm.microscope.residual import ResidualHead

__all__ = ["MOST_KEYS", "twin_arrays"]

Array = npt.NDArray[Any]

MOST_KEYS = 8
"""Weights that are kept of each query: the largest."""


def twin_arrays(
    sample: ModuleSample,
    head: int,
    solution: HeadSolution,
    *,
    shown: Sequence[int],
    residual: ResidualHead | None = None,
) -> dict[str, Array]:
    """What the solution attends to in the windows that are shown, and its support tokens there.

    The solution is scaled to the Frobenius norm of the head's own matrix, so that both are as sharp as each other;
    with offsets or sinks, which fix the scale, it is left as it is.

    Parameters
    ----------
    sample
        The module's sample.
    head
        Query head, from 0.
    solution
        One with a W.
    shown
        Windows of the sample.
    residual
        The head's matrices, for the residual space.

    Returns
    -------
    dict
        For place s in ``shown``: ``s.index`` int32 and ``s.weight`` uint8 (Tq, at most 8), and ``s.support``
        (rows, 2) int32, query and key position.
    """
    assert solution.W is not None
    keys, queries, own = sample_vectors(sample, head, solution.space, residual)
    W = torch.from_numpy(solution.W)
    if sample.offsets is None and sample.sinks is None:
        W = W * (torch.linalg.norm(own) / torch.linalg.norm(W))
    found: dict[str, Array] = {}
    for place, window in enumerate(shown):
        mine = np.flatnonzero(sample.window == window)
        if not mine.size:
            continue
        inside = slice(int(sample.start[window]), int(sample.start[window + 1]))
        weights = _weights(sample, head, keys[inside], queries[mine], W, mine)
        best = weights.topk(min(MOST_KEYS, weights.shape[-1]), -1)
        length = int(sample.position[mine].max()) + 1
        index = np.full((length, best.indices.shape[1]), -1, dtype=np.int32)
        weight = np.zeros(index.shape, dtype=np.uint8)
        index[sample.position[mine]] = best.indices.numpy()
        weight[sample.position[mine]] = (255.0 * best.values.sqrt()).round().to(torch.uint8).numpy()
        here = np.isin(solution.support[:, 0], mine)
        support = np.stack([sample.position[solution.support[here, 0]], solution.support[here, 1]], 1)
        support = support[support[:, 1] < inside.stop - inside.start]
        found |= {f"{place}.index": index, f"{place}.weight": weight, f"{place}.support": support.astype(np.int32)}
    return found


def _weights(sample: ModuleSample, head: int, keys: Tensor, queries: Tensor, W: Tensor, mine: Array) -> Tensor:
    """Attention (queries, keys) under W."""
    logits = queries @ W.T @ keys.T
    part = slice(0, len(keys))
    if sample.offsets is not None:
        logits = logits + torch.from_numpy(sample.offsets[head if sample.offsets.shape[0] > 1 else 0][mine, part])
    allowed = torch.from_numpy(sample.allowed[head if sample.allowed.shape[0] > 1 else 0][mine, part])
    logits = logits.masked_fill(~allowed, -torch.inf)
    if sample.sinks is not None:
        logits = torch.cat([logits, torch.full_like(logits[:, :1], float(sample.sinks[head]))], -1)
    return logits.softmax(-1).nan_to_num(0.0)[:, : len(keys)]
