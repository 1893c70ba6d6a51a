"""What ``descend`` refuses, resumes, keeps and draws, for all its optimisers, parameterisations and heads."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm import TokenSelection, Trajectory, descend
from attsvm.dynamics import (
    Adam,
    DivergedError,
    GradientFlow,
    LinearHead,
    MirrorDescent,
    Momentum,
    QuadraticHead,
    ReLUHead,
)
from attsvm.errors import InvalidInputError, RecordError, UnsupportedError
from attsvm.records import write_arrays

X = np.random.default_rng(1).normal(size=(2, 3, 4, 5))
Z = np.random.default_rng(2).normal(size=(2, 3, 5))
SCORES = np.random.default_rng(3).normal(size=(2, 3, 4))
V = np.random.default_rng(4).normal(size=5)
BATCH = TokenSelection.from_scores(X, Z, SCORES)
ONE = BATCH[0]
FIELDS = ("steps", "W", "loss", "norm", "attention_mass", "selected", "probabilities", "stalled", "K", "Q", "head")


def same(one: Trajectory, two: Trajectory) -> None:
    for name in (*FIELDS, "log_time"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def called(x: Tensor) -> Tensor:
    return torch.tanh(x @ torch.from_numpy(V))


RUNS: dict[str, dict[str, Any]] = {
    "gd": {"optimizer": "gd"},
    "ngd": {"parameterization": "KQ", "rank": 2},
    "momentum": {"optimizer": Momentum(0.8), "head": QuadraticHead(V, 0.3)},
    "adam": {"optimizer": Adam(epsilon=0.0), "head": LinearHead(V, trained=True), "parameterization": "KQ"},
    "sign": {"optimizer": "sign", "head": ReLUHead(np.eye(5)[:, :3])},
    "mirror": {"optimizer": MirrorDescent(3), "parameterization": "diagonal", "init": "normal"},
    "flow": {"optimizer": GradientFlow(1e-6), "parameterization": "KQ", "rank": 2},
    "callable": {"optimizer": "momentum", "head": called, "loss": "squared"},
}


@pytest.mark.parametrize("steps", [40, 130])  # the longer ones run compiled
@pytest.mark.parametrize("name", RUNS)
def test_every_state_is_resumed_to_the_bit(name: str, steps: int, tmp_path: Path) -> None:
    if name == "flow" and steps > 100:
        pytest.skip("never compiled")
    options = {"steps": steps, "init": "normal", **RUNS[name]}
    scores = None if "head" in options else SCORES
    whole = descend(BATCH, scores, **options)

    def stop(step: int, *_: Any) -> None:
        if step == 20:
            raise KeyboardInterrupt

    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        descend(BATCH, scores, checkpoint=path, progress=stop, **options)
    same(whole, descend(BATCH, scores, checkpoint=path, **options))
    other = {**options, "seed": 5} if name != "callable" else {**options, "head": lambda x: 2.0 * called(x)}
    with pytest.raises(RecordError, match="other data or settings"):
        descend(BATCH, scores, checkpoint=path, **other)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_saved_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    options = {"steps": 5, **RUNS[name]}
    for problem, scores in ((BATCH, SCORES), (ONE, SCORES[0])):
        run = descend(problem, None if "head" in options else scores, **options)
        run.save(tmp_path / "t")
        back = Trajectory.load(tmp_path / "t")
        same(run, back)
        assert type(back.W) is type(run.W)
        assert (back.own_norm, back.optimizer, back.loss_name) == (run.own_norm, run.optimizer, run.loss_name)
        torch.testing.assert_close(back.scores, run.scores, rtol=0, atol=0)
        assert [v.kind for v in back.verdicts] == [v.kind for v in run.verdicts]


def test_damaged_and_foreign_trajectories_are_refused(tmp_path: Path) -> None:
    single = TokenSelection(torch.randn(2, 3, 4), torch.randn(2, 4), [0, 1])
    run = descend(single, torch.randn(2, 3), steps=3)
    path = tmp_path / "t"
    run.save(path)
    assert Trajectory.load(path).W.dtype == torch.float32
    content = path.read_bytes()
    for kept in (0, 20, len(content) - 8):
        path.write_bytes(content[:kept])
        with pytest.raises(RecordError, match="could not be read"):
            Trajectory.load(path)
    write_arrays(path, {"W": np.zeros(3)})
    with pytest.raises(RecordError, match="is not a trajectory"):
        Trajectory.load(path)
    path.write_bytes(content.replace(b'"loss_name"', b'"loss_nama"').replace(b'\\"loss_name\\"', b'\\"loss_nama\\"'))
    with pytest.raises(RecordError, match="is not a whole trajectory"):
        Trajectory.load(path)
    with pytest.raises(RecordError, match="could not be read"):
        Trajectory.load(tmp_path / "absent")
    with pytest.raises(RecordError, match="could not be written"):
        run.save(tmp_path / "absent" / "t")


class Detached(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().sum(-1)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"head": lambda x: torch.ones(x.shape[:-1])}, InvalidInputError, "must have a gradient"),
    ({"head": Detached()}, InvalidInputError, "must have a gradient"),
    ({"head": lambda x: (x > 0).double().sum(-1)}, InvalidInputError, "must have a gradient"),
    (
        {"head": lambda x: torch.zeros(x.shape[:-1], requires_grad=True) * 2},
        InvalidInputError,
        "depend on its argument",
    ),
    ({"head": lambda x: (0.0 * x).sum(-1)}, InvalidInputError, "must not be constant"),
    ({"head": lambda x: x}, InvalidInputError, r"map \(..., d\) to \(...\), got"),
    ({"head": lambda x: x.sum(-1) * float("nan")}, InvalidInputError, "must be finite"),
    ({"head": lambda x: 1.0}, InvalidInputError, "must return a tensor, got float"),
    ({"head": torch.nn.Linear(5, 1)}, InvalidInputError, "must map float64 tensors"),
    ({"head": 3}, InvalidInputError, "head must be"),
    ({"head": LinearHead(np.ones(4))}, InvalidInputError, r"head.v must have shape \(5,\), got \(4,\)"),
    ({"head": LinearHead(np.full(5, np.inf))}, InvalidInputError, "head.v must be finite"),
    ({"head": QuadraticHead(V, float("nan"))}, InvalidInputError, "penalty must be a finite number"),
    ({"head": ReLUHead(V)}, InvalidInputError, r"head.V must have shape \(5, m\)"),
    ({"head": LinearHead(V), "labels": [1.0, 2.0, 1.0]}, InvalidInputError, "labels must be -1 or"),
    ({"head": LinearHead(V), "labels": [1.0, -1.0]}, InvalidInputError, r"labels .* got shape \(2,\)"),
    ({"head": LinearHead(V), "scores": SCORES[0]}, InvalidInputError, "scores must be None"),
    ({"labels": [1.0, 1.0, 1.0], "scores": SCORES[0]}, InvalidInputError, "labels must be None"),
    ({}, InvalidInputError, "scores must be given"),
    ({"head": QuadraticHead(V, 1.0), "optimizer": "polyak"}, UnsupportedError, "infimum"),
    ({"scores": SCORES[0], "optimizer": "polyak", "loss": "squared"}, UnsupportedError, "infimum"),
    ({"scores": SCORES[0], "learning_rate": "theory"}, InvalidInputError, 'must come with optimizer="gd"'),
    ({"scores": SCORES[0], "learning_rate": "fast"}, InvalidInputError, "learning_rate must be"),
    ({"scores": SCORES[0], "learning_rate": True}, InvalidInputError, "learning_rate must be"),
    ({"scores": SCORES[0], "parameterization": "p"}, InvalidInputError, "the same vector everywhere"),
    ({"scores": SCORES[0], "parameterization": "diagonal", "init": V}, InvalidInputError, "pair"),
    (
        {"scores": SCORES[0], "parameterization": "diagonal", "init": (V, V[:3])},
        InvalidInputError,
        "init must have shape",
    ),
    ({"scores": SCORES[0], "parameterization": "diagonal", "rank": 2}, InvalidInputError, "rank must be None"),
    ({"scores": SCORES[0], "record_steps": [1, 9]}, InvalidInputError, "record_steps must be at most"),
    ({"scores": SCORES[0], "record_steps": [1.5]}, InvalidInputError, "record_steps must be integers"),
    ({"scores": SCORES[0], "record_steps": [1], "record_every": 1}, InvalidInputError, "must not be given together"),
    ({"scores": SCORES[0], "loss": "log"}, DivergedError, "reached an output <= 0 by step 0"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_arguments(options: dict[str, Any], kind: Any, message: str) -> None:
    options = {"steps": 3, **options}
    with pytest.raises(kind, match=message):
        descend(ONE, options.pop("scores", None), **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MirrorDescent(1.0),
        lambda: MirrorDescent(float("inf")),
        lambda: Momentum(1.0),
        lambda: Adam(beta2=-0.1),
        lambda: Adam(epsilon=-1.0),
        lambda: GradientFlow(0.0),
    ],
)
def test_bad_optimizers(make: Any) -> None:
    with pytest.raises(InvalidInputError, match="must be"):
        make()


def test_members_that_diverge_are_named_and_nothing_recorded_is_lost() -> None:
    start = np.zeros((2, 5, 5))
    start[1] = 1e308
    options: dict[str, Any] = {"init": start, "optimizer": "gd", "learning_rate": 1e308, "loss": "exponential"}
    for steps in (20, 200):
        with pytest.raises(DivergedError, match="by step") as caught:
            descend(BATCH, 1e3 * SCORES, steps=steps, record_every=1, **options)
        assert "of the batch" in str(caught.value)
        assert set(caught.value.members) <= {0, 1}
        assert caught.value.members
        again = copy.copy(DivergedError("why", members=(1,)))  # by __reduce__, as between processes
        assert (str(again), again.members, again.trajectory) == ("why", (1,), None)
    grows: dict[str, Any] = {"parameterization": "KQ", "init": "normal", "optimizer": "gd", "loss": "exponential"}
    with pytest.raises(DivergedError, match="left the range of float64") as caught:
        descend(BATCH, 30 * SCORES, steps=40, record_every=1, learning_rate=1e150, **grows)
    kept = caught.value.trajectory
    assert kept is not None
    assert np.isfinite(kept.W).all()
    assert kept.steps.tolist() == list(range(len(kept.steps)))


def test_a_stalled_run_says_so(caplog: pytest.LogCaptureFixture) -> None:
    scores = SCORES.copy()
    scores[1] = 0.0
    with caplog.at_level(logging.WARNING):
        run = descend(BATCH, scores, steps=10)
    assert run.stalled.tolist() == [False, True]
    assert [record.message for record in caplog.records if "1 of 2 runs (1 first) stalled" in record.message]
    assert len(caplog.records) == 1


def test_a_batch_is_solved_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from attsvm.dynamics import trajectory

    calls = []
    solve = trajectory.solve
    monkeypatch.setattr(trajectory, "solve", lambda *a, **b: calls.append(a) or solve(*a, **b))
    run = descend(BATCH, SCORES, steps=200)
    found = run.solution()
    assert len(calls) == 1
    assert len(found) == 2
    for b, solution in enumerate(found):
        assert solution.W.shape == (5, 5)
        np.testing.assert_allclose(solution.W, solve(run.problem[b], on_failure="ignore").W, atol=1e-5)


def test_the_diagonal_solution_is_the_smallest_in_the_l1_norm() -> None:
    run = descend(BATCH, SCORES, parameterization="diagonal", steps=300)
    assert run.own_norm == 1.0
    for b, solution in enumerate(run.solution()):
        W = np.diag(np.diag(solution.W))
        np.testing.assert_array_equal(solution.W, W)
        if str(solution.status.value) == "optimal":
            assert float(run.problem[b].margins(W).min()) == pytest.approx(1.0, abs=1e-6)
            assert solution.upper_bound == pytest.approx(np.abs(W).sum(), rel=1e-6)
    assert run.K.shape == run.Q.shape == (2, 5)


def test_starts_of_a_prompt() -> None:
    z = np.array([3.0, 0.0, 4.0, 0.0, 0.0])
    problem = TokenSelection(X[0], np.tile(z, (3, 1)), [0, 0, 0])
    p = np.arange(5.0)
    one = descend(problem, SCORES[0], parameterization="p", init=p, steps=0)
    np.testing.assert_allclose(one.W[0] @ z, p, atol=1e-14)
    W = np.outer(p, z) / 25 + np.outer(p, [4.0, 0, -3, 0, 0])
    two = descend(problem, SCORES[0], parameterization="p", init=W, steps=0)
    np.testing.assert_allclose(two.W[0], one.W[0], atol=1e-14)


def test_curves_are_drawn_on_given_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="extra [plot] is not installed")
    figure = pytest.importorskip("matplotlib.figure").Figure()
    assert matplotlib
    run, single = descend(BATCH, SCORES, steps=20), descend(ONE, SCORES[0], steps=20)
    for quantity in ("correlation", "loss", "norm", "attention_mass"):
        ax = figure.add_subplot()
        assert run.plot(quantity, ax=ax) is ax
        np.testing.assert_allclose(ax.lines[0].get_xdata(), run.steps)
        if quantity != "correlation":
            np.testing.assert_allclose(ax.lines[0].get_ydata(), getattr(run, quantity).mean(0))
        single.plot(quantity, ax=ax)
        assert len(ax.lines) == 2
    with pytest.raises(InvalidInputError, match="quantity must be one of"):
        run.plot("speed")
    with pytest.raises(InvalidInputError, match="solution must be None"):
        run.plot("loss", solution=run.solution())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match="matplotlib is not installed"):
        run.plot("loss")


def test_objects_are_values() -> None:
    assert repr(MirrorDescent(3)) == "MirrorDescent(p=3, normalised=True)"
    assert copy.copy(Adam()) == Adam(0.9, 0.999, 1e-8)
