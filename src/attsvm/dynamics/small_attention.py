r"""Compiled gradient of one small attention layer, of the loss of its head's outputs; see :mod:`attsvm.dynamics.layer`.

The formulas are those of the torch engine, with other scales. Every query keeps its tokens relative to the second most
probable one, and the queries are then brought to the scale of the largest ratio of second to first, which spares a
logarithm and a second exponential for each token. Slopes of the loss are a factor times a power, to the same end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from attsvm.dynamics.small_layout import (
    ACTIVE,
    BACK,
    BEST,
    BIAS,
    CHANCES,
    CHOSEN,
    CORRELATION,
    ENTRIES,
    EXCESS,
    EXPONENTIAL,
    FACTOR,
    FACTORS,
    FIXED,
    FULL,
    GAP,
    HEAD,
    HEAD_COLUMNS,
    HIDDEN,
    INNER,
    KEYS,
    KIND,
    LABELS,
    LEAD,
    LEFT,
    LEFT_ROWS,
    LEFT_SLOPE,
    LEFT_TURNED,
    LOG_SHIFT,
    LOG_SLOPE,
    LOGISTIC,
    LOSS,
    MATRIX,
    MATRIX_SLOPE,
    MATRIX_TURNED,
    OUTPUT,
    PEAK,
    PENALTY,
    PER_SEQUENCE,
    POLYAK,
    POWER,
    PULLS,
    QUERIES,
    QUERY_ENTRIES,
    RATIOS,
    RELU,
    RIGHT,
    RIGHT_SLOPE,
    RULE,
    SCALE,
    SCORES,
    SEQUENCES,
    SQUARED,
    TILT,
    TOKENS,
    TRAINED,
    VALUE,
    WEIGHTS,
    WEIGHTS_END,
    WIDE_ENTRIES,
    WIDE_FACTORS,
    WIDE_HEAD,
    WIDE_TOKENS,
    X_TURNED,
    X,
    Z,
)
from attsvm.dynamics.small_products import exponentials, product

__all__ = ["find_slopes", "loss_at"]

ROUNDING = 8.9e-16
"""A score this close to 1 is 1 to the squared loss, as in :mod:`attsvm.dynamics.losses`."""

_ZERO: Any = np.uint64(0)
_ONE: Any = np.uint64(1)

# Sums may be reordered (that is what lets them run on vector units); NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract"}


@njit(cache=True, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _find_keys(w, z):  # type: ignore[no-untyped-def]
    """``KEYS`` = W z."""
    N, d, r, D = z[QUERIES], z[ENTRIES], z[QUERY_ENTRIES], z[WIDE_ENTRIES]
    if z[KIND] == FULL:
        product(w, z[Z], _ZERO, r, _ONE, z[LEFT], z[KEYS], _ONE, N, r, D)
    elif z[KIND] == FACTORS:
        S = z[WIDE_FACTORS]
        product(w, z[Z], _ZERO, r, _ONE, z[RIGHT], z[INNER], _ONE, N, r, S)
        product(w, z[INNER], _ZERO, S, _ONE, z[LEFT], z[KEYS], _ONE, N, z[LEFT_ROWS], D)
    else:
        for i in range(N):
            for k in range(d):
                w[z[KEYS] + i * D + k] = w[z[LEFT] + k] * w[z[RIGHT] + k] * w[z[Z] + i * r + k]


@njit(cache=True, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _compare(w, z):  # type: ignore[no-untyped-def]
    """``WEIGHTS`` become logits less the second largest of the query, -inf at the largest; ``LOG_SHIFT``."""
    T, W = z[TOKENS], z[WIDE_TOKENS]
    shift = -np.inf
    for i in range(z[QUERIES]):
        row, bias = z[WEIGHTS] + i * W, z[BIAS] + i * W
        first, second, a = -np.inf, -np.inf, _ZERO
        for t in range(T):
            value = w[row + t] + w[bias + t]
            w[row + t] = value
            if value > second:
                if value > first:
                    first, second, a = value, first, t
                else:
                    second = value
        z[z[CHOSEN] + i] = a
        gap, base = -np.inf, 0.0
        if second > -np.inf:
            gap, base = second - first, second
            shift = max(shift, gap)
        w[z[GAP] + i] = gap
        for t in range(T):
            w[row + t] -= base
        for t in range(T, W):
            w[row + t] = -np.inf
        w[row + a] = -np.inf
    w[z[LOG_SHIFT]] = shift if shift > -np.inf else 0.0


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _attend(w, z):  # type: ignore[no-untyped-def]
    """``WEIGHTS``: probabilities of all tokens but the most probable one, over ``SCALE``; ``PEAK``: that one's own."""
    N, D, W = z[QUERIES], z[WIDE_ENTRIES], z[WIDE_TOKENS]
    n, Q = z[SEQUENCES], z[PER_SEQUENCE]
    product(w, z[KEYS], Q * D, D, _ONE, z[X_TURNED], z[WEIGHTS], n, Q, z[ENTRIES], W)
    _compare(w, z)
    shift = w[z[LOG_SHIFT]]
    w[z[SCALE]] = math.exp(shift)
    tail, share = z[RATIOS], z[RATIOS] + N
    for i in range(N):
        w[tail + i] = w[z[GAP] + i]
        w[share + i] = w[z[GAP] + i] - shift
    for i in range(share + N, z[WEIGHTS_END]):
        w[i] = -np.inf
    exponentials(w, z[WEIGHTS], z[WEIGHTS_END])
    for i in range(N):
        row, rest = z[WEIGHTS] + i * W, 0.0
        for t in range(row, row + W):
            rest += w[t]
        total = 1.0 + w[tail + i] * rest
        factor = w[share + i] / total
        for t in range(row, row + W):
            w[t] *= factor
        w[z[PEAK] + i] = 1.0 / total


