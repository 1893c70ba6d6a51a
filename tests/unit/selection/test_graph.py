"""Token-priority graphs, and next-token prediction as a selection problem."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attsvm import TokenSelection, solve
from attsvm.errors import InvalidInputError
from attsvm.selection import TokenPriorityGraph, cyclic_subspace, graph_selection
from attsvm.selection.graph import strongly_connected_components

seeds = st.integers(0, 2**32 - 1)


@st.composite
def digraphs(draw: st.DrawFn) -> dict[int, list[int]]:
    size = draw(st.integers(1, 12))
    edges = draw(st.sets(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=30))
    return {i: sorted(j for a, j in edges if a == i) for i in range(size)}


def reachability(successors: dict[int, list[int]]) -> np.ndarray:
    """Which node reaches which, by Warshall's algorithm."""
    reach = np.eye(len(successors), dtype=bool)
    for i, after in successors.items():
        reach[i, after] = True
    for k in successors:
        reach |= reach[:, [k]] & reach[[k], :]
    return reach


def samples_of(seed: int, *, n: int = 6, T: int = 4, K: int = 6) -> tuple[list[list[int]], list[int]]:
    """Ragged sequences with repeated ids and few last tokens, so that cycles are common."""
    r = np.random.default_rng(seed)
    sequences = [[*r.integers(0, K, r.integers(0, T)).tolist(), int(r.integers(0, 2))] for _ in range(n)]
    return sequences, [int(r.choice(ids)) for ids in sequences]


# ------------------------------------------------------------------------------- components


@given(digraphs())
def test_components_are_the_classes_of_mutual_reachability(successors: dict[int, list[int]]) -> None:
    reach = reachability(successors)
    found = strongly_connected_components(successors)
    assert sorted(token for component in found for token in component) == sorted(successors)
    member = {token: place for place, component in enumerate(found) for token in component}
    for i in successors:
        for j in successors:
            assert (member[i] == member[j]) == (reach[i, j] and reach[j, i])
            if reach[i, j]:
                assert member[i] <= member[j]


def test_a_long_chain_does_not_exhaust_the_stack() -> None:
    chain = {i: [i + 1] for i in range(50_000)} | {50_000: []}
    assert strongly_connected_components(chain) == [(i,) for i in range(50_001)]
    assert len(strongly_connected_components(chain | {50_000: [0]})) == 1


@given(seeds)
def test_queries_agree_with_reachability(seed: int) -> None:
    sequences, labels = samples_of(seed)
    graph = TokenPriorityGraph(sequences, labels, d_vocab=6)
    for last in (0, 1):
        successors: dict[int, list[int]] = {i: [] for i in range(6)}
        for ids, label in zip(sequences, labels, strict=True):
            if ids[-1] == last:
                successors[label] += [token for token in ids if token != label]
        assert graph.edges(last) == tuple(sorted({(i, j) for i, after in successors.items() for j in after}))
        reach = reachability(successors)
        for i in range(6):
            assert graph.component(last, i) == tuple(np.flatnonzero(reach[i] & reach[:, i]))
            for j in range(6):
                assert graph.same_component(last, i, j) == (reach[i, j] and reach[j, i])
                assert graph.precedes(last, i, j) == (reach[i, j] and not reach[j, i])
    assert graph.is_acyclic == all(len(c) == 1 for last in (0, 1) for c in graph.components(last))


def test_graphs_of_different_last_tokens_are_apart() -> None:
    graph = TokenPriorityGraph([[0, 1, 2], [0, 1, 3], [2]], [0, 1, 2])
    assert graph.last_tokens == (2, 3)
    assert graph.edges(2) == ((0, 1), (0, 2))
    assert graph.components(2)[0] == (0,)
    assert graph.precedes(3, 1, 0)
    assert not graph.precedes(2, 1, 0)
    assert graph.is_acyclic
    assert graph.components(7) == ()
    assert graph.component(7, 5) == (5,)
    assert repr(graph) == "TokenPriorityGraph(3 sequences, 2 last tokens, 6 nodes in 6 components)"


# ------------------------------------------------------------------------------- Graph-SVM


def test_selection_of_a_small_graph() -> None:
    """Ids repeat, lengths differ, two samples say the same, and one asks nothing."""
    E = torch.eye(4, dtype=torch.float32)
    problem = graph_selection(E, [[0, 1, 3], [1, 0, 1, 3], [3, 0, 1, 3], [2, 3], [3, 3]], [0, 1, 0, 2, 3])
    # Of the first three only one is left: in the graph of 3 the tokens 0 and 1 reach each other.
    assert problem.selected.tolist() == [[[True, True, False]], [[True, False, False]], [[True, False, False]]]
    assert problem.allowed.tolist() == [[[True, True, True]], [[True, True, False]], [[True, False, False]]]
    assert problem.tokens.dtype == torch.float32
    assert torch.equal(problem.tokens[0], E[[0, 1, 3]])
    assert torch.equal(problem.queries[:, 0], E[[3, 3, 3]])
    W = solve(problem).W
    assert torch.allclose(W[:, 3], torch.tensor([0.25, 0.25, 0.25, -0.75]), atol=1e-5)
    assert float(W[:, :3].abs().max()) < 1e-6


