"""``solve`` with the sequences spread over two processes: norms, slack, a centre, a number that is not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from attsvm.errors import AttSVMError
from attsvm.selection import TokenSelection
from attsvm.solvers import Status, solve
from contract.problems import unit_sphere

PROCESSES = 2
CENTER = 0.1 * np.cos(np.arange(36.0)).reshape(6, 6)
CASES: dict[str, dict[str, Any]] = {
    "fro": {"norm": "fro", "tol": 1e-10},
    "fro, slack": {"norm": "fro", "penalty": 0.5, "tol": 1e-10},
    "fro, centre": {"norm": "fro", "center": CENTER, "tol": 1e-10},
    "nuc": {"norm": "nuc"},
    "op, slack": {"norm": "op", "penalty": 0.5},
    "l1.5": {"norm": 1.5},
    "linf": {"norm": math.inf, "tol": 1e-4},
}


def problem(part: slice) -> TokenSelection:
    """Some of the sequences."""
    data = unit_sphere(11, 6, 6, 1)
    return TokenSelection(data.tokens[part], data.queries[part], data.best[part])


def enter(rank: int, folder: str) -> Any:
    """Join the others."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    return distributed.group.WORLD


def solve_all(rank: int, folder: str) -> None:
    """Solve every case and leave the answers in a file."""
    group, found = enter(rank, folder), {}
    for name, asked in CASES.items():
        solution = solve(problem(slice(rank, None, PROCESSES)), process_group=group, **asked)
        assert solution.status is Status.OPTIMAL
        found[f"{name} W"] = np.asarray(solution.W)
        found[f"{name} bounds"] = np.array([solution.upper_bound, solution.lower_bound])
    np.savez(f"{folder}/{rank}.npz", **found)
    distributed.destroy_process_group()


def meet_nan(rank: int, folder: str) -> None:
    """The second process computes a NaN in its tenth product; all must be told which one it was."""
    from attsvm.solvers import operator

    group = enter(rank, folder)
    if rank == 1:
        true, calls = operator.RowOperator.forward, []

        def broken(self: Any, W: Tensor) -> Tensor:
            calls.append(1)
            values = true(self, W)
            return values * math.nan if len(calls) == 10 else values

        operator.RowOperator.forward = broken  # type: ignore[method-assign]
    with pytest.raises(AttSVMError, match="the numbers of process 1 are not finite"):
        solve(problem(slice(rank, None, PROCESSES)), tol=1e-10, process_group=group)
    Path(folder, f"{rank}.told").touch()
    # Left to the end of the interpreter, the threads of the group now and then abort the process.
    distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    multiprocessing.spawn(solve_all, (str(tmp_path),), nprocs=PROCESSES)
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(PROCESSES))
    for name, asked in CASES.items():
        alone = solve(problem(slice(None)), **asked)
        tol = asked.get("tol", 1e-6)
        np.testing.assert_array_equal(first[f"{name} W"], second[f"{name} W"])
        upper, lower = first[f"{name} bounds"]
        assert lower <= alone.upper_bound * (1 + 1e-9)
        np.testing.assert_allclose(upper, alone.upper_bound, rtol=2 * tol)
        if asked["norm"] == "fro":
            np.testing.assert_allclose(first[f"{name} W"], alone.W, atol=3 * math.sqrt(2 * tol) * alone.upper_bound)


def test_a_number_that_is_not_finite_ends_the_job_and_names_its_process(tmp_path: Path) -> None:
    multiprocessing.spawn(meet_nan, (str(tmp_path),), nprocs=PROCESSES)
    assert [Path(tmp_path, f"{rank}.told").exists() for rank in range(PROCESSES)] == [True, True]
