r"""Several attention heads whose outputs are added up, trained together with their read-out.

$$f(X) = \frac{1}{\sqrt H} \sum_{h=1}^H \sum_q u_{hq}^\top X^\top \mathrm{softmax}(X W_h z_q) .$$

With all tokens as queries this is $\frac{1}{\sqrt H} \sum_h \langle U_h, S(X W_h^\top X^\top) X \rangle$, S the softmax
of each row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attsvm.dynamics.losses import Loss, find_loss
from attsvm.errors import AttSVMError, InvalidInputError
from attsvm.selection.arrays import Array, Kind, as_float, kind_of
from attsvm.threads import threads_for

__all__ = ["HeadsPath", "descend_heads", "heads_output"]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadsPath:
    """A finished run of :func:`descend_heads`; a batch has a leading B everywhere but in ``steps``.

    Attributes
    ----------
    steps
        (R,) the recorded steps.
    loss, accuracy
        (R,) on the training data.
    test_loss, test_accuracy
        (R,) on the test data; None without them.
    W
        (H, d, d) at the end.
    U
        (H, Q, d) at the end; the fixed read-out where it was not trained.
    """

    steps: Any
    loss: Any
    accuracy: Any
    test_loss: Any
    test_accuracy: Any
    W: Any
    U: Any


class _Data(NamedTuple):
    """Data with a batch axis: tokens (B, n, T, d), queries (B, n, Q, d), labels (B, n)."""

    tokens: Tensor
    queries: Tensor
    labels: Tensor


class _Forward(NamedTuple):
    """What the backward pass needs; heads and queries share an axis, QH."""

    attention: Tensor  # (B, n, T, QH)
    scores: Tensor  # (B, n, T, QH): read-out times token
    parts: Tensor  # (B, n, QH): outputs before they are added up
    output: Tensor  # (B, n)


def descend_heads(
    tokens: Array,
    labels: Array,
    *,
    heads: int,
    queries: Array | None = None,
    readout: Array | None = None,
    loss: str = "logistic",
    optimizer: Literal["gd", "ngd"] = "gd",
    learning_rate: float = 1.0,
    steps: int = 1000,
    init_scale: float = 0.1,
    seeds: Sequence[int] | int = 0,
    record_steps: Sequence[int] | None = None,
    test: tuple[Array, ...] | None = None,
) -> HeadsPath:
    r"""Train the heads $W_h$, and with them the read-outs $U_h$, by gradient descent on the mean loss.

    Minimises $\frac1n \sum_i \ell(Y_i f(X_i))$ with f as at the top of this module.

    Parameters
    ----------
    tokens
        (n, T, d), or (B, n, T, d) to train B models at once.
    labels
        (n,) or (B, n) of -1 and +1.
    heads
        H >= 1.
    queries
        (n, Q, d) or (B, n, Q, d). Default: every token is a query.
    readout
        (d,) or (Q, d), fixed and shared by all heads. Default: U is trained.
    loss
        Name of a loss of :func:`attsvm.dynamics.descend`.
    optimizer
        ``"gd"``, or ``"ngd"``: each $W_h$ and each $U_h$ moves by ``learning_rate`` along its own normalised gradient.
    learning_rate
        > 0 and finite.
    steps
        >= 0.
    init_scale
        $W_h$ and $U_h$ start with independent normal entries of this deviation over sqrt(d); 0 starts at zero, where
        all heads stay equal.
    seeds
        Of the start: a number, or one for each member of a batch.
    record_steps
        Increasing; default about 40 at growing distances. The last step is always recorded.
    test
        ``(tokens, labels)``, or ``(tokens, labels, queries)`` where queries are given, for the loss on other data.

    Returns
    -------
    HeadsPath
        Computed in float64. A model gets the same numbers alone and in a batch, to rounding.

    Raises
    ------
    InvalidInputError
        If an argument is not what it must be.
    AttSVMError
        If the run diverges to a value that is not finite.

    Notes
    -----
    A step costs two passes over n Q T H probabilities and a few products of them with the tokens.

    References
    ----------
    Deora, Ghaderi, Taheri, Thrampoulidis. "On the Optimization and Generalization of Multi-head Attention", 2023.
    arXiv:2310.12680.

    Examples
    --------
    >>> path = descend_heads([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]]], [1, -1], heads=2, steps=200)
    >>> float(path.accuracy[-1]), bool(path.loss[-1] < 0.05)
    (1.0, True)
    """
    where = "descend_heads"
    data, single, kind = _read(tokens, labels, queries, where)
    other = None if test is None else _read_test(test, queries is not None, where)
    _check(heads, learning_rate, steps, init_scale, optimizer, where)
    rule = find_loss(loss, where=where)
    W, U = _start(data, heads, init_scale, seeds, where)
    fixed = None if readout is None else _fixed(readout, data, heads, where)
    U = U if fixed is None else fixed
    planned = _planned(steps, record_steps)
    records: list[tuple[Tensor, ...]] = []
    B, n, T, d = data.tokens.shape
    with threads_for(8.0 * B * n * data.queries.shape[2] * heads * T * d):
        for step in range(steps + 1):
            found = _forward(data, W, U)
            if step == planned[len(records)]:
                records.append(_measured(data, other, found.output, W, U, rule, step))
            if step == steps:
                break
            slope_W, slope_U = _gradient(data, found, rule, heads, trained=fixed is None)
            W = W - learning_rate * _scaled(slope_W, optimizer)
            if slope_U is not None:
                U = U - learning_rate * _scaled(slope_U, optimizer)
    columns = [torch.stack(column, -1) for column in zip(*records, strict=True)]

    def out(value: Tensor) -> Any:
        return kind.back(value[0] if single else value)

    shown = [out(column) for column in columns] + [None] * (4 - len(columns))
    return HeadsPath(
        steps=kind.back(torch.tensor(planned)),
        loss=shown[0],
        accuracy=shown[1],
        test_loss=shown[2],
        test_accuracy=shown[3],
        W=out(W),
        U=out(U),
    )


def heads_output(tokens: Array, W: Array, U: Array, *, queries: Array | None = None) -> Any:
    """Outputs f (n,) or (B, n) of the heads ``W`` (H, d, d) with read-outs ``U`` (H, Q, d), with a B for batches."""
    where = "heads_output"
    X = as_float(tokens, "tokens", where=where)
    labels = torch.ones(X.shape[:-2], dtype=torch.float64)
    data, single, kind = _read(tokens, labels, queries, where)
    parts = (as_float(value, name, where=where).to(torch.float64) for name, value in (("W", W), ("U", U)))
    heads, outs = (part.unsqueeze(0) if single else part for part in parts)
    if heads.ndim != 4 or outs.ndim != 4 or outs.shape[2] != data.queries.shape[2]:
        raise InvalidInputError(f"{where}: W must have shape (H, d, d) and U (H, Q, d), with a leading B for batches.")
    output = _forward(data, heads, outs).output
    return kind.back(output[0] if single else output)


# ------------------------------------------------------------------------------------------------ forward and backward


def _forward(data: _Data, W: Tensor, U: Tensor) -> _Forward:
    B, n, _, d = data.tokens.shape
    Q, H = data.queries.shape[2], W.shape[1]
    # One product for all heads: Z (B, nQ, d) times [W_1; ...; W_H]^T (B, d, Hd).
    keys = data.queries.reshape(B, n * Q, d) @ W.reshape(B, H * d, d).mT
    # Tokens come before heads and queries: a softmax along an inner axis uses vector units, along the last it does not.
    attention = torch.softmax(data.tokens @ keys.reshape(B, n, Q * H, d).mT, -2)
    scores = data.tokens @ U.transpose(1, 2).reshape(B, 1, Q * H, d).mT
    parts = (attention * scores).sum(-2)
    return _Forward(attention, scores, parts, parts.sum(-1) / math.sqrt(H))


def _gradient(data: _Data, found: _Forward, rule: Loss, heads: int, *, trained: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients in W (B, H, d, d) and U (B, H, Q, d)."""
    B, n, _, d = data.tokens.shape
    Q = data.queries.shape[2]
    slope = data.labels * rule.slope(data.labels * found.output) / (n * math.sqrt(heads))
    weighted = found.attention * slope[..., None, None]
    pooled = (weighted * (found.scores - found.parts.unsqueeze(-2))).mT @ data.tokens
    # (B, n, QH, d) is (B, nQ, Hd), and its product with the queries sums over sequences and queries.
    slope_W = pooled.reshape(B, n * Q, heads * d).mT @ data.queries.reshape(B, n * Q, d)
    slope_U = None
    if trained:
        slope_U = (weighted.mT @ data.tokens).sum(1).reshape(B, Q, heads, d).transpose(1, 2)
    return slope_W.reshape(B, heads, d, d), slope_U


