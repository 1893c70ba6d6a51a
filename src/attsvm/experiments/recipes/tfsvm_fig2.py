"""Figure 2 of 2308.16898: training W and training (K, Q) part ways, towards different max-margin rays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from attsvm.experiments.recipes import plotting
from attsvm.experiments.recipes.draws import Draws
from attsvm.experiments.recipes.planar import CASES, STEPS, draw_sequence, draw_tokens, run_planar, unit_draws
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table
from attsvm.experiments.recipes.tfsvm import PAPER, of_case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE"]

NAMES = {"fro": "Frobenius", "nuc": "nuclear"}


def draw_data(seed: int) -> Draws:
    """Three tokens a sequence, 0.3 N(0, 1) around (-1, 0) and around (1, 0)."""

    def tokens(generator: torch.Generator) -> torch.Tensor:
        X = 0.3 * torch.randn(2, 3, 2, generator=generator)
        return X + torch.tensor([[[-1.0, 0.0]], [[1.0, 0.0]]])

    return unit_draws(seed, tokens)


def _run(case: Case, seeds: Sequence[int]) -> list[Record]:
    return run_planar(draw_data, case, seeds)


def _summarize(records: Sequence[Record]) -> Summary:
    numbers, rows = [], []
    for which in ("W", "KQ"):
        for record in of_case(records, which)[:1]:
            for norm in NAMES:
                ours = record[f"to_{norm}"][-1]
                numbers.append(Number(text=f"training {which}: corr. with the {NAMES[norm]} solution", ours=ours))
    for record in of_case(records, "W")[:1]:
        numbers.append(Number(text="corr. of the two solutions", ours=record["between"]))
        for norm, name in NAMES.items():
            entries = [value for row in record[norm] for value in row]
            rows.append([name, *entries, *record[f"{norm}_singular"]])
    columns = ["solution", "(1,1)", "(1,2)", "(2,1)", "(2,2)", "singular value 1", "2"]
    return Summary(
        sentence="Training W and training (K, Q) go to different rays: the Frobenius and the nuclear solution.",
        numbers=numbers,
        tables=[Table(title="Max-margin solutions for the optimal tokens", columns=columns, rows=rows)],
        notes=["The publication gives the settings of this figure and no numbers."],
    )


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    ax = plotting.panels(figure, 1, 1, width=6.0, height=4.4)[0]
    for which, norm, dash in (("W", "fro", "-"), ("KQ", "nuc", "--")):
        for record in of_case(records, which)[:1]:
            for i in range(2):
                label = f"training {which}, z_{i + 1}; {NAMES[norm]} ray"
                draw_sequence(ax, record, norm, i, dash=dash, label=label)
    for record in of_case(records, "W")[:1]:
        draw_tokens(ax, record)
    ax.set(xlim=(-30.0, 40.0), ylim=(-100.0, 100.0))
    plotting.style(ax, "W(k) z for both queries")


RECIPE = Recipe(
    name="tfsvm-fig2",
    title="W and (K, Q) go to different max-margin rays",
    about=(
        "Two sequences of three tokens in the plane. Solid: training W, and the Frobenius ray; dashed: training "
        f"(K, Q), and the nuclear ray. {STEPS:,} normalised gradient steps of 0.1, logistic loss."
    ),
    paper=PAPER,
    cases=CASES,
    trials=1,
    first_seed=1,
    run=_run,
    summarize=_summarize,
    draw=_draw,
)
