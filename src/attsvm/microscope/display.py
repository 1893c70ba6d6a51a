"""Tokens as people can read them: no byte, space or control character that cannot be seen, and which word they are of.

The result is plain text. Whoever puts it into a page escapes it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal

__all__ = ["Spelling", "align", "in_place", "is_byte", "spelling_of", "spell", "visible", "word_numbers", "words_of"]

Spelling = Literal["bytes", "latin", "metaspace", "wordpiece", "plain"]
"""How a vocabulary writes text: GPT-2's or Latin-1's letters for bytes; ``▁`` for a space; ``##`` inside a word."""

_LATIN = ("ByT5Tokenizer", "PerceiverTokenizer")  # one token for each byte
_LONGEST = 48  # characters of a token that are shown
_META = "\u2581"
_JOINERS = "\u200c\u200d"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_BYTES = 4  # of a character
_AHEAD = 32  # characters that tokens of other spelling may stand for
_SKIN = range(0x1F3FB, 0x1F400)
_FLAGS = range(0x1F1E6, 0x1F200)
_ALONE = ("CJK UNIFIED", "CJK COMPAT", "HIRAGANA", "KATAKANA")  # scripts without spaces between words


# ------------------------------------------------------------------------------------------------------------- spelling


def spelling_of(tokenizer: Any) -> Spelling:
    """How the vocabulary of a tokenizer writes pieces of text."""
    if type(tokenizer).__name__ in _LATIN:
        return "latin"
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is not None:
        state = decoder.__getstate__().decode("utf-8")
        for kind, spelling in (("ByteLevel", "bytes"), ("WordPiece", "wordpiece"), ("Metaspace", "metaspace")):
            if f'"type":"{kind}"' in state.replace(" ", ""):
                return spelling  # type: ignore[return-value]
        if _META in json.dumps(json.loads(state), ensure_ascii=False):
            return "metaspace"
    vocabulary = tokenizer.get_vocab()
    if any(token.startswith(_META) for token in vocabulary):
        return "metaspace"
    if any(token.startswith("##") for token in vocabulary):
        return "wordpiece"
    return "bytes" if any(token.startswith("\u0120") for token in vocabulary) else "plain"


def spell(token: str, spelling: Spelling) -> str:
    """The text that a token of the vocabulary stands for; bytes that are no character are lone surrogates.

    Examples
    --------
    >>> spell("##ing", "wordpiece"), spell("\u0120cat", "bytes"), spell("\u2581cat", "metaspace")
    ('ing', ' cat', ' cat')
    """
    if spelling == "latin":
        return token.encode("latin-1", "ignore").decode("utf-8", "surrogateescape") if len(token) == 1 else token
    token = token.removesuffix("</w>") if len(token) > len("</w>") else token
    if spelling == "wordpiece":
        return token[2:] if token.startswith("##") and len(token) > 2 else token
    if spelling == "bytes":
        table = _byte_table()
        if all(character in table for character in token):
            return bytes(table[character] for character in token).decode("utf-8", "surrogateescape")
        return token
    if spelling == "metaspace":
        if match := _BYTE.fullmatch(token):
            return bytes([int(match[1], 16)]).decode("utf-8", "surrogateescape")
        return token.replace(_META, " ")
    return token


def is_byte(token: str) -> bool:
    """Whether a token is a single byte as SentencePiece writes it, ``<0xE2>``."""
    return _BYTE.fullmatch(token) is not None