def _scaled(slope: Tensor, optimizer: str) -> Tensor:
    if optimizer == "gd":
        return slope
    size = torch.linalg.vector_norm(slope, dim=(-2, -1), keepdim=True)
    return slope / torch.where(size > 0, size, torch.ones_like(size))


def _measured(
    data: _Data, other: _Data | None, output: Tensor, W: Tensor, U: Tensor, rule: Loss, step: int
) -> tuple[Tensor, ...]:
    """Loss and accuracy on the training data, and on the test data if there are any."""
    numbers = [_mean_loss(data, output, rule), _accuracy(data, output)]
    if not bool(torch.isfinite(numbers[0]).all()):
        raise AttSVMError(f"descend_heads: the run left the range of float64 at step {step}; lower learning_rate.")
    if other is not None:
        output = _forward(other, W, U).output
        numbers += [_mean_loss(other, output, rule), _accuracy(other, output)]
    return tuple(numbers)


def _mean_loss(data: _Data, output: Tensor, rule: Loss) -> Tensor:
    return rule.value(data.labels * output).mean(-1)


def _accuracy(data: _Data, output: Tensor) -> Tensor:
    return (data.labels * output > 0).to(torch.float64).mean(-1)


# --------------------------------------------------------------------------------------------------------------- input


def _read(tokens: Array, labels: Array, queries: Array | None, where: str) -> tuple[_Data, bool, Kind]:
    """Float64 data with a batch axis; whether it came without one; and its kind."""
    X = as_float(tokens, "tokens", where=where).to(torch.float64)
    if X.ndim not in (3, 4):
        raise InvalidInputError(f"{where}: tokens must have shape (n, T, d) or (B, n, T, d), got {tuple(X.shape)}.")
    Y = as_float(labels, "labels", where=where, device=X.device).to(torch.float64)
    if Y.shape != X.shape[:-2] or not bool((Y.abs() == 1).all()):
        raise InvalidInputError(f"{where}: labels must be -1 and +1 of shape {tuple(X.shape[:-2])}.")
    Z = X if queries is None else as_float(queries, "queries", where=where, device=X.device).to(torch.float64)
    if Z.ndim != X.ndim or (*Z.shape[:-2], Z.shape[-1]) != (*X.shape[:-2], X.shape[-1]):
        raise InvalidInputError(f"{where}: queries must have the shape of the tokens but in T, got {tuple(Z.shape)}.")
    if not bool(torch.isfinite(X).all() and torch.isfinite(Z).all()):
        raise InvalidInputError(f"{where}: tokens and queries must be finite.")
    single = X.ndim == 3
    parts = (value.unsqueeze(0) if single else value for value in (X, Z, Y))
    return _Data(*parts), single, kind_of(tokens)


