"""Sweeps that cannot be lost: killed, interrupted or shared out, they end in the bytes of an uninterrupted run."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.commands import Commands, Outcome, Running
from cli.test_reproduce import RECORDS, final
from cli.test_solve_processes import LOCAL, assert_one_voice, free_port, start_all
from cli.toy_recipe import install, install_slow, install_very_slow

BOTH = ("toy", "toy-scan")


@pytest.fixture(scope="module")
def finished(shared: Commands) -> Path:
    """The output folder of an uninterrupted run with one worker."""
    done = shared("reproduce", *BOTH, "-o", "out", "--workers", "1", before=install)
    assert done.code == 0, done.err
    return shared.home / "out"


def assert_goes_on(attsvm: Commands, finished: Path, *names: str) -> None:
    """Assert that the same command ends as if nothing had been."""
    done = attsvm("reproduce", *names, "-o", "out", before=install)
    assert done.code == 0, done.err
    for name in names:
        folder = attsvm.home / "out" / name
        assert final(folder) == final(finished / name)
        assert {path.name for path in folder.iterdir()} == RECORDS


def chunks(attsvm: Commands, name: str = "toy") -> int:
    """How many chunks are on disk."""
    files = (attsvm.home / "out" / name / "checkpoint").glob("trials-*.jsonl")
    return sum(max(file.read_bytes().count(b"\n") - 1, 0) for file in files)


def install_quick() -> None:
    install(0.01)


def test_kill_at_random_moments(attsvm: Commands, finished: Path) -> None:
    """The whole run takes about half a second; each time it lives a little longer."""
    moments = random.Random(3)
    killed = 0
    for longest in (0.1, 0.1, 0.2, 0.2, 0.4, 0.6, 0.9, 1.2):
        running = attsvm.start("reproduce", *BOTH, "-o", "out", "--workers", "2", "-q", before=install_quick)
        time.sleep(moments.uniform(0, longest))
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end
            running.signal(signal.SIGKILL)
        killed += running.wait().code == -signal.SIGKILL
    assert killed >= 4
    assert_goes_on(attsvm, finished, *BOTH)


def die_at(number: int) -> None:
    """Kill the process before the disk has what it was just told to keep, at the given time."""
    install()
    fsync, calls = os.fsync, []

    def dying(handle: int) -> None:
        calls.append(handle)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = dying


# The order of the writes: config.json, the first line of the chunks, its folder, eight chunks, trials.jsonl,
# both figures, config.json, result.json, report.html, index.html.
@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 11, 12, 13, 14, 15, 16, 17, 18])
def test_kill_at_every_kind_of_write(attsvm: Commands, finished: Path, number: int) -> None:
    die = functools.partial(die_at, number)
    assert attsvm("reproduce", "toy", "-o", "out", "-q", before=die).code == -signal.SIGKILL
    assert (attsvm.home / "out" / "toy" / "result.json").exists() == (number > 16)
    assert_goes_on(attsvm, finished, "toy")
    assert {path.name for path in (attsvm.home / "out").iterdir()} == {"toy", "index.html"}


def test_what_a_killed_run_finished_is_not_computed_again(attsvm: Commands, finished: Path) -> None:
    running = attsvm.start("reproduce", "toy", "-o", "out", "--workers", "1", before=install_slow)
    running.until(lambda: chunks(attsvm) >= 2)
    running.signal(signal.SIGKILL)
    running.wait()
    assert chunks(attsvm) in (2, 3)
    began = time.monotonic()
    done = attsvm("reproduce", "toy", "-o", "out", "--workers", "1", before=install_slow)
    assert "1/1 toy: 0 of 20" not in done.err, "it began anew"
    assert time.monotonic() - began < 60
    assert final(attsvm.home / "out" / "toy") == final(finished / "toy")


def test_ctrl_c(attsvm: Commands, finished: Path) -> None:
    running = attsvm.start("reproduce", "toy", "-o", "out", "--json", before=install_slow)
    running.until(lambda: chunks(attsvm) >= 2)
    running.signal(signal.SIGINT)
    running.wait().failed(130, "reproduce: interrupted; the same command goes on where it ended.")
    assert chunks(attsvm) >= 2
    assert_goes_on(attsvm, finished, "toy")


def test_ctrl_c_does_not_wait_for_a_long_chunk(attsvm: Commands, finished: Path) -> None:
    running = attsvm.start("reproduce", "toy", "-o", "out", "--overwrite", before=install_very_slow)
    running.until(lambda: "toy: 0 of 20" in running.err.read_text())
    began = time.monotonic()
    running.signal(signal.SIGINT)
    running.wait().failed(130, "interrupted", "goes on where it ended when given without --overwrite")
    assert time.monotonic() - began < 10, "a chunk takes 30 seconds"
    assert_goes_on(attsvm, finished, "toy")


# Several processes.


def start_two(attsvm: Commands, *names: str, before: Any = install) -> list[Running]:
    return start_all(attsvm, 2, "reproduce", *names, "-o", "out", "--workers", "1", before=before)


def test_two_processes_share_the_trials(attsvm: Commands, finished: Path) -> None:
    all_of_them = start_two(attsvm, *BOTH, before=install_slow)
    files = attsvm.home / "out" / "toy" / "checkpoint"
    all_of_them[0].until(lambda: all((files / f"trials-{rank}.jsonl").exists() for rank in (0, 1)))
    all_of_them[0].until(lambda: all((files / f"trials-{rank}.jsonl").read_bytes().count(b"\n") > 1 for rank in (0, 1)))
    outcomes = [running.wait() for running in all_of_them]
    assert [one.code for one in outcomes] == [0, 0], outcomes
    assert (outcomes[1].out, outcomes[1].err) == ("", "")
    assert "Gallery: out/index.html" in outcomes[0].err
    for name in BOTH:
        assert final(attsvm.home / "out" / name) == final(finished / name)
        assert {path.name for path in (attsvm.home / "out" / name).iterdir()} == RECORDS


def test_finished_before_in_two_processes(attsvm: Commands, finished: Path) -> None:
    assert attsvm("reproduce", "toy", "-o", "out", before=install).code == 0
    outcomes = [running.wait() for running in start_two(attsvm, *BOTH)]
    assert [one.code for one in outcomes] == [0, 0], outcomes
    assert "as finished before" in outcomes[0].err
    assert_goes_on(attsvm, finished, *BOTH)


def install_slow_to_close() -> None:
    from attsvm.experiments.trial_records import ChunkFile

    install()
    close = ChunkFile.close

    def slowly(self: ChunkFile) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(1)
        close(self)

    ChunkFile.close = slowly  # type: ignore[method-assign]


def test_the_first_process_waits_until_all_files_are_closed(attsvm: Commands, finished: Path) -> None:
    """An early version read the files of the others while they had them open."""
    outcomes = [running.wait() for running in start_two(attsvm, "toy", before=install_slow_to_close)]
    assert [one.code for one in outcomes] == [0, 0], outcomes
    assert final(attsvm.home / "out" / "toy") == final(finished / "toy")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_job(attsvm: Commands, finished: Path, lost: int) -> None:
    all_of_them = start_two(attsvm, "toy", before=install_slow)
    all_of_them[0].until(lambda: chunks(attsvm) >= 2)
    all_of_them[lost].signal(signal.SIGKILL)
    outcomes = [running.wait() for running in all_of_them]
    assert outcomes[lost].code == -signal.SIGKILL
    assert_one_voice(outcomes, 1, "reproduce: a process of the job was lost", "the same command goes on")
    assert chunks(attsvm) >= 2
    assert_goes_on(attsvm, finished, "toy")  # with one process


def test_a_run_begun_alone_is_finished_by_two(attsvm: Commands, finished: Path) -> None:
    running = attsvm.start("reproduce", "toy", "-o", "out", before=install_slow)
    running.until(lambda: chunks(attsvm) >= 2)
    running.signal(signal.SIGKILL)
    running.wait()
    assert [running.wait().code for running in start_two(attsvm, "toy")] == [0, 0]
    assert final(attsvm.home / "out" / "toy") == final(finished / "toy")


@pytest.mark.parametrize("hit", [0, 1])
def test_ctrl_c_stops_all(attsvm: Commands, finished: Path, hit: int) -> None:
    all_of_them = start_two(attsvm, "toy", before=install_slow)
    all_of_them[0].until(lambda: chunks(attsvm) >= 2)
    all_of_them[hit].signal(signal.SIGINT)
    outcomes = [running.wait() for running in all_of_them]
    assert_one_voice(outcomes, 130, "reproduce: interrupted", "the same command goes on")
    assert_goes_on(attsvm, finished, "toy")


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [
        (("toy-fails",), 1, ("toy-fails, case a=1", "the loss diverged")),
        (("toy-scam",), 2, ("did you mean toy-scan?",)),
        (("toy", "--trials", "0"), 2, ("--trials",)),
    ],
)
def test_a_mistake_is_told_once(attsvm: Commands, names: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    outcomes = [running.wait() for running in start_two(attsvm, *names, "--json")]
    assert_one_voice(outcomes, code, *words)
    assert [one.out for one in outcomes] == ["", ""]


def test_a_failure_in_two_processes_lets_the_others_go_on(attsvm: Commands, finished: Path) -> None:
    outcomes = [running.wait() for running in start_two(attsvm, "toy-fails", "toy")]
    assert_one_voice(outcomes, 1, "toy-fails, case a=1")
    assert final(attsvm.home / "out" / "toy") == final(finished / "toy")


REAL = ("reproduce", "maxmargin-single", "--trials", "3", "--output-dir", "runs/shared")
"""A published figure, in one chunk for each of its two cases."""


def torchrun(attsvm: Commands, size: int, *arguments: str) -> Outcome:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "-m", "attsvm", *arguments]
    environment = {**os.environ, **LOCAL}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=attsvm.home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_under_torchrun_a_published_figure_has_the_same_bytes(attsvm: Commands) -> None:
    done = torchrun(attsvm, 2, *REAL, "--json")
    assert done.code == 0, done.err
    assert done.json["recipes"][0]["name"] == "maxmargin-single"
    shared = attsvm.home / "runs" / "shared" / "maxmargin-single"
    assert attsvm(*REAL[:-1], "runs/alone", "--workers", "1", "-q").code == 0
    assert final(shared) == final(attsvm.home / "runs" / "alone" / "maxmargin-single")
