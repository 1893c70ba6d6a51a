"""Chunks of queries against the blocks of keys that they may see: what windows and block-sparse attention share.

Queries are taken in chunks; the keys that a chunk may see are gathered in whole blocks, and all chunks that see equally
many blocks are one batched call of :func:`~attsvm.attention.functional.attend`.

Shapes: B batch, H query heads, Hkv key-value heads, N chunks, c queries in a chunk (and keys in a block), M blocks in
all, m blocks that a chunk sees, S = m c (and the extra places) keys that it sees, R residues of a dilation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, split, unflatten
from torch.nn.functional import pad

from attsvm.attention.functional import attend

__all__ = ["Part", "Rule", "WindowLayout", "attend_chunks", "by_count", "cut", "in_order"]

CHUNKS = (32, 512)
"""Queries in a chunk of a window, at least and at most: short calls cost more than their work, long ones are masked."""

Rule = Callable[[Tensor, Tensor], Tensor]
"""``(chunks (N,), blocks (N, m)) -> (1 or B, N, c, m c)``: which keys of its blocks each query may attend to."""

SLAB_BYTES = 2**22
"""Keys and values gathered for one call on a CPU, about."""


class Part(NamedTuple):
    """Chunks that see equally many blocks: the chunks (N,), their blocks (N, m), weights (B, H, N, c, m c)."""

    chunks: Tensor
    blocks: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class WindowLayout:
    """How a sequence is cut: into residues of the dilation, and each of these into chunks."""

    length: int
    left: int
    right: int
    dilation: int
    chunk: int
    n_chunks: int
    centre: Tensor
    causal: bool

    @classmethod
    def of(cls, T: int, window: int, causal: bool, dilation: int, chunk: int | None, centre: Tensor) -> WindowLayout:
        """The layout of T tokens; ``centre`` (G,) are the global ones."""
        longest = -(-T // dilation)
        # Short chunks compute few logits that are masked, long ones copy each key less often.
        size = min(longest, min(max(window, CHUNKS[0]), CHUNKS[1]) if chunk is None else chunk)
        right = 0 if causal else window - 1
        n_chunks = -(-longest // size)
        return cls(
            length=T,
            left=window - 1,
            right=right,
            dilation=dilation,
            chunk=size,
            n_chunks=n_chunks,
            centre=centre,
            causal=causal,
        )

    def cut(self, x: Tensor) -> Tensor:
        """(B, H, T, d) as (B R, H, N, c, d)."""
        missing = self.n_chunks * self.chunk * self.dilation - x.shape[2]
        x = pad(x, (0, 0, 0, missing)) if missing else x
        return unflatten(x, 2, (self.n_chunks, self.chunk, self.dilation)).movedim(4, 1).flatten(0, 1)

    def joined(self, x: Tensor) -> Tensor:
        """(B R, H, N, c, d) as (B, H, T, d)."""
        x = unflatten(x, 0, (-1, self.dilation)).movedim(1, 4)
        return x.flatten(2, 4)[:, :, : self.length]

    def places(self) -> Tensor:
        """The places in the sequence (R, N, c)."""
        place = torch.arange(self.n_chunks * self.chunk * self.dilation, device=self.centre.device)
        return place.view(self.n_chunks, self.chunk, self.dilation).movedim(2, 0)

    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """Chunks by the number of blocks they reach: those at the ends reach fewer."""
        start = torch.arange(self.n_chunks, device=self.centre.device) * self.chunk
        low = (start - self.left).clamp(min=0) // self.chunk
        high = ((start + self.chunk - 1 + self.right) // self.chunk).clamp(max=self.n_chunks - 1)
        counts = high - low + 1
        groups = []
        for count in sorted(set(counts.tolist())):
            chunks = (counts == count).nonzero().flatten()
            groups.append((chunks, low[chunks, None] + torch.arange(count, device=start.device)))
        return groups

    def band(self, part: Part) -> Tensor:
        """The band (B R, H, N, c, span) in the weights of a part."""
        chunks, blocks, weights = part
        own = chunks[:, None] * self.chunk + torch.arange(self.chunk, device=chunks.device)
        key = own[..., None] + torch.arange(-self.left, self.right + 1, device=chunks.device)
        at = key - blocks[:, :1, None] * self.chunk
        exists = (at >= 0) & (at < blocks.shape[1] * self.chunk)
        at = at.clamp(0, blocks.shape[1] * self.chunk - 1)
        return weights.gather(-1, at.expand(*weights.shape[:2], *at.shape)).masked_fill(~exists, 0.0)


def attend_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: list[tuple[Tensor, Tensor]],
    rule: Rule,
    scale: float | None,
    weights: bool,
    extra: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, list[Part]]:
    """Attention of chunks q (B, H, N, c, d) to their blocks of k and v (B, Hkv, M, c, d), and to ``extra`` places.

    Every chunk is in one of the groups. Returns the outputs (B, H, N, c, d_value) and the groups with their weights.
    """
    groups = _slabs(groups, k, v)
    # Taken apart once: the gradient of a part of a tensor is as long as the tensor, and there are many parts.
    apart = [x.unbind(2) for x in (q, k, v)]
    outputs, parts = [], []
    for chunks, blocks in groups:
        queries, keys, values = (_gathered(x, at) for x, at in zip(apart, (chunks[:, None], blocks, blocks)))
        if extra is not None:
            keys, values = (_extended(x, more) for x, more in zip((keys, values), extra))
        found, shown = _attend_part(queries, keys, values, rule(chunks, blocks), scale, weights)
        outputs.append(found)
        if shown is not None:
            parts.append(Part(chunks, blocks, shown))
    return in_order(outputs, [chunks for chunks, _ in groups]), parts


def in_order(found: list[Tensor], chunks: list[Tensor]) -> Tensor:
    """Put what was found for each list of chunks together (B, H, N, ...), in the order of the chunks."""
    whole, order = torch.cat(found, 2), torch.cat(chunks).tolist()
    if order == sorted(order):
        return whole
    return whole.index_select(2, torch.tensor(order, device=whole.device).argsort())


def _slabs(groups: list[tuple[Tensor, Tensor]], k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The groups, cut so that what one call gathers stays small."""
    if k.device.type != "cpu":
        return groups
    # A copy that outgrows the caches, or the sizes that the C library keeps for reuse, costs as much as its attention.
    a_block = sum(x.element_size() * x[:, :, 0].numel() for x in (k, v))
    slabs = []
    for chunks, blocks in groups:
        at_once = max(1, SLAB_BYTES // (a_block * max(1, blocks.shape[1])))
        slabs += list(zip(split(chunks, at_once), split(blocks, at_once)))
    return slabs


def _attend_part(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None, weights: bool
) -> tuple[Tensor, Tensor | None]:
    """One batched call: q (B, H, N, c, d), k and v (B, Hkv, N, S, d), allowed (b, N, c, S) with b 1 or B."""
    B, H, N, c, _ = q.shape
    b = allowed.shape[0]
    if allowed.shape[-1] == 0:
        nothing = q.new_zeros(B, H, N, c, 0)
        return q.new_zeros(B, H, N, c, v.shape[-1]), nothing if weights else None

    def folded(x: Tensor) -> Tensor:
        # Chunks lead, and heads share a mask; examples join the heads where they share it too, which copies nothing.
        return unflatten(x, 0, (b, -1)).movedim(3, 1).flatten(2, 3).flatten(0, 1)

    def unfolded(x: Tensor) -> Tensor:
        return unflatten(unflatten(x, 0, (b, N)), 2, (-1, H)).movedim(1, 3).flatten(0, 1)

    # Rows that pad the last chunk may see nothing: they attend to anything, so that no kernel meets an empty softmax.
    empty = ~allowed.any(-1, keepdim=True)
    open_ = (allowed | empty).flatten(0, 1).unsqueeze(1)
    found = attend(folded(q), folded(k), folded(v), mask=open_, scale=scale, weights=weights)
    output = unfolded(found.output).masked_fill(empty.unsqueeze(1), 0.0)
    if found.weights is None:
        return output, None
    return output, unfolded(found.weights).masked_fill(empty.unsqueeze(1), 0.0)


def _gathered(parts: tuple[Tensor, ...], at: Tensor) -> Tensor:
    """The parts (B, H, c, d) at ``at`` (N, m), side by side: (B, H, N, m c, d)."""
    if not at.numel():
        B, H, _, d = parts[0].shape
        return parts[0].new_zeros(B, H, len(at), 0, d)
    taken = torch.stack([parts[i] for i in at.flatten().tolist()], 2)
    return unflatten(taken, 2, tuple(at.shape)).flatten(3, 4)


def _extended(x: Tensor, extra: Tensor) -> Tensor:
    """``x`` (B, H, N, S, d), and the extra places (B, H, G, d) after it."""
    return torch.cat([x, extra.unsqueeze(2).expand(-1, -1, x.shape[2], -1, -1)], 3)


def by_count(chosen: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of blocks grouped by how many they see, and which these are."""
    counts = chosen.sum(-1)
    groups = []
    for count in sorted(set(counts.tolist())):
        rows = (counts == count).nonzero().flatten()
        groups.append((rows, chosen[rows].nonzero()[:, 1].view(len(rows), count)))
    return groups


def cut(x: Tensor, n: int, size: int) -> Tensor:
    """(B, H, T, d) as (B, H, n, size, d), with zeros behind the end."""
    missing = n * size - x.shape[2]
    return unflatten(pad(x, (0, 0, 0, missing)) if missing else x, 2, (n, size))
