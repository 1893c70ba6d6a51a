r"""Compiled kernels of single-location regression: the population risk, its slopes, and the loops of training.

Positions are coordinates in an orthonormal basis (k*, v*, e3, e4) that contains k and v, and the risk is a function of
the products ``(k.v, v.k*, k.k*, k.v*, v.v*)`` = ``(rho, theta, kappa, eta, nu)``. With $m = \lambda \sqrt{d/2}\,\kappa$
and $g$ the noise of the informative token, everything comes from

$$G(m) = \mathbb E\,\mathrm{erf}(m + \lambda g N) = \mathrm{erf}(m / \sqrt c), \qquad
  \zeta(m) = \mathbb E\,\mathrm{erf}(m + \lambda g N)^2 = 1 - 8\,T\big(\sqrt{2/c}\,m,\; 1/\sqrt{c_4}\big),$$

$c = 1 + 2\lambda^2 g^2$, $c_4 = 1 + 4\lambda^2 g^2$, T the function of Owen, and Stein's lemma.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["owen", "risk", "run_population", "run_samples", "slopes"]

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def owen(h: float, a: float, nodes: Floats, weights: Floats) -> float:
    """Owen's T(h, a) for 0 <= a <= 1 by Gauss-Legendre quadrature on [0, a]; the integrand is entire up to |x| = 1."""
    half = 0.5 * a
    total = 0.0
    for i in range(nodes.shape[0]):
        square = (half * (nodes[i] + 1.0)) ** 2
        total += weights[i] * math.exp(-0.5 * h * h * (1.0 + square)) / (1.0 + square)
    return half * total / (2.0 * math.pi)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _moments(m: float, spread: float, nodes: Floats, weights: Floats) -> tuple[float, ...]:
    """``G, G', G'', G'''`` and ``zeta, zeta', zeta'', zeta'''`` at m, for ``spread`` = lambda g."""
    c, c4 = 1.0 + 2.0 * spread**2, 1.0 + 4.0 * spread**2
    root, root4 = math.sqrt(c), math.sqrt(c4)
    a = m / root
    b = a / root4
    E, E1 = math.erf(a), 2.0 / math.sqrt(math.pi) * math.exp(-a * a)
    F, F1 = math.erf(b), 2.0 / math.sqrt(math.pi) * math.exp(-b * b)
    E2, E3 = -2.0 * a * E1, (4.0 * a * a - 2.0) * E1
    F2 = -2.0 * b * F1
    zeta = 1.0 - 8.0 * owen(math.sqrt(2.0) * a, 1.0 / root4, nodes, weights)
    zeta1 = 2.0 / root * F * E1
    zeta2 = 2.0 / c * (F1 * E1 / root4 + F * E2)
    zeta3 = 2.0 / (c * root) * (F2 * E1 / c4 + 2.0 * F1 * E2 / root4 + F * E3)
    return E, E1 / root, E2 / c, E3 / (c * root), zeta, zeta1, zeta2, zeta3


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _others(sharpness: float, nodes: Floats, weights: Floats) -> tuple[float, float, float]:
    """Of a token without information: the mean of erf x (per unit of rho), and the two parts of its square."""
    c, root4 = 1.0 + 2.0 * sharpness**2, math.sqrt(1.0 + 4.0 * sharpness**2)
    mean = 2.0 * sharpness / math.sqrt(math.pi * c)
    flat = 1.0 - 8.0 * owen(0.0, 1.0 / root4, nodes, weights)
    curved = 8.0 * sharpness**2 / (math.pi * c * root4)
    return mean, flat, curved


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def risk(products: Floats, task: tuple[float, float, float], sharpness: float, nodes: Floats, weights: Floats) -> float:
    """The population risk without label noise; ``task`` = (d, L, gamma)."""
    rho, theta, kappa, eta, nu = products
    d, L, g = task
    size, spread = math.sqrt(0.5 * d), sharpness * g
    G, G1, G2, _, Z, Z1, Z2, _ = _moments(sharpness * size * kappa, spread, nodes, weights)
    mean, flat, curved = _others(sharpness, nodes, weights)
    pull = size * theta
    cross = g**2 * nu * G + spread * g * pull * eta * G1 + spread**2 * g**2 * eta * rho * G2
    square = (pull**2 + g**2) * Z + 2.0 * spread * g * pull * rho * Z1 + spread**2 * g**2 * rho**2 * Z2
    alone = (L - 1.0) * (flat + curved * rho**2) + (L - 1.0) * (L - 2.0) * (mean * rho) ** 2
    mixed = 2.0 * (L - 1.0) * mean * rho * (pull * G + spread * g * rho * G1)
    return float(g**2 - 2.0 * cross + square + alone + mixed)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def slopes(
    products: Floats,
    task: tuple[float, float, float],
    sharpness: float,
    nodes: Floats,
    weights: Floats,
    out: Floats,
) -> None:
    """Derivatives of the risk in the five products, into ``out``."""
    rho, theta, kappa, eta, nu = products
    d, L, g = task
    size, spread = math.sqrt(0.5 * d), sharpness * g
    G, G1, G2, G3, Z, Z1, Z2, Z3 = _moments(sharpness * size * kappa, spread, nodes, weights)
    c, root4 = 1.0 + 2.0 * sharpness**2, math.sqrt(1.0 + 4.0 * sharpness**2)
    mean, curved = 2.0 * sharpness / math.sqrt(math.pi * c), 8.0 * sharpness**2 / (math.pi * c * root4)
    pull, rest = size * theta, L - 1.0
    once, twice = spread * g, spread**2 * g**2
    out[0] = -2.0 * twice * eta * G2 + 2.0 * once * pull * Z1 + 2.0 * twice * rho * Z2
    out[0] += 2.0 * rest * (curved + (L - 2.0) * mean**2) * rho
    out[0] += 2.0 * rest * mean * (pull * G + 2.0 * once * rho * G1)
    out[1] = size * (-2.0 * once * eta * G1 + 2.0 * pull * Z + 2.0 * once * rho * Z1 + 2.0 * rest * mean * rho * G)
    along = -2.0 * (g**2 * nu * G1 + once * pull * eta * G2 + twice * eta * rho * G3)
    along += (pull**2 + g**2) * Z1 + 2.0 * once * pull * rho * Z2 + twice * rho**2 * Z3
    along += 2.0 * rest * mean * rho * (pull * G1 + once * rho * G2)
    out[2] = sharpness * size * along
    out[3] = -2.0 * (once * pull * G1 + twice * rho * G2)
    out[4] = -2.0 * g**2 * G


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _multiply(k: Floats, v: Floats, out: Floats) -> None:
    """The five products of positions."""
    out[0] = k[0] * v[0] + k[1] * v[1] + k[2] * v[2] + k[3] * v[3]
    out[1], out[2], out[3], out[4] = v[0], k[0], k[1], v[1]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _move(point: Floats, slope: Floats, rate: float) -> None:
    """A step against the part of the slope that is tangent to the sphere, and back onto the sphere."""
    along, squares = 0.0, 0.0
    for i in range(4):
        along += slope[i] * point[i]
    for i in range(4):
        point[i] -= rate * (slope[i] - along * point[i])
        squares += point[i] ** 2
    size = math.sqrt(squares)
    for i in range(4):
        point[i] /= size


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def run_population(
    k: Floats,
    v: Floats,
    task: tuple[float, float, float],
    schedule: tuple[float, float, float],
    recorded: Ints,
    nodes: Floats,
    weights: Floats,
    products: Floats,
    risks: Floats,
) -> None:
    """Projected gradient descent on the population risk from positions k, v (4,), which end where the run ends.

    ``schedule`` = (sharpness, decay, rate). At the steps of ``recorded`` the products and the risk are written.
    """
    sharpness, decay, rate = schedule
    now, slope = np.empty(5), np.empty(5)
    towards_k, towards_v = np.empty(4), np.empty(4)
    place, last = 0, recorded[-1]
    for step in range(last + 1):
        current = sharpness / (1.0 + decay * step)
        _multiply(k, v, now)
        if step == recorded[place]:
            products[place] = now
            risks[place] = risk(now, task, current, nodes, weights)
            place += 1
        if step == last:
            break
        slopes(now, task, current, nodes, weights, slope)
        for i in range(4):
            towards_k[i] = slope[0] * v[i]
            towards_v[i] = slope[0] * k[i]
        towards_k[0] += slope[2]
        towards_k[1] += slope[3]
        towards_v[0] += slope[1]
        towards_v[1] += slope[4]
        _move(k, towards_k, rate)
        _move(v, towards_v, rate)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sampled_slopes(
    k: Floats,
    v: Floats,
    task: tuple[float, float, float],
    sharpness: float,
    samples: tuple[int, float],
    generator: Any,
    slope_k: Floats,
    slope_v: Floats,
    room: tuple[Floats, Floats],
) -> tuple[float, float, float]:
    """Gradient of the mean squared error of a fresh batch within the four axes, and its covariance outside of them.

    Outside, tokens are white noise that nothing else depends on: given the rest, the gradients for k and v are
    Gaussian there with the covariance ``(kk, kv, vv)`` in each direction.
    """
    d, _, g = task
    batch, noise = samples
    tokens, gates = room
    size, count = math.sqrt(0.5 * d), tokens.shape[0]
    slope_k[:] = 0.0
    slope_v[:] = 0.0
    kk, kv, vv = 0.0, 0.0, 0.0
    for _ in range(batch):
        output = 0.0
        for t in range(count):
            along_k, along_v = 0.0, 0.0
            for i in range(4):
                value = generator.standard_normal()
                if t == 0:  # the informative token; where it stands makes no difference to a sum over tokens
                    value = g * value + (size if i == 0 else 0.0)
                tokens[t, i] = value
                along_k += value * k[i]
                along_v += value * v[i]
            gates[t, 0] = math.erf(sharpness * along_k)
            gates[t, 1] = 2.0 / math.sqrt(math.pi) * math.exp(-((sharpness * along_k) ** 2)) * sharpness * along_v
            output += gates[t, 0] * along_v
        answer = tokens[0, 1] + noise * generator.standard_normal()
        pull = 2.0 * (output - answer) / batch
        for t in range(count):
            on_k, on_v = pull * gates[t, 1], pull * gates[t, 0]
            for i in range(4):
                slope_k[i] += on_k * tokens[t, i]
                slope_v[i] += on_v * tokens[t, i]
            variance = g * g if t == 0 else 1.0
            kk += variance * on_k * on_k
            kv += variance * on_k * on_v
            vv += variance * on_v * on_v
    return kk, kv, vv


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _move_with_noise(
    k: Floats,
    v: Floats,
    slope_k: Floats,
    slope_v: Floats,
    covariance: tuple[float, float, float],
    rate: float,
    d: float,
    generator: Any,
) -> None:
    """The step of both vectors with gradients that leave the four axes, and new axes that hold them again.

    The two Gaussian vectors of d - 4 dimensions are drawn by their lengths and their angle, which is all that counts.
    """
    kk, kv, vv = covariance
    first = math.sqrt(kk)
    shared = kv / first if first > 0.0 else 0.0
    own = math.sqrt(max(vv - shared * shared, 0.0))
    length = math.sqrt(generator.chisquare(d - 4.0))
    angle, beside = generator.standard_normal(), math.sqrt(generator.chisquare(d - 5.0))
    along_k, along_v = 0.0, 0.0
    for i in range(4):
        along_k += slope_k[i] * k[i]
        along_v += slope_v[i] * v[i]
    new_k, new_v = np.zeros(6), np.zeros(6)
    for i in range(4):
        new_k[i] = k[i] - rate * (slope_k[i] - along_k * k[i])
        new_v[i] = v[i] - rate * (slope_v[i] - along_v * v[i])
    new_k[4] = -rate * first * length
    new_v[4] = -rate * (shared * length + own * angle)
    new_v[5] = -rate * own * beside
    new_k /= math.sqrt(np.sum(new_k * new_k))
    new_v /= math.sqrt(np.sum(new_v * new_v))
    rest = math.sqrt(np.sum(new_k[2:] * new_k[2:]))
    axis = new_k[2:] / rest
    common = np.sum(new_v[2:] * axis)
    outside = new_v[2:] - common * axis
    k[:2], v[:2] = new_k[:2], new_v[:2]
    k[2], k[3] = rest, 0.0
    v[2], v[3] = common, math.sqrt(np.sum(outside * outside))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def run_samples(
    k: Floats,
    v: Floats,
    task: tuple[float, float, float],
    schedule: tuple[float, float, float],
    samples: tuple[int, float],
    generator: Any,
    recorded: Ints,
    nodes: Floats,
    weights: Floats,
    products: Floats,
    risks: Floats,
) -> None:
    """As :func:`run_population`, by stochastic gradients; ``samples`` = (batch, noise of the answer)."""
    sharpness, decay, rate = schedule
    now, slope_k, slope_v = np.empty(5), np.empty(4), np.empty(4)
    room = (np.empty((int(task[1]), 4)), np.empty((int(task[1]), 2)))
    place, last = 0, recorded[-1]
    for step in range(last + 1):
        current = sharpness / (1.0 + decay * step)
        if step == recorded[place]:
            _multiply(k, v, now)
            products[place] = now
            risks[place] = risk(now, task, current, nodes, weights)
            place += 1
        if step == last:
            break
        covariance = _sampled_slopes(k, v, task, current, samples, generator, slope_k, slope_v, room)
        _move_with_noise(k, v, slope_k, slope_v, covariance, rate, task[0], generator)
