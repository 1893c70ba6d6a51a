r"""Attention layers on top of each other: what does each of them select, and is it a max-margin selection?

Layer l maps the tokens X of a sequence to

$$\mathrm{Att}_l(X)_q = X^\top \mathrm{softmax}(X W_l x_q), \qquad
  X \leftarrow M_l\big([X +]\; \mathrm{Att}_l(X)\big),$$

with the residual where it is asked for, and M_l either nothing or a fixed random network with one hidden layer (added
to its input where there is a residual). The last layer has no M; a fixed vector v reads it at the first token:
$f(X) = v^\top ([x_0 +]\; \mathrm{Att}_L(X)_0)$. Only the matrices $W_l$ are trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attsvm.dynamics.losses import find_loss
from attsvm.errors import AttSVMError, InvalidInputError
from attsvm.selection import TokenSelection
from attsvm.selection.arrays import Array, as_float, kind_of
from attsvm.threads import threads_for

__all__ = ["StackLayer", "StackPath", "descend_stack"]

IN_USE = 0.05
"""A query of a layer is in use when the next layer puts more probability than this on it, in a query in use."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StackLayer:
    """One layer at the end of a run; all have a leading B in a batch.

    Attributes
    ----------
    W
        (d, d).
    tokens
        (n, T, d) the layer's own input.
    queries
        (n, Q, d): all tokens, or the first one in the last layer.
    probabilities
        (n, Q, T).
    selected
        (n, Q) the most probable token.
    used
        (n, Q) booleans: whether the output of this query has a way to the read-out.
    """

    W: Any
    tokens: Any
    queries: Any
    probabilities: Any
    selected: Any
    used: Any

    def problem(self, *, selected: Array | None = None, used_only: bool = False, merge: float = 1e-2) -> TokenSelection:
        """The selection problem of this layer: its input tokens, and its own selections or other ones.

        Parameters
        ----------
        selected
            (n, Q) instead of the layer's own selections.
        used_only
            Leave out the queries that are not in use.
        merge
            Tokens of a sequence that are closer than this, relative to the root mean square size of the layer's tokens,
            become one: two queries of the layer below that selected the same token leave two copies of it, equal up to
            the attention that is left elsewhere. Copies are no rivals of each other, and as queries they ask once.
        """
        X = as_float(self.tokens, "tokens", where="StackLayer.problem")
        first = self.merged(merge)
        tokens = X.gather(-2, first.unsqueeze(-1).expand(X.shape))
        own = torch.as_tensor(self.selected if selected is None else selected, device=X.device)
        Q = own.shape[-1]
        chosen = first.gather(-1, own.gather(-1, first[..., :Q]))
        asks = first[..., :Q] == torch.arange(Q, device=X.device)
        if used_only:
            used = torch.as_tensor(self.used, device=X.device)
            # A copy that is in use speaks for the token that it became.
            asks &= torch.zeros_like(used, dtype=torch.int64).scatter_add(-1, first[..., :Q], used.long()) > 0
        chosen = torch.where(asks, chosen, torch.full_like(chosen, -1))
        return TokenSelection(kind_of(self.tokens).back(tokens), tokens[..., :Q, :], chosen)

    def merged(self, merge: float = 1e-2) -> Tensor:
        """(n, T) the token that each token becomes in :meth:`problem`: the first one close to it, or itself."""
        X = as_float(self.tokens, "tokens", where="StackLayer.merged")
        distance = (X.unsqueeze(-2) - X.unsqueeze(-3)).norm(dim=-1)
        size = X.square().sum(-1).mean((-2, -1)).sqrt()[..., None, None, None]
        close = distance <= merge * size
        first: Tensor = close.to(torch.int8).argmax(-1)
        # A chain of close tokens goes to the first of its first ones.
        for _ in range(X.shape[-2]):
            first = first.gather(-1, first)
        return first


@dataclass(frozen=True, kw_only=True, eq=False)
class StackPath:
    """A finished run of :func:`descend_stack`; a batch has a leading B everywhere but in ``steps``.

    Attributes
    ----------
    steps
        (R,) the recorded steps.
    loss
        (R,).
    norms
        (R, L) Frobenius norms of the trained matrices.
    layers
        The layers from the first to the last, at the end.
    """

    steps: Any
    loss: Any
    norms: Any
    layers: tuple[StackLayer, ...]


