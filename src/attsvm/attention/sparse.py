r"""Attention that skips work: windows and blocks, with the numbers of dense masked attention at a fraction of its cost.

With $S_i$ the keys that query i may attend to,

$$o_i = \sum_{t \in S_i} w_{it} v_t, \qquad
  w_{it} = \frac{e^{s\, q_i^\top k_t}}{\sum_{u \in S_i} e^{s\, q_i^\top k_u}} ,$$

and only the logits of $t \in S_i$ are needed. Nothing of size (Tq, Tk) exists at any time, unless ``dense()`` of the
weights is asked for.

Shapes: B batch, H query heads, Hkv key-value heads, T tokens, Tq queries, Tk keys, G global tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, unflatten
from torch.nn.functional import pad

from attsvm.attention.chunks import Part, WindowLayout, attend_chunks, by_count, cut, in_order
from attsvm.attention.functional import attend
from attsvm.errors import InvalidInputError

__all__ = [
    "BandedWeights",
    "BlockAttended",
    "BlockWeights",
    "WindowAttended",
    "attend_blocks",
    "attend_window",
]


@dataclass(frozen=True, kw_only=True)
class BandedWeights:
    """The weights of a sliding window, as a band.

    Attributes
    ----------
    band
        (B, H, T, span): ``band[..., i, s]`` is the weight of query i on key ``i + (s - left) * dilation``; 0 where
        there is no such key, where it is masked, where it is a global token, and in the rows of global queries.
    left
        Columns of the band before the query's own: w - 1, or what the sequence has where it is shorter than the
        window. The span is ``left + 1`` if causal, ``2 * left + 1`` if not.
    dilation
        Distance of neighbours in the band.
    global_tokens
        (G,) positions of the global tokens.
    columns
        (B, H, T, G): the weights on the global tokens; 0 in the rows of global queries.
    rows
        (B, H, G, T): the rows of the global queries, whole.
    """

    band: Tensor
    left: int
    dilation: int
    global_tokens: Tensor
    columns: Tensor
    rows: Tensor

    def dense(self) -> Tensor:
        """Return the same weights as (B, H, T, T)."""
        B, H, T, span = self.band.shape
        place = torch.arange(T, device=self.band.device)
        key = place[:, None] + (torch.arange(span, device=self.band.device) - self.left) * self.dilation
        exists = (key >= 0) & (key < T)
        key = key.clamp(0, T - 1).expand(B, H, T, span)
        full = self.band.new_zeros(B, H, T, T).scatter_add(-1, key, self.band.masked_fill(~exists, 0.0))
        if len(self.global_tokens):
            full = full.index_add(-1, self.global_tokens, self.columns)
            full = full.index_copy(2, self.global_tokens, self.rows)
        return full


class WindowAttended(NamedTuple):
    """The output of :func:`attend_window`, and its weights where they were asked for, else None."""

    output: Tensor
    weights: BandedWeights | None


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """The weights of block-sparse attention: those of the chosen blocks.

    Attributes
    ----------
    parts
        Rows of blocks that have equally many, m: ``chunks`` (N,), these rows; ``blocks`` (N, m), theirs in ascending
        order; ``weights`` (B, H, N, block_size, m * block_size), the blocks side by side.
        Places beyond the end are 0.
    block_size
        Queries, and keys, in a block.
    shape
        (B, H, Tq, Tk).
    """

    parts: tuple[Part, ...]
    block_size: int
    shape: tuple[int, int, int, int]

    def dense(self) -> Tensor:
        """Return the same weights as (B, H, Tq, Tk)."""
        B, H, Tq, Tk = self.shape
        size = self.block_size
        n_rows, n_columns = -(-Tq // size), -(-Tk // size)
        first = self.parts[0].weights
        full = first.new_zeros(B, H, n_rows * n_columns, size, size)
        for chunks, blocks, weights in self.parts:
            squares = unflatten(weights, -1, (blocks.shape[1], size)).transpose(3, 4).flatten(2, 3)
            full = full.index_copy(2, (chunks[:, None] * n_columns + blocks).flatten(), squares)
        full = unflatten(full, 2, (n_rows, n_columns)).transpose(3, 4)
        return full.flatten(4, 5).flatten(2, 3)[:, :, :Tq, :Tk]


class BlockAttended(NamedTuple):
    """The output of :func:`attend_blocks`, and its weights where they were asked for, else None."""

    output: Tensor
    weights: BlockWeights | None


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = False,
    dilation: int = 1,
    global_tokens: Sequence[int] | Tensor = (),
    mask: Tensor | None = None,
    scale: float | None = None,
    weights: bool = False,
    chunk: int | None = None,
) -> WindowAttended:
    r"""Sliding-window attention in time and memory linear in the length.

    With dilation r and global tokens g, query i attends to the keys

    $$S_i = \{ i + r u : |u| < w \} \cup g, \qquad u \le 0 \text{ and } t \le i \text{ if causal},$$

    and a global query to every key (up to its own place, if causal).

    Parameters
    ----------
    q
        Queries (B, H, T, d_head).
    k, v
        Keys (B, Hkv, T, d_head) and values (B, Hkv, T, d_value), H a multiple of Hkv.
    window
        w: keys that are seen on one side, the query's own place counted. A causal row has at most w keys, a two-sided
        one 2 w - 1.
    causal
        Whether keys after the query are hidden.
    dilation
        r, distance between neighbouring keys of a window.
    global_tokens
        Positions that every query sees and whose queries see every key. The cost grows with their number.
    mask
        Padding: (B, T) booleans, True = may be attended; (B, 1, 1, T) is taken as well.
    scale
        s; default ``1 / sqrt(d_head)``.
    weights
        Return the weights, as a band.
    chunk
        Queries worked on together; default w, at least 32 and at most 512. Changes speed and memory, never the result.

    Returns
    -------
    WindowAttended
        ``output`` (B, H, T, d_value), and ``weights``, a :class:`BandedWeights`, or None. Rows with no key are 0.

    Raises
    ------
    InvalidInputError
        If an argument does not fit; the message names it.

    Notes
    -----
    With c queries in a chunk about B H T (w + c) logits are computed if causal, B H T (2 w + c) if not, and 2 G B H T
    for G global tokens. A dilated window is a plain one in each of the r subsequences of tokens whose places are equal
    modulo r. Exact: no approximation, the same sums as dense attention under the mask of $S_i$.

    References
    ----------
    Beltagy, Peters, Cohan. "Longformer: The Long-Document Transformer", 2020. arXiv:2004.05150, section 3.1.

    Examples
    --------
    >>> q = k = torch.zeros(1, 1, 4, 2)
    >>> v = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1)
    >>> attend_window(q, k, v, window=2, causal=True, weights=True).output.flatten()
    tensor([1.0000, 1.5000, 2.5000, 3.5000])
    """
    _check_tensors("attend_window", q, k, v)
    B, T = q.shape[0], q.shape[2]
    if k.shape[2] != T:
        raise InvalidInputError(f"attend_window: k must have the length of q, {T}, got {k.shape[2]}.")
    for name, value in (("window", window), ("dilation", dilation), ("chunk", 1 if chunk is None else chunk)):
        _check_positive("attend_window", name, value)
    centre = _check_global(global_tokens, T, q.device)
    seen = _check_mask("attend_window", mask, B, T)
    if T == 0:
        raise InvalidInputError("attend_window: q must hold at least one token, got length 0.")
    # A longer window sees no more, and would make chunks longer than the sequence.
    layout = WindowLayout.of(T, min(window, -(-T // dilation)), causal, dilation, chunk, centre)
    output, band, columns = _attend_window(q, k, v, layout, seen, scale, weights)
    rows = None
    if len(centre):
        allowed = torch.ones(1, 1, T, dtype=torch.bool, device=q.device) if seen is None else seen[:, None, :]
        if causal:
            allowed = allowed & (torch.arange(T, device=q.device) <= centre[:, None])
        whole = attend(q.index_select(2, centre), k, v, mask=allowed.unsqueeze(1), scale=scale, weights=weights)
        output, rows = output.index_copy(2, centre, whole.output), whole.weights
    if band is None or columns is None:
        return WindowAttended(output, None)
    if rows is None:
        rows = band.new_zeros(*band.shape[:2], 0, T)
    band, columns = band.index_fill(2, centre, 0.0), columns.index_fill(2, centre, 0.0)
    found = BandedWeights(
        band=band, left=layout.left, dilation=dilation, global_tokens=centre, columns=columns, rows=rows
    )
    return WindowAttended(output, found)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Tensor,
    block_size: int,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    weights: bool = False,
) -> BlockAttended:
    r"""Block-sparse attention: only the chosen blocks of logits are computed.

    $$S_i = \{ t : \text{layout}[\lfloor i / b \rfloor, \lfloor t / b \rfloor] \}, \qquad
      t \le T_k - T_q + i \text{ if causal}.$$

    Parameters
    ----------
    q
        Queries (B, H, Tq, d_head).
    k, v
        Keys (B, Hkv, Tk, d_head) and values (B, Hkv, Tk, d_value), H a multiple of Hkv.
    layout
        (ceil(Tq / b), ceil(Tk / b)) booleans, True = that block may be attended; as for
        :func:`~attsvm.attention.masks.block_sparse_mask`. Any mask made for as many tokens as there are blocks will
        do: ``bigbird_mask(n_blocks, block_size=1)`` is BigBird's.
    block_size
        b; the last blocks may be shorter.
    causal
        Whether query i of Tq sees the keys up to ``Tk - Tq + i`` only. Blocks that lie in the future are skipped.
    mask
        Padding: (B, Tk) booleans, True = may be attended; (B, 1, 1, Tk) is taken as well.
    scale
        s; default ``1 / sqrt(d_head)``.
    weights
        Return the weights of the chosen blocks.

    Returns
    -------
    BlockAttended
        ``output`` (B, H, Tq, d_value), and ``weights``, a :class:`BlockWeights`, or None. Rows with no key are 0.

    Raises
    ------
    InvalidInputError
        If an argument does not fit; the message names it.

    Notes
    -----
    About B H b^2 logits for each chosen block. Rows of blocks are grouped by how many they see, one batched call a
    group, so that a row that sees everything does not make the others as long.

    References
    ----------
    Child, Gray, Radford, Sutskever. "Generating Long Sequences with Sparse Transformers", 2019. arXiv:1904.10509.
    Zaheer et al. "Big Bird: Transformers for Longer Sequences", 2020. arXiv:2007.14062, section 2 and appendix D.

    Examples
    --------
    >>> q = k = torch.zeros(1, 1, 4, 2)
    >>> v = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1)
    >>> attend_blocks(q, k, v, layout=torch.eye(2, dtype=torch.bool), block_size=2).output.flatten()
    tensor([1.5000, 1.5000, 3.5000, 3.5000])
    """
    _check_tensors("attend_blocks", q, k, v)
    _check_positive("attend_blocks", "block_size", block_size)
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    n_rows, n_columns = -(-Tq // block_size), -(-Tk // block_size)
    if layout.dtype != torch.bool or layout.shape != (n_rows, n_columns):
        raise InvalidInputError(
            f"attend_blocks: layout must be booleans of shape ({n_rows}, {n_columns}) for lengths {Tq} and {Tk} in "
            f"blocks of {block_size}, got {layout.dtype} of shape {tuple(layout.shape)}."
        )
    seen = _check_mask("attend_blocks", mask, B, Tk)
    last = torch.arange(n_rows * block_size, device=q.device).clamp(max=Tq - 1) + Tk - Tq
    chosen = layout.to(q.device)
    if causal:
        starts = torch.arange(n_columns, device=q.device) * block_size
        chosen = chosen & (starts <= last[block_size - 1 :: block_size, None])
    everything = torch.ones(1, Tk, dtype=torch.bool, device=q.device)
    there = everything if seen is None else seen
    there = unflatten(pad(there, (0, n_columns * block_size - Tk)), 1, (n_columns, block_size))
    last = unflatten(last, 0, (n_rows, block_size))

    def rule(rows: Tensor, columns: Tensor) -> Tensor:
        allowed = there[:, columns].flatten(2).unsqueeze(2).expand(-1, -1, block_size, -1)
        if causal:
            places = columns[..., None] * block_size + torch.arange(block_size, device=q.device)
            allowed = allowed & (places.flatten(1)[:, None] <= last[rows][..., None])
        return allowed

    q, k, v = (cut(x, n, block_size) for x, n in ((q, n_rows), (k, n_columns), (v, n_columns)))
    output, parts = attend_chunks(q, k, v, by_count(chosen), rule, scale, weights)
    output = output.flatten(2, 3)[:, :, :Tq]
    if not weights:
        return BlockAttended(output, None)
    return BlockAttended(output, BlockWeights(parts=tuple(parts), block_size=block_size, shape=(B, H, Tq, Tk)))


def _attend_window(
    q: Tensor, k: Tensor, v: Tensor, layout: WindowLayout, seen: Tensor | None, scale: float | None, weights: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows of all queries as if none were global: output, band, and the weights on global tokens."""
    centre, B = layout.centre, q.shape[0]
    places = layout.places()
    there = places < layout.length
    there = (there & torch.isin(places, centre, invert=True) if len(centre) else there)[None]
    if seen is not None:
        there = there & unflatten(layout.cut(seen[:, None, :, None])[:, 0, :, :, 0], 0, (B, -1))
    central = seen[:, centre] if seen is not None else torch.ones(1, len(centre), dtype=torch.bool, device=q.device)
    if layout.dilation > 1:
        there, central = there.expand(B, -1, -1, -1), central.expand(B, -1)
    there = there.flatten(0, 1)

    def rule(chunks: Tensor, blocks: Tensor) -> Tensor:
        inside = torch.arange(layout.chunk, device=q.device)
        own, key = chunks[:, None] * layout.chunk + inside, blocks[..., None] * layout.chunk + inside
        step = key.flatten(1)[:, None, :] - own[:, :, None]
        allowed = (step >= -layout.left) & (step <= layout.right)
        allowed = allowed & there[:, blocks].flatten(2).unsqueeze(2)
        if not len(centre):
            return allowed
        first = central[:, None, None, None, :].expand(-1, layout.dilation, *own.shape, -1)
        if layout.causal:
            first = first & (centre <= places[:, chunks][..., None])
        return torch.cat([allowed, first.flatten(0, 1)], -1)

    extra = None
    if len(centre):
        extra = tuple(x.index_select(2, centre).repeat_interleave(layout.dilation, 0) for x in (k, v))
    q, k, v = (layout.cut(x) for x in (q, k, v))
    output, parts = attend_chunks(q, k, v, layout.groups(), rule, scale, weights, extra)
    if not weights:
        return layout.joined(output), None, None
    chunks = [part.chunks for part in parts]
    band = in_order([layout.band(part) for part in parts], chunks)
    # The global tokens come last.
    columns = in_order([part.weights[..., part.weights.shape[-1] - len(centre) :] for part in parts], chunks)
    return layout.joined(output), layout.joined(band), layout.joined(columns)


