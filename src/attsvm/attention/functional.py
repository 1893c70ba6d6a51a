r"""Scaled dot-product attention: the formula itself, and the fused kernel that computes the same numbers.

With queries $q_i$, keys $k_t$ and values $v_t$ of one head,

$$a_{it} = s\, q_i^\top k_t + b_{it}, \qquad w_{it} = \frac{m_{it}\, e^{a_{it}}}{\sum_u m_{iu}\, e^{a_{iu}}}, \qquad
  o_i = \sum_t w_{it} v_t ,$$

where m is 1 for keys that may be attended and 0 elsewhere. A query that may attend to nothing has $o_i = 0$ and sends
no gradient.

Shapes: B batch, H query heads, Hkv key-value heads (each serves H / Hkv query heads), Tq queries, Tk keys.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from attsvm.attention.masks import causal_mask
from attsvm.errors import InvalidInputError, UnsupportedError

__all__ = ["BACKENDS", "Attended", "attend"]

BACKENDS = ("auto", "eager", "sdpa", "flex")


class Attended(NamedTuple):
    """What attention returns: the output, and the weights (B, H, Tq, Tk) where they were asked for, else None."""

    output: Tensor
    weights: Tensor | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
    weights: bool = False,
) -> Attended:
    r"""Attend: average the values with weights $\mathrm{softmax}_t(s\, q_i^\top k_t + b_{it})$ over the allowed keys.

    Parameters
    ----------
    q
        Queries (B, H, Tq, d_head).
    k, v
        Keys (B, Hkv, Tk, d_head) and values (B, Hkv, Tk, d_value), H a multiple of Hkv: query head h reads key-value
        head ``h // (H // Hkv)``.
    mask
        Booleans that broadcast to (B, H, Tq, Tk), True = may be attended. Default: everything may.
    bias
        Additive logits that broadcast to (B, H, Tq, Tk); they are not scaled.
    causal
        Query i of Tq sees the keys up to ``Tk - Tq + i``, so that the last query sees all (as with a key-value cache).
        Joined with ``mask`` where both are given.
    scale
        The factor s; default ``1 / sqrt(d_head)``.
    dropout
        Probability with which a weight is dropped, whatever the mode of the caller. The weights returned are those
        before dropout.
    backend
        ``"eager"``: the formulas above, step by step, the specification. ``"sdpa"``: torch's fused kernels.
        ``"flex"``: torch's FlexAttention, compiled on GPUs, which skips blocks of 128 x 128 that are masked throughout;
        on the CPU it has no gradient and no gain. ``"auto"``: sdpa, or eager where ``weights`` are asked for.
    weights
        Return the weights too. They always come: with every backend they are then computed by the formulas.

    Returns
    -------
    Attended
        ``output`` (B, H, Tq, d_value) in the dtype of q; ``weights`` (B, H, Tq, Tk), in float32 at least, or None.

    Raises
    ------
    InvalidInputError
        If shapes, head counts or dtypes do not fit; the message names the argument.
    UnsupportedError
        If flex is asked for dropout, or for a gradient on the CPU.

    Notes
    -----
    The eager softmax works in float32 at least, whatever the dtype of q: bfloat16 keeps 8 bits, so that the sum of
    Tk weights would be off by up to Tk / 256. Cost 2 B H Tq Tk (d_head + d_value) operations. Eager keeps the
    (B, H, Tq, Tk) weights in memory; the fused kernels do not.

    References
    ----------
    Vaswani et al. "Attention Is All You Need", 2017. arXiv:1706.03762, equation 1.

    Examples
    --------
    >>> q = torch.tensor([[[[0.0, 0.0]]]])
    >>> k = v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]]])
    >>> attend(q, k, v, mask=torch.tensor([True, True, False])).output
    tensor([[[[0.5000, 0.5000]]]])
    """
    _check_shapes(q, k, v)
    if backend not in BACKENDS:
        raise InvalidInputError(f"attend: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if not 0.0 <= dropout < 1.0:
        raise InvalidInputError(f"attend: dropout must be in [0, 1), got {dropout}.")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask is not None:
        if mask.dtype != torch.bool:
            raise InvalidInputError(
                f"attend: mask must be boolean (True = may be attended), got {mask.dtype}; additive logits go to bias=."
            )
        mask = _four_axes(mask, full, "mask")
    if bias is not None:
        if not bias.is_floating_point():
            raise InvalidInputError(f"attend: bias must be floating point, got {bias.dtype}.")
        bias = _four_axes(bias, full, "bias")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if weights or backend == "eager":
        output, probabilities = _eager(q, k, v, _join(mask, causal, q, k), bias, scale, dropout)
        return Attended(output, probabilities if weights else None)
    if backend == "flex":
        return Attended(_flex(q, k, v, _join(mask, causal, q, k), bias, scale, dropout), None)
    return Attended(_fused(q, k, v, mask, bias, causal, scale, dropout), None)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = (q.to(dtype) @ k.to(dtype).mT) * scale
    if bias is not None:
        logits = logits + bias.to(dtype)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    weights = _softmax(logits) if mask is not None or bias is not None else logits.softmax(-1)
    kept = nn.functional.dropout(weights, dropout) if dropout else weights
    return (kept @ v.to(dtype)).to(q.dtype), weights


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis in which a row of -inf has weights and gradients 0."""
    # Such a row is made finite before the softmax and emptied after it: a NaN that is overwritten afterwards would
    # still be in the gradient.
    empty = logits.amax(-1, keepdim=True) == -torch.inf
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    # The kernels know one kind of causality, that of as many queries as keys, and none together with a mask.
    # Not the condition itself: under torch.compile it may be a symbol, which the kernel does not take.
    native = False
    if causal and mask is None and bias is None and q.shape[2] == k.shape[2]:
        native = True
    allowed: Tensor | None = None if native else _join(mask, causal, q, k)
    if bias is not None:
        allowed = bias.to(q.dtype) if allowed is None else bias.to(q.dtype).masked_fill(~allowed, -torch.inf)
    empty = None
    if allowed is not None and q.device.type != "cpu":
        # The kernels of the CPU leave empty rows at 0; those of other devices differ in what they do with them.
        allowed, empty = _open_empty_rows(allowed)
    output = nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=allowed,
        dropout_p=dropout,
        is_causal=native,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output if empty is None else output.masked_fill(empty, 0.0)


