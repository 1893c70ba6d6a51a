r"""One attention layer with a linear head: forward, and the gradient in a form that does not underflow.

With $s_i = \mathrm{softmax}(X_i W z_i + b_i)$ over the allowed tokens, scores $\gamma_{it} = Y_i v^\top x_{it}$ and
$f_i = \gamma_i^\top s_i$, the loss is $\frac1n \sum_i \ell(f_i)$ and its gradient is

$$\nabla_W = \frac1n \sum_i \Big(\sum_t c_{it} x_{it}\Big) z_i^\top, \qquad
  c_{it} = \ell'(f_i)\, s_{it} (\gamma_{it} - f_i).$$

Once attention has nearly selected a token a, every $c_{it}$ is of the size of the probabilities that are left, which
leave the range of float64 at $\|W\|$ of 50 to 60. The direction does not: with $\delta_i = \gamma_{ia} - f_i =
\sum_{t \ne a} s_{it} (\gamma_{ia} - \gamma_{it})$, a sum of the small terms themselves,

$$c_{it} = \ell' s_{it} (\gamma_{it} - \gamma_{ia} + \delta_i) \;\; (t \ne a), \qquad c_{ia} = \ell' s_{ia} \delta_i ,$$

and all probabilities but the selected ones are divided by the largest of them in the whole run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attsvm.dynamics.losses import Loss

__all__ = ["Data", "Gradient", "TokenStore", "gradient", "probabilities"]


class TokenStore:
    """Tokens (B, n, T, d), kept in groups of sequences of like length so that padding costs little.

    Parameters
    ----------
    tokens
        (B, n, T, d).
    allowed
        (B, n, Q, T).
    """

    def __init__(self, tokens: Tensor, allowed: Tensor) -> None:
        self.shape = tokens.shape
        T = tokens.shape[2]
        places = torch.arange(1, T + 1, device=tokens.device)
        lengths = (allowed.any(2) * places).amax(-1).amax(0).clamp(min=1)
        self._groups: list[tuple[Tensor, int, Tensor]] = []
        order = lengths.argsort(descending=True, stable=True)
        begin = 0
        while begin < len(order):
            longest = int(lengths[order[begin]])
            members = order[begin:]
            members = members[lengths[members] > 0.75 * longest] if tokens.numel() > 1_000_000 else members
            self._groups.append((members, longest, tokens[:, members, :longest].contiguous()))
            begin += len(members)

    def logits(self, keys: Tensor) -> Tensor:
        """``x_t^T u_q`` (B, n, Q, T) for u (B, n, Q, d); places beyond the group's length are 0."""
        B, n, T, _ = self.shape
        out = torch.zeros((B, n, keys.shape[2], T), dtype=keys.dtype, device=keys.device)
        for members, length, tokens in self._groups:
            # Tokens first: with one query a sequence this is twice as fast as the product the other way round.
            out[:, members, :, :length] = (tokens @ keys[:, members].mT).mT
        return out

    def pool(self, weights: Tensor) -> Tensor:
        """``sum over t of weights_t x_t`` (B, n, Q, d) for weights (B, n, Q, T)."""
        B, n, _, d = self.shape
        out = torch.empty((B, n, weights.shape[2], d), dtype=weights.dtype, device=weights.device)
        for members, length, tokens in self._groups:
            out[:, members] = weights[:, members, :, :length] @ tokens
        return out


class Data(NamedTuple):
    """What a run is trained on; all with a batch axis B."""

    store: TokenStore
    queries: Tensor  # (B, n, Q, r), in the basis that the run uses
    allowed: Tensor  # (B, n, Q, T)
    active: Tensor  # (B, n, Q): queries that take part
    offsets: Tensor | None  # (B, n, Q, T)
    scores: Tensor  # (B, n, Q, T)


class Gradient(NamedTuple):
    """The gradient of the loss in W, as ``exp(log_scale) * sum over n, Q of pooled z^T``."""

    pooled: Tensor  # (B, n, Q, d)
    log_scale: Tensor  # (B,)
    loss: Tensor  # (B,)
    selected: Tensor  # (B, n, Q) index of the most probable token
    mass: Tensor  # (B,) mean probability of that token


def log_probabilities(data: Data, keys: Tensor) -> Tensor:
    """Log-softmax (B, n, Q, T) of the logits for ``keys`` = W z (B, n, Q, d); -inf at masked tokens."""
    logits = data.store.logits(keys)
    if data.offsets is not None:
        logits = logits + data.offsets
    masked = logits.masked_fill(~data.allowed, -math.inf)
    # A query with nothing allowed has no distribution; it gets a uniform one over masked tokens and weight 0.
    masked = torch.where(data.active.unsqueeze(-1), masked, torch.zeros_like(masked))
    return torch.log_softmax(masked, -1)


def probabilities(data: Data, keys: Tensor) -> Tensor:
    """Attention (B, n, Q, T); all 0 for a query with nothing allowed."""
    return log_probabilities(data, keys).exp() * data.allowed


def gradient(data: Data, keys: Tensor, loss: Loss) -> Gradient:
    """Loss and gradient at ``keys`` = W z (B, n, Q, d)."""
    n = data.queries.shape[1]
    logs = log_probabilities(data, keys)
    top, selected = logs.max(-1, keepdim=True)
    rest = logs.scatter(-1, selected, -math.inf)
    rest = rest.masked_fill(~(data.allowed & data.active.unsqueeze(-1)), -math.inf)
    log_scale = rest.flatten(1).amax(-1)
    log_scale = torch.where(torch.isfinite(log_scale), log_scale, torch.zeros_like(log_scale))
    shift = log_scale.view(-1, 1, 1, 1)
    small = torch.exp(rest - shift)
    own = data.scores.gather(-1, selected)
    lead = (small * (own - data.scores)).sum(-1, keepdim=True)
    drop = lead * shift.exp()
    output = (own - drop).squeeze(-1)
    weights = small * (data.scores - own + drop)
    weights = weights.scatter(-1, selected, top.exp() * lead)
    slope = torch.where(data.active, loss.slope(output), torch.zeros_like(output)) / n
    weights = weights * slope.unsqueeze(-1)
    counted = torch.where(data.active, loss.value(output), torch.zeros_like(output))
    shown = torch.where(data.active, top.squeeze(-1).exp(), torch.zeros_like(output))
    return Gradient(
        pooled=data.store.pool(weights),
        log_scale=log_scale,
        loss=counted.flatten(1).sum(-1) / n,
        selected=selected.squeeze(-1),
        mass=shown.flatten(1).sum(-1) / data.active.flatten(1).sum(-1).clamp(min=1),
    )
