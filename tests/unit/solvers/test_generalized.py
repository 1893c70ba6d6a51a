"""Several selected tokens: finite part, prediction of a trained matrix, and both for next-token prediction."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from attsvm import TokenSelection, correlation, solve
from attsvm.errors import InfeasibleError, InvalidInputError, NotConvergedError
from attsvm.selection import TokenPriorityGraph, cyclic_subspace, graph_selection
from attsvm.solvers import (
    Status,
    graph_finite_part,
    selected_from_probabilities,
    solve_finite_part,
    svm_equivalent,
)

Floats = NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)
E1 = [1.0, 0.0]


def softmax(logits: Floats) -> Floats:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def trained(seed: int, n: int = 3, T: int = 4, d: int = 6, *, kept: int = 2) -> tuple[TokenSelection, Floats, Floats]:
    """A problem in which every query keeps its ``kept`` best tokens under some W, with that W and its softmax."""
    r = np.random.default_rng(seed)
    X, Z, W = r.normal(size=(n, T, d)), r.normal(size=(n, d)), r.normal(size=(d, d))
    s = softmax(np.einsum("ntd,de,ne->nt", X, W, Z))
    return TokenSelection(X, Z, s >= np.sort(s)[:, [-kept]]), W, s


def tie_rows(problem: TokenSelection) -> tuple[Floats, list[tuple[int, int, int]]]:
    """``(x_t - x_tau) z^T`` of all pairs inside selected sets, flat, and the (sequence, t, tau) of each."""
    pairs = [
        (i, int(t), int(tau))
        for i in range(problem.shape[0])
        for t in np.flatnonzero(problem.selected[i, 0])
        for tau in np.flatnonzero(problem.selected[i, 0])
        if t < tau
    ]
    X, Z = problem.tokens, problem.queries[:, 0]
    rows = [np.outer(X[i, t] - X[i, tau], Z[i]).ravel() for i, t, tau in pairs]
    return np.array(rows).reshape(len(pairs), X.shape[2] ** 2), pairs


# ------------------------------------------------------------------------------- selected sets


def test_thresholds_of_the_papers() -> None:
    p = [[0.999, 1e-3, 0.0], [0.9999, 0.00009, 0.00001], [0.5, 0.5 - 1e-6, 1e-6], [0.2, 0.3, 0.5]]
    sets = selected_from_probabilities(p)
    assert sets.selected.tolist() == [[True, True, False], [True, False, False], [True, True, False], [True] * 3]
    assert sets.masked.tolist() == [[False, False, True], [False] * 3, [False, False, True], [False] * 3]
    assert sets.ambiguous.tolist() == [False, True, False, False]
    assert sets.complete.tolist() == [False, False, False, True]


def test_tokens_that_may_not_be_attended_are_neither() -> None:
    p = torch.tensor([[[0.4, 0.6, math.nan]]])
    sets = selected_from_probabilities(p, allowed=torch.tensor([[[True, True, False]]]))
    assert sets.selected.tolist() == [[[True, True, False]]]
    assert not sets.masked.any()
    assert sets.complete.tolist() == [[True]]
    assert not sets.ambiguous.any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[0.5, -0.5]],), r"probabilities must lie in \[0, 1\], got -0.5"),
        (([[0.5, math.nan]],), r"probabilities must lie in \[0, 1\], got nan"),
        ((0.5,), r"probabilities must have a token axis, got shape \(\)"),
        (([[0.5]], 1e-6, 1e-3), "thresholds must satisfy 0 <= masked_below <= selected_above <= 1"),
        (([[0.5]], "a"), "thresholds must satisfy .*, got masked_below=1e-06 and selected_above='a'"),
        (([[0.5]], math.nan), "thresholds must satisfy .* and selected_above=nan"),
    ],
)
def test_what_is_no_probability_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        selected_from_probabilities(*arguments)
    with pytest.raises(InvalidInputError, match=r"allowed must have the shape \(1, 2\) of probabilities, got \(2,\)"):
        selected_from_probabilities([[0.5, 0.5]], allowed=[True, True])


# ------------------------------------------------------------------------------- finite part


@given(seeds, st.integers(1, 4))
@settings(max_examples=30)
def test_finite_part_is_the_least_squares_solution_of_smallest_norm(seed: int, kept: int) -> None:
    problem, _, s = trained(seed, kept=kept)
    rows, pairs = tie_rows(problem)
    ratios = np.array([math.log(s[i, t] / s[i, tau]) for i, t, tau in pairs])
    expected = np.linalg.lstsq(rows, ratios, rcond=None)[0] if pairs else np.zeros(36)
    solution = solve_finite_part(problem, s)
    assert solution.status is Status.OPTIMAL
    np.testing.assert_allclose(solution.W.ravel(), expected, atol=1e-8 * (1 + np.linalg.norm(expected)))
    assert not solution.duals.any()


def test_finite_part_is_the_projection_of_every_matrix_with_this_attention() -> None:
    """On the span of the rows; the rest of a trained matrix leaves the shares alone."""
    problem, W, s = trained(11, kept=3)
    rows, _ = tie_rows(problem)
    np.testing.assert_allclose(
        solve_finite_part(problem, s).W.ravel(), np.linalg.pinv(rows) @ rows @ W.ravel(), atol=1e-9
    )


def test_with_more_ties_than_dimensions_the_trained_matrix_comes_back() -> None:
    problem, W, s = trained(1, n=40, T=8, d=5, kept=4)
    np.testing.assert_allclose(solve_finite_part(problem, s).W, W, atol=1e-9)


def test_only_ratios_inside_a_selected_set_count() -> None:
    problem, _, s = trained(2)
    W = solve_finite_part(problem, s).W
    other = np.where(problem.selected[:, 0], 0.01 * s, np.nan)
    np.testing.assert_allclose(solve_finite_part(problem, other).W, W, atol=1e-10)


def test_offsets_are_part_of_the_logits(rng: np.random.Generator) -> None:
    problem, W, _ = trained(3, n=40, T=8, d=5, kept=4)
    b = rng.normal(size=(40, 8))
    s = softmax(np.einsum("ntd,de,ne->nt", problem.tokens, W, problem.queries[:, 0]) + b)
    biased = TokenSelection(problem.tokens, problem.queries, problem.selected, offsets=b)
    np.testing.assert_allclose(solve_finite_part(biased, s).W, W, atol=1e-9)


def test_causal_sequences_and_queries_that_select_nothing(rng: np.random.Generator) -> None:
    X, W = rng.normal(size=(5, 4, 3)), rng.normal(size=(3, 3))
    problem = TokenSelection.sequence(X, np.zeros((5, 4, 4), dtype=bool), causal=True)
    s = softmax(problem.logits(W))
    # The last sequence selects nothing at all, the others all that they may see.
    selected = problem.allowed & (np.arange(5) < 4)[:, None, None]
    np.testing.assert_allclose(solve_finite_part(problem.with_selected(selected), s).W, W, atol=1e-9)


def test_one_token_everywhere_has_no_finite_part() -> None:
    problem, _, s = trained(4, kept=1)
    assert not solve_finite_part(problem, s).W.any()


def test_probabilities_that_contradict_each_other_are_named() -> None:
    X = np.tile(np.array([E1, [0.0, 1.0], [0.0, 0.0]]), (4, 1, 1))
    chosen = [[True, True, False]] * 3 + [[True, False, False]]
    problem = TokenSelection(X, [E1, [0.0, 1.0], E1, E1], np.array(chosen))
    s = [[0.7, 0.3, 0.0], [0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]]
    with pytest.raises(
        InfeasibleError, match=r"solve_finite_part: probabilities contradict.* proof: 0, 2\.$"
    ) as caught:
        solve_finite_part(problem, s)
    assert caught.value.solution.ray.sequences == (0, 2)
    good, bad = ([X, problem.queries, problem.selected, p] for p in ([s[0], s[1], s[0], s[3]], s))
    parts = [np.stack(column) for column in zip(good, bad, strict=True)]
    batch = TokenSelection(parts[0], parts[1], parts[2])
    with pytest.raises(InfeasibleError, match=r"In problem 1 of the batch, sequences in the proof: 0, 2\.$"):
        solve_finite_part(batch, parts[3])


def test_repeated_words_may_differ_by_rounding() -> None:
    """A token that occurs twice gets the same attention up to rounding, which no matrix could reproduce."""
    X = [[E1, E1, [0.0, 1.0], E1]]
    problem = TokenSelection(X, [E1], np.array([[True, True, True, False]]))
    exact = solve_finite_part(problem, [[0.4, 0.4, 0.2, 0.0]])
    rounded = solve_finite_part(problem, [[0.4, 0.4 * (1 + 1e-12), 0.2, 0.0]])
    assert exact.W[0, 0] - exact.W[1, 0] == pytest.approx(math.log(2.0), rel=1e-9)
    np.testing.assert_allclose(rounded.W, exact.W, atol=1e-9)
    with pytest.raises(InfeasibleError, match=r"Sequences in the proof: 0\."):
        solve_finite_part(problem, [[0.4, 0.3, 0.2, 0.1]])


def test_a_batch_is_its_problems_one_by_one() -> None:
    parts = [trained(seed) for seed in range(3)]
    X, Z, chosen = (np.stack([getattr(p, name) for p, _, _ in parts]) for name in ("tokens", "queries", "selected"))
    W, s = (np.stack([part[k] for part in parts]) for k in (1, 2))
    together = svm_equivalent(TokenSelection(X, Z, chosen), W, s)
    for b, (problem, matrix, p) in enumerate(parts):
        one = svm_equivalent(problem, matrix, p)
        for name in ("W", "W_fin", "W_dir", "W_one_token", "C", "correlation", "correlation_one_token"):
            np.testing.assert_allclose(getattr(together, name)[b], getattr(one, name), atol=1e-6)


@pytest.mark.parametrize("value, shown", [(0.0, "0.0"), (-0.1, "-0.1"), (math.nan, "nan"), (math.inf, "inf")])
def test_a_selected_token_needs_a_positive_probability(value: float, shown: str) -> None:
    problem, W, s = trained(0)
    s[1, problem.selected[1, 0].argmax()] = value
    message = f"probabilities must be positive on selected tokens, got {shown} at sequence 1"
    with pytest.raises(InvalidInputError, match=f"solve_finite_part: {message}"):
        solve_finite_part(problem, s)
    with pytest.raises(InvalidInputError, match=f"svm_equivalent: {message}"):
        svm_equivalent(problem, W, s)


def test_bad_arguments_are_named() -> None:
    problem, W, s = trained(0)
    with pytest.raises(InvalidInputError, match="problem must be a TokenSelection, got ndarray"):
        solve_finite_part(W, s)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"probabilities must have shape \(3, 4\) or \(3, 1, 4\), got \(3, 3\)"):
        solve_finite_part(problem, s[:, :3])
    with pytest.raises(InvalidInputError, match=r"svm_equivalent: W must have shape \(6, 6\), got \(5, 6\)"):
        svm_equivalent(problem, W[:5], s)


# ------------------------------------------------------------------------------- the prediction


@pytest.mark.parametrize("norm", ["fro", "nuc"])
@pytest.mark.parametrize("seed", range(4))
def test_closed_form_of_C(seed: int, norm: Any) -> None:
    """Orthogonal parts, and no other C is closer to the trained matrix."""
    problem, W, s = trained(seed)
    found = svm_equivalent(problem, W, s, norm=norm, tol=1e-8)
    assert abs(correlation(found.W_fin, found.W_dir)) < 1e-8
    np.testing.assert_allclose(found.W, found.W_fin + found.C * found.W_dir, rtol=1e-12, atol=1e-12)
    best = (np.vdot(W - found.W_fin, found.W_dir)) / np.vdot(found.W_dir, found.W_dir)
    assert pytest.approx(best, abs=1e-7) == found.C
    distance = np.linalg.norm(found.W - W)
    for C in (found.C - 1e-2, found.C + 1e-2):
        assert distance < np.linalg.norm(found.W_fin + C * found.W_dir - W)
    assert found.correlation == correlation(W, found.W)
    assert found.correlation >= found.correlation_dir
    assert found.direction.norm == found.one_token.norm == norm


@given(seeds, st.integers(2, 3))
@settings(max_examples=30)
def test_parts_are_orthogonal(seed: int, kept: int) -> None:
    problem, W, s = trained(seed, kept=kept)
    found = svm_equivalent(problem, W, s)
    assert abs(np.vdot(found.W_fin, found.W_dir)) <= 1e-8 * np.linalg.norm(found.W_fin) * np.linalg.norm(found.W_dir)


@pytest.mark.parametrize("seed", range(3))
def test_attention_tends_to_the_given_probabilities(seed: int) -> None:
    """softmax(X (W_fin + C W_dir) z) on the selected set, as C grows (arXiv:2308.16898)."""
    problem, W, s = trained(seed, n=4, T=6, d=8, kept=3)
    s = np.where(problem.selected[:, 0], s, 0.0)
    s /= s.sum(-1, keepdims=True)
    found = svm_equivalent(problem, W, s)
    # The three tokens that are not selected stand at least C + this below the selected ones.
    lead = problem.margins(found.W_fin).min()
    scales = np.array([1.0, 3.0, 10.0, 30.0, 100.0])
    errors = [np.abs(softmax(problem.logits(found.W_fin + C * found.W_dir)[:, 0]) - s).max() for C in scales]
    assert (errors <= 3.0 * np.exp(-scales - lead) + 1e-11).all()
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-11


def test_a_matrix_of_the_predicted_form_is_predicted() -> None:
    problem, _, s = trained(7)
    first = svm_equivalent(problem, np.eye(6), s)
    again = svm_equivalent(problem, first.W_fin + 25.0 * first.W_dir, s)
    assert pytest.approx(25.0, rel=1e-9) == again.C
    assert again.correlation == pytest.approx(1.0, abs=1e-12)
    assert again.correlation_dir < 1.0 - 1e-5


def test_where_every_token_is_selected_there_is_no_direction() -> None:
    problem, W, s = trained(5, kept=4)
    found = svm_equivalent(problem, W, s)
    assert found.C == 0.0
    assert not found.W_dir.any()
    np.testing.assert_array_equal(found.W, found.W_fin)
    assert math.isnan(found.correlation_dir)
    assert 0.0 < found.correlation <= 1.0


def test_where_one_token_is_selected_three_predictions_are_one() -> None:
    problem, W, s = trained(6, kept=1)
    found = svm_equivalent(problem, W, s)
    assert not found.W_fin.any()
    np.testing.assert_allclose(found.W_dir, found.W_one_token, atol=1e-7)
    assert found.correlation == pytest.approx(found.correlation_dir) == pytest.approx(found.correlation_one_token)


def test_an_absent_one_token_solution_does_not_stop_the_others() -> None:
    """Two tokens with equal shares, in both orders: no matrix selects the first of them in both sequences."""
    a, b, c = E1, [0.0, 1.0], [-1.0, -1.0]
    problem = TokenSelection([[a, b, c], [b, a, c]], [E1, E1], np.array([[True, True, False]] * 2))
    W = np.array([[5.0, 0.1], [5.0, 0.0]])
    found = svm_equivalent(problem, W, [[0.5, 0.5, 0.0]] * 2)
    assert found.one_token.status is Status.INFEASIBLE
    assert np.isnan(found.W_one_token).all()
    assert math.isnan(found.correlation_one_token)
    assert found.correlation > 0.99


def test_a_selection_without_direction_is_named() -> None:
    """The token that is not selected lies halfway between the two that are."""
    X = [[E1, [0.0, 1.0], [0.5, 0.5]], [E1, [0.0, 1.0], [-1.0, -1.0]]]
    problem = TokenSelection(X, [E1, [0.0, 1.0]], np.array([[True, True, False]] * 2))
    message = r"svm_equivalent: no matrix ties the selected tokens and separates the others\. Seq.* in the proof: 0\.$"
    with pytest.raises(InfeasibleError, match=message):
        svm_equivalent(problem, np.eye(2), [[0.5, 0.5, 0.0]] * 2)


def test_offsets_leave_the_direction_alone(rng: np.random.Generator) -> None:
    problem, W, s = trained(8)
    biased = TokenSelection(problem.tokens, problem.queries, problem.selected, offsets=rng.normal(size=(3, 4)))
    np.testing.assert_allclose(svm_equivalent(biased, W, s).W_dir, svm_equivalent(problem, W, s).W_dir, atol=1e-9)


def test_single_precision_tensors_come_back_as_such() -> None:
    problem, W, s = trained(9)
    single = [torch.from_numpy(array).float() for array in (problem.tokens, problem.queries, W, s)]
    selection = TokenSelection(single[0], single[1], torch.from_numpy(problem.selected))
    found = svm_equivalent(selection, single[2], single[3])
    assert {found.W.dtype, found.W_fin.dtype, found.W_one_token.dtype} == {torch.float32}
    assert isinstance(found.C, float)
    expected = svm_equivalent(problem, W, s)
    np.testing.assert_allclose(found.W.numpy(), expected.W, atol=1e-4)
    assert found.correlation == pytest.approx(expected.correlation, abs=1e-4)


# ------------------------------------------------------------------------------- next-token prediction


def reduced_loss(E: torch.Tensor, sequences: list[list[int]], labels: list[int], W: torch.Tensor) -> torch.Tensor:
    """The mean log-loss on sequences cut to the component of the label, written down literally."""
    graph = TokenPriorityGraph(sequences, labels)
    losses = []
    for ids, label in zip(sequences, labels, strict=True):
        kept = torch.tensor([token for token in ids if graph.same_component(ids[-1], label, token)])
        attention = torch.softmax(E[kept] @ W @ E[ids[-1]], 0)
        losses.append(-attention[kept == label].sum().log())
    return torch.stack(losses).mean()


def samples_of(r: np.random.Generator, *, n: int = 8, K: int = 6) -> tuple[list[list[int]], list[int]]:
    sequences = [[*r.integers(0, K, r.integers(1, 5)).tolist(), int(r.integers(0, 2))] for _ in range(n)]
    return sequences, [int(r.choice(ids)) for ids in sequences]


@pytest.mark.parametrize("d", [1, 3, 8])
@given(seed=seeds)
@settings(max_examples=30)
def test_graph_finite_part_is_stationary_and_in_the_subspace(d: int, seed: int) -> None:
    """Convex, so that is all there is to show; also with dependent embeddings (d = 1) and repeated ids."""
    r = np.random.default_rng(seed)
    sequences, labels = samples_of(r)
    E = torch.from_numpy(r.normal(size=(6, d)))
    found = graph_finite_part(E, sequences, labels)
    subspace = cyclic_subspace(TokenPriorityGraph(sequences, labels), E)
    assert torch.allclose(subspace.project(found.W), found.W, atol=1e-9)
    W = found.W.clone().requires_grad_()
    loss = reduced_loss(E, sequences, labels, W)
    (slope,) = torch.autograd.grad(loss, W)
    assert loss.item() == pytest.approx(found.loss, abs=1e-12)
    assert found.decrement <= 1e-10
    # The loss depends on W through its projection only, so the whole gradient vanishes.
    assert float(slope.norm()) <= 1e-8


def test_shares_of_a_single_cycle() -> None:
    """Label 0 in three sequences and 1 in one, both present: attention is three to one, whatever the embeddings."""
    E = np.random.default_rng(0).normal(size=(3, 5))
    found = graph_finite_part(E, [[0, 1, 2], [1, 0, 2], [0, 1, 2], [1, 0, 2]], [0, 0, 1, 0])
    assert (E[0] - E[1]) @ found.W @ E[2] == pytest.approx(math.log(3.0), rel=1e-9)
    assert found.loss == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
    # With 0 written twice in each, its mass has a head start of log 2.
    twice = graph_finite_part(E, [[0, 1, 0, 2], [1, 0, 0, 2], [0, 0, 1, 2], [1, 0, 0, 2]], [0, 0, 1, 0])
    assert (E[0] - E[1]) @ twice.W @ E[2] == pytest.approx(math.log(1.5), rel=1e-9)
    assert twice.loss == pytest.approx(found.loss)


def test_finite_parts_agree_where_both_are_defined() -> None:
    """The shares that minimise the loss, given as probabilities, lead to the same matrix."""
    E = np.random.default_rng(1).normal(size=(4, 6))
    sequences, labels = [[0, 1, 2, 3], [1, 2, 0, 3], [2, 0, 1, 3], [0, 2, 1, 3]], [0, 1, 2, 0]
    found = graph_finite_part(E, sequences, labels)
    problem = graph_selection(E, sequences, labels)
    assert problem.selected.tolist() == [[[True, True, True, False]]]
    np.testing.assert_allclose(solve_finite_part(problem, [[0.5, 0.25, 0.25, 0.0]]).W, found.W, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-140, 1e-9, 1e9, 1e140])
def test_scale_of_embeddings_does_not_change_the_shares(scale: float) -> None:
    """Neither that of all of them nor that of one last token."""
    E = np.random.default_rng(3).normal(size=(5, 7))
    sequences = [[0, 1, 2, 3], [1, 2, 0, 3], [2, 0, 1, 3], [0, 1, 4], [1, 0, 4], [1, 0, 4]]
    labels = [0, 1, 2, 0, 1, 0]
    expected = graph_finite_part(E, sequences, labels).W
    np.testing.assert_allclose(graph_finite_part(scale * E, sequences, labels).W * scale**2, expected, atol=1e-9)
    one = E.copy()
    one[3] *= scale if 1e-10 < scale < 1e10 else 1.0
    found = graph_finite_part(one, sequences, labels).W
    for last in (3, 4):
        np.testing.assert_allclose((E[:2] - E[0]) @ found @ one[last], (E[:2] - E[0]) @ expected @ E[last], atol=1e-6)


def test_competitors_with_nearly_equal_embeddings_get_their_shares() -> None:
    E = np.random.default_rng(4).normal(size=(3, 5))
    E[1] = E[0] + 1e-11 * E[1]
    found = graph_finite_part(E, [[0, 1, 2], [1, 0, 2], [0, 1, 2]], [0, 0, 1])
    assert (E[0] - E[1]) @ found.W @ E[2] == pytest.approx(math.log(2.0), rel=1e-7)


@pytest.mark.parametrize("size, dtype", [(1e200, np.float64), (1e-200, np.float64), (1e-25, np.float32)])
def test_embeddings_whose_matrix_no_float_holds_are_refused(size: float, dtype: Any) -> None:
    E = (size * np.random.default_rng(5).normal(size=(3, 5))).astype(dtype)
    with pytest.raises(
        InvalidInputError, match=r"embeddings must be of a size whose inverse square torch.float\d\d holds"
    ):
        graph_finite_part(E, [[0, 1, 2], [1, 0, 2], [1, 0, 2]], [0, 1, 0])


def test_an_acyclic_graph_has_no_finite_part() -> None:
    found = graph_finite_part(np.eye(3, dtype=np.float32), [[0, 1, 2], [1, 2]], [0, 1])
    assert found.W.dtype == np.float32
    assert not found.W.any()
    assert (found.loss, found.decrement, found.iterations) == (0.0, 0.0, 0)


def test_rare_labels_need_a_few_steps_only() -> None:
    """One sequence of a thousand says that 1 comes before 0."""
    samples = [[0, 1, 2]] * 999 + [[1, 0, 2]]
    found = graph_finite_part(np.eye(3), samples, [0] * 999 + [1])
    assert found.W[0, 2] - found.W[1, 2] == pytest.approx(math.log(999.0), rel=1e-6)
    assert found.iterations < 20


def test_what_does_not_converge_says_so() -> None:
    E = np.random.default_rng(0).normal(size=(3, 5))
    with pytest.raises(
        NotConvergedError, match=r"Newton's decrement stands at .* after 1 steps, above tol = 1.0e-10"
    ) as caught:
        graph_finite_part(E, [[0, 1, 2], [1, 0, 2], [0, 1, 2]], [0, 1, 0], max_iterations=1)
    assert caught.value.solution.decrement > 1e-10  # type: ignore[attr-defined]
    assert caught.value.solution.W.shape == (5, 5)


def test_bad_input_of_the_graph_finite_part() -> None:
    for options, message in (
        ({"tol": 0}, r"tol must be in \(0, 1\), got 0"),
        ({"tol": math.nan}, r"tol must be in \(0, 1\), got nan"),
        ({"max_iterations": -1}, "max_iterations must be an integer >= 0, got -1"),
        ({"max_iterations": True}, "max_iterations must be an integer >= 0, got True"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            graph_finite_part(np.eye(3), [[0, 1, 2]], [0], **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="label 2 does not occur in sequence 0"):
        graph_finite_part(np.eye(3), [[0, 1]], [2])
    with pytest.raises(InvalidInputError, match=r"graph_finite_part: embeddings must have shape \(K, d\)"):
        graph_finite_part([1.0, 2.0], [[0, 1]], [0])


def test_a_prediction_of_next_token_prediction() -> None:
    """Graph-SVM and finite part are orthogonal, and together they give the attention that minimises the loss."""
    r = np.random.default_rng(5)
    sequences, labels = samples_of(r, n=12)
    E = r.normal(size=(6, 8))
    fin, way = graph_finite_part(E, sequences, labels), solve(graph_selection(E, sequences, labels), tol=1e-9)
    assert abs(correlation(fin.W, way.W)) < 1e-8
    W = torch.from_numpy(fin.W + 60.0 * way.W)
    whole = []
    for ids, label in zip(sequences, labels, strict=True):
        rows = torch.from_numpy(E)[ids]
        attention = torch.softmax(rows @ W @ rows[-1], 0)
        whole.append(-attention[torch.tensor(ids) == label].sum().log())
    assert float(torch.stack(whole).mean()) == pytest.approx(fin.loss, abs=1e-9)
