"""Reading a problem: every shape and value is checked once, here, and every message names the argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.selection.arrays import Array, as_bool, as_float, as_index, as_tensor, is_ragged, kind_of, pad_ragged

__all__ = [
    "as_came",
    "first",
    "read_allowed",
    "read_margin",
    "read_offsets",
    "read_queries",
    "read_scores",
    "read_selected",
    "read_tokens",
    "require_finite",
]


def as_came(tensor: Tensor, original: Any) -> Any:
    """``tensor`` as NumPy or torch, as ``original`` (an array or a Kind) was."""
    kind = original if hasattr(original, "back") else kind_of(original)
    return kind.back(tensor)


def first(values: Tensor, bad: Tensor) -> Any:
    """The first value marked as bad, for a message."""
    return values[bad].flatten()[0].item()


def place(bad: Tensor, X: Tensor) -> str:
    """The first True of ``bad`` in words; its axes begin as those of ``X`` do."""
    place = bad.nonzero()[0].tolist()
    return f"sequence {place[0]}" if X.ndim == 3 else f"problem {place[0]}, sequence {place[1]}"


def require_finite(tensor: Tensor, name: str, where: str) -> None:
    """Refuse NaN and infinity."""
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        place = tuple((~finite).nonzero()[0].tolist())
        raise InvalidInputError(f"{where}: {name} must be finite, got {tensor[place].item()} at {place}.")


def read_tokens(tokens: Array, where: str) -> tuple[Tensor, Tensor]:
    """Tokens (…, n, T, d) and which of them are real, (…, n, T)."""
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


def read_queries(queries: Array, X: Tensor, where: str) -> Tensor:
    """Queries (…, n, Q, d), in the dtype of the tokens."""
    if is_ragged(queries) and len({len(item) for item in queries}) > 1:
        Z, _ = pad_ragged(queries, "queries", where=where)
        Z = Z.to(device=X.device)
    else:
        stacked = torch.stack([as_float(q, "queries", where=where) for q in queries]) if is_ragged(queries) else queries
        Z = as_float(stacked, "queries", where=where, device=X.device)
    given = tuple(Z.shape)
    if Z.ndim == X.ndim - 1:
        Z = Z.unsqueeze(-2)
    if Z.ndim != X.ndim or Z.shape[:-2] != X.shape[:-2] or Z.shape[-1] != X.shape[-1] or Z.shape[-2] == 0:
        lead = ("B, " if X.ndim == 4 else "") + "n"
        raise InvalidInputError(
            f"{where}: queries must have shape ({lead}, d) or ({lead}, Q, d) with "
            f"({lead}) = {tuple(X.shape[:-2])} and d = {X.shape[-1]} as in tokens, got {given}."
        )
    return Z.to(X.dtype)


def per_query(tensor: Tensor, shape: tuple[int, ...], name: str, where: str) -> Tensor:
    """Give (…, T) values a query axis; check against (…, Q, T)."""
    if tensor.ndim == len(shape) - 1 and tuple(tensor.shape) == (*shape[:-2], shape[-1]):
        tensor = tensor.unsqueeze(-2)
    if tuple(tensor.shape) not in (shape, (*shape[:-2], 1, shape[-1])):
        raise InvalidInputError(
            f"{where}: {name} must have shape {(*shape[:-2], shape[-1])} or {shape}, got {tuple(tensor.shape)}."
        )
    return tensor.expand(shape)


def read_allowed(allowed: Array | None, real: Tensor, X: Tensor, Z: Tensor, where: str) -> Tensor:
    """What each query may attend to, (…, n, Q, T): allowed and real."""
    shape = (*X.shape[:-2], Z.shape[-2], X.shape[-2])
    may = real.unsqueeze(-2).expand(shape)
    if allowed is not None:
        if is_ragged(allowed) and len({len(item) for item in allowed}) > 1:
            rows = [as_bool(item, "allowed", where=where, device=X.device) for item in allowed]
            allowed = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        elif is_ragged(allowed):
            allowed = torch.stack([as_bool(item, "allowed", where=where, device=X.device) for item in allowed])
        may = may & per_query(as_bool(allowed, "allowed", where=where, device=X.device), shape, "allowed", where)
    empty = ~may.any(-1).any(-1)
    if bool(empty.any()):
        raise InvalidInputError(f"{where}: every sequence needs an allowed token, {place(empty, X)} has none.")
    return may


def read_selected(selected: Array, may: Tensor, X: Tensor, Z: Tensor, where: str) -> Tensor:
    """Selected tokens (…, n, Q, T), all of them allowed."""
    T, Q = may.shape[-1], may.shape[-2]
    values = _listed(selected, where)
    if values.dtype == torch.bool:
        chosen = per_query(values.to(X.device), tuple(may.shape), "selected", where).clone()
    else:
        index = as_index(values, "selected", where=where, device=X.device)
        given = tuple(index.shape)
        if Q == 1 and index.ndim == may.ndim - 2:
            index = index.unsqueeze(-1)
        if tuple(index.shape) != tuple(may.shape[:-1]):
            raise InvalidInputError(
                f"{where}: selected must hold one token id for each query, shape {tuple(may.shape[:-1])}, or booleans "
                f"of shape {tuple(may.shape)}, got {given}."
            )
        bad = (index < -1) | (index >= T)
        if bool(bad.any()):
            raise InvalidInputError(
                f"{where}: selected must hold token ids in [0, {T}), got {first(index, bad)} at {place(bad, X)}. "
                "Ids are zero-based; -1 asks nothing."
            )
        chosen = torch.zeros(may.shape, dtype=torch.bool, device=X.device)
        chosen.scatter_(-1, index.clamp(min=0).unsqueeze(-1), (index >= 0).unsqueeze(-1))
    masked = chosen & ~may
    if bool(masked.any()):
        token = int(masked.nonzero()[0, -1])
        raise InvalidInputError(
            f"{where}: selected tokens must be allowed, token {token} of {place(masked, X)} is masked."
        )
    return chosen


def _listed(selected: Array, where: str) -> Tensor:
    if not is_ragged(selected):
        return as_tensor(selected, "selected", where=where)
    rows = [as_tensor(item, "selected", where=where) for item in selected]
    if len({row.shape for row in rows}) > 1:
        raise InvalidInputError(f"{where}: selected must be a rectangular array, got ragged lists.")
    return torch.stack(rows)


def read_offsets(offsets: Array | None, may: Tensor, where: str) -> Tensor | None:
    """Offsets (…, n, Q, T), 0 where masked, or None."""
    if offsets is None:
        return None
    bias = per_query(as_float(offsets, "offsets", where=where, device=may.device), tuple(may.shape), "offsets", where)
    bias = torch.where(may, bias, torch.zeros((), dtype=bias.dtype, device=bias.device))
    require_finite(bias, "offsets", where)
    return bias


def read_margin(margin: Array, may: Tensor, where: str) -> Tensor:
    """The margin asked for, () or (…, n, Q, T), in float64."""
    tensor = as_float(margin, "margin", where=where, device=may.device).to(torch.float64)
    if tensor.ndim:
        tensor = per_query(tensor, tuple(may.shape), "margin", where).clone()
    if not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
        bad = ~(torch.isfinite(tensor) & (tensor >= 0))
        raise InvalidInputError(f"{where}: margin must be finite and >= 0, got {first(tensor, bad)}.")
    return tensor


def read_scores(scores: Array, allowed: Tensor, *, where: str) -> Tensor:
    """Check token scores (n, T) or (n, Q, T) against ``allowed`` (n, Q, T); return (n, Q, T)."""
    tensor = as_float(scores, "scores", where=where, device=allowed.device)
    tensor = per_query(tensor, tuple(allowed.shape), "scores", where)
    tensor = torch.where(allowed, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
    require_finite(tensor, "scores", where)
    return tensor
