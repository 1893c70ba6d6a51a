"""Arrays by name from a user's ``.npz`` or ``.safetensors`` file, whatever the file turns out to hold."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from attsvm.data.files import check_file
from attsvm.errors import InvalidInputError, RecordError
from attsvm.records import read_arrays

__all__ = ["ARRAY_SUFFIXES", "AnyArray", "hash_arrays", "load_arrays"]

ARRAY_SUFFIXES = (".npz", ".safetensors")

AnyArray: TypeAlias = npt.NDArray[Any]


def load_arrays(path: Path, where: str) -> dict[str, AnyArray]:
    """All arrays of a file. Pickled objects are never read.

    Raises
    ------
    InvalidInputError
        If the file is not what its suffix says, or holds what is not a plain array.
    """
    check_file(path, ARRAY_SUFFIXES, where)
    return _load_npz(path, where) if path.suffix.lower() == ".npz" else _load_safetensors(path, where)


def _load_npz(path: Path, where: str) -> dict[str, AnyArray]:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # what a damaged archive raises is up to zipfile, zlib and NumPy's header parser
        if "pickle" in str(error).casefold() or "object array" in str(error).casefold():
            raise InvalidInputError(
                f"{where}: {path} must hold plain arrays, got Python objects, which are never read. "
                "Hint: save arrays of numbers with numpy.savez."
            ) from error
        raise InvalidInputError(
            f"{where}: {path} must be an .npz archive of arrays ({error or type(error).__name__})."
        ) from error


def _load_safetensors(path: Path, where: str) -> dict[str, AnyArray]:
    try:
        return read_arrays(path)
    except RecordError as error:
        raise InvalidInputError(f"{where}: {path} must be a safetensors file ({error}).") from error
    except (TypeError, KeyError, AttributeError) as error:  # how safetensors says that NumPy lacks a type
        raise InvalidInputError(
            f"{where}: {path} must hold types that NumPy has, got {error}. Hint: save bfloat16 as float32."
        ) from error


def hash_arrays(**arrays: AnyArray | None) -> str:
    """SHA-256 (hexadecimal) over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in arrays.items():
        if value is not None:
            digest.update(f"{name}:{value.dtype.str}:{value.shape};".encode())
            digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()
