"""A run that is interrupted anywhere goes on to the identical end, and never goes on from another run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from attsvm import TokenSelection, Trajectory, descend
from attsvm.dynamics.run import Run as _Run
from attsvm.errors import RecordError

TOKENS = np.random.default_rng(5).normal(size=(2, 3, 4))
SCORES = np.random.default_rng(6).normal(size=(2, 3))
BODY = _Run._advance.__code__


def problem(queries: Any = None) -> TokenSelection:
    return TokenSelection.from_scores(TOKENS, np.eye(4)[:2] if queries is None else queries, SCORES)


def same(one: Trajectory, two: Trajectory) -> None:
    for name in ("steps", "W", "loss", "norm", "attention_mass", "selected", "probabilities", "stalled", "K", "Q"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


@contextmanager
def interrupted(line: int, step: int) -> Iterator[None]:
    """Ctrl-C just before ``line`` of the method that takes a step, at the given step."""
    before = sys.gettrace()

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and frame.f_lineno == line and frame.f_locals["self"].done == step:
            raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code is BODY else None

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("parameterization", ["W", "KQ"])
def test_an_interrupt_before_any_line_of_a_step_costs_nothing(parameterization: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"parameterization": parameterization, "steps": 6, "init": "normal", "record_every": 2}
    whole = descend(problem(), SCORES, **options)
    lines = sorted({number for *_, number in BODY.co_lines() if number is not None} - {BODY.co_firstlineno})
    assert len(lines) >= 6
    hits = 0
    for line in lines:
        # The step after the first record, one without a record, the last one, and the one that Ctrl-C follows.
        for step in (0, 1, 3, 5, 6):
            path = tmp_path / f"{line}-{step}"
            try:
                with interrupted(line, step):
                    descend(problem(), SCORES, checkpoint=path, **options)
            except KeyboardInterrupt:
                hits += 1
            same(whole, descend(problem(), SCORES, checkpoint=path, **options))
    assert hits >= 20


def test_an_interrupt_before_the_first_record_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = descend(problem(), SCORES, steps=5)
    path = tmp_path / "run"

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("attsvm.dynamics.run.gradient", stop)
        with pytest.raises(KeyboardInterrupt):
            descend(problem(), SCORES, steps=5, checkpoint=path)
    assert path.exists()
    same(whole, descend(problem(), SCORES, steps=5, checkpoint=path))


def test_an_interrupt_without_a_checkpoint_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def stop(step: int, steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        descend(problem(), SCORES, steps=5, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_between_saves_goes_on_from_the_last_save(tmp_path: Path) -> None:
    """Killed, a process says no goodbye: what counts is what was saved every 500 steps."""
    whole = descend(problem(), SCORES, steps=620)
    path = tmp_path / "run"

    def kill(step: int, steps: int, loss: float) -> None:
        if step == 600:
            raise SystemExit

    with pytest.raises(SystemExit):
        descend(problem(), SCORES, steps=620, checkpoint=path, progress=kill)
    seen: list[int] = []
    again = descend(problem(), SCORES, steps=620, checkpoint=path, progress=lambda step, *_: seen.append(step))
    assert seen[0] == 500
    same(whole, again)


def test_a_finished_run_read_again_still_knows_that_it_stalled(tmp_path: Path) -> None:
    equal = np.zeros((2, 3))
    first = descend(problem(), equal, steps=5, checkpoint=tmp_path / "run")
    assert first.stalled is True
    same(first, descend(problem(), equal, steps=5, checkpoint=tmp_path / "run"))


@pytest.mark.parametrize("init", [("zeros", "normal"), (np.zeros((4, 4)), np.eye(4)[:, [3, 2, 1, 0]])])
def test_a_checkpoint_of_another_start_is_refused(init: tuple[Any, Any], tmp_path: Path) -> None:
    descend(problem(), SCORES, steps=5, init=init[0], checkpoint=tmp_path / "run")
    with pytest.raises(RecordError, match="belongs to a run with other data or settings"):
        descend(problem(), SCORES, steps=5, init=init[1], checkpoint=tmp_path / "run")


def test_a_start_that_differs_only_outside_the_span_of_the_queries_is_another_start(tmp_path: Path) -> None:
    start, other = np.zeros((4, 4)), np.zeros((4, 4))
    other[:, 3] = 1.0  # the queries are the first two unit vectors
    descend(problem(), SCORES, steps=5, init=start, checkpoint=tmp_path / "run")
    with pytest.raises(RecordError, match="other data or settings"):
        descend(problem(), SCORES, steps=5, init=other, checkpoint=tmp_path / "run")


def test_queries_that_look_alike_in_their_own_span_are_other_data(tmp_path: Path) -> None:
    """A single query is its length in the basis of its span, wherever it points."""
    ends = []
    for k in range(1, 4):
        one = TokenSelection.from_scores(TOKENS[:1], np.eye(4)[k : k + 1], SCORES[:1])
        path = tmp_path / "run"
        if ends:
            with pytest.raises(RecordError, match="other data or settings"):
                descend(one, SCORES[:1], steps=5, checkpoint=path)
        path.unlink(missing_ok=True)
        ends.append(descend(one, SCORES[:1], steps=5, checkpoint=path).W[-1])
    assert not np.array_equal(ends[0], ends[1])


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "run"
    descend(problem(), SCORES, steps=5, checkpoint=path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(RecordError, match="could not be read"):
        descend(problem(), SCORES, steps=5, checkpoint=path)


def test_places_where_no_checkpoint_can_be_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="could not be read"):
        descend(problem(), SCORES, steps=5, checkpoint=tmp_path)
    with pytest.raises(RecordError, match="could not be written: No such file or directory"):
        descend(problem(), SCORES, steps=5, checkpoint=tmp_path / "absent" / "run")