@pytest.mark.reference
@settings(max_examples=30)
@given(seeds)
def test_graph_svm_is_that_of_the_literal_rows(seed: int) -> None:
    """min ||W||_F with a row for each (y, j) of each sample: = 0 in a component, >= 1 otherwise (arXiv:2403.08081)."""
    cvxpy = pytest.importorskip("cvxpy")
    sequences, labels = samples_of(seed)
    E = np.random.default_rng(seed).normal(size=(6, 7))
    graph = TokenPriorityGraph(sequences, labels)
    W = cvxpy.Variable((7, 7))
    rows = []
    for ids, y in zip(sequences, labels, strict=True):
        for j in set(ids) - {y}:
            value = (E[y] - E[j]) @ W @ E[ids[-1]]
            rows.append(value == 0 if graph.same_component(ids[-1], y, j) else value >= 1)
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(W)), rows).solve(solver="CLARABEL")
    solution = solve(graph_selection(E, sequences, labels), tol=1e-8)
    np.testing.assert_allclose(solution.W, W.value, atol=1e-5 * (1 + np.linalg.norm(W.value)))


def test_results_come_in_the_kind_of_the_embeddings() -> None:
    samples: tuple[Any, Any] = ([[0, 1, 2], [1, 0, 2]], [0, 1])
    for E in (np.eye(3, dtype=np.float32), torch.eye(3), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]):
        problem = graph_selection(E, *samples)
        projected = cyclic_subspace(TokenPriorityGraph(*samples), E).project(np.ones((3, 3)))
        assert isinstance(problem, TokenSelection)
        assert isinstance(problem.tokens, torch.Tensor) == isinstance(E, torch.Tensor)
        expected = np.float64 if isinstance(E, list) else E.dtype
        assert problem.tokens.dtype == projected.dtype == expected


def test_arrays_and_lists_say_the_same() -> None:
    ids, labels = np.array([[0, 1, 2], [1, 0, 2]]), np.array([0, 1])
    for samples in ((ids, labels), (torch.from_numpy(ids), torch.from_numpy(labels)), (list(ids), [0, 1])):
        assert TokenPriorityGraph(*samples).components(2) == ((0, 1), (2,))


# ------------------------------------------------------------------------------- cyclic subspace


def spanning(graph: TokenPriorityGraph, E: np.ndarray) -> np.ndarray:
    """The spanning matrices of the definition, one row of d^2 numbers each."""
    d = E.shape[1]
    rows = [
        np.outer(E[i] - E[j], E[last]).ravel()
        for last in graph.last_tokens
        for component in graph.components(last)
        for i, j in combinations(component, 2)
    ]
    return np.array(rows).reshape(-1, d * d)


@pytest.mark.parametrize("d", [2, 4, 8])
@given(seed=seeds)
@settings(max_examples=30)
def test_projection_is_that_on_the_spanning_matrices(d: int, seed: int) -> None:
    """Also where there are fewer dimensions than tokens, so that the matrices are dependent."""
    sequences, labels = samples_of(seed)
    r = np.random.default_rng(seed)
    E, W = r.normal(size=(6, d)), r.normal(size=(d, d))
    graph = TokenPriorityGraph(sequences, labels)
    subspace = cyclic_subspace(graph, E)
    rows = spanning(graph, E)
    assert subspace.dimension == (np.linalg.matrix_rank(rows) if len(rows) else 0)
    assert (subspace.dimension == 0) == graph.is_acyclic
    expected = np.linalg.pinv(rows) @ rows @ W.ravel()
    projected = subspace.project(W)
    np.testing.assert_allclose(projected.ravel(), expected, atol=1e-9)
    np.testing.assert_allclose(subspace.project(projected), projected, atol=1e-9)
    basis = subspace.basis().reshape(-1, d * d)
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-8)
    np.testing.assert_allclose(subspace.coordinates(W), basis @ W.ravel(), atol=1e-9)
    np.testing.assert_allclose(subspace.matrix(subspace.coordinates(W)), projected, atol=1e-8)


@given(seeds)
@settings(max_examples=30)
def test_graph_svm_is_orthogonal_to_the_cyclic_subspace(seed: int) -> None:
    sequences, labels = samples_of(seed)
    E = np.random.default_rng(seed).normal(size=(6, 7))
    W = solve(graph_selection(E, sequences, labels), tol=1e-8).W
    inside = cyclic_subspace(TokenPriorityGraph(sequences, labels), E).project(W)
    assert np.linalg.norm(inside) <= 1e-8 * np.linalg.norm(W)


def test_a_query_of_zeros_adds_nothing_to_the_subspace() -> None:
    E = np.eye(3)
    E[2] = 0.0
    subspace = cyclic_subspace(TokenPriorityGraph([[0, 1, 2], [1, 0, 2]], [0, 1]), E)
    assert subspace.dimension == 0
    assert np.array_equal(subspace.project(np.ones((3, 3))), np.zeros((3, 3)))
    assert repr(subspace) == "CyclicSubspace(dimension=0 of 9)"