class _Attend(torch.autograd.Function):
    r"""``Att(X)`` for some queries, with a gradient that keeps its relative precision when attention saturates.

    The gradient in the logits, $c_t = s_t (g_t - \sum s g)$ with $g_t$ the slope along token t, loses all digits of the
    selected token a once the other probabilities are below 1e-16. Those are exact, so with $\delta = \sum_{t \ne a}
    s_t (g_a - g_t)$ the others are $s_t (g_t - g_a + \delta)$, and $c_a$ is minus their sum.
    """

    @staticmethod
    def forward(ctx: Any, X: Tensor, Z: Tensor, W: Tensor) -> Tensor:
        keys = Z @ W.mT.unsqueeze(-3)
        attention = torch.softmax(keys @ X.mT, -1)
        ctx.save_for_backward(X, Z, W, keys, attention)
        return attention @ X

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (slope,) = slopes
        X, Z, W, keys, attention = ctx.saved_tensors
        scores = slope @ X.mT
        selected = attention.argmax(-1, keepdim=True)
        lead = scores.gather(-1, selected) - scores
        others = attention.scatter(-1, selected, 0.0)
        drop = (others * lead).sum(-1, keepdim=True)
        change = others * (drop - lead)
        change = change.scatter(-1, selected, -change.sum(-1, keepdim=True))
        pooled = change @ X
        in_W = (pooled.mT @ Z).sum(-3)
        in_Z = pooled @ W.unsqueeze(-3)
        in_X = attention.mT @ slope + change.mT @ keys
        return in_X, in_Z, in_W


class _Model(NamedTuple):
    """The fixed parts of a stack, with a batch axis."""

    tokens: Tensor  # (B, n, T, d)
    labels: Tensor  # (B, n)
    v: Tensor  # (B, d)
    residual: bool
    mlps: tuple[tuple[Tensor, Tensor], ...]  # of each layer but the last: (B, 1, d, m), (B, 1, m, d); or none


def descend_stack(
    tokens: Array,
    labels: Array,
    v: Array,
    *,
    depth: int,
    residual: bool = False,
    mlp: int | None = None,
    loss: str = "logistic",
    learning_rate: float = 0.1,
    steps: int = 1000,
    init_scale: float = 0.1,
    seeds: Sequence[int] | int = 0,
    record_steps: Sequence[int] | None = None,
) -> StackPath:
    r"""Train the matrices of stacked attention layers by normalised gradient descent, each normalised on its own.

    Parameters
    ----------
    tokens
        (n, T, d), or (B, n, T, d) to train B stacks at once.
    labels
        (n,) or (B, n) of -1 and +1.
    v
        (d,) or (B, d), the fixed read-out.
    depth
        Number of layers L >= 1.
    residual
        Add the input of a layer to its output.
    mlp
        Width of the fixed random network after each layer but the last; None for none.
    loss
        Name of a loss of :func:`attsvm.dynamics.descend`.
    learning_rate
        Length of a step of each matrix, > 0.
    steps
        >= 0.
    init_scale
        The matrices start with independent normal entries of this deviation over sqrt(d), > 0: at zero all tokens of
        the second layer are equal, and it has no gradient.
    seeds
        Of the start and the random networks: a number, or one for each member of a batch.
    record_steps
        Increasing; default about 40 at growing distances. The last step is always recorded.

    Returns
    -------
    StackPath
        Computed in float64. A stack gets the same numbers alone and in a batch, to rounding.

    Raises
    ------
    InvalidInputError
        If an argument is not what it must be.
    AttSVMError
        If the run diverges to a value that is not finite.

    Examples
    --------
    >>> tokens = [[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]
    >>> path = descend_stack(tokens, [1], [1.0, 0.0], depth=2, steps=300)
    >>> [int(layer.selected[0, 0]) for layer in path.layers], bool(path.loss[-1] < path.loss[0])
    ([0, 0], True)
    """
    where = "descend_stack"
    _check(depth, mlp, learning_rate, steps, init_scale, where)
    rule = find_loss(loss, where=where)
    single = as_float(tokens, "tokens", where=where).ndim == 3
    model, Ws = _prepare(tokens, labels, v, depth, residual, mlp, init_scale, seeds, where)
    planned = _planned(steps, record_steps)
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    B, n, T, d = model.tokens.shape
    with threads_for(8.0 * B * n * T * depth * d * (T + d + (mlp or 0))):
        for step in range(steps + 1):
            Ws = [W.detach().requires_grad_() for W in Ws]
            each = rule.value(model.labels * _output(model, Ws)).mean(-1)
            if step == planned[len(losses)]:
                _require_finite(each, step, where)
                losses.append(each.detach())
                norms.append(torch.stack([W.detach().norm(dim=(-2, -1)) for W in Ws], -1))
            if step == steps:
                break
            # Members do not interact: the gradient of the sum holds the gradient of each.
            slopes = torch.autograd.grad(each.sum(), Ws)
            Ws = [W.detach() - learning_rate * _unit(slope) for W, slope in zip(Ws, slopes, strict=True)]
    back = kind_of(tokens).back

    def out(value: Tensor) -> Any:
        return back(value.detach()[0] if single else value.detach())

    return StackPath(
        steps=back(torch.tensor(planned)),
        loss=out(torch.stack(losses, -1)),
        norms=out(torch.stack(norms, -2)),
        layers=tuple(StackLayer(**{name: out(value) for name, value in layer.items()}) for layer in _ends(model, Ws)),
    )


