r"""One attention layer with a head: forward, and the gradient in a form that does not underflow.

With $s_i = \mathrm{softmax}(X_i W z_i + b_i)$ over the allowed tokens, scores $\gamma_{it} = Y_i v^\top x_{it}$ and
$f_i = \gamma_i^\top s_i$, the loss is $\frac1n \sum_i \ell(f_i)$ and its gradient is

$$\nabla_W = \frac1n \sum_i \Big(\sum_t c_{it} x_{it}\Big) z_i^\top, \qquad
  c_{it} = \ell'(f_i)\, s_{it} (\gamma_{it} - f_i).$$

Once attention has nearly selected a token a, every $c_{it}$ is of the size of the probabilities that are left, which
leave the range of float64 at $\|W\|$ of 50 to 60. The direction does not: with $\delta_i = \gamma_{ia} - f_i =
\sum_{t \ne a} s_{it} (\gamma_{ia} - \gamma_{it})$, a sum of the small terms themselves,

$$c_{it} = \ell' s_{it} (\gamma_{it} - \gamma_{ia} + \delta_i) \;\; (t \ne a), \qquad c_{ia} = \ell' s_{ia} \delta_i ,$$

and all probabilities but the selected ones are divided by the largest of them in the whole run, as are the slopes
$\ell'$.

Any other head h acts on the pooled token $x_i = X_i^\top s_i$. Its gradient in W is that of the linear head with the
local scores $\gamma_{it} = Y_i \nabla h(x_i)^\top x_{it}$, so that everything above holds for it, with
$\ell'(Y_i h(x_i))$.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attsvm.dynamics.losses import Loss, Output

__all__ = ["Data", "Gradient", "PooledHead", "TokenStore", "gradient", "log_probabilities", "probabilities"]

PooledHead = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``pooled tokens (B, n, Q, d) -> values (B, n, Q) and their slopes (B, n, Q, d)``."""


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
    scores: Tensor  # (B, n, Q, T), of a fixed linear head; 0 where the head is another
    labels: Tensor | None = None  # (B, n, Q) of -1 and +1, for the other heads


class Gradient(NamedTuple):
    """The gradient of the loss in W, as ``exp(log_scale) * sum over n, Q of pooled z^T``."""

    pooled: Tensor  # (B, n, Q, d)
    log_scale: Tensor  # (B,)
    loss: Tensor  # (B,)
    selected: Tensor  # (B, n, Q) index of the most probable token
    mass: Tensor  # (B,) mean probability of that token
    head: Tensor | None = None  # (B, d): the slope in a trained linear head, divided by exp(head_log)
    head_log: Tensor | None = None  # (B,)
    gap: Tensor | None = None  # (B,): loss minus its infimum for a fixed linear head, divided by exp(log_scale)


class _Near(NamedTuple):
    """Attention seen from the selected tokens: all others as ``exp(shift) * small``."""

    small: Tensor  # (B, n, Q, T), 0 at the selected token and where nothing is allowed
    shift: Tensor  # (B,)
    top: Tensor  # (B, n, Q, 1) log-probability of the selected token
    selected: Tensor  # (B, n, Q, 1)


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


