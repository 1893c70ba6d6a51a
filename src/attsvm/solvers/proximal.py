r"""The proximal maps of the norms, ``argmin_W tau ||W|| + ||W - M||_F^2 / 2``, and of half their squares.

The norms are functions of magnitudes v >= 0, of the entries or of the singular values, which a map makes smaller and
never reorders:

* l_1, nuclear: v is moved towards 0 by a threshold s, which is tau, or ``tau ||W||`` for half the square;
* l_inf, operator: v is cut off at a level, such that the parts above it sum to tau, or to ``tau ||W||``: what is left
  of M after the projection on a ball of the dual norm (Moreau);
* l_p: ``w + s (w / N)^(p - 1) = v`` with ``N = ||w||_p``, and s as above.

The first two are exact after one sort. For l_p, with u = w / N each entry solves ``N u + s u^(p - 1) = v``, a convex
equation in u (or in u^(p - 1), for p < 2) where Newton's method falls monotonically from an upper bound at most a
factor of two off, and N is the root of ``||u||_p = 1``.

References
----------
Parikh, Boyd. "Proximal algorithms", 2014.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attsvm.selection.norms import Norm

__all__ = ["is_spectral", "magnitude_power", "proximal", "response", "shrunken"]


def is_spectral(norm: Norm) -> bool:
    """Whether the norm is one of the singular values rather than of the entries."""
    return norm in ("nuc", "op")


def magnitude_power(norm: Norm) -> float:
    """The p of the l_p norm that ``norm`` takes of its magnitudes."""
    return {"fro": 2.0, "nuc": 1.0, "op": math.inf}[norm] if isinstance(norm, str) else float(norm)


def proximal(M: Tensor, norm: Norm, tau: float, *, squared: bool = False) -> Tensor:
    """The proximal map of ``tau ||.||``, or of ``tau ||.||^2 / 2``, at ``M`` (p, q).

    Parameters
    ----------
    M
        In float64, on any device.
    norm
        The norm.
    tau
        Must be > 0.
    squared
        Whether to take half the square of the norm.
    """
    power = magnitude_power(norm)
    if is_spectral(norm):
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        shrunk = shrunken(s, power, tau, squared=squared)
        kept = int((shrunk > 0).sum())
        low_rank: Tensor = (U[:, :kept] * shrunk[:kept]) @ Vh[:kept]
        return low_rank
    return shrunken(M.abs().flatten(), power, tau, squared=squared).view_as(M).copysign(M)


def shrunken(v: Tensor, p: float, tau: float, *, squared: bool) -> Tensor:
    """The proximal map of ``tau ||.||_p``, or of ``tau ||.||_p^2 / 2``, at magnitudes ``v`` (k,) >= 0."""
    if v.numel() == 0 or float(v.amax()) == 0.0:
        return torch.zeros_like(v)
    if p == 2.0:
        return v / (1.0 + tau) if squared else v * max(0.0, 1.0 - tau / float(torch.linalg.vector_norm(v)))
    if p == 1.0:
        return (v - _threshold(v, tau, squared=squared)).clamp(min=0.0)
    if math.isinf(p):
        return v.clamp(max=_level(v, tau, squared=squared))
    return _power_shrunken(v, p, tau, squared=squared)


def _threshold(v: Tensor, tau: float, *, squared: bool) -> float:
    """What l_1 takes off: ``tau``, or the s with ``s = tau sum(max(v - s, 0))``."""
    if not squared:
        return tau
    ordered, count = _ordered(v)
    levels = tau * ordered.cumsum(0) / (1.0 + tau * count)
    # The sum over the k largest gives the right s for the last k whose smallest magnitude is above it.
    return float(levels[int((ordered > levels).sum()) - 1])


def _level(v: Tensor, tau: float, *, squared: bool) -> float:
    """Where l_inf cuts off: the t with ``sum(max(v - t, 0)) = tau`` (0 if there is none), or ``= tau t``."""
    ordered, count = _ordered(v)
    levels = ordered.cumsum(0) / (count + tau) if squared else (ordered.cumsum(0) - tau) / count
    return max(0.0, float(levels[int((ordered > levels).sum()) - 1]))


def _ordered(v: Tensor) -> tuple[Tensor, Tensor]:
    """The magnitudes, largest first, and their numbers 1, 2, …"""
    return v.sort(descending=True).values, torch.arange(1, len(v) + 1, dtype=v.dtype, device=v.device)


def _power_shrunken(v: Tensor, p: float, tau: float, *, squared: bool) -> Tensor:
    """The same for 1 < p < inf: the root N of ``||u(N)||_p = 1``, by Newton's method inside a bracket."""
    largest = float(v.amax())
    v, tau = v / largest, tau if squared else tau / largest
    size = float(torch.linalg.vector_norm(v, ord=p))
    below, above = 0.0, size
    N = size / (1.0 + tau)
    if not squared:
        dual = float(torch.linalg.vector_norm(v, ord=p / (p - 1.0)))
        if dual <= tau:
            return torch.zeros_like(v)
        N = size * (1.0 - tau / dual)
    for _ in range(100):
        s = tau * N if squared else tau
        u, rest = _quotients(v, p, N, s)
        peak = float(u.amax())
        weights = (u / peak) ** p
        norm = peak * float(weights.sum()) ** (1.0 / p)
        # By how many per cent u falls when N rises by one, entry by entry and then for the norm.
        fall = (v if squared else N * u) / (N * u + (p - 1.0) * rest).clamp(min=1e-300)
        mean = max(float(weights @ fall) / float(weights.sum()), 1e-300)
        factor = math.exp(min(math.log(norm) / mean, 700.0)) if squared else 1.0 + (norm - 1.0) / mean
        if abs(factor - 1.0) <= 2e-15 or above - below <= 4e-16 * above:
            break
        below, above = (N, above) if norm > 1.0 else (below, N)
        new = N * factor
        N = new if below < new < above else 0.5 * (below + above)
    return largest * N * u


