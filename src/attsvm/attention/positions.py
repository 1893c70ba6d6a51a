r"""How a token's place enters attention: added to the tokens, rotated into queries and keys, or added to the logits.

| | where | formula |
|---|---|---|
| sinusoidal, learned | tokens | $x_t + p_t$ |
| rotary | queries, keys | $(R_i q_i)^\top (R_t k_t) = q_i^\top R_{t-i} k_t$ |
| ALiBi, T5's buckets | logits | $q_i^\top k_t + b_{t-i}$ |

Where queries and keys differ in number, query i of Tq stands at place ``Tk - Tq + i``: the last query is the last key.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attsvm.errors import InvalidInputError

__all__ = [
    "LearnedPositions",
    "RelativeBias",
    "Rotary",
    "RotaryTables",
    "alibi_bias",
    "alibi_slopes",
    "llama3_frequencies",
    "relative_buckets",
    "sinusoidal",
]


def sinusoidal(
    n_positions: int, d_model: int, *, base: float = 10000.0, interleaved: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Sines and cosines of the place, at geometric wavelengths.

    $$p_{t,2j} = \sin(t\, \beta^{-2j/d}), \qquad p_{t,2j+1} = \cos(t\, \beta^{-2j/d}) .$$

    Parameters
    ----------
    n_positions, d_model
        Rows and columns; ``d_model`` must be even.
    base
        $\beta$: wavelengths go from 2 pi to 2 pi times nearly this.
    interleaved
        True: sine and cosine side by side, as in the paper. False: all sines, then all cosines, as in Marian's models.
    dtype
        Default: torch's default. The table is computed in float64.

    Returns
    -------
    Tensor
        (n_positions, d_model).

    References
    ----------
    Vaswani et al. "Attention Is All You Need", 2017. arXiv:1706.03762, section 3.5.
    """
    _positive("sinusoidal", n_positions=n_positions, d_model=d_model)
    if d_model % 2:
        raise InvalidInputError(f"sinusoidal: d_model must be even, got {d_model}.")
    frequencies = base ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angles = torch.arange(n_positions, dtype=torch.float64)[:, None] * frequencies
    sines, cosines = angles.sin(), angles.cos()
    table = torch.stack([sines, cosines], -1).flatten(1) if interleaved else torch.cat([sines, cosines], -1)
    return table.to(torch.get_default_dtype() if dtype is None else dtype)


class LearnedPositions(nn.Module):
    """A trained vector for each place: positions (T,) or (B, T) to vectors (..., d_model).

    Parameters
    ----------
    n_ctx
        The number of places that were learned; a place beyond is an error, not a guess.
    d_model
        Size of the vectors.
    offset
        Rows of the table before place 0 (BART and RoBERTa keep 2).
    """

    def __init__(self, n_ctx: int, d_model: int, *, offset: int = 0) -> None:
        super().__init__()
        _positive("LearnedPositions", n_ctx=n_ctx, d_model=d_model)
        if offset < 0:
            raise InvalidInputError(f"LearnedPositions: offset must be >= 0, got {offset}.")
        self.n_ctx, self.offset = n_ctx, offset
        self.weight = nn.Parameter(torch.empty(n_ctx + offset, d_model).normal_(std=0.02))

    def forward(self, positions: Tensor) -> Tensor:
        """Look up places (integers of any shape)."""
        _check_places(positions, "LearnedPositions")
        if positions.numel() and not (int(positions.min()) >= 0 and int(positions.max()) < self.n_ctx):
            raise InvalidInputError(
                f"LearnedPositions: positions must be in [0, {self.n_ctx}), the length that was learned, "
                f"got {int(positions.min())} to {int(positions.max())}."
            )
        return nn.functional.embedding(positions + self.offset, self.weight)


class RotaryTables(NamedTuple):
    """Cosines, and sines with the sign of their half (-, +), (..., T, d_rotated), at some places.

    They are the same in all layers of a model, which makes them once a forward pass.
    """

    cosines: Tensor
    sines: Tensor


