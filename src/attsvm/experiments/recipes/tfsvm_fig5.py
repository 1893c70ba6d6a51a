"""Figure 5 of 2308.16898: training goes to the max-margin direction of the tokens that it ends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attsvm.dynamics import descend
from attsvm.experiments.recipes import plotting
from attsvm.experiments.recipes.draws import Draws, draw_layer_init, draw_unit_sphere
from attsvm.experiments.recipes.published_step import PublishedRun, published_descent
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table
from attsvm.experiments.recipes.tfsvm import COMPUTED, PAPER, judged, mean, of_case, proportion, share, solved
from attsvm.selection.geometry import correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE"]

SIZES = {"n": 6, "T": 8, "d": 10}
STEPS = (*(0, 1, 2, 5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100, 120, 150, 200, 250, 300, 350, 400, 450),)
STEPS += (*range(500, 1000, 100), *range(1000, 2001, 100))

FIGURE = {
    ("W", "mass"): {2: 0.162, 25: 0.26, 50: 0.43, 100: 0.736, 150: 0.897, 200: 0.967, 300: 0.994},
    ("KQ", "mass"): {2: 0.158, 25: 0.44, 50: 0.857, 100: 0.9995},
    ("W", "fro"): {100: 0.748, 200: 0.883, 300: 0.935, 400: 0.960, 600: 0.980, 800: 0.988, 1000: 0.9925},
    ("W", "nuc"): {100: 0.696, 200: 0.797, 300: 0.833, 400: 0.848, 600: 0.859, 800: 0.861, 1000: 0.862},
}
"""Read off the published curves: (parameterisation, curve) -> step -> value."""

LATER = {
    ("W", "fro"): {1500: 0.9946, 2000: 0.9960},
    ("W", "nuc"): {2000: 0.861},
    ("KQ", "nuc"): {100: 0.857, 200: 0.942, 300: 0.969, 400: 0.980, 1000: 0.9925, 1500: 0.9962, 2000: 0.9965},
    ("KQ", "fro"): {100: 0.771, 200: 0.829, 1000: 0.852, 2000: 0.851},
}
"""Of the same kind, from another program; the publication shows no digits for these."""

OPTIMAL = {"W": 0.74, "KQ": 0.72}
"""Share of runs that select the optimal token in all sequences, from that program."""

SLACK = {"mass": 0.025, "fro": 0.02, "nuc": 0.02}
NAMES = {"mass": "largest attention probability", "fro": "corr. with W^mm", "nuc": "corr. with W^mm_*"}
WAYS = ("published", "stable")


def _name(which: str, way: str) -> str:
    return f"{which}, {way} step"


def _run(case: Case, seeds: Sequence[int]) -> list[Record]:
    which = case.values["parameterization"]
    draws = draw_unit_sphere(seeds, n=SIZES["n"], T=SIZES["T"], d=SIZES["d"])
    run = _trained(draws, draw_layer_init(seeds, d=SIZES["d"], count=1 if which == "W" else 2), case.values["step"])
    # The path belongs to the tokens selected at its end: they decide which solutions it is compared with.
    problem = draws.problem(run.selected)
    end = judged(problem, draws.scores, "fro" if which == "W" else "nuc")
    other, _ = solved(problem, "nuc" if which == "W" else "fro")
    fro, nuc = (end.W, other) if which == "W" else (other, end.W)
    to_fro, to_nuc, between = _correlations(run.path, fro), _correlations(run.path, nuc), correlation(fro, nuc)
    return [
        {
            "mass": run.mass[b].tolist(),
            "fro": to_fro[b].tolist(),
            "nuc": to_nuc[b].tolist(),
            "norm": float(torch.linalg.vector_norm(run.path[b, -1])),
            "between": float(between[b]),
            "feasible": bool(end.feasible[b]),
            "optimal": bool(end.optimal[b]),
            "local": bool(end.local[b]),
        }
        for b in range(len(seeds))
    ]


def _trained(draws: Draws, layers: tuple[Tensor, ...], way: str) -> PublishedRun:
    """The runs of one case."""
    if way == "published":
        return published_descent(draws, layers, record_steps=STEPS)
    run = descend(
        draws.problem(),
        draws.scores,
        parameterization="W" if len(layers) == 1 else "KQ",
        init=layers[0] if len(layers) == 1 else layers,
        steps=STEPS[-1],
        record_steps=STEPS,
    )
    return PublishedRun(run.W, run.attention_mass, run.selected[..., 0])


def _correlations(path: Tensor, W: Tensor) -> Tensor:
    """(B, records)."""
    curves: Tensor = correlation(path, W.unsqueeze(1))
    return torch.as_tensor(curves)


def _summarize(records: Sequence[Record]) -> Summary:
    numbers = []
    for source, known in (("Fig. 5", FIGURE), (COMPUTED, LATER)):
        for (which, curve), values in known.items():
            mine = of_case(records, _name(which, "published"))
            numbers += [_number(mine, which, curve, step, value, source) for step, value in values.items()]
    for which in OPTIMAL:
        numbers += _ends(records, which)
    ends = [
        [_name(which, way), *(_at(mine, curve, STEPS[-1]) for curve in NAMES), mean(mine, "norm")]
        for which in OPTIMAL
        for way in WAYS
        for mine in [of_case(records, _name(which, way))]
    ]
    between = mean(of_case(records, _name("W", "published")), "between")
    shown = "?" if between is None else f"{between:.3f}"
    return Summary(
        sentence="Training W turns to the Frobenius max-margin direction of the tokens it selects, "
        "training (K, Q) to the nuclear one.",
        numbers=numbers,
        tables=[
            Table(title=f"Means after {STEPS[-1]} steps", columns=["trained", *NAMES.values(), "||W||_F"], rows=ends)
        ],
        notes=[
            f"The curve that stays below is no failure: the two solutions have a mean correlation of {shown} with each "
            "other.",
            "The published runs start from unseeded layers with entries U(-1/sqrt d, 1/sqrt d); ours from such layers "
            "with a seed for each trial.",
            "Artefact: the published step divides the gradient by its norm plus 2.2e-16, so W comes to rest once "
            "the gradient is that small, and it gives K and Q a penalty of the same size, so that from about step 100 "
            "their run follows the minimiser of the penalised loss at a fixed norm. The numbers use that step. The "
            "stable step, computed on a common log scale, has neither: W goes further, and (K, Q), which then grow by "
            "ever smaller fractions, turn more slowly. Both are shown.",
            "About a quarter of the runs end on a locally optimal selection that is not optimal; they turn to the "
            "max-margin direction of that selection just the same.",
        ],
    )


def _ends(records: Sequence[Record], which: str) -> list[Number]:
    """Where the runs end, and how far the stable step comes."""
    mine, stable = (of_case(records, _name(which, way)) for way in WAYS)
    own = "fro" if which == "W" else "nuc"
    return [
        proportion(
            f"training {which}: share of runs that select the optimal token in all sequences",
            share(mine, "optimal"),
            len(mine),
            OPTIMAL[which],
            100,
        ),
        Number(
            text=f"training {which}: share of runs that end on a locally optimal selection",
            ours=share(mine, "local"),
            low=0.95,
            source=COMPUTED,
        ),
        Number(text=f"training {which}, stable step: {NAMES[own]}, step {STEPS[-1]}", ours=_at(stable, own, STEPS[-1])),
    ]


def _number(records: Sequence[Record], which: str, curve: str, step: int, value: float, source: str) -> Number:
    # Curves that have arrived at 1 are flatter and vary less from one set of initial layers to another.
    slack = SLACK[curve] if value < 0.98 else 0.005
    return Number(
        text=f"training {which}: {NAMES[curve]}, step {step}",
        ours=_at(records, curve, step),
        published=value if source != COMPUTED else None,
        low=value - slack,
        high=value + slack,
        source=source,
    )


def _at(records: Sequence[Record], curve: str, step: int) -> float | None:
    place = STEPS.index(step)
    return mean(records, lambda record: record[curve][place])


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    attention, left, right = plotting.panels(figure, 1, 3)
    for which in ("W", "KQ"):
        curves = [record["mass"] for record in of_case(records, _name(which, "published"))]
        color = plotting.COLORS[which]
        plotting.band(attention, STEPS, curves, f"training {which}", color, limits=(0.0, 1.0))
    plotting.style(attention, "Largest probability", "step", "mean over sequences")
    for ax, which in ((left, "W"), (right, "KQ")):
        for curve in ("fro", "nuc"):
            curves = [record[curve] for record in of_case(records, _name(which, "published"))]
            plotting.band(ax, STEPS, curves, NAMES[curve], plotting.COLORS[curve], limits=(-1.0, 1.0), linestyle="-")
            curves = [record[curve] for record in of_case(records, _name(which, "stable"))]
            if curves:
                middle = plotting.mean_and_spread(curves)[0]
                ax.plot(STEPS, middle, ":", color=plotting.COLORS[curve], label=f"{NAMES[curve]}, stable step")
            known = FIGURE.get((which, curve), {})
            plotting.mark_published(ax, list(known), list(known.values()), "published" if curve == "fro" else "")
        ax.set_ylim(0.0, 1.02)
        plotting.style(ax, f"Training {which}", "step", "correlation")


RECIPE = Recipe(
    name="tfsvm-fig5",
    title="Training turns to the max-margin direction of the tokens it selects",
    about=(
        "Six sequences of eight random tokens on the unit sphere in ten dimensions, cross-attention, logistic loss, "
        "2,000 normalised gradient steps of 0.1, in W and in (K, Q), once with the published step and once with one "
        "that does not underflow. After each run the tokens of largest attention "
        "are taken as the selection, and the path is compared with the Frobenius and the nuclear max-margin "
        "solutions for it."
    ),
    paper=PAPER,
    cases=[
        Case(name=_name(which, way), values={"parameterization": which, "step": way, **SIZES})
        for way in WAYS
        for which in OPTIMAL
    ],
    trials=100,
    run=_run,
    summarize=_summarize,
    draw=_draw,
)
