"""From a run folder of ``attsvm inspect`` to what its page embeds: the record, and the patterns in little space."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attsvm.errors import RecordError
from attsvm.records import RunFolder
from attsvm.report.atlas_schema import AtlasResult, Module, Shown, read_atlas_result

__all__ = [
    "FEWEST_KEPT",
    "LEVELS",
    "LIMIT_BYTES",
    "TARGET_BYTES",
    "Atlas",
    "Blob",
    "Level",
    "Packed",
    "largest",
    "pack",
    "packed_similarity",
    "read_atlas",
]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

TARGET_BYTES = 5_000_000
"""Size of a page up to which nothing coarser is tried."""
LIMIT_BYTES = 15_500_000
"""Largest size of a page that shows more than one text."""
FEWEST_KEPT = 8
"""This many of the largest weights of a query are kept however small they are."""

_DENSE_SHARE = 0.35
"""Share of weights above 0 from which a whole matrix takes less space than its entries one by one."""
_LEAST_BYTES = 0.6
"""A kept weight takes at least this much of the page; levels that must be too large are not tried."""
_LARGEST_POSITION = 0xFFF0
"""Positions are written with 16 bits; what is negative (-1: nothing, -2: the model's own sink) comes from above."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """How much of the patterns is kept.

    Attributes
    ----------
    least
        Smallest code of a weight that is kept.
    twin
        Largest weights of the twin that are kept for each query.
    """

    least: int
    twin: int

    @property
    def least_weight(self) -> float:
        """Weights below this are left out."""
        return ((self.least - 0.5) / 255) ** 2


LEVELS = (
    *(Level(least=code, twin=8) for code in (1, 2, 4, 6, 9, 12)),
    *(Level(least=code, twin=4) for code in (12, 16, 20, 25)),
)
"""From everything to the coarsest."""


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """One run, read and checked."""

    path: Path
    result: AtlasResult
    arrays: Arrays


@dataclass(frozen=True, kw_only=True)
class Blob:
    """What one module did in one shown text.

    Attributes
    ----------
    layout
        What the page needs to read ``data``: sizes, and the name and length of each section in order.
    data
        Base64 of the compressed sections.
    dropped
        Weight that was left out, summed over the queries, and its largest share of one query.
    """

    layout: dict[str, Any]
    data: str
    dropped: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The patterns of a page.

    Attributes
    ----------
    blobs
        For each run, those of its modules in its shown texts.
    n_shown
        Shown texts that are kept of each run.
    """

    blobs: tuple[tuple[Blob, ...], ...]
    n_shown: tuple[int, ...]
    level: Level

    @property
    def n_bytes(self) -> int:
        """Size in the page."""
        return sum(len(blob.data) for blobs in self.blobs for blob in blobs)

    @property
    def mean_dropped(self) -> float:
        """Share of its weight that a query loses on average."""
        blobs = [blob for each in self.blobs for blob in each]
        queries = sum(int(blob.layout["H"]) * int(blob.layout["Tq"]) for blob in blobs)
        return sum(blob.dropped[0] for blob in blobs) / max(1, queries)

    @property
    def largest_dropped(self) -> float:
        """Largest share of its weight that a query loses."""
        return max((blob.dropped[1] for each in self.blobs for blob in each), default=0.0)


def read_atlas(path: Path | str) -> Atlas:
    """Read a run folder of ``attsvm inspect``.

    Parameters
    ----------
    path
        The folder; it must hold ``result.json`` and ``arrays.safetensors``.

    Raises
    ------
    RecordError
        If a file is missing or damaged, or the arrays do not fit the result.
    """
    folder = RunFolder(path)
    result = read_atlas_result(folder)
    arrays = folder.read_arrays()
    for name, shape, optional in _expected(result):
        array = arrays.get(name)
        if array is None and optional:
            continue
        if array is None or not _fits(array, shape):
            found = "is missing" if array is None else f"has shape {array.shape}"
            raise RecordError(f"{folder.arrays_file}: {name} {found}; {folder.result_file} asks for {shape}.")
    return Atlas(path=folder.path, result=result, arrays=arrays)


def packed_similarity(atlas: Atlas) -> str | None:
    """Agreement of the heads in steps of 1/250, 255 where it is not known."""
    values = atlas.arrays.get("similarity")
    if values is None:
        return None
    steps = np.round(250 * np.clip(np.nan_to_num(values, nan=0.0), 0, 1))
    return _compressed(np.where(np.isfinite(values), steps, 255).astype(np.uint8).tobytes())


def _fits(array: Array, shape: Sequence[int | None]) -> bool:
    return array.ndim == len(shape) and all(n in (size, None) for n, size in zip(shape, array.shape, strict=True))


def _expected(result: AtlasResult) -> Iterator[tuple[str, tuple[int | None, ...], bool]]:
    """Names of the arrays, their shapes (None: any), and whether they may be absent."""
    yield "similarity", (len(result.heads), len(result.heads)), True
    for s, shown in enumerate(result.shown):
        for module in result.modules:
            prefix = f"shown.{s}.{module.index}"
            h, q, k = len(module.kept), _length(shown, module.query_side), _length(shown, module.key_side)
            yield f"{prefix}.pattern", (h, q, k), False
            yield f"{prefix}.selected", (h, q), False
            yield f"{prefix}.margin", (h, q), False
            yield f"{prefix}.support", (h, q, k), True
            yield f"{prefix}.twin_index", (h, q, None), True
            yield f"{prefix}.twin_weight", (h, q, None), True


def _length(shown: Shown, side: str) -> int:
    piece = shown.target if side == "target" and shown.target is not None else shown.source
    return len(piece.tokens)


def pack(
    atlases: Sequence[Atlas], *, target: float = TARGET_BYTES, limit: float = LIMIT_BYTES, rest: int = 0
) -> Packed:
    """Choose how much of the patterns the page keeps, and pack it.

    The finest level below ``target`` bytes; where even the coarsest is larger, the coarsest with as many shown texts
    as stay below ``limit``, and at least one.

    Parameters
    ----------
    atlases
        The runs of the page.
    target, limit
        Of the page in bytes.
    rest
        What the page needs for anything else; patterns have at least half of ``target``.
    """
    target, limit = max(target / 2, target - rest), limit - rest
    n_shown = tuple(len(atlas.result.shown) for atlas in atlases)
    at_least = _counts(atlases)
    for level in LEVELS:
        may_fit = _LEAST_BYTES * at_least[level.least] <= target
        blobs = _packed(atlases, n_shown, level, target) if may_fit else None
        if blobs is not None:
            return Packed(blobs=blobs, n_shown=n_shown, level=level)
    for fewest in range(max(n_shown, default=0), 0, -1):
        kept = tuple(min(count, fewest) for count in n_shown)
        blobs = _packed(atlases, kept, LEVELS[-1], limit if fewest > 1 else None)
        if blobs is not None:
            break
    assert blobs is not None
    return Packed(blobs=blobs, n_shown=kept, level=LEVELS[-1])


def _counts(atlases: Sequence[Atlas]) -> Array:
    """How many weights have at least each code; small matrices always fit and are not counted."""
    counts = np.zeros(256, np.int64)
    for atlas in atlases:
        for name, array in atlas.arrays.items():
            if name.endswith(".pattern") and array.size > 1e5:
                counts += np.bincount(array.ravel(), minlength=256)
    return np.cumsum(counts[::-1])[::-1]


def _packed(
    atlases: Sequence[Atlas], n_shown: Sequence[int], level: Level, limit: float | None
) -> tuple[tuple[Blob, ...], ...] | None:
    """Pack everything, or None as soon as it is larger than ``limit``."""
    made, total = [], 0
    for atlas, count in zip(atlases, n_shown, strict=True):
        blobs = []
        for s in range(count):
            for module in atlas.result.modules:
                blobs.append(_blob(atlas.arrays, s, module, level))
                total += len(blobs[-1].data)
                if limit is not None and total > limit:
                    return None
        made.append(tuple(blobs))
    return tuple(made)


def _blob(arrays: Arrays, s: int, module: Module, level: Level) -> Blob:
    """Pack one module and text; see ``atlas_data.js`` for the reader."""
    prefix = f"shown.{s}.{module.index}."
    arrays = {
        name.removeprefix(prefix): _placed(array, module) for name, array in arrays.items() if name.startswith(prefix)
    }
    whole = arrays["pattern"]
    n_heads, n_queries, n_keys = whole.shape
    kept = whole if level.least <= 1 else np.where(whole >= level.least, whole, largest(whole, FEWEST_KEPT))
    dropped = (np.square(whole, dtype=np.float32) - np.square(kept, dtype=np.float32)).sum(-1) / 255**2
    dense = np.count_nonzero(kept) > _DENSE_SHARE * kept.size
    sections = [
        ("selected", _positions(arrays["selected"])),
        ("margin", _halves(arrays["margin"])),
        *([("pattern", kept.astype(np.uint8).tobytes())] if dense else _sparse("pattern", kept)),
    ]
    if kept is not whole:
        sections.append(("tail", np.round(255 * np.sqrt(np.clip(dropped, 0, 1))).astype(np.uint8).tobytes()))
    if (support := arrays.get("support")) is not None:
        sections += _sparse("support", support)[:2]
    n_twin = 0
    if (twin := _twin(arrays, whole.shape, level.twin)) is not None:
        n_twin = int(np.count_nonzero(twin, -1).max(initial=0))
        sections += _sparse("twin", twin)
    layout: dict[str, Any] = {"s": s, "m": module.index, "H": n_heads, "Tq": n_queries, "Tk": n_keys, "K": n_twin}
    layout["sections"] = [[name, len(content)] for name, content in sections]
    data = _compressed(b"".join(content for _, content in sections))
    return Blob(layout=layout, data=data, dropped=(float(dropped.sum()), float(dropped.max(initial=0))))


def _placed(array: Array, module: Module) -> Array:
    """Give every head of the module its place; those that were not looked at select nothing."""
    if module.kept == [*range(module.n_heads)]:
        return array
    whole = np.full((module.n_heads, *array.shape[1:]), -1 if array.dtype.kind == "i" else 0, array.dtype)
    whole[module.kept] = array
    return whole


def _compressed(content: bytes) -> str:
    """Base64 of a zlib stream; what has no repeats is smaller when none are looked for."""
    best = b""
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        packer = zlib.compressobj(6, zlib.DEFLATED, 15, 9, strategy)
        made = packer.compress(content) + packer.flush()
        best = made if not best or len(made) < len(best) else best
    return base64.b64encode(best).decode()


def largest(codes: Array, count: int) -> Array:
    """Set all but the ``count`` largest of each row to 0; of equal ones the first are kept."""
    n_keys = codes.shape[-1]
    if n_keys <= count:
        return codes
    # The place makes every value of a row different.
    ranked = codes.astype(np.int32) * n_keys + np.arange(n_keys - 1, -1, -1, dtype=np.int32)
    smallest = np.partition(ranked, n_keys - count, axis=-1)[..., n_keys - count]
    return np.where(ranked >= smallest[..., None], codes, np.uint8(0))


def _sparse(name: str, values: Array) -> list[tuple[str, bytes]]:
    """Entries that are not 0: how many each row has, the steps from one to the next, and the values.

    A step of 255 or more is written as bytes 255 and a last smaller one.
    """
    rows = values.reshape(-1, values.shape[-1])
    row, column = np.nonzero(rows)
    counts = np.bincount(row, minlength=len(rows))
    steps = np.diff(column, prepend=0)
    first = np.cumsum(counts) - counts
    starts = first[counts > 0]
    steps[starts] = column[starts]
    repeats = steps // 255
    ends = np.cumsum(repeats + 1) - 1
    gaps = np.full(int(ends[-1]) + 1 if len(ends) else 0, 255, np.uint8)
    gaps[ends] = steps % 255
    return [
        (f"{name}.counts", counts.astype("<u2").tobytes()),
        (f"{name}.gaps", gaps.tobytes()),
        (f"{name}.values", rows[row, column].astype(np.uint8).tobytes()),
    ]


def _twin(arrays: Arrays, shape: tuple[int, ...], count: int) -> Array | None:
    """The twin's largest weights as a matrix that is 0 elsewhere, or None without one."""
    index, weight = arrays.get("twin_index"), arrays.get("twin_weight")
    if index is None or weight is None or index.shape != weight.shape or not index.shape[-1]:
        return None
    inside = (index >= 0) & (index < shape[-1])
    matrix = np.zeros(shape, np.uint8)
    np.put_along_axis(matrix, np.where(inside, index, 0).astype(np.int64), np.uint8(0), -1)
    heads, queries, slots = np.nonzero(inside)
    matrix[heads, queries, index[heads, queries, slots]] = weight[heads, queries, slots]
    return largest(matrix, count)


def _positions(index: Array) -> bytes:
    return np.where(index <= _LARGEST_POSITION, index, -1).astype("<i4").astype("<u2").tobytes()


def _halves(values: Array) -> bytes:
    """16-bit floats; finite values stay finite."""
    largest = float(np.finfo(np.float16).max)
    finite = np.isfinite(values)
    return np.where(finite, np.clip(values, -largest, largest), values).astype("<f2").tobytes()
