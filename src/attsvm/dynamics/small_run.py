"""The compiled loop over the members of a batch and their steps; see :mod:`attsvm.dynamics.compiled`.

A member is read into a workspace that stays in the cache, takes all its steps there, and is written back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from attsvm.dynamics.small_attention import find_slopes, loss_at
from attsvm.dynamics.small_layout import (
    ACTIVE,
    BEST,
    BIAS,
    CHOSEN,
    DIAGONAL,
    ENTRIES,
    FULL,
    HEAD,
    HEAD_COLUMNS,
    KIND,
    LABELS,
    LEFT,
    LEFT_MEAN,
    LEFT_SCALE,
    LEFT_SQUARE,
    LOG_SHIFT,
    LOG_SLOPE,
    LOSS,
    MATRIX,
    MATRIX_TURNED,
    PEAK,
    PENALTY,
    POLYAK,
    QUERIES,
    QUERY_ENTRIES,
    RULE,
    SCORES,
    SEQUENCES,
    TOKENS,
    TRAINED,
    VALUE,
    WIDE_ENTRIES,
    WIDE_FACTORS,
    WIDE_HEAD,
    WIDE_TOKENS,
    X_TURNED,
    Floats,
    X,
    Z,
)
from attsvm.dynamics.small_steps import polyak_rate, step

__all__ = ["Batch", "Results", "State", "run"]


class Batch(NamedTuple):
    """The data of the members; all contiguous."""

    tokens: Floats  # (B, n, T, d)
    queries: Floats  # (B, n Q, r)
    bias: Floats  # (B, n Q, T): offsets, -inf where not allowed
    scores: Floats  # (B, n Q, T)
    labels: Floats  # (B, n Q)
    head: Floats  # (B, h, d)
    penalty: Floats  # (B,)
    rates: Floats  # (B,)


class State(NamedTuple):
    """What changes: three tensors (left, right, head), and for each the state of the optimiser."""

    values: tuple[Floats, ...]  # (B, rows, d) left, transposed; (B, ., .) right; (B, h, d) head
    means: tuple[Floats, ...]
    squares: tuple[Floats, ...]
    scales: Floats  # (B, 3)
    counts: Floats  # (B,)


class Results(NamedTuple):
    """What is known where the steps end."""

    loss: Floats  # (B,)
    mass: Floats  # (B,) mean probability of the most probable tokens
    log_scale: Floats  # (B,) of the gradient in the key-query matrix
    selected: NDArray[np.int64]  # (B, n Q)
    moved: NDArray[np.bool_]  # (B,) whether the last step changed anything


@njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _read(data, b, w, z):  # type: ignore[no-untyped-def]
    """A member's data into the workspace; what its rows are padded with is 0 there and stays so."""
    n, N, T, d, r, h = z[SEQUENCES], z[QUERIES], z[TOKENS], z[ENTRIES], z[QUERY_ENTRIES], z[HEAD_COLUMNS]
    D, W, H = z[WIDE_ENTRIES], z[WIDE_TOKENS], z[WIDE_HEAD]
    for i in range(n):
        for t in range(T):
            for k in range(d):
                value = data.tokens[b, i, t, k]
                w[z[X] + (i * T + t) * D + k] = value
                w[z[X_TURNED] + (i * d + k) * W + t] = value
    w[z[PENALTY]] = data.penalty[b]
    for i in range(N):
        for k in range(r):
            w[z[Z] + i * r + k] = data.queries[b, i, k]
        active, best = 0.0, -np.inf
        for t in range(T):
            bias, score = data.bias[b, i, t], 0.0
            if bias > -np.inf:
                active, score = 1.0, data.scores[b, i, t]
                best = max(best, score)
            w[z[BIAS] + i * W + t] = bias
            w[z[SCORES] + i * W + t] = score
        w[z[LABELS] + i], w[z[ACTIVE] + i], w[z[BEST] + i] = data.labels[b, i], active, best
    for j in range(h):
        for k in range(d):
            w[z[MATRIX] + j * D + k] = data.head[b, j, k]
            w[z[MATRIX_TURNED] + k * H + j] = data.head[b, j, k]


@njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _spread(value, w, x, width):  # type: ignore[no-untyped-def]
    """(p, q) to a place, in rows of a padded width."""
    for i in range(np.uint64(value.shape[0])):
        for j in range(np.uint64(value.shape[1])):
            w[x + i * width + j] = value[i, j]


@njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _collect(value, w, x, width):  # type: ignore[no-untyped-def]
    """The way back; whether that changes the value."""
    changed = False
    for i in range(np.uint64(value.shape[0])):
        for j in range(np.uint64(value.shape[1])):
            changed |= value[i, j] != w[x + i * width + j]
            value[i, j] = w[x + i * width + j]
    return changed


@njit(cache=True, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _advance(w, z, rate, hyper, count):  # type: ignore[no-untyped-def]
    """One step."""
    find_slopes(w, z)
    slope = w[z[LOG_SLOPE]]
    log = w[z[LOG_SHIFT]] + slope
    if z[RULE] == POLYAK:
        rate = polyak_rate(w, z)
    step(w, z, np.uint64(0), log, rate, hyper, count)
    if z[KIND] != FULL:
        step(w, z, np.uint64(1), log, rate, hyper, count)
    if z[HEAD] == TRAINED:
        step(w, z, np.uint64(2), slope, rate, hyper, count)


@njit(cache=True, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _measure(w, z, results, b):  # type: ignore[no-untyped-def]
    """Loss and attention of a member as it stands."""
    find_slopes(w, z)
    loss, mass, active = 0.0, 0.0, 0.0
    for i in range(z[QUERIES]):
        results.selected[b, i] = z[z[CHOSEN] + i]
        if w[z[ACTIVE] + i] != 0.0:
            loss += loss_at(w[z[VALUE] + i], z[LOSS])
            mass += w[z[PEAK] + i]
            active += 1.0
    results.loss[b] = loss / z[SEQUENCES]
    results.mass[b] = mass / max(active, 1.0)
    results.log_scale[b] = w[z[LOG_SHIFT]] + w[z[LOG_SLOPE]]


@njit(cache=True, nogil=True, error_model="numpy")
def run(data, state, results, hyper, steps, w, z):  # type: ignore[no-untyped-def]
    """Advance all members by ``steps`` steps, in place, and say where they are then; ``w`` and ``z`` are their room."""
    widths = (z[WIDE_ENTRIES], z[WIDE_ENTRIES] if z[KIND] == DIAGONAL else z[WIDE_FACTORS], z[WIDE_ENTRIES])
    tensors = 3 if z[HEAD] == TRAINED else 2
    for b in range(data.tokens.shape[0]):
        _read(data, b, w, z)
        for k in range(tensors):
            _spread(state.values[k][b], w, z[LEFT + k], widths[k])
            _spread(state.means[k][b], w, z[LEFT_MEAN + k], widths[k])
            _spread(state.squares[k][b], w, z[LEFT_SQUARE + k], widths[k])
            w[z[LEFT_SCALE + k]] = state.scales[b, k]
        for turn in range(steps):
            if turn == steps - 1:
                for k in range(tensors):
                    _collect(state.values[k][b], w, z[LEFT + k], widths[k])
            _advance(w, z, data.rates[b], hyper, state.counts[b] + turn + 1.0)
        _measure(w, z, results, b)
        # Until here, the values were those before the last step.
        for k in range(tensors):
            results.moved[b] |= _collect(state.values[k][b], w, z[LEFT + k], widths[k])
            _collect(state.means[k][b], w, z[LEFT_MEAN + k], widths[k])
            _collect(state.squares[k][b], w, z[LEFT_SQUARE + k], widths[k])
            state.scales[b, k] = w[z[LEFT_SCALE + k]]
        state.counts[b] += steps
