"""Strings that are safe to show: numbers in words of the page, and characters that would hide or reorder text."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = [
    "ABSENT",
    "integer",
    "norm_name",
    "number",
    "percent",
    "shorten",
    "telling_digits",
    "visible",
    "visible_token",
    "visible_tree",
]

ABSENT = "–"
"""Shown where a record holds null."""

# Controls, bidirectional overrides, zero-width and filler characters, tags and lone surrogates: each can hide text,
# turn its order round or break an encoder. The two joiners U+200C and U+200D stay: scripts and emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff\ud800-\udfff]"
)
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"


def visible(text: str) -> str:
    r"""Replace every character that hides or reorders text by a visible symbol.

    Examples
    --------
    >>> visible("a\x00b\u202ec")
    'a␀b⟨U+202E⟩c'
    """
    return _HIDDEN.sub(_symbol, text)


def visible_token(token: str) -> str:
    """Like :func:`visible`, and a token without any ink gets a symbol too.

    Examples
    --------
    >>> visible_token(" "), visible_token("")
    ('␠', '⟨empty⟩')
    """
    shown = visible(token)
    if not shown:
        return "⟨empty⟩"
    if not shown.strip(" \u00a0\u200c\u200d\u3000"):
        return "".join("␠" if char == " " else f"⟨U+{ord(char):04X}⟩" for char in shown)
    return shown


def visible_tree(value: Any) -> Any:
    """Apply :func:`visible` to every string in a JSON value, keys included."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(str(key)): visible_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [visible_tree(item) for item in value]
    return value


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with ``digits`` significant digits, as a power of ten where that is shorter.

    Examples
    --------
    >>> number(3.02e-7), number(0.96), number(None)
    ('3.02 × 10⁻⁷', '0.960', '–')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 < exponent < 6:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa} × 10{str(int(power)).translate(_SUPERSCRIPT)}".replace("-", "−")


def telling_digits(gap: float | None) -> int:
    """Digits at which two bounds with this relative gap differ, within what float64 can tell.

    Examples
    --------
    >>> telling_digits(3e-7), telling_digits(None)
    (9, 7)
    """
    if gap is None or not 0 < gap < 1:
        return 7
    return min(14, max(5, 2 - math.floor(math.log10(gap))))


def norm_name(norm: str) -> str:
    """Name a norm: lp is the norm of order p of the entries.

    Examples
    --------
    >>> norm_name("fro"), norm_name("1.75"), norm_name("inf")
    ('Frobenius', 'l1.75', 'l∞')
    """
    names = {"fro": "Frobenius", "nuc": "nuclear", "op": "operator", "inf": "l∞"}
    return names.get(norm, f"l{norm}")


def percent(value: float | None) -> str:
    """Write a fraction as a percentage; 100 % only when it is 1.

    Examples
    --------
    >>> percent(0.93), percent(0.99999), percent(1.0)
    ('93.0 %', '> 99.9 %', '100 %')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == 1:
        return "100 %"
    return "> 99.9 %" if 0.9995 <= value < 1 else f"{100 * value:.1f} %"


def integer(value: int | None) -> str:
    """Write a count with thousands separated.

    Examples
    --------
    >>> integer(4213)
    '4,213'
    """
    return ABSENT if value is None else f"{value:,d}"


def shorten(text: str, limit: int = 160) -> str:
    """Cut a text after ``limit`` characters and say so by an ellipsis."""
    return text if len(text) <= limit else text[:limit].rstrip() + "…"
