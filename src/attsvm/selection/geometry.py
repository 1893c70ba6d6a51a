"""Logits, margins and the vocabulary of selection: optimal, support and locally optimal tokens, cones.

Everything here is a formula on tensors, with any leading axes; the letters are those of
:class:`~attsvm.selection.problem.TokenSelection`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.selection.arrays import Array, as_float, kind_of

if TYPE_CHECKING:
    from attsvm.selection.problem import ProblemTensors

__all__ = [
    "best_tokens",
    "correlation",
    "in_cone",
    "is_locally_optimal",
    "logits",
    "margins",
    "rival_tokens",
    "score_cone_margin",
    "support_tokens",
    "token_ranks",
    "token_scores",
]

SUPPORT_TOLERANCE = 1e-4
"""A token is a support token when its margin is within this of the smallest one asked for (science: margin = 1)."""


def raw_logits(problem: ProblemTensors, W: Tensor) -> Tensor:
    """``x_t^T W z_q + b_qt`` (…, n, Q, T), masked tokens included."""
    dtype = torch.promote_types(W.dtype, problem.tokens.dtype)
    W = W.to(dtype)
    if W.ndim == 3:  # one matrix for each problem of a batch: broadcast over sequences
        W = W.unsqueeze(1)
    keys = problem.queries.to(dtype) @ W.mT
    values = keys @ problem.tokens.to(dtype).mT
    return values if problem.offsets is None else values + problem.offsets.to(dtype)


def logits(problem: ProblemTensors, W: Tensor) -> Tensor:
    """Logits (…, n, Q, T) with -inf at masked tokens."""
    return raw_logits(problem, W).masked_fill(~problem.allowed, -math.inf)


def margins(problem: ProblemTensors, W: Tensor) -> Tensor:
    """Smallest selected logit minus each token's logit (…, n, Q, T); +inf where nothing is asked."""
    values = raw_logits(problem, W)
    smallest = values.masked_fill(~problem.selected, math.inf).amin(-1, keepdim=True)
    return (smallest - values).masked_fill(~problem.asked, math.inf)