@njit(cache=True, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _pool(w, z):  # type: ignore[no-untyped-def]
    """``OUTPUT``: what attention puts out."""
    N, D, W = z[QUERIES], z[WIDE_ENTRIES], z[WIDE_TOKENS]
    scale = w[z[SCALE]]
    for t in range(N * W):
        w[z[CHANCES] + t] = w[z[WEIGHTS] + t] * scale
    for i in range(N):
        w[z[CHANCES] + i * W + z[z[CHOSEN] + i]] = w[z[PEAK] + i]
    n, Q = z[SEQUENCES], z[PER_SEQUENCE]
    product(w, z[CHANCES], Q * W, W, _ONE, z[X], z[OUTPUT], n, Q, z[TOKENS], D)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _apply_head(w, z):  # type: ignore[no-untyped-def]
    """``SCORES`` of the tokens where attention stands, and ``VALUE``, the signed output; needs ``OUTPUT``."""
    N, n, Q = z[QUERIES], z[SEQUENCES], z[PER_SEQUENCE]
    d, D, W = z[ENTRIES], z[WIDE_ENTRIES], z[WIDE_TOKENS]
    if z[HEAD] == RELU:
        H = z[WIDE_HEAD]
        product(w, z[OUTPUT], _ZERO, D, _ONE, z[MATRIX_TURNED], z[HIDDEN], _ONE, N, d, H)
        for i in range(N):
            total, label, row = 0.0, w[z[LABELS] + i], z[HIDDEN] + i * H
            for j in range(row, row + H):
                total += max(w[j], 0.0)
                w[j] = label if w[j] > 0.0 else 0.0
            w[z[VALUE] + i] = label * total
        product(w, z[HIDDEN], _ZERO, H, _ONE, z[MATRIX], z[TILT], _ONE, N, z[HEAD_COLUMNS], D)
    else:
        # Both others are v^T x - penalty ||x||^2; the trained one has penalty 0.
        penalty = w[z[PENALTY]]
        for i in range(N):
            total, label, row = 0.0, w[z[LABELS] + i], i * D
            for k in range(D):
                x, v = w[z[OUTPUT] + row + k], w[z[MATRIX] + k]
                total += x * (v - penalty * x)
                w[z[TILT] + row + k] = label * (v - 2.0 * penalty * x)
            w[z[VALUE] + i] = label * total
    product(w, z[TILT], Q * D, D, _ONE, z[X_TURNED], z[SCORES], n, Q, d, W)


@njit(cache=True, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def loss_at(u, loss):  # type: ignore[no-untyped-def]
    """The loss of a signed output."""
    if loss == LOGISTIC:
        return math.log1p(math.exp(-abs(u))) + max(-u, 0.0)
    if loss == EXPONENTIAL:
        return math.exp(-u)
    if loss == CORRELATION:
        return -u
    if loss == SQUARED:
        return (1.0 - u) * (1.0 - u)
    if u > 0.0:
        return -math.log(u)
    return np.inf if u == 0.0 else np.nan


@njit(cache=True, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _slope_at(u, loss):  # type: ignore[no-untyped-def]
    """The slope of the loss of a signed output as (a, b), which stand for ``a exp(b)``."""
    if loss == LOGISTIC:
        return -1.0 / (1.0 + math.exp(-abs(u))), -max(u, 0.0)
    if loss == EXPONENTIAL:
        return -1.0, -u
    if loss == CORRELATION:
        return -1.0, 0.0
    if loss == SQUARED:
        return 2.0 * (u - 1.0), 0.0
    return -1.0 / u if u >= 0.0 else np.nan, 0.0


@njit(cache=True, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _gap_over_drop(best, drop, loss):  # type: ignore[no-untyped-def]
    """``(loss(best - drop) - loss(best)) / drop``, also where the drop is tiny or 0."""
    tiny = abs(drop) < 1e-9
    if loss == LOGISTIC:
        chance = math.exp(-max(best, 0.0)) / (1.0 + math.exp(-abs(best)))
        return chance if tiny else math.log1p(math.expm1(drop) * chance) / drop
    if loss == EXPONENTIAL:
        return math.exp(-best) * (1.0 if tiny else math.expm1(drop) / drop)
    if loss == CORRELATION:
        return 1.0
    if loss == SQUARED:
        return 2.0 * (1.0 - best) + drop
    return 1.0 / best if tiny else -math.log1p(-drop / best) / drop


@njit(cache=True, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _excess(w, z, i, own):  # type: ignore[no-untyped-def]
    """How far the loss of a query is above that of its best score, over both scales of the gradient."""
    best, lead, loss = w[z[BEST] + i], w[z[LEAD] + i], z[LOSS]
    shift, slope = w[z[LOG_SHIFT]], w[z[LOG_SLOPE]]
    drop = lead * w[z[SCALE]]
    if best != own:
        total = best - own + drop
        return total * _gap_over_drop(best, total, loss) * math.exp(-shift - slope)
    if loss == SQUARED and abs(1.0 - best) <= ROUNDING:
        return lead * lead * math.exp(shift - slope)
    return lead * _gap_over_drop(best, drop, loss) * math.exp(-slope)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _find_outputs(w, z):  # type: ignore[no-untyped-def]
    """``LEAD``, ``VALUE``, and the slopes of the loss over the exponential of ``LOG_SLOPE``."""
    N, W, loss, linear = z[QUERIES], z[WIDE_TOKENS], z[LOSS], z[HEAD] == FIXED or z[HEAD] == TRAINED
    largest = -np.inf
    for i in range(N):
        row, scores, lead = z[WEIGHTS] + i * W, z[SCORES] + i * W, 0.0
        own = w[scores + z[z[CHOSEN] + i]]
        for t in range(W):
            lead += w[row + t] * (own - w[scores + t])
        w[z[LEAD] + i] = lead
        if linear:
            w[z[VALUE] + i] = own - lead * w[z[SCALE]]
        factor, power = 0.0, 0.0
        if w[z[ACTIVE] + i] != 0.0:
            factor, power = _slope_at(w[z[VALUE] + i], loss)
            if loss == SQUARED and linear and abs(1.0 - own) <= ROUNDING:
                # The drop is all that is left of 1 - u.
                factor, power = -2.0 * lead, w[z[LOG_SHIFT]]
            if factor != 0.0:
                largest = max(largest, power)
        w[z[FACTOR] + i], w[z[POWER] + i] = factor, power
    largest = largest if largest > -np.inf else 0.0
    for i in range(N):
        w[z[FACTOR] + i] *= math.exp(w[z[POWER] + i] - largest)
    w[z[LOG_SLOPE]] = largest


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _find_pulls(w, z):  # type: ignore[no-untyped-def]
    """``WEIGHTS`` become those of the gradient, ``PULLS`` the sums of the tokens with them; the slope of the head."""
    _find_outputs(w, z)
    n, Q, N, D, W = z[SEQUENCES], z[PER_SEQUENCE], z[QUERIES], z[WIDE_ENTRIES], z[WIDE_TOKENS]
    trained, wanted, excess = z[HEAD] == TRAINED, z[RULE] == POLYAK, 0.0
    if trained:
        for k in range(D):
            w[z[MATRIX_SLOPE] + k] = 0.0
    for i in range(N):
        row, scores, a = z[WEIGHTS] + i * W, z[SCORES] + i * W, z[z[CHOSEN] + i]
        own, lead, slope = w[scores + a], w[z[LEAD] + i], w[z[FACTOR] + i] / n
        drop = lead * w[z[SCALE]]
        for t in range(W):
            w[row + t] *= slope * (w[scores + t] - own + drop)
        w[row + a] = slope * w[z[PEAK] + i] * lead
        if trained:
            signed = slope * w[z[LABELS] + i]
            for k in range(D):
                w[z[MATRIX_SLOPE] + k] += signed * w[z[OUTPUT] + i * D + k]
        if wanted and w[z[ACTIVE] + i] != 0.0:
            excess += _excess(w, z, i, own)
    w[z[EXCESS]] = excess / n
    product(w, z[WEIGHTS], Q * W, W, _ONE, z[X], z[PULLS], n, Q, z[TOKENS], D)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def find_slopes(w, z):  # type: ignore[no-untyped-def]
    """Gradients of left and right, over the exponential of ``LOG_SHIFT + LOG_SLOPE``; of a head, over the last."""
    _find_keys(w, z)
    _attend(w, z)
    if z[HEAD] != FIXED:
        _pool(w, z)
        _apply_head(w, z)
    _find_pulls(w, z)
    N, d, r, rows = z[QUERIES], z[ENTRIES], z[QUERY_ENTRIES], z[LEFT_ROWS]
    D, S = z[WIDE_ENTRIES], z[WIDE_FACTORS]
    if z[KIND] == FULL:
        product(w, z[Z], _ZERO, _ONE, r, z[PULLS], z[LEFT_SLOPE], _ONE, r, N, D)
    elif z[KIND] == FACTORS:
        for j in range(rows):
            for k in range(d):
                w[z[LEFT_TURNED] + k * S + j] = w[z[LEFT] + j * D + k]
        product(w, z[INNER], _ZERO, _ONE, S, z[PULLS], z[LEFT_SLOPE], _ONE, rows, N, D)
        product(w, z[PULLS], _ZERO, D, _ONE, z[LEFT_TURNED], z[BACK], _ONE, N, d, S)
        product(w, z[Z], _ZERO, _ONE, r, z[BACK], z[RIGHT_SLOPE], _ONE, r, N, S)
    else:
        for k in range(d):
            total = 0.0
            for i in range(N):
                total += w[z[PULLS] + i * D + k] * w[z[Z] + i * r + k]
            w[z[LEFT_SLOPE] + k] = total * w[z[RIGHT] + k]
            w[z[RIGHT_SLOPE] + k] = total * w[z[LEFT] + k]