def _read_test(test: tuple[Array, ...], queries: bool, where: str) -> _Data:
    if len(test) != 2 + queries:
        wanted = "(tokens, labels, queries)" if queries else "(tokens, labels)"
        raise InvalidInputError(f"{where}: test must be {wanted}, got {len(test)} parts.")
    return _read(test[0], test[1], test[2] if queries else None, f"{where}, test")[0]


def _check(heads: int, learning_rate: float, steps: int, init_scale: float, optimizer: str, where: str) -> None:
    if not (isinstance(heads, int) and heads >= 1):
        raise InvalidInputError(f"{where}: heads must be an integer >= 1, got {heads!r}.")
    if not 0 < learning_rate < math.inf:
        raise InvalidInputError(f"{where}: learning_rate must be > 0 and finite, got {learning_rate!r}.")
    if not (isinstance(steps, int) and steps >= 0):
        raise InvalidInputError(f"{where}: steps must be an integer >= 0, got {steps!r}.")
    if not 0 <= init_scale < math.inf:
        raise InvalidInputError(f"{where}: init_scale must be >= 0 and finite, got {init_scale!r}.")
    if optimizer not in ("gd", "ngd"):
        raise InvalidInputError(f'{where}: optimizer must be "gd" or "ngd", got {optimizer!r}.')


def _start(data: _Data, heads: int, scale: float, seeds: Sequence[int] | int, where: str) -> tuple[Tensor, Tensor]:
    """Normal starts, each member from its own generator, W first."""
    B, _, _, d = data.tokens.shape
    Q = data.queries.shape[2]
    each = [seeds] * B if isinstance(seeds, int) else list(seeds)
    if len(each) != B:
        raise InvalidInputError(f"{where}: seeds must hold one seed for each of the {B} models, got {len(each)}.")
    W, U = [], []
    for seed in each:
        generator = torch.Generator().manual_seed(seed)
        W.append(torch.randn(heads, d, d, generator=generator, dtype=torch.float64))
        U.append(torch.randn(heads, Q, d, generator=generator, dtype=torch.float64))
    size, device = scale / math.sqrt(d), data.tokens.device
    return size * torch.stack(W).to(device), size * torch.stack(U).to(device)


def _fixed(readout: Array, data: _Data, heads: int, where: str) -> Tensor:
    """The fixed read-out as U (B, H, Q, d)."""
    B, _, _, d = data.tokens.shape
    Q = data.queries.shape[2]
    u = as_float(readout, "readout", where=where, device=data.tokens.device).to(torch.float64)
    if tuple(u.shape) not in ((d,), (Q, d)):
        raise InvalidInputError(f"{where}: readout must have shape ({d},) or ({Q}, {d}), got {tuple(u.shape)}.")
    return u.expand(B, heads, Q, d)


def _planned(steps: int, wanted: Sequence[int] | None) -> list[int]:
    if wanted is not None:
        return sorted({*(int(step) for step in wanted if 0 <= step < steps), steps})
    planned, place = [0], 1.0
    while place < steps:
        planned.append(round(place))
        place = max(place + 1.0, 1.25 * place)
    return sorted({*planned, steps})
