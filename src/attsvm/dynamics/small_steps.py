"""Compiled steps of the optimisers of :mod:`attsvm.dynamics.optimizers`, in place.

A gradient is ``exp(log)`` times what is kept of it. States are those of the torch engine: the mean of the gradients
(and of their squares) over its largest entry, whose logarithm is kept beside it.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from attsvm.dynamics.small_layout import (
    ADAM,
    EXCESS,
    FULL,
    KIND,
    LEFT,
    LEFT_MEAN,
    LEFT_SCALE,
    LEFT_SIZE,
    LEFT_SLOPE,
    LEFT_SQUARE,
    MOMENTUM,
    NORMALISED,
    PLAIN,
    POLYAK,
    RIGHT_SIZE,
    RIGHT_SLOPE,
    RULE,
    SIGN,
)

__all__ = ["polyak_rate", "step"]

# Sums may be reordered (that is what lets them run on vector units); NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract"}


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _largest(w, x, size):  # type: ignore[no-untyped-def]
    """The largest entry in size; 1 where all are 0."""
    top = 0.0
    for k in range(x, x + size):
        top = max(top, abs(w[k]))
    return top if top > 0.0 else 1.0


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _square(w, x, size):  # type: ignore[no-untyped-def]
    """Sum of squares."""
    total = 0.0
    for k in range(x, x + size):
        total += w[k] * w[k]
    return total


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _divide(w, x, size, number):  # type: ignore[no-untyped-def]
    """Divide by a number."""
    for k in range(x, x + size):
        w[k] /= number


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _move(w, x, size, rate, g):  # type: ignore[no-untyped-def]
    """By ``-rate`` along g."""
    for k in range(size):
        w[x + k] -= rate * w[g + k]


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _normalised(w, x, size, g, rate):  # type: ignore[no-untyped-def]
    """Along the gradient over its norm."""
    square = _square(w, g, size)
    if not 1e-200 < square < 1e200:
        # The squares leave the range of float64, or all are 0.
        _divide(w, g, size, _largest(w, g, size))
        square = _square(w, g, size)
        if square == 0.0:
            return
    _move(w, x, size, rate / math.sqrt(square), g)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _momentum(w, x, size, g, mean, scale, log, rate, hyper):  # type: ignore[no-untyped-def]
    """Along the sum of the gradients, each of which fades by a factor a step."""
    together = max(log, w[scale])
    old, new = hyper[0] * math.exp(w[scale] - together), math.exp(log - together)
    for k in range(size):
        w[mean + k] = old * w[mean + k] + new * w[g + k]
    top = _largest(w, mean, size)
    _divide(w, mean, size, top)
    w[scale] = together + math.log(top)
    _move(w, x, size, rate * math.exp(w[scale]), mean)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _adam(w, x, size, g, mean, square, scale, log, rate, hyper, count):  # type: ignore[no-untyped-def]
    """As ``torch.optim.Adam``."""
    beta1, beta2, epsilon = hyper[0], hyper[1], hyper[2]
    together = max(log, w[scale])
    old, new = math.exp(w[scale] - together), math.exp(log - together)
    old1, old2 = beta1 * old, beta2 * old * old
    for k in range(size):
        slope = new * w[g + k]
        w[mean + k] = old1 * w[mean + k] + (1.0 - beta1) * slope
        w[square + k] = old2 * w[square + k] + (1.0 - beta2) * slope * slope
    top = _largest(w, square, size)
    root = math.sqrt(top)
    _divide(w, mean, size, root)
    _divide(w, square, size, top)
    w[scale] = together + math.log(root)
    floor = epsilon * math.exp(-w[scale]) if epsilon > 0.0 else 0.0
    rate1, correct2 = rate / (1.0 - beta1**count), 1.0 - beta2**count
    for k in range(size):
        below = math.sqrt(w[square + k] / correct2) + floor
        w[x + k] -= rate1 * w[mean + k] / (below if below > 0.0 else np.inf)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _mirror(w, x, size, g, log, rate, hyper):  # type: ignore[no-untyped-def]
    """Mirror descent with the potential ``||W||_p^p / p``."""
    p, normalised = hyper[0], hyper[1] != 0.0
    power, factor = p - 1.0, rate * math.exp(log)
    if normalised:
        total = 0.0
        _divide(w, g, size, _largest(w, g, size))
        for k in range(g, g + size):
            if w[k] != 0.0:
                total += abs(w[k]) ** (p / power)
        factor = rate / total ** (power / p) if total != 0.0 else 0.0
    for k in range(size):
        a, b = w[x + k], w[g + k]
        # What is 0 and stays so, such as the entries that rows are padded with, needs no powers.
        if a != 0.0 or b != 0.0:
            u = (a if a == 0.0 else abs(a) ** power * (a / abs(a))) - factor * b
            w[x + k] = u if u == 0.0 else abs(u) ** (1.0 / power) * (u / abs(u))


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def step(w, z, which, log, rate, hyper, count):  # type: ignore[no-untyped-def]
    """Move tensor ``which`` (0 to 2, unsigned), whose gradient is used up; ``count`` is the number of this step."""
    x, size, g, rule = z[LEFT + which], z[LEFT_SIZE + which], z[LEFT_SLOPE + which], z[RULE]
    mean, square, scale = z[LEFT_MEAN + which], z[LEFT_SQUARE + which], z[LEFT_SCALE + which]
    if rule == NORMALISED:
        _normalised(w, x, size, g, rate)
    elif rule == PLAIN:
        _move(w, x, size, rate * math.exp(log), g)
    elif rule == POLYAK:
        _move(w, x, size, rate, g)
    elif rule == MOMENTUM:
        _momentum(w, x, size, g, mean, scale, log, rate, hyper)
    elif rule == ADAM:
        _adam(w, x, size, g, mean, square, scale, log, rate, hyper, count)
    elif rule == SIGN:
        for k in range(size):
            slope = w[g + k]
            w[x + k] -= rate if slope > 0.0 else -rate if slope < 0.0 else 0.0 * slope
    else:
        _mirror(w, x, size, g, log, rate, hyper)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def polyak_rate(w, z):  # type: ignore[no-untyped-def]
    """The rate of Polyak's step, with all gradients as one vector; they are divided by its largest entry."""
    left, right = z[LEFT_SLOPE], z[RIGHT_SLOPE]
    left_size, right_size = z[LEFT_SIZE], z[RIGHT_SIZE] if z[KIND] != FULL else np.uint64(0)
    top = 0.0
    for k in range(left, left + left_size):
        top = max(top, abs(w[k]))
    for k in range(right, right + right_size):
        top = max(top, abs(w[k]))
    if top == 0.0:
        return 0.0
    _divide(w, left, left_size, top)
    _divide(w, right, right_size, top)
    return w[z[EXCESS]] / top / (2.0 * (_square(w, left, left_size) + _square(w, right, right_size)))
