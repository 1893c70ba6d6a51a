r"""Prompt lookup: guess the next tokens from what followed the same few tokens before.

A pass over m + 1 tokens reads every weight once, as a pass over one token does, and on most machines costs little more.
So the model is given its last token and m guessed ones at once. Its logits tell which guesses are right, and only those
are kept: the tokens are those of generation one by one, in fewer passes. (Several tokens at once are rounded otherwise
than one, as are several texts at once: where two tokens are equally likely up to rounding, the other one may come.)
Guesses are the continuation of the latest earlier place where the text's last few tokens stand.

How many are worth it follows from the share a of guesses that were right so far: m of them are expected to yield
$\sum_{j=0}^m a^j$ tokens for what :func:`cost_of` says.

References
----------
Leviathan, Kalman, Matias. "Fast Inference from Transformers via Speculative Decoding", 2023. arXiv:2211.17192, whose
draft model is here a look into the text.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Lookup", "cost_of"]

SIZES = (4, 3, 2)
"""Tokens that must agree, the most first: the longer the agreement, the better the guess."""

_GAIN, _FADE = 1.05, 0.9


def cost_of(m: int) -> float:
    """Cost of a pass with m guesses, in passes with none, as measured on a CPU in float32; a GPU's grows less."""
    return 1.0 if m == 0 else 1.1 + 0.05 * m


class Lookup:
    """Guesses about one text.

    Parameters
    ----------
    tokens
        The text so far.
    most
        Guesses at once, at most.

    Examples
    --------
    >>> lookup = Lookup([1, 2, 3, 4, 1, 2, 3], most=5)
    >>> lookup.guess(3)
    [4, 1, 2]
    """

    def __init__(self, tokens: Iterable[int], most: int) -> None:
        self.most = most
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        self._expected: list[int] = []
        self._size = 0
        # Right guesses and guesses, old ones counting less, as if one of two had been right at first.
        self._right = dict.fromkeys(SIZES, 1.0)
        self._made = dict.fromkeys(SIZES, 2.0)
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Go on with a token that is certain."""
        if self._expected:
            # Guesses too doubtful to be tried are judged too, so that nothing is spent on finding out.
            right = self._expected[0] == token
            self._right[self._size] = _FADE * self._right[self._size] + right
            self._made[self._size] = _FADE * self._made[self._size] + 1.0
            self._expected = self._expected[1:] if right else []
        end = len(self._tokens)
        for size in SIZES:
            if end >= size:
                self._places[tuple(self._tokens[-size:])] = end
        self._tokens.append(token)

    def guess(self, room: int) -> list[int]:
        """The next tokens, as many as are worth a try and at most ``room``; often none."""
        self._expected = []
        for size in SIZES:
            place = self._places.get(tuple(self._tokens[-size:]))
            if place is not None:
                self._size = size
                self._expected = self._following(place)
                return self._expected[: min(room, self._worth(size))]
        return []

    def _following(self, place: int) -> list[int]:
        """What stands from a place on; where that runs into the end, what was guessed there."""
        found: list[int] = []
        behind = len(self._tokens) - place
        for k in range(self.most):
            found.append(self._tokens[place + k] if k < behind else found[k - behind])
        return found

    def _worth(self, size: int) -> int:
        """How many guesses give the most tokens a pass."""
        share = self._right[size] / self._made[size]
        best, most, expected = 0, _GAIN, 1.0
        for m in range(1, self.most + 1):
            expected += share**m
            if expected / cost_of(m) > most:
                best, most = m, expected / cost_of(m)
        return best
