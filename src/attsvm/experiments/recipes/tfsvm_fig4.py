"""Figure 4 of 2308.16898: the larger d, the more runs end on the tokens of highest score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attsvm.dynamics import descend
from attsvm.experiments.recipes import plotting
from attsvm.experiments.recipes.draws import draw_unit_sphere
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table
from attsvm.experiments.recipes.tfsvm import PAPER, judged, of_case, proportion, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE"]

DIMENSIONS = (2, 3, 4, 6, 8, 10, 15, 20)
SIZES = ((4, 6), (2, 4))
STEPS = 1000
TRIALS = 300

KNOWN = {
    (4, 6): {
        "optimal": (0.413, 0.623, 0.680, 0.800, 0.863, 0.890, 0.943, 0.960),
        "local": (0.743, 0.963, 0.993, 0.990, 0.987, 0.997, 1.0, 0.990),
        "all_support": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.003),
    },
    (2, 4): {
        "optimal": (0.920, 0.927, 0.957, 0.990, 0.970, 0.987, 1.0, 1.0),
        "local": (0.983, 0.997, 0.993, 1.0, 0.997, 0.993, 1.0, 1.0),
        "all_support": (0.0, 0.0, 0.037, 0.090, 0.160, 0.267, 0.527, 0.693),
    },
}
"""(n, T) -> share over ``DIMENSIONS`` of 300 cross-attention runs, from another program."""

NAMES = {"optimal": "global", "local": "local (with global)", "not_local": "not local", "all_support": "all support"}


def _name(attention: str, n: int, T: int, d: int) -> str:
    return f"{attention}, n={n}, T={T}, d={d}"


def _run(case: Case, seeds: Sequence[int]) -> list[Record]:
    values = case.values
    own = values["attention"] == "self"
    draws = draw_unit_sphere(seeds, n=values["n"], T=values["T"], d=values["d"], self_attention=own)
    run = descend(draws.problem(), draws.scores, steps=STEPS, record_every=STEPS)
    end = judged(run.problem, draws.scores, "fro")
    best = judged(draws.problem(), draws.scores, "fro")
    return [
        {
            "optimal": bool(end.optimal[b]),
            "local": bool(end.local[b]),
            "feasible": bool(end.feasible[b]),
            "all_support": bool(best.all_support[b]),
            "mass": float(run.attention_mass[b, -1]),
        }
        for b in range(len(seeds))
    ]


def _summarize(records: Sequence[Record]) -> Summary:
    numbers: list[Number] = []
    for (n, T), fields in KNOWN.items():
        for field, values in fields.items():
            for d, value in zip(DIMENSIONS, values, strict=True):
                mine = of_case(records, _name("cross", n, T, d))
                text = f"{NAMES[field]}: share of runs, n={n}, T={T}, d={d}"
                numbers.append(proportion(text, share(mine, field), len(mine), value, TRIALS))
    return Summary(
        sentence="The larger d, the more runs end on the tokens of highest score; nearly all others end on a locally "
        "optimal selection.",
        numbers=numbers,
        tables=[_table(records)],
        notes=[
            "The publication does not give n, T, the grid of d, or digits for this figure, and about 1,000 trials a "
            "bar; the shares to compare with come from another program with 300.",
            "Global: every query gives the largest probability to its token of highest score. Local: some W separates "
            "the selected tokens, and each scores higher than the support tokens of the max-margin solution for this "
            "selection. All support: all unselected tokens are support tokens when the optimal ones are selected.",
            f"W(0) = 0, {STEPS:,} normalised steps of 0.1. A run that is not local at large d is on its way: more "
            "steps take it to a local selection.",
        ],
    )


def _table(records: Sequence[Record]) -> Table:
    rows = []
    for attention in ("cross", "self"):
        for n, T in SIZES:
            for d in DIMENSIONS:
                mine = of_case(records, _name(attention, n, T, d))
                shares = [share(mine, field) for field in ("optimal", "local", "feasible", "all_support")]
                rows.append([attention, n, T, d, *shares])
    columns = ["attention", "n", "T", "d", "global", "local (with global)", "selection feasible", "all support"]
    return Table(title="Shares", columns=columns, rows=rows)


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    axes = plotting.panels(figure, len(SIZES), 2, width=4.8, height=2.8, sharey=True)
    places = [(attention, n, T) for n, T in SIZES for attention in ("self", "cross")]
    for ax, (attention, n, T) in zip(axes, places, strict=True):
        cases = [of_case(records, _name(attention, n, T, d)) for d in DIMENSIONS]
        series: dict[str, plotting.Curve] = {
            NAMES[field]: [share(mine, field) for mine in cases] for field in ("optimal", "local")
        }
        missed = [None if one is None else 1.0 - one for one in series[NAMES["local"]]]
        series |= {NAMES["not_local"]: missed, NAMES["all_support"]: [share(mine, "all_support") for mine in cases]}
        plotting.bars(ax, [str(d) for d in DIMENSIONS], series)
        title = f"{attention.capitalize()}-attention, n = {n}, T = {T}"
        plotting.style(ax, title, "d", "share of runs", legend="outside" if n == SIZES[-1][0] else False)


RECIPE = Recipe(
    name="tfsvm-fig4",
    title="Where training ends: global, local or neither, over d",
    about=(
        "Random tokens, labels and head; training of W from 0, in cross-attention and in self-attention with the first "
        "token as the query. Shares of the runs that end on the tokens of highest score, on another locally optimal "
        "selection, or on neither."
    ),
    paper=PAPER,
    cases=[
        Case(name=_name(attention, n, T, d), values={"attention": attention, "n": n, "T": T, "d": d})
        for attention in ("cross", "self")
        for n, T in SIZES
        for d in DIMENSIONS
    ],
    trials=TRIALS,
    chunk=100,
    run=_run,
    summarize=_summarize,
    draw=_draw,
)