def _open_empty_rows(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Let queries that see nothing (of a boolean or an additive mask) see all, and say which they were."""
    if allowed.dtype == torch.bool:
        empty = ~allowed.any(-1, keepdim=True)
        return allowed | empty, empty
    empty = (allowed == -torch.inf).all(-1, keepdim=True)
    return allowed.masked_fill(empty, 0.0), empty


def _flex(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, dropout: float
) -> Tensor:
    if dropout:
        raise UnsupportedError('attend: backend "flex" has no dropout; use "sdpa", or dropout 0.')
    on_cpu = q.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
        raise UnsupportedError('attend: backend "flex" has no gradient on the CPU; use "sdpa", or torch.no_grad().')
    # Imported here, as it brings the compiler of torch with it.
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    blocks: Any = None
    score: Callable[..., Tensor] | None = None
    if mask is not None:
        seen = mask.expand(full)
        # Axes of size 1 are worked out once, not for every sequence and head.
        B, H = (None if size == 1 else size for size in mask.shape[:2])
        blocks = create_block_mask(lambda b, h, i, t: seen[b, h, i, t], B, H, *full[2:], device=str(q.device))
    if bias is not None:
        added = bias.expand(full)

        def score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, t: Tensor) -> Tensor:
            return logit + added[b, h, i, t]

    options = {"score_mod": score, "block_mask": blocks, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    output: Tensor
    if on_cpu:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            # Detached, as it refuses tensors that could have a gradient even where none is recorded.
            output = cast("Callable[..., Tensor]", flex_attention)(q.detach(), k.detach(), v.detach(), **options)
    else:
        output = _compiled(flex_attention)(q, k, v, **options)
    return output


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Tensor]:
    return torch.compile(kernel)


def _join(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    # A single query is the last one, which sees every key.
    if not causal or q.shape[2] == 1:
        return mask
    past = causal_mask(q.shape[2], k.shape[2], device=q.device)[None, None]
    return past if mask is None else mask & past


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or not x.is_floating_point():
            raise InvalidInputError(
                f"attend: {name} must be floating point of shape (B, H, T, d_head), got {_what(x)}."
            )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise InvalidInputError(f"attend: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InvalidInputError(f"attend: k must have the batch size and d_head of q {_shape(q)}, got {_shape(k)}.")
    if k.shape[:3] != v.shape[:3]:
        raise InvalidInputError(f"attend: v must have the batch, heads and length of k {_shape(k)}, got {_shape(v)}.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InvalidInputError(
            f"attend: the heads of q must be a multiple of those of k and v, got {q.shape[1]} and {k.shape[1]}."
        )
    if k.shape[2] == 0:
        raise InvalidInputError("attend: k must hold at least one key, got length 0.")


def _four_axes(x: Tensor, full: tuple[int, int, int, int], name: str) -> Tensor:
    """``x`` with four axes, once it is certain that it broadcasts to (B, H, Tq, Tk)."""
    wanted = full[4 - x.ndim :] if 1 <= x.ndim <= 4 else ()
    if not wanted or any(have not in (1, want) for have, want in zip(x.shape, wanted)):
        raise InvalidInputError(f"attend: {name} must broadcast to (B, H, Tq, Tk) = {full}, got shape {_shape(x)}.")
    return x if x.ndim == 4 else x[(None,) * (4 - x.ndim)]


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _what(x: Tensor) -> str:
    return f"{x.dtype} of shape {_shape(x)}"