class Rotary(nn.Module):
    r"""Rotate queries and keys by angles that grow with the place, so that logits depend on distance alone.

    The vector is cut into two halves, and the pair $(x_j, x_{j + d/2})$ is turned by $t\, \theta_j$:

    $$x'_j = x_j \cos t\theta_j - x_{j+d/2} \sin t\theta_j, \qquad
      x'_{j+d/2} = x_{j+d/2} \cos t\theta_j + x_j \sin t\theta_j, \qquad \theta_j = \beta^{-2j/d} .$$

    This is the convention of Hugging Face's Llama; the paper pairs neighbours $(x_{2j}, x_{2j+1})$, which is the same
    up to a permutation of the columns of W_Q and W_K.

    Parameters
    ----------
    d_head
        Size of a head.
    base
        $\beta$.
    d_rotated
        Only the first so many coordinates are rotated; even, default all.
    frequencies
        The $\theta_j$ themselves, (d_rotated / 2,), in place of those of ``base``; see :func:`llama3_frequencies`.

    Notes
    -----
    Angles are computed in float32 whatever the dtype of q: this is what published weights were trained with, and what
    makes a float64 run comparable with them to float64 precision.

    References
    ----------
    Su et al. "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021. arXiv:2104.09864, equation 34.
    """

    frequencies: Tensor

    def __init__(
        self, d_head: int, base: float = 10000.0, *, d_rotated: int | None = None, frequencies: Tensor | None = None
    ) -> None:
        super().__init__()
        d_rotated = d_head if d_rotated is None else d_rotated
        _positive("Rotary", d_head=d_head, d_rotated=d_rotated)
        if d_rotated % 2 or d_rotated > d_head:
            raise InvalidInputError(f"Rotary: d_rotated must be even and at most d_head ({d_head}), got {d_rotated}.")
        if not base > 0:
            raise InvalidInputError(f"Rotary: base must be > 0, got {base}.")
        if frequencies is None:
            frequencies = _frequencies(d_rotated, base)
        elif frequencies.shape != (d_rotated // 2,):
            raise InvalidInputError(
                f"Rotary: frequencies must have shape ({d_rotated // 2},), got {tuple(frequencies.shape)}."
            )
        self.d_head, self.base, self.d_rotated = d_head, base, d_rotated
        # No part of a checkpoint: it follows from the configuration.
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> RotaryTables:
        """Cosines and sines at places (T,) or (B, T); a model makes them once and gives them to every layer."""
        _check_places(positions, "Rotary")
        angles = positions[..., None].float() * self.frequencies.to(positions.device)
        if positions.ndim == 2:
            angles = angles[:, None]  # (B, 1, T, d / 2): the same for every head
        cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
        return RotaryTables(torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1))

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | RotaryTables) -> tuple[Tensor, Tensor]:
        """Rotate q (B, H, T, d_head) and k (B, Hkv, T, d_head), which stand at the same places (T,) or (B, T)."""
        tables = positions if isinstance(positions, RotaryTables) else self.tables(positions, q.dtype)
        for name, x in (("q", q), ("k", k)):
            if x.shape[-1] != self.d_head or x.shape[-2] != tables.cosines.shape[-2]:
                raise InvalidInputError(
                    f"Rotary: {name} must be (B, H, T, d_head) with T = {tables.cosines.shape[-2]} positions and "
                    f"d_head = {self.d_head}, got {tuple(x.shape)}."
                )
        cosines, sines = tables.cosines.to(q.dtype), tables.sines.to(q.dtype)
        return self._rotate(q, cosines, sines), self._rotate(k, cosines, sines)

    def _rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        turned = x if self.d_rotated == self.d_head else x[..., : self.d_rotated]
        # Rolled by a half, every coordinate stands over its partner: two passes instead of six on slices.
        turned = torch.addcmul(turned * cosines, turned.roll(self.d_rotated // 2, -1), sines)
        return turned if self.d_rotated == self.d_head else torch.cat([turned, x[..., self.d_rotated :]], -1)

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
        # Moves with the model, but keeps its dtype: angles at place 1000 of frequencies in bfloat16 would be noise.
        exact = self.frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.frequencies = exact.to(self.frequencies.device)
        return self


def llama3_frequencies(
    d_rotated: int,
    base: float,
    *,
    factor: float,
    low_frequency_factor: float,
    high_frequency_factor: float,
    original_n_ctx: int,
) -> Tensor:
    r"""Rotary frequencies of Llama 3.1, which stretch long wavelengths so that a longer context is read.

    Of each $\theta$ with $r = L \theta / 2\pi$ turns within the original context L: kept where r is above the high
    factor, divided by ``factor`` where it is below the low one, and mixed linearly in r between them.
    """
    plain = _frequencies(d_rotated, base)
    turns = original_n_ctx * plain / (2 * math.pi)
    kept = ((turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)).clamp(0.0, 1.0)
    return (1 - kept) * plain / factor + kept * plain


def alibi_slopes(n_heads: int) -> Tensor:
    r"""Slopes (n_heads,) of ALiBi: $2^{-8h/H}$, h = 1..H, for H a power of two.

    Otherwise those of the next lower power of two, followed by every second one of the next higher power.
    """
    _positive("alibi_slopes", n_heads=n_heads)
    lower = 1 << (n_heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / lower * torch.arange(1, lower + 1, dtype=torch.float64))
    between = 2.0 ** (-4.0 / lower * torch.arange(1, 2 * lower, 2, dtype=torch.float64))
    return torch.cat([slopes, between[: n_heads - lower]])


def alibi_bias(
    n_heads: int,
    n_queries: int,
    n_keys: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Logits that fall linearly with distance: $b^h_{it} = -m_h |i - t|$, (1, H, Tq, Tk).

    Parameters
    ----------
    n_heads
        H; the slopes are those of :func:`alibi_slopes`.
    n_queries, n_keys
        Tq and Tk (default Tq).
    dtype, device
        Of the result; default torch's default dtype and the CPU.

    References
    ----------
    Press, Smith, Lewis. "Train Short, Test Long", 2021. arXiv:2108.12409, section 3.
    """
    n_keys = n_queries if n_keys is None else n_keys
    distance = _distance(n_queries, n_keys, device).abs()
    slopes = alibi_slopes(n_heads).to(distance.device)
    return (-slopes[:, None, None] * distance)[None].to(torch.get_default_dtype() if dtype is None else dtype)


def relative_buckets(
    distance: Tensor, *, n_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    r"""Bucket of each signed distance t - i (key place minus query place), T5's way.

    Distances below half of the buckets have one each; the others share the rest logarithmically up to
    ``max_distance``, beyond which there is one bucket. Bidirectional: half of the buckets for keys after the query.
    Else keys after the query (which causality hides) count as distance 0.

    References
    ----------
    Raffel et al. "Exploring the Limits of Transfer Learning", 2019. arXiv:1910.10683, section 2.1.
    """
    half = n_buckets // 2 if bidirectional else n_buckets
    exact = half // 2
    if exact < 1 or max_distance <= exact:
        raise InvalidInputError(
            f"relative_buckets: n_buckets must be at least {4 if bidirectional else 2} and max_distance above the "
            f"number of exact buckets, got {n_buckets} and {max_distance}."
        )
    start = (distance > 0).long() * half if bidirectional else torch.zeros_like(distance)
    away = distance.abs() if bidirectional else (-distance).clamp(min=0)
    # In float32, as the published models were trained: in float64 a few distances would fall into the next bucket.
    share = torch.log(away.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return start + torch.where(away < exact, away, shared)


class RelativeBias(nn.Module):
    r"""T5's learned logits for distances: $b^h_{it} = E_{\mathrm{bucket}(t - i),\, h}$.

    Parameters
    ----------
    n_heads
        H.
    n_buckets, max_distance, bidirectional
        See :func:`relative_buckets`. Encoders are bidirectional, decoders not.
    """

    def __init__(
        self, n_heads: int, *, n_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__()
        _positive("RelativeBias", n_heads=n_heads, n_buckets=n_buckets, max_distance=max_distance)
        self.n_heads, self.n_buckets, self.max_distance = n_heads, n_buckets, max_distance
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.empty(n_buckets, n_heads).normal_(std=0.02))
        self._buckets(torch.zeros(1, dtype=torch.long))  # an impossible combination is refused here, not in forward

    def _buckets(self, distance: Tensor) -> Tensor:
        return relative_buckets(
            distance, n_buckets=self.n_buckets, max_distance=self.max_distance, bidirectional=self.bidirectional
        )

    def forward(self, n_queries: int, n_keys: int | None = None) -> Tensor:
        """Logits (1, H, Tq, Tk)."""
        n_keys = n_queries if n_keys is None else n_keys
        buckets = self._buckets(_distance(n_queries, n_keys, self.weight.device))
        return nn.functional.embedding(buckets, self.weight).permute(2, 0, 1)[None]


def _frequencies(d_rotated: int, base: float) -> Tensor:
    # On the CPU also where a model is laid out on the meta device, which holds no numbers: no checkpoint brings these.
    return 1.0 / (base ** (torch.arange(0, d_rotated, 2, dtype=torch.int64, device="cpu").float() / d_rotated))


def _distance(n_queries: int, n_keys: int, device: torch.device | str | None) -> Tensor:
    """Key place minus query place, (Tq, Tk)."""
    if n_queries < 1 or n_keys < 1:
        raise InvalidInputError(f"positions: n_queries and n_keys must be >= 1, got {n_queries} and {n_keys}.")
    keys = torch.arange(n_keys, device=device)
    return keys - (n_keys - n_queries + torch.arange(n_queries, device=device))[:, None]


def _check_places(positions: Tensor, where: str) -> None:
    if positions.ndim not in (1, 2) or positions.is_floating_point() or positions.dtype == torch.bool:
        raise InvalidInputError(
            f"{where}: positions must be integers of shape (T,) or (B, T), got {positions.dtype} of shape "
            f"{tuple(positions.shape)}."
        )


def _positive(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InvalidInputError(f"{where}: {name} must be >= 1, got {size}.")