def _check_tensors(where: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or not x.is_floating_point() or x.dtype != q.dtype:
            raise InvalidInputError(
                f"{where}: {name} must be floating point of shape (B, H, T, d_head), of one dtype, got {x.dtype} of "
                f"shape {tuple(x.shape)}."
            )
        if x.shape[2] == 0:
            raise InvalidInputError(f"{where}: {name} must hold at least one token, got length 0.")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise InvalidInputError(
            f"{where}: k must have the batch size and d_head of q {tuple(q.shape)}, got {tuple(k.shape)}."
        )
    if v.shape[:3] != k.shape[:3]:
        raise InvalidInputError(
            f"{where}: v must have the batch, heads and length of k {tuple(k.shape)}, got {tuple(v.shape)}."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InvalidInputError(
            f"{where}: the heads of q must be a multiple of those of k and v, got {q.shape[1]} and {k.shape[1]}."
        )


def _check_positive(where: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(f"{where}: {name} must be an integer of at least 1, got {value!r}.")


def _check_global(tokens: Sequence[int] | Tensor, T: int, device: torch.device) -> Tensor:
    """The global places (G,), ascending, none twice."""
    places = torch.as_tensor(tokens, device=device)
    if places.ndim != 1 or (len(places) and (places.is_floating_point() or places.dtype == torch.bool)):
        raise InvalidInputError(f"attend_window: global_tokens must be a list of places, got {tokens!r}.")
    places = torch.tensor(sorted(set(places.tolist())), dtype=torch.long, device=device)
    wrong = places[(places < 0) | (places >= T)]
    if len(wrong):
        raise InvalidInputError(f"attend_window: global_tokens must lie in [0, {T}), got {int(wrong[0])}.")
    return places


def _check_mask(where: str, mask: Tensor | None, B: int, T: int) -> Tensor | None:
    """The padding mask as (B, T)."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((B, T), (B, 1, 1, T)):
        raise InvalidInputError(
            f"{where}: mask must be booleans of shape ({B}, {T}), True = may be attended, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}."
        )
    return mask.reshape(B, T)
