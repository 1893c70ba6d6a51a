"""The one object that everything rests on: which tokens each query keeps, and which it drops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.selection import geometry
from attsvm.selection.arrays import Array, as_bool, as_float, as_index, kind_of
from attsvm.selection.duplicates import merged_tokens
from attsvm.selection.reading import (
    as_came,
    first,
    read_allowed,
    read_margin,
    read_offsets,
    read_queries,
    read_scores,
    read_selected,
    read_tokens,
    require_finite,
)

__all__ = ["ProblemTensors", "TokenSelection"]


class ProblemTensors(NamedTuple):
    """The checked content of a problem. All have a leading B where the problem is a batch."""

    tokens: Tensor  # (n, T, d) float
    queries: Tensor  # (n, Q, d) float
    allowed: Tensor  # (n, Q, T) bool
    selected: Tensor  # (n, Q, T) bool
    asked: Tensor  # (n, Q, T) bool: the rows (x_selected - x_t)^T W z >= margin that are in force
    offsets: Tensor | None  # (n, Q, T) float
    margin: Tensor  # () or (n, Q, T) float

    def cut(self, chosen: Any) -> ProblemTensors:
        """The part at an index of leading axes: members of a batch, or ``(..., sequences, slice(None), slice(None))``.

        A margin that is one number stays it.
        """
        parts = {name: value[chosen] for name, value in self._asdict().items() if value is not None and value.ndim > 0}
        return self._replace(**parts)


class TokenSelection:
    r"""Tokens, queries, and the tokens that each query selects.

    The logit of token $t$ of sequence $i$ for query $q$ is

    $$x_{it}^\top W z_{iq} + b_{iqt} ,$$

    and the problem asks that every selected token $a$ beats every other allowed token $t$ by the margin:

    $$(x_{ia} - x_{it})^\top W z_{iq} + b_{iqa} - b_{iqt} \ge \text{margin}.$$

    Selected tokens of one query have equal logits. ``W`` is ``W_K @ W_Q.T`` for keys ``X @ W_K`` and queries
    ``Z @ W_Q``.

    Parameters
    ----------
    tokens
        (n, T, d), or a list of n arrays (T_i, d); with four axes (B, n, T, d), a batch of B problems.
    queries
        (n, d), one query a sequence, or (n, Q, d); with a leading B for a batch.
    selected
        Indices (n,) or (n, Q), where -1 means that this query asks nothing, or booleans (n, Q, T), which may
        select several tokens.
    allowed
        (n, T) or (n, Q, T) booleans, True = may be attended. Default: all real tokens.
    offsets
        (n, Q, T) or (n, T) additive logits, such as a relative bias. Default: none.
    margin
        The margin asked for, in logits: a number >= 0, or (n, Q, T).

    Raises
    ------
    InvalidInputError
        If a shape does not fit, a value is not finite, a sequence has no allowed token, or a selected token is
        out of range or not allowed.

    Notes
    -----
    A query with no allowed unselected token asks nothing. Tokens that equal a selected token of the same query
    bit for bit (offsets included) cannot be separated from it: they are not constrained, and ``merged`` lists
    them. Tokens that no query may attend to are never used; they are set to zero.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898.

    Examples
    --------
    >>> problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0])
    >>> problem.margins([[2.0, 0.0], [0.0, 0.0]])
    array([[[inf,  2.]]])
    """

    def __init__(
        self,
        tokens: Array,
        queries: Array,
        selected: Array,
        *,
        allowed: Array | None = None,
        offsets: Array | None = None,
        margin: Array = 1.0,
    ) -> None:
        where = "TokenSelection"
        self.kind = kind_of(tokens)
        X, real = read_tokens(tokens, where)
        Z = read_queries(queries, X, where)
        may = read_allowed(allowed, real, X, Z, where)
        chosen = read_selected(selected, may, X, Z, where)
        bias = read_offsets(offsets, may, where)
        self.is_batch = X.ndim == 4
        X = torch.where(may.any(-2)[..., None], X, torch.zeros((), dtype=X.dtype, device=X.device))
        used = chosen.any(-1)[..., None] | torch.isfinite(Z)
        Z = torch.where(used, Z, torch.zeros((), dtype=Z.dtype, device=Z.device))
        require_finite(X, "tokens", where)
        require_finite(Z, "queries", where)
        merged = merged_tokens(X, may & ~chosen, chosen, bias)
        asked = may & ~chosen & ~merged & chosen.any(-1, keepdim=True)
        self._merged = merged
        self.tensors = ProblemTensors(X, Z, may, chosen, asked, bias, read_margin(margin, may, where))

    @classmethod
    def self_attention(
        cls,
        tokens: Array,
        selected: Array,
        *,
        query: Any = 0,
        mask: Array | None = None,
        offsets: Array | None = None,
        margin: Array = 1.0,
    ) -> TokenSelection:
        """Self-attention with one query a sequence: the query is the sequence's own token ``query``.

        Parameters
        ----------
        tokens
            (n, T, d) or a list of (T_i, d).
        selected
            As in :class:`TokenSelection`.
        query
            Index of the query token, one for all or (n,). Negative counts from the end of the padded axis.
        mask
            (n, T), True = may be attended. The query token itself need not be allowed.
        offsets
            As in :class:`TokenSelection`.
        margin
            As in :class:`TokenSelection`.
        """
        where = "TokenSelection.self_attention"
        X, real = read_tokens(tokens, where)
        index = as_index(query, "query", where=where, device=X.device)
        T = X.shape[-2]
        bad = (index < -T) | (index >= T)
        if bool(bad.any()):
            raise InvalidInputError(f"{where}: query must be a token id in [0, {T}), got {first(index, bad)}.")
        index = torch.broadcast_to(index % T, X.shape[:-2])
        queries = torch.take_along_dim(X, index[..., None, None], -2)
        may = real if mask is None else real & as_bool(mask, "mask", where=where, device=X.device)
        return cls(
            as_came(X, tokens),
            queries,
            selected,
            allowed=may,
            offsets=offsets,
            margin=margin,
        )

    @classmethod
    def sequence(
        cls,
        tokens: Array,
        selected: Array,
        *,
        causal: bool = False,
        mask: Array | None = None,
        offsets: Array | None = None,
        margin: Array = 1.0,
    ) -> TokenSelection:
        """Every token is a query of its own sequence (Q = T); with ``causal``, token k sees tokens 0..k.

        Parameters
        ----------
        tokens
            (n, T, d) or a list of (T_i, d). They are not copied per query.
        selected
            (n, T) indices, -1 for a query that asks nothing, or (n, T, T) booleans.
        causal
            Whether a query may attend to itself and earlier tokens only.
        mask
            (n, T), True = a real token; padded tokens are neither keys nor queries.
        offsets
            (n, T, T), as in :class:`TokenSelection`.
        margin
            As in :class:`TokenSelection`.
        """
        where = "TokenSelection.sequence"
        X, real = read_tokens(tokens, where)
        if mask is not None:
            real = real & as_bool(mask, "mask", where=where, device=X.device)
        may = real[..., None, :] & real[..., :, None]
        if causal:
            may = may & torch.ones(X.shape[-2], X.shape[-2], dtype=torch.bool, device=X.device).tril()
        return cls(as_came(X, tokens), X, selected, allowed=may, offsets=offsets, margin=margin)

    @classmethod
    def from_scores(
        cls,
        tokens: Array,
        queries: Array,
        scores: Array,
        *,
        allowed: Array | None = None,
        offsets: Array | None = None,
        margin: Array = 1.0,
    ) -> TokenSelection:
        """Each query keeps its allowed token of highest score (the first one of equals).

        Parameters
        ----------
        tokens
            As in :class:`TokenSelection`.
        queries
            As in :class:`TokenSelection`.
        scores
            (n, T), or (n, Q, T).
        allowed
            As in :class:`TokenSelection`.
        offsets
            As in :class:`TokenSelection`.
        margin
            As in :class:`TokenSelection`.
        """
        where = "TokenSelection.from_scores"
        X, real = read_tokens(tokens, where)
        may = read_allowed(allowed, real, X, read_queries(queries, X, where), where)
        best = geometry.best_tokens(read_scores(scores, may, where=where), may)
        return cls(tokens, queries, best, allowed=may, offsets=offsets, margin=margin)

    # ---------------------------------------------------------------- what came in, as it came

    @property
    def tokens(self) -> Any:
        """(n, T, d), padded with zeros."""
        return self.kind.back(self.tensors.tokens)

    @property
    def queries(self) -> Any:
        """(n, Q, d)."""
        return self.kind.back(self.tensors.queries)

    @property
    def allowed(self) -> Any:
        """(n, Q, T) booleans, True = may be attended."""
        return self.kind.back(self.tensors.allowed)

    @property
    def selected(self) -> Any:
        """(n, Q, T) booleans."""
        return self.kind.back(self.tensors.selected)

    @property
    def offsets(self) -> Any:
        """(n, Q, T) additive logits, or None."""
        return None if self.tensors.offsets is None else self.kind.back(self.tensors.offsets)

    @property
    def margin(self) -> Any:
        """The margin asked for: a number, or (n, Q, T)."""
        margin = self.tensors.margin
        return float(margin) if margin.ndim == 0 else self.kind.back(margin)

    @property
    def merged(self) -> Any:
        """(k, 3) int64: sequence, query and token of every duplicate that is not constrained; (k, 4) in a batch."""
        return self.kind.back(self._merged.nonzero())

    # ---------------------------------------------------------------- sizes

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(n, Q, T, d)``: sequences, queries a sequence, tokens a sequence, dimension."""
        tokens, queries = self.tensors.tokens, self.tensors.queries
        return tokens.shape[-3], queries.shape[-2], tokens.shape[-2], tokens.shape[-1]

    @property
    def batch_size(self) -> int | None:
        """B for a batch of problems, None for a single one."""
        return self.tensors.tokens.shape[0] if self.is_batch else None

    @property
    def n_constraints(self) -> int:
        """Number of margin rows in force (over the whole batch)."""
        return int(self.tensors.asked.sum())

    # ---------------------------------------------------------------- geometry

    def logits(self, W: Array) -> Any:
        """Logits (n, Q, T) of every token under ``W`` (d, d), offsets included; masked tokens get -inf."""
        W = self.matrix(W, "logits")
        return self.kind.back(geometry.logits(self.tensors, W))

    def margins(self, W: Array) -> Any:
        """Margins (n, Q, T): smallest selected logit minus the token's logit; +inf where nothing is asked."""
        W = self.matrix(W, "margins")
        return self.kind.back(geometry.margins(self.tensors, W))

    def matrix(self, W: Array, where: str) -> Tensor:
        """Check a key-query matrix (d, d), or (B, d, d) in a batch, and return it as a tensor of the tokens' dtype."""
        d = self.shape[-1]
        tensor = as_float(W, "W", where=where, device=self.tensors.tokens.device)
        expected = [(d, d)] if not self.is_batch else [(d, d), (self.batch_size, d, d)]
        if tuple(tensor.shape) not in expected:
            raise InvalidInputError(f"{where}: W must have shape {expected[-1]}, got {tuple(tensor.shape)}.")
        require_finite(tensor, "W", where)
        return tensor.to(torch.promote_types(tensor.dtype, self.tensors.tokens.dtype))

    def with_selected(self, selected: Array) -> TokenSelection:
        """The same tokens, queries, masks, offsets and margin with another selection."""
        t = self.tensors
        return TokenSelection(
            as_came(t.tokens, self.kind),
            t.queries,
            selected,
            allowed=t.allowed,
            offsets=t.offsets,
            margin=t.margin if t.margin.ndim else float(t.margin),
        )

    def with_margin(self, margin: Array) -> TokenSelection:
        """The same selection with another margin asked for: a number, or (n, Q, T)."""
        t = self.tensors
        return TokenSelection(
            as_came(t.tokens, self.kind), t.queries, t.selected, allowed=t.allowed, offsets=t.offsets, margin=margin
        )

    def __getitem__(self, index: int) -> TokenSelection:
        """Problem ``index`` of a batch."""
        if not self.is_batch:
            raise InvalidInputError("TokenSelection: only a batch of problems (tokens with four axes) can be indexed.")
        t = self.tensors
        return TokenSelection(
            as_came(t.tokens[index], self.kind),
            t.queries[index],
            t.selected[index],
            allowed=t.allowed[index],
            offsets=None if t.offsets is None else t.offsets[index],
            margin=t.margin[index] if t.margin.ndim else float(t.margin),
        )

    def __len__(self) -> int:
        """Number of problems in a batch, 1 otherwise."""
        return self.batch_size or 1

    def __repr__(self) -> str:
        n, Q, T, d = self.shape
        batch = f"B={self.batch_size}, " if self.is_batch else ""
        return f"TokenSelection({batch}n={n}, Q={Q}, T={T}, d={d}, constraints={self.n_constraints})"
