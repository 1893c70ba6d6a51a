"""What every row needs: clocks, our side of a row, a peer tightened until it is as accurate, the record.

A row is a dictionary: name, sizes, ``ours`` and ``peer`` (objective, gap, seconds, iterations, ...), their ratio, and
``checks``, each a quantity with its value, its target and whether that is met.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attsvm.selection import TokenSelection, certify
from attsvm.selection.norms import Norm
from attsvm.solvers import Solution, Status, solve
from benchmarks.problems import unit_sphere
from benchmarks.record import Row

__all__ = [
    "DECADES",
    "TOL",
    "Answer",
    "Peer",
    "at_least",
    "at_most",
    "compared",
    "describe",
    "duel",
    "sizes_of",
    "solved",
    "stopwatch",
    "tightened",
    "timed",
    "warm_up",
]

TOL = 1e-6
"""The relative gap that both sides are held to."""

DECADES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
"""Tolerances that a peer is run with, until its matrix is accurate."""

Check = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a peer returns.

    Attributes
    ----------
    W
        (d, d) matrix; None when it has none.
    seconds
        Time of its solver, without the preparation of its input.
    iterations, status
        In its own words.
    stopped
        Whether the limit of time ended it: the seconds are then a lower limit.
    duals
        (n, Q, T) multipliers, where it hands them out.
    """

    W: NDArray[np.float64] | None
    seconds: float
    iterations: int
    status: str
    stopped: bool = False
    duals: NDArray[np.float64] | None = None


Peer = Callable[[float, float], Answer]
"""Called with a tolerance and a limit in seconds."""


