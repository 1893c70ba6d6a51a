"""Figure 1 of 2308.16898: two sequences in the plane, the max-margin rays, and training that turns to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from attsvm.experiments.recipes import plotting
from attsvm.experiments.recipes.draws import Draws
from attsvm.experiments.recipes.planar import (
    CASES,
    PATH_STEPS,
    STEPS,
    draw_boundary,
    draw_sequence,
    draw_tokens,
    run_planar,
    unit_draws,
)
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table
from attsvm.experiments.recipes.tfsvm import COMPUTED, PAPER, of_case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE"]

SEED = 3

MATRICES = {
    "fro": ((0.79255, -1.08647), (-0.63303, -0.34711)),
    "nuc": ((0.99375, -1.25966), (-0.13324, -0.25784)),
}
SINGULAR = {"fro": (1.34926, 0.71363), "nuc": (1.609, 0.2636)}
SCORES = ((1.0835, -0.3552, -0.7144, -0.6092, -1.0931), (0.8708, -0.7183, -0.6679, -0.7932, -0.6108))
PATH = {10: 0.9577, 50: 0.98725, 100: 0.99261, 200: 0.99658, 500: 0.99920, 1000: 0.99992}
SYMBOLS = {"fro": "W^mm", "nuc": "W^mm_*"}


def draw_data(seed: int) -> Draws:
    """Five tokens a sequence: the first is set, the others are 0.5 N(0, 1) moved by (-1, 0)."""

    def tokens(generator: torch.Generator) -> torch.Tensor:
        X = 0.5 * torch.randn(2, 5, 2, generator=generator)
        X[:, 0] = torch.tensor([[1.0, 0.5], [1.0, -0.5]])
        X[:, 1:] += torch.tensor([-1.0, 0.0])
        return X

    return unit_draws(seed, tokens)


def _run(case: Case, seeds: Sequence[int]) -> list[Record]:
    return run_planar(draw_data, case, seeds)


def _summarize(records: Sequence[Record]) -> Summary:
    numbers = []
    for record in of_case(records, "W")[:1]:
        numbers += _of_solutions(record) + _of_training(record)
    for record in of_case(records, "KQ")[:1]:
        known = record["trial"] == SEED
        numbers += [
            _number("training (K, Q): corr. with W^mm_*", record["published_to_nuc"][-1], 0.99985, 1e-4, known),
            _number("training (K, Q): corr. with W^mm", record["published_to_fro"][-1], 0.931, 1e-3, known),
        ]
    rows = [
        [name, step, *(record[prefix + field][place] for field in ("norm", "to_fro", "to_nuc"))]
        for case in CASES
        for record in of_case(records, case.name)[:1]
        for name, prefix in ((case.name, ""), (f"{case.name}, published step", "published_"))
        for place, step in enumerate(PATH_STEPS)
        if step in (*PATH, STEPS)
    ]
    return Summary(
        sentence="Training W turns W z of both queries to the Frobenius max-margin rays, training (K, Q) to the "
        "nuclear ones.",
        numbers=numbers,
        tables=[
            Table(
                title="Along the path",
                columns=["trained", "step", "||W||_F", "corr. with W^mm", "corr. with W^mm_*"],
                rows=rows,
            )
        ],
        notes=[
            "Artefact: the published step divides the gradient by its norm plus 2.2e-16, so that W stands still from "
            "||W|| = 57 on, and its small penalty holds K and Q back. The picture shows the step that does not "
            "underflow, with which ||W|| grows by 0.1 a step to the end; the numbers of the training are those of "
            "the published step.",
            "Start: W = 0; K = 0.1 N(0, 1) and Q = 0 for (K, Q), where the published draw has no seed.",
        ],
    )


def _number(text: str, ours: float, expected: float, slack: float, known: bool) -> Number:
    """Compared only for the published seed."""
    if not known:
        return Number(text=text, ours=ours)
    return Number(text=text, ours=ours, low=expected - slack, high=expected + slack, source=COMPUTED)


def _of_solutions(record: Record) -> list[Number]:
    known = record["trial"] == SEED
    numbers = []
    for norm, matrix in MATRICES.items():
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                text = f"{SYMBOLS[norm]}, entry ({i + 1}, {j + 1})"
                numbers.append(_number(text, record[norm][i][j], value, 5e-5, known))
        for i, value in enumerate(SINGULAR[norm]):
            text = f"{SYMBOLS[norm]}, singular value {i + 1}"
            numbers.append(_number(text, record[f"{norm}_singular"][i], value, 5e-4 if norm == "nuc" else 5e-5, known))
    numbers.append(_number("corr. of W^mm and W^mm_*", record["between"], 0.93624, 5e-5, known))
    for i, scores in enumerate(SCORES):
        for t, value in enumerate(scores):
            text = f"score of token {t + 1} of sequence {i + 1}"
            numbers.append(_number(text, record["scores"][i][t], value, 6e-5, known))
    return numbers


def _of_training(record: Record) -> list[Number]:
    known = record["trial"] == SEED
    numbers = []
    for step, value in PATH.items():
        ours = record["published_to_fro"][PATH_STEPS.index(step)]
        numbers.append(_number(f"training W: corr. with W^mm, step {step}", ours, value, 1e-4, known))
    for step, value in ((100, 9.94), (200, 19.93), (500, 49.74), (2000, 57.5)):
        ours = record["published_norm"][PATH_STEPS.index(step)]
        numbers.append(_number(f"training W: ||W||_F, step {step}", ours, value, 0.01 if step < STEPS else 1.0, known))
    return numbers


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    axes = plotting.panels(figure, 1, 2, width=4.6, height=3.9)
    for ax, (which, norm) in zip(axes, (("W", "fro"), ("KQ", "nuc")), strict=True):
        for record in of_case(records, which)[:1]:
            for i in range(2):
                draw_boundary(ax, record, norm, i)
                draw_sequence(ax, record, norm, i, label=f"W(k) z_{i + 1} and ray {SYMBOLS[norm]} z_{i + 1}")
            draw_tokens(ax, record)
        ax.set(xlim=(-2.0, 10.0), ylim=(-5.0, 5.0))
        plotting.style(ax, f"Training {which}", legend="outside")


RECIPE = Recipe(
    name="tfsvm-fig1",
    title="Two sequences in the plane: training turns to the max-margin rays",
    about=(
        "Two sequences of five tokens in the plane. Stars are the tokens of highest score; rays are W^mm z of both "
        "queries, for the Frobenius solution (left) and the nuclear one (right); dotted lines separate the optimal "
        "token from the others; dots are W(k) z along 2,000 normalised gradient steps of 0.1 in W (left) and in "
        "(K, Q) (right)."
    ),
    paper=PAPER,
    cases=CASES,
    trials=1,
    first_seed=SEED,
    run=_run,
    summarize=_summarize,
    draw=_draw,
)
