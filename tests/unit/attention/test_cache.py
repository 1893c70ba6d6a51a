"""The key-value cache: what goes in comes out, in every mode of autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attsvm.attention.cache import KeyValueCache
from attsvm.errors import InvalidInputError


def pieces(lengths: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(2, 3, T, 4, generator=generator), torch.randn(2, 3, T, 5, generator=generator)) for T in lengths
    ]


@given(
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from([torch.enable_grad, torch.no_grad])), min_size=1, max_size=8),
    st.sampled_from([0, 4, 100]),
)
def test_the_cache_is_a_concatenation(steps: list[tuple[int, Any]], capacity: int) -> None:
    lengths = [length for length, _ in steps]
    cache, seen = KeyValueCache(capacity), pieces(lengths)
    for count, ((k, v), (_, mode)) in enumerate(zip(seen, steps), start=1):
        for layer in (0, 1):
            with mode():
                keys, values = cache.update(layer, k + layer, v + layer)
            assert torch.equal(keys, torch.cat([k for k, _ in seen[:count]], 2) + layer)
            assert torch.equal(values, torch.cat([v for _, v in seen[:count]], 2) + layer)
    assert cache.length == sum(lengths) == cache.length_of(1)


@torch.no_grad()
def test_what_was_returned_is_never_written_over() -> None:
    cache = KeyValueCache(8)
    (k, v), (k2, v2) = pieces([3, 2])
    first, _ = cache.update(0, k, v)
    cache.update(0, k2, v2)
    cache.truncate(3)
    cache.update(0, k2 + 1, v2)
    cache.reorder(torch.tensor([1, 0]))
    cache.update(0, k2 + 2, v2)
    assert torch.equal(first, k)


@torch.no_grad()
def test_new_positions_are_written_in_place_while_there_is_room() -> None:
    cache = KeyValueCache(8)
    (k, v), (k2, v2) = pieces([3, 2])
    first, _ = cache.update(0, k, v)
    second, _ = cache.update(0, k2, v2)
    assert first.data_ptr() == second.data_ptr()
    third, _ = cache.update(0, *pieces([4], seed=3)[0])
    assert third.data_ptr() != second.data_ptr()


def test_what_the_backward_pass_needs_is_not_written_over() -> None:
    cache, query = KeyValueCache(8), torch.ones(4, requires_grad=True)
    (k, v), (k2, v2) = pieces([3, 2])
    products = cache.update(0, k, v)[0] @ query  # the keys need no gradient, the query does
    cache.update(0, k2, v2)
    products.sum().backward()
    torch.testing.assert_close(query.grad, k.sum((0, 1, 2)))


def test_reorder_takes_rows_and_may_change_the_batch() -> None:
    cache = KeyValueCache()
    ((k, v),) = pieces([3])
    for layer in ("a", "b"):
        cache.update(layer, k, v)
    cache.reorder(torch.tensor([1, 1, 0]))
    for layer in ("a", "b"):
        assert torch.equal(cache[layer][0], k[[1, 1, 0]])
        assert torch.equal(cache[layer][1], v[[1, 1, 0]])
    with pytest.raises(InvalidInputError, match="index must hold batch rows"):
        cache.reorder(torch.tensor([True, False, True]))


def test_truncate_forgets_the_end() -> None:
    cache = KeyValueCache()
    (k, v), (k2, v2) = pieces([3, 2])
    cache.update(0, k, v)
    cache.truncate(1)
    keys, _ = cache.update(0, k2, v2)
    assert torch.equal(keys, torch.cat([k[:, :, :1], k2], 2))
    with pytest.raises(InvalidInputError, match=r"length must be in \[0, 3\], got 4"):
        cache.truncate(4)


def test_gradients_pass_through() -> None:
    cache, (first, second) = KeyValueCache(), pieces([3, 2])
    k, v = first[0].requires_grad_(), first[1].requires_grad_()
    cache.update(0, k, v)
    keys, values = cache.update(0, *second)  # needs no gradient itself, but what it is joined to does
    (keys.sum() + 2 * values.sum()).backward()
    assert torch.equal(k.grad, torch.ones_like(k))
    assert torch.equal(v.grad, 2 * torch.ones_like(v))


def test_filled_in_one_mode_and_continued_in_another() -> None:
    cache, parts = KeyValueCache(16), pieces([3, 2, 1, 2])
    with torch.inference_mode():
        cache.update(0, *parts[0])
    with torch.no_grad():
        cache.update(0, *parts[1])
    cache.update(0, parts[2][0].requires_grad_(), parts[2][1])
    with torch.no_grad():
        keys, values = cache.update(0, *parts[3])
    assert torch.equal(keys, torch.cat([k for k, _ in parts], 2))
    assert torch.equal(values, torch.cat([v for _, v in parts], 2))


def test_what_does_not_continue_the_layer_is_named() -> None:
    cache = KeyValueCache()
    ((k, v),) = pieces([3])
    cache.update(0, k, v)
    for wrong in (k[:1], k[:, :2], k[..., :3], k.double()):
        with pytest.raises(InvalidInputError, match="k must continue layer 0"):
            cache.update(0, wrong, wrong)
    with pytest.raises(InvalidInputError, match="v must continue layer 0"):
        cache.update(0, k, v.double())
    with pytest.raises(InvalidInputError, match="k and v must be"):
        cache.update(1, k, v[:, :, :2])
    with pytest.raises(InvalidInputError, match="layer must be one that was updated, got 7"):
        cache[7]
    with pytest.raises(InvalidInputError, match="capacity must be >= 0, got -1"):
        KeyValueCache(-1)
    assert cache.length_of(1) == 0
    assert 1 not in cache
