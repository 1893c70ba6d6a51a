"""From the solution of a file's problem to the numbers and the sentence of ``result.json``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attsvm.data import FileProblem
from attsvm.experiments.processes import Processes
from attsvm.selection import TokenSelection
from attsvm.solvers import Ray, Solution, Status

__all__ = ["RANK_TOLERANCE", "summary_of"]

RANK_TOLERANCE = 1e-6
"""Singular values above this times the largest count for the rank."""

_NAMED = 10
"""Sequences of a proof that the sentence names; ``ray_sequences`` has all."""


def summary_of(data: FileProblem, solution: Solution, processes: Processes) -> dict[str, Any]:
    """Everything in ``result.json`` about the problem and its answer; the same in every process.

    In a batch, what is said of an answer is a list, one entry a problem.
    """
    problem = data.problem
    n, Q, T, d = problem.shape
    sizes = processes.everywhere((problem.n_constraints, len(problem.merged), _n_ties(problem)))
    n_constraints, n_merged, n_ties = np.sum(sizes, axis=0).tolist()
    shares = processes.everywhere(_facts(solution))
    if problem.is_batch:
        order = [_joined([shares[b % processes.size][b // processes.size]]) for b in range(data.total)]
        answer: dict[str, Any] = {key: [one[key] for one in order] for key in order[0]}
        verdict = _batch_verdict(answer)
    else:
        answer = _joined([share[0] for share in shares])
        verdict = _verdict(answer, solution, asked=n_constraints + n_ties, centred=data.center is not None)
    return {
        "n_problems": data.total if problem.is_batch else None,
        "n_sequences": n if problem.is_batch else data.total,
        "n_queries": Q,
        "n_tokens": T,
        "d_model": d,
        "n_constraints": n_constraints,
        "n_merged": n_merged,
        "verdict": verdict,
        **answer,
        "method": solution.method,
        "processes": processes.size,
    }


def _n_ties(problem: TokenSelection) -> int:
    """Pairs of tokens that must have equal logits."""
    return int((problem.tensors.selected.sum(-1) - 1).clamp(min=0).sum())


def _facts(solution: Solution) -> list[dict[str, Any]]:
    """The numbers of each answer, in a list of one where it is not a batch."""
    batch = isinstance(solution.status, tuple)

    def each(value: Any) -> Any:
        return value if batch else (value,)

    Ws, supports = each(solution.W), each(solution.support)
    columns = zip(
        each(solution.status),
        each(solution.upper_bound),
        each(solution.lower_bound),
        each(solution.gap),
        each(solution.margin),
        each(solution.iterations),
        each(solution.ray),
        Ws,
        supports,
        strict=True,
    )
    return [
        {
            "status": status.value,
            "status_sentence": status.sentence,
            "upper_bound": upper,
            "lower_bound": lower,
            "gap": gap,
            "margin": margin,
            "n_support": int(support.sum()),
            "rank": _rank(W),
            "iterations": int(iterations),
            "ray_sequences": None if ray is None else _weighed(ray),
        }
        for status, upper, lower, gap, margin, iterations, ray, W, support in columns
    ]


def _weighed(ray: Ray) -> list[tuple[float, int]]:
    """The sequences of a proof with minus their largest weight, the heaviest first."""
    weights = np.maximum(np.abs(ray.weights), np.abs(ray.equality_weights)).max(axis=(-2, -1))
    return sorted((-float(weights[i]), int(i)) for i in ray.sequences)


def _rank(W: Any) -> int:
    values = np.linalg.svd(np.asarray(W), compute_uv=False)
    return int((values > RANK_TOLERANCE * values.max()).sum())


def _joined(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer from those of all processes, which differ in what concerns their own sequences only."""
    size = len(shares)
    named = [(w, i * size + rank) for rank, share in enumerate(shares) for w, i in share["ray_sequences"] or ()]
    return {
        **shares[0],
        "n_support": sum(share["n_support"] for share in shares),
        "ray_sequences": [i for _, i in sorted(named)] if named else None,
    }


def _verdict(answer: dict[str, Any], solution: Solution, *, asked: int, centred: bool) -> str:
    """The answer in one or two sentences."""
    status = Status(answer["status"])
    if status is Status.INFEASIBLE:
        named = answer["ray_sequences"]
        shown = ", ".join(map(str, named[:_NAMED])) + (f", ... ({len(named)} in all)" if len(named) > _NAMED else "")
        order = ", heaviest first" if len(named) > 1 else ""
        return f"{status.sentence} Sequences in the proof{order}: {shown}."
    start = "W = center" if centred else "W = 0"
    if asked == 0:
        return f"The problem has no constraints, so {start} is the answer."
    if answer["upper_bound"] == 0.0:
        return f"{start} satisfies every constraint, so it is the answer."
    measure = _measure(solution, centred=centred)
    bounds = f"The smallest {measure} is between {answer['lower_bound']:.9g} and {answer['upper_bound']:.9g}"
    if math.isinf(answer["upper_bound"]):
        bounds = f"The smallest {measure} is at least {answer['lower_bound']:.6g}; no matrix that fits is known yet"
    return f"{status.sentence} {bounds} (gap {answer['gap']:.1e})."


def _measure(solution: Solution, *, centred: bool) -> str:
    """What is minimised, in words."""
    names = {"fro": "Frobenius norm", "nuc": "nuclear norm", "op": "operator norm"}
    norm = names.get(str(solution.norm), f"entrywise {solution.norm}-norm") + (" of the change" if centred else "")
    return norm if math.isinf(solution.penalty) else f"objective, half the squared {norm} and the price of slack,"


def _batch_verdict(answer: dict[str, Any]) -> str:
    counts = [f"{answer['status'].count(value)} {value}" for value in dict.fromkeys(answer["status"])]
    worst = max(answer["gap"])
    return f"Of {len(answer['status'])} problems: {', '.join(counts)}; the largest gap is {worst:.1e}."
