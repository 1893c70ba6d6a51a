"""Two sequences in the plane: what figures 1 and 2 of 2308.16898 show, for any such data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attsvm.dynamics import descend
from attsvm.experiments.recipes.draws import Draws
from attsvm.experiments.recipes.published_step import published_descent
from attsvm.experiments.recipes.recipe import Case, Record
from attsvm.experiments.recipes.tfsvm import solved
from attsvm.selection.geometry import correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CASES", "PATH_STEPS", "STEPS", "draw_boundary", "draw_sequence", "draw_tokens", "run_planar", "unit_draws"]

STEPS = 2000
PATH_STEPS = (*(0, 1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 120, 150, 200, 250, 300, 400, 500, 600, 800),)
PATH_STEPS += (*range(1000, STEPS + 1, 200),)

CASES = tuple(Case(name=which, values={"parameterization": which}) for which in ("W", "KQ"))

RAYS = ("#b3261e", "#1c4fd6")
"""Colours of the two sequences, as published: red and blue."""


def unit_draws(seed: int, tokens_of: Callable[[torch.Generator], Tensor]) -> Draws:
    """Head, tokens, queries in this order from one generator; all labels +1; a batch of one.

    ``tokens_of`` draws the tokens (n, T, d) from the generator, in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.nn.functional.normalize(torch.randn(2, generator=generator), dim=-1)
    tokens = tokens_of(generator)
    queries = torch.nn.functional.normalize(torch.randn(len(tokens), 2, generator=generator), dim=-1)
    tokens, queries, v = tokens.double()[None], queries.double()[None], v.double()[None]
    labels = torch.ones(1, tokens.shape[1], dtype=torch.float64)
    scores = torch.einsum("bntd,bd->bnt", tokens, v)
    return Draws(tokens=tokens, queries=queries, labels=labels, v=v, scores=scores)


def run_planar(draw: Callable[[int], Draws], case: Case, seeds: Sequence[int]) -> list[Record]:
    """One record a seed: the data, both solutions for the optimal tokens, and the path of training."""
    return [_record(draw(seed), seed, case.values["parameterization"]) for seed in seeds]


def _record(draws: Draws, seed: int, which: str) -> Record:
    problem = draws.problem()
    (fro, feasible), (nuc, _) = solved(problem, "fro", tol=1e-10), solved(problem, "nuc", tol=1e-10)
    zero = torch.zeros(1, 2, 2, dtype=torch.float64)
    K = 0.1 * torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    run = descend(
        problem,
        draws.scores,
        parameterization="W" if which == "W" else "KQ",
        init=zero if which == "W" else (K, zero),
        steps=STEPS,
        record_steps=PATH_STEPS,
    )
    old = published_descent(draws, (zero,) if which == "W" else (K, zero), record_steps=PATH_STEPS).path[0]
    return {
        "tokens": draws.tokens[0].tolist(),
        "queries": draws.queries[0].tolist(),
        "scores": draws.scores[0].tolist(),
        "optimal": draws.optimal[0].tolist(),
        "selected": run.selected[0, :, 0].tolist(),
        "feasible": bool(feasible[0]),
        "fro": fro[0].tolist(),
        "nuc": nuc[0].tolist(),
        "fro_singular": torch.linalg.svdvals(fro[0]).tolist(),
        "nuc_singular": torch.linalg.svdvals(nuc[0]).tolist(),
        "between": float(correlation(fro[0], nuc[0])),
        "path": run.W[0].tolist(),
        "norm": run.norm[0].tolist(),
        "to_fro": torch.as_tensor(correlation(run.W[0], fro[0])).tolist(),
        "to_nuc": torch.as_tensor(correlation(run.W[0], nuc[0])).tolist(),
        "published_norm": torch.linalg.vector_norm(old, dim=(-2, -1)).tolist(),
        "published_to_fro": torch.as_tensor(correlation(old, fro[0])).tolist(),
        "published_to_nuc": torch.as_tensor(correlation(old, nuc[0])).tolist(),
    }


def draw_tokens(ax: Axes, record: Record) -> None:
    """The tokens of both sequences in their colours; a star for each optimal one."""
    for i, color in enumerate(RAYS):
        points, best = record["tokens"][i], record["optimal"][i]
        rest = [point for t, point in enumerate(points) if t != best]
        ax.plot(*zip(*rest, strict=True), "o", color=color, label=f"tokens of sequence {i + 1}")
        ax.plot(*points[best], "*", color=color, markersize=11, label=f"its optimal token, {i + 1}")


def draw_sequence(ax: Axes, record: Record, norm: str, i: int, *, dash: str = "-", label: str = "") -> None:
    """The ray of the max-margin solution and the path of training for the query of one sequence."""
    z, color = record["queries"][i], RAYS[i]
    direction = _applied(record[norm], z)
    # Far beyond any axes; the caller sets the limits.
    ax.plot([0.0, 1e4 * direction[0]], [0.0, 1e4 * direction[1]], dash, color=color, linewidth=1.0, alpha=0.6)
    path = [_applied(W, z) for W in record["path"]]
    ax.plot(*zip(*path, strict=True), dash, color=color, marker=".", markersize=5, linewidth=0.8, label=label)


def draw_boundary(ax: Axes, record: Record, norm: str, i: int) -> None:
    """The line half way between the optimal token and the margin: orthogonal to u = W z, 1 / (2 ||u||) behind it."""
    u = _applied(record[norm], record["queries"][i])
    size = math.hypot(*u)
    x, y = record["tokens"][i][record["optimal"][i]]
    foot = (x - 0.5 * u[0] / size**2, y - 0.5 * u[1] / size**2)
    along = (-u[1] / size, u[0] / size)
    ends = [(foot[0] + far * along[0], foot[1] + far * along[1]) for far in (-1e3, 1e3)]
    ax.plot(*zip(*ends, strict=True), ":", color=RAYS[i], linewidth=1.2)


def _applied(W: Sequence[Sequence[float]], z: Sequence[float]) -> tuple[float, float]:
    (a, b), (c, d) = W
    return a * z[0] + b * z[1], c * z[0] + d * z[1]
