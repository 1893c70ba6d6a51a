"""Which windows and which of their queries stand for a corpus, whatever the order in which it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attsvm.errors import InvalidInputError
from attsvm.microscope.calls import Side
from attsvm.microscope.windows import Corpus

__all__ = ["MAX_SAMPLED_TOKENS", "SamplePlan", "sample_plan"]

MAX_SAMPLED_TOKENS = 16_384
"""Tokens of all windows that are sampled: what is kept of a head grows with it."""

_FEW = 4  # windows, below which positions are held out instead of windows
_SIDES: dict[Side, int] = {"source": 1, "target": 2}
_HELD_OUT, _POSITION = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03

Query = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """The sampled queries of a corpus, each as (window, position).

    Attributes
    ----------
    windows
        All windows that are needed, in the order of their keys.
    shown
        Those that are drawn on the page, among them.
    train
        For each side, the queries that the problems of heads are made of.
    heldout
        For each side, the queries on which their solutions are judged. None is in ``train``, nor, in corpora of at
        least four windows, of a window that is.
    """

    windows: tuple[int, ...]
    shown: tuple[int, ...]
    train: dict[Side, list[Query]]
    heldout: dict[Side, list[Query]]


def sample_plan(
    corpus: Corpus, *, max_queries: int = 600, max_heldout: int = 300, n_shown: int = 3, max_tokens: int | None = None
) -> SamplePlan:
    """Choose windows and queries by hashes of their content.

    The choice depends on the set of the windows' contents alone: neither on their order, nor on repeated ones, which
    count once, nor on how they are batched.

    Parameters
    ----------
    corpus
        The windows. Where it drops special tokens, they are no queries.
    max_queries
        Queries of each side to make problems of.
    max_heldout
        Queries of each side to judge by.
    n_shown
        Windows on the page. All their queries are in the sample, as far as they fit in ``max_queries``.
    max_tokens
        Tokens of the sampled windows; by default 16,384. One window is sampled however long it is.

    Raises
    ------
    InvalidInputError
        If a number is out of its range.
    """
    most = MAX_SAMPLED_TOKENS if max_tokens is None else max_tokens
    for name, value, least in (
        ("max_queries", max_queries, 1),
        ("max_heldout", max_heldout, 0),
        ("n_shown", n_shown, 0),
        ("max_tokens", most, 1),
    ):
        if value < least:
            raise InvalidInputError(f"sample_plan: {name} must be at least {least}, got {value}.")
    windows = _within(corpus, _distinct(corpus), most)
    apart = _apart(corpus, windows)
    together = [window for window in windows if window not in apart]
    shown = tuple(together[:n_shown])
    train: dict[Side, list[Query]] = {}
    heldout: dict[Side, list[Query]] = {}
    for side in corpus.sides:
        mine, others = _queries(corpus, together, side), _queries(corpus, sorted(apart, key=windows.index), side)
        if not apart and len(mine) > 1 and max_heldout:
            by_hash = _ranked(corpus, mine, side, _HELD_OUT)
            others = by_hash[: len(mine) // 4]
            aside = set(others)
            mine = [query for query in mine if query not in aside]
        train[side] = _chosen(corpus, mine, side, max_queries, first=shown)
        heldout[side] = _chosen(corpus, others, side, max_heldout)
    needed = set(shown) | {window for part in (train, heldout) for rows in part.values() for window, _ in rows}
    needed = needed or {windows[0]}  # none has a query: one window still tells of what size everything is
    return SamplePlan(
        windows=tuple(window for window in windows if window in needed), shown=shown, train=train, heldout=heldout
    )


def _distinct(corpus: Corpus) -> list[int]:
    """The first window of each content, by key."""
    first: dict[int, int] = {}
    for index, window in enumerate(corpus.windows):
        first.setdefault(window.key, index)
    return [first[key] for key in sorted(first)]


def _within(corpus: Corpus, windows: list[int], most: int) -> list[int]:
    """As many windows, from the lowest key on, as have at most so many tokens; at least one."""
    total = np.cumsum([corpus.windows[window].n_tokens for window in windows])
    return windows[: max(1, int((total <= most).sum()))]


def _apart(corpus: Corpus, windows: list[int]) -> set[int]:
    """A quarter of the windows, for judging; none where there are few."""
    if len(windows) < _FEW:
        return set()
    mixed = _mixed(np.array([corpus.windows[window].key for window in windows], dtype=np.uint64), _HELD_OUT)
    order = np.argsort(mixed, kind="stable")
    return {windows[at] for at in order[: len(windows) // 4]}


def _queries(corpus: Corpus, windows: Sequence[int], side: Side) -> list[Query]:
    """Every query of a side."""
    drop = corpus.special == "drop"
    return [
        (window, position)
        for window in windows
        for position, special in enumerate(corpus.windows[window].piece(side).special)
        if not (drop and special)
    ]


def _chosen(corpus: Corpus, queries: list[Query], side: Side, most: int, first: Sequence[int] = ()) -> list[Query]:
    """At most so many queries, by hash, after those of the windows in ``first``; in the order of windows."""
    order = _ranked(corpus, queries, side, _POSITION)
    preferred = {window: rank for rank, window in enumerate(first)}
    order.sort(key=lambda query: preferred.get(query[0], len(preferred)))  # stable
    kept = set(order[:most])
    return [query for query in queries if query in kept]


def _ranked(corpus: Corpus, queries: list[Query], side: Side, salt: int) -> list[Query]:
    """Queries in the order of a hash of their window's key and their position."""
    keys = np.array([corpus.windows[window].key for window, _ in queries], dtype=np.uint64)
    positions = np.array([position for _, position in queries], dtype=np.uint64)
    mixed = _mixed(_mixed(keys, salt) + positions * np.uint64(8) + np.uint64(_SIDES[side]), salt)
    return [queries[at] for at in np.argsort(mixed, kind="stable")]


def _mixed(numbers: npt.NDArray[np.uint64], salt: int) -> npt.NDArray[np.uint64]:
    """Each number through the finalizer of splitmix64."""
    mixed = numbers + np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