@cache
def _byte_table() -> dict[str, int]:
    """GPT-2's letter of each byte, backwards: printable bytes stand for themselves, the others for 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


# -------------------------------------------------------------------------------------------------------------- visible


def visible(text: str, *, longest: int = _LONGEST) -> str:
    """A token's text with nothing invisible in it.

    One leading space stays; other white space becomes ``␣``, line ends and control characters their pictures
    (``␊``, ``␀``), bytes ``⟨E2⟩``, and whatever else has no shape of its own, above all what turns the direction of
    writing around, its code point ``⟨U+202E⟩``. A mark that would sit on the token before gets a ``◌`` of its own.

    Parameters
    ----------
    text
        What the token stands for.
    longest
        Characters after which it is cut, with a ``…``.

    Examples
    --------
    >>> visible(" cat"), visible("  "), visible("a\u202eb")
    (' cat', '␣␣', 'a⟨U+202E⟩b')
    """
    space, body = (" ", text[1:]) if text.startswith(" ") and text.strip(" ") else ("", text)
    cut = len(body) > longest
    body = body[:longest]
    shown = [_shown(character, body, at) for at, character in enumerate(body)]
    return space + ("".join(shown) or "⟨⟩") + ("…" if cut else "")


def _shown(character: str, body: str, at: int) -> str:
    code, category = ord(character), unicodedata.category(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"⟨{code - 0xDC00:02X}⟩"
    if character == " ":
        return " " if 0 < at < len(body) - 1 and " " not in (body[at - 1], body[at + 1]) else "␣"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if character in _JOINERS and 0 < at < len(body) - 1:
        return character
    if category[0] in "CZ":
        return f"⟨U+{code:04X}⟩"
    if category[0] == "M" and at == 0:
        return "◌" + character
    return character


# ---------------------------------------------------------------------------------------------------------------- words


def word_numbers(text: str) -> list[int]:
    """The word that each character is of, from 0; -1 for white space.

    A word is a run of letters, digits and what belongs to them (marks, joiners, an apostrophe between letters); any
    other character, and each one of a script that does without spaces, is a word of its own.

    Examples
    --------
    >>> word_numbers("don't stop!")
    [0, 0, 0, 0, 0, -1, 1, 1, 1, 1, 2]
    """
    numbers: list[int] = []
    word, before = -1, "space"
    for at, character in enumerate(text):
        kind = _kind(character)
        if kind == "apostrophe":
            inside = before == "letter" and at + 1 < len(text) and _kind(text[at + 1]) == "letter"
            kind = "letter" if inside else "sign"
        goes_on = before != "space" and (kind == "mark" or text[at - 1] == "\u200d")
        if kind == "flag" and before == "flag":
            goes_on, kind = True, "sign"
        if kind == "letter" and before == "letter":
            goes_on = True
        if kind == "space":
            numbers.append(-1)
        else:
            word += not goes_on
            numbers.append(word)
        before = before if kind == "mark" and before != "space" else "sign" if kind == "mark" else kind
    return numbers


@cache
def _kind(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if character.isspace():
        return "space"
    if category[0] == "M" or character in _JOINERS or code in _SKIN:
        return "mark"
    if character in "'\u2019":
        return "apostrophe"
    if code in _FLAGS:
        return "flag"
    if category[0] in "LN" or category == "Pc":
        return "sign" if unicodedata.name(character, "").startswith(_ALONE) else "letter"
    return "sign"


def words_of(spans: Sequence[tuple[int, int]], numbers: Sequence[int], *, first: int = 0) -> list[int]:
    """The word of each token, numbered from ``first`` in the order in which the tokens come to them.

    Parameters
    ----------
    spans
        First character and end of each token in the text. A token is of the word in which its first character stands
        that is no white space; one of white space only is a word of its own.
    numbers
        The word of each character, from :func:`word_numbers`.
    first
        Number of the first word.
    """
    seen: dict[int, int] = {}
    result, following = [], first
    for start, end in spans:
        word = next((number for number in numbers[start:end] if number >= 0), None)
        if word is None or word not in seen:
            number, following = following, following + 1
            if word is not None:
                seen[word] = number
        else:
            number = seen[word]
        result.append(number)
    return result


# ------------------------------------------------------------------------------------------------------------- in place


def in_place(spelled: Sequence[str], spans: Sequence[tuple[int, int]], text: str) -> list[str]:
    """What to show for each token of a text: with a space in front where, and only where, the text has one there.

    Parameters
    ----------
    spelled
        What each token stands for, from :func:`spell`.
    spans
        First character and end of each token in the text.
    text
        The text.
    """
    shown, covered = [], 0
    for piece, (start, end) in zip(spelled, spans, strict=True):
        if piece.startswith(" ") and piece != " " and start == 0 and not text[:1].isspace():
            piece = piece[1:]  # some vocabularies put a space before the whole text
        elif start > covered and text[start - 1 : start].isspace() and not piece[:1].isspace():
            piece = " " + piece
        shown.append(visible(piece))
        covered = max(covered, end)
    return shown


def align(spelled: Iterable[str], text: str) -> list[tuple[int, int]]:
    """Where tokens stand in a text, for tokenizers that do not tell: each is looked for behind the one before.

    Bytes that only together are a character stand where it does. A token that is not found as it is spelled, such as
    one for unknown words, is put at the next character that is no white space.
    """
    lowered = text.lower()
    lowered = lowered if len(lowered) == len(text) else text
    spans: list[tuple[int, int]] = []
    waiting, n_waiting, at = "", 0, 0
    for piece in spelled:
        waiting, n_waiting = waiting + piece, n_waiting + 1
        whole = _characters(waiting)
        if whole is None and n_waiting < _MOST_BYTES:
            continue
        start, end = _place(whole or "\ufffd", text, lowered, at)
        spans += [(start, end)] * n_waiting
        # A space that some vocabularies put before a text stands with what comes next.
        if not waiting.isspace() or text[start:end].isspace():
            at = end
        waiting, n_waiting = "", 0
    return spans + [(at, at)] * n_waiting


def _characters(spelled: str) -> str | None:
    """The text whose bytes these are; None where some are missing."""
    try:
        return spelled.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError:
        return None


def _place(piece: str, text: str, lowered: str, at: int) -> tuple[int, int]:
    """First character and end of a piece, from some character on."""
    following = at
    while following < len(text) and text[following].isspace():
        following += 1
    if piece.isspace():
        return (at, min(at + len(piece), following)) if following > at else (at, min(at + 1, len(text)))
    core = piece.strip()
    places = [where.find(core, following, following + len(core) + _AHEAD) for where in (text, lowered)]
    start = min((place for place in places if place >= 0), default=None)
    return (following, min(following + 1, len(text))) if start is None else (start, start + len(core))
