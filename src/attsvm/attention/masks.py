r"""Which keys a query may attend to: booleans, True = may be attended.

Every mask here broadcasts to (B, H, Tq, Tk), so masks are joined with ``&`` (both allow it) and ``|`` (one of them
does). Where queries and keys differ in number, query i of Tq stands at place $p_i = T_k - T_q + i$: the last query is
the last key, as with a key-value cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = [
    "block_sparse_mask",
    "bigbird_mask",
    "causal_mask",
    "check_padding",
    "dilated_mask",
    "global_local_mask",
    "padding_mask",
    "prefix_mask",
    "show",
    "sliding_window_mask",
    "strided_mask",
    "threshold_mask",
    "top_k_mask",
]

Device = torch.device | str | None


def padding_mask(attention_mask: Tensor) -> Tensor:
    """Let no query attend to padding.

    Parameters
    ----------
    attention_mask
        (B, T), True or 1 = a real token, False or 0 = padding: the meaning it has in Hugging Face's tokenizers.

    Returns
    -------
    Tensor
        Booleans (B, 1, 1, T).

    Examples
    --------
    >>> padding_mask(torch.tensor([[1, 1, 0]]))
    tensor([[[[ True,  True, False]]]])
    """
    if attention_mask.ndim != 2:
        raise InvalidInputError(f"padding_mask: attention_mask must be (B, T), got {tuple(attention_mask.shape)}.")
    if attention_mask.dtype != torch.bool:
        if bool(((attention_mask != 0) & (attention_mask != 1)).any()):
            # Additive masks (0 and -inf) and class masks (0, 1, 2) mean something else, and would pass silently.
            raise InvalidInputError("padding_mask: attention_mask must hold booleans or 0 and 1 (1 = a real token).")
        attention_mask = attention_mask.to(torch.bool)
    return attention_mask[:, None, None, :]


def check_padding(mask: Tensor, ids: Tensor, pad_id: int) -> None:
    """Refuse a padding mask that means the opposite: True on padding, False on tokens.

    Parameters
    ----------
    mask
        (B, T) or (B, 1, 1, T), True or 1 = may be attended.
    ids
        Token ids (B, T).
    pad_id
        The id of padding. It may occur among real tokens too (models that pad with their end-of-text token).

    Raises
    ------
    InvalidInputError
        If the mask is inverted, or allows no token at all, or does not have the shape of ids.
    """
    if mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise InvalidInputError(
            f"check_padding: mask must be (B, T) like ids {tuple(ids.shape)}, got {tuple(mask.shape)}."
        )
    allowed, real = mask.to(torch.bool), ids != pad_id
    if not bool(real.any()) or bool((allowed & real).any()):
        return
    if bool(allowed.any()):
        raise InvalidInputError(
            f"check_padding: mask must be True on tokens, got True only on padding (id {pad_id}): it is inverted. "
            "Give ~mask, as True means that a token may be attended."
        )
    raise InvalidInputError(
        "check_padding: mask must be True on tokens, got False everywhere: it is inverted, or allows nothing. "
        "True means that a token may be attended."
    )


def causal_mask(n_queries: int, n_keys: int | None = None, *, device: Device = None) -> Tensor:
    """Keys at places up to the query's own, $t <= p_i$: booleans (Tq, Tk).

    Examples
    --------
    >>> print(show(causal_mask(3)))
    ■ · ·
    ■ ■ ·
    ■ ■ ■
    """
    n_keys = _check_lengths("causal_mask", n_queries, n_keys)
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def prefix_mask(n_queries: int, n_keys: int | None = None, *, prefix: int | Tensor, device: Device = None) -> Tensor:
    """Causal, but a prefix is seen by all: prefix language models, and the question before an answer.

    Parameters
    ----------
    n_queries, n_keys
        Tq and Tk (default Tq).
    prefix
        Number of keys in the prefix, or one number a sequence, (B,).
    device
        Of the mask.

    Returns
    -------
    Tensor
        (Tq, Tk), or (B, 1, Tq, Tk) for a prefix of each sequence.

    Examples
    --------
    >>> print(show(prefix_mask(4, prefix=2)))
    ■ ■ · ·
    ■ ■ · ·
    ■ ■ ■ ·
    ■ ■ ■ ■
    """
    n_keys = _check_lengths("prefix_mask", n_queries, n_keys)
    lengths = torch.as_tensor(prefix, device=device)
    if lengths.ndim > 1 or lengths.is_floating_point() or bool(((lengths < 0) | (lengths > n_keys)).any()):
        raise InvalidInputError(
            f"prefix_mask: prefix must be a whole number in [0, {n_keys}], or (B,) of them, got {prefix}."
        )
    keys = torch.arange(n_keys, device=lengths.device)
    seen = keys < lengths if lengths.ndim == 0 else (keys < lengths[:, None])[:, None, None]
    return causal_mask(n_queries, n_keys, device=lengths.device) | seen


def sliding_window_mask(
    n_queries: int, n_keys: int | None = None, *, window: int, causal: bool = False, device: Device = None
) -> Tensor:
    r"""Keys near the query: booleans (Tq, Tk).

    Parameters
    ----------
    n_queries, n_keys
        Tq and Tk (default Tq).
    window
        w: keys that are seen on one side, the query's own place counted: $|p_i - t| < w$. A causal row has at most w
        keys (as in Mistral), a two-sided one 2 w - 1.
    causal
        Only keys up to the query.
    device
        Of the mask.

    References
    ----------
    Beltagy, Peters, Cohan. "Longformer", 2020. arXiv:2004.05150, section 3.1.

    Examples
    --------
    >>> print(show(sliding_window_mask(4, window=2, causal=True)))
    ■ · · ·
    ■ ■ · ·
    · ■ ■ ·
    · · ■ ■
    """
    return dilated_mask(n_queries, n_keys, window=window, dilation=1, causal=causal, device=device)


def dilated_mask(
    n_queries: int,
    n_keys: int | None = None,
    *,
    window: int,
    dilation: int,
    causal: bool = False,
    device: Device = None,
) -> Tensor:
    """Keys of a sliding window with gaps: every ``dilation``-th key, so that the window reaches that much further.

    ``window`` counts in keys that are seen, as in :func:`sliding_window_mask`, which this is for dilation 1.

    Examples
    --------
    >>> print(show(dilated_mask(5, window=2, dilation=2, causal=True)))
    ■ · · · ·
    · ■ · · ·
    ■ · ■ · ·
    · ■ · ■ ·
    · · ■ · ■
    """
    _at_least_one("dilated_mask", window=window, dilation=dilation)
    back = _back("dilated_mask", n_queries, n_keys, device)
    near = (back >= 0) & (back < window * dilation) if causal else back.abs() < window * dilation
    return near & (back % dilation == 0)


def global_local_mask(
    n_queries: int,
    n_keys: int | None = None,
    *,
    window: int,
    dilation: int = 1,
    causal: bool = False,
    global_tokens: Sequence[int] | Tensor,
    device: Device = None,
) -> Tensor:
    """A sliding window, and some places that see all and are seen by all.

    Parameters
    ----------
    n_queries, n_keys, window, dilation, causal
        As in :func:`dilated_mask`; with ``causal``, global places too see and show only what is not later.
    global_tokens
        Places among the keys, for instance ``[0]`` for the first token.
    device
        Of the mask.

    Examples
    --------
    >>> print(show(global_local_mask(5, window=2, global_tokens=[0])))
    ■ ■ ■ ■ ■
    ■ ■ ■ · ·
    ■ ■ ■ ■ ·
    ■ · ■ ■ ■
    ■ · · ■ ■
    """
    local = dilated_mask(n_queries, n_keys, window=window, dilation=dilation, causal=causal, device=device)
    n_keys = local.shape[1]
    if n_queries > n_keys:
        raise InvalidInputError(
            f"global_local_mask: n_queries must be at most n_keys ({n_keys}), as queries are places, got {n_queries}."
        )
    places = torch.as_tensor(global_tokens, dtype=torch.long, device=local.device)
    if places.ndim != 1 or bool(((places < 0) | (places >= n_keys)).any()):
        raise InvalidInputError(
            f"global_local_mask: global_tokens must be places in [0, {n_keys}), got {places.tolist()}."
        )
    chosen = torch.zeros(n_keys, dtype=torch.bool, device=local.device)
    chosen[places] = True
    rows = chosen[n_keys - n_queries :]  # queries are the last places
    joined = local | chosen | rows[:, None]
    return joined & causal_mask(n_queries, n_keys, device=local.device) if causal else joined


def block_sparse_mask(layout: Tensor, block_size: int, n_queries: int, n_keys: int | None = None) -> Tensor:
    """Whole blocks of queries and keys: entry (a, b) of the layout allows block a of queries to see block b of keys.

    Parameters
    ----------
    layout
        Booleans (..., ceil(Tq / block_size), ceil(Tk / block_size)), for instance one for each head.
    block_size
        Tokens in a block; the last one may be cut off.
    n_queries, n_keys
        Tq and Tk (default Tq).

    Returns
    -------
    Tensor
        Booleans (..., Tq, Tk).

    Examples
    --------
    >>> print(show(block_sparse_mask(torch.eye(2, dtype=torch.bool), 2, 4)))
    ■ ■ · ·
    ■ ■ · ·
    · · ■ ■
    · · ■ ■
    """
    _at_least_one("block_sparse_mask", block_size=block_size)
    n_keys = _check_lengths("block_sparse_mask", n_queries, n_keys)
    wanted = (-(-n_queries // block_size), -(-n_keys // block_size))
    if layout.dtype != torch.bool or layout.ndim < 2 or tuple(layout.shape[-2:]) != wanted:
        raise InvalidInputError(
            f"block_sparse_mask: layout must be boolean of shape (..., {wanted[0]}, {wanted[1]}), got {layout.dtype} "
            f"of shape {tuple(layout.shape)}."
        )
    spread = layout.repeat_interleave(block_size, -2).repeat_interleave(block_size, -1)
    return spread[..., :n_queries, :n_keys]


def bigbird_mask(
    n_tokens: int,
    *,
    block_size: int,
    n_window: int = 3,
    n_global: int = 1,
    n_random: int = 3,
    seed: int = 0,
    device: Device = None,
) -> Tensor:
    """BigBird's pattern of blocks: a window, global blocks at both ends, and random ones for each block of queries.

    Parameters
    ----------
    n_tokens
        T, queries and keys.
    block_size
        Tokens in a block.
    n_window
        Blocks in the window, odd.
    n_global
        Global blocks at the beginning, and as many at the end.
    n_random
        Further blocks for each block of queries, drawn among those it does not see yet (all of them, where fewer are
        left).
    seed
        Of the draw.
    device
        Of the mask.

    Returns
    -------
    Tensor
        Booleans (T, T).

    References
    ----------
    Zaheer et al. "Big Bird: Transformers for Longer Sequences", 2020. arXiv:2007.14062, section 2.
    """
    _at_least_one("bigbird_mask", n_tokens=n_tokens, block_size=block_size, n_window=n_window)
    if n_window % 2 == 0 or n_global < 0 or n_random < 0:
        raise InvalidInputError(
            "bigbird_mask: n_window must be odd and n_global and n_random >= 0, "
            f"got {n_window}, {n_global} and {n_random}."
        )
    blocks = -(-n_tokens // block_size)
    layout = sliding_window_mask(blocks, window=n_window // 2 + 1)
    ends = torch.zeros(blocks, dtype=torch.bool)
    ends[:n_global] = True
    ends[max(blocks - n_global, 0) :] = n_global > 0
    layout |= ends | ends[:, None]
    # The unseen blocks with the highest of random keys: as many as are wanted, none twice.
    keys = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(seed))
    if n_random:
        layout |= top_k_mask(keys, n_random, mask=~layout)
    return block_sparse_mask(layout.to(device), block_size, n_tokens)


def strided_mask(n_queries: int, n_keys: int | None = None, *, stride: int, device: Device = None) -> Tensor:
    r"""The last ``stride`` keys and every ``stride``-th before, causal: with two such layers all places are reached.

    $0 \le p_i - t <$ stride, or $p_i - t \ge 0$ a multiple of the stride.

    References
    ----------
    Child, Gray, Radford, Sutskever. "Generating Long Sequences with Sparse Transformers", 2019. arXiv:1904.10509,
    section 4.3.

    Examples
    --------
    >>> print(show(strided_mask(6, stride=2)))
    ■ · · · · ·
    ■ ■ · · · ·
    ■ ■ ■ · · ·
    · ■ ■ ■ · ·
    ■ · ■ ■ ■ ·
    · ■ · ■ ■ ■
    """
    _at_least_one("strided_mask", stride=stride)
    back = _back("strided_mask", n_queries, n_keys, device)
    return (back >= 0) & ((back < stride) | (back % stride == 0))


def top_k_mask(scores: Tensor, k: int, *, mask: Tensor | None = None) -> Tensor:
    """The k keys of highest score of every query; of equal scores the earlier key.

    Parameters
    ----------
    scores
        (..., Tq, Tk), logits or weights.
    k
        Keys kept; queries that may see fewer keep those.
    mask
        Keys that may be chosen at all; booleans that broadcast to the scores. The result is within it.
    """
    _at_least_one("top_k_mask", k=k)
    allowed = _check_scores("top_k_mask", scores, mask)
    ranked = scores if mask is None else scores.masked_fill(~allowed, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(allowed).scatter(-1, order, True) & allowed


def threshold_mask(scores: Tensor, threshold: float, *, mask: Tensor | None = None) -> Tensor:
    """Keys whose score (..., Tq, Tk) is at least the threshold, within ``mask``."""
    return (scores >= threshold) & _check_scores("threshold_mask", scores, mask)


def show(mask: Tensor, *, queries: Sequence[str] | None = None, keys: Sequence[str] | None = None) -> str:
    """Return a mask as text: a row for each query, ``■`` where it may attend and ``·`` where not.

    Parameters
    ----------
    mask
        Booleans (..., Tq, Tk); leading axes (batch, heads) become titled blocks.
    queries, keys
        Tokens to write at the rows, and above the columns (from top to bottom).

    Examples
    --------
    >>> print(show(causal_mask(3), queries=["The", "black", "cat"]))
      The ■ · ·
    black ■ ■ ·
      cat ■ ■ ■
    """
    _check_drawable("show", mask, queries, keys)
    if mask.ndim == 2:
        return _text(mask, queries, keys)
    blocks = [
        f"[{', '.join(str(int(i)) for i in place)}]\n{_text(mask[tuple(place)], queries, keys)}"
        for place in torch.cartesian_prod(*(torch.arange(size) for size in mask.shape[:-2])).view(-1, mask.ndim - 2)
    ]
    return "\n\n".join(blocks)


def _text(mask: Tensor, queries: Sequence[str] | None, keys: Sequence[str] | None) -> str:
    margin = max((len(word) for word in queries), default=0) if queries is not None else 0
    indent = " " * (margin + 1) if queries is not None else ""
    lines = []
    if keys is not None:
        height = max((len(word) for word in keys), default=0)
        columns = [word.rjust(height) for word in keys]
        lines = [(indent + " ".join(column[row] for column in columns)).rstrip() for row in range(height)]
    for i, row in enumerate(mask.tolist()):
        head = f"{queries[i].rjust(margin)} " if queries is not None else ""
        lines.append(head + " ".join("■" if allowed else "·" for allowed in row))
    return "\n".join(lines)


def _check_drawable(where: str, mask: Tensor, queries: Sequence[str] | None, keys: Sequence[str] | None) -> None:
    if mask.dtype != torch.bool or mask.ndim < 2:
        raise InvalidInputError(
            f"{where}: mask must be boolean of shape (..., Tq, Tk), got {mask.dtype} of shape {tuple(mask.shape)}."
        )
    for name, words, size in (("queries", queries, mask.shape[-2]), ("keys", keys, mask.shape[-1])):
        if words is not None and len(words) != size:
            raise InvalidInputError(f"{where}: {name} must have {size} words, one for each, got {len(words)}.")


def _check_scores(where: str, scores: Tensor, mask: Tensor | None) -> Tensor:
    """What may be chosen, with the shape of the scores."""
    if not scores.is_floating_point() or scores.ndim < 2:
        raise InvalidInputError(
            f"{where}: scores must be floating point of shape (..., Tq, Tk), got {scores.dtype} of shape "
            f"{tuple(scores.shape)}."
        )
    if mask is None:
        return torch.ones_like(scores, dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise InvalidInputError(f"{where}: mask must be boolean (True = may be attended), got {mask.dtype}.")
    try:
        return mask.expand(scores.shape)
    except RuntimeError:
        raise InvalidInputError(
            f"{where}: mask must broadcast to the scores {tuple(scores.shape)}, got shape {tuple(mask.shape)}."
        ) from None


def _back(where: str, n_queries: int, n_keys: int | None, device: Device) -> Tensor:
    """How far back each key lies, $p_i - t$, (Tq, Tk)."""
    n_keys = _check_lengths(where, n_queries, n_keys)
    places = torch.arange(n_keys - n_queries, n_keys, device=device)
    return places[:, None] - torch.arange(n_keys, device=device)


def _check_lengths(where: str, n_queries: int, n_keys: int | None) -> int:
    n_keys = n_queries if n_keys is None else n_keys
    _at_least_one(where, n_queries=n_queries, n_keys=n_keys)
    return n_keys


def _at_least_one(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InvalidInputError(f"{where}: {name} must be >= 1, got {size}.")
