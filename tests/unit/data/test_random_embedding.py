from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attsvm.data import random_embedding
from attsvm.errors import InvalidInputError


def test_words_are_unit_vectors_and_the_first_token_is_a_query() -> None:
    data = random_embedding(["It's good, good.", "GOOD"], d_model=16, seed=1)
    assert data.pieces == (("[BOS]", "it's", "good", ",", "good", "."), ("[BOS]", "good"))
    assert data.token_strings == (("", "It's", "good", ",", "good", "."), ("", "GOOD"))
    assert data.tokens.shape == (2, 6, 16)
    assert data.tokens.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(data.tokens[0, 1:], axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(data.tokens[0, 2], data.tokens[0, 4])
    np.testing.assert_array_equal(data.tokens[0, 2], data.tokens[1, 1])
    assert data.allowed.tolist() == [[False, True, True, True, True, True], [False, True] + [False] * 4]
    assert data.special.tolist() == [[True] + [False] * 5] * 2
    assert data.lengths.tolist() == [6, 2]
    assert not data.tokens[1, 2:].any()


def test_the_query_is_the_constant_plus_the_direction_of_the_mean() -> None:
    data = random_embedding(["a b", ""], d_model=8)
    constant = data.tokens[1, 0]
    mean = data.tokens[0, 1:].mean(axis=0)
    np.testing.assert_allclose(np.linalg.norm(constant), 1.0, rtol=1e-6)
    np.testing.assert_allclose(data.tokens[0, 0] - constant, mean / np.linalg.norm(mean), atol=1e-6)


def test_empty_texts_have_no_allowed_token() -> None:
    data = random_embedding(["", " \t\n", "word"])
    assert data.has_tokens.tolist() == [False, False, True]
    assert data.keep(np.flatnonzero(data.has_tokens)).pieces == (("[BOS]", "word"),)


def test_the_seed_changes_every_vector() -> None:
    first, same, other = (random_embedding(["a b"], seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.tokens, same.tokens)
    assert (np.abs(first.tokens - other.tokens).max(axis=2) > 1e-3).all()


def test_long_texts_are_cut() -> None:
    data = random_embedding(["a " * 1000, "a b"], max_tokens=10)
    assert (data.lengths.tolist(), data.n_truncated, data.truncated.tolist()) == ([10, 3], 1, [True, False])
    assert random_embedding(["a " * 1000], max_tokens=None).lengths.tolist() == [1001]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "at least one text, got none"),
        ({"texts": "one"}, "must be a sequence, got one text"),
        ({"texts": ["a", 3]}, "must be strings, got int at 1"),
        ({"texts": ["a"], "d_model": 0}, "d_model must be at least 1"),
        ({"texts": ["a"], "max_tokens": 1}, "max_tokens must be at least 2"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"random_embedding: .*{message}"):
        random_embedding(**arguments)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_text_is_embedded_alike_in_any_order_and_company(texts: list[str], random: object) -> None:
    order = list(range(len(texts)))
    random.shuffle(order)  # type: ignore[attr-defined]
    together = random_embedding(texts, d_model=4)
    shuffled = random_embedding([texts[index] for index in order], d_model=4)
    for place, index in enumerate(order):
        alone = random_embedding([texts[index]], d_model=4)
        length = int(alone.lengths[0])
        np.testing.assert_array_equal(together.tokens[index, :length], alone.tokens[0])
        np.testing.assert_array_equal(shuffled.tokens[place, :length], alone.tokens[0])
        assert together.pieces[index] == shuffled.pieces[place] == alone.pieces[0]
