r"""Single-location regression: one token of many holds the answer, and attention has to find out which.

A sequence has L tokens in R^d. Token J, at a random place, is $\sqrt{d/2}\,k^* + \gamma N$, the others are standard
normal, and the answer is $y = x_J^\top v^* + \text{noise}$, for orthogonal unit vectors k*, v*. The predictor is
attention with erf in place of the softmax,

$$T(X) = \sum_l \mathrm{erf}(\lambda\, x_l^\top k)\; x_l^\top v, \qquad \|k\| = \|v\| = 1 .$$

Its risk depends on k and v by five inner products alone, and so does training: a run in any dimension d costs what a
run in four dimensions costs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attsvm.errors import InvalidInputError

__all__ = [
    "PRODUCTS",
    "SingleLocation",
    "SingleLocationPath",
    "descend_on_spheres",
    "population_risk",
    "population_slopes",
    "start_on_manifold",
    "start_on_spheres",
]

PRODUCTS = ("rho", "theta", "kappa", "eta", "nu")
"""The order of the inner products: k.v, v.k*, k.k*, k.v*, v.v*."""

_NODES = 40
"""Points of the quadrature for zeta; its integrand is so smooth that 40 points leave nothing but rounding."""


@dataclass(frozen=True, kw_only=True)
class SingleLocation:
    """The task.

    Attributes
    ----------
    d
        Dimension of the tokens, >= 2; training on samples needs >= 6.
    L
        Tokens of a sequence, >= 1.
    gamma
        Standard deviation of the noise of the informative token, >= 0.
    noise
        Standard deviation of the noise of the answer, >= 0; it adds its square to no risk of this module.
    """

    d: int
    L: int = 10
    gamma: float = math.sqrt(0.5)
    noise: float = 0.0

    def __post_init__(self) -> None:
        where = "SingleLocation"
        if not self.d >= 2:
            raise InvalidInputError(f"{where}: d must be >= 2, which k* and v* need, got {self.d!r}.")
        if not self.L >= 1:
            raise InvalidInputError(f"{where}: L must be >= 1, got {self.L!r}.")
        for name in ("gamma", "noise"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InvalidInputError(f"{where}: {name} must be >= 0 and finite, got {getattr(self, name)!r}.")

    @property
    def null_risk(self) -> float:
        """Excess risk of the predictor 0."""
        return self.gamma**2

    @property
    def linear_risk(self) -> float:
        """Excess risk of the best predictor that is linear in the tokens: it weighs all of them alike."""
        square = self.gamma**2
        return square * (self.L - 1) / (square + self.L - 1) if square else 0.0

    @property
    def _numbers(self) -> tuple[float, float, float]:
        return float(self.d), float(self.L), float(self.gamma)


@dataclass(frozen=True, kw_only=True, eq=False)
class SingleLocationPath:
    """Where training went; B runs, R records.

    Attributes
    ----------
    steps
        (R,) the recorded steps.
    sharpness
        (R,) lambda at those steps.
    products
        (B, R, 5) the inner products in the order of ``PRODUCTS``.
    risk
        (B, R) excess risk.
    """

    steps: NDArray[np.int64]
    sharpness: NDArray[np.float64]
    products: NDArray[np.float64]
    risk: NDArray[np.float64]

    @property
    def kappa(self) -> NDArray[np.float64]:
        """(B, R) k.k*, the alignment of the key direction."""
        return self.products[..., 2]

    @property
    def nu(self) -> NDArray[np.float64]:
        """(B, R) v.v*, the alignment of the value direction."""
        return self.products[..., 4]

    @property
    def distance(self) -> NDArray[np.float64]:
        """(B, R) distance to the invariant manifold where k.v, v.k* and k.v* are 0."""
        found: NDArray[np.float64] = np.linalg.norm(self.products[..., (0, 1, 3)], axis=-1)
        return found


@functools.cache
def _rule() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return nodes, weights


def population_risk(task: SingleLocation, products: Any, sharpness: float) -> NDArray[np.float64]:
    r"""Excess risk $\mathbb E (y - T(X))^2 - \text{noise}^2$ in closed form.

    Parameters
    ----------
    task
        The task.
    products
        (..., 5) inner products of unit vectors k and v with each other, k* and v*, in the order of ``PRODUCTS``.
    sharpness
        lambda, > 0.

    Returns
    -------
    array
        (...). It has no error beyond rounding: the one integral, a function of Owen, is a fixed quadrature.

    References
    ----------
    Marion, Berthier, Biau, Boyer. "Attention layers provably solve single-location regression", 2024.
    arXiv:2410.01537.

    Examples
    --------
    >>> task = SingleLocation(d=400)
    >>> [round(float(population_risk(task, [0, 0, a, 0, a], 0.1)), 4) for a in (0.0, 1.0)]
    [0.6155, 0.1135]
    """
    from attsvm.dynamics.single_location_kernels import risk

    values = _products(products, sharpness, "population_risk")
    flat = [risk(row, task._numbers, float(sharpness), *_rule()) for row in values.reshape(-1, 5)]
    return np.array(flat, dtype=np.float64).reshape(values.shape[:-1])


def population_slopes(task: SingleLocation, products: Any, sharpness: float) -> NDArray[np.float64]:
    """Derivatives (..., 5) of the excess risk in the five products; arguments as for :func:`population_risk`."""
    from attsvm.dynamics.single_location_kernels import slopes

    values = _products(products, sharpness, "population_slopes")
    out = np.empty_like(values)
    for row, into in zip(values.reshape(-1, 5), out.reshape(-1, 5), strict=True):
        slopes(row, task._numbers, float(sharpness), *_rule(), into)
    return out


def start_on_spheres(task: SingleLocation, generator: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Uniform unit vectors k, v (d,), in a basis whose first two axes are k* and v*."""
    k, v = generator.standard_normal(task.d), generator.standard_normal(task.d)
    return k / np.linalg.norm(k), v / np.linalg.norm(v)