def correlation(A: Array, B: Array) -> Any:
    r"""Cosine of two matrices, $\langle A, B\rangle / (\|A\|_F \|B\|_F)$, in [-1, 1].

    Parameters
    ----------
    A
        (d, d), or (..., d, d).
    B
        As ``A``; leading axes broadcast.

    Returns
    -------
    float or array
        A float for two matrices, otherwise an array of the leading shape. NaN where a matrix is zero.

    Examples
    --------
    >>> correlation([[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]])
    0.7071067811865475
    """
    kind = kind_of(A)
    first = as_float(A, "A", where="correlation").to(torch.float64)
    second = as_float(B, "B", where="correlation", device=first.device).to(torch.float64)
    if first.ndim < 2 or second.ndim < 2 or first.shape[-2:] != second.shape[-2:]:
        raise InvalidInputError(
            f"correlation: A and B must be matrices of one shape, got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    first, second = (M / M.abs().amax((-2, -1), keepdim=True) for M in (first, second))
    inner = (first * second).sum((-2, -1))
    cosine = inner / (first.square().sum((-2, -1)).sqrt() * second.square().sum((-2, -1)).sqrt())
    cosine = cosine.clamp(-1.0, 1.0)
    return float(cosine) if cosine.ndim == 0 else kind.back(cosine)


def token_scores(tokens: Array, v: Array, labels: Array | None = None) -> Any:
    r"""Score of each token for a linear head, $\gamma_{it} = Y_i\, v^\top x_{it}$.

    Parameters
    ----------
    tokens
        (..., n, T, d).
    v
        (d,) the head.
    labels
        (..., n) of -1 and +1; default all +1.

    Returns
    -------
    array
        (..., n, T), of the tokens' kind.
    """
    kind = kind_of(tokens)
    X = as_float(tokens, "tokens", where="token_scores")
    head = as_float(v, "v", where="token_scores", device=X.device).to(X.dtype)
    if head.ndim != 1 or head.shape[0] != X.shape[-1]:
        raise InvalidInputError(f"token_scores: v must have shape ({X.shape[-1]},), got {tuple(head.shape)}.")
    values = X @ head
    if labels is not None:
        Y = as_float(labels, "labels", where="token_scores", device=X.device).to(X.dtype)
        if tuple(Y.shape) != tuple(X.shape[:-2]) or not bool((Y.abs() == 1).all()):
            raise InvalidInputError(
                f"token_scores: labels must be -1 or +1 of shape {tuple(X.shape[:-2])}, got {tuple(Y.shape)}."
            )
        values = values * Y[..., None]
    return kind.back(values)


def best_tokens(scores: Tensor, allowed: Tensor) -> Tensor:
    """Index (…, n, Q) of the allowed token of highest score, the first of equals; -1 where none is allowed."""
    best = scores.masked_fill(~allowed, -math.inf).argmax(-1)
    return torch.where(allowed.any(-1), best, torch.full_like(best, -1))


def support_tokens(problem: ProblemTensors, W: Tensor, *, tolerance: float = SUPPORT_TOLERANCE) -> Tensor:
    """Tokens (…, n, Q, T) whose margin under ``W`` is within ``tolerance`` (in logits) of what is asked."""
    return margins(problem, W) <= problem.margin + tolerance


def rival_tokens(problem: ProblemTensors, scores: Tensor, W: Tensor, *, tolerance: float = SUPPORT_TOLERANCE) -> Tensor:
    """Support tokens (…, n, Q, T) that score at least as high as the selected token of their query."""
    lowest = scores.masked_fill(~problem.selected, math.inf).amin(-1, keepdim=True)
    return support_tokens(problem, W, tolerance=tolerance) & (scores >= lowest)


def is_locally_optimal(
    problem: ProblemTensors, scores: Tensor, W: Tensor, *, tolerance: float = SUPPORT_TOLERANCE
) -> Tensor:
    """Whether every selected token has a higher score than all support tokens of its query.

    Parameters
    ----------
    problem
        With one selected token a query.
    scores
        (…, n, Q, T) token scores.
    W
        The max-margin solution for this selection.
    tolerance
        For the support tokens, in logits.

    Returns
    -------
    Tensor
        () or (B,) booleans.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898,
    definition of locally-optimal tokens.
    """
    return ~rival_tokens(problem, scores, W, tolerance=tolerance).flatten(-3).any(-1)


def in_cone(W: Array, direction: Array, *, mu: float, radius: float = 0.0) -> bool:
    """Whether ``W`` lies in the cone of half-opening ``mu`` around ``direction``, outside a ball.

    The cone is ``{W : correlation(W, direction) >= 1 - mu, ||W||_F >= radius}``.

    Parameters
    ----------
    W
        (d, d).
    direction
        (d, d), not zero.
    mu
        In [0, 2]; 0 is the ray itself.
    radius
        Smallest Frobenius norm.
    """
    if not 0 <= mu <= 2:
        raise InvalidInputError(f"in_cone: mu must be in [0, 2], got {mu}.")
    norm = float(torch.linalg.vector_norm(as_float(W, "W", where="in_cone").to(torch.float64)))
    return bool(correlation(W, direction) >= 1.0 - mu) and norm >= radius


def token_ranks(problem: ProblemTensors, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Allowed tokens (…, n, Q, T) that score less than the selected one, with itself; and those that score no less."""
    own = scores.masked_fill(~problem.selected, math.inf).amin(-1, keepdim=True)
    asks = problem.selected.any(-1, keepdim=True)
    high = problem.allowed & ~problem.selected & (scores >= own) & asks
    return problem.allowed & ~high & asks, high


def score_cone_margin(problem: ProblemTensors, scores: Tensor, W: Tensor) -> Tensor:
    r"""How deep ``W`` lies in the cone that keeps tokens of higher score below the selected one.

    With low the allowed tokens of lower score than the selected one (and itself), and high the others, it is

    $$\min_{i,\,t \in \text{low}_i,\, \tau \in \text{high}_i} (x_{it} - x_{i\tau})^\top W z_i / \|W\|_F ,$$

    which is at least eps exactly for the matrices in the cone of opening eps; +inf when no token is in high.

    Parameters
    ----------
    problem
        With one selected token a query.
    scores
        (…, n, Q, T).
    W
        (d, d) or (B, d, d).
    """
    values = raw_logits(problem, W)
    low, high = token_ranks(problem, scores)
    least = values.masked_fill(~low, math.inf).amin(-1)
    most = values.masked_fill(~high, -math.inf).amax(-1)
    depth = (least - most).flatten(-2).amin(-1)
    size: Tensor = torch.linalg.vector_norm(W, dim=(-2, -1))
    return depth / size
