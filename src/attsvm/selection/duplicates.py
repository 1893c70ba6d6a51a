"""Tokens that no matrix can tell from a selected one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["merged_tokens"]


def _first_equal(tokens: Tensor) -> Tensor:
    """(…, T) int64: the index of the first token of the same sequence that is equal bit for bit (-0 equals 0)."""
    rows = np.ascontiguousarray((tokens + 0.0).detach().cpu().numpy()).reshape(-1, tokens.shape[-1])
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, content = np.unique(keys, return_inverse=True)
    T = tokens.shape[-2]
    sequence = np.arange(len(content)) // T
    # The same content in two sequences counts as two classes; the first member of a class names it.
    _, first, member = np.unique(sequence * (content.max() + 1) + content, return_index=True, return_inverse=True)
    return torch.from_numpy((first % T)[member].reshape(tokens.shape[:-1])).to(tokens.device)


def merged_tokens(tokens: Tensor, candidates: Tensor, selected: Tensor, offsets: Tensor | None) -> Tensor:
    """Which candidates equal a selected token of the same query, offsets included.

    Parameters
    ----------
    tokens
        (…, n, T, d).
    candidates
        (…, n, Q, T) allowed tokens that are not selected.
    selected
        (…, n, Q, T).
    offsets
        (…, n, Q, T) or None.
    """
    first = _first_equal(tokens).unsqueeze(-2).expand(selected.shape)
    chosen = torch.zeros(selected.shape, dtype=torch.int8, device=tokens.device)
    chosen.scatter_reduce_(-1, first, selected.to(torch.int8), "amax")
    equal = candidates & chosen.gather(-1, first).bool()
    if offsets is None or not bool(equal.any()):
        return equal
    for place in equal.nonzero().tolist():
        *query, token = place
        twins = selected[tuple(query)] & (first[tuple(query)] == first[tuple(place)])
        same = offsets[tuple(query)][twins] == offsets[tuple(query)][token]
        equal[tuple(place)] = bool(same.any())
    return equal
