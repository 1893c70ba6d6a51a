"""Masks: each one's rule by two loops, how they join, how they look, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attsvm.attention import masks
from attsvm.attention.plots import plot_mask, plot_weights
from attsvm.errors import InvalidInputError

LENGTHS = st.integers(1, 9)


def by_rule(rule: Callable[[int, int], bool], n_queries: int, n_keys: int) -> Tensor:
    """``rule(place of the query, place of the key)`` for every pair."""
    rows = [[rule(n_keys - n_queries + i, t) for t in range(n_keys)] for i in range(n_queries)]
    return torch.tensor(rows)


@given(LENGTHS, LENGTHS, st.integers(0, 9), st.integers(1, 5), st.integers(1, 3))
def test_rules(n_queries: int, n_keys: int, prefix: int, window: int, step: int) -> None:
    prefix = min(prefix, n_keys)

    def check(mask: Tensor, rule: Callable[[int, int], bool]) -> None:
        assert torch.equal(mask, by_rule(rule, n_queries, n_keys))

    sizes = (n_queries, n_keys)
    check(masks.causal_mask(*sizes), lambda p, t: t <= p)
    check(masks.prefix_mask(*sizes, prefix=prefix), lambda p, t: t <= p or t < prefix)
    check(masks.sliding_window_mask(*sizes, window=window), lambda p, t: abs(p - t) < window)
    check(masks.sliding_window_mask(*sizes, window=window, causal=True), lambda p, t: p - window < t <= p)
    reach = [step * u for u in range(window)]
    check(masks.dilated_mask(*sizes, window=window, dilation=step), lambda p, t: abs(p - t) in reach)
    check(masks.dilated_mask(*sizes, window=window, dilation=step, causal=True), lambda p, t: p - t in reach)
    check(masks.strided_mask(*sizes, stride=window), lambda p, t: t <= p and (p - t < window or (p - t) % window == 0))


@given(LENGTHS, st.integers(0, 8), st.integers(1, 3), st.sets(st.integers(0, 8)), st.integers(1, 2), st.booleans())
def test_global_and_local(
    n_queries: int, more: int, window: int, chosen: set[int], dilation: int, causal: bool
) -> None:
    n_keys = n_queries + more
    chosen = {place for place in chosen if place < n_keys}
    reach = [dilation * u for u in range(window)]
    mask = masks.global_local_mask(
        n_queries, n_keys, window=window, global_tokens=sorted(chosen), dilation=dilation, causal=causal
    )

    def rule(p: int, t: int) -> bool:
        return (abs(p - t) in reach or p in chosen or t in chosen) and (t <= p or not causal)

    assert torch.equal(mask, by_rule(rule, n_queries, n_keys))


@given(LENGTHS, LENGTHS, st.integers(1, 4), st.integers(0, 99))
def test_blocks(n_queries: int, n_keys: int, block: int, seed: int) -> None:
    shape = (2, -(-n_queries // block), -(-n_keys // block))
    layout = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = masks.block_sparse_mask(layout, block, n_queries, n_keys)
    assert mask.shape == (2, n_queries, n_keys)
    for h, i, t in torch.cartesian_prod(torch.arange(2), torch.arange(n_queries), torch.arange(n_keys)).tolist():
        assert mask[h, i, t] == layout[h, i // block, t // block]


def test_prefix_of_each_sequence() -> None:
    mask = masks.prefix_mask(4, prefix=torch.tensor([0, 3]))
    assert mask.shape == (2, 1, 4, 4)
    assert torch.equal(mask[0, 0], masks.causal_mask(4))
    assert torch.equal(mask[1, 0], masks.prefix_mask(4, prefix=3))


def test_bigbird_has_window_global_and_random_blocks() -> None:
    block, blocks = 4, 20
    mask = masks.bigbird_mask(block * blocks - 1, block_size=block, n_window=3, n_global=1, n_random=2, seed=5)
    assert mask.shape == (79, 79)
    layout = mask[::block, ::block]
    assert torch.equal(mask, masks.block_sparse_mask(layout, block, 79))
    assert bool(layout[0].all() and layout[-1].all() and layout[:, 0].all() and layout[:, -1].all())
    window = masks.sliding_window_mask(blocks, window=2)
    assert bool((layout | ~window).all())
    # Rows away from the ends: 3 of the window, 2 global, 2 random; next to the ends one of the window is global.
    assert layout[2:-2].sum(-1).tolist() == [7] * (blocks - 4)
    assert layout[[1, -2]].sum(-1).tolist() == [6, 6]
    again = masks.bigbird_mask(79, block_size=block, n_random=2, seed=5)
    other = masks.bigbird_mask(79, block_size=block, n_random=2, seed=6)
    assert torch.equal(mask, again)
    assert not torch.equal(mask, other)
    plain = masks.bigbird_mask(79, block_size=block, n_global=0, n_random=0)
    assert torch.equal(plain[::block, ::block], window)
    assert bool(masks.bigbird_mask(6, block_size=4).all())  # fewer blocks than are wanted: all of them


def test_bigbird_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    masks.bigbird_mask(64, block_size=4)
    assert torch.equal(torch.rand(3), expected)


def test_top_k_keeps_the_highest_and_of_equals_the_earlier() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert masks.top_k_mask(scores, 2).tolist() == [[True, False, True, False], [True, True, False, False]]
    assert bool(masks.top_k_mask(scores, 9).all())
    allowed = torch.tensor([[False, True, True, True], [False, False, False, True]])
    kept = masks.top_k_mask(scores, 2, mask=allowed)
    assert kept.tolist() == [[False, False, True, True], [False, False, False, True]]
    assert not bool(masks.top_k_mask(scores, 2, mask=torch.tensor([False])).any())


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_top_k_counts(n_keys: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 4, n_keys, generator=generator)
    allowed = torch.rand(2, 1, 1, n_keys, generator=generator) < 0.5
    kept = masks.top_k_mask(scores, k, mask=allowed)
    assert torch.equal(kept.sum(-1), allowed.sum(-1).clamp(max=k).expand(2, 3, 4))
    lowest_kept = scores.masked_fill(~kept, torch.inf).amin(-1)
    highest_left = scores.masked_fill(kept | ~allowed, -torch.inf).amax(-1)
    assert bool((lowest_kept > highest_left).all())


def test_threshold() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.9]])
    assert masks.threshold_mask(scores, 0.5).tolist() == [[False, True, True]]
    assert masks.threshold_mask(scores, 0.5, mask=torch.tensor([True, True, False])).tolist() == [[False, True, False]]


def test_padding_joins_with_causal() -> None:
    mask = masks.padding_mask(torch.tensor([[0, 1, 1], [1, 1, 1]])) & masks.causal_mask(3)
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].tolist() == [[False, False, False], [False, True, False], [False, True, True]]
    assert torch.equal(mask[1, 0], masks.causal_mask(3))


IDS = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])


@pytest.mark.parametrize(
    "mask",
    [IDS == 0, (IDS == 0).long(), (IDS == 0)[:, None, None], torch.tensor([[False] * 4, [False, False, False, True]])],
)
def test_an_inverted_mask_is_named(mask: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"True only on padding \(id 0\): it is inverted. Give ~mask"):
        masks.check_padding(mask, IDS, 0)


def test_a_mask_that_allows_nothing_is_named() -> None:
    ids = torch.tensor([[5, 6], [7, 8]])
    with pytest.raises(InvalidInputError, match="False everywhere: it is inverted, or allows nothing"):
        masks.check_padding(ids == 0, ids, 0)


def test_masks_that_mean_what_they_should_pass() -> None:
    masks.check_padding(IDS != 0, IDS, 0)
    masks.check_padding(torch.ones_like(IDS), IDS, 0)
    masks.check_padding(IDS == 7, IDS, 0)  # strange, but not inverted
    # The end-of-text token as padding: real where it ends a sequence, padding after it.
    ids = torch.tensor([[5, 0, 0], [0, 0, 0]])
    masks.check_padding(torch.tensor([[1, 1, 0], [1, 0, 0]]), ids, 0)
    masks.check_padding(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.long), 0)


def test_show_writes_heads_and_words() -> None:
    mask = torch.stack([masks.causal_mask(2), ~masks.causal_mask(2)])
    text = masks.show(mask, queries=["a", "bcd"], keys=["xy", "z"])
    assert text == "[0]\n    x\n    y z\n  a ■ ·\nbcd ■ ■\n\n[1]\n    x\n    y z\n  a · ■\nbcd · ·"


def test_pictures() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure()
    first, second = figure.subplots(1, 2)
    mask = masks.causal_mask(3)
    assert plot_mask(mask, ax=first, queries=["The", "black", "cat"], keys=["a", "b", "c"]) is first
    assert [label.get_text() for label in first.get_yticklabels()] == ["The", "black", "cat"]
    assert torch.equal(torch.as_tensor(first.images[0].get_array().data), mask.float())
    weights = mask / mask.sum(-1, keepdim=True)
    assert plot_weights(weights.requires_grad_(), ax=second) is second
    assert torch.equal(torch.as_tensor(second.images[0].get_array().data), weights.detach())


BAD: list[tuple[str, Callable[[], Any]]] = [
    (r"padding_mask: attention_mask must be \(B, T\)", lambda: masks.padding_mask(torch.ones(3))),
    ("attention_mask must hold booleans or 0 and 1", lambda: masks.padding_mask(torch.tensor([[0, 1, 2]]))),
    ("attention_mask must hold booleans", lambda: masks.padding_mask(torch.tensor([[0.0, -torch.inf]]))),
    (r"mask must be \(B, T\) like ids \(2, 4\), got \(2, 3\)", lambda: masks.check_padding(IDS[:, :3] > 0, IDS, 0)),
    ("causal_mask: n_queries must be >= 1, got 0", lambda: masks.causal_mask(0)),
    ("causal_mask: n_keys must be >= 1, got -1", lambda: masks.causal_mask(1, -1)),
    (r"prefix must be a whole number in \[0, 3\]", lambda: masks.prefix_mask(3, prefix=4)),
    ("prefix must be a whole number", lambda: masks.prefix_mask(3, prefix=torch.tensor([0.5]))),
    ("window must be >= 1, got 0", lambda: masks.sliding_window_mask(3, window=0)),
    ("dilation must be >= 1, got 0", lambda: masks.dilated_mask(3, window=1, dilation=0)),
    (r"global_tokens must be places in \[0, 3\)", lambda: masks.global_local_mask(3, window=1, global_tokens=[3])),
    ("n_queries must be at most n_keys", lambda: masks.global_local_mask(3, 2, window=1, global_tokens=[0])),
    ("block_size must be >= 1", lambda: masks.block_sparse_mask(torch.ones(1, 1, dtype=torch.bool), 0, 1)),
    (r"layout must be boolean of shape \(..., 2, 2\)", lambda: masks.block_sparse_mask(torch.ones(2, 2), 2, 4)),
    ("layout must be boolean", lambda: masks.block_sparse_mask(torch.ones(2, 3, dtype=torch.bool), 2, 4)),
    ("n_window must be odd", lambda: masks.bigbird_mask(8, block_size=2, n_window=2)),
    ("stride must be >= 1", lambda: masks.strided_mask(8, stride=0)),
    ("k must be >= 1", lambda: masks.top_k_mask(torch.zeros(2, 2), 0)),
    ("scores must be floating point", lambda: masks.top_k_mask(torch.zeros(2, 2, dtype=torch.long), 1)),
    ("mask must be boolean", lambda: masks.top_k_mask(torch.zeros(2, 2), 1, mask=torch.ones(2))),
    (
        r"mask must broadcast to the scores \(2, 2\)",
        lambda: masks.threshold_mask(torch.zeros(2, 2), 1.0, mask=torch.ones(3, dtype=torch.bool)),
    ),
    ("show: mask must be boolean", lambda: masks.show(torch.ones(2, 2))),
    ("keys must have 2 words, one for each, got 1", lambda: masks.show(masks.causal_mask(2), keys=["a"])),
    ("plot_mask: mask must be boolean", lambda: plot_mask(torch.ones(2, 2))),
    (r"plot_mask: mask must be \(Tq, Tk\)", lambda: plot_mask(masks.causal_mask(2)[None])),
    ("queries must have 2 words", lambda: plot_mask(masks.causal_mask(2), queries=["a"])),
    ("weights must be floating point", lambda: plot_weights(masks.causal_mask(2))),
]


@pytest.mark.parametrize("message, call", BAD)
def test_what_does_not_fit_is_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call()
