"""Tokens, queries and labels (or scores) that a user brings as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attsvm.data.array_files import ARRAY_SUFFIXES, AnyArray, hash_arrays, load_arrays
from attsvm.data.files import preview
from attsvm.data.labels import label_name, signs
from attsvm.errors import InvalidInputError

__all__ = ["ARRAY_SUFFIXES", "LabelledArrays", "read_arrays_file"]

FloatArray = npt.NDArray[np.floating[Any]]

_WHERE = "read_arrays_file"
# Each quantity and the keys it may have in a file.
_KEYS: dict[str, tuple[str, ...]] = {
    "tokens": ("X", "tokens"),
    "queries": ("z", "Z", "queries"),
    "labels": ("y", "Y", "labels"),
    "scores": ("scores",),
    "allowed": ("allowed", "mask"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledArrays:
    """Sequences of tokens with a query each, and labels or token scores.

    Attributes
    ----------
    tokens
        X, (n, T, d), floating point, finite.
    queries
        z, (n, d), of the same type.
    labels
        Y, (n,) of -1 and +1, or None. Not None where ``scores`` is None.
    scores
        Y v^T x, (n, T), finite, or None.
    allowed
        (n, T), True = may be attended, at least one in each row; None = all.
    source
        The file they come from.
    content_hash
        SHA-256 (hexadecimal) over names, types, shapes and values of the arrays above.
    """

    tokens: FloatArray
    queries: FloatArray
    labels: npt.NDArray[np.int64] | None
    scores: FloatArray | None
    allowed: npt.NDArray[np.bool_] | None
    source: str
    content_hash: str

    def __len__(self) -> int:
        return len(self.tokens)


def read_arrays_file(path: Path | str) -> LabelledArrays:
    """Read and check the arrays of an ``.npz`` or ``.safetensors`` file. Pickled objects are never read.

    ==============  ==========  ===========================================================================
    key             shape       meaning
    ==============  ==========  ===========================================================================
    X or tokens     (n, T, d)   the tokens
    z or queries    (n, d)      the queries; when absent, the first token of each sequence
    y or labels     (n,)        -1 and +1, or any two values (the smaller becomes -1)
    scores          (n, T)      Y v^T x; needed when there is no y
    allowed, mask   (n, T)      True or 1 = may be attended; when absent, all
    ==============  ==========  ===========================================================================

    Integers become float64, and so do queries and scores of another type than the tokens. Other keys are ignored.

    Raises
    ------
    InvalidInputError
        If the file is not what its suffix says, a key is missing or occurs under two names, or an array has a wrong
        shape, type or value; the message names the key.
    """
    path = Path(path)
    content = load_arrays(path, _WHERE)
    keys = {quantity: _key(content, quantity) for quantity in _KEYS}
    found = {quantity: (key, content[key]) for quantity, key in keys.items() if key is not None}
    return _checked(found, path, preview(content))


def _key(content: Mapping[str, AnyArray], quantity: str) -> str | None:
    keys = [key for key in _KEYS[quantity] if key in content]
    if len(keys) > 1:
        raise InvalidInputError(f"{_WHERE}: {quantity} must be given once, got the keys {' and '.join(keys)}.")
    return keys[0] if keys else None


def _checked(found: Mapping[str, tuple[str, AnyArray]], path: Path, held: str) -> LabelledArrays:
    """Check every array against the tokens and put the record together."""
    if "tokens" not in found:
        raise InvalidInputError(f"{_WHERE}: {path} must hold the key X (or tokens), got {held}.")
    if "labels" not in found and "scores" not in found:
        raise InvalidInputError(f"{_WHERE}: {path} must hold y (or labels) or scores, got {held}.")
    tokens = _floats(*found["tokens"], shape=(None, None, None), names="(n, T, d)")
    n, length, width = tokens.shape
    if "queries" in found:
        queries = _floats(*found["queries"], shape=(n, width), names="(n, d)").astype(tokens.dtype, copy=False)
    else:
        queries = tokens[:, 0].copy()
    scores = None
    if "scores" in found:
        scores = _floats(*found["scores"], shape=(n, length), names="(n, T)").astype(tokens.dtype, copy=False)
    labels = _labels(*found["labels"], n=n) if "labels" in found else None
    allowed = _allowed(*found["allowed"], shape=(n, length)) if "allowed" in found else None
    return LabelledArrays(
        tokens=tokens,
        queries=queries,
        labels=labels,
        scores=scores,
        allowed=allowed,
        source=str(path),
        content_hash=hash_arrays(tokens=tokens, queries=queries, labels=labels, scores=scores, allowed=allowed),
    )


def _shape(key: str, value: AnyArray, shape: tuple[int | None, ...], names: str) -> None:
    fits = value.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
    if not fits:
        sizes = ", ".join("?" if size is None else str(size) for size in shape)
        wanted = names if set(shape) == {None} else f"{names} = ({sizes}{',' if len(shape) == 1 else ''})"
        raise InvalidInputError(f"{_WHERE}: {key} must have the shape {wanted}, got {value.shape}.")
    if 0 in value.shape:
        raise InvalidInputError(f"{_WHERE}: {key} must not be empty, got the shape {value.shape}.")


def _floats(key: str, value: AnyArray, *, shape: tuple[int | None, ...], names: str) -> FloatArray:
    if value.dtype.kind not in "fiub":
        raise InvalidInputError(f"{_WHERE}: {key} must hold real numbers, got the type {value.dtype}.")
    _shape(key, value, shape, names)
    numbers: FloatArray = value if value.dtype.kind == "f" else value.astype(np.float64)
    finite = np.isfinite(numbers)
    if not finite.all():
        place = tuple(int(index) for index in np.argwhere(~finite)[0])
        raise InvalidInputError(
            f"{_WHERE}: {key} must be finite, got {numbers[place]} at {place}. "
            "Hint: fill padding with 0 and mark it in 'allowed'."
        )
    return numbers


def _labels(key: str, value: AnyArray, *, n: int) -> npt.NDArray[np.int64]:
    _shape(key, value, (n,), "(n,)")
    items = value.tolist()
    names = [label_name(item.decode("utf-8", "replace") if isinstance(item, bytes) else item) for item in items]
    if "" in names:
        raise InvalidInputError(f"{_WHERE}: {key} must not hold NaN or empty labels, got one at {names.index('')}.")
    if set(names) <= {"-1", "1"}:  # already signs: one class alone is no mistake here, scores may be of one sign too
        return np.array([int(name) for name in names], dtype=np.int64)
    return np.array(signs(names, _WHERE, key)[0], dtype=np.int64)


def _allowed(key: str, value: AnyArray, *, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    _shape(key, value, shape, "(n, T)")
    if value.dtype.kind not in "fiub" or not np.isin(value, (0, 1)).all():
        raise InvalidInputError(
            f"{_WHERE}: {key} must hold booleans or 0 and 1, got {preview(np.unique(value).tolist())}. "
            "Hint: True or 1 = may be attended."
        )
    allowed = value.astype(np.bool_)
    empty = np.flatnonzero(~allowed.any(axis=1))
    if len(empty):
        raise InvalidInputError(f"{_WHERE}: {key} must allow a token of every sequence, got none at {empty[0]}.")
    return allowed