def stopwatch(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and its wall time."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def timed(work: Callable[[], Any], *, repeats: int = 15, budget: float = 20.0) -> tuple[Any, list[float]]:
    """The last result, and the wall times of up to ``repeats`` runs: at least 3 unless one takes the whole budget."""
    seconds: list[float] = []
    while len(seconds) < repeats and (sum(seconds) < budget or (len(seconds) < 3 and seconds[0] < budget)):
        result, spent = stopwatch(work)
        seconds.append(spent)
    return result, seconds


def warm_up(norm: Norm = "fro", *, method: str = "auto") -> None:
    """Let everything be compiled and loaded, on a problem that passes through all phases of the solver."""
    solve(unit_sphere(40, 12, 16, seed=1), norm, tol=1e-8, method=method, max_seconds=60.0, on_failure="ignore")


def solved(problem: TokenSelection, norm: Norm = "fro", **options: Any) -> Solution:
    """Our solution, whatever its status; the row says what it was."""
    return solve(problem, norm, on_failure="ignore", **options)


def sizes_of(problem: TokenSelection) -> dict[str, int]:
    """The sizes that a row stores."""
    n, Q, T, d = problem.shape
    sizes = {"n": n, "Q": Q, "T": T, "d": d, "constraints": problem.n_constraints}
    if problem.batch_size is not None:
        sizes = {"problems": problem.batch_size, **sizes}
    return sizes


def describe(problem: TokenSelection, solution: Solution, seconds: Iterable[float], *, tol: float = TOL) -> Row:
    """Our side of a row; the bounds are those of the certificate. Of a batch: mean objective, largest gap."""
    proof = certify(problem, solution.W, solution.duals, norm=solution.norm)
    spent = list(seconds)
    statuses = solution.status if isinstance(solution.status, tuple) else (solution.status,)
    failed = sorted({status.value for status in statuses if status is not Status.OPTIMAL})
    return {
        "solver": f"attsvm {solution.method}, tol={tol:g}",
        "status": ", ".join(failed) or Status.OPTIMAL.value,
        "objective": float(np.mean(proof.upper_bound)),
        "lower_bound": float(np.mean(proof.lower_bound)),
        "gap": float(np.max(proof.gap)),
        "iterations": int(np.max(solution.iterations)),
        "seconds": median(spent),
        "spread": [min(spent), max(spent)],
        "stopped": Status.TIME_LIMIT in statuses,
    }


def at_least(quantity: str, value: float, target: float) -> Check:
    """A target that a quantity must reach."""
    return {"quantity": quantity, "value": value, "at_least": target, "met": bool(value >= target)}


def at_most(quantity: str, value: float, target: float) -> Check:
    """A target that a quantity must not exceed."""
    return {"quantity": quantity, "value": value, "at_most": target, "met": bool(value <= target)}


def tightened(
    problem: TokenSelection, ours: Solution, peer: Peer, *, limit: float, tolerances: Iterable[float] = DECADES
) -> tuple[Answer, Row, float]:
    """Run a peer with ever smaller tolerances until its matrix is within TOL of our lower bound, or its time is up.

    Our bound is as good as any, so that a peer need not prove its own accuracy; where it hands out multipliers, what
    they prove is recorded too. Returns the last answer, its side of the row, and the tolerance it ran with.
    """
    for tol in tolerances:
        answer = peer(tol, limit)
        side = _judged(problem, ours, answer)
        if answer.stopped or side["gap"] <= TOL:
            break
    return answer, side, tol


def _judged(problem: TokenSelection, ours: Solution, answer: Answer) -> Row:
    """A peer's side of a row."""
    side: Row = {
        "status": answer.status,
        "objective": math.inf,
        "gap": math.inf,
        "iterations": answer.iterations,
        "seconds": answer.seconds,
        "stopped": answer.stopped,
    }
    if answer.W is None:
        return side
    upper = float(certify(problem, answer.W, ours.duals, norm=ours.norm).upper_bound)
    side |= {"objective": upper, "gap": 1.0 - ours.lower_bound / upper}
    if answer.duals is not None:
        side["own_gap"] = float(certify(problem, answer.W, answer.duals, norm=ours.norm).gap)
    return side


def duel(
    problem: TokenSelection,
    peer: Peer,
    label: str,
    *,
    target: float,
    norm: Norm = "fro",
    limit: float = 120.0,
    runs: tuple[int, int] = (15, 5),
    tolerances: Iterable[float] = DECADES,
) -> Row:
    """Ours against a peer: ours is timed before and after it, in case the machine changes pace.

    Parameters
    ----------
    problem
        One problem.
    peer
        Called with tolerances from loose to tight.
    label
        The peer's name for the record.
    target
        How many times as long the peer should take.
    norm
        The norm.
    limit
        Seconds for a run of the peer; one that needs more is stopped, and the ratio is a lower limit.
    runs
        Of ours, before and after each, and of the peer, at most: the median counts, and slow ones run less often.
    tolerances
        What the peer is run with, from loose to tight.
    """
    warm_up(norm)
    ours, before = timed(lambda: solved(problem, norm, tol=TOL), repeats=runs[0])
    answer, side, tol = tightened(problem, ours, peer, limit=limit, tolerances=tolerances)
    spent = [answer.seconds]
    while len(spent) < runs[1] and sum(spent) < 20.0 and not answer.stopped:
        spent.append(peer(tol, limit).seconds)
    _, after = timed(lambda: solved(problem, norm, tol=TOL), repeats=runs[0])
    mine = describe(problem, ours, before + after)
    side = {"solver": f"{label}, tolerance {tol:.0e}", **side, "seconds": median(spent)}
    return compared(problem, mine, side, target=target)


def compared(problem: TokenSelection, mine: Row, side: Row, *, target: float) -> Row:
    """The row of our side and a peer's."""
    ratio = side["seconds"] / mine["seconds"]
    quantity = "times as long as ours" + (" (lower limit: the peer was stopped)" if side["stopped"] else "")
    return {
        "sizes": sizes_of(problem),
        "ours": mine,
        "peer": side,
        "ratio": ratio,
        "checks": [at_least(quantity, ratio, target), at_most("gap", mine["gap"], TOL)],
    }
