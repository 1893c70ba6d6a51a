from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attsvm.errors import InvalidInputError
from attsvm.selection import TokenSelection

n, T, d = 3, 5, 4


@pytest.fixture
def X(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(n, T, d))


@pytest.fixture
def Z(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(n, d))


def asked_tokens(problem: TokenSelection) -> list[list[list[int]]]:
    """The tokens that each query of each sequence must beat."""
    return [[row.nonzero().flatten().tolist() for row in sequence] for sequence in problem.tensors.asked]


# ------------------------------------------------------------------------------- orientation


def test_logits_are_X_W_z_and_W_is_keys_times_queries_transposed(X: Any, Z: Any, rng: np.random.Generator) -> None:
    W_K, W_Q = rng.normal(size=(d, 2)), rng.normal(size=(d, 2))
    W = W_K @ W_Q.T
    logits = TokenSelection(X, Z, [0] * n).logits(W)
    assert logits.shape == (n, 1, T)
    for i in range(n):
        np.testing.assert_allclose(logits[i, 0], X[i] @ W @ Z[i])
        np.testing.assert_allclose(logits[i, 0], (X[i] @ W_K) @ (W_Q.T @ Z[i]))


def test_margins_are_the_selected_logit_less_the_others(X: Any, Z: Any, rng: np.random.Generator) -> None:
    W = rng.normal(size=(d, d))
    margins = TokenSelection(X, Z, [0, 3, -1]).margins(W)
    for i, own in ((0, 0), (1, 3)):
        logits = X[i] @ W @ Z[i]
        expected = logits[own] - logits
        expected[own] = np.inf
        np.testing.assert_allclose(margins[i, 0], expected)
    assert (margins[2] == np.inf).all()


# ------------------------------------------------------------------------------- faces


def test_one_query_without_and_with_its_axis(X: Any, Z: Any) -> None:
    plain = TokenSelection(X, Z, [0, 1, 2])
    axis = TokenSelection(X, Z[:, None], [[0], [1], [2]])
    assert plain.shape == axis.shape == (n, 1, T, d)
    assert plain.n_constraints == axis.n_constraints == n * (T - 1)
    np.testing.assert_array_equal(plain.selected, axis.selected)
    assert plain.margin == 1.0
    assert plain.offsets is None
    assert (plain.is_batch, plain.batch_size, len(plain)) == (False, None, 1)


def test_several_queries_a_sequence(X: Any, rng: np.random.Generator) -> None:
    Z = rng.normal(size=(n, 2, d))
    problem = TokenSelection(X, Z, [[0, -1], [2, 2], [4, 1]])
    assert problem.shape == (n, 2, T, d)
    assert asked_tokens(problem)[0] == [[1, 2, 3, 4], []]
    assert asked_tokens(problem)[2] == [[0, 1, 2, 3], [0, 2, 3, 4]]


@pytest.mark.parametrize("query", [0, -1, [0, 2, 4]])
def test_self_attention_takes_its_query_from_the_sequence(X: Any, query: Any) -> None:
    problem = TokenSelection.self_attention(X, [1, 2, 3], query=query)
    places = np.broadcast_to(query, n)
    np.testing.assert_array_equal(problem.queries[:, 0], X[np.arange(n), places])
    # The query token remains a token like the others.
    assert problem.n_constraints == n * (T - 1)


def test_sequence_asks_every_token_as_a_query(X: Any) -> None:
    problem = TokenSelection.sequence(X, np.tile(np.arange(T), (n, 1)))
    assert problem.shape == (n, T, T, d)
    np.testing.assert_array_equal(problem.queries, X)
    assert problem.n_constraints == n * T * (T - 1)


def test_causal_queries_see_only_themselves_and_the_past(X: Any) -> None:
    problem = TokenSelection.sequence(X, np.zeros((n, T), dtype=int), causal=True)
    np.testing.assert_array_equal(problem.allowed[0], np.tril(np.ones((T, T), dtype=bool)))
    assert asked_tokens(problem)[1] == [list(range(1, k + 1)) for k in range(T)]
    with pytest.raises(InvalidInputError, match="token 1 of sequence 0 is masked"):
        TokenSelection.sequence(X, np.ones((n, T), dtype=int), causal=True)


