"""Head and prompt vector trained together: each goes to its own max-margin direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attsvm.dynamics import LinearHead, descend
from attsvm.experiments.recipes.plotting import PALETTE, panels, style
from attsvm.experiments.recipes.prompt_model import PAPER, PROMPT_QUERY, cosine, max_margin, prompt_problem
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE"]

LABELS = (1.0, -1.0, 1.0)
BEST = (1, 1, 1)
STEPS = 1000
SHOWN = 200
EVERY = 5
READ = (8, 29, 49, 99, 199, 999)
"""Steps at which the published code shows the 9th, 30th, 50th, 100th, 200th and last of its iterates."""


def run(case: Case, seeds: Sequence[int]) -> list[Record]:
    """Trial 0 starts at p = (0, -1), v = (-1, 0) as published; every other trial at a draw from N(0, 1)."""
    return [_trial(case, seed) for seed in seeds]


def draw_tokens(last: float) -> Tensor:
    """Three sequences of (0, 0) and a token that carries the label; the last one is (0.5, ``last``)."""
    return torch.tensor([[[0, 0], [1, 1]], [[0, 0], [1, -1]], [[0, 0], [0.5, last]]], dtype=torch.float64)


def solutions(tokens: Tensor) -> dict[str, list[float]]:
    """Max-margin v of the best tokens, p for all sequences, and p with the margin asked of v's support alone."""
    labels = torch.tensor(LABELS, dtype=torch.float64)
    signed = labels.unsqueeze(-1) * tokens[:, 1]
    # v is the prompt vector of sequences (0, Y x): v^T (Y x) >= 1.
    v = torch.tensor(max_margin(torch.stack([torch.zeros_like(signed), signed], 1), BEST).p, dtype=torch.float64)
    support = signed @ v <= 1.0 + 1e-6
    margins = support.double().view(-1, 1, 1).expand(-1, 1, 2)
    return {"v": v.tolist(), "tight": max_margin(tokens, BEST).p, "relaxed": max_margin(tokens, BEST, margins).p}


def _trial(case: Case, seed: int) -> Record:
    tokens = draw_tokens(case.values["last"])
    p, v = torch.tensor([0.0, -1.0], dtype=torch.float64), torch.tensor([-1.0, 0.0], dtype=torch.float64)
    if seed:
        p, v = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    trajectory = descend(
        prompt_problem(tokens, BEST),
        parameterization="p",
        head=LinearHead(v, trained=True),
        labels=torch.tensor(LABELS, dtype=torch.float64),
        learning_rate=case.values["learning_rate"],
        steps=STEPS,
        record_every=1,
        init=p,
    )
    found = solutions(tokens)
    paths, heads = trajectory.W[..., PROMPT_QUERY], trajectory.head
    attention = torch.softmax(torch.einsum("ntd,kd->knt", tokens, paths), -1)
    outputs = torch.einsum("knt,ntd,kd->kn", attention, tokens, heads) * torch.tensor(LABELS, dtype=torch.float64)
    mean_attention, mean_label = attention[..., 1].mean(-1), torch.sigmoid(outputs).mean(-1)
    shown = slice(0, SHOWN + 1, EVERY)
    return {
        "solutions": found,
        "rested": _rested(tokens, p, v, case.values["learning_rate"]).tolist(),
        "best": bool((trajectory.selected.squeeze(-1) == 1).all()),
        "p": paths[list(READ)].tolist(),
        "v": heads[list(READ)].tolist(),
        "attention": mean_attention[list(READ)].tolist(),
        "label": mean_label[list(READ)].tolist(),
        "first_attention": float(mean_attention[0]),
        "least_attention": float(mean_attention.min()),
        "least_at": int(mean_attention.argmin()),
        **{f"p_to_{name}": float(cosine(paths[-1], found[name])) for name in ("tight", "relaxed")},
        "v_to_v": float(cosine(heads[-1], found["v"])),
        "shown": {
            "p": paths[shown].tolist(),
            "v": heads[shown].tolist(),
            "attention": mean_attention[shown].tolist(),
            "label": mean_label[shown].tolist(),
        },
    }


