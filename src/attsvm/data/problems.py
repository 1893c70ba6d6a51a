"""A problem that a user brings as a file of arrays: what ``attsvm solve`` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attsvm.data.array_files import AnyArray, hash_arrays, load_arrays
from attsvm.data.files import preview
from attsvm.errors import InvalidInputError
from attsvm.selection import TokenSelection

__all__ = ["FileProblem", "read_problem"]

_WHERE = "solve"
# Each quantity and the keys that it may have in a file; what verify's files hold besides is known and not used.
_KEYS: dict[str, tuple[str, ...]] = {
    "tokens": ("tokens", "X"),
    "queries": ("queries", "z", "Z"),
    "selected": ("selected",),
    "scores": ("scores",),
    "allowed": ("allowed", "mask"),
    "lengths": ("lengths",),
    "offsets": ("offsets",),
    "margin": ("margin",),
    "center": ("center",),
    "sequence": ("sequence",),
    "causal": ("causal",),
}
_UNUSED = ("y", "Y", "labels")
_FLAGS = ("sequence", "causal")
# Arrays with one entry for all sequences; the others have an axis of sequences (of problems, in a batch) first.
_COMMON = (*_FLAGS, "center")


@dataclass(frozen=True, kw_only=True, eq=False)
class FileProblem:
    """A problem from a file, or the share of it that one of several processes holds.

    Attributes
    ----------
    problem
        The selection. Results are float64 whatever the type of the tokens.
    center
        (d, d) or (B, d, d): minimise the change from it; or None.
    total
        Sequences in the file, or problems where it holds a batch.
    source
        The file.
    content_hash
        SHA-256 (hexadecimal) over all arrays of the file that are used.
    """

    problem: TokenSelection
    center: AnyArray | None
    total: int
    source: str
    content_hash: str


def read_problem(path: Path | str, *, rank: int = 0, size: int = 1) -> FileProblem:
    """Read and check the problem in an ``.npz`` or ``.safetensors`` file. Pickled objects are never read.

    ===============  ==================  ===========================================================================
    key              shape               meaning
    ===============  ==================  ===========================================================================
    tokens or X      (n, T, d)           the tokens; (B, n, T, d) for a batch of problems, all others alike
    queries, z, Z    (n, d), (n, Q, d)   the queries; when absent, the first token of each sequence
    selected         (n,), (n, Q)        index of the selected token, -1 where nothing is asked; or booleans
                                         (n, T), (n, Q, T)
    scores           (n, T), (n, Q, T)   in place of ``selected``: the allowed token of highest score is selected
    allowed, mask    (n, T), (n, Q, T)   True or 1 = may be attended; when absent, all
    lengths          (n,)                real tokens of each sequence; those beyond are padding
    offsets          (n, T), (n, Q, T)   additive logits
    margin           (), (n, Q, T)       the margin asked for, 1 when absent
    center           (d, d)              minimise the change from this matrix
    sequence         ()                  True: every token is a query of its own sequence
    causal           ()                  True: with ``sequence``, a query sees itself and the tokens before it
    ===============  ==================  ===========================================================================

    Parameters
    ----------
    path
        The file. Labels (``y``, ``labels``) may be in it and are not used; any other key is refused.
    rank, size
        Keep the sequences ``rank::size`` (in a batch, the problems), the share of one of ``size`` processes.

    Raises
    ------
    InvalidInputError
        If the file is not what its suffix says, a key is missing, unknown or occurs under two names, or an array has
        a wrong shape, type or value; the message names the key.
    """
    path = Path(path)
    given = _known(load_arrays(path, _WHERE), path)
    total = _check_tokens(given["tokens"], path)
    content_hash = hash_arrays(**given)
    if total < size:
        raise InvalidInputError(f"{_WHERE}: {path} must hold a sequence for each of the {size} processes, got {total}.")
    share = {name: _share(name, value, total, rank, size) for name, value in given.items()}
    try:
        problem, center = _built(share, path)
    except InvalidInputError:
        # The same mistake in the whole file, so that the message counts sequences as the file does.
        if size > 1:
            _built(given, path)
        raise
    # The bounds are those of W in float64, so that is how W goes back, from tokens of any type.
    problem.kind = dataclasses.replace(problem.kind, dtype=torch.float64)
    return FileProblem(problem=problem, center=center, total=total, source=str(path), content_hash=content_hash)


def _known(content: Mapping[str, AnyArray], path: Path) -> dict[str, AnyArray]:
    """The arrays by quantity; every key must be known, and every quantity given once."""
    names = {key: quantity for quantity, keys in _KEYS.items() for key in keys}
    unknown = [key for key in content if key not in names and key not in _UNUSED]
    if unknown:
        raise InvalidInputError(
            f"{_WHERE}: {path} must hold no other keys than {', '.join(names)}, got {preview(unknown)}."
        )
    found: dict[str, AnyArray] = {}
    for quantity, keys in _KEYS.items():
        present = [key for key in keys if key in content]
        if len(present) > 1:
            raise InvalidInputError(f"{_WHERE}: {quantity} must be given once, got the keys {' and '.join(present)}.")
        if present:
            found[quantity] = _plain(present[0], content[present[0]], path)
    if "tokens" not in found:
        raise InvalidInputError(f"{_WHERE}: {path} must hold the key tokens (or X), got {preview(content)}.")
    if ("selected" in found) == ("scores" in found):
        got = "both" if "selected" in found else preview(content)
        raise InvalidInputError(f"{_WHERE}: {path} must hold one of the keys selected and scores, got {got}.")
    return found


def _plain(key: str, value: AnyArray, path: Path) -> AnyArray:
    """Real numbers or booleans, in a type that torch has too."""
    if value.dtype.kind not in "fiub":
        raise InvalidInputError(f"{_WHERE}: {path}: {key} must hold real numbers, got the type {value.dtype}.")
    if value.dtype.kind == "f" and value.dtype.itemsize > 8:
        value = value.astype(np.float64)
    return value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))


def _check_tokens(tokens: AnyArray, path: Path) -> int:
    """The number of sequences, or of problems in a batch."""
    if tokens.ndim not in (3, 4):
        raise InvalidInputError(
            f"{_WHERE}: {path}: tokens must have shape (n, T, d), or (B, n, T, d) for a batch, got {tokens.shape}."
        )
    if 0 in tokens.shape:
        raise InvalidInputError(f"{_WHERE}: {path}: tokens must not be empty, got the shape {tokens.shape}.")
    return len(tokens)


def _share(name: str, value: AnyArray, total: int, rank: int, size: int) -> AnyArray:
    """The part of an array that a process keeps."""
    alone = value.ndim == 0 or (name in _COMMON and value.ndim < 3) or len(value) != total
    return value if size == 1 or alone else np.ascontiguousarray(value[rank::size])


def _built(arrays: Mapping[str, AnyArray], path: Path) -> tuple[TokenSelection, AnyArray | None]:
    """The problem and the centre; what the problem finds wrong is said of the file."""
    try:
        return _problem(arrays), _center(arrays)
    except InvalidInputError as error:
        raise InvalidInputError(f"{_WHERE}: {path}: {str(error).partition(': ')[2]}") from error


def _problem(arrays: Mapping[str, AnyArray]) -> TokenSelection:
    tokens = arrays["tokens"]
    sequence, causal = _flag(arrays, "sequence"), _flag(arrays, "causal")
    if causal and not sequence:
        raise InvalidInputError(f"{_WHERE}: causal must come with sequence = true.")
    if sequence and "queries" in arrays:
        raise InvalidInputError(f"{_WHERE}: queries must be absent where sequence is true; the tokens are the queries.")
    others = {name: arrays[name] for name in ("offsets", "margin") if name in arrays}
    if "margin" in others and others["margin"].size == 1:
        others["margin"] = others["margin"].reshape(())
    allowed = _allowed(arrays, sequence=sequence, causal=causal)
    queries = tokens if sequence else arrays.get("queries", tokens[..., 0, :])
    if "scores" in arrays:
        return TokenSelection.from_scores(tokens, queries, arrays["scores"], allowed=allowed, **others)
    return TokenSelection(tokens, queries, arrays["selected"], allowed=allowed, **others)


def _flag(arrays: Mapping[str, AnyArray], key: str) -> bool:
    """A single true or false."""
    if key not in arrays:
        return False
    value = arrays[key]
    if value.size != 1 or value.item() not in (0, 1):
        raise InvalidInputError(f"{_WHERE}: {key} must be one value, true or false, got {preview(value.flat)}.")
    return bool(value.item())


def _allowed(arrays: Mapping[str, AnyArray], *, sequence: bool, causal: bool) -> AnyArray | None:
    """What each query may attend to: allowed, real and, with ``causal``, not after it."""
    tokens, allowed = arrays["tokens"], arrays.get("allowed")
    real = _real(arrays["lengths"], tokens.shape) if "lengths" in arrays else None
    if not sequence:
        if real is None or allowed is None:
            return allowed if real is None else real
        return _booleans(allowed, tokens.shape) & (real if allowed.ndim < tokens.ndim else real[..., None, :])
    if allowed is not None:
        allowed = _booleans(allowed, tokens.shape)
        if allowed.shape != tokens.shape[:-1]:
            raise InvalidInputError(
                f"{_WHERE}: allowed must have shape {tokens.shape[:-1]} where sequence is true, got {allowed.shape}."
            )
        real = allowed if real is None else real & allowed
    if real is None:
        real = np.ones(tokens.shape[:-1], dtype=np.bool_)
    may = real[..., None, :] & real[..., :, None]
    return np.tril(may) if causal else may


def _real(lengths: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """(…, n, T): the tokens within the length of their sequence."""
    if lengths.dtype.kind not in "iu":
        raise InvalidInputError(f"{_WHERE}: lengths must hold integers, got the type {lengths.dtype}.")
    if lengths.shape != shape[:-2]:
        raise InvalidInputError(f"{_WHERE}: lengths must have shape {shape[:-2]}, got {lengths.shape}.")
    bad = (lengths < 1) | (lengths > shape[-2])
    if bad.any():
        sequence = np.argwhere(bad)[0][-1]
        raise InvalidInputError(
            f"{_WHERE}: lengths must be in [1, {shape[-2]}], got {lengths[bad][0]} at sequence {sequence}."
        )
    return np.asarray(np.arange(shape[-2]) < lengths[..., None])


def _booleans(allowed: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """``allowed`` as booleans of one of the two shapes that it may have."""
    if not np.isin(allowed, (0, 1)).all():
        raise InvalidInputError(
            f"{_WHERE}: allowed must hold booleans or 0 and 1, got {preview(np.unique(allowed).tolist())}."
        )
    fits = allowed.shape == shape[:-1] or (allowed.ndim == len(shape) and allowed.shape[:-2] == shape[:-2])
    if not fits or allowed.shape[-1] != shape[-2]:
        raise InvalidInputError(
            f"{_WHERE}: allowed must have shape {shape[:-1]}, or one such for each query, got {allowed.shape}."
        )
    return allowed.astype(np.bool_)


def _center(arrays: Mapping[str, Any]) -> AnyArray | None:
    """The centre in float64, square and finite."""
    if "center" not in arrays:
        return None
    tokens, center = arrays["tokens"], arrays["center"]
    d = tokens.shape[-1]
    shapes = [(d, d)] if tokens.ndim == 3 else [(d, d), (len(tokens), d, d)]
    if center.shape not in shapes:
        raise InvalidInputError(f"{_WHERE}: center must have shape {shapes[-1]}, got {center.shape}.")
    center = np.asarray(center, dtype=np.float64)
    if not np.isfinite(center).all():
        place = tuple(int(index) for index in np.argwhere(~np.isfinite(center))[0])
        raise InvalidInputError(f"{_WHERE}: center must be finite, got {center[place]} at {place}.")
    return center