# ------------------------------------------------------------------------------------------------------------- forward


def _attend(X: Tensor, Z: Tensor, W: Tensor) -> Tensor:
    found: Tensor = _Attend.apply(X, Z, W)  # type: ignore[no-untyped-call]
    return found


def _above(model: _Model, X: Tensor, W: Tensor, layer: int) -> Tensor:
    """Tokens after a layer that is not the last."""
    out = _attend(X, X, W)
    if model.residual:
        out = X + out
    if model.mlps:
        first, second = model.mlps[layer]
        change = torch.relu(out @ first) @ second
        out = out + change if model.residual else change
    return out


def _output(model: _Model, Ws: Sequence[Tensor]) -> Tensor:
    """The outputs f (B, n)."""
    X = model.tokens
    for layer, W in enumerate(Ws[:-1]):
        X = _above(model, X, W, layer)
    first = X[..., :1, :]
    out = _attend(X, first, Ws[-1])
    if model.residual:
        out = first + out
    return torch.einsum("bnd,bd->bn", out.squeeze(-2), model.v)


def _unit(slope: Tensor) -> Tensor:
    """The slope over its norm, without underflow of the squares; 0 where it is 0."""
    largest = slope.abs().amax((-2, -1), keepdim=True)
    scaled = slope / torch.where(largest > 0, largest, torch.ones_like(largest))
    size = scaled.norm(dim=(-2, -1), keepdim=True)
    return scaled / torch.where(size > 0, size, torch.ones_like(size))


