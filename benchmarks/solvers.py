"""The solvers against generic ones, in one process, on one thread, with warm-up and data preparation off the clock.

* Frobenius norm: scikit-learn's LinearSVC (liblinear's dual coordinate descent) on the explicit d^2 features.
* Nuclear norm: CVXPY with SCS; the time is that of the solver itself, without CVXPY's compilation.

Peers are held to the same judge: the upper bound of their matrix is certified in float64 as ours is. LinearSVC does not
hand out its multipliers, so its gap is to our lower bound; that of SCS is to the bound its own multipliers prove.

    python benchmarks/solvers.py [--json out.json]
"""

# ruff: noqa: E402

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"  # before the libraries start their threads

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cvxpy
import numpy as np
import torch
from sklearn.svm import LinearSVC

from attsvm.selection import TokenSelection, certify
from attsvm.solvers import Solution, solve
from problems import expanded_rows, unit_sphere

RESULTS = Path(__file__).resolve().parent / "results" / "solvers.json"
PACKAGES = ("torch", "numpy", "numba", "scikit-learn", "cvxpy", "scs")
TOL = 1e-6


def main() -> None:
    """Run, print a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the rows go (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [frobenius(mirrored=True), frobenius(mirrored=False), nuclear()]
    record = {
        "benchmark": "solvers",
        "threads": 1,
        "dtype": "float64",
        "device": "cpu",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "rows": rows,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{'solver':<52}{'status':<12}{'objective':>14}{'gap':>10}{'seconds':>10}{'ratio':>8}{'target':>8}")
    for row in rows:
        sizes = " ".join(f"{name}={value}" for name, value in row["sizes"].items())
        print(f"-- {row['name']}: {sizes}")
        for side in ("ours", "peer"):
            r = row[side]
            tail = f"{row['ratio']:>7.1f}x{row['target']:>7}x" if side == "peer" else ""
            print(
                f"{r['solver']:<52}{r['status']:<12}{r['objective']:>14.8f}{r['gap']:>10.1e}{r['seconds']:>10.4f}{tail}"
            )
    print(f"written: {arguments.json}")


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The last result, and the median of the wall times."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return result, median(seconds)


def describe(problem: TokenSelection, solution: Solution, seconds: float) -> dict[str, Any]:
    """Our side of a row; the bounds are those of the certificate."""
    proof = certify(problem, solution.W, solution.duals, norm=solution.norm)
    return {
        "solver": f"attsvm {solution.method}, tol={TOL:g}",
        "status": solution.status.value,
        "objective": proof.upper_bound,
        "lower_bound": proof.lower_bound,
        "gap": proof.gap,
        "iterations": solution.iterations,
        "seconds": seconds,
    }


def sizes_of(problem: TokenSelection) -> dict[str, int]:
    """The sizes that a row stores."""
    n, _, T, d = problem.shape
    return {"n": n, "T": T, "d": d, "constraints": problem.n_constraints}


def frobenius(*, mirrored: bool) -> dict[str, Any]:
    """Against LinearSVC, at the loosest tolerance of it that reaches our accuracy.

    A separator without intercept needs two classes: ``mirrored`` gives it every row as +1 and its negative as -1.
    Otherwise every second row is negated, the same problem in half the rows, which no user would think of.
    """
    problem = unit_sphere(100, 32, 48, seed=0)
    A = expanded_rows(problem)
    signs = np.where(np.arange(len(A)) % 2 == 0, 1.0, -1.0)
    if mirrored:
        A, signs = np.vstack([A, -A]), np.repeat([1.0, -1.0], len(A))
    else:
        A = A * signs[:, None]
    d = problem.shape[-1]

    def peer(tol: float) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whether it converged is seen from the certificate
            machine = LinearSVC(
                loss="hinge", dual=True, fit_intercept=False, C=1e6, tol=tol, max_iter=100_000, random_state=0
            )
            return machine.fit(A, signs)

    solve(problem, tol=TOL)
    ours, seconds = timed(lambda: solve(problem, tol=TOL), 15)
    mine = describe(problem, ours, seconds)
    tol, accuracy = 1e-3, np.inf
    while accuracy > TOL and tol > 1e-9:
        tol /= 2.0
        proof = certify(problem, peer(tol).coef_.reshape(d, d), ours.duals)
        accuracy = 1.0 - mine["lower_bound"] / proof.upper_bound
    machine, peer_seconds = timed(lambda: peer(tol), 5)
    _, again = timed(lambda: solve(problem, tol=TOL), 15)  # before and after the peer, in case the machine changed pace
    mine["seconds"] = median([seconds, again])
    return {
        "name": "Frobenius, " + ("mirrored rows" if mirrored else "every second row negated"),
        "sizes": sizes_of(problem),
        "target": 50,
        "ours": mine,
        "peer": {
            "solver": f"LinearSVC, tol={tol:.1e}, C=1e6",
            "status": "converged" if int(np.max(machine.n_iter_)) < 100_000 else "limit",
            "objective": proof.upper_bound,
            "gap": accuracy,
            "iterations": int(np.max(machine.n_iter_)),
            "seconds": peer_seconds,
        },
        "ratio": peer_seconds / mine["seconds"],
    }


def nuclear() -> dict[str, Any]:
    """Against CVXPY with SCS at its default tolerances."""
    problem = unit_sphere(50, 20, 40, seed=0)
    d = problem.shape[-1]
    solve(problem, "nuc", tol=TOL)
    ours, seconds = timed(lambda: solve(problem, "nuc", tol=TOL), 3)
    W = cvxpy.Variable((d, d))
    asks = expanded_rows(problem) @ cvxpy.vec(W, order="C") >= 1.0
    program = cvxpy.Problem(cvxpy.Minimize(cvxpy.normNuc(W)), [asks])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program.solve(solver="SCS", max_iters=100_000)
    duals = np.zeros(problem.selected.shape)
    duals[problem.tensors.asked.numpy()] = asks.dual_value
    proof = certify(problem, W.value, duals, norm="nuc")
    stats = program.solver_stats
    mine = describe(problem, ours, seconds)
    return {
        "name": "nuclear",
        "sizes": sizes_of(problem),
        "target": 10,
        "ours": mine,
        "peer": {
            "solver": "CVXPY + SCS, default tolerances",
            "status": program.status,
            "objective": proof.upper_bound,
            "lower_bound": proof.lower_bound,
            "gap": proof.gap,
            "iterations": int(stats.num_iters),
            "seconds": float(stats.solve_time),
        },
        "ratio": float(stats.solve_time) / mine["seconds"],
    }


if __name__ == "__main__":
    main()
