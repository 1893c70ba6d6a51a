"""A recipe that takes no time, for what only real processes can show; ``install`` is the ``before`` of a command."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from attsvm.experiments.recipes import Case, Number, Paper, Recipe, Record, Summary, Table

PAUSE = 0.0
"""Seconds that a chunk takes; set in the process of a test that wants to come in between."""


def run(case: Case, seeds: Sequence[int]) -> list[Record]:
    time.sleep(PAUSE)
    records = []
    for seed in seeds:
        draw = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * case.values["scale"]
        value = float(draw[0])
        records.append({"value": value, "curve": draw.tolist(), "undefined": float("nan"), "accepted": value > 0.5})
    return records


def summarize(records: Sequence[Record]) -> Summary:
    assert all(record["undefined"] is None for record in records), "records come as they are on disk"
    values = [record["value"] for record in records if record["accepted"]]
    mean = sum(values) / len(values) if values else None
    return Summary(
        sentence="The mean is the mean.",
        numbers=[
            Number(
                text="mean of the values [in brackets]", ours=mean, published=1.0, low=0.0, high=2.0, source="Fig. 1"
            ),
            Number(text="a number that cannot be", ours=mean, low=5.0, source="Theorem 2"),
            Number(text="trials", ours=len(records)),
        ],
        tables=[Table(title="Values", columns=("case", "value"), rows=[(r["case"], r["value"]) for r in records[:3]])],
        notes=["A note."],
    )


def draw(figure: Any, records: Sequence[Record]) -> None:
    ax = figure.subplots()
    for record in records:
        ax.plot(record["curve"])


CASES = (Case(name="a=1", values={"scale": 1.0}), Case(name="a=2", values={"scale": 2.0}))


def recipe(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "toy",
        "title": "Uniform numbers",
        "about": "Numbers from [0, a].",
        "paper": Paper(title="On numbers", authors="A. Author", year=2024, arxiv="2401.00001"),
        "cases": CASES,
        "trials": 10,
        "run": run,
        "summarize": summarize,
        "draw": draw,
        "chunk": 3,
    }
    return Recipe(**{**settings, **changes})


def fail(case: Case, seeds: Sequence[int]) -> list[Record]:
    raise ValueError("the loss diverged\nat step 3")


RECIPES = {
    "toy": recipe(),
    "toy-scan": recipe(name="toy-scan", scan=60, trials=12),
    "toy-fails": recipe(name="toy-fails", run=fail),
}


def install(pause: float = 0.0) -> None:
    """In the process of a command: these recipes in place of the published ones."""
    global PAUSE
    from attsvm.cli import reproduce
    from attsvm.experiments.recipes import registry

    PAUSE = pause
    registry.NAMES = reproduce.NAMES = tuple(RECIPES)
    reproduce.find_recipe = RECIPES.__getitem__


def install_slow() -> None:
    install(0.3)


def install_very_slow() -> None:
    install(30.0)
