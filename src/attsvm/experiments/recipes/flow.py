"""Gradient flow on (K, Q) goes to the nuclear max-margin solution; on diagonal (K, Q) to that of the l_1 norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attsvm.dynamics import GradientFlow, descend
from attsvm.experiments.recipes.draws import draw_unit_sphere
from attsvm.experiments.recipes.plotting import band, panels, style
from attsvm.experiments.recipes.recipe import Case, Number, Paper, Recipe, Record, Summary, Table
from attsvm.selection import TokenSelection
from attsvm.solvers import Solution, solve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE", "Data", "draw_aligned", "draw_unaligned"]

STEPS = 40
"""Records, at equal distances along the curve."""

SCALE = 0.3
"""Size of K, or k, at the start; Q and q start at 0. The smaller it is the longer entries of W stay near 0 in turn."""

COMPARED = {"W": ("fro", "nuc"), "KQ": ("nuc", "fro"), "diagonal": ("l1", "l2")}
"""The norm whose solution the theory names for each parameterisation, and the one it is compared with."""

NAMES = {"fro": "Frobenius", "nuc": "nuclear", "l1": "l_1", "l2": "l_2"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Problems of a batch: tokens (B, n, T, d), queries (B, n, d), scores (B, n, T)."""

    tokens: Tensor
    queries: Tensor
    scores: Tensor

    @property
    def best(self) -> Tensor:
        """(B, n)."""
        return self.scores.argmax(-1)

    def problem(self, selected: Tensor) -> TokenSelection:
        """The problems that select those tokens."""
        return TokenSelection(self.tokens, self.queries, selected)

    def diagonal_problem(self, selected: Tensor) -> TokenSelection:
        """The same for W = diag(w): tokens x * z, one query e_1, and w in the first column of the solution."""
        first = torch.zeros_like(self.queries)
        first[..., 0] = 1.0
        return TokenSelection(self.tokens * self.queries.unsqueeze(-2), first, selected)


def draw_unaligned(seeds: Sequence[int], *, n: int, T: int, d: int) -> Data:
    """Tokens and queries on the unit sphere; the best token of a sequence has the score 1, the others 0."""
    draws = draw_unit_sphere(seeds, n=n, T=T, d=d)
    scores = torch.nn.functional.one_hot(draws.optimal, T).double()
    return Data(tokens=draws.tokens, queries=draws.queries, scores=scores)


def draw_aligned(seeds: Sequence[int], *, n: int, T: int, d: int) -> Data:
    """Data for which a diagonal W stays diagonal: n sequences, each with all its copies under d patterns of signs.

    The patterns s are the rows of a Hadamard matrix (d a power of 2): tokens x * s and query z * s keep their logits
    under every diagonal W, and the sum of the gradients (x * s)(z * s)^T over s is diagonal.
    """
    base = draw_unaligned(seeds, n=n, T=T, d=d)
    signs = _hadamard(d)
    tokens = torch.einsum("bntd,sd->bnstd", base.tokens, signs).flatten(1, 2)
    queries = torch.einsum("bnd,sd->bnsd", base.queries, signs).flatten(1, 2)
    return Data(tokens=tokens, queries=queries, scores=base.scores.repeat_interleave(d, 1))


def _hadamard(d: int) -> Tensor:
    """Signs (d, d) with orthogonal rows, d a power of 2."""
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < d:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs


def run(case: Case, seeds: Sequence[int]) -> list[Record]:
    """One run for each seed, all of a chunk at once."""
    values = case.values
    make = draw_aligned if values["data"] == "aligned" else draw_unaligned
    data = make(seeds, n=values["n"], T=values["T"], d=values["d"])
    kind = values["parameterization"]
    trajectory = descend(
        data.problem(data.best),
        data.scores,
        parameterization=kind,
        loss="exponential",
        optimizer=GradientFlow(1e-6),
        learning_rate=values["length"] / STEPS,
        steps=STEPS,
        record_every=1,
        init=_start(kind, seeds, values["d"], aligned=values["data"] == "aligned"),
    )
    selected = trajectory.selected.squeeze(-1)
    own, other = (_solutions(data, selected, norm) for norm in COMPARED[kind])
    problem, records = data.problem(selected), []
    for b in range(len(seeds)):
        W, target, rival = trajectory.W[b], own[b], other[b]
        records.append(
            {
                "best": bool((selected[b] == data.best[b]).all()),
                "feasible": target is not None,
                "norm": float(trajectory.norm[b, -1]),
                "own": _correlation(W, target),
                "other": _correlation(W, rival),
                "excess": _excess(W, problem[b], COMPARED[kind][0], target),
                "excess_of_other": None
                if rival is None
                else _excess(rival[None], problem[b], COMPARED[kind][0], target)[0],
            }
        )
    return records


