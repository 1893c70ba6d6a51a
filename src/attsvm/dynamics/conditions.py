"""The sufficient conditions of the theory: is training bound to select the tokens of highest score?

None of them is necessary; runs converge far more often than the conditions hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attsvm.dynamics.losses import find_loss
from attsvm.errors import InvalidInputError
from attsvm.selection.arrays import Array
from attsvm.selection.geometry import SUPPORT_TOLERANCE, best_tokens, margins, support_tokens
from attsvm.selection.problem import TokenSelection
from attsvm.selection.reading import read_scores
from attsvm.solvers.solution import Solution

__all__ = [
    "Condition",
    "Conditions",
    "Overparameterisation",
    "all_support",
    "conditions",
    "equal_scores",
    "first_gradient",
    "first_gradient_separates",
    "overparameterised",
]


def first_gradient(problem: TokenSelection, scores: Array, *, loss: str = "logistic") -> Any:
    r"""Gradient of the training loss at W = 0, where attention is uniform (or what the offsets make it).

    $$\nabla \mathcal L(0) = \frac1n \sum_{i,q} \ell'(f_{iq}) \sum_t s_{iqt} (\gamma_{iqt} - f_{iq})\, x_{it}
    z_{iq}^\top , \qquad f_{iq} = \gamma_{iq}^\top s_{iq} .$$

    Parameters
    ----------
    problem
        Tokens, queries, masks and offsets; its ``selected`` plays no part. One problem, or a batch.
    scores
        (n, T) or (n, Q, T), with a leading B for a batch.
    loss
        A name of :mod:`attsvm.dynamics.losses`.

    Returns
    -------
    array
        (d, d), or (B, d, d), of the tokens' kind.
    """
    return problem.kind.back(_first_gradient(problem, scores, loss, "first_gradient"))


def _first_gradient(problem: TokenSelection, scores: Array, loss: str, where: str) -> Tensor:
    """The gradient at W = 0 in float64."""
    t = problem.tensors
    rule, allowed = find_loss(loss, where=where), t.allowed
    values = read_scores(scores, allowed, where=where).to(torch.float64).masked_fill(~allowed, 0.0)
    logits = torch.zeros_like(values) if t.offsets is None else t.offsets.to(torch.float64)
    active = allowed.any(-1, keepdim=True)
    s = torch.softmax(logits.masked_fill(~allowed & active, -math.inf), -1) * allowed
    f = (values * s).sum(-1, keepdim=True)
    weights = rule.slope(f) * s * (values - f) / allowed.shape[-3]
    pooled = weights @ t.tokens.to(torch.float64)
    queries = torch.where(active, t.queries.to(torch.float64), 0.0)
    return pooled.flatten(-3, -2).mT @ queries.flatten(-3, -2)


def first_gradient_separates(problem: TokenSelection, scores: Array, *, loss: str = "logistic") -> Any:
    r"""By how much the first gradient step from W = 0 separates the tokens of highest score.

    $$\iota = \min_{i,\, t \ne \mathrm{opt}_i} (x_{i\,\mathrm{opt}_i} - x_{it})^\top (-\nabla \mathcal L(0))\, z_i .$$

    The condition holds when it is > 0. Then training that starts with a long enough step along the gradient
    converges to the max-margin direction of the optimal tokens.

    Parameters
    ----------
    problem
        As for :func:`first_gradient`.
    scores
        As for :func:`first_gradient`. The optimal token is the allowed one of highest score, the first of equals.
    loss
        As for :func:`first_gradient`.

    Returns
    -------
    float or array
        A float, or (B,) for a batch; inf where nothing is asked.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898,
    the assumption on the first gradient step.

    Examples
    --------
    >>> problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0])
    >>> round(first_gradient_separates(problem, [[1.0, 0.0]], loss="correlation"), 3)
    0.25
    """
    where = "first_gradient_separates"
    best, step = _optimal(problem, scores, where), -_first_gradient(problem, scores, loss, where)
    least = margins(best.tensors._replace(offsets=None), step).flatten(-3).amin(-1)
    return _plain(problem, least)


def equal_scores(problem: TokenSelection, scores: Array, *, tol: float = 1e-9) -> Any:
    """Whether, in every query, all allowed tokens but the one of highest score have the same score.

    Then no finite W is a stationary point, provided that some W separates the tokens of highest score. With one query
    this makes training select its optimal token. With several it does not: a query can lose to the others, which then
    shape W (see the recipe ``equal-scores``).

    Parameters
    ----------
    problem
        One problem, or a batch; its ``selected`` plays no part.
    scores
        (n, T) or (n, Q, T), with a leading B for a batch.
    tol
        Scores that differ by at most this are equal.

    Returns
    -------
    bool or array
        A bool, or (B,) for a batch.
    """
    allowed = problem.tensors.allowed
    values = read_scores(scores, allowed, where="equal_scores").to(torch.float64)
    places = torch.arange(allowed.shape[-1], device=allowed.device)
    others = allowed & (places != best_tokens(values, allowed).unsqueeze(-1))
    highest = values.masked_fill(~others, -math.inf).amax(-1)
    lowest = values.masked_fill(~others, math.inf).amin(-1)
    return _plain(problem, (highest - lowest <= tol).flatten(-2).all(-1))


def all_support(problem: TokenSelection, solution: Solution | Array, *, tol: float = SUPPORT_TOLERANCE) -> Any:
    """Whether every token that is not selected is a support token of the max-margin solution.

    For the tokens of highest score this leaves the loss without stationary points; it becomes likely when d is much
    larger than the number of rows.

    Parameters
    ----------
    problem
        One problem, or a batch, with one selected token a query.
    solution
        The max-margin solution of ``problem``, or its matrix. False where there is none.
    tol
        For the margin of a support token, in logits.

    Returns
    -------
    bool or array
        A bool, or (B,) for a batch.
    """
    W = problem.matrix(getattr(solution, "W", solution), "all_support").double()
    supports = support_tokens(problem.tensors, W, tolerance=tol) | ~problem.tensors.asked
    separated = (margins(problem.tensors, W) >= problem.tensors.margin - tol).flatten(-3).all(-1)
    return _plain(problem, supports.flatten(-3).all(-1) & separated)


class Overparameterisation(NamedTuple):
    """Whether ``d >= needed``; false like a bool when not."""

    holds: bool
    d: int
    needed: int

    def __bool__(self) -> bool:
        return self.holds


def overparameterised(problem: TokenSelection) -> Overparameterisation:
    """Whether the dimension is large enough for every selection to be separable, for data in general position.

    Sufficient is ``d >= max(T - 1, n)``: then the T - 1 differences of a sequence are independent, so that some vector
    has margin 1 on all of them, and the n queries are, so that one W maps each query to its vector. With several
    queries a sequence n counts queries. Far fewer dimensions are enough in practice.

    Parameters
    ----------
    problem
        One problem, or a batch, of which the largest member counts. T is the largest number of tokens that a query
        may attend to, and n the number of queries that may attend to more than one.

    Returns
    -------
    Overparameterisation
        ``(holds, d, needed)``.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898,
    the theorem on feasibility.

    Examples
    --------
    >>> overparameterised(TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0]))
    Overparameterisation(holds=True, d=2, needed=1)
    """
    counts = problem.tensors.allowed.sum(-1)
    T = int(counts.max()) if counts.numel() else 0
    n = int((counts > 1).sum((-2, -1)).max()) if counts.numel() else 0
    d = problem.shape[-1]
    needed = max(T - 1, n, 0)
    return Overparameterisation(d >= needed, d, needed)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition on a run.

    Attributes
    ----------
    holds
        None when it cannot be judged.
    reason
        One sentence, with the numbers.
    """

    holds: bool | None
    reason: str

    def __bool__(self) -> bool:
        return bool(self.holds)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The sufficient conditions of the theory, for one run.

    Attributes
    ----------
    first_gradient
        The first gradient step separates the tokens of highest score.
    equal_scores
        The other tokens of a query all score the same.
    all_support
        All unselected tokens are support tokens of the selection that the run ended on.
    overparameterised
        d is large enough for any selection to be separable.
    """

    first_gradient: Condition
    equal_scores: Condition
    all_support: Condition
    overparameterised: Condition


def conditions(
    problem: TokenSelection, scores: Array, solution: Solution | None, *, loss: str = "logistic"
) -> Conditions:
    """Check all conditions for one problem.

    Parameters
    ----------
    problem
        A single problem whose selected tokens are those that the run ended on.
    scores
        (n, T) or (n, Q, T).
    solution
        The max-margin solution for this selection, or None.
    loss
        Of the training.
    """
    if problem.is_batch:
        raise InvalidInputError("conditions: problem must be a single one; take problem[b] of a batch.")
    iota = first_gradient_separates(problem, scores, loss=loss)
    equal = equal_scores(problem, scores)
    width = overparameterised(problem)
    lone = int(problem.tensors.allowed.any(-1).sum()) == 1
    compared = ">=" if width else "<"
    several = "" if lone or not equal else "; with several queries that alone does not decide where training goes"
    return Conditions(
        first_gradient=_gradient_condition(iota),
        equal_scores=Condition(
            holds=equal,
            reason=f"The tokens below the highest score of a query {'all' if equal else 'do not all'} "
            f"score the same{several}.",
        ),
        all_support=_support_condition(problem, solution),
        overparameterised=Condition(
            holds=width.holds,
            reason=f"d = {width.d} {compared} {width.needed} = max(T - 1, n): any selection is "
            f"{'separable when the data are in general position' if width else 'not sure to be separable'}.",
        ),
    )


def _gradient_condition(iota: float) -> Condition:
    if math.isnan(iota):
        return Condition(holds=None, reason="The loss has no gradient at W = 0.")
    how = "separates" if iota > 0 else "does not separate"
    return Condition(
        holds=iota > 0,
        reason=f"The first gradient step {how} the tokens of highest score: its smallest margin is {iota:.3g}.",
    )


def _support_condition(problem: TokenSelection, solution: Solution | None) -> Condition:
    if solution is None or not solution.upper_bound < math.inf:
        return Condition(holds=None, reason="There is no max-margin solution, so there are no support tokens.")
    W = problem.matrix(solution.W, "conditions").double()
    asked = int(problem.tensors.asked.sum())
    count = int((support_tokens(problem.tensors, W) & problem.tensors.asked).sum())
    return Condition(
        holds=bool(all_support(problem, W)),
        reason=f"{count} of the {asked} tokens that are not selected are support tokens.",
    )


def _optimal(problem: TokenSelection, scores: Array, where: str) -> TokenSelection:
    """The problem with the tokens of highest score selected."""
    allowed = problem.tensors.allowed
    return problem.with_selected(best_tokens(read_scores(scores, allowed, where=where), allowed))


def _plain(problem: TokenSelection, values: Tensor) -> Any:
    """A Python number or bool for a single problem, an array (B,) of the problem's kind for a batch."""
    return problem.kind.back(values) if problem.is_batch else values.item()