def start_on_manifold(task: SingleLocation, generator: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Unit vectors (d,) with k.v*, v.k* and k.v equal to 0, uniform in what that leaves; d must be >= 3."""
    if task.d < 3:
        raise InvalidInputError(f"start_on_manifold: d must be >= 3, got {task.d}.")
    k, v = generator.standard_normal(task.d), generator.standard_normal(task.d)
    k[1] = v[0] = 0.0
    k /= np.linalg.norm(k)
    # Within the complement of k*, v is made orthogonal to the part of k that lies there.
    part = k.copy()
    part[0] = 0.0
    v -= (v @ part) / (part @ part) * part
    return k, v / np.linalg.norm(v)


def descend_on_spheres(
    task: SingleLocation,
    k: Any,
    v: Any,
    *,
    sharpness: float,
    decay: float = 0.0,
    learning_rate: float,
    steps: int,
    batch: int | None = None,
    seeds: Sequence[int] | None = None,
    record_steps: Sequence[int] | None = None,
) -> SingleLocationPath:
    r"""Train k and v by projected gradient descent on their spheres, many runs in one call.

    A step is $k \leftarrow \mathrm{normalise}(k - \alpha (I - k k^\top) \nabla_k R)$, and the same for v.

    Parameters
    ----------
    task
        The task.
    k, v
        (d,) or (B, d) starts in a basis whose first two axes are k* and v*. They are normalised.
    sharpness, decay
        lambda at step t is ``sharpness / (1 + decay * t)``.
    learning_rate
        alpha > 0.
    steps
        >= 0.
    batch
        None: gradients of the population risk. Otherwise of the mean squared error of so many fresh sequences a step.
    seeds
        One for each run, for the sequences; only with ``batch``. Default: 0, 1, 2, ...
    record_steps
        Increasing steps to record; default about 50 at growing distances. The last step is always recorded.

    Returns
    -------
    SingleLocationPath
        A run gives the same numbers whatever runs beside it.

    Raises
    ------
    InvalidInputError
        If an argument is not what it must be.

    Notes
    -----
    The gradients lie in the span of k, v, k* and v*, so that four coordinates of each vector are kept, whatever d is.
    The gradients of samples also have a Gaussian part outside of that span; only its lengths and angle matter, and they
    are drawn from their exact law.

    Examples
    --------
    >>> task = SingleLocation(d=400)
    >>> k, v = start_on_manifold(task, np.random.default_rng(0))
    >>> path = descend_on_spheres(task, k, v, sharpness=0.1, learning_rate=4e-3, steps=20_000)
    >>> float(abs(path.kappa[0, -1]).round(2)), float(abs(path.nu[0, -1]).round(2))
    (0.98, 1.0)
    """
    from attsvm.dynamics.single_location_kernels import run_population, run_samples

    where = "descend_on_spheres"
    keys, values = _starts(task, k, v, where)
    _check(task, sharpness, decay, learning_rate, steps, batch, where)
    recorded = _recorded(steps, record_steps, where)
    count = len(keys)
    seeds = range(count) if seeds is None else seeds
    if len(seeds) != count:
        raise InvalidInputError(f"{where}: seeds must hold one seed for each of the {count} runs, got {len(seeds)}.")
    products, risks = np.empty((count, len(recorded), 5)), np.empty((count, len(recorded)))
    schedule = (float(sharpness), float(decay), float(learning_rate))
    for run in range(count):
        start = (keys[run].copy(), values[run].copy(), task._numbers, schedule)
        outputs = (recorded, *_rule(), products[run], risks[run])
        if batch is None:
            run_population(*start, *outputs)
        else:
            generator = np.random.default_rng(seeds[run])
            run_samples(*start, (int(batch), float(task.noise)), generator, *outputs)
    sharp: NDArray[np.float64] = np.asarray(sharpness / (1.0 + decay * recorded), dtype=np.float64)
    return SingleLocationPath(steps=recorded, sharpness=sharp, products=products, risk=risks)


def _products(products: Any, sharpness: float, where: str) -> NDArray[np.float64]:
    values = np.ascontiguousarray(products, dtype=np.float64)
    if values.ndim < 1 or values.shape[-1] != 5:
        raise InvalidInputError(f"{where}: products must have shape (..., 5), got {values.shape}.")
    if not 0.0 < sharpness < math.inf:
        raise InvalidInputError(f"{where}: sharpness must be > 0 and finite, got {sharpness!r}.")
    return values


def _starts(task: SingleLocation, k: Any, v: Any, where: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions (B, 4) of unit vectors in the basis (k*, v*, e3, e4)."""
    keys, values = (np.atleast_2d(np.array(value, dtype=np.float64)) for value in (k, v))
    for name, value in (("k", keys), ("v", values)):
        if value.ndim != 2 or value.shape != keys.shape or value.shape[1] != task.d:
            raise InvalidInputError(f"{where}: {name} must have shape (d,) or (B, d) with d={task.d}.")
        sizes = np.linalg.norm(value, axis=1, keepdims=True)
        if not (np.isfinite(value).all() and (sizes > 0).all()):
            raise InvalidInputError(f"{where}: {name} must be finite and not 0.")
        value /= sizes
    out_k, out_v = np.zeros((len(keys), 4)), np.zeros((len(keys), 4))
    out_k[:, :2], out_v[:, :2] = keys[:, :2], values[:, :2]
    rest = np.linalg.norm(keys[:, 2:], axis=1)
    axis = keys[:, 2:] / np.where(rest > 0, rest, 1.0)[:, None]
    common = (values[:, 2:] * axis).sum(1)
    out_k[:, 2], out_v[:, 2] = rest, common
    out_v[:, 3] = np.linalg.norm(values[:, 2:] - common[:, None] * axis, axis=1)
    return out_k, out_v


def _check(
    task: SingleLocation,
    sharpness: float,
    decay: float,
    learning_rate: float,
    steps: int,
    batch: int | None,
    where: str,
) -> None:
    for name, value in (("sharpness", sharpness), ("learning_rate", learning_rate)):
        if not 0.0 < value < math.inf:
            raise InvalidInputError(f"{where}: {name} must be > 0 and finite, got {value!r}.")
    if not 0.0 <= decay < math.inf:
        raise InvalidInputError(f"{where}: decay must be >= 0 and finite, got {decay!r}.")
    if not (isinstance(steps, int) and steps >= 0):
        raise InvalidInputError(f"{where}: steps must be an integer >= 0, got {steps!r}.")
    if batch is not None and not (isinstance(batch, int) and batch >= 1):
        raise InvalidInputError(f"{where}: batch must be an integer >= 1 or None, got {batch!r}.")
    if batch is not None and task.d < 6:
        raise InvalidInputError(f"{where}: training on samples needs d >= 6, got {task.d}.")


def _recorded(steps: int, wanted: Sequence[int] | None, where: str) -> NDArray[np.int64]:
    if wanted is None:
        grown = np.unique(np.round(np.geomspace(1, max(steps, 1), 50)).astype(np.int64))
        wanted = [0, *grown.tolist()]
    chosen = sorted({*(int(step) for step in wanted if step <= steps), steps})
    if chosen[0] < 0:
        raise InvalidInputError(f"{where}: record_steps must be >= 0, got {chosen[0]}.")
    return np.array(chosen, dtype=np.int64)
