"""The rows: what is measured, against whom, and the target. ``quick`` shrinks every row to a second or so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from attsvm.selection import TokenSelection, certify
from attsvm.selection.norms import Norm
from benchmarks import peers
from benchmarks.attention import sparse
from benchmarks.child import in_child
from benchmarks.dynamics import descent
from benchmarks.harness import (
    DECADES,
    TOL,
    Answer,
    at_most,
    compared,
    describe,
    duel,
    sizes_of,
    solved,
    stopwatch,
    timed,
    warm_up,
)
from benchmarks.microscope import capture, inspection
from benchmarks.models import forward, generation, multihead, training
from benchmarks.problems import minilm_head, unit_sphere
from benchmarks.record import Row

__all__ = ["ROWS", "Benchmark"]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A row of the table."""

    name: str
    title: str
    run: Callable[[bool], Row]


def _small(quick: bool) -> TokenSelection:
    return unit_sphere(12, 8, 10, seed=0) if quick else unit_sphere(100, 32, 48, seed=0)


def _runs(quick: bool) -> tuple[int, int]:
    return (1, 1) if quick else (15, 5)


def fro_liblinear(quick: bool) -> Row:
    problem = _small(quick)
    # Its time depends on the tolerance: in halves, so that no digit is charged that was not asked for.
    tolerances = [1e-3 / 2**k for k in range(20)]
    label = "LIBLINEAR (LinearSVC, C=1e6) on explicit features"
    return duel(problem, peers.liblinear(problem), label, target=80, tolerances=tolerances, runs=_runs(quick))


def fro_piqp(quick: bool) -> Row:
    problem = _small(quick)
    label = "PIQP, dense, on the dual with its Gram matrix"
    return duel(problem, peers.piqp_gram(problem), label, target=300, runs=_runs(quick))


def fro_cvxpy(solver: str, form: peers.Form) -> Callable[[bool], Row]:
    def run(quick: bool) -> Row:
        problem = _small(quick)
        what = "dual with its Gram matrix" if form == "gram" else "primal with d^2 variables"
        # A decade costs an interior point one step of many; the others may stop far earlier.
        tolerances = DECADES[2:] if solver == "CLARABEL" else DECADES
        return duel(
            problem,
            peers.cvxpy_quadratic(problem, solver, form),
            f"CVXPY + {solver}, {what}",
            target=2000,
            limit=5.0 if quick else 120.0,
            runs=_runs(quick),
            tolerances=tolerances,
        )

    return run


def fro_gradient(quick: bool) -> Row:
    problem = unit_sphere(30, 10, 16, seed=0) if quick else unit_sphere(1000, 64, 128, seed=0)
    peer, limit = peers.GradientPeer(problem), 5.0 if quick else 180.0
    label = "accelerated projected gradient on the dual (torch)"
    return duel(problem, peer, label, target=10, limit=limit, runs=_runs(quick), tolerances=[TOL])


def minilm_coordinate(quick: bool) -> Row:
    problem = minilm_head(24 if quick else 600)
    limit = 5.0 if quick else 120.0
    warm_up()
    warm_up(method="coordinate")
    ours, seconds = timed(lambda: solved(problem, tol=TOL), repeats=1 if quick else 3, budget=120.0)
    mine = describe(problem, ours, seconds)
    plain, spent = stopwatch(lambda: solved(problem, tol=TOL, method="coordinate", max_seconds=limit))
    side = describe(problem, plain, [spent])
    side["stopped"] = side["gap"] > TOL
    return compared(problem, mine, side, target=4)


def minilm_tight(quick: bool) -> Row:
    problem, tol = minilm_head(24 if quick else 600), 1e-9
    warm_up()
    ours, seconds = timed(lambda: solved(problem, tol=tol), repeats=1 if quick else 3, budget=120.0)
    mine = describe(problem, ours, seconds, tol=tol)
    return {"sizes": sizes_of(problem), "ours": mine, "checks": [at_most("gap", mine["gap"], tol)]}


def minilm_large(quick: bool) -> Row:
    """Ten times the queries, in a process of its own: every token of a sentence is a query, as in the head itself."""
    arguments = {"n_queries": 60 if quick else 6000, "per_sentence": None}
    row = in_child("minilm_head", arguments, limit=20.0 if quick else 600.0)
    return row | {
        "checks": [
            at_most("gap", row["ours"]["gap"], TOL),
            at_most("seconds", row["ours"]["seconds"], 300.0),
            at_most("GiB at the peak of the process", row["memory"]["peak_bytes"] / 2**30, 4.0),
        ]
    }


