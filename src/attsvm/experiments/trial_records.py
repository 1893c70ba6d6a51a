"""Finished chunks of trials on disk: durable at once, and checked when they are read again.

Each process appends to a file of its own, one line a chunk. A line is one JSON object with the checksum of its
content, is handed to the disk before the chunk counts as finished, and can be lost in one way only: the process ended
while it wrote its last line. Such a line has no end, and is dropped; any other damage is an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from attsvm.errors import RecordError
from attsvm.records import dumps

__all__ = ["ChunkFile", "digest_of", "read_chunks"]

FORMAT = "attsvm trials 1"
"""What the first line of a file says; another layout of the lines gets another number."""

_HEAD = b'{"checksum": "'
_MIDDLE = b'", "content": '
_DIGITS = 16


def digest_of(text: str | bytes) -> str:
    """A checksum in 16 hexadecimal digits."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:_DIGITS]


class ChunkFile:
    """The file that one process appends its finished chunks to.

    Parameters
    ----------
    path
        The file; it is made when it is not there, and its last line dropped when it has no end.
    run
        The digest of the settings that the chunks belong to.

    Raises
    ------
    RecordError
        If the file is damaged, belongs to other settings, is in use, or cannot be written.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._lock, self._closed = path, threading.Lock(), False
        whole = _whole_lines(path, run) if path.exists() else []
        try:
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            self._size = sum(len(line) + 1 for line in whole)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._handle, self._size)
            os.lseek(self._handle, self._size, os.SEEK_SET)
            if not whole:
                self._write({"format": FORMAT, "run": run})
                _keep_name(path)
        except BlockingIOError as error:
            os.close(self._handle)
            raise _in_use(path) from error
        except (OSError, RecordError) as error:
            os.close(self._handle)
            raise error if isinstance(error, RecordError) else _unwritable(path, error) from error

    def append(self, chunk: Mapping[str, Any]) -> bool:
        """Write a chunk so that it outlives this process; False after :meth:`close`, when nothing is written.

        Raises
        ------
        RecordError
            If there is no space; what was written before stays whole.
        """
        with self._lock:
            if not self._closed:
                self._write(chunk)
            return not self._closed

    def close(self) -> None:
        """Take no more chunks."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._handle)

    def __enter__(self) -> ChunkFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, content: Mapping[str, Any]) -> None:
        text = dumps(content).encode("utf-8", errors="backslashreplace")
        line = _HEAD + digest_of(text).encode() + _MIDDLE + text + b"}\n"
        try:
            written = 0
            while written < len(line):
                written += os.write(self._handle, line[written:])
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):  # half a line more or less: it is dropped on reading
                os.ftruncate(self._handle, self._size)
                os.lseek(self._handle, self._size, os.SEEK_SET)
            raise _unwritable(self._path, error) from error
        self._size += len(line)


def read_chunks(path: Path, run: str) -> list[dict[str, Any]]:
    """Read the chunks that a file holds.

    Parameters
    ----------
    path
        A file that :class:`ChunkFile` wrote.
    run
        The digest of the settings that the chunks must belong to.

    Raises
    ------
    RecordError
        If the file is in use, foreign or of other settings, or a line is damaged; the message names file and line.
    """
    return [json.loads(_content(line) or b"null") for line in _whole_lines(path, run)[1:]]


def _whole_lines(path: Path, run: str) -> list[bytes]:
    """The lines that have an end, each checked; the first must be that of this format and these settings."""
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            *lines, _ = handle.read().split(b"\n")
    except BlockingIOError as error:
        raise _in_use(path) from error
    except OSError as error:
        raise RecordError(f"{path} could not be read: {error.strerror or error}.") from error
    for number, line in enumerate(lines, start=1):
        content = _content(line)
        if content is None or digest_of(content).encode() != line[len(_HEAD) : len(_HEAD) + _DIGITS]:
            raise RecordError(
                f"{path}, line {number}, is damaged or not of attsvm (its checksum does not fit); "
                "--overwrite begins anew."
            )
    if lines and json.loads(_content(lines[0]) or b"null") != {"format": FORMAT, "run": run}:
        raise RecordError(f"{path}, line 1, is that of a run with other settings; --overwrite begins anew.")
    return lines


def _content(line: bytes) -> bytes | None:
    """What the checksum is of; None for a line of another form."""
    head = len(_HEAD) + _DIGITS
    if not (line.startswith(_HEAD) and line[head : head + len(_MIDDLE)] == _MIDDLE and line.endswith(b"}")):
        return None
    return line[head + len(_MIDDLE) : -1]


def _keep_name(path: Path) -> None:
    """Let the name of a new file outlive a power cut as well as its content."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _unwritable(path: Path, error: OSError) -> RecordError:
    return RecordError(f"{path} could not be written: {error.strerror or error}.")


def _in_use(path: Path) -> RecordError:
    return RecordError(f"{path} is in use by another attsvm process.")
