"""A run that was interrupted goes on to the identical result, however it ended and wherever it was."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from cli.commands import Commands, Running
from cli.data import assert_same_run, result_at

RUN = ("verify", "--model", "none", "--d-model", "16", "-n", "12", "--steps", "600", "-o", "run")
"""Long enough for a checkpoint on the way, after 500 steps."""


@pytest.fixture(scope="module")
def uninterrupted(shared: Commands) -> Path:
    assert shared(*RUN).code == 0
    return shared.home / "run"


def assert_goes_on(attsvm: Commands, uninterrupted: Path) -> None:
    """Assert that the run is unfinished, and that the same command finishes it as if nothing had been."""
    run = attsvm.home / "run"
    assert not (run / "result.json").exists()
    assert list((run / "checkpoint").glob("*.safetensors"))
    done = attsvm(*RUN)
    assert done.code == 0, done.err
    assert not all(f"train {name}: 0 of 600" in done.err for name in ("W", "KQ")), "it began anew"
    assert_same_run(run, uninterrupted)
    assert {path.name for path in run.iterdir()} == {path.name for path in uninterrupted.iterdir()}


def slow_start() -> None:
    """Let every progress report of this part take a while, so that a test can come in between."""
    slow_down("train", 0)


def slow_training() -> None:
    slow_down("train", 500)


def slow_solving() -> None:
    slow_down("solve", 0)


def slow_down(task: str, beyond: int) -> None:
    import time

    from attsvm.cli.terminal import Bars

    tell = Bars.tell

    def slowly(self: Any, name: str, done: float, *arguments: Any) -> None:
        tell(self, name, done, *arguments)
        if name.startswith(task) and done >= beyond:
            time.sleep(0.2)

    Bars.tell = slowly


def training(running: Running, attsvm: Commands) -> None:
    """Wait until the first checkpoint is written."""
    running.until(lambda: any((attsvm.home / "run" / "checkpoint").glob("*.safetensors")))


def solving(running: Running, attsvm: Commands) -> None:
    running.until(lambda: "solve" in running.err.read_text())


PLACES = [(slow_training, training), (slow_solving, solving)]


@pytest.mark.parametrize(("slow", "there"), PLACES, ids=["training", "solving"])
@pytest.mark.parametrize("threads", [1, 2], ids=["one after the other", "side by side"])
def test_ctrl_c(attsvm: Commands, uninterrupted: Path, slow: Any, there: Any, threads: int) -> None:
    running = attsvm.start(*RUN, "--json", before=slow, threads=threads)
    there(running, attsvm)
    running.signal(signal.SIGINT)
    running.wait().failed(130, "interrupted", "the same command goes on")
    assert_goes_on(attsvm, uninterrupted)


@pytest.mark.parametrize(("slow", "there"), PLACES, ids=["training", "solving"])
def test_kill(attsvm: Commands, uninterrupted: Path, slow: Any, there: Any) -> None:
    running = attsvm.start(*RUN, before=slow)
    there(running, attsvm)
    running.signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert_goes_on(attsvm, uninterrupted)


def test_interrupted_again_and_again(attsvm: Commands, uninterrupted: Path) -> None:
    for _ in range(2):
        running = attsvm.start(*RUN, before=slow_start)
        running.until(lambda running=running: "train" in running.err.read_text())
        running.signal(signal.SIGINT)
        assert running.wait().code == 130
    assert_goes_on(attsvm, uninterrupted)


def die_before_the_result() -> None:
    """Kill the process when result.json is written and not yet in its place."""
    import os

    replace = Path.replace

    def last(self: Path, target: Path) -> Path:
        if target.name == "result.json":
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = last


def test_kill_while_the_result_is_written(attsvm: Commands, uninterrupted: Path) -> None:
    assert attsvm(*RUN, before=die_before_the_result).code == -signal.SIGKILL
    assert list((attsvm.home / "run").glob(".result.json.*.part")), "half a file is left"
    assert_goes_on(attsvm, uninterrupted)


def test_default_folder_is_that_of_the_interrupted_run(attsvm: Commands) -> None:
    command = RUN[:-2]
    running = attsvm.start(*command, before=slow_start)
    running.until(lambda: "train" in running.err.read_text())
    running.signal(signal.SIGINT)
    assert running.wait().code == 130
    assert attsvm(*command, "--seed", "8", "--json").json["run"] == "runs/movie-reviews-2", "another run is another run"
    assert attsvm(*command, "--json").json["run"] == "runs/movie-reviews"
    assert attsvm(*command, "--json").json["run"] == "runs/movie-reviews-3"


def test_overwrite_interrupted_says_how_to_go_on(attsvm: Commands, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, attsvm.home / "run")
    running = attsvm.start(*RUN, "--overwrite", before=slow_start)
    running.until(lambda: "train" in running.err.read_text())
    running.signal(signal.SIGINT)
    running.wait().failed(130, "without --overwrite")
    assert_goes_on(attsvm, uninterrupted)


def test_damaged_checkpoint_is_named(attsvm: Commands) -> None:
    running = attsvm.start(*RUN, before=slow_training)
    training(running, attsvm)
    running.signal(signal.SIGKILL)
    running.wait()
    damaged = next((attsvm.home / "run" / "checkpoint").glob("*.safetensors"))
    damaged.write_bytes(b"half")
    attsvm(*RUN, "-q").failed(1, f"checkpoint/{damaged.name}")
    assert attsvm(*RUN, "--overwrite").code == 0
    assert result_at(attsvm.home / "run")["parameterizations"]["W"]["status"] == "optimal"
