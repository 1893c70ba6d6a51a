"""Measures of rows of logits in compiled code: each row is read into the cache once and measured there."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

__all__ = ["measure_rows"]

# Sums may be taken in any order, which lets them use the vector units; infinities keep their meaning.
_FAST = {"reassoc", "nsz", "contract", "nnan"}

# Keeps weights that are half of the largest but for rounding in the selected set.
_SLACK = 1 - 1e-6


@njit(cache=True, nogil=True, fastmath=_FAST)
def _largest(s, start, stop):  # type: ignore[no-untyped-def]
    top = s.dtype.type(-np.inf)
    for j in range(start, stop):
        top = max(top, s[j])
    return top


@njit(cache=True, nogil=True, fastmath=_FAST)
def _allowed(s):  # type: ignore[no-untyped-def]
    n = 0
    for j in range(s.size):
        n += s[j] > -np.inf
    return n


@njit(cache=True, nogil=True, fastmath=_FAST)
def _above(p, threshold):  # type: ignore[no-untyped-def]
    """How many weights reach a threshold, and their sum."""
    n, mass = 0, 0.0
    for j in range(p.size):
        reaches = p[j] >= threshold
        n += reaches
        mass += p[j] if reaches else 0.0
    return n, mass


@njit(cache=True, nogil=True, fastmath=_FAST)
def _spread(s, p, top):  # type: ignore[no-untyped-def]
    """Mean distance from the largest logit under the weights; those that may not be attended weigh nothing."""
    total = 0.0
    for j in range(s.size):
        total += p[j] * (top - s[j]) if p[j] > 0 else 0.0
    return total


@njit(cache=True, nogil=True, fastmath=_FAST)
def _moment(p, places, place):  # type: ignore[no-untyped-def]
    """Sum of weight times distance of the keys with a place, and sum of their weights."""
    moment, total = 0.0, 0.0
    for j in range(places.size):
        moment += p[j] * np.float32(abs(places[j] - place))
        total += p[j]
    return moment, total


@njit(cache=True, nogil=True)
def _needed(p, top, target):  # type: ignore[no-untyped-def]
    """How many of the largest weights it takes to reach the target, the last one in part, by bisection of a threshold.

    Between the thresholds there is in the end one weight, or several equal ones.
    """
    high, n_high, mass_high = 2 * top, 0, 0.0
    low, n_low, mass_low = 0.0, p.size, 1.0
    while n_low - n_high > 1 or low == 0:
        middle = p.dtype.type(0.5 * (low + high) if low > 0 else 0.125 * high)
        if middle <= low or middle >= high:
            break
        n, mass = _above(p, middle)
        if mass >= target:
            low, n_low, mass_low = middle, n, mass
        else:
            high, n_high, mass_high = middle, n, mass
    return n_high + (n_low - n_high) * (target - mass_high) / (mass_low - mass_high)


@njit(cache=True, nogil=True)
def measure_rows(logits, weights, query_places, key_places, values, n_keys, selected):  # type: ignore[no-untyped-def]
    """Fill values (9, B, H, R), n_keys and selected (B, H, R) from logits (B, H, R, T) without NaN, and their softmax.

    Places are (B, R) and (B, Tk) with Tk = T, or T - 1 where the last column is the sink; Tk = 0 leaves the distance
    undefined.
    """
    T = logits.shape[3]
    for b in range(logits.shape[0]):
        for h in range(logits.shape[1]):
            for i in range(logits.shape[2]):
                s, p = logits[b, h, i], weights[b, h, i]
                top, n = _largest(s, 0, T), _allowed(s)
                n_keys[b, h, i], selected[b, h, i] = n, -1
                if n == 0:
                    values[:, b, h, i] = np.nan
                    continue
                best = 0
                while s[best] < top:
                    best += 1
                selected[b, h, i] = best
                values[0, b, h, i] = p[best]
                values[1, b, h, i] = max(_spread(s, p, top) - math.log(p[best]), 0.0)
                values[2, b, h, i] = 1.0 if p[best] >= 0.9 else max(_needed(p, p[best], 0.9), 1.0)
                values[3, b, h, i] = _above(p, p.dtype.type(0.5 * _SLACK) * p[best])[0]
                values[6, b, h, i] = max(1.0 - p[best], 0.0)
                if n > 1:
                    margin = top - max(_largest(s, 0, best), _largest(s, best + 1, T))
                    rest = (n - 1) * math.exp(-margin)
                    values[4, b, h, i], values[5, b, h, i] = margin, rest / (1 + rest)
                    values[7, b, h, i] = 1.0 if margin < 1e-3 else 0.0
                else:
                    values[4, b, h, i] = values[5, b, h, i] = values[7, b, h, i] = np.nan
                moment, total = _moment(p, key_places[b], query_places[b, i])
                values[8, b, h, i] = moment / total if total > 0 else np.nan
