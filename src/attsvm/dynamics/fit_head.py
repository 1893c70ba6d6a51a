"""Linear heads: the vector v that scores tokens, fitted before attention is trained.

The head is fitted on pooled tokens, the mean of the allowed tokens of each sequence, and then stays fixed:
attention alone is trained on the scores ``Y v^T x``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = ["HEADS", "fit_head", "pool"]

HEADS = ("ridge", "logistic")


def pool(tokens: Tensor, allowed: Tensor) -> Tensor:
    """Mean of the allowed tokens (n, d) of tokens (n, T, d), allowed (n, T)."""
    weights = allowed.to(tokens.dtype)
    total = torch.einsum("nt,ntd->nd", weights, tokens)
    return total / weights.sum(-1, keepdim=True).clamp(min=1.0)


def fit_head(pooled: Tensor, labels: Tensor, *, method: str = "ridge", strength: float = 1.0) -> Tensor:
    r"""Fit v on pooled tokens.

    ``"ridge"`` minimises $\frac{1}{n}\sum (v^\top p_i - Y_i)^2 + \lambda \|v\|^2$ in closed form; ``"logistic"``
    minimises $\frac{1}{n}\sum \log(1 + e^{-Y_i v^\top p_i}) + \lambda \|v\|^2$ by Newton's method. The penalty is
    $\lambda = \text{strength} \cdot \operatorname{mean} \|p\|^2 / (d \sqrt n)$, so that ``strength`` has no unit.

    Parameters
    ----------
    pooled
        (n, d).
    labels
        (n,) of -1 and +1.
    method
        ``"ridge"`` or ``"logistic"``.
    strength
        Relative strength of the penalty, > 0.

    Returns
    -------
    Tensor
        (d,) in float64.
    """
    if method not in HEADS:
        raise InvalidInputError(f"fit_head: method must be one of {', '.join(HEADS)}, got {method!r}.")
    if not strength > 0:
        raise InvalidInputError(f"fit_head: strength must be > 0, got {strength}.")
    P, Y = pooled.to(torch.float64), labels.to(torch.float64)
    n, d = P.shape
    penalty = strength * float(P.square().sum()) / n / d / n**0.5
    eye = torch.eye(d, dtype=torch.float64, device=P.device)
    if method == "ridge":
        ridge: Tensor = torch.linalg.solve(P.T @ P / n + penalty * eye, P.T @ Y / n)
        return ridge
    v = torch.zeros(d, dtype=torch.float64, device=P.device)
    for _ in range(100):
        chance = torch.sigmoid(-Y * (P @ v))
        gradient = -(P.T @ (Y * chance)) / n + 2.0 * penalty * v
        curvature = (P.T * (chance * (1.0 - chance))) @ P / n + 2.0 * penalty * eye
        step = torch.linalg.solve(curvature, gradient)
        v = v - step
        if float(torch.linalg.vector_norm(step)) <= 1e-10 * (1.0 + float(torch.linalg.vector_norm(v))):
            break
    return v