def _rested(tokens: Tensor, p: Tensor, v: Tensor, rate: float) -> Tensor:
    """The last p of the same steps with gradients in plain float64, which come to rest."""
    tiny = 1e-300
    labels = torch.tensor(LABELS, dtype=torch.float64)
    for _ in range(STEPS - 1):
        s = torch.softmax(tokens @ p, -1)
        pooled = torch.einsum("nt,ntd->nd", s, tokens)
        slope = -labels * torch.sigmoid(-labels * (pooled @ v)) / len(labels)
        values = slope.unsqueeze(-1) * (tokens @ v)
        gradient = torch.einsum("ntd,nt->d", tokens, s * (values - (s * values).sum(-1, keepdim=True)))
        turn = slope @ pooled
        p = p - rate * gradient / (torch.linalg.vector_norm(gradient) + tiny)
        v = v - rate * turn / (torch.linalg.vector_norm(turn) + tiny)
    return p


def summarize(records: Sequence[Record]) -> Summary:
    """Directions of p and v, and how attention and the label's probability grow."""
    numbers = []
    for record in [r for r in records if r["trial"] == 0]:
        numbers += _solution_numbers(record)
        numbers += _tight_numbers(record) if record["case"] == "tight" else []
        numbers += [
            Number(
                text=f"{record['case']}: correlation of v with the max-margin v, {STEPS} steps",
                ours=record["v_to_v"],
                low=0.999,
                source="Theorem on joint training (limit 1)",
            ),
            *(
                Number(
                    text=f"{record['case']}: correlation of p with the {name} max-margin p, {STEPS} steps",
                    ours=record[f"p_to_{name}"],
                )
                for name in ("tight", "relaxed")
            ),
        ]
    rows = [
        (name, len(found), sum(r["best"] for r in found), *(_mean(found, key) for key in _CORRELATIONS))
        for name in ("tight", "relaxed")
        if (found := [r for r in records if r["case"] == name])
    ]
    return Summary(
        sentence="The head turns to the max-margin classifier of the selected tokens, and p to the max-margin "
        "direction of token selection: (4, 1) when all sequences are support vectors of the head.",
        numbers=numbers,
        tables=[
            Table(
                title=f"All trials, correlations at step {STEPS}",
                columns=("case", "trials", "best tokens selected", "p, tight", "p, relaxed", "v"),
                rows=rows,
            )
        ],
        notes=[
            "In the relaxed case the third sequence is no support vector of the head, and p need not give it a margin: "
            "p turns to (1, 0), the solution that asks a margin of the other two alone.",
            "The independently computed direction of the last iterate, (0.970, 0.243), is nearer to the limit than "
            "that of steps without underflow, by accident: in plain float64 the gradient of p is rounding, and then 0, "
            "once every probability rounds to 1, and p rests at a norm of about 50.",
            "Trial 0 has the published start; further trials draw p and v from N(0, 1).",
        ],
    )


_CORRELATIONS = ("p_to_tight", "p_to_relaxed", "v_to_v")


def _mean(records: Sequence[Record], key: str) -> float:
    total: float = sum(r[key] for r in records)
    return total / len(records)


def _solution_numbers(record: Record) -> list[Number]:
    name = record["case"]
    printed = "printed by the code of the figure"
    numbers = []
    for kind, target in (
        ("tight", 17 / 18 if name == "tight" else 0.8125),
        ("relaxed", None if name == "tight" else 0.5),
    ):
        if target is None:
            continue
        x, y = record["solutions"][kind]
        published = None if (name, kind) == ("relaxed", "tight") else target
        numbers.append(
            Number(
                text=f"{name}: half the squared norm of the {kind} max-margin p",
                ours=(x * x + y * y) / 2,
                published=published,
                low=target - 5e-6,
                high=target + 5e-6,
                source="exact" if published is None else printed,
            )
        )
    return numbers


