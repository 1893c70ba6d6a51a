"""Positions: the formulas, what depends on distance alone, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attsvm.attention.functional import attend
from attsvm.attention.positions import (
    LearnedPositions,
    RelativeBias,
    Rotary,
    alibi_bias,
    alibi_slopes,
    llama3_frequencies,
    relative_buckets,
    sinusoidal,
)
from attsvm.errors import InvalidInputError


def test_sinusoidal_by_the_formula() -> None:
    table, halves = (sinusoidal(7, 6, interleaved=how, dtype=torch.float64) for how in (True, False))
    for t in range(7):
        for j in range(3):
            angle = t / 10000 ** (2 * j / 6)
            assert table[t, 2 * j].item() == pytest.approx(math.sin(angle), abs=1e-15)
            assert table[t, 2 * j + 1].item() == pytest.approx(math.cos(angle), abs=1e-15)
    assert torch.equal(halves, torch.cat([table[:, ::2], table[:, 1::2]], -1))
    assert sinusoidal(2, 4).dtype == torch.float32


def test_learned_positions_refuse_what_was_not_learned() -> None:
    layer = LearnedPositions(5, 4, offset=2)
    assert layer.weight.shape == (7, 4)
    assert torch.equal(layer(torch.tensor([[0, 4]])), layer.weight[[2, 6]][None])
    for wrong in ([0, 5], [-1, 0]):
        with pytest.raises(InvalidInputError, match=r"positions must be in \[0, 5\), the length that was learned"):
            layer(torch.tensor(wrong))


def test_rotary_turns_each_pair_by_its_angle() -> None:
    rotary = Rotary(4, base=100.0)
    q = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 1, 4)
    turned, _ = rotary(q, q, torch.tensor([3]))
    for j, (x, y) in enumerate([(1.0, 3.0), (2.0, 4.0)]):
        angle = 3 * 100.0 ** (-2 * j / 4)
        assert turned[0, 0, 0, j].item() == pytest.approx(x * math.cos(angle) - y * math.sin(angle), abs=1e-6)
        assert turned[0, 0, 0, j + 2].item() == pytest.approx(y * math.cos(angle) + x * math.sin(angle), abs=1e-6)


@given(st.integers(0, 100), st.sampled_from([None, 2, 4]), st.integers(0, 99))
def test_rotary_logits_depend_on_distance_alone(shift: int, d_rotated: int | None, seed: int) -> None:
    rotary = Rotary(8, base=50.0, d_rotated=d_rotated)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 2, 5, 8, generator=generator)
    k = torch.randn(1, 1, 5, 8, generator=generator)
    products = [(a @ b.mT) for a, b in (rotary(q, k, torch.arange(5) + by) for by in (0, shift))]
    # float32 angles up to 100 are good to 1e-5.
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=3e-4)


def test_rotary_at_place_zero_and_beyond_d_rotated_changes_nothing() -> None:
    rotary = Rotary(6, d_rotated=4)
    q, k = torch.randn(2, 1, 2, 3, 6, generator=torch.Generator().manual_seed(0))
    turned, still = rotary(q, k, torch.zeros(3, dtype=torch.long))
    assert torch.equal(turned, q)
    assert torch.equal(still, k)
    turned, _ = rotary(q, k, torch.arange(1, 4))
    assert torch.equal(turned[..., 4:], q[..., 4:])
    assert bool((turned[..., :4] != q[..., :4]).all())


def test_rotary_tables_serve_all_layers_and_each_sequence_its_places() -> None:
    rotary = Rotary(6)
    q, k = torch.randn(2, 2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    both = rotary(q, k, places)
    assert both[0].dtype == torch.float64
    for row in range(2):
        alone = rotary(q[row : row + 1], k[row : row + 1], places[row])
        for x, y in zip(both, alone):
            assert torch.equal(x[row : row + 1], y)
    for x, y in zip(both, rotary(q, k, rotary.tables(places, torch.float64))):
        assert torch.equal(x, y)


def test_rotary_gradients() -> None:
    rotary = Rotary(4)
    q, k = torch.randn(2, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k: rotary(q, k, torch.arange(3)), (q.requires_grad_(), k.requires_grad_())
    )


def test_rotary_frequencies_survive_half_precision_and_the_meta_device() -> None:
    exact = Rotary(8).frequencies.clone()
    assert torch.equal(Rotary(8).bfloat16().frequencies, exact)
    assert Rotary(8).double().frequencies.dtype == torch.float32
    with torch.device("meta"):
        model = torch.nn.Sequential(Rotary(8))
    assert torch.equal(model.to_empty(device="cpu")[0].frequencies, exact)


def test_rotary_is_no_part_of_a_checkpoint() -> None:
    assert not Rotary(4).state_dict()


def test_llama3_frequencies_stretch_long_waves_only() -> None:
    given_ = {"factor": 8.0, "low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_n_ctx": 8192}
    plain = Rotary(64, 5e5).frequencies
    scaled = llama3_frequencies(64, 5e5, **given_)
    turns = 8192 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    assert torch.equal(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert bool(between.any())
    assert bool(((scaled < plain) & (scaled > plain / 8))[between].all())


def test_alibi_slopes_and_distances() -> None:
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0, dtype=torch.float64))
    twelve = alibi_slopes(12)
    torch.testing.assert_close(twelve[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=torch.float64))
    bias = alibi_bias(2, 2, 4)
    assert bias.shape == (1, 2, 2, 4)
    assert torch.equal(bias[0, 0] * -16, torch.tensor([[2.0, 1, 0, 1], [3, 2, 1, 0]]))
    assert torch.equal(bias[0, 1] * -256, torch.tensor([[2.0, 1, 0, 1], [3, 2, 1, 0]]))


def test_alibi_is_a_bias_of_attend() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    near = attend(q * 0, k, v, bias=50 * 16 * alibi_bias(2, 5)[:, :1], causal=True).output
    torch.testing.assert_close(near, v, rtol=0, atol=1e-6)  # at steep slopes every query sees itself alone


def bucket_by_the_paper(distance: int, n_buckets: int, max_distance: int, bidirectional: bool) -> int:
    start = 0
    if bidirectional:
        n_buckets //= 2
        start, distance = (n_buckets if distance > 0 else 0), abs(distance)
    else:
        distance = max(-distance, 0)
    exact = n_buckets // 2
    if distance < exact:
        return start + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return start + min(exact + int(share * (n_buckets - exact)), n_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (10, 40), (4, 3)])
def test_buckets_of_t5(bidirectional: bool, sizes: tuple[int, int]) -> None:
    distance = torch.arange(-300, 301)
    buckets = relative_buckets(distance, n_buckets=sizes[0], max_distance=sizes[1], bidirectional=bidirectional)
    expected = torch.tensor([bucket_by_the_paper(d, *sizes, bidirectional) for d in distance.tolist()])
    # float32 logarithms may move a distance that lies on an edge between two buckets, and only such.
    edges = (buckets != expected).nonzero().flatten().tolist()
    assert all(abs(int(buckets[i] - expected[i])) == 1 for i in edges)
    assert len(edges) <= 4
    assert int(buckets.max()) < sizes[0]


@given(st.booleans(), st.integers(1, 6), st.integers(0, 6))
def test_relative_bias_depends_on_distance_alone(bidirectional: bool, n_queries: int, more: int) -> None:
    layer = RelativeBias(3, n_buckets=8, max_distance=5, bidirectional=bidirectional)
    n_keys = n_queries + more
    whole, part = layer(n_keys), layer(n_queries, n_keys)
    assert part.shape == (1, 3, n_queries, n_keys)
    assert torch.equal(part, whole[:, :, more:])  # the last queries of a longer sequence, as with a cache
    assert torch.equal(whole[..., 1:, 1:], whole[..., :-1, :-1])
    if not bidirectional and n_keys > 1:
        assert torch.equal(whole[0, :, 0, 1], layer.weight[0])  # a later key counts as distance 0


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("sinusoidal: d_model must be even, got 5", lambda: sinusoidal(3, 5)),
    ("sinusoidal: n_positions must be >= 1, got 0", lambda: sinusoidal(0, 4)),
    ("LearnedPositions: n_ctx must be >= 1", lambda: LearnedPositions(0, 4)),
    ("LearnedPositions: offset must be >= 0", lambda: LearnedPositions(1, 4, offset=-1)),
    ("LearnedPositions: positions must be integers", lambda: LearnedPositions(3, 4)(torch.zeros(3))),
    ("Rotary: d_rotated must be even and at most d_head", lambda: Rotary(5)),
    ("Rotary: d_rotated must be even and at most d_head", lambda: Rotary(4, d_rotated=6)),
    ("Rotary: base must be > 0", lambda: Rotary(4, base=0.0)),
    (r"Rotary: frequencies must have shape \(2,\)", lambda: Rotary(4, frequencies=torch.ones(4))),
    ("Rotary: positions must be integers", lambda: Rotary(4).tables(torch.zeros(3))),
    (
        "Rotary: q must be .* T = 2 positions and d_head = 4",
        lambda: Rotary(4)(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), torch.arange(2)),
    ),
    (
        "Rotary: k must be .* d_head = 4",
        lambda: Rotary(4)(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 6), torch.arange(2)),
    ),
    ("alibi_slopes: n_heads must be >= 1", lambda: alibi_bias(0, 3)),
    ("n_queries and n_keys must be >= 1", lambda: alibi_bias(2, 0)),
    ("relative_buckets: n_buckets must be at least 4", lambda: RelativeBias(2, n_buckets=3)),
    ("relative_buckets: n_buckets must be at least 2", lambda: RelativeBias(2, n_buckets=1, bidirectional=False)),
    ("max_distance above the number of exact", lambda: RelativeBias(2, n_buckets=32, max_distance=8)),
    ("RelativeBias: n_heads must be >= 1", lambda: RelativeBias(0)),
]


@pytest.mark.parametrize("message, call", BAD)
def test_what_does_not_fit_is_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call()
