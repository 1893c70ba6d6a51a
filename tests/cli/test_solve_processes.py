"""``attsvm solve`` in several processes: the same solution, one voice, and what happens when one is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm import TokenSelection
from attsvm.selection import check_ray
from cli.commands import Commands, Outcome, Running
from cli.data import result_at
from cli.problems import N, solution_at, some_problem, write_problem
from cli.test_solve import slowly_with_checkpoints

LOCAL = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
"""No name of this machine is looked up."""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start_all(attsvm: Commands, size: int, *arguments: str, before: Any = None) -> list[Running]:
    """Start the processes of one job with the variables that torchrun would set."""
    job = {**LOCAL, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [
        attsvm.start(*arguments, before=before, threads=1, environment={**job, "RANK": str(rank)})
        for rank in range(size)
    ]


def run_all(attsvm: Commands, size: int, *arguments: str) -> list[Outcome]:
    return [running.wait() for running in start_all(attsvm, size, *arguments)]


def assert_one_voice(outcomes: list[Outcome], code: int, *words: str) -> None:
    """Assert that all ended with ``code`` (but those that were killed) and one of them said why."""
    said = [line for one in outcomes for line in one.err.splitlines() if line.startswith("attsvm: ")]
    assert len(said) == 1, said
    assert [word for word in words if word not in said[0]] == [], said[0]
    assert {one.code for one in outcomes if one.code >= 0} == {code}


@pytest.fixture(scope="module")
def alone(shared: Commands) -> Path:
    write_problem(shared.home / "problem.npz")
    assert shared("solve", "problem.npz", "--tol", "1e-10", "-o", "run", "-q").code == 0
    return shared.home / "run"


def assert_same_solution(one: Path, other: Path) -> None:
    first, second = solution_at(one), solution_at(other)
    assert first.keys() == second.keys()
    np.testing.assert_allclose(second["W"], first["W"], rtol=0, atol=1e-8 * np.linalg.norm(first["W"]))
    assert second["duals"].shape == first["duals"].shape
    results = [result_at(run) for run in (one, other)]
    for key in ("status", "n_sequences", "n_constraints", "d_model", "content_hash"):
        assert results[0][key] == results[1][key], key
    assert results[0]["upper_bound"] == pytest.approx(results[1]["upper_bound"], rel=1e-8)


def test_under_torchrun(attsvm: Commands, alone: Path) -> None:
    write_problem(attsvm.home / "problem.npz")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "-m", "attsvm"]
    done = subprocess.run(
        [sys.executable, *command, "solve", "problem.npz", "--tol", "1e-10", "-o", "run", "--json"],
        cwd=attsvm.home,
        env={**os.environ, **LOCAL},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Outcome(0, done.stdout, done.stderr).json["processes"] == 2
    assert_same_solution(alone, attsvm.home / "run")


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_solution(attsvm: Commands, alone: Path, size: int) -> None:
    write_problem(attsvm.home / "problem.npz")
    outcomes = run_all(attsvm, size, "solve", "problem.npz", "--tol", "1e-10", "-o", "run", "--json")
    assert [one.code for one in outcomes] == [0] * size
    assert outcomes[0].json["processes"] == size
    assert [(one.out, one.err) for one in outcomes[1:]] == [("", "")] * (size - 1)
    assert_same_solution(alone, attsvm.home / "run")


def test_multipliers_come_back_in_the_order_of_the_file(attsvm: Commands, alone: Path) -> None:
    write_problem(attsvm.home / "problem.npz")
    run_all(attsvm, 2, "solve", "problem.npz", "--tol", "1e-10", "-o", "run", "-q")
    duals = [solution_at(run)["duals"] for run in (alone, attsvm.home / "run")]
    np.testing.assert_allclose(duals[1], duals[0], rtol=0, atol=1e-3 * duals[0].max())


def test_a_guilty_sequence_has_its_number_in_the_file(attsvm: Commands) -> None:
    arrays = some_problem()
    arrays["queries"][17] = 0.0
    write_problem(attsvm.home / "problem.npz", **arrays)
    outcomes = run_all(attsvm, 2, "solve", "problem.npz", "-o", "run", "--json")
    assert_one_voice(outcomes, 3, "No matrix separates", ": 17")
    assert outcomes[0].json["ray_sequences"] == [17]
    found = solution_at(attsvm.home / "run")
    problem = TokenSelection(arrays["tokens"], arrays["queries"], arrays["selected"])
    assert check_ray(problem, found["ray"], found["equality_ray"]).valid


def test_a_batch_is_shared_out(attsvm: Commands) -> None:
    arrays = {key: value.reshape(3, N // 3, *value.shape[1:]) for key, value in some_problem(guilty=20).items()}
    write_problem(attsvm.home / "problem.npz", **arrays)
    assert attsvm("solve", "problem.npz", "-o", "alone", "-q").code == 3
    outcomes = run_all(attsvm, 2, "solve", "problem.npz", "-o", "run", "--json")
    assert outcomes[0].json["status"] == ["optimal", "optimal", "infeasible"]
    one, other = solution_at(attsvm.home / "alone"), solution_at(attsvm.home / "run")
    for name in ("W", "ray"):
        np.testing.assert_allclose(other[name], one[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selected": np.append(np.zeros(N - 1, dtype=int), 9)}, ("selected", f"9 at sequence {N - 1}")),
        ({"tokens": None}, ("tokens",)),
        ({key: value[:1] for key, value in some_problem().items()}, ("2 processes", "got 1")),
    ],
    ids=["in the share of one", "in all", "too few sequences"],
)
def test_a_mistake_is_told_once(attsvm: Commands, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    write_problem(attsvm.home / "problem.npz", **changes)
    outcomes = run_all(attsvm, 2, "solve", "problem.npz", "-o", "run", "--json")
    assert_one_voice(outcomes, 2, *words)
    assert [one.out for one in outcomes] == ["", ""]
    assert not (attsvm.home / "run").exists()


LONG = ("solve", "problem.npz", "--method", "coordinate", "--tol", "1e-13", "-o", "run")


def begin(attsvm: Commands, size: int) -> list[Running]:
    """Start a long job, and wait for its first checkpoint."""
    write_problem(attsvm.home / "problem.npz")
    all_of_them = start_all(attsvm, size, *LONG, before=slowly_with_checkpoints)
    all_of_them[0].until(lambda: (attsvm.home / "run" / "checkpoint" / "best.safetensors").exists())
    return all_of_them


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_process_ends_the_job_and_the_checkpoint_resumes_it(attsvm: Commands, alone: Path, lost: int) -> None:
    all_of_them = begin(attsvm, 3)
    all_of_them[lost].signal(signal.SIGKILL)
    outcomes = [running.wait() for running in all_of_them]
    assert outcomes[lost].code == -signal.SIGKILL
    assert_one_voice(outcomes, 1, "a process of the job was lost", "--resume")
    assert not (attsvm.home / "run" / "result.json").exists()
    # With another number of processes.
    outcomes = run_all(attsvm, 2, "solve", "problem.npz", "--tol", "1e-10", "-o", "run", "--resume", "--json")
    assert [one.code for one in outcomes] == [0, 0]
    assert outcomes[0].json["resumed"] is True
    assert_same_solution(alone, attsvm.home / "run")


def test_ctrl_c_stops_all_at_the_same_place(attsvm: Commands) -> None:
    all_of_them = begin(attsvm, 2)
    all_of_them[1].signal(signal.SIGINT)
    outcomes = [running.wait() for running in all_of_them]
    assert_one_voice(outcomes, 130, "interrupted", "--resume")
    assert result_at(attsvm.home / "run")["status"] == "interrupted"
    assert solution_at(attsvm.home / "run")["duals"].shape[0] == N


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, ("RANK", "not set")),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, ("WORLD_SIZE", "'two'")),
    ],
)
def test_variables_that_are_not_those_of_torchrun(
    attsvm: Commands, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    write_problem(attsvm.home / "problem.npz")
    attsvm.start("solve", "problem.npz", environment=environment).wait().failed(2, *words)
