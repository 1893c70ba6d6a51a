"""Where a run went: to the optimal tokens, to another locally optimal selection, or to neither."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from attsvm.dynamics.conditions import Conditions, conditions
from attsvm.selection.geometry import rival_tokens
from attsvm.selection.problem import TokenSelection
from attsvm.solvers.solution import Solution, Status

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict of one run.

    Attributes
    ----------
    kind
        ``"global"``: every query selects a token of highest score. ``"local"``: not so, but every selected token
        scores higher than all support tokens of the max-margin solution for this selection, which is what makes
        a selection stable. ``"neither"``: not even that.
    reason
        One sentence.
    fraction_globally_optimal
        Share of the queries that select a token of highest score.
    locally_optimal
        None when there is no solution to judge it by.
    conditions
        Which sufficient conditions of the theory hold, with reasons. None when they were not checked.
    """

    kind: Literal["global", "local", "neither"]
    reason: str
    fraction_globally_optimal: float
    locally_optimal: bool | None
    conditions: Conditions | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.kind


def judge(
    problem: TokenSelection, scores: Tensor, solution: Solution, *, mass: float, loss: str = "logistic"
) -> Verdict:
    """Judge the selection of ``problem`` by scores (n, Q, T) and its max-margin ``solution``.

    Parameters
    ----------
    problem
        A single problem whose selected tokens are those that the run ended on.
    scores
        (n, Q, T).
    solution
        In the norm that belongs to the parameterisation; not necessarily optimal.
    mass
        Mean probability of the selected tokens at the end of the run.
    loss
        That of the run, for the condition on the first gradient.
    """
    t = problem.tensors
    best = scores.masked_fill(~t.allowed, -torch.inf).amax(-1, keepdim=True)
    optimal = (t.selected & (scores >= best)).any(-1)
    asking = t.selected.any(-1)
    count, total = int((optimal & asking).sum()), int(asking.sum())
    fraction = count / total if total else 1.0
    checked = conditions(problem, scores, solution, loss=loss)
    if solution.status is Status.INFEASIBLE:
        return Verdict(
            kind="neither",
            reason="No key-query matrix separates the tokens that attention ended on.",
            fraction_globally_optimal=fraction,
            locally_optimal=None,
            conditions=checked,
        )
    local: bool | None = None
    rivals = 0
    if solution.upper_bound < float("inf"):
        rivals = int(rival_tokens(t, scores, problem.matrix(solution.W, "verdict").double()).sum())
        local = rivals == 0
    hesitant = "" if mass > 0.9 else f" The run is not finished: the selected tokens hold {mass:.0%} of the attention."
    if count == total:
        return Verdict(
            kind="global",
            reason="Every query selects its token of highest score." + hesitant,
            fraction_globally_optimal=fraction,
            locally_optimal=local,
            conditions=checked,
        )
    missed = f"{total - count} of {total} queries select another token than that of highest score"
    if local:
        return Verdict(
            kind="local",
            reason=f"{missed}, and every selected token outscores its support tokens.{hesitant}",
            fraction_globally_optimal=fraction,
            locally_optimal=True,
            conditions=checked,
        )
    why = "there is no solution to judge it by"
    if local is False:
        these = "1 support token scores" if rivals == 1 else f"{rivals} support tokens score"
        why = f"{these} at least as high as the token selected in its place, so training may yet move on"
    return Verdict(
        kind="neither",
        reason=f"{missed}, and {why}.{hesitant}",
        fraction_globally_optimal=fraction,
        locally_optimal=local,
        conditions=checked,
    )