def gradient(
    data: Data, keys: Tensor, loss: Loss, *, head: PooledHead | None = None, v: Tensor | None = None, gap: bool = False
) -> Gradient:
    """Loss and gradient at ``keys`` = W z (B, n, Q, d).

    Parameters
    ----------
    data
        With the scores of a fixed linear head, or with labels for another head.
    keys
        (B, n, Q, d).
    loss
        Of the signed output.
    head
        A head that is not linear.
    v
        (B, d), a linear head that is trained as well; its slope is wanted.
    gap
        Whether the distance of the loss from its infimum is wanted, for a fixed linear head.
    """
    n = data.queries.shape[1]
    logs = log_probabilities(data, keys)
    near = _near(data, logs)
    pooled = data.store.pool(logs.exp() * data.allowed) if head is not None or v is not None else None
    scores, value = _scores(data, pooled, head, v)
    own = scores.gather(-1, near.selected)
    lead = (near.small * (own - scores)).sum(-1, keepdim=True)
    drop = lead * near.shift.exp().view(-1, 1, 1, 1)
    own_, lead_ = own.squeeze(-1), lead.squeeze(-1)
    if value is None:
        drop_log = lead_.abs().log() + near.shift.view(-1, 1, 1)
        output = Output((own - drop).squeeze(-1), own_, torch.sign(lead_), drop_log)
    else:
        output = Output(value)
    slope, slope_log = _scaled_slopes(data, loss, output)
    weights = near.small * (scores - own + drop)
    weights = weights.scatter(-1, near.selected, near.top.exp() * lead) * (slope / n).unsqueeze(-1)
    counted = torch.where(data.active, loss.value(output.value), torch.zeros_like(output.value))
    shown = torch.where(data.active, near.top.squeeze(-1).exp(), torch.zeros_like(output.value))
    log_scale = near.shift + slope_log
    return Gradient(
        pooled=data.store.pool(weights),
        log_scale=log_scale,
        loss=counted.flatten(1).sum(-1) / n,
        selected=near.selected.squeeze(-1),
        mass=shown.flatten(1).sum(-1) / data.active.flatten(1).sum(-1).clamp(min=1),
        head=None if v is None or pooled is None else _head_slope(data, pooled, slope / n),
        head_log=None if v is None else slope_log,
        gap=_gap(data, loss, near, own_, lead_, log_scale) / n if gap else None,
    )


def _near(data: Data, logs: Tensor) -> _Near:
    top, selected = logs.max(-1, keepdim=True)
    rest = logs.scatter(-1, selected, -math.inf)
    rest = rest.masked_fill(~(data.allowed & data.active.unsqueeze(-1)), -math.inf)
    shift = rest.flatten(1).amax(-1)
    shift = torch.where(torch.isfinite(shift), shift, torch.zeros_like(shift))
    return _Near(torch.exp(rest - shift.view(-1, 1, 1, 1)), shift, top, selected)


def _scores(
    data: Data, pooled: Tensor | None, head: PooledHead | None, v: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The (local) scores of the tokens, and the signed output of a head that is not linear."""
    if pooled is None:
        return data.scores, None
    assert data.labels is not None
    if head is None:
        assert v is not None
        slopes, value = v.view(len(v), 1, 1, -1).expand_as(pooled), None
    else:
        values, slopes = head(pooled)
        value = data.labels * values
    return data.labels.unsqueeze(-1) * data.store.logits(slopes), value


def _scaled_slopes(data: Data, loss: Loss, output: Output) -> tuple[Tensor, Tensor]:
    """Slopes of the loss (B, n, Q) divided by the largest of them, and the logarithm (B,) of that."""
    sign, log_size = loss.log_slope(output)
    log_size = log_size.masked_fill(~data.active, -math.inf)
    top = log_size.flatten(1).amax(-1)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    return torch.where(data.active, sign * torch.exp(log_size - top.view(-1, 1, 1)), torch.zeros_like(sign)), top


def _head_slope(data: Data, pooled: Tensor, slope: Tensor) -> Tensor:
    assert data.labels is not None
    return torch.einsum("bnq,bnqd->bd", slope * data.labels, pooled)


def _gap(data: Data, loss: Loss, near: _Near, own: Tensor, lead: Tensor, log_scale: Tensor) -> Tensor:
    """Sum over the queries of ``(loss - loss at the best score) / exp(log_scale)``, (B,)."""
    best = data.scores.masked_fill(~data.allowed, -math.inf).amax(-1)
    best = torch.where(data.active, best, torch.zeros_like(best))
    shift, scale = near.shift.view(-1, 1, 1), log_scale.view(-1, 1, 1)
    drop = (best - own) + lead * shift.exp()
    # To first order where the drop is tiny: the factor exp(shift) never has to be a number by itself.
    _, log_size = loss.log_slope(Output(best, best))
    first = lead * torch.exp(log_size + shift - scale)
    full = loss.gap(best, drop) * torch.exp(-scale)
    tiny = (best == own) & (drop.abs() < 1e-9)
    each = torch.where(tiny, first, full)
    return torch.where(data.active, each, torch.zeros_like(each)).flatten(1).sum(-1)