def test_sequence_mask_removes_keys_and_queries(X: Any) -> None:
    mask = np.ones((n, T), dtype=bool)
    mask[0, 3:] = False
    selected = np.zeros((n, T), dtype=int)
    selected[0, 3:] = -1
    problem = TokenSelection.sequence(X, selected, mask=mask)
    assert asked_tokens(problem)[0] == [[1, 2]] * 3 + [[], []]


def test_several_selected_tokens(X: Any, Z: Any) -> None:
    selected = np.zeros((n, T), dtype=bool)
    selected[:, [1, 3]] = True
    problem = TokenSelection(X, Z, selected)
    assert asked_tokens(problem) == [[[0, 2, 4]]] * n
    W = np.eye(d)
    logits = problem.logits(W)
    np.testing.assert_allclose(problem.margins(W)[0, 0, 0], logits[0, 0, [1, 3]].min() - logits[0, 0, 0])


def test_offsets_are_added_to_logits_and_margins(X: Any, Z: Any, rng: np.random.Generator) -> None:
    b, W = rng.normal(size=(n, T)), rng.normal(size=(d, d))
    with_b, without = TokenSelection(X, Z, [0] * n, offsets=b), TokenSelection(X, Z, [0] * n)
    np.testing.assert_allclose(with_b.logits(W), without.logits(W) + b[:, None])
    np.testing.assert_allclose(with_b.margins(W)[:, 0, 1:], without.margins(W)[:, 0, 1:] + b[:, :1] - b[:, 1:])
    np.testing.assert_array_equal(with_b.offsets, b[:, None])


def test_ragged_lists_are_padded(X: Any, Z: Any) -> None:
    lengths = [5, 2, 3]
    problem = TokenSelection([X[i, :length] for i, length in enumerate(lengths)], Z, [4, 1, 0])
    assert problem.shape == (n, 1, 5, d)
    assert problem.allowed.sum(-1).flatten().tolist() == lengths
    assert not problem.tokens[1, 2:].any()
    assert asked_tokens(problem) == [[[0, 1, 2, 3]], [[0]], [[1, 2]]]
    assert np.isneginf(problem.logits(np.eye(d))[1, 0, 2:]).all()


def test_padding_by_a_mask_equals_a_ragged_list(X: Any, Z: Any) -> None:
    X[1, 2:] = np.nan
    mask = np.ones((n, T), dtype=bool)
    mask[1, 2:] = False
    masked = TokenSelection(X, Z, [4, 1, 0], allowed=mask)
    ragged = TokenSelection([X[0], X[1, :2], X[2]], Z, [4, 1, 0])
    for one, other in zip(masked.tensors, ragged.tensors, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)


def test_what_no_query_uses_may_be_anything(X: Any, rng: np.random.Generator) -> None:
    X[0, 1] = np.inf
    Z = rng.normal(size=(n, 2, d))
    Z[2, 1] = np.nan
    allowed = np.ones((n, T), dtype=bool)
    allowed[0, 1] = False
    offsets = np.where(allowed, 0.0, np.nan)
    problem = TokenSelection(X, Z, [[0, 0], [0, 0], [0, -1]], allowed=allowed, offsets=offsets)
    assert np.isfinite(problem.tokens).all()
    assert np.isfinite(problem.queries).all()


def test_from_scores_keeps_the_best_allowed_token_the_first_of_equals(X: Any, Z: Any) -> None:
    scores = np.array([[1.0, 5, 2, 5, 0], [9, 1, 1, 1, 2], [0, 0, 0, 0, 0]])
    allowed = np.ones((n, T), dtype=bool)
    allowed[1, 0] = False
    scores[1, 0] = np.nan
    problem = TokenSelection.from_scores(X, Z, scores, allowed=allowed)
    assert problem.selected.argmax(-1).flatten().tolist() == [1, 4, 0]


