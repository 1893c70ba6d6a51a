"""What one attention module computed for one batch, whatever the family of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["AttentionCall", "Kind", "ModuleInfo", "Side", "Tier", "head_label"]

Kind = Literal["encoder", "decoder", "cross"]
Side = Literal["source", "target"]
Tier = Literal["interface", "hooks", "given"]


@dataclass(frozen=True, kw_only=True)
class ModuleInfo:
    """One attention module of a model.

    Attributes
    ----------
    name
        Qualified name in the model, such as ``"encoder.layer.0.attention.self"``. It, and not a layer index that the
        module may carry, says which module this is.
    kind
        ``"encoder"`` (a text attends to itself, both ways), ``"decoder"`` (to itself and what came before) or
        ``"cross"`` (to another text).
    layer
        Depth among the modules of its kind, from 0.
    n_heads
        Query heads H.
    n_kv_heads
        Key-value heads; H is a multiple.
    d_head
        Dimension of a query.
    query_side, key_side
        Which text the queries and keys belong to. Models with one text have only ``"source"``; in an
        encoder-decoder the decoder's is ``"target"``, and cross-attention asks from ``"target"`` to ``"source"``.
    tier
        How it is read: by the model's attention interface, by hooks, or given as weights.
    prefixed
        Whether head labels begin with the kind: in models with several kinds.
    """

    name: str
    kind: Kind
    layer: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    query_side: Side
    key_side: Side
    tier: Tier
    prefixed: bool

    def label(self, head: int) -> str:
        """``L5.H3``; ``encoder.L5.H3`` where the model has several kinds."""
        return head_label(self.kind if self.prefixed else None, self.layer, head)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of all heads."""
        return tuple(self.label(head) for head in range(self.n_heads))


def head_label(kind: Kind | None, layer: int, head: int) -> str:
    """``L5.H3``, or with its kind ``cross.L5.H3``."""
    return f"{f'{kind}.' if kind else ''}L{layer}.H{head}"


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    r"""Queries, keys and everything else that makes the logits of one module and batch.

    With q and k after any rotation or normalisation that the model applies to them, the logits of head h are

    $$s_{ij} = \mathrm{cap}(\mathrm{scale}\; q_{hi}^\top k_{g(h)j} + b_{hij}) ,$$

    minus infinity where the mask forbids, with $g(h)$ the key-value head of h and $\mathrm{cap}(s) = c \tanh(s / c)$
    for a soft cap c, the identity without one. Softmax runs over the keys and, where the model has one, a sink.

    Attributes
    ----------
    info
        The module.
    q
        (B, H, Tq, d_head).
    k
        (B, n_kv_heads, Tk, d_head).
    scale
        Factor of the products.
    mask
        Booleans that broadcast to (B, H, Tq, Tk), True = may be attended. None: everything.
    offsets
        Additive logits b (relative bias, ALiBi) that broadcast to (B, H, Tq, Tk), or None.
    sinks
        (H,): score of a key without a token, or None.
    softcap
        c, or None.
    query_input, key_input
        (B, Tq, d), (B, Tk, d): what the query and the key projection were given, or None where unknown.
    given
        (B, H, Tq, Tk): weights that came from outside; q and k are empty then.
    """

    info: ModuleInfo
    q: Tensor
    k: Tensor
    scale: float = 1.0
    mask: Tensor | None = None
    offsets: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    query_input: Tensor | None = None
    key_input: Tensor | None = None
    given: Tensor | None = None

    def logits(self, rows: slice = slice(None), heads: slice = slice(None)) -> Tensor:
        """Logits (B, heads, rows, Tk) of some queries and heads, at least in float32; masked ones are -inf.

        Weights that were given are turned into logits by their logarithm.
        """
        if self.given is not None:
            return self.given[:, heads, rows].float().log()
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        group = self.info.n_heads // self.info.n_kv_heads
        k = self.k.repeat_interleave(group, dim=1)[:, heads] if group > 1 else self.k[:, heads]
        scores = (self.q[:, heads, rows].to(dtype) @ k.to(dtype).transpose(-1, -2)) * self.scale
        if self.offsets is not None:
            scores = scores + _part(self.offsets, rows, heads).to(dtype)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.mask is not None:
            scores = scores.masked_fill(~_part(self.mask, rows, heads), -torch.inf)
        return scores

    def weights(self, rows: slice = slice(None), heads: slice = slice(None)) -> Tensor:
        """Attention weights (B, heads, rows, Tk) after softmax; rows that may attend to nothing are 0.

        With sinks the weights of a row sum to less than 1: the rest is the sink's.
        """
        if self.given is not None:
            return self.given[:, heads, rows].float()
        scores = self.logits(rows, heads)
        if self.sinks is not None:
            sink = self.sinks[heads].to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1).nan_to_num(0.0)
        return weights[..., : self.key_length]

    @property
    def key_length(self) -> int:
        """Tk."""
        return self.given.shape[-1] if self.given is not None else self.k.shape[-2]

    @property
    def query_length(self) -> int:
        """Tq."""
        return self.given.shape[-2] if self.given is not None else self.q.shape[-2]


def _part(whole: Tensor, rows: slice, heads: slice) -> Tensor:
    """Some heads and queries of what broadcasts to (B, H, Tq, Tk)."""
    whole = whole[(None,) * (4 - whole.ndim)]
    whole = whole[:, heads] if whole.shape[1] > 1 else whole
    return whole[:, :, rows] if whole.shape[2] > 1 else whole
