"""What every reader of a user's file does first: look at the path, get the bytes, make sense of the encoding."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attsvm.errors import InvalidInputError

__all__ = ["check_file", "preview", "read_utf8", "well_formed"]

_PREVIEW_ITEMS = 8
_PREVIEW_CHARACTERS = 40


def preview(values: Iterable[object], limit: int = _PREVIEW_ITEMS) -> str:
    """A short list of ``values`` for a message: at most ``limit`` of them, each cut to 40 characters.

    Examples
    --------
    >>> preview(["a", 1, "b"], limit=2)
    "'a', 1, ... (3 in all)"
    """
    items = list(values)
    shown = [repr(_cut(item)) for item in items[:limit]]
    if len(items) > limit:
        shown.append(f"... ({len(items)} in all)")
    return ", ".join(shown) if shown else "nothing"


def _cut(value: object) -> object:
    if isinstance(value, str) and len(value) > _PREVIEW_CHARACTERS:
        return value[:_PREVIEW_CHARACTERS] + "…"
    return value


def well_formed(text: str) -> str:
    r"""``text`` with every half of a surrogate pair replaced by U+FFFD, so that it can be encoded.

    JSON can spell such halves (``"\ud800"``); no tokenizer and no file takes them.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def check_file(path: Path, suffixes: Iterable[str], where: str) -> None:
    """Make sure that ``path`` is a file of a known kind.

    Raises
    ------
    InvalidInputError
        If it does not exist, is not a regular file, or its suffix is not one of ``suffixes``.
    """
    known = tuple(suffixes)
    try:
        if not path.exists():
            raise InvalidInputError(f"{where}: path must be an existing file, got {path}, which does not exist.")
        if not path.is_file():
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise InvalidInputError(f"{where}: path must be a file, got {path}, which is {kind}.")
    except OSError as error:
        raise _unreadable(path, where, error) from error
    except ValueError as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{where}: path must be a file name, got {str(path)[:80]!r} ({error}).") from error
    if path.suffix.lower() not in known:
        raise InvalidInputError(
            f"{where}: path must end in {', '.join(known)}, got {path.name!r}. Hint: the suffix says how it is read."
        )


def read_bytes(path: Path, where: str) -> bytes:
    """All bytes of a file; an operating system error becomes an InvalidInputError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, where, error) from error


def read_utf8(path: Path, where: str) -> str:
    """The file as text. A byte order mark is dropped; bytes that are not UTF-8 are an error, never replaced.

    Raises
    ------
    InvalidInputError
        If the file cannot be read or is not UTF-8; the message names the first bad line.
    """
    content = read_bytes(path, where)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidInputError(
            f"{where}: {path} must be UTF-8 text, got byte 0x{content[error.start]:02x} at line {line}. "
            "Hint: save it again with the encoding UTF-8."
        ) from error


def _unreadable(path: Path, where: str, error: OSError) -> InvalidInputError:
    return InvalidInputError(f"{where}: path must be readable, got {path} ({error.strerror or error}).")