def _quotients(v: Tensor, p: float, a: float, b: float) -> tuple[Tensor, Tensor]:
    """The u >= 0 with ``a u + b u^(p - 1) = v``, and ``b u^(p - 1)``."""
    if p > 2.0:
        u = _root(v, a, b, p - 1.0)
        return u, b * u ** (p - 1.0)
    x = _root(v, b, a, 1.0 / (p - 1.0))
    return x ** (1.0 / (p - 1.0)), b * x


def _root(v: Tensor, a: float, b: float, e: float) -> Tensor:
    """The x >= 0 with ``a x + b x^e = v``, for e > 1: Newton's method from above, where it cannot overshoot."""
    x = torch.minimum(v / a, (v / b) ** (1.0 / e))
    for _ in range(50):
        bent = b * x ** (e - 1.0)
        new = x - (a * x + bent * x - v) / (a + e * bent)
        # The error after a step is about e / 2 times the square of the step.
        done = bool((x - new <= 1e-9 * x).all())
        x = torch.minimum(x, new)
        if done:
            break
    return x


def response(v: Tensor, w: Tensor, p: float, tau: float) -> tuple[Tensor, Tensor, float]:
    """How ``w``, the map of ``tau ||.||_p^2 / 2`` at magnitudes ``v`` (k,) >= 0, answers to a change of them.

    Its derivative (one of them, where there are several) is ``diag(d) + c u u^T`` with the d, u, c returned; always
    symmetric, with eigenvalues in [0, 1].
    """
    if p == 1.0:
        kept = (w > 0).to(v.dtype)
        return kept, kept, -tau / (1.0 + tau * float(kept.sum()))
    if math.isinf(p):
        cut = (w < v).to(v.dtype)
        return 1.0 - cut, cut, 1.0 / (float(cut.sum()) + tau)
    peak = float(w.amax()) if w.numel() > 0 else 0.0
    if peak == 0.0:
        return torch.zeros_like(v), torch.zeros_like(v), 0.0
    # The inverse of 1 + tau H, with the second derivative H = diag((p - 1) u^(p - 2)) + (2 - p) g g^T of half the
    # square, for u = w / ||w||_p and g = u^(p - 1).
    u = w / (peak * float(torch.linalg.vector_norm(w / peak, ord=p)))
    bent = u ** (2.0 - p) if p < 2.0 else u ** (p - 2.0)
    d = bent / (bent + tau * (p - 1.0)) if p < 2.0 else 1.0 / (1.0 + tau * (p - 1.0) * bent)
    g = u ** (p - 1.0)
    return d, d * g, -tau * (2.0 - p) / (1.0 + tau * (2.0 - p) * float(g @ (d * g)))
