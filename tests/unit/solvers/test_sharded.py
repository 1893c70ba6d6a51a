"""One problem spread over several processes: the same answer for any number of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from attsvm.selection.certificate import certify
from attsvm.selection.problem import TokenSelection
from attsvm.solvers import solve
from attsvm.solvers.frobenius import frobenius_iterates
from attsvm.solvers.loop import Limits, drive
from attsvm.solvers.rows import compile_rows
from attsvm.solvers.solution import Status
from attsvm.solvers.view import RowView

D = 8


def feasible(n: int = 24) -> dict[str, Any]:
    """Sequences whose selected tokens a random matrix prefers, with a second selected token in a few."""
    generator = np.random.default_rng(5)
    W = generator.normal(size=(D, D))
    tokens, queries = generator.normal(size=(n, 6, D)), generator.normal(size=(n, D))
    selected = np.einsum("ntd,de,ne->nt", tokens, W, queries).argmax(-1)
    return {"tokens": tokens, "queries": queries, "selected": selected}


def contradictory(n: int = 24) -> dict[str, Any]:
    """The same, with the last sequence a copy of the first that selects another token."""
    content = feasible(n)
    content["tokens"][-1], content["queries"][-1] = content["tokens"][0], content["queries"][0]
    content["selected"][-1] = (content["selected"][0] + 1) % 6
    return content


def share(content: dict[str, Any], rank: int, size: int) -> TokenSelection:
    """The sequences of one process: uneven shares."""
    part = np.array_split(np.arange(len(content["tokens"])), size)[rank]
    return TokenSelection(content["tokens"][part], content["queries"][part], content["selected"][part])


def work(rank: int, size: int, folder: str, content: dict[str, Any], penalty: float) -> None:
    """What each process does; it leaves its answer in a file."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    group = distributed.group.WORLD
    problem = share(content, rank, size)
    rows = compile_rows(problem, reduce=False, penalty=penalty)
    iterates = frobenius_iterates(rows, group=group)
    outcome = drive(RowView(rows=rows, group=group), iterates, norm="fro", tol=1e-12, limits=Limits(iterations=500))
    duals = rows.scatter(outcome.dual if outcome.ray is None else outcome.ray, ties=False)
    proof = certify(problem, outcome.W, duals, penalty=penalty, group=group)
    np.savez(
        f"{folder}/{rank}.npz",
        W=outcome.W,
        duals=duals,
        status=outcome.status.value,
        iterations=outcome.iterations,
        gap=proof.gap,
    )
    distributed.destroy_process_group()


@pytest.fixture
def spread(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run a problem on so many processes."""

    def run(content: dict[str, Any], size: int, penalty: float = np.inf) -> list[dict[str, Any]]:
        folder = tmp_path / str(size)
        folder.mkdir()
        multiprocessing.start_processes(work, (size, str(folder), content, penalty), size, start_method="spawn")
        return [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)]

    return run


@pytest.mark.parametrize(("sizes", "penalty"), [((1, 2, 3), np.inf), ((2,), 0.3)])
def test_any_number_of_processes_finds_the_same_matrix(
    spread: Callable[..., Any], sizes: tuple[int, ...], penalty: float
) -> None:
    content = feasible()
    alone = solve(share(content, 0, 1), penalty=penalty, tol=1e-12)
    for size in sizes:
        answers = spread(content, size, penalty)
        for answer in answers:
            assert answer["status"] == Status.OPTIMAL.value
            assert float(answer["gap"]) <= 1e-11
            np.testing.assert_array_equal(answer["W"], answers[0]["W"])
            assert np.abs(answer["W"] - alone.W).max() <= 1e-8 * np.abs(alone.W).max()


def test_a_contradiction_across_processes_is_proved(spread: Callable[..., Any]) -> None:
    answers = spread(contradictory(), 2)
    assert {str(answer["status"]) for answer in answers} == {Status.INFEASIBLE.value}
    weights = [answer["duals"].max((1, 2)) for answer in answers]
    assert weights[0][0] > 0.1 * max(map(np.max, weights))
    assert weights[1][-1] > 0.1 * max(map(np.max, weights))
