"""Processes that solve heads: they end with the one that started them, and what they fail on is told."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attsvm.errors import AttSVMError
from attsvm.microscope import workers
from attsvm.microscope.analysis import HeadJob
from attsvm.microscope.solutions import SolutionSettings
from attsvm.records import read_json
from unit.microscope.test_heads import H, info, windows


@pytest.fixture
def jobs(tmp_path: Path, generator: torch.Generator) -> list[HeadJob]:
    """The heads of one module, whose sample lies in the folder ``samples``."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "heads").mkdir()
    sample, _, _ = windows(generator)
    sample.save(tmp_path / "samples" / "0.safetensors")
    return [
        HeadJob(index=0, info=info(), head=head, residual=None, first_residual=None, wanted=(("score", "fro"),))
        for head in range(H)
    ]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Two processes for however few heads; the list gets those that are started."""
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def remembered(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(workers, "FEW", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(subprocess, "Popen", remembered)
    return started


def solve(jobs: list[HeadJob], folder: Path, told: list[Any] | None = None) -> None:
    workers.solve_heads(
        jobs,
        folder / "samples",
        folder / "heads",
        shown=[0],
        settings=SolutionSettings(),
        tell=lambda *what: None if told is None else told.append(what),
    )


def test_every_head_is_solved_once(jobs: list[HeadJob], two: list[Any], tmp_path: Path) -> None:
    told: list[Any] = []
    solve(jobs, tmp_path, told)
    assert len(two) == 2
    assert [process.returncode for process in two] == [0, 0]
    assert sorted(label for _, _, label in told[1:]) == ["L0.H0", "L0.H1", "L0.H2", "L0.H3"]
    assert [done for done, _, _ in told] == [0, 1, 2, 3, 4]
    for job in jobs:
        (one,) = read_json(tmp_path / "heads" / f"{job.label}.json")["solutions"]
        assert one["status"] == "OPTIMAL"
    assert not (tmp_path / "heads" / "claims").exists()
    solve(jobs, tmp_path)
    assert len(two) == 2, "everything was there"


def test_a_process_that_fails_is_told(
    jobs: list[HeadJob], two: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_START", "import sys; print('no room left', file=sys.stderr); sys.exit(3)")
    with pytest.raises(AttSVMError, match="a process that solves heads ended early: no room left"):
        solve(jobs, tmp_path)


def test_interrupted_all_end(
    jobs: list[HeadJob], two: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_START", "import time; time.sleep(600)")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", nap)
    with pytest.raises(KeyboardInterrupt):
        solve(jobs, tmp_path)
    assert [process.poll() is not None for process in two] == [True, True]


def test_a_process_whose_parent_is_gone_ends(jobs: list[HeadJob], tmp_path: Path) -> None:
    workers._write_jobs(jobs, tmp_path / "samples", tmp_path / "heads", [0], SolutionSettings())
    workers.work(tmp_path / "heads", 0, 1, parent=-1)
    assert not list((tmp_path / "heads").glob("L*.json"))
