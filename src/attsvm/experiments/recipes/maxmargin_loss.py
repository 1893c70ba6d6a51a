"""Two sequences of unequal scores: how the loss bends the path of the prompt vector, and that its limit is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attsvm.experiments.recipes.plotting import PALETTE, panels, style
from attsvm.experiments.recipes.prompt_model import PAPER, cosine, max_margin, train_in_single_precision, train_prompts
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE"]

TOKENS = (((0.0, 0.0), (1.0, 1.0)), ((0.0, 0.0), (1.0, -1.0)))
SCALES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 100)
"""Scores C of the best token of the first sequence; that of the second one is 1, of the others 0."""

STEPS = 10_000
READ, LATER = 120, 1000
SHOWN = range(0, 201, 10)
RECORDED = (*SHOWN, LATER, STEPS)

TARGETS = {
    ("correlation", 1): (None, 0.0),
    ("correlation", 2): (11.95, 0.35),
    ("correlation", 5): (11.77, 0.80),
    ("correlation", 10): (11.61, 1.15),
    ("correlation", 100): (11.08, 2.30),
    ("logistic", 1): (None, 0.0),
    ("logistic", 2): (11.99, -0.06),
    ("logistic", 5): (11.89, -1.04),
    ("logistic", 10): (11.29, -3.19),
    ("logistic", 100): (8.38, -8.38),
}
"""p at step 120, as computed independently and as the published figure shows."""


def run(case: Case, seeds: Sequence[int]) -> list[Record]:
    """Trial 0 starts at p = 0 as published; every other trial at a draw from N(0, 1)."""
    return [_trial(case, seed) for seed in seeds]


def _trial(case: Case, seed: int) -> Record:
    tokens = torch.tensor(TOKENS, dtype=torch.float64)
    scores = torch.tensor([[[0.0, C], [0.0, 1.0]] for C in SCALES], dtype=torch.float64)
    start = torch.zeros(2, dtype=torch.float64)
    if seed:
        start = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    starts = start.expand(len(SCALES), 2)
    margin = max_margin(tokens, [1, 1])
    paths = train_prompts(
        tokens,
        scores,
        starts,
        record_steps=RECORDED,
        loss=case.values["loss"],
        learning_rate=case.values["learning_rate"],
    )
    toward = cosine(paths.p, margin.p)
    rounded = None
    if case.values["loss"] == "logistic":
        rounded = train_in_single_precision(tokens, scores, starts, steps=READ).tolist()
    return {
        "start": start.tolist(),
        "direction": margin.p,
        "best": bool((paths.selected == 1).all()),
        "read": paths.p[:, RECORDED.index(READ)].tolist(),
        "float32": rounded,
        "correlation": {str(step): toward[:, RECORDED.index(step)].tolist() for step in (LATER, STEPS)},
        "paths": paths.p[:, : len(SHOWN)].tolist(),
    }


def summarize(records: Sequence[Record]) -> Summary:
    """The p of step 120 for each loss and score, and how close to the common limit the runs end."""
    numbers = [number for record in records if record["trial"] == 0 for number in _published_numbers(record)]
    for loss in dict.fromkeys(r["case"] for r in records):
        found = [r for r in records if r["case"] == loss]
        numbers += [
            Number(
                text=f"{loss} loss: smallest correlation with the max-margin p over all C, {step} steps",
                ours=min(min(r["correlation"][str(step)]) for r in found),
                low=0.99 if step == STEPS else None,
                source="Theorem: the limit does not depend on the loss" if step == STEPS else "",
            )
            for step in (LATER, STEPS)
        ]
    rows = [
        (r["case"], C, *r["read"][k], r["correlation"][str(STEPS)][k])
        for r in records
        if r["trial"] == 0
        for k, C in enumerate(SCALES)
    ]
    return Summary(
        sentence="A larger score of the first sequence pulls p towards its token under the correlation loss and away "
        "from it under the logistic loss; the direction in the limit, (1, 0), is the same for all losses and scores.",
        numbers=numbers,
        tables=[
            Table(
                title=f"p at step {READ}, and the correlation with (1, 0) at step {STEPS}",
                columns=("loss", "C", "first entry", "second entry", "correlation"),
                rows=rows,
            )
        ],
        notes=[
            "Under the logistic and the exponential loss a sequence that has its score has hardly any slope left, so "
            "that the second entry stays negative: about -(C - log C) / 2 for large C, whatever the norm. The "
            "direction is close to its limit only when the norm is large beside C, for C = 100 after thousands of "
            "steps.",
            "For C = 100 and the logistic loss the first sequence has a slope of e^-50 from the start; the gradient "
            "of the second falls below 1e-6 by step 120. The published code adds 1e-9 to its norm, in float32, and is "
            "1 % behind the 120 steps of length 0.1.",
            "The published figure shows the correlation and the logistic loss; the exponential loss is in its code. "
            "Trial 0 starts at p = 0; further trials start at a draw from N(0, 1).",
        ],
    )


def _published_numbers(record: Record) -> list[Number]:
    numbers = []
    for (loss, C), target in TARGETS.items():
        if loss != record["case"]:
            continue
        k = SCALES.index(C)
        # Only here do the rounding of float32 and the published 1e-9 show within 120 steps.
        as_published = (loss, C) == ("logistic", 100)
        found = record["float32"][k] if as_published else record["read"][k]
        for entry, ours, published, exact in zip(("first", "second"), found, target, record["read"][k], strict=True):
            if published is None:
                continue
            text = f"{loss} loss, C = {C}: {entry} entry of p, {READ} steps"
            low, high = published - 0.01, published + 0.01
            source = "figure of the paths by loss"
            number = Number(text=text, ours=ours, published=published, low=low, high=high, source=source)
            if as_published:
                number = replace(number, text=f"{text} in float32, as published")
                numbers.append(Number(text=f"{text} in float64 without underflow", ours=exact))
            numbers.append(number)
    return numbers


def draw(figure: Figure, records: Sequence[Record]) -> None:
    """The paths of p, one panel for each loss."""
    losses = [case.name for case in RECIPE.cases]
    for ax, loss in zip(panels(figure, 1, len(losses), width=3.4, sharey=True), losses, strict=True):
        for record in [r for r in records if r["case"] == loss and r["trial"] == 0]:
            for k, C in enumerate(SCALES):
                shade, dash = PALETTE[0] if C < 100 else PALETTE[1], "-" if C < 100 else "--"
                label = {1: "C = 1 to 10", 100: "C = 100"}.get(C)
                ax.plot(
                    *zip(*record["paths"][k], strict=True),
                    dash,
                    color=shade,
                    alpha=min(1.0, 0.1 + 0.09 * C),
                    label=label,
                )
        ax.axhline(0.0, color="black", lw=1, ls=":", label="max-margin direction")
        ax.set(xlim=(-1, 12), ylim=(-6, 6))
        style(ax, f"{loss} loss", "first entry of p", "second entry of p" if loss == losses[0] else "")


RECIPE = Recipe(
    name="maxmargin-loss",
    title="Two sequences: the loss bends the path, not its limit",
    about="n = 2, T = 2: tokens (0, 0) and (1, 1) with score C, (0, 0) and (1, -1) with score 1. Normalised gradient "
    "descent on p with step 0.1 from p = 0, for C = 1 to 10 and 100.",
    paper=PAPER,
    cases=tuple(
        Case(name=loss, values={"loss": loss, "learning_rate": 0.1})
        for loss in ("correlation", "logistic", "exponential")
    ),
    trials=1,
    run=run,
    summarize=summarize,
    draw=draw,
)
