"""Embeddings on disk, so that what was computed once is read the next time.

An entry is ``<key>.safetensors`` (the arrays) beside ``<key>.json`` (the pieces, and the SHA-256 of the arrays); the
second is written last and makes the entry count. The cache only ever saves time: a damaged entry is computed again
and a folder that cannot be written is left alone, both with a warning in the log.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attsvm.data.embedded_text import RaggedEmbedding
from attsvm.errors import InvalidInputError, RecordError
from attsvm.records import read_arrays, read_json, write_arrays, write_json

__all__ = ["CACHE_VERSION", "EmbeddingCache", "default_cache_dir"]

CACHE_VERSION = 1
"""Version of the entries; part of every key, so that entries of another version are never looked at."""

_LOG = logging.getLogger(__name__)
_ARRAYS = ("lengths", "vectors", "special", "spans", "truncated")


def default_cache_dir() -> Path:
    """``$ATTSVM_CACHE``, or ``attsvm`` in ``$XDG_CACHE_HOME``, or ``~/.cache/attsvm``."""
    if own := os.environ.get("ATTSVM_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "attsvm"
    try:
        return Path.home() / ".cache" / "attsvm"
    except RuntimeError as error:
        raise InvalidInputError(
            "default_cache_dir: ATTSVM_CACHE must name a folder, got none, and there is no home folder."
        ) from error


class EmbeddingCache:
    """Embeddings in a folder. Creating the object touches nothing.

    Parameters
    ----------
    directory
        The folder; by default :func:`default_cache_dir`.
    """

    def __init__(self, directory: Path | str | None = None) -> None:
        self.directory = default_cache_dir() if directory is None else Path(directory).expanduser()
        self._warned = False

    @staticmethod
    def key(recipe: Mapping[str, Any], texts: Sequence[str]) -> str:
        """SHA-256 (hexadecimal) of how the texts are embedded, the texts and :data:`CACHE_VERSION`."""
        content = json.dumps([CACHE_VERSION, dict(recipe), list(texts)], sort_keys=True)
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def files(self, key: str) -> tuple[Path, Path]:
        """Where the arrays and the pieces of an entry are."""
        stem = self.directory / "embeddings" / key[:2] / key
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def load(self, key: str) -> RaggedEmbedding | None:
        """The entry, or None when there is none or it is damaged (which is logged)."""
        arrays_file, pieces_file = self.files(key)
        try:
            if not pieces_file.exists():
                return None
            record = read_json(pieces_file)
            if _sha256(arrays_file) != record["arrays_sha256"]:
                raise RecordError(f"{arrays_file} is not what was written.")
            arrays = read_arrays(arrays_file)
            pieces = tuple(record["pieces"])
            if len(pieces) != len(arrays["vectors"]):
                raise RecordError(f"{pieces_file} does not belong to its arrays.")
            return RaggedEmbedding(**{name: arrays[name] for name in _ARRAYS}, pieces=pieces)
        except (RecordError, OSError, KeyError, TypeError) as error:
            _LOG.warning("The cached embedding %s is damaged and is computed again (%s).", arrays_file, error)
            return None

    def store(self, key: str, entry: RaggedEmbedding) -> None:
        """Write the entry. When that fails, say so once in the log and go on."""
        arrays_file, pieces_file = self.files(key)
        try:
            arrays_file.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(arrays_file, {name: np.asarray(getattr(entry, name)) for name in _ARRAYS})
            write_json(pieces_file, {"arrays_sha256": _sha256(arrays_file), "pieces": entry.pieces})
        except (RecordError, OSError) as error:
            self._warn(error)

    def file_digest(self, path: Path) -> str:
        """SHA-256 (hexadecimal) of a file, remembered by its path, size and time of change."""
        status = path.stat()
        name = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
        memo = self.directory / "digests" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()}.json"
        try:
            remembered = read_json(memo)["sha256"] if memo.exists() else None
            if isinstance(remembered, str) and len(remembered) == 64:
                return remembered
        except (RecordError, OSError, KeyError, TypeError):
            pass  # a damaged memo is written again below
        digest = _sha256(path)
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(memo, {"sha256": digest})
        except (RecordError, OSError) as error:
            self._warn(error)
        return digest

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning("Embeddings are not cached in %s (%s).", self.directory, error)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