def _tight_numbers(record: Record) -> list[Number]:
    own, figure = "independent computation", "figure of softmax and logistic probabilities"
    (x, y), norm = record["solutions"]["tight"], sum(c * c for c in record["solutions"]["tight"]) ** 0.5
    numbers = [
        Number(
            text="tight: direction of the max-margin p, first entry",
            ours=x / norm,
            low=4 / 17**0.5 - 1e-6,
            high=4 / 17**0.5 + 1e-6,
            source="exact, (4, 1) / sqrt 17",
        ),
        Number(
            text="tight: direction of the max-margin p, second entry",
            ours=y / norm,
            low=1 / 17**0.5 - 1e-6,
            high=1 / 17**0.5 + 1e-6,
            source="exact, (4, 1) / sqrt 17",
        ),
    ]
    reached = {step + 1: record["p"][READ.index(step)] for step in (99, 199, 999)}
    for text, p, target in (
        ("iterate 100", reached[100], (0.978, 0.208)),
        ("iterate 200", reached[200], (0.974, 0.225)),
        ("iterate 1000, plain float64", record["rested"], (0.970, 0.243)),
        ("iterate 1000, without underflow", reached[1000], (None, None)),
    ):
        size = sum(c * c for c in p) ** 0.5
        for entry, ours, aim in zip(("first", "second"), p, target, strict=True):
            numbers.append(
                Number(
                    text=f"tight: direction of p, {entry} entry, {text}",
                    ours=ours / size,
                    low=None if aim is None else aim - 0.001,
                    high=None if aim is None else aim + 0.001,
                    source="" if aim is None else own,
                )
            )
    for key, text, targets in (
        ("attention", "softmax probability", (0.70, 0.93, 0.998)),
        ("label", "logistic probability", (0.854, 0.987, 0.9999)),
    ):
        for step, aim in zip((29, 49, 99), targets, strict=True):
            numbers.append(
                Number(
                    text=f"tight: {text}, iterate {step + 1}",
                    ours=record[key][READ.index(step)],
                    low=aim - 0.005,
                    high=aim + 0.005,
                    source=own,
                )
            )
    numbers += [
        Number(
            text="tight: softmax probability at the start",
            ours=record["first_attention"],
            published=0.42,
            low=0.415,
            high=0.425,
            source=figure,
        ),
        Number(
            text="tight: smallest softmax probability on the way",
            ours=record["least_attention"],
            published=0.38,
            low=0.375,
            high=0.385,
            source=figure,
        ),
        Number(
            text="tight: step of the smallest softmax probability",
            ours=record["least_at"],
            published=8,
            low=6,
            high=10,
            source=figure,
        ),
    ]
    return numbers


def draw(figure: Figure, records: Sequence[Record]) -> None:
    """Paths of p and v, and the probabilities, of the published start."""
    names = ("tight", "relaxed")
    axes = panels(figure, 2, 2)
    for k, name in enumerate(names):
        plane, chances = axes[2 * k : 2 * k + 2]
        for record in [r for r in records if r["case"] == name and r["trial"] == 0]:
            shown, found = record["shown"], record["solutions"]
            for key, color in (("p", PALETTE[1]), ("v", PALETTE[0])):
                plane.plot(*zip(*shown[key], strict=True), color=color, label=f"path of {key}")
            for key, color in ((name, PALETTE[1]), ("v", PALETTE[0])):
                x, y = found[key]
                label = "max-margin v" if key == "v" else f"{key} max-margin p"
                plane.plot((0, 15 * x), (0, 15 * y), "--", color=color, label=label)
            steps = range(0, SHOWN + 1, EVERY)
            chances.plot(steps, shown["attention"], color=PALETTE[1], label="softmax")
            chances.plot(steps, shown["label"], "--", color=PALETTE[0], label="logistic")
        style(plane, f"{name}", "first entry", "second entry")
        plane.set(xlim=(-2, 15), ylim=(-3, 12))
        style(chances, f"{name}", "step", "mean probability")


RECIPE = Recipe(
    name="maxmargin-joint",
    title="Head and prompt vector trained together",
    about="n = 3, T = 2: (0, 0) and (1, 1) with label 1, (0, 0) and (1, -1) with label -1, (0, 0) and (0.5, 1) (tight) "
    "or (0.5, 1.5) (relaxed) with label 1. Normalised gradient descent with step 0.1 on p and on v, from p = (0, -1) "
    "and v = (-1, 0); logistic loss.",
    paper=PAPER,
    cases=(
        Case(name="tight", values={"last": 1.0, "learning_rate": 0.1}),
        Case(name="relaxed", values={"last": 1.5, "learning_rate": 0.1}),
    ),
    trials=1,
    run=run,
    summarize=summarize,
    draw=draw,
)
