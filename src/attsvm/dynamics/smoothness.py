"""The smoothness constant of the loss in W, and the step that the theory takes from it."""

from __future__ import annotations

import torch
from torch import Tensor

from attsvm.dynamics.layer import Data
from attsvm.dynamics.losses import Loss
from attsvm.errors import InvalidInputError

__all__ = ["smoothness"]


def smoothness(data: Data, tokens: Tensor, queries: Tensor, loss: Loss, v: Tensor | None) -> Tensor:
    r"""Upper bound $L_W$ (B,) on the Lipschitz constant of the gradient in W.

    $$L_W = \frac1n \sum_i \|z_i\|^2 \|X_i\|^2 g_i \,(M_0\, g_i + 3 M_1)$$

    with $M_0$, $M_1$ the Lipschitz constant and the largest size of the slope of the loss on the range of the scores,
    and $g_i = \|v\| \|X_i\|$ for a head v, or the norm of the scores of the sequence where only those are known (which
    is at most as large).

    Parameters
    ----------
    data
        For its scores, and what is allowed.
    tokens
        (B, n, T, d).
    queries
        (B, n, Q, d), 0 where a query takes no part.
    loss
        Of the signed output.
    v
        (B, d), or None.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898, the
    descent lemma.
    """
    seen = tokens * data.allowed.any(2).unsqueeze(-1)
    size = torch.linalg.matrix_norm(seen, 2).unsqueeze(-1)  # (B, n, 1)
    scores = data.scores * data.allowed
    if v is None:
        reach = torch.linalg.vector_norm(scores, dim=-1)
    else:
        reach = (torch.linalg.vector_norm(v, dim=-1).view(-1, 1, 1) * size).expand(scores.shape[:-1])
    low = data.scores.masked_fill(~data.allowed, torch.inf).flatten(1).amin(-1)
    high = data.scores.masked_fill(~data.allowed, -torch.inf).flatten(1).amax(-1)
    M0, M1 = (bound.view(-1, 1, 1) for bound in loss.bounds(low, high))
    each = queries.square().sum(-1) * size.square() * reach * (M0 * reach + 3.0 * M1)
    total = torch.where(data.active, each, torch.zeros_like(each)).flatten(1).sum(-1) / tokens.shape[1]
    if not bool((torch.isfinite(total) & (total > 0)).all()) or (loss.name == "log" and bool((low <= 0).any())):
        raise InvalidInputError(
            'descend: learning_rate="theory" needs a smoothness constant that is positive and finite; '
            f"with these tokens, scores and the {loss.name} loss there is none."
        )
    return total
