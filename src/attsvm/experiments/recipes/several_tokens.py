"""Attention that keeps several tokens: which runs count, and how three predictions compare with the trained matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from attsvm.experiments.recipes.recipe import Record
from attsvm.experiments.recipes.tfsvm import solved
from attsvm.selection import TokenSelection, correlation
from attsvm.solvers import SVMEquivalent, selected_from_probabilities, svm_equivalent

__all__ = ["FINITE", "INFEASIBLE", "PREDICTORS", "UNSETTLED", "compare"]

UNSETTLED, FINITE, INFEASIBLE = "unsettled", "nothing masked", "infeasible"
"""Why a run does not count: a probability in (1e-6, 1e-3]; none at or below 1e-6; a selection that no matrix has."""

PREDICTORS = {"equivalent": "W^fin + C W^mm", "direction": "W^mm", "one": "W^1token"}
"""Fields of the records with the curves of 1 - correlation, and what is compared with W."""


def compare(tokens: Tensor, queries: Tensor, path: Tensor, attention: Tensor) -> list[Record]:
    """Judge a batch of runs by the thresholds of the paper, and compare those that count with what theory predicts.

    Parameters
    ----------
    tokens, queries
        (B, n, T, d) and (B, n, d).
    path
        (B, records, d, d): the trained matrices; the predictions are made from the last ones.
    attention
        (B, n, T): the attention of the last matrices.

    Returns
    -------
    list of Record
        ``accepted``; if not, the ``reason``; otherwise for each predictor a curve of 1 - correlation, the largest
        probability of a masked token, the mean number of selected tokens, and |cos(W^fin, W^mm)|.
    """
    sets = selected_from_probabilities(attention)
    reasons = ["" for _ in attention]
    complete = sets.complete.all(-1)
    for b in range(len(reasons)):
        reasons[b] = UNSETTLED if bool(sets.ambiguous[b].any()) else FINITE if bool(complete[b]) else ""
    settled = torch.tensor([b for b, reason in enumerate(reasons) if not reason], dtype=torch.int64)
    problem = TokenSelection(tokens[settled], queries[settled], sets.selected[settled]) if len(settled) else None
    if problem is not None:
        _, several = solved(problem, "fro")
        _, single = solved(problem.with_selected(attention[settled].argmax(-1)), "fro")
        for b, feasible in zip(settled.tolist(), (several & single).tolist(), strict=True):
            reasons[b] = reasons[b] if feasible else INFEASIBLE
    counted = [b for b, reason in enumerate(reasons) if not reason]
    records: list[Record] = [{"accepted": False, "reason": reason} for reason in reasons]
    if counted:
        index = torch.tensor(counted)
        final = TokenSelection(tokens[index], queries[index], sets.selected[index])
        found = svm_equivalent(final, path[index, -1], attention[index])
        masked = attention[index].masked_fill(sets.selected[index], 0.0).amax((-2, -1))
        for place, b in enumerate(counted):
            count = float(sets.selected[b].sum(-1).double().mean())
            records[b] = _record(found, place, path[b], masked=float(masked[place]), tokens=count)
    return records


def _record(found: SVMEquivalent, b: int, path: Tensor, *, masked: float, tokens: float) -> Record:
    matrices = (found.W[b], found.W_dir[b], found.W_one_token[b])
    curves = [(1.0 - correlation(path, W)).tolist() for W in matrices]
    # One token everywhere has no finite part, and nothing to be orthogonal to.
    cosine = float(torch.nan_to_num(torch.as_tensor(correlation(found.W_fin[b], found.W_dir[b]))).abs())
    return {
        "accepted": True,
        **dict(zip(PREDICTORS, curves, strict=True)),
        "masked": masked,
        "tokens": tokens,
        "cosine": cosine,
    }
