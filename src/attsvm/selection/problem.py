"""The one object that everything rests on: which tokens each query keeps, and which it drops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.selection import geometry
from attsvm.selection.arrays import Array, as_bool, as_float, as_index, as_tensor, is_ragged, kind_of, pad_ragged
from attsvm.selection.duplicates import merged_tokens

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
        X, real = _read_tokens(tokens, where)
        Z = _read_queries(queries, X, where)
        may = _read_allowed(allowed, real, X, Z, where)
        chosen = _read_selected(selected, may, X, Z, where)
        bias = _read_offsets(offsets, may, where)
        self.is_batch = X.ndim == 4
        X = torch.where(may.any(-2)[..., None], X, torch.zeros((), dtype=X.dtype, device=X.device))
        used = chosen.any(-1)[..., None] | torch.isfinite(Z)
        Z = torch.where(used, Z, torch.zeros((), dtype=Z.dtype, device=Z.device))
        _require_finite(X, "tokens", where)
        _require_finite(Z, "queries", where)
        merged = merged_tokens(X, may & ~chosen, chosen, bias)
        asked = may & ~chosen & ~merged & chosen.any(-1, keepdim=True)
        self._merged = merged
        self.tensors = ProblemTensors(X, Z, may, chosen, asked, bias, _read_margin(margin, may, where))

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
        X, real = _read_tokens(tokens, where)
        index = as_index(query, "query", where=where, device=X.device)
        T = X.shape[-2]
        bad = (index < -T) | (index >= T)
        if bool(bad.any()):
            raise InvalidInputError(f"{where}: query must be a token id in [0, {T}), got {_first(index, bad)}.")
        index = torch.broadcast_to(index % T, X.shape[:-2])
        queries = torch.take_along_dim(X, index[..., None, None], -2)
        may = real if mask is None else real & as_bool(mask, "mask", where=where, device=X.device)
        return cls(
            _as_came(X, tokens),
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
        X, real = _read_tokens(tokens, where)
        if mask is not None:
            real = real & as_bool(mask, "mask", where=where, device=X.device)
        may = real[..., None, :] & real[..., :, None]
        if causal:
            may = may & torch.ones(X.shape[-2], X.shape[-2], dtype=torch.bool, device=X.device).tril()
        return cls(_as_came(X, tokens), X, selected, allowed=may, offsets=offsets, margin=margin)

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
        X, real = _read_tokens(tokens, where)
        may = _read_allowed(allowed, real, X, _read_queries(queries, X, where), where)
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
        _require_finite(tensor, "W", where)
        return tensor.to(torch.promote_types(tensor.dtype, self.tensors.tokens.dtype))

    def with_selected(self, selected: Array) -> TokenSelection:
        """The same tokens, queries, masks, offsets and margin with another selection."""
        t = self.tensors
        return TokenSelection(
            _as_came(t.tokens, self.kind),
            t.queries,
            selected,
            allowed=t.allowed,
            offsets=t.offsets,
            margin=t.margin if t.margin.ndim else float(t.margin),
        )

    def __getitem__(self, index: int) -> TokenSelection:
        """Problem ``index`` of a batch."""
        if not self.is_batch:
            raise InvalidInputError("TokenSelection: only a batch of problems (tokens with four axes) can be indexed.")
        t = self.tensors
        return TokenSelection(
            _as_came(t.tokens[index], self.kind),
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


# -------------------------------------------------------------------- reading and checking


def _as_came(tensor: Tensor, original: Any) -> Any:
    """``tensor`` as NumPy or torch, as ``original`` (an array or a Kind) was."""
    kind = original if hasattr(original, "back") else kind_of(original)
    return kind.back(tensor)


def _first(values: Tensor, bad: Tensor) -> Any:
    return values[bad].flatten()[0].item()


def _place(bad: Tensor, X: Tensor) -> str:
    """The first True of ``bad`` in words; its axes begin as those of ``X`` do."""
    place = bad.nonzero()[0].tolist()
    return f"sequence {place[0]}" if X.ndim == 3 else f"problem {place[0]}, sequence {place[1]}"


def _require_finite(tensor: Tensor, name: str, where: str) -> None:
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        place = tuple((~finite).nonzero()[0].tolist())
        raise InvalidInputError(f"{where}: {name} must be finite, got {tensor[place].item()} at {place}.")


def _read_tokens(tokens: Array, where: str) -> tuple[Tensor, Tensor]:
    if is_ragged(tokens):
        X, real = pad_ragged(tokens, "tokens", where=where)
    else:
        X = as_float(tokens, "tokens", where=where)
        if X.ndim not in (3, 4):
            raise InvalidInputError(
                f"{where}: tokens must have shape (n, T, d), or (B, n, T, d) for a batch, got {tuple(X.shape)}."
            )
        real = torch.ones(X.shape[:-1], dtype=torch.bool, device=X.device)
    if 0 in X.shape:
        names = ("B", "n", "T", "d")[-X.ndim :]
        sizes = ", ".join(f"{name}={size}" for name, size in zip(names, X.shape, strict=True))
        raise InvalidInputError(f"{where}: tokens must have at least one sequence, token and dimension, got {sizes}.")
    return X, real


def _read_queries(queries: Array, X: Tensor, where: str) -> Tensor:
    if is_ragged(queries) and len({len(item) for item in queries}) > 1:
        Z, _ = pad_ragged(queries, "queries", where=where)
        Z = Z.to(device=X.device)
    else:
        stacked = torch.stack([as_float(q, "queries", where=where) for q in queries]) if is_ragged(queries) else queries
        Z = as_float(stacked, "queries", where=where, device=X.device)
    if Z.ndim == X.ndim - 1:
        Z = Z.unsqueeze(-2)
    if Z.ndim != X.ndim or Z.shape[:-2] != X.shape[:-2] or Z.shape[-1] != X.shape[-1] or Z.shape[-2] == 0:
        lead = ("B, " if X.ndim == 4 else "") + "n"
        raise InvalidInputError(
            f"{where}: queries must have shape ({lead}, d) or ({lead}, Q, d) with "
            f"({lead}) = {tuple(X.shape[:-2])} and d = {X.shape[-1]} as in tokens, got {tuple(Z.shape)}."
        )
    return Z.to(X.dtype)


def _per_query(tensor: Tensor, shape: tuple[int, ...], name: str, where: str) -> Tensor:
    """Give (…, T) values a query axis; check against (…, Q, T)."""
    if tensor.ndim == len(shape) - 1 and tuple(tensor.shape) == (*shape[:-2], shape[-1]):
        tensor = tensor.unsqueeze(-2)
    if tuple(tensor.shape) not in (shape, (*shape[:-2], 1, shape[-1])):
        raise InvalidInputError(
            f"{where}: {name} must have shape {(*shape[:-2], shape[-1])} or {shape}, got {tuple(tensor.shape)}."
        )
    return tensor.expand(shape)


def _read_allowed(allowed: Array | None, real: Tensor, X: Tensor, Z: Tensor, where: str) -> Tensor:
    shape = (*X.shape[:-2], Z.shape[-2], X.shape[-2])
    may = real.unsqueeze(-2).expand(shape)
    if allowed is not None:
        if is_ragged(allowed) and len({len(item) for item in allowed}) > 1:
            rows = [as_bool(item, "allowed", where=where, device=X.device) for item in allowed]
            allowed = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        elif is_ragged(allowed):
            allowed = torch.stack([as_bool(item, "allowed", where=where, device=X.device) for item in allowed])
        may = may & _per_query(as_bool(allowed, "allowed", where=where, device=X.device), shape, "allowed", where)
    empty = ~may.any(-1).any(-1)
    if bool(empty.any()):
        raise InvalidInputError(f"{where}: every sequence needs an allowed token, {_place(empty, X)} has none.")
    return may


def _read_selected(selected: Array, may: Tensor, X: Tensor, Z: Tensor, where: str) -> Tensor:
    T, Q = may.shape[-1], may.shape[-2]
    values = _read_listed(selected, where)
    if values.dtype == torch.bool:
        chosen = _per_query(values.to(X.device), tuple(may.shape), "selected", where).clone()
    else:
        index = as_index(values, "selected", where=where, device=X.device)
        if Q == 1 and index.ndim == may.ndim - 2:
            index = index.unsqueeze(-1)
        if tuple(index.shape) != tuple(may.shape[:-1]):
            raise InvalidInputError(
                f"{where}: selected must hold one token id for each query, shape {tuple(may.shape[:-1])}, or booleans "
                f"of shape {tuple(may.shape)}, got {tuple(index.shape)}."
            )
        bad = (index < -1) | (index >= T)
        if bool(bad.any()):
            raise InvalidInputError(
                f"{where}: selected must hold token ids in [0, {T}), got {_first(index, bad)} at {_place(bad, X)}. "
                "Ids are zero-based; -1 asks nothing."
            )
        chosen = torch.zeros(may.shape, dtype=torch.bool, device=X.device)
        chosen.scatter_(-1, index.clamp(min=0).unsqueeze(-1), (index >= 0).unsqueeze(-1))
    masked = chosen & ~may
    if bool(masked.any()):
        token = int(masked.nonzero()[0, -1])
        raise InvalidInputError(
            f"{where}: selected tokens must be allowed, token {token} of {_place(masked, X)} is masked."
        )
    return chosen


def _read_listed(selected: Array, where: str) -> Tensor:
    if not is_ragged(selected):
        return as_tensor(selected, "selected", where=where)
    rows = [as_tensor(item, "selected", where=where) for item in selected]
    if len({row.shape for row in rows}) > 1:
        raise InvalidInputError(f"{where}: selected must be a rectangular array, got ragged lists.")
    return torch.stack(rows)


def _read_offsets(offsets: Array | None, may: Tensor, where: str) -> Tensor | None:
    if offsets is None:
        return None
    bias = _per_query(as_float(offsets, "offsets", where=where, device=may.device), tuple(may.shape), "offsets", where)
    bias = torch.where(may, bias, torch.zeros((), dtype=bias.dtype, device=bias.device))
    _require_finite(bias, "offsets", where)
    return bias


def _read_margin(margin: Array, may: Tensor, where: str) -> Tensor:
    tensor = as_float(margin, "margin", where=where, device=may.device).to(torch.float64)
    if tensor.ndim:
        tensor = _per_query(tensor, tuple(may.shape), "margin", where).clone()
    if not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
        bad = ~(torch.isfinite(tensor) & (tensor >= 0))
        raise InvalidInputError(f"{where}: margin must be finite and >= 0, got {_first(tensor, bad)}.")
    return tensor


def read_scores(scores: Array, allowed: Tensor, *, where: str) -> Tensor:
    """Check token scores (n, T) or (n, Q, T) against ``allowed`` (n, Q, T); return (n, Q, T)."""
    tensor = as_float(scores, "scores", where=where, device=allowed.device)
    tensor = _per_query(tensor, tuple(allowed.shape), "scores", where)
    tensor = torch.where(allowed, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
    _require_finite(tensor, "scores", where)
    return tensor