def nuc_scs(quick: bool) -> Row:
    problem = unit_sphere(8, 6, 8, seed=0) if quick else unit_sphere(50, 20, 40, seed=0)
    limit = 5.0 if quick else 300.0
    peer, runs = peers.cvxpy_nuclear(problem), _runs(quick)
    return duel(problem, peer, "CVXPY + SCS", target=30, norm="nuc", limit=limit, runs=runs)


def nuc_scs_large(quick: bool) -> Row:
    problem = unit_sphere(10, 6, 8, seed=0) if quick else unit_sphere(200, 32, 64, seed=0)
    return duel(
        problem,
        peers.cvxpy_nuclear(problem),
        "CVXPY + SCS",
        target=30,
        norm="nuc",
        limit=5.0 if quick else 300.0,
        runs=_runs(quick),
        tolerances=DECADES[2:],
    )


def nuc_tolerance(quick: bool) -> Row:
    """Two more digits, against ourselves; the two take turns, so that the pace of the machine cancels."""
    problem = unit_sphere(10, 6, 8, seed=0) if quick else unit_sphere(200, 32, 64, seed=0)
    warm_up("nuc")
    loose, tight = 1e-4, TOL
    times: dict[float, list[float]] = {loose: [], tight: []}
    for _ in range(1 if quick else 3):
        for tol in (loose, tight):
            found, spent = stopwatch(partial(solved, problem, "nuc", tol=tol))
            times[tol].append(spent)
            if tol == loose:
                rough = found
    mine = describe(problem, found, times[tight])
    side = describe(problem, rough, times[loose], tol=loose)
    ratio = mine["seconds"] / side["seconds"]
    return {
        "sizes": sizes_of(problem),
        "ours": mine,
        "peer": side,
        "ratio": 1.0 / ratio,
        "checks": [at_most("time at 1e-6 over time at 1e-4", ratio, 3.0), at_most("gap", mine["gap"], TOL)],
    }


def batch(norm: Norm, solvers: tuple[str, ...], target: float) -> Callable[[bool], Row]:
    """A batch at once, against a loop over some of its problems with the quickest of ``solvers``."""

    def run(quick: bool) -> Row:
        count, sample = (8, 2) if quick else (1000, 20)
        singles = [unit_sphere(6, 8, 10, seed=seed) for seed in range(count)]
        problem, some = _stacked(singles), _stacked(singles[:sample])
        solved(problem, norm, tol=TOL)
        ours, seconds = timed(lambda: solved(problem, norm, tol=TOL), repeats=1 if quick else 5)
        mine = describe(problem, ours, seconds)
        sides = [_loop(some, ours, solver, norm, count, once=once) for solver in solvers for once in (True, False)]
        side = min(sides, key=lambda one: (one["gap"] > TOL, one["seconds"]))
        row = compared(problem, mine, side, target=target)
        return row | {"other_peers": [one for one in sides if one is not side]}

    return run


def _stacked(problems: list[TokenSelection]) -> TokenSelection:
    """A batch of problems of one shape."""
    tokens, queries, selected = (
        np.stack([getattr(problem.tensors, name).numpy() for problem in problems])
        for name in ("tokens", "queries", "selected")
    )
    return TokenSelection(tokens, queries, selected)


def _loop(some: TokenSelection, ours: Any, solver: str, norm: Norm, count: int, *, once: bool) -> Row:
    """A loop of CVXPY over ``some`` problems, the median scaled to ``count``; tightened until all are within TOL."""
    for tol in (1e-5, 1e-6, 1e-7, 1e-8):
        answers, alone = peers.cvxpy_loop(some, solver, nuclear=norm == "nuc", tol=tol, once=once)
        uppers = [_upper(some[b], answer, ours.duals[b], norm) for b, answer in enumerate(answers)]
        gap = max(1.0 - ours.lower_bound[b] / upper for b, upper in enumerate(uppers))
        if gap <= TOL:
            break
    return {
        "solver": f"loop of CVXPY + {solver}, {'compiled once' if once else 'a program each'}, tolerance {tol:.0e}",
        "status": ", ".join(sorted({answer.status for answer in answers})),
        "objective": float(np.mean(uppers)),
        "gap": gap,
        "iterations": max(answer.iterations for answer in answers),
        "seconds": count * median(answer.seconds for answer in answers),
        "seconds_of_the_solver_alone": count * alone,
        "scaled_from": len(answers),
        "stopped": False,
    }