def _start(kind: str, seeds: Sequence[int], d: int, *, aligned: bool) -> Any:
    """W = 0: Q = 0 with K a small multiple of the identity (aligned), or drawn."""
    if kind == "W":
        return "zeros"
    if kind == "diagonal":
        return SCALE * torch.ones(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    eye = torch.eye(d, dtype=torch.float64).expand(len(seeds), d, d)
    if not aligned:
        eye = torch.stack(
            [torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
        )
    return SCALE * eye, torch.zeros_like(eye)


def _solutions(data: Data, selected: Tensor, norm: str) -> list[Tensor | None]:
    """Max-margin matrices of the tokens selected at the end, None where there is none."""
    if norm == "fro":
        return _matrices(solve(data.problem(selected), tol=1e-8, on_failure="ignore"))
    if norm == "nuc":
        return _matrices(solve(data.problem(selected), "nuc", tol=1e-6, on_failure="ignore"))
    columns = _matrices(
        solve(data.diagonal_problem(selected), 1.0 if norm == "l1" else "fro", tol=1e-6, on_failure="ignore")
    )
    return [None if column is None else torch.diag(column[:, 0]) for column in columns]


def _matrices(solution: Solution) -> list[Tensor | None]:
    return [W if ray is None else None for W, ray in zip(solution.W, _rays(solution), strict=True)]


def _rays(solution: Solution) -> Sequence[Any]:
    return solution.ray if isinstance(solution.ray, tuple) else [solution.ray] * len(solution.W)


def _correlation(W: Tensor, solution: Tensor | None) -> list[float | None]:
    """Cosines (records,) of W (records, d, d) with a solution; None where one of them is missing or 0."""
    if solution is None:
        return [None] * len(W)
    size = torch.linalg.vector_norm(W, dim=(-2, -1)) * torch.linalg.vector_norm(solution)
    values = ((W * solution).sum((-2, -1)) / size).tolist()
    return [value if math.isfinite(value) else None for value in values]


def _excess(W: Tensor, problem: TokenSelection, norm: str, solution: Tensor | None) -> list[float | None]:
    """Norm of W (records, d, d) at margin 1 over that of the solution, minus 1; None where W has no margin."""
    if solution is None:
        return [None] * len(W)
    least = _size(solution, norm)
    margins = [float(problem.margins(one).min()) for one in W]
    sizes = [_size(one, norm) for one in W]
    return [size / margin / least - 1.0 if margin > 0 else None for size, margin in zip(sizes, margins, strict=True)]


def _size(W: Tensor, norm: str) -> float:
    if norm == "nuc":
        return float(torch.linalg.matrix_norm(W, "nuc"))
    return float(torch.linalg.vector_norm(W.diagonal(), 1) if norm == "l1" else torch.linalg.vector_norm(W))


def summarize(records: Sequence[Record]) -> Summary:
    """Directions at the end, by case, over the runs whose loss goes to its infimum."""
    rows: list[Sequence[str | float | int | None]] = []
    numbers: list[Number] = []
    for case in RECIPE.cases:
        found = [r for r in records if r["case"] == case.name]
        ended = [r for r in found if r["best"] and r["feasible"]]
        own, other = (NAMES[norm] for norm in COMPARED[case.values["parameterization"]])
        means = [_mean([r[key][-1] for r in ended]) for key in ("own", "other", "excess")]
        rows.append(
            (case.name, own, other, len(found), len(ended), *means, _mean([r["excess_of_other"] for r in ended]))
        )
        numbers += _numbers(case, own, other, ended) if ended else []
    return Summary(
        sentence="Gradient flow on (K, Q) lowers the nuclear norm at margin 1 towards its minimum, flow on diagonal "
        "(K, Q) the l_1 norm, and flow on W the Frobenius norm.",
        numbers=numbers,
        tables=[
            Table(
                title="Means at the end, runs that select the best tokens; excess of the first norm at margin 1",
                columns=(
                    *("case", "first norm", "second norm", "trials", "of which best"),
                    *(
                        "correlation, first",
                        "correlation, second",
                        "excess of the run",
                        "excess of the second solution",
                    ),
                ),
                rows=rows,
            )
        ],
        notes=_NOTES,
    )


def _numbers(case: Case, own: str, other: str, ended: Sequence[Record]) -> list[Number]:
    theorem = case.values["theorem"]
    pairs = [(r["excess"][STEPS // 2], r["excess"][-1], r["excess_of_other"]) for r in ended]
    half = [end / middle for middle, end, _ in pairs if middle and end is not None]
    closer = [end < rival for _, end, rival in pairs if end is not None and rival is not None]
    source, text = ("limit 0 by theorem" if theorem else ""), f"excess of the {own} norm at margin 1"
    return [
        Number(
            text=f"{case.name}: mean {text}, arc length {case.values['length']:g}",
            ours=_mean([r["excess"][-1] for r in ended]),
            high=0.05 if theorem else None,
            source=source,
        ),
        Number(
            text=f"{case.name}: mean ratio of that {text} to its value half way",
            ours=_mean(half),
            high=0.9 if theorem else None,
            source=source,
        ),
        Number(
            text=f"{case.name}: share of runs in which it is below that of the {other} solution",
            ours=sum(closer) / len(closer) if closer else None,
        ),
        Number(
            text=f"{case.name}: mean correlation with the {own} solution",
            ours=_mean([r["own"][-1] for r in ended]),
        ),
    ]


_NOTES = (
    "No figure was published; sizes and draws are ours. The theorem for (K, Q) asks that the singular vectors of the "
    "start are aligned with the data. Aligned data here are sequences with all their copies under the sign patterns of "
    "a Hadamard matrix: a diagonal W stays diagonal, and the path is that of the diagonal model. Unaligned data are "
    "drawn on the unit sphere.",
    "A run counts where it selects the best token of every sequence, since the theorem asks that the loss goes to its "
    "infimum. The excess is the norm of W scaled to a margin of 1, over the smallest possible, minus 1. Matrices that "
    "lie far apart can all have nearly the smallest nuclear or l_1 norm: it is small long before the correlation is 1.",
    "The flow is followed along its curve, by arc length of all trained entries: its time grows exponentially with the "
    "norm of W, its curve does not.",
)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def draw(figure: Figure, records: Sequence[Record]) -> None:
    """Excess of the norm and correlations along the flow, one column for each case."""
    axes = panels(figure, 2, len(RECIPE.cases), width=2.9, height=2.6, sharey="row")
    for k, case in enumerate(RECIPE.cases):
        upper, lower = axes[k], axes[k + len(RECIPE.cases)]
        ended = [r for r in records if r["case"] == case.name and r["best"] and r["feasible"]]
        kind = case.values["parameterization"]
        length = [case.values["length"] * step / STEPS for step in range(1, STEPS + 1)]
        own, other = (NAMES[norm] for norm in COMPARED[kind])
        band(upper, length, [r["excess"][1:] for r in ended], f"{own} norm", spread="quartiles")
        for key, name in (("own", own), ("other", other)):
            band(lower, length, [r[key][1:] for r in ended], f"{name} solution", limits=(-1.0, 1.0))
        style(upper, case.name, "", "excess at margin 1" if k == 0 else "")
        upper.set_yscale("log")
        style(lower, "", "arc length", "correlation" if k == 0 else "")


def _case(name: str, data: str, parameterization: str, length: float, *, theorem: bool) -> Case:
    """The norm of W grows in proportion to the arc length of the curve of W, that of K Q^T with its square."""
    sizes = {"n": 3, "T": 3, "d": 8} if data == "aligned" else {"n": 4, "T": 4, "d": 12}
    values = {"data": data, "parameterization": parameterization, "length": length, "theorem": theorem}
    return Case(name=name, values={**values, **sizes})


RECIPE = Recipe(
    name="flow",
    title="Gradient flow on keys and queries",
    about="Gradient flow with the exponential loss from W = 0 (K small, Q = 0): on (K, Q) of full rank, on diagonal "
    "(K, Q), and on W for contrast. Scores 1 for one token of each sequence, 0 for the others. Aligned: 24 sequences, "
    "T = 3, d = 8; unaligned: n = 4, T = 4, d = 12.",
    paper=Paper(
        title="Implicit Regularization of Gradient Flow on One-Layer Softmax Attention",
        authors="Sheen, Chen, Wang, Zhou",
        year=2024,
        arxiv="2403.08699",
    ),
    cases=(
        _case("(K, Q), aligned", "aligned", "KQ", 64.0, theorem=True),
        _case("diagonal, aligned", "aligned", "diagonal", 64.0, theorem=True),
        _case("diagonal, unaligned", "unaligned", "diagonal", 128.0, theorem=True),
        _case("(K, Q), unaligned", "unaligned", "KQ", 64.0, theorem=False),
        _case("W, unaligned", "unaligned", "W", 160.0, theorem=False),
    ),
    trials=20,
    run=run,
    summarize=summarize,
    draw=draw,
    chunk=20,
)