def test_several_matrices_are_projected_at_once(rng: np.random.Generator) -> None:
    subspace = cyclic_subspace(TokenPriorityGraph([[0, 1, 2], [1, 0, 2]], [0, 1]), rng.normal(size=(3, 4)))
    W = rng.normal(size=(2, 5, 4, 4))
    together = subspace.project(W)
    np.testing.assert_allclose(together[1, 3], subspace.project(W[1, 3]), atol=1e-14)
    assert subspace.coordinates(W).shape == (2, 5, 1)


# ------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[Any, Any, str]] = {
    "no sequence": ([], [], "sequences must hold at least one sequence, got none"),
    "no list": (3, [0], r"sequences must be a list of sequences of ids, or \(n, T\)"),
    "an empty sequence": ([[0], []], [0, 0], r"sequences\[1\] is empty; every sequence needs a token"),
    "an id too large": ([[0, 1], [1, 4]], [0, 1], r"token ids in \[0, 4\), got 4 at sequence 1. Ids are zero-based"),
    "a negative id": ([[0, -1]], [0], r"token ids in \[0, 4\), got -1 at sequence 0"),
    "floats": ([[0.0, 1.0]], [0], r"sequences\[0\] must hold integers, got torch.float64"),
    "booleans": ([[True, False]], [1], r"sequences\[0\] must hold integers, got torch.bool"),
    "words": ([["a", "b"]], [0], r"sequences\[0\] must hold numbers"),
    "one sequence": ([0, 1, 2], [0], r"sequences\[0\] must have one axis, the ids of one sequence, got \(\)"),
    "too few labels": ([[0, 1], [1, 0]], [0], r"labels must hold one id for each of the 2 sequences, got \(1,\)"),
    "a label elsewhere": ([[0, 1], [1, 0]], [0, 3], "label 3 does not occur in sequence 1"),
    "float labels": ([[0, 1]], [0.0], "labels must hold integers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_refused_in_one_sentence(name: str) -> None:
    sequences, labels, message = BAD[name]
    with pytest.raises(InvalidInputError, match=f"^TokenPriorityGraph: .*{message}"):
        TokenPriorityGraph(sequences, labels, d_vocab=4)
    with pytest.raises(InvalidInputError, match=message):
        graph_selection(np.eye(4), sequences, labels)


def test_bad_embeddings_are_refused() -> None:
    samples: tuple[Any, Any] = ([[0, 1, 2]], [0])
    graph = TokenPriorityGraph(*samples)
    for E, message in (
        (np.eye(3)[0], r"embeddings must have shape \(K, d\), one row a token id, got \(3,\)"),
        (np.zeros((3, 0)), r"embeddings must have shape \(K, d\)"),
        (np.full((3, 3), np.nan), r"embeddings must be finite, got nan at \(0, 0\)"),
    ):
        for call in (lambda E: graph_selection(E, *samples), lambda E: cyclic_subspace(graph, E)):
            with pytest.raises(InvalidInputError, match=message):
                call(E)
    with pytest.raises(InvalidInputError, match="embeddings must differ between tokens, those of 1 and 2 are equal"):
        graph_selection(np.eye(3)[[0, 1, 1]], *samples)
    with pytest.raises(InvalidInputError, match="embeddings must have a row for every id, id 2 has none of 2"):
        cyclic_subspace(graph, np.eye(2))
    with pytest.raises(InvalidInputError, match="graph must be a TokenPriorityGraph, got list"):
        cyclic_subspace([], np.eye(2))  # type: ignore[arg-type]


def test_equal_embeddings_of_tokens_that_do_not_occur_are_no_matter() -> None:
    assert graph_selection(np.eye(4)[[0, 1, 2, 2]], [[0, 1, 2]], [0]).n_constraints == 2


def test_bad_queries_are_refused() -> None:
    graph = TokenPriorityGraph([[0, 1]], [0], d_vocab=3)
    with pytest.raises(InvalidInputError, match=r"j must be a token id in \[0, 3\), got 3"):
        graph.same_component(1, 0, 3)
    with pytest.raises(InvalidInputError, match=r"last must be a token id in \[0, 3\), got -1"):
        graph.components(-1)
    with pytest.raises(InvalidInputError, match=r"token must be a token id >= 0, got 'a'"):
        TokenPriorityGraph([[0, 1]], [0]).component(1, "a")  # type: ignore[arg-type]
    for bad in (0, 2.0, True):
        with pytest.raises(InvalidInputError, match="d_vocab must be an integer >= 1 or None"):
            TokenPriorityGraph([[0, 1]], [0], d_vocab=bad)  # type: ignore[arg-type]
    subspace = cyclic_subspace(graph, np.eye(3))
    with pytest.raises(InvalidInputError, match=r"W must have shape \(3, 3\), got \(2, 2\)"):
        subspace.project(np.eye(2))
    with pytest.raises(InvalidInputError, match=r"coordinates must have length 0, got shape \(2,\)"):
        subspace.matrix([1.0, 2.0])
