"""One sequence of three tokens: which token the prompt vector selects depends on where it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from attsvm.experiments.recipes.plotting import PALETTE, panels, style
from attsvm.experiments.recipes.prompt_model import PAPER, cosine, max_margin, train_in_single_precision, train_prompts
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE"]

KEYS = ((-0.1, 1.0), (1.0, 0.0), (0.0, 0.0))
HEIGHTS = (1.0, 0.5, 0.0, -0.5, -1.0, -1.5)
STEPS = 1000
SHOWN = 200
RECORDED = (*range(0, SHOWN + 1, 8), STEPS)


def run(case: Case, seeds: Sequence[int]) -> list[Record]:
    """Trial 0 has the published starts (0, y); every other trial draws six starts from N(0, 1)."""
    return [_trial(case, seed) for seed in seeds]


def _trial(case: Case, seed: int) -> Record:
    tokens = torch.tensor([KEYS], dtype=torch.float64)
    scores = torch.tensor([[1.0, 0.9, case.values["last_score"]]], dtype=torch.float64)
    starts = torch.tensor([(0.0, y) for y in HEIGHTS], dtype=torch.float64)
    if seed:
        starts = torch.randn(len(HEIGHTS), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    paths = train_prompts(tokens, scores, starts, record_steps=RECORDED, learning_rate=case.values["learning_rate"])
    margins = [max_margin(tokens, [token]) for token in (0, 1)]
    selected = paths.selected[:, 0].tolist()
    # Token 2 lies between the others: no p selects it, so that it has no solution to compare with.
    ends = [float(cosine(p[-1], margins[t].p)) if t < 2 else None for p, t in zip(paths.p, selected, strict=True)]
    return {
        "starts": starts.tolist(),
        "selected": selected,
        "shown": paths.p[:, RECORDED.index(SHOWN)].tolist(),
        "float32": train_in_single_precision(tokens, scores, starts, steps=SHOWN).tolist(),
        "correlation": ends,
        "half": [margin.half for margin in margins],
        "directions": [margin.p for margin in margins],
        "paths": paths.p[:, :-1].tolist(),
    }


def summarize(records: Sequence[Record]) -> Summary:
    """The two max-margin solutions, and the token that each start selects."""
    by_case = {name: [r for r in records if r["case"] == name] for name in ("global", "local")}
    numbers = []
    if records:
        numbers += _solution_numbers(records[0])
    for name, wanted in (("global", (0, 0, 0, 0, 0, 0)), ("local", (0, 0, 0, 0, 1, 1))):
        published = [r for r in by_case[name] if r["trial"] == 0]
        for record in published:
            numbers += _start_numbers(name, record, wanted)
    ends = [c for r in records for c in r["correlation"] if c is not None]
    numbers.append(
        Number(
            text=f"smallest correlation of p with the solution of the token it selects, {STEPS} steps",
            ours=min(ends, default=None),
            low=0.99,
            source="Theorem on local convergence (limit 1)",
        )
    )
    rows = [
        (name, len(found), *(sum(r["selected"].count(token) for r in found) for token in (0, 1, 2)))
        for name, found in by_case.items()
    ]
    return Summary(
        sentence="With equal scores of the other tokens every start selects the best token; otherwise two of the six "
        "published starts end in the second best one, each in the direction of the max-margin solution of its token.",
        numbers=numbers,
        tables=[
            Table(
                title="Starts by the token they select",
                columns=("case", "trials of six starts", "best token", "second token", "third token"),
                rows=rows,
            )
        ],
        notes=[
            "Trial 0 has the six published starts (0, y); further trials draw starts from N(0, 1).",
            "The published runs are in float32 with 1e-9 added to the norm of the gradient. Once the other tokens have "
            "less than 6e-8 of the attention their gradient is lost, and p hardly moves beyond a norm of about 16.7; "
            "what its second entry does then is rounding. Computed without underflow p goes on, to 19.9 at step 200.",
        ],
    )


def _solution_numbers(record: Record) -> list[Number]:
    printed = "printed by the code of the figure"
    best, second = record["half"]
    x, y = record["directions"][0]
    return [
        Number(
            text="half the squared norm of the max-margin p, best token",
            ours=best,
            published=0.49505,
            low=0.495045,
            high=0.495055,
            source=printed,
        ),
        Number(
            text="half the squared norm of the max-margin p, second token",
            ours=second,
            published=0.5,
            low=0.499995,
            high=0.500005,
            source=printed,
        ),
        Number(text="max-margin p of the best token, first entry", ours=x, low=-0.09902, high=-0.09900, source="exact"),
        Number(text="max-margin p of the best token, second entry", ours=y, low=0.99009, high=0.99011, source="exact"),
    ]


def _start_numbers(name: str, record: Record, wanted: Sequence[int]) -> list[Number]:
    right = sum(token == target for token, target in zip(record["selected"], wanted, strict=True))
    text = "published starts that select the token of the figure"
    numbers = [
        Number(text=f"{name}: {text}, of six", ours=right, published=6, low=6, high=6, source="figure of the paths")
    ]
    if name == "local":
        for k, target in ((4, 16.6), (5, 16.7)):
            start = f"(0, {HEIGHTS[k]})"
            numbers += [
                Number(
                    text=f"local: first entry of p from {start}, {SHOWN} steps in float32, as published",
                    ours=record["float32"][k][0],
                    low=target - 0.1,
                    high=target + 0.1,
                    source="independent computation",
                ),
                Number(
                    text=f"local: first entry of p from {start}, {SHOWN} steps without underflow",
                    ours=record["shown"][k][0],
                ),
            ]
    return numbers


def draw(figure: Figure, records: Sequence[Record]) -> None:
    """The paths of p in the plane of the keys, one panel for each case."""
    names = ("global", "local")
    for ax, name in zip(panels(figure, 1, 2, sharex=True, sharey=True), names, strict=True):
        for record in [r for r in records if r["case"] == name][:1]:
            for path in record["paths"]:
                ax.plot(*zip(*path, strict=True), color="0.5", lw=1.2)
            for (x, y), color in zip(record["directions"], PALETTE, strict=False):
                ax.plot((0, 20 * x), (0, 20 * y), "--", color=color, label=f"max-margin ({x:.2f}, {y:.2f})")
        for (x, y), mark in zip(KEYS, ("*", "^", "v"), strict=True):
            ax.plot(x, y, mark, color="black", ms=9)
        style(ax, name, "first entry of p", "second entry of p")
        ax.set(xlim=(-4, 6), ylim=(-2, 8))


RECIPE = Recipe(
    name="maxmargin-single",
    title="One sequence: the token that a prompt vector selects",
    about="n = 1, T = 3, keys (-0.1, 1), (1, 0), (0, 0). Normalised gradient descent on the prompt vector p with step "
    "0.1 from six starts. Scores 1, 0.9, 0.9 (global) and 1, 0.9, 0 (local); logistic loss.",
    paper=PAPER,
    cases=(
        Case(name="global", values={"last_score": 0.9, "learning_rate": 0.1}),
        Case(name="local", values={"last_score": 0.0, "learning_rate": 0.1}),
    ),
    trials=1,
    run=run,
    summarize=summarize,
    draw=draw,
)
