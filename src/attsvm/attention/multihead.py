r"""Multi-head attention: linear maps to queries, keys and values, attention in every head, one linear map out.

For a query token x and a key token c, head h has the logit

$$a^h = s\,(W_K^{h\top} c)^\top (W_Q^{h\top} x) = c^\top W^h x, \qquad W^h = s\, W_K^h W_Q^{h\top} ,$$

so that a head may be held as two thin matrices (``parameterization="KQ"``) or as their product (``"W"``): the
matrix of which the theory of max-margin token selection speaks.

Shapes: B batch, T queries, S keys, D d_model, C d_context, H heads, G key-value heads, E d_head.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from attsvm.attention.cache import KeyValueCache
from attsvm.attention.functional import BACKENDS, Attended, attend
from attsvm.attention.positions import Rotary, RotaryTables
from attsvm.errors import InvalidInputError, UnsupportedError

__all__ = ["MultiHeadAttention", "check_head_sizes"]

PARAMETERIZATIONS = ("KQ", "W")


class MultiHeadAttention(nn.Module):
    r"""Self-attention, or cross-attention where a context is given.

    Parameters
    ----------
    d_model
        Size of the tokens x, and of the output.
    n_heads
        H, query heads.
    n_kv_heads
        G, heads of keys and values, a divisor of H: H (the default) is multi-head, 1 is multi-query attention.
    d_head
        Size of a head; default ``d_model // n_heads``, which must then divide.
    d_context
        Size of the tokens attended to; default ``d_model``.
    bias, output_bias
        Biases of query, key and value; of output (default: as ``bias``). W has none: with ``"W"``, ``bias`` is that
        of value alone.
    parameterization
        ``"KQ"``: modules ``query`` and ``key``. ``"W"``: one parameter ``W`` (H, d_context, d_model) in their place.
    scale
        s; default ``1 / sqrt(d_head)`` with ``"KQ"``, and 1 with ``"W"``.
    rotary
        Rotation of queries and keys, ``"KQ"`` self-attention only.
    backend
        See :func:`~attsvm.attention.functional.attend`.
    dropout
        Of the weights, in training mode only.

    Notes
    -----
    ``W`` starts normal with standard deviation ``1 / sqrt(d_context d_model)``, so that tokens of unit-variance
    coordinates get logits of variance 1; the linear maps start as ``nn.Linear`` does.

    References
    ----------
    Vaswani et al. "Attention Is All You Need", 2017. arXiv:1706.03762, section 3.2.2.
    Shazeer. "Fast Transformer Decoding", 2019. arXiv:1911.02150 (multi-query). Ainslie et al. "GQA", 2023.
    arXiv:2305.13245 (grouped).

    Examples
    --------
    >>> layer = MultiHeadAttention(d_model=8, n_heads=4, n_kv_heads=2)
    >>> output, weights = layer(torch.ones(1, 3, 8), causal=True, weights=True)
    >>> tuple(output.shape), tuple(weights.shape)
    ((1, 3, 8), (1, 4, 3, 3))
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        d_context: int | None = None,
        bias: bool = True,
        output_bias: bool | None = None,
        parameterization: str = "KQ",
        scale: float | None = None,
        rotary: Rotary | None = None,
        backend: str = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        d_context = d_model if d_context is None else d_context
        if d_context < 1:
            raise InvalidInputError(f"MultiHeadAttention: d_context must be >= 1, got {d_context}.")
        n_kv_heads, d_head = check_head_sizes("MultiHeadAttention", d_model, n_heads, n_kv_heads, d_head)
        _check_options(parameterization, backend, dropout, rotary, d_head)
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.d_head, self.d_context = d_head, d_context
        self.parameterization, self.backend, self.dropout, self.rotary = parameterization, backend, dropout, rotary
        self.scale = (1.0 / math.sqrt(d_head) if parameterization == "KQ" else 1.0) if scale is None else float(scale)
        if parameterization == "KQ":
            self.query = nn.Linear(d_model, n_heads * d_head, bias=bias)
            self.key = nn.Linear(d_context, n_kv_heads * d_head, bias=bias)
        else:
            self.W = nn.Parameter(torch.empty(n_heads, d_context, d_model))
            nn.init.normal_(self.W, std=1.0 / math.sqrt(d_context * d_model))
        self.value = nn.Linear(d_context, n_kv_heads * d_head, bias=bias)
        self.output = nn.Linear(n_heads * d_head, d_model, bias=bias if output_bias is None else output_bias)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        positions: Tensor | RotaryTables | None = None,
        cache: KeyValueCache | None = None,
        layer: Hashable = 0,
        weights: bool = False,
    ) -> Attended:
        r"""Attend from x to the context, or to x itself.

        Parameters
        ----------
        x
            Tokens (B, T, d_model) that ask.
        context
            Tokens (B, S, d_context) that are attended to; default x.
        mask, bias, causal
            As in :func:`~attsvm.attention.functional.attend`, over all S keys, those of the cache included.
        positions
            Places (T,) or (B, T) of x for the rotary part, or tables made of them; default: following the cache.
        cache, layer
            Keys and values so far, of this layer. Self-attention appends to them. Cross-attention fills an empty
            layer from the context and afterwards reads it, so give it a cache of its own.
        weights
            Return the weights too.

        Returns
        -------
        Attended
            ``output`` (B, T, d_model); ``weights`` (B, H, T, S) or None.
        """
        if x.ndim != 3 or x.shape[2] != self.d_model:
            raise InvalidInputError(
                f"MultiHeadAttention: x must be (B, T, d_model = {self.d_model}), got {tuple(x.shape)}."
            )
        if context is not None and self.rotary is not None:
            raise UnsupportedError("MultiHeadAttention: rotary positions are for self-attention; context must be None.")
        q = self._queries(x)
        if context is not None and cache is not None and layer in cache:
            k, v = cache[layer]
        else:
            q, k, v = self._keys_values(x, q, context, positions, cache, layer)
            if cache is not None:
                k, v = cache.update(layer, k, v)
        output, probabilities = attend(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            causal=causal,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
            weights=weights,
        )
        return Attended(self.output(output.transpose(1, 2).flatten(2)), probabilities)

    def combined(self) -> Tensor:
        r"""$W^h = s\, W_K^h W_Q^{h\top}$ (H, d_context, d_model): the logit of key c for query x is $c^\top W^h x$.

        Raises
        ------
        UnsupportedError
            If a query bias or a rotary part makes logits something else than $c^\top W x$ (a bias of the key adds the
            same to all keys of a query, which attention does not see).
        """
        if self.parameterization == "W":
            return self.scale * self.W
        if self.rotary is not None:
            raise UnsupportedError("combined: with rotary positions W depends on the distance of query and key.")
        if self.query.bias is not None and bool((self.query.bias != 0).any()):
            raise UnsupportedError("combined: the query has a bias; append a 1 to the tokens to make it part of W.")
        W_Q = self.query.weight.view(self.n_heads, self.d_head, self.d_model)
        W_K = self.key.weight.view(self.n_kv_heads, self.d_head, self.d_context)
        return self.scale * W_K.repeat_interleave(self.n_heads // self.n_kv_heads, 0).mT @ W_Q

    def extra_repr(self) -> str:
        """Sizes, for ``print(layer)``."""
        return (
            f"d_model={self.d_model}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, d_head={self.d_head}, "
            f"parameterization={self.parameterization!r}, scale={self.scale:.4g}, backend={self.backend!r}"
        )

    def _queries(self, x: Tensor) -> Tensor:
        if self.parameterization == "KQ":
            return self._heads(self.query(x), self.n_heads)
        return x[:, None] @ self.W.mT  # (B, H, T, C): what each head looks for among the context's own coordinates

    def _keys_values(
        self,
        x: Tensor,
        q: Tensor,
        context: Tensor | None,
        positions: Tensor | RotaryTables | None,
        cache: KeyValueCache | None,
        layer: Hashable,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of new tokens, and the queries rotated like the keys."""
        source = x if context is None else context
        if source.ndim != 3 or source.shape[0] != x.shape[0] or source.shape[2] != self.d_context:
            raise InvalidInputError(
                f"MultiHeadAttention: context must be (B = {x.shape[0]}, S, d_context = {self.d_context}), "
                f"got {'none and x of shape ' if context is None else ''}{tuple(source.shape)}."
            )
        v = self._heads(self.value(source), self.n_kv_heads)
        if self.parameterization == "W":
            return q, source[:, None].expand(-1, self.n_kv_heads, -1, -1), v
        k = self._heads(self.key(source), self.n_kv_heads)
        if self.rotary is not None:
            if positions is None:
                past = 0 if cache is None else cache.length_of(layer)
                positions = torch.arange(past, past + x.shape[1], device=x.device)
            q, k = self.rotary(q, k, positions)
        return q, k, v

    def _heads(self, x: Tensor, n_heads: int) -> Tensor:
        return x.view(*x.shape[:2], n_heads, self.d_head).transpose(1, 2)


def check_head_sizes(
    where: str, d_model: int, n_heads: int, n_kv_heads: int | None, d_head: int | None
) -> tuple[int, int]:
    """Make sure that heads divide what they share; return ``n_kv_heads`` and ``d_head`` with their defaults.

    Raises
    ------
    InvalidInputError
        If they do not, or a size is below 1.
    """
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    sizes = {
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": 1 if d_head is None else d_head,
    }
    for name, size in sizes.items():
        if size < 1:
            raise InvalidInputError(f"{where}: {name} must be >= 1, got {size}.")
    if n_heads % n_kv_heads:
        raise InvalidInputError(f"{where}: n_kv_heads must divide n_heads ({n_heads}), got {n_kv_heads}.")
    if d_head is None and d_model % n_heads:
        raise InvalidInputError(
            f"{where}: n_heads must divide d_model ({d_model}) where d_head is not given, got {n_heads}."
        )
    return n_kv_heads, d_model // n_heads if d_head is None else d_head


def _check_options(parameterization: str, backend: str, dropout: float, rotary: Rotary | None, d_head: int) -> None:
    if parameterization not in PARAMETERIZATIONS:
        raise InvalidInputError(f'MultiHeadAttention: parameterization must be "KQ" or "W", got {parameterization!r}.')
    if backend not in BACKENDS:
        raise InvalidInputError(f"MultiHeadAttention: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if not 0.0 <= dropout < 1.0:
        raise InvalidInputError(f"MultiHeadAttention: dropout must be in [0, 1), got {dropout}.")
    if rotary is not None and parameterization == "W":
        raise UnsupportedError('MultiHeadAttention: rotary turns queries and keys, which parameterization "W" has not.')
    if rotary is not None and rotary.d_head != d_head:
        raise InvalidInputError(
            f"MultiHeadAttention: rotary must be for heads of size {d_head}, got one for {rotary.d_head}."
        )