def _ends(model: _Model, Ws: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """What each layer sees and selects at the end, and from the last layer down, which queries are in use."""
    layers, X = [], model.tokens
    for layer, W in enumerate(Ws):
        last = layer == len(Ws) - 1
        Z = X[..., :1, :] if last else X
        attention = torch.softmax(Z @ W.mT.unsqueeze(-3) @ X.mT, -1)
        layers.append({"W": W, "tokens": X, "queries": Z, "probabilities": attention, "selected": attention.argmax(-1)})
        if not last:
            X = _above(model, X, W, layer)
    used = torch.ones_like(layers[-1]["selected"], dtype=torch.bool)
    layers[-1]["used"] = used
    for lower, upper in zip(layers[-2::-1], layers[:0:-1], strict=True):
        reached = ((upper["probabilities"] > IN_USE) & used.unsqueeze(-1)).any(-2)
        if model.residual:
            reached[..., : used.shape[-1]] |= used
        used = reached
        lower["used"] = used
    return layers


# --------------------------------------------------------------------------------------------------------------- input


def _prepare(
    tokens: Array,
    labels: Array,
    v: Array,
    depth: int,
    residual: bool,
    mlp: int | None,
    init_scale: float,
    seeds: Sequence[int] | int,
    where: str,
) -> tuple[_Model, list[Tensor]]:
    """Float64 data with a batch axis, random networks, and the start of the matrices."""
    X = as_float(tokens, "tokens", where=where).to(torch.float64)
    if X.ndim not in (3, 4) or not bool(torch.isfinite(X).all()):
        raise InvalidInputError(f"{where}: tokens must be finite, of shape (n, T, d) or (B, n, T, d).")
    Y, head = (as_float(a, name, where=where, device=X.device).double() for a, name in ((labels, "labels"), (v, "v")))
    if Y.shape != X.shape[:-2] or not bool((Y.abs() == 1).all()):
        raise InvalidInputError(f"{where}: labels must be -1 and +1 of shape {tuple(X.shape[:-2])}.")
    if head.shape not in (X.shape[-1:], (*X.shape[:-3], X.shape[-1])):
        raise InvalidInputError(f"{where}: v must have shape ({X.shape[-1]},), with a leading B for a batch.")
    X, Y = (X.unsqueeze(0), Y.unsqueeze(0)) if X.ndim == 3 else (X, Y)
    B, _, _, d = X.shape
    each = [seeds] * B if isinstance(seeds, int) else list(seeds)
    if len(each) != B:
        raise InvalidInputError(f"{where}: seeds must hold one seed for each of the {B} stacks, got {len(each)}.")
    drawn = [_draw(seed, depth, d, mlp) for seed in each]
    starts, networks = ([torch.stack(parts).to(X.device) for parts in zip(*column)] for column in zip(*drawn))
    mlps = tuple((a.unsqueeze(1), b.unsqueeze(1)) for a, b in zip(networks[::2], networks[1::2], strict=True))
    model = _Model(X, Y, head.expand(B, d), residual, mlps)
    return model, [init_scale * start for start in starts]


def _draw(seed: int, depth: int, d: int, mlp: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices (d, d), and the two weights of each network, scaled so that a network keeps the size of its input."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, size: float) -> Tensor:
        return size * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    starts = [normal(d, d, 1.0 / math.sqrt(d)) for _ in range(depth)]
    networks: list[Tensor] = []
    if mlp is not None:
        for _ in range(depth - 1):
            networks += [normal(d, mlp, math.sqrt(2.0 / d)), normal(mlp, d, math.sqrt(1.0 / mlp))]
    return starts, networks


def _check(depth: int, mlp: int | None, learning_rate: float, steps: int, init_scale: float, where: str) -> None:
    if not (isinstance(depth, int) and depth >= 1):
        raise InvalidInputError(f"{where}: depth must be an integer >= 1, got {depth!r}.")
    if mlp is not None and not (isinstance(mlp, int) and mlp >= 1):
        raise InvalidInputError(f"{where}: mlp must be an integer >= 1 or None, got {mlp!r}.")
    if not 0 < learning_rate < math.inf:
        raise InvalidInputError(f"{where}: learning_rate must be > 0 and finite, got {learning_rate!r}.")
    if not (isinstance(steps, int) and steps >= 0):
        raise InvalidInputError(f"{where}: steps must be an integer >= 0, got {steps!r}.")
    if not 0 < init_scale < math.inf:
        raise InvalidInputError(f"{where}: init_scale must be > 0 and finite, got {init_scale!r}.")


def _require_finite(loss: Tensor, step: int, where: str) -> None:
    if not bool(torch.isfinite(loss).all()):
        raise AttSVMError(f"{where}: the run left the range of float64 at step {step}; lower learning_rate.")


def _planned(steps: int, wanted: Sequence[int] | None) -> list[int]:
    if wanted is not None:
        return sorted({*(int(step) for step in wanted if 0 <= step < steps), steps})
    planned, place = [0], 1.0
    while place < steps:
        planned.append(round(place))
        place = max(place + 1.0, 1.25 * place)
    return sorted({*planned, steps})