@pytest.mark.parametrize("convert", [lambda x: x, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_come_back_as_they_came(X: Any, Z: Any, convert: Any, dtype: Any) -> None:
    tokens, queries = convert(X.astype(dtype)), convert(Z.astype(dtype))
    problem = TokenSelection(tokens, queries, [0] * n, offsets=np.zeros((n, T)))
    for value in (
        problem.tokens,
        problem.queries,
        problem.offsets,
        problem.logits(np.eye(d)),
        problem.margins(np.eye(d)),
    ):
        assert type(value) is type(tokens)
        assert value.dtype == tokens.dtype
    assert type(problem.selected) is type(problem.merged) is type(tokens)


def test_lists_integers_and_half_precision(X: Any, Z: Any) -> None:
    assert TokenSelection(X.tolist(), Z.tolist(), [0] * n).tokens.dtype == np.float64
    assert TokenSelection(np.ones((1, 2, 2), dtype=int), np.ones((1, 2), dtype=int), [0]).tokens.dtype == np.float64
    assert TokenSelection(X.astype(np.float16), Z, [0] * n).tokens.dtype == np.float16
    assert TokenSelection(X.astype(">f8"), Z, [0] * n).tokens.dtype == np.float64


def test_readonly_and_strided_arrays_are_read_without_a_warning(X: Any, Z: Any) -> None:
    X.flags.writeable = False
    assert TokenSelection(X, np.broadcast_to(Z[0], (n, d)), [0] * n).shape == (n, 1, T, d)
    np.testing.assert_array_equal(TokenSelection(X[:, ::-1], Z, [0] * n).tokens, X[:, ::-1])


def test_changing_the_arrays_afterwards_changes_nothing(X: Any, Z: Any) -> None:
    arrays = {
        "tokens": X,
        "queries": Z,
        "selected": np.eye(T, dtype=bool)[[0, 1, 2]][:, None],
        "allowed": np.ones((n, 1, T), dtype=bool),
        "offsets": np.zeros((n, 1, T)),
        "margin": np.ones((n, 1, T)),
    }
    problem = TokenSelection(**arrays)
    before = [tensor.clone() for tensor in problem.tensors]
    for array in arrays.values():
        array[...] = array + 1 if array.dtype != bool else ~array
    for tensor, copy in zip(problem.tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy)


# ------------------------------------------------------------------------------- batches


def test_a_batch_holds_independent_problems(rng: np.random.Generator) -> None:
    X, Z = rng.normal(size=(2, n, T, d)), rng.normal(size=(2, n, d))
    selected, b, margin = rng.integers(0, T, (2, n)), rng.normal(size=(2, n, T)), rng.random((2, n, 1, T))
    batch = TokenSelection(X, Z, selected, offsets=b, margin=margin)
    assert (batch.is_batch, batch.batch_size, len(batch), batch.shape) == (True, 2, 2, (n, 1, T, d))
    W = rng.normal(size=(2, d, d))
    assert batch.margins(W).shape == (2, n, 1, T)
    for k in range(2):
        one = TokenSelection(X[k], Z[k], selected[k], offsets=b[k], margin=margin[k])
        np.testing.assert_allclose(batch.margins(W)[k], one.margins(W[k]))
        np.testing.assert_allclose(batch.margins(W[0])[k], one.margins(W[0]))
        for mine, other in zip(batch[k].tensors, one.tensors, strict=True):
            torch.testing.assert_close(mine, other)
    with pytest.raises(InvalidInputError, match="only a batch"):
        one[0]


def test_the_other_faces_in_a_batch(rng: np.random.Generator) -> None:
    X = rng.normal(size=(2, n, T, d))
    assert TokenSelection.self_attention(X, np.zeros((2, n), dtype=int)).queries.shape == (2, n, 1, d)
    sequence = TokenSelection.sequence(X, np.zeros((2, n, T), dtype=int), causal=True)
    assert sequence.tensors.asked.shape == (2, n, T, T)
    scored = TokenSelection.from_scores(X, X[:, :, 0], rng.normal(size=(2, n, T)))
    assert scored.n_constraints == 2 * n * (T - 1)


# ------------------------------------------------------------------------------- duplicates


def test_one_token_asks_nothing(Z: Any) -> None:
    problem = TokenSelection(np.ones((n, 1, d)), Z, [0] * n)
    assert problem.n_constraints == 0
    assert problem.merged.shape == (0, 3)


def test_identical_tokens_are_merged_and_named(X: Any, Z: Any) -> None:
    X[1, 3] = X[1, 0]
    X[2, :] = X[2, 0]
    problem = TokenSelection(X, Z, [0, 0, 2])
    assert problem.merged.tolist() == [[1, 0, 3], [2, 0, 0], [2, 0, 1], [2, 0, 3], [2, 0, 4]]
    assert asked_tokens(problem) == [[[1, 2, 3, 4]], [[1, 2, 4]], [[]]]
    # Equal tokens in two sequences, and two dropped tokens that are equal, are no duplicates.
    X[0, 2] = X[1, 0]
    X[0, 3] = X[0, 4]
    assert TokenSelection(X, Z, [0, 0, 2]).merged.tolist() == problem.merged.tolist()


def test_zero_and_minus_zero_are_equal(Z: Any) -> None:
    X = np.zeros((1, 2, d))
    X[0, 1] = -0.0
    assert TokenSelection(X, Z[:1], [0]).merged.tolist() == [[0, 0, 1]]


def test_duplicates_with_another_offset_are_constrained(X: Any, Z: Any) -> None:
    X[:, 3] = X[:, 0]
    offsets = np.zeros((n, T))
    offsets[1, 3] = 0.5
    problem = TokenSelection(X, Z, [0] * n, offsets=offsets)
    assert problem.merged.tolist() == [[0, 0, 3], [2, 0, 3]]
    assert 3 in asked_tokens(problem)[1][0]


def test_a_duplicate_of_any_selected_token_is_merged(X: Any, Z: Any) -> None:
    X[:, 4] = X[:, 1]
    selected = np.zeros((n, T), dtype=bool)
    selected[:, :2] = True
    assert TokenSelection(X, Z, selected).merged.tolist() == [[i, 0, 4] for i in range(n)]


def test_masked_duplicates_are_nobodys(X: Any, Z: Any) -> None:
    X[:, 4] = X[:, 0]
    allowed = np.ones((n, T), dtype=bool)
    allowed[:, 4] = False
    assert TokenSelection(X, Z, [0] * n, allowed=allowed).merged.shape == (0, 3)


def test_with_selected_keeps_all_but_the_selection(X: Any, Z: Any, rng: np.random.Generator) -> None:
    allowed = np.ones((n, T), dtype=bool)
    allowed[0, 4] = False
    problem = TokenSelection(X, Z, [0] * n, allowed=allowed, offsets=rng.normal(size=(n, T)), margin=2.0)
    other = problem.with_selected([1, 1, 4])
    assert other.selected.argmax(-1).flatten().tolist() == [1, 1, 4]
    assert other.margin == 2.0
    np.testing.assert_array_equal(other.offsets, problem.offsets)
    np.testing.assert_array_equal(other.allowed, problem.allowed)
    assert type(other.tokens) is type(problem.tokens)


def test_repr_says_the_sizes(X: Any, Z: Any) -> None:
    assert repr(TokenSelection(X, Z, [0] * n)) == "TokenSelection(n=3, Q=1, T=5, d=4, constraints=12)"
    assert repr(TokenSelection(X[None], Z[None], [[0] * n])).startswith("TokenSelection(B=1, n=3")


# ------------------------------------------------------------------------------- bad input

TOKENS, QUERIES = np.arange(24.0).reshape(2, 3, 4), np.ones((2, 4))
NAN_TOKENS, INFINITE_QUERIES = TOKENS.copy(), QUERIES.copy()
NAN_TOKENS[1, 2, 3] = np.nan
INFINITE_QUERIES[1, 0] = -np.inf
NO_TOKEN = np.ones((2, 3), dtype=bool)
NO_TOKEN[1] = False
MASKED_FIRST = np.ones((2, 3), dtype=bool)
MASKED_FIRST[1, 0] = False

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "tokens of two axes": ({"tokens": TOKENS[0]}, r"tokens must have shape \(n, T, d\).*got \(3, 4\)"),
    "tokens of five axes": ({"tokens": TOKENS[None, None]}, r"tokens must have shape"),
    "no sequence": ({"tokens": TOKENS[:0]}, r"at least one sequence, token and dimension, got n=0, T=3, d=4"),
    "no token": ({"tokens": TOKENS[:, :0]}, r"at least one sequence, token and dimension, got n=2, T=0, d=4"),
    "no dimension": ({"tokens": TOKENS[..., :0]}, r"got n=2, T=3, d=0"),
    "NaN in tokens": ({"tokens": NAN_TOKENS}, r"tokens must be finite, got nan at \(1, 2, 3\)"),
    "infinite query": ({"queries": INFINITE_QUERIES}, r"queries must be finite, got -inf at \(1, 0, 0\)"),
    "text tokens": ({"tokens": [[["a", "b"]]]}, r"tokens must hold numbers"),
    "complex tokens": ({"tokens": TOKENS * 1j}, r"tokens must hold real numbers"),
    "ragged numbers": ({"tokens": [[[1.0, 2.0], [1.0]], [[1.0, 2.0]]]}, r"tokens\[0\] must be a rectangular array"),
    "an empty sequence": ({"tokens": [TOKENS[0], TOKENS[1, :0]]}, r"tokens\[1\] is an empty sequence"),
    "an empty list": ({"tokens": [[[1.0, 2.0, 3.0, 4.0]], []]}, r"tokens\[1\] is an empty sequence"),
    "two widths": ({"tokens": [TOKENS[0], TOKENS[1, :, :3]]}, r"tokens\[1\] must have 4 columns .* got 3"),
    "queries of another width": ({"queries": np.ones((2, 5))}, r"queries must have shape.*got \(2, 5\)"),
    "queries of another count": ({"queries": np.ones((3, 4))}, r"queries must have shape.*got \(3, 4\)"),
    "no query": ({"queries": np.ones((2, 0, 4))}, r"queries must have shape"),
    "selected past the end": ({"selected": [0, 3]}, r"token ids in \[0, 3\), got 3 at sequence 1.*zero-based"),
    "selected below -1": ({"selected": [-2, 0]}, r"token ids in \[0, 3\), got -2 at sequence 0"),
    "selected of another count": ({"selected": [0]}, r"selected must hold one token id for each query"),
    "selected as floats": ({"selected": [0.0, 1.0]}, r"selected must hold integers, got torch.float64"),
    "selected as words": ({"selected": ["a", "b"]}, r"selected must hold numbers, got an array of <U1"),
    "ragged selected": ({"selected": [[0], [1, 2]]}, r"selected must be a rectangular array, got ragged lists"),
    "selected booleans of another shape": ({"selected": np.ones((2, 4), dtype=bool)}, r"selected must have shape"),
    "selected is masked": (
        {"allowed": MASKED_FIRST, "selected": [0, 0]},
        r"selected tokens must be allowed, token 0 of sequence 1 is masked",
    ),
    "all masked": ({"allowed": NO_TOKEN}, r"every sequence needs an allowed token, sequence 1 has none"),
    "allowed of another shape": ({"allowed": np.ones((2, 4), dtype=bool)}, r"allowed must have shape \(2, 3\)"),
    "allowed is no boolean": ({"allowed": np.full((2, 3), 2)}, r"allowed must be boolean"),
    "offsets of another shape": ({"offsets": np.ones((2, 4))}, r"offsets must have shape"),
    "NaN in offsets": ({"offsets": np.full((2, 3), np.nan)}, r"offsets must be finite"),
    "negative margin": ({"margin": -0.5}, r"margin must be finite and >= 0, got -0.5"),
    "NaN margin": ({"margin": np.nan}, r"margin must be finite and >= 0, got nan"),
    "margin of another shape": ({"margin": np.ones(5)}, r"margin must have shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    change, message = BAD[name]
    arguments = {"tokens": TOKENS, "queries": QUERIES, "selected": [0, 0], **change}
    with pytest.raises(InvalidInputError, match=message) as caught:
        TokenSelection(**arguments)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith("TokenSelection: ")


def test_bad_input_in_a_batch_names_the_problem() -> None:
    selected = np.zeros((2, 2), dtype=int)
    selected[1, 0] = 7
    with pytest.raises(InvalidInputError, match="got 7 at problem 1, sequence 0"):
        TokenSelection(np.stack([TOKENS, TOKENS]), np.stack([QUERIES, QUERIES]), selected)


@pytest.mark.parametrize("query, shown", [(3, 3), ([0, -9], -9), ([1, 7], 7)])
def test_self_attention_names_a_query_out_of_range(query: Any, shown: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"query must be a token id in \[0, 3\), got {shown}\."):
        TokenSelection.self_attention(TOKENS, [0, 0], query=query)


def test_scores_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="scores must be finite"):
        TokenSelection.from_scores(TOKENS, QUERIES, np.full((2, 3), np.nan))
    with pytest.raises(InvalidInputError, match="scores must have shape"):
        TokenSelection.from_scores(TOKENS, QUERIES, np.zeros((2, 4)))


@pytest.mark.parametrize(
    "W, message", [(np.eye(3), r"W must have shape \(4, 4\)"), (np.full((4, 4), np.nan), "finite")]
)
def test_matrices_are_checked(W: Any, message: str) -> None:
    problem = TokenSelection(TOKENS, QUERIES, [0, 0])
    for method in (problem.logits, problem.margins):
        with pytest.raises(InvalidInputError, match=message):
            method(W)
