"""From two label values of any kind to -1 and +1."""

from __future__ import annotations

from collections.abc import Sequence

from attsvm.data.files import preview
from attsvm.errors import InvalidInputError

__all__ = ["label_name", "order_labels", "signs"]

# (negative, positive), in lower case. Pairs of numbers need no entry: the smaller one is negative.
_KNOWN_PAIRS = frozenset(
    {
        ("neg", "pos"),
        ("negative", "positive"),
        ("no", "yes"),
        ("n", "y"),
        ("false", "true"),
        ("f", "t"),
        ("ham", "spam"),
        ("bad", "good"),
        ("dislike", "like"),
        ("fake", "real"),
        ("incorrect", "correct"),
        ("unacceptable", "acceptable"),
        ("off", "on"),
        ("-", "+"),
    }
)


def label_name(value: object) -> str:
    """One spelling for a label: ``True`` and ``"true"`` differ, ``1``, ``1.0`` and ``"1"`` do not.

    Examples
    --------
    >>> [label_name(value) for value in (True, 1.0, " pos ", None)]
    ['True', '1', 'pos', '']
    """
    if value is None or value != value:  # None and NaN are how tables spell "nothing here"
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def order_labels(first: str, second: str) -> tuple[str, str]:
    """Say which of two labels is negative and which is positive.

    Two numbers: the smaller is negative. A recognised pair (negative/positive, no/yes, ham/spam, ...): as it says.
    Anything else: in the order of sorting.

    Examples
    --------
    >>> order_labels("spam", "ham")
    ('ham', 'spam')
    >>> order_labels("10", "9")
    ('9', '10')
    """
    for pair in ((first, second), (second, first)):
        if (pair[0].casefold(), pair[1].casefold()) in _KNOWN_PAIRS:
            return pair
    try:
        numbers = float(first), float(second)
    except ValueError:
        low, high = sorted((first, second))
        return low, high
    return (first, second) if numbers[0] < numbers[1] else (second, first)


def signs(names: Sequence[str], where: str, column: str) -> tuple[list[int], tuple[str, str]]:
    """Labels -1 and +1, and the (negative, positive) names they stand for.

    Raises
    ------
    InvalidInputError
        If ``names`` does not hold exactly two different labels; the message names the column and what it holds.
    """
    found = list(dict.fromkeys(names))
    if len(found) != 2:
        raise InvalidInputError(
            f"{where}: {column} must hold exactly two different labels, got {len(found)}: {preview(found)}. "
            "Hint: keep two classes, or choose another label column."
        )
    order = order_labels(*found)
    return [1 if name == order[1] else -1 for name in names], order