def _upper(problem: TokenSelection, answer: Answer, duals: Any, norm: Norm) -> float:
    return float(certify(problem, answer.W, duals, norm=norm).upper_bound)


def growth(quick: bool) -> Row:
    """Planted problems of growing size, each in a process of its own."""
    counts = [400, 1600] if quick else [10_000, 30_000, 100_000, 300_000, 1_000_000]
    d, T = (16, 8) if quick else (64, 64)
    points = [
        in_child("planted", {"n_constraints": count, "d": d, "T": T}, limit=20.0 if quick else 900.0, repeats=3)
        for count in counts
    ]
    sizes = np.log([point["sizes"]["constraints"] for point in points])
    exponent = float(np.polyfit(sizes, np.log([point["ours"]["seconds"] for point in points]), 1)[0])
    memory = [point["memory"]["extra_bytes"] / point["memory"]["tokens_bytes"] for point in points]
    return {
        "sizes": {"d": d, "T": T, "constraints": counts},
        "ours": points[-1]["ours"],
        "points": points,
        "exponent": exponent,
        "checks": [
            at_most("exponent of the time", exponent, 1.15),
            at_most("memory beyond the problem, over that of the tokens, at most", max(memory), 3.0),
            at_most("gap", max(point["ours"]["gap"] for point in points), TOL),
        ],
    }


def _frobenius_rows() -> list[Benchmark]:
    where = "Frobenius, unit sphere"
    rows = [
        Benchmark(name="fro-liblinear", title=where, run=fro_liblinear),
        Benchmark(name="fro-piqp", title=where, run=fro_piqp),
    ]
    for solver in ("CLARABEL", "OSQP", "SCS"):
        for form in ("gram", "primal"):
            name = f"fro-{solver.lower()}-{form}"
            rows.append(Benchmark(name=name, title=where, run=fro_cvxpy(solver, form)))
    return rows


ROWS: tuple[Benchmark, ...] = (
    *_frobenius_rows(),
    Benchmark(name="fro-gradient", title="Frobenius, unit sphere", run=fro_gradient),
    Benchmark(name="minilm", title="Frobenius, MiniLM L0.H0", run=minilm_coordinate),
    Benchmark(name="minilm-tight", title="Frobenius, MiniLM L0.H0, to 1e-9", run=minilm_tight),
    Benchmark(name="minilm-large", title="Frobenius, MiniLM L0.H0", run=minilm_large),
    Benchmark(name="nuc-scs", title="nuclear, unit sphere", run=nuc_scs),
    Benchmark(name="nuc-scs-large", title="nuclear, unit sphere", run=nuc_scs_large),
    Benchmark(name="nuc-tolerance", title="nuclear, unit sphere", run=nuc_tolerance),
    Benchmark(name="batch-fro", title="Frobenius, a batch", run=batch("fro", ("CLARABEL", "OSQP"), 500)),
    Benchmark(name="batch-nuc", title="nuclear, a batch", run=batch("nuc", ("SCS", "CLARABEL"), 100)),
    Benchmark(name="descent-w", title="gradient descent in W, a batch", run=descent("W")),
    Benchmark(name="descent-kq", title="gradient descent in (K, Q), a batch", run=descent("KQ")),
    Benchmark(name="attention-window", title="sliding window, float32", run=sparse("window")),
    Benchmark(name="attention-bigbird", title="BigBird's blocks, float32", run=sparse("bigbird")),
    Benchmark(name="models-minilm", title="forward pass of MiniLM", run=forward("minilm", 16, 128)),
    Benchmark(
        name="models-minilm-padded", title="forward pass of MiniLM, padded", run=forward("minilm", 16, 128, padded=True)
    ),
    Benchmark(name="models-smollm2", title="forward pass of SmolLM2-135M", run=forward("smollm2", 1, 256)),
    Benchmark(name="models-training", title="training step of MiniLM", run=training),
    Benchmark(name="models-generation", title="generation with SmolLM2-135M", run=generation),
    Benchmark(name="models-multihead", title="multi-head attention", run=multihead),
    Benchmark(name="microscope-capture", title="capture of MiniLM", run=capture),
    Benchmark(name="microscope-inspect", title="inspection of MiniLM", run=inspection),
    Benchmark(name="growth", title="Frobenius, planted", run=growth),
)
