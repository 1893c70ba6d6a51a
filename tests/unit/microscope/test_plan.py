"""The sample of a corpus: the same whatever the order, bounded, and honest about what is held out."""

from __future__ import annotations

import numpy as np
import pytest

from attsvm.errors import InvalidInputError
from attsvm.microscope.plan import SamplePlan, sample_plan
from attsvm.microscope.windows import Corpus, Piece, Window, content_key


def piece(ids: list[int]) -> Piece:
    n = len(ids)
    special = tuple(at in (0, n - 1) for at in range(n))
    return Piece(ids=tuple(ids), special=special, tokens=tuple(map(str, ids)), words=tuple(range(n)))


def corpus_of(rows: list[list[int]], *, targets: bool = False, special: str = "keep") -> Corpus:
    windows = []
    for at, row in enumerate(rows):
        source, target = piece(row), piece([*row[::-1], 1]) if targets else None
        windows.append(Window(text=at, start=0, source=source, target=target, key=content_key(source, target)))
    return Corpus(texts=tuple(map(str, rows)), windows=tuple(windows), special=special)  # type: ignore[arg-type]


def random_rows(n: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 1000, generator.integers(3, longest)).tolist() for _ in range(n)]


def content(corpus: Corpus, plan: SamplePlan) -> tuple[object, ...]:
    """The plan without the numbers of windows."""

    def named(rows: dict[object, list[tuple[int, int]]]) -> object:
        return {side: {(corpus.windows[w].source.ids, p) for w, p in queries} for side, queries in rows.items()}

    keys = [corpus.windows[window].key for window in plan.windows]
    assert keys == sorted(keys)
    shown = [corpus.windows[window].source.ids for window in plan.shown]
    return keys, shown, named(plan.train), named(plan.heldout)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 40])
@pytest.mark.parametrize("targets", [False, True])
def test_order_and_repetition_change_nothing(n: int, targets: bool) -> None:
    rows = random_rows(n)
    corpus = corpus_of(rows, targets=targets)
    expected = content(corpus, sample_plan(corpus, max_queries=100, max_heldout=40))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(n)
        again = corpus_of([rows[at] for at in order] + [rows[at] for at in order[: n // 2]], targets=targets)
        assert content(again, sample_plan(again, max_queries=100, max_heldout=40)) == expected


def test_a_quarter_of_the_windows_is_held_out_whole() -> None:
    corpus = corpus_of(random_rows(40))
    plan = sample_plan(corpus, max_queries=10_000, max_heldout=10_000)
    train, heldout = ({window for window, _ in part["source"]} for part in (plan.train, plan.heldout))
    assert len(heldout) == 10
    assert not train & heldout
    assert train | heldout == set(range(40)) == set(plan.windows)
    assert sum(len(part["source"]) for part in (plan.train, plan.heldout)) == corpus.n_tokens


@pytest.mark.parametrize("n", [1, 2, 3])
def test_of_few_windows_positions_are_held_out(n: int) -> None:
    corpus = corpus_of(random_rows(n))
    plan = sample_plan(corpus)
    train, heldout = set(plan.train["source"]), set(plan.heldout["source"])
    assert not train & heldout
    assert len(train | heldout) == corpus.n_tokens
    assert len(heldout) == corpus.n_tokens // 4
    assert sample_plan(corpus, max_heldout=0).heldout == {"source": []}
    assert len(sample_plan(corpus, max_heldout=0).train["source"]) == corpus.n_tokens


def test_numbers_of_queries_are_bounded_and_shown_windows_come_first() -> None:
    corpus = corpus_of(random_rows(60), targets=True)
    plan = sample_plan(corpus, max_queries=120, max_heldout=50, n_shown=2)
    for side in ("source", "target"):
        assert len(plan.train[side]) == 120
        assert len(plan.heldout[side]) == 50
        for window in plan.shown:
            asked = [position for where, position in plan.train[side] if where == window]
            assert asked == list(range(len(corpus.windows[window].piece(side))))
    assert len(plan.shown) == 2
    assert set(plan.shown) <= set(plan.windows)


def test_a_shown_window_that_is_too_long_is_sampled() -> None:
    corpus = corpus_of([list(range(2, 202))] * 2)
    plan = sample_plan(corpus, max_queries=60, max_heldout=10)
    assert len(plan.train["source"]) == 60
    assert len(plan.heldout["source"]) == 10
    positions = [position for _, position in plan.train["source"]]
    assert positions != list(range(60))
    assert max(positions) > 100


def test_tokens_in_memory_are_bounded() -> None:
    corpus = corpus_of(random_rows(80))
    plan = sample_plan(corpus, max_queries=10**6, max_heldout=10**6, max_tokens=300)
    assert 200 < sum(corpus.windows[window].n_tokens for window in plan.windows) <= 300
    assert len(sample_plan(corpus, max_tokens=1).windows) == 1


def test_dropped_special_tokens_are_no_queries() -> None:
    corpus = corpus_of(random_rows(10), special="drop")
    plan = sample_plan(corpus, max_queries=10_000, max_heldout=10_000)
    asked = [*plan.train["source"], *plan.heldout["source"]]
    assert len(asked) == corpus.n_tokens - 20
    assert not any(corpus.windows[window].source.special[position] for window, position in asked)


def test_more_queries_contain_fewer() -> None:
    corpus = corpus_of(random_rows(40))
    small, large = (sample_plan(corpus, max_queries=most, n_shown=1) for most in (50, 200))
    assert set(small.train["source"]) < set(large.train["source"])


def test_positions_are_spread_evenly() -> None:
    corpus = corpus_of(random_rows(400, longest=21))
    plan = sample_plan(corpus, max_queries=1500, n_shown=0)
    share = np.bincount([position for _, position in plan.train["source"]], minlength=20)
    pool = {window for window, _ in sample_plan(corpus, max_queries=10**6, n_shown=0).train["source"]}
    held = np.bincount([p for window in pool for p in range(len(corpus.windows[window].source))], minlength=20)
    expected = held * 1500 / held.sum()
    assert float((((share - expected) ** 2) / expected).sum()) < 43.8  # 99.9 % point of chi-square, 19 degrees


@pytest.mark.parametrize("given", [{"max_queries": 0}, {"max_heldout": -1}, {"n_shown": -1}, {"max_tokens": 0}])
def test_numbers_out_of_range_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=f"sample_plan: {next(iter(given))} must be at least"):
        sample_plan(corpus_of(random_rows(3)), **given)
