"""Figure 6 of 2308.16898: a quadratic penalty in the head makes attention keep more tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attsvm.dynamics import QuadraticHead, Trajectory, descend
from attsvm.experiments.recipes import plotting
from attsvm.experiments.recipes.draws import draw_layer_init
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table
from attsvm.experiments.recipes.several_tokens import PREDICTORS, compare
from attsvm.experiments.recipes.tfsvm import COMPUTED, PAPER, mean, of_case, proportion, share
from attsvm.selection import TokenSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE", "project_to_simplex"]

SCHEDULE = ((0.1, 2000), (0.01, 1000), (0.001, 1000))
"""(rate, steps) for one sequence: a step of fixed length bounces about a minimum by half of it."""

STEPS = 2000
SELECTED_ABOVE = 1e-3

COUNTS = {
    0.01: (1.06, 1.07),
    0.05: (1.46, 1.47),
    0.1: (1.90, 1.92),
    0.2: (2.68, 2.76),
    0.5: (4.62, 4.65),
    1.0: (6.80, 6.76),
}
"""penalty -> mean number of tokens that training selects, and that the projection has; one sequence, 300 seeds."""

SINGLE = {0.01: 0.94, 0.05: 0.59, 0.1: 0.28, 0.2: 0.06}
"""penalty -> share of the problems whose projection is one token."""

CORRELATIONS = {0.02: (0.9932, 0.9931, 0.9857), 0.05: (0.9918, 0.9913, 0.9819), 0.1: (0.9909, 0.9898, 0.9748)}
REJECTED = {0.02: 39, 0.05: 92, 0.1: 159}
"""penalty -> correlations of the three predictors, and runs of 200 that do not count; three sequences."""


class _Data(NamedTuple):
    v: Tensor  # (B, d)
    tokens: Tensor  # (B, n, T, d), orthonormal within a sequence
    queries: Tensor  # (B, n, d)


def _draw_data(seeds: Sequence[int], *, n: int, T: int, d: int) -> _Data:
    """Head, tokens and queries, drawn in this order, one generator a seed."""
    members = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        v = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=-1)
        tokens = torch.linalg.svd(torch.randn(n, T, d, generator=generator), full_matrices=False)[0]
        queries = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
        members.append((v.double(), tokens.double(), queries.double()))
    return _Data(*(torch.stack(parts) for parts in zip(*members, strict=True)))


def project_to_simplex(y: Tensor) -> Tensor:
    """Nearest probability vectors, along the last axis.

    Examples
    --------
    >>> project_to_simplex(torch.tensor([0.75, 0.25, -1.0]))
    tensor([0.7500, 0.2500, 0.0000])
    >>> project_to_simplex(torch.tensor([3.0, 1.0]))
    tensor([1., 0.])
    """
    ordered = y.sort(-1, descending=True).values
    counts = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype)
    levels = (ordered.cumsum(-1) - 1.0) / counts
    last = (ordered > levels).sum(-1, keepdim=True) - 1
    return (y - levels.gather(-1, last)).clamp(min=0.0)


def _run(case: Case, seeds: Sequence[int]) -> list[Record]:
    n, T, d, penalty = (case.values[name] for name in ("n", "T", "d", "penalty"))
    data = _draw_data(seeds, n=n, T=T, d=d)
    start = draw_layer_init(seeds, d=d, count=1)[0]
    if n > 1:
        run = _trained(data, penalty, start, 0.1, STEPS)
        return compare(data.tokens, data.queries, run.W, run.probabilities.squeeze(2))
    for rate, steps in SCHEDULE:
        run = _trained(data, penalty, start, rate, steps)
        start = run.W[:, -1]
    return _single_records(data, penalty, run.probabilities[:, 0, 0])


def _trained(data: _Data, penalty: float, start: Tensor, rate: float, steps: int) -> Trajectory:
    selected = torch.zeros(data.tokens.shape[:2], dtype=torch.int64)
    return descend(
        TokenSelection(data.tokens, data.queries, selected),
        head=QuadraticHead(data.v, penalty),
        labels=torch.ones(selected.shape, dtype=torch.float64),
        learning_rate=rate,
        init=start,
        steps=steps,
        record_every=steps,
    )


def _single_records(data: _Data, penalty: float, attention: Tensor) -> list[Record]:
    """Attention (B, T) to one sequence beside the minimiser of its loss over all distributions."""
    scores = (data.tokens[:, 0] @ data.v.unsqueeze(-1)).squeeze(-1)
    best = project_to_simplex(scores / (2.0 * penalty))
    return [
        {
            "tokens": int((s >= SELECTED_ABOVE).sum()),
            "projection": int((p > 0).sum()),
            "error": float((s - p).abs().max()),
        }
        for s, p in zip(attention, best, strict=True)
    ]


def _summarize(records: Sequence[Record]) -> Summary:
    numbers: list[Number] = []
    one, three = [], []
    for case in RECIPE.cases:
        mine, penalty = of_case(records, case.name), case.values["penalty"]
        if not mine:
            continue
        if case.values["n"] == 1:
            numbers += _single_numbers(penalty, mine)
            one.append([penalty, *_single_row(mine)])
        else:
            kept = [record for record in mine if record["accepted"]]
            numbers += _several_numbers(penalty, mine, kept)
            ends = [_correlation(kept, field) for field in PREDICTORS]
            three.append([penalty, len(mine), len(kept), mean(kept, "tokens"), *ends])
    predictors = [f"corr. {name}" for name in PREDICTORS.values()]
    return Summary(
        sentence="The more the head penalises long vectors, the more tokens attention keeps, as many as the simplex "
        "projection of the scores has; the generalised SVM predicts the trained matrix, one token does not.",
        numbers=numbers,
        tables=[
            Table(
                title="One sequence of ten tokens",
                columns=["lambda", "tokens, training", "tokens, projection", "equal counts", "median error of s"],
                rows=one,
            ),
            Table(
                title="Three sequences of six tokens",
                columns=["lambda", "runs", "accepted", "tokens of a sequence", *predictors],
                rows=three,
            ),
        ],
        notes=[
            "The settings of Fig. 6 were not published, and the published notebook cannot run this head: it assigns "
            "weights to an identity, never sets lambda, and asks for a negative label where all are positive. Sizes "
            "and lambda are therefore ours, and the numbers beside ours come from an independent computation.",
            "With one sequence and orthonormal tokens the loss depends on s by gamma^T s - lambda ||s||^2 only, whose "
            "maximiser is the projection of gamma / (2 lambda) onto the simplex: one token exactly where the two "
            "highest scores differ by 2 lambda or more. Where counts differ, training has not yet driven out a token "
            "that the projection just excludes, or has less than 1e-3 on one that it just includes.",
            "The independent computation used the published step, which divides the gradient by its norm plus "
            "2.2e-16; its runs froze at ||W|| of 65 and then drifted by rounding. Ours go on and come closer to the "
            "prediction, so that correlations are compared from below only.",
            "With three sequences most runs at a larger lambda still move when they end, with a probability in "
            "(1e-6, 1e-3], and do not count.",
        ],
    )


def _single_numbers(penalty: float, mine: Sequence[Record]) -> list[Number]:
    trained, projected, equal, error = _single_row(mine)
    # The same 300 seeds agree to the last digit or two; fewer by three standard errors of a count that varies by 1.
    slack = 3.0 * math.sqrt(max(1.0 / len(mine) - 1.0 / 300, 0.0)) + 0.03
    numbers = [
        Number(
            text=f"n=1, lambda={penalty}: {text}, mean",
            ours=ours,
            low=value - slack,
            high=value + slack,
            source=COMPUTED,
        )
        for text, ours, value in zip(
            ("tokens that training selects", "tokens of the projection"),
            (trained, projected),
            COUNTS[penalty],
            strict=True,
        )
    ]
    numbers += [
        Number(
            text=f"n=1, lambda={penalty}: runs with as many tokens as the projection",
            ours=equal,
            low=0.92 - 0.05 * math.sqrt(max(300 / len(mine), 1.0) - 1.0),
            source=COMPUTED,
        ),
        Number(
            text=f"n=1, lambda={penalty}: largest difference of s from the projection, median",
            ours=error,
            high=2e-3,
            source=COMPUTED,
        ),
    ]
    if penalty in SINGLE:
        single = share([{"single": record["projection"] == 1} for record in mine], "single")
        text = f"n=1, lambda={penalty}: projections that are one token"
        numbers.append(proportion(text, single, len(mine), SINGLE[penalty], 300))
    return numbers


def _single_row(mine: Sequence[Record]) -> tuple[float | None, float | None, float | None, float]:
    equal = share([{"equal": record["tokens"] == record["projection"]} for record in mine], "equal")
    error = float(np.median([record["error"] for record in mine]))
    return mean(mine, "tokens"), mean(mine, "projection"), equal, error


def _several_numbers(penalty: float, mine: Sequence[Record], kept: Sequence[Record]) -> list[Number]:
    numbers = [
        Number(
            text=f"n=3, lambda={penalty}: correlation with {name}, step {STEPS}, mean",
            ours=_correlation(kept, field),
            low=value - (0.003 if field != "one" else 0.015) * math.sqrt(max(200 / len(mine), 1.0)),
            source=COMPUTED,
        )
        for (field, name), value in zip(PREDICTORS.items(), CORRELATIONS[penalty], strict=True)
    ]
    ends = [end for field in PREDICTORS if (end := _correlation(kept, field)) is not None]
    drops = [before - after for before, after in itertools.pairwise(ends)]
    accepted = len(kept) / len(mine)
    return [
        *numbers,
        Number(
            text=f"n=3, lambda={penalty}: smaller of the differences of successive predictors, in order above 0",
            ours=min(drops, default=None),
            low=0.0,
            source=COMPUTED,
        ),
        proportion(f"n=3, lambda={penalty}: accepted runs", accepted, len(mine), 1 - REJECTED[penalty] / 200, 200),
    ]


def _correlation(kept: Sequence[Record], field: str) -> float | None:
    return mean(kept, lambda record: 1.0 - record[field][-1])


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    left, middle, right = plotting.panels(figure, 1, 3)
    one = {case.values["penalty"]: of_case(records, case.name) for case in RECIPE.cases if case.values["n"] == 1}
    one = {penalty: mine for penalty, mine in one.items() if mine}
    for field, name in (("tokens", "training"), ("projection", "simplex projection")):
        left.plot(list(one), [np.mean([r[field] for r in mine]) for mine in one.values()], "o-", label=name)
    if one:
        left.set_xscale("log")
    plotting.style(left, "Tokens kept of ten", "lambda", "mean over seeds")
    several = {case.values["penalty"]: of_case(records, case.name) for case in RECIPE.cases if case.values["n"] > 1}
    kept = {penalty: [r for r in mine if r["accepted"]] for penalty, mine in several.items()}
    for order, (field, name) in enumerate(PREDICTORS.items()):
        curve = [_correlation(mine, field) for mine in kept.values()]
        shown = [(penalty, value) for penalty, value in zip(kept, curve, strict=True) if value is not None]
        if shown:
            middle.plot(*zip(*shown, strict=True), "o", label=name, linestyle=plotting.DASHES[order])
    plotting.style(middle, "Three predictions", "lambda", "correlation with W, mean")
    together = [record for mine in kept.values() for record in mine]
    totals = sorted({round(3 * record["tokens"]) for record in together})
    for order, (field, name) in enumerate(PREDICTORS.items() if together else ()):
        groups = [[record for record in together if round(3 * record["tokens"]) == total] for total in totals]
        ends = [_correlation(group, field) for group in groups]
        right.plot(totals, ends, "o", label=name, linestyle=plotting.DASHES[order])  # type: ignore[arg-type]
    right.set_xticks(totals)
    plotting.style(right, "By the tokens that are kept", "tokens kept in all three sequences", "correlation with W")


_ONE = {"n": 1, "T": 10, "d": 10}
_THREE = {"n": 3, "T": 6, "d": 6}

RECIPE = Recipe(
    name="tfsvm-fig6",
    title="A penalty on the output makes attention keep several tokens",
    about=(
        "The head v^T x - lambda ||x||^2, orthonormal tokens, positive labels, logistic loss, normalised gradient "
        "steps on W. One sequence of ten tokens, where the limit of attention is known in closed form, and three "
        "sequences of six, where the trained matrix is compared with three predictions."
    ),
    paper=PAPER,
    cases=[
        *(Case(name=f"n=1, lambda={penalty}", values={**_ONE, "penalty": penalty}) for penalty in COUNTS),
        *(
            Case(name=f"n=3, lambda={penalty}", values={**_THREE, "penalty": penalty}, trials=200)
            for penalty in CORRELATIONS
        ),
    ],
    trials=300,
    chunk=150,
    run=_run,
    summarize=_summarize,
    draw=_draw,
)
