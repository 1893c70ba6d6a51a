"""Fields of configurations hold what their annotations say: a file that comes with a model may give anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from attsvm.errors import InvalidInputError

__all__ = ["are_whole", "check_kinds", "check_share", "is_number", "is_whole"]

_LARGEST = 2**63  # of the integers that torch knows


def is_whole(value: Any) -> bool:
    """Whether this is an integer that torch can hold; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST


def is_number(value: Any) -> bool:
    """Whether this is a finite number; True and False are none."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def are_whole(value: Any) -> bool:
    """Whether this is a tuple of integers that torch can hold."""
    return isinstance(value, tuple) and all(map(is_whole, value))


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("an integer", is_whole),
    "float": ("a finite number", is_number),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "str": ("a string", lambda value: isinstance(value, str)),
    "tuple[int, ...]": ("several integers", are_whole),
    "tuple[int, int]": ("two integers", lambda value: are_whole(value) and len(value) == 2),
    "None": ("None", lambda value: value is None),
}
"""What an annotation means, in words and as a test."""


def check_kinds(config: Any) -> None:
    """Make sure that the fields of a dataclass are of the kinds that their annotations name.

    A whole number is a number too, True and False are neither. Annotations that are no union of plain kinds are passed
    over.

    Parameters
    ----------
    config
        The dataclass; its module has ``from __future__ import annotations``.

    Raises
    ------
    InvalidInputError
        If a field is of another kind; names the first.

    Examples
    --------
    >>> from attsvm.models.decoder import DecoderConfig
    >>> DecoderConfig(d_vocab=9, d_model=8, n_layers=1, n_heads=2, d_mlp=8, n_ctx=4, eos_id="end")
    Traceback (most recent call last):
      ...
    attsvm.errors.InvalidInputError: DecoderConfig: eos_id must be an integer, several integers or None, got 'end'.
    """
    for field in fields(config):
        parts = str(field.type).split(" | ")
        if not all(part in _KINDS for part in parts):
            continue
        value = getattr(config, field.name)
        if not any(_KINDS[part][1](value) for part in parts):
            *most, last = (_KINDS[part][0] for part in parts)
            wanted = f"{', '.join(most)} or {last}" if most else last
            raise InvalidInputError(f"{type(config).__name__}: {field.name} must be {wanted}, got {value!r}.")


def check_share(config: Any, *names: str) -> None:
    """Make sure that fields of a dataclass are numbers in [0, 1).

    Raises
    ------
    InvalidInputError
        If one is not.
    """
    for name in names:
        value = getattr(config, name)
        if not is_number(value) or not 0 <= value < 1:
            raise InvalidInputError(f"{type(config).__name__}: {name} must be in [0, 1), got {value!r}.")
