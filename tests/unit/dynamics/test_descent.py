"""``descend``: what it records, how it resumes, what it says, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attsvm import TokenSelection, Trajectory, descend
from attsvm.dynamics.arguments import planned_steps
from attsvm.errors import AttSVMError, InvalidInputError, RecordError


def case(rng: np.random.Generator, n: int = 4, T: int = 5, d: int = 6) -> tuple[TokenSelection, np.ndarray]:
    tokens, queries, scores = rng.normal(size=(n, T, d)), rng.normal(size=(n, d)), rng.normal(size=(n, T))
    return TokenSelection.from_scores(tokens, queries, scores), scores


def same(one: Trajectory, two: Trajectory) -> None:
    for name in ("steps", "W", "loss", "norm", "attention_mass", "selected", "probabilities"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_records_have_the_promised_shapes_and_kinds(rng: np.random.Generator) -> None:
    problem, scores = case(rng)
    run = descend(problem, scores, parameterization="KQ", rank=3, steps=50, record_every=20)
    assert run.steps.tolist() == [0, 20, 40, 50]
    assert (run.W.shape, run.K.shape, run.Q.shape) == ((4, 6, 6), (6, 3), (6, 3))
    assert run.selected.shape == (4, 1)
    assert run.probabilities.shape == (4, 1, 5)
    assert isinstance(run.W, np.ndarray)
    np.testing.assert_allclose(run.W[-1], run.K @ run.Q.T, atol=1e-12)
    np.testing.assert_allclose(run.probabilities.sum(-1), 1.0)
    single = TokenSelection(torch.randn(2, 3, 4), torch.randn(2, 4), [0, 1])
    narrow = descend(single, torch.randn(2, 3), steps=3)
    assert isinstance(narrow.W, torch.Tensor)
    assert narrow.W.dtype == torch.float32


def test_records_are_where_they_were_planned() -> None:
    assert planned_steps(10, 4) == [0, 4, 8, 10]
    planned = planned_steps(3000, None)
    assert planned[:3] == [0, 1, 2]
    assert planned[-1] == 3000
    assert len(planned) < 60
    assert planned_steps(0, None) == [0]


@pytest.mark.parametrize("parameterization", ["W", "KQ"])
def test_the_seed_decides(parameterization: Any, rng: np.random.Generator) -> None:
    problem, scores = case(rng)
    options: dict[str, Any] = {"parameterization": parameterization, "init": "normal", "steps": 40}
    first = descend(problem, scores, seed=1, **options)
    same(first, descend(problem, scores, seed=1, **options))
    assert not np.array_equal(first.W, descend(problem, scores, seed=2, **options).W)


def test_a_batch_is_its_members(rng: np.random.Generator) -> None:
    members = [case(rng) for _ in range(3)]
    tokens, queries = (np.stack([getattr(p, name) for p, _ in members]) for name in ("tokens", "queries"))
    scores = np.stack([s for _, s in members])
    batch = TokenSelection.from_scores(tokens, queries, scores)
    together = descend(batch, scores, steps=300)
    correlations = together.correlation(together.solution(tol=1e-9))
    for b, (problem, own) in enumerate(members):
        alone = descend(problem, own, steps=300)
        np.testing.assert_allclose(together.W[b], alone.W, atol=1e-10)
        own_path = alone.correlation(alone.solution(tol=1e-9))
        assert together.verdict[b].kind == alone.verdict.kind
        np.testing.assert_allclose(correlations[b, 1:], own_path[1:], atol=1e-8)


@pytest.mark.parametrize("parameterization", ["W", "KQ"])
def test_an_interrupted_run_goes_on_to_the_identical_result(
    parameterization: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    problem, scores = case(rng)
    options: dict[str, Any] = {"parameterization": parameterization, "steps": 1300, "init": "normal"}
    whole = descend(problem, scores, **options)

    def stop(step: int, steps: int, loss: float) -> None:
        if step >= 700:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        descend(problem, scores, checkpoint=path, progress=stop, **options)
    assert path.exists()
    seen: list[int] = []
    again = descend(problem, scores, checkpoint=path, progress=lambda s, n, loss: seen.append(s), **options)
    assert min(seen) >= 700
    same(whole, again)
    same(whole, descend(problem, scores, checkpoint=path, **options))  # a finished run is only read


def test_foreign_and_damaged_checkpoints_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    problem, scores = case(rng)
    path = tmp_path / "run.safetensors"
    descend(problem, scores, steps=10, checkpoint=path)
    for changed in ({"steps": 11}, {"steps": 10, "learning_rate": 0.2}, {"steps": 10, "loss": "exponential"}):
        with pytest.raises(RecordError, match="other data or settings"):
            descend(problem, scores, checkpoint=path, **changed)
    with pytest.raises(RecordError, match="other data or settings"):
        descend(problem, 2 * scores, steps=10, checkpoint=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RecordError, match="could not be read"):
        descend(problem, scores, steps=10, checkpoint=path)


def test_equal_scores_leave_nothing_to_learn(rng: np.random.Generator) -> None:
    problem, scores = case(rng)
    run = descend(problem, np.zeros_like(scores), steps=5)
    assert run.stalled
    assert run.norm[-1] == 0.0
    assert np.isnan(run.correlation(run.solution())).all()


def test_sequences_of_one_token_and_silent_queries_take_no_part() -> None:
    tokens = np.eye(4)[None].repeat(2, 0)
    allowed = np.array([[True, False, False, False], [True, True, True, True]])
    problem = TokenSelection(tokens, np.ones((2, 4)), [0, 2], allowed=allowed)
    run = descend(problem, [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], steps=200)
    assert run.selected.tolist() == [[0], [2]]
    assert np.isfinite(run.W).all()


def test_verdicts_of_runs_with_known_ends() -> None:
    tokens, queries = [[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]]
    problem = TokenSelection(tokens, queries, [0])
    best = descend(problem, [[1.0, 0.0]], steps=200)
    assert best.verdict.kind == "global"
    assert best.verdict.fraction_globally_optimal == 1.0
    # Too short to leave a start that keeps the wrong token.
    wrong = descend(problem, [[1.0, 0.0]], steps=1, init=np.array([[-50.0, 0.0], [0.0, 0.0]]))
    assert wrong.verdict.kind == "neither"
    assert "1 support token scores at least as high" in wrong.verdict.reason
    # The selected token lies between two others, so that no matrix selects it.
    line = TokenSelection([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], queries, [0])
    stuck = descend(line, [[1.0, 0.0, 0.0]], steps=1)
    assert stuck.verdict.kind == "neither"
    assert stuck.verdict.locally_optimal is None
    assert stuck.solution() is stuck.solution()


def test_an_unfinished_run_says_so(rng: np.random.Generator) -> None:
    problem, scores = case(rng)
    assert "not finished" in descend(problem, scores, steps=1).verdict.reason


def test_divergence_is_an_error_not_a_result(rng: np.random.Generator) -> None:
    problem, scores = case(rng)
    with pytest.raises(AttSVMError, match="left the range of float64"):
        descend(problem, scores, steps=5, learning_rate=1e308, parameterization="KQ", init="normal")


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"parameterization": "V"}, InvalidInputError, "parameterization must be"),
    ({"rank": 2}, InvalidInputError, "rank must be None"),
    ({"parameterization": "KQ", "rank": 0}, InvalidInputError, "rank must be an integer >= 1"),
    ({"head": "mlp"}, InvalidInputError, "head must be"),
    ({"loss": "hinge"}, InvalidInputError, "loss must be one of"),
    ({"optimizer": "lbfgs"}, InvalidInputError, "optimizer must be one of"),
    ({"learning_rate": 0.0}, InvalidInputError, "learning_rate must be > 0"),
    ({"learning_rate": float("inf")}, InvalidInputError, "learning_rate must be > 0"),
    ({"learning_rate": float("nan")}, InvalidInputError, "learning_rate must be > 0"),
    ({"steps": -1}, InvalidInputError, "steps must be an integer >= 0"),
    ({"steps": 2.5}, InvalidInputError, "steps must be an integer >= 0"),
    ({"record_every": 0}, InvalidInputError, "record_every must be"),
    ({"init": "ones"}, InvalidInputError, "init must be"),
    ({"parameterization": "KQ", "rank": True}, InvalidInputError, "rank must be an integer >= 1"),
    ({"record_every": True}, InvalidInputError, "record_every must be"),
    ({"seed": "one"}, InvalidInputError, "seed must be an integer"),
    ({"seed": -1}, InvalidInputError, "seed must be an integer"),
    ({"init": np.zeros((2, 2))}, InvalidInputError, "init must have shape"),
    ({"init": np.zeros((3, 6, 6))}, InvalidInputError, "init must have shape"),  # a batch of another size
    ({"init": np.full((6, 6), np.nan)}, InvalidInputError, "init must be finite, got nan at"),
    ({"init": None}, InvalidInputError, "init must hold numbers"),
    ({"parameterization": "KQ", "rank": 3, "init": (np.zeros((6, 3)), np.zeros((6, 2)))}, InvalidInputError, "shape"),
    ({"parameterization": "KQ", "init": np.zeros((6, 6))}, InvalidInputError, "pair"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_arguments(options: dict[str, Any], kind: Any, message: str, rng: np.random.Generator) -> None:
    problem, scores = case(rng)
    with pytest.raises(kind, match=message):
        descend(problem, scores, **{"steps": 2, **options})


def test_bad_scores(rng: np.random.Generator) -> None:
    problem, scores = case(rng)
    with pytest.raises(InvalidInputError, match="scores must have shape"):
        descend(problem, scores[:, :3])
    with pytest.raises(InvalidInputError, match="scores must be finite"):
        descend(problem, np.where(scores > 0, np.nan, scores))
    with pytest.raises(InvalidInputError, match="problem must be a TokenSelection"):
        descend("data", scores)  # type: ignore[arg-type]
