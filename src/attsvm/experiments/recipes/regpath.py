"""The regularisation-path theorems of 2308.16898: the best matrix in a ball turns to the SVM of the ball's norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from attsvm.dynamics import descend
from attsvm.dynamics.path import regularization_path
from attsvm.experiments.recipes import plotting
from attsvm.experiments.recipes.draws import draw_layer_init, draw_unit_sphere
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table
from attsvm.experiments.recipes.tfsvm import COMPUTED, PAPER, judged, mean, of_case, solved
from attsvm.selection import TokenSelection
from attsvm.selection.geometry import correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE"]

SIZES = {"n": 6, "T": 8, "d": 10}
RADII = (10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
GLOBAL = {
    "W": ("W", "logistic", RADII),
    "KQ": ("KQ", "logistic", RADII[1:5]),
    "W, exponential": ("W", "exponential", RADII),
    "W, correlation": ("W", "correlation", RADII),
}
LOCAL = {"W, local": ("W", "logistic", RADII[1:6]), "KQ, local": ("KQ", "logistic", RADII[1:6])}
PATHS = {**GLOBAL, **LOCAL}
"""Parameterisation, loss and radii of each case."""

STEPS = 1000
STARTS = 8
TRAINING = 1500
"""Steps of the training that finds the locally optimal selection of a local path."""

FIRST = {
    "W": {20: (0.98483, 0.002), 40: (0.99441, 1e-3), 80: (0.99811, 5e-4), 160: (0.99942, 2e-4), 320: (0.99982, 1e-4)},
    "KQ": {20: (0.9605, 0.002), 40: (0.9815, 0.002), 80: (0.9928, 1e-3)},
}
"""Correlations of the first seed by another program, and how far ours may be from them."""


def _run(case: Case, seeds: Sequence[int]) -> list[Record]:
    which, loss, radii = PATHS[case.name]
    norm = _own(case.name)
    draws = draw_unit_sphere(seeds, n=SIZES["n"], T=SIZES["T"], d=SIZES["d"])
    problem, keep = draws.problem(), list(range(len(seeds)))
    if case.name in LOCAL:
        problem, keep = _locally_optimal(seeds, which)
    records: list[Record] = [{"accepted": b in keep} for b in range(len(seeds))]
    if not keep:
        return records
    t = problem.tensors
    problem = TokenSelection(t.tokens[keep], t.queries[keep], t.selected[keep])
    path = regularization_path(
        problem,
        draws.scores[keep],
        radii,
        parameterization="W" if which == "W" else "KQ",
        loss=loss,
        cone="auto" if case.name in LOCAL else None,
        starts=2 if case.name in LOCAL else STARTS,
        steps=STEPS,
    )
    wanted = problem.tensors.selected.int().argmax(-1)
    selects = (path.selected == wanted.unsqueeze(1)).flatten(2).all(-1)
    own, other = solved(problem, norm, tol=1e-8), solved(problem, "nuc" if norm == "fro" else "fro")
    solutions = {norm: own[0], "nuc" if norm == "fro" else "fro": other[0]}
    cosines = {name: correlation(path.W, W.unsqueeze(1)) for name, W in solutions.items()}
    for k, b in enumerate(keep):
        records[b] |= {
            "norm": path.norm[k].tolist(),
            "log_gap": path.log_gap[k].tolist(),
            "selects": selects[k].tolist(),
            "fro": cosines["fro"][k].tolist(),
            "nuc": cosines["nuc"][k].tolist(),
        }
    return records


def _locally_optimal(seeds: Sequence[int], which: str) -> tuple[TokenSelection, list[int]]:
    """Selections that training ends on, and which of them are locally optimal without being optimal."""
    draws = draw_unit_sphere(seeds, n=SIZES["n"], T=SIZES["T"], d=SIZES["d"])
    layers = draw_layer_init(seeds, d=SIZES["d"], count=1 if which == "W" else 2)
    init = layers[0] if which == "W" else layers
    run = descend(
        draws.problem(),
        draws.scores,
        parameterization="W" if which == "W" else "KQ",
        init=init,
        steps=TRAINING,
        record_every=TRAINING,
    )
    end = judged(run.problem, draws.scores, "fro" if which == "W" else "nuc")
    return run.problem, (end.local & ~end.optimal).nonzero().flatten().tolist()


def _summarize(records: Sequence[Record]) -> Summary:
    numbers = [*_first_seed(records), *_over_seeds(records), *_local(records)]
    last = mean(_settled(of_case(records, "W"), -1), _last("W"))
    shown = "nothing" if last is None else f"{last:.5f}"
    return Summary(
        sentence=f"The best W in a ball of norm 640 has correlation {shown} with the Frobenius-norm SVM, "
        "where it selects the optimal tokens.",
        numbers=numbers,
        tables=[_table(records, name) for name in (*GLOBAL, *LOCAL) if of_case(records, name)],
        notes=(
            "The problem is not convex, so the best of several starts counts; starts are compared by the logarithm of "
            "the loss above its infimum, which float64 holds long after the difference itself is lost.",
            "At small radii the best matrix need not select the optimal tokens at all: at R = 10 the first seed has a "
            "lower loss with other tokens. Correlations are averaged over the trials whose best matrix selects them.",
            "The ball of (K, Q), of half the sum of their squared norms, is the nuclear-norm ball of K Q^T; that the "
            "best matrix has nuclear norm R shows both that the bound is met and that K and Q are balanced.",
            "A local path stays in the cone in which tokens that score higher than the selected one have smaller "
            "logits than its support tokens. Its selections are those that training ended on, where they are locally "
            "optimal but not optimal.",
        ),
    )


def _settled(records: Sequence[Record], place: int) -> list[Record]:
    """The records whose best matrix selects the tokens in question at one radius."""
    return [record for record in records if record["accepted"] and record["selects"][place]]


def _own(name: str) -> Literal["fro", "nuc"]:
    return "fro" if name.startswith("W") else "nuc"


def _last(name: str) -> Callable[[Record], Any]:
    own = _own(name)
    return lambda record: record[own][-1]


def _first_seed(records: Sequence[Record]) -> list[Number]:
    numbers = []
    for name, expected in FIRST.items():
        for record in of_case(records, name):
            if record["trial"] != 0:
                continue
            for radius, (value, slack) in expected.items():
                place = PATHS[name][2].index(float(radius))
                numbers.append(
                    Number(
                        text=f"{name}, seed 0, R = {radius}: correlation with its SVM",
                        ours=record[_own(name)][place],
                        low=value - slack,
                        high=min(1.0, value + slack),
                        source=COMPUTED,
                    )
                )
    return numbers


def _over_seeds(records: Sequence[Record]) -> list[Number]:
    numbers = []
    for name in GLOBAL:
        found, radii = of_case(records, name), PATHS[name][2]
        numbers.append(
            Number(
                text=f"{name}, R = {radii[-1]:g}: mean correlation with its SVM",
                ours=mean(_settled(found, -1), _last(name)),
                low=0.999 if name != "KQ" else 0.98,
                source="Theorem on the global regularisation path: the limit is 1",
            )
        )
    numbers.append(
        Number(
            text="W: exponent of 1 - correlation over R, from 40 on",
            ours=_exponent(of_case(records, "W")),
            low=-1.95,
            high=-1.35,
            source=COMPUTED,
        )
    )
    excess = [
        abs(size / R - 1.0) for r in of_case(records, "KQ") for size, R in zip(r["norm"], RADII[1:5], strict=True)
    ]
    numbers.append(
        Number(
            text="KQ: largest distance of the nuclear norm of K Q^T from R, relative",
            ours=max(excess, default=None),
            high=1e-3,
            source="Balanced factors at the optimum",
        )
    )
    return numbers


def _exponent(records: Sequence[Record]) -> float | None:
    """Mean slope of log(1 - correlation) over log R, over the trials that select the optimal tokens from R = 40 on."""
    x = torch.tensor(RADII[2:], dtype=torch.float64).log()
    slopes = []
    for record in records:
        if all(record["selects"][2:]):
            y = (1.0 - torch.tensor(record["fro"][2:], dtype=torch.float64)).clamp(min=1e-15).log()
            slopes.append(float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()))
    return sum(slopes) / len(slopes) if slopes else None


def _local(records: Sequence[Record]) -> list[Number]:
    numbers = []
    for name in LOCAL:
        found = [record for record in of_case(records, name) if record["accepted"]]
        stay = [all(record["selects"]) for record in found]
        numbers += [
            Number(
                text=f"{name}, R = {PATHS[name][2][-1]:g}: mean correlation with the SVM of its selection",
                ours=mean(found, _last(name)),
                low=0.995,
                source="Theorem on the local regularisation path: the limit is 1",
            ),
            Number(
                text=f"{name}: share of paths that select these tokens at every R",
                ours=sum(stay) / len(stay) if stay else None,
            ),
        ]
    return numbers


def _table(records: Sequence[Record], name: str) -> Table:
    found, radii = of_case(records, name), PATHS[name][2]
    rows: list[tuple[str | float | None, ...]] = []
    for place, radius in enumerate(radii):
        settled = _settled(found, place)
        accepted = [record for record in found if record["accepted"]]
        rows.append(
            (
                radius,
                f"{len(settled)} of {len(accepted)}",
                mean([{"at": r["fro"][place]} for r in settled], "at"),
                mean([{"at": r["nuc"][place]} for r in settled], "at"),
                mean([{"at": r["log_gap"][place] / math.log(10.0)} for r in settled], "at"),
            )
        )
    return Table(
        title=f"{name}: means over the trials whose best matrix selects the tokens of the SVM",
        columns=("R", "trials", "corr. with W^mm", "corr. with W^mm_*", "log10 of the loss above its infimum"),
        rows=rows,
    )


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    axes = plotting.panels(figure, 1, 3)
    titles = ("W in the Frobenius ball", "(K, Q)", "In the cone of a locally optimal selection")
    for ax, title, names in zip(axes, titles, (("W",), ("KQ",), tuple(LOCAL)), strict=True):
        for name in names:
            radii = PATHS[name][2]
            found = [record for record in of_case(records, name) if record["accepted"]]
            for norm in ("fro", "nuc") if len(names) == 1 else (_own(name),):
                curves = [[1.0 - c if s else None for c, s in zip(r[norm], r["selects"], strict=True)] for r in found]
                if curves:
                    label = {"fro": "Frobenius SVM", "nuc": "nuclear SVM"}[norm]
                    plotting.band(ax, radii, curves, label, plotting.COLORS[norm], spread="quartiles", marker="o")
        ax.set(xscale="log", yscale="log", xticks=RADII[::2])
        ax.set_xticks([], minor=True)
        ax.set_xticklabels([f"{radius:g}" for radius in RADII[::2]])
        plotting.style(ax, title, "R", "1 - correlation")


RECIPE = Recipe(
    name="regpath",
    title="Regularisation paths of W and (K, Q), global and local",
    about="For growing R the loss is minimised over matrices with ||W||_F <= R, and over factors with "
    "||K||_F^2 + ||Q||_F^2 <= 2R, by projected normalised gradient descent from several starts (n = 6, T = 8, d = 10). "
    "The direction of the minimiser is compared with the SVM of the optimal tokens, for three losses; and within the "
    "cone of a locally optimal selection with the SVM of that selection.",
    paper=PAPER,
    cases=(
        *(
            Case(
                name=name,
                values={**SIZES, "parameterization": which, "loss": loss, "radii": list(radii)},
                trials=20 if name in LOCAL else None,
            )
            for name, (which, loss, radii) in PATHS.items()
        ),
    ),
    trials=10,
    chunk=40,
    run=_run,
    summarize=_summarize,
    draw=_draw,
)
