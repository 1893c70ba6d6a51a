"""Small folders of recipes as ``attsvm reproduce`` leaves them, made up from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attsvm.experiments.recipes import Case, Paper, Recipe, Record, Summary
from attsvm.experiments.recipes.plotting import COLORS, band, bars, draw_figure, mark_published, panels, style
from attsvm.records import RunFolder

Result = dict[str, Any]
Change = Callable[[Result], None]

TOKEN_SELECTION = {"title": "Transformers as Support Vector Machines", "authors": "Tarzanagh, Li, Thrampoulidis, Oymak"}
PAPERS = {
    "2308.16898": {**TOKEN_SELECTION, "year": 2023, "arxiv": "2308.16898"},
    "2402.05738": {
        "title": "Implicit bias and fast convergence rates for self-attention",
        "authors": "Vasudeva, Deora, Thrampoulidis",
        "year": 2024,
        "arxiv": "2402.05738",
    },
}
STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
HOSTILE = "</script><script>window.pwned=1</script>\u202e<img src=x onerror=window.pwned=2>\x00{{ 7*7 }}"


def number(
    text: str, ours: float | None, published: float | None = None, low: float | None = None, high: float | None = None
) -> Result:
    """One number with the verdict that its range gives."""
    verdict = "not published"
    if low is not None or high is not None:
        inside = ours is not None and (low is None or low <= ours) and (high is None or ours <= high)
        verdict = "met" if inside else "differs"
    return {
        "text": text,
        "ours": ours,
        "published": published,
        "low": low,
        "high": high,
        "source": "Fig. 5(b)" if published is not None else "independent computation" if low is not None else "",
        "verdict": verdict,
    }


def make_trials(count: int = 120) -> list[Record]:
    """Records of two cases: numbers, a string, a gap, and a curve."""
    generator = np.random.default_rng(5)
    records = []
    for case in ("d=4", "d=10"):
        for trial in range(count // 2):
            correlation = float(generator.uniform(0.6, 1.0))
            rise = 1 - np.exp(-np.array(STEPS) / 60.0)
            records.append(
                {
                    "case": case,
                    "trial": trial,
                    "correlation": correlation,
                    "rank": int(generator.integers(1, 5)) if trial % 7 else None,
                    "verdict": ("global", "local", "neither")[trial % 3],
                    "feasible": bool(trial % 5),
                    "curve": (correlation * rise).tolist(),
                }
            )
    return records


def make_result(name: str, arxiv: str = "2308.16898", title: str | None = None) -> Result:
    """The record of one recipe."""
    return {
        "kind": "reproduce",
        "name": name,
        "title": title or f"Global convergence, as in {name}",
        "about": "Normalised gradient descent on W and on (K, Q), 6 sequences of 8 tokens on the unit sphere, seeds 0 "
        "to 99; the direction is compared with both max-margin solutions.",
        "paper": PAPERS[arxiv],
        "cases": [
            {"name": "d=4", "values": {"n": 6, "T": 8, "d": 4}, "trials": 60},
            {"name": "d=10", "values": {"n": 6, "T": 8, "d": 10, "init": "zeros"}, "trials": 60, "accepted": 58},
        ],
        "sentence": "W goes to the Frobenius solution and (K, Q) to the nuclear one in every trial.",
        "numbers": [
            number("correlation of W with the Frobenius solution", 0.9934, 0.99, 0.98, 1.0),
            number("correlation of (K, Q) with the nuclear solution", 0.84996, 0.9, 0.85, 0.95),
            number("share of feasible problems, d = 4", 1.0, None, 0.97, None),
            number("largest step until the first margin", 3.2e-7),
        ],
        "tables": [
            {
                "title": "Feasible problems by dimension",
                "columns": ["d", "feasible", "rank of the nuclear solution", "remark"],
                "rows": [[2, 0.31, None, "most are infeasible"], [4, 0.97, 1.31, ""], [10, 1.0, 1.94, "all"]],
            }
        ],
        "notes": [
            "The published code counts an infeasible problem as one of rank 1; the table leaves it out.",
            "Singular values below 10⁻⁶ of the largest are solver noise.",
        ],
        "counts": {"trials": 120, "met": 2, "differs": 1, "not_published": 1},
    }


def draw(figure: Any, records: Sequence[Record]) -> None:
    """A band for each case, and bars beside published values."""
    left, right = panels(figure, 1, 2)
    cases = list(dict.fromkeys(record["case"] for record in records))
    for case, key in zip(cases, ("W", "KQ"), strict=False):
        band(left, STEPS, [one["curve"] for one in records if one["case"] == case], case, COLORS[key])
    left.set_xscale("log")
    style(left, "Correlation", "training step", "correlation", legend="outside")
    bars(right, cases, {"W": [0.9, 0.7], "(K, Q)": [0.8, None]})
    mark_published(right, [0, 1], [0.88, 0.72])
    style(right, "At the end", "", "correlation", legend="outside")


def write_recipe(folder: Path, result: Result, records: Sequence[Record] | None = None, figure: bool = True) -> Path:
    """Write the folder of a finished recipe."""
    folder.mkdir(parents=True)
    records = make_trials() if records is None else records
    run = RunFolder(folder)
    write_config(folder, result["name"])
    (folder / "trials.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    if figure:
        recipe = Recipe(
            name=result["name"],
            title="",
            about="",
            paper=Paper(title="", authors="", year=2023, arxiv=""),
            cases=[Case(name="d=4")],
            trials=1,
            run=lambda case, seeds: [],
            summarize=lambda records: Summary(sentence="", numbers=[]),
            draw=draw,
        )
        draw_figure(recipe, make_trials(), folder)
    run.write_result(result)
    return folder


def write_config(folder: Path, name: str) -> None:
    """Write the settings, which an unfinished run has too."""
    RunFolder(folder).write_config(
        {
            "kind": "reproduce",
            "name": name,
            "command": f"attsvm reproduce {name} --seed 0 --output-dir runs/reproduce",
            "versions": {"attsvm": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "created": "2026-01-02T03:04:05Z",
            "computing_seconds": 12.5,
            "config": {"trials": None, "seed": 0, "cases": {"d=4": 60, "d=10": 60}},
        }
    )


def make_hostile(result: Result) -> None:
    """Put text that would break out of the page into every place that takes text."""
    result |= {"title": HOSTILE, "about": HOSTILE, "sentence": HOSTILE, "notes": [HOSTILE], "name": "hostile"}
    result["paper"] = {"title": HOSTILE, "authors": HOSTILE, "year": 2023, "arxiv": "javascript:alert(1)"}
    result["cases"] = [{"name": HOSTILE, "values": {HOSTILE: HOSTILE}, "trials": 1}]
    result["numbers"].append({**number(HOSTILE, 1.0), "source": HOSTILE})
    result["tables"].append({"title": HOSTILE, "columns": [HOSTILE, "x"], "rows": [[HOSTILE, 1e-300]]})


def hostile_trials() -> list[Record]:
    """Records with hostile names and values."""
    return [{"case": HOSTILE, "trial": 2**70, HOSTILE: "=cmd|'/C calc'!A0", "curve": [HOSTILE]}]


def write_gallery(home: Path) -> Path:
    """A gallery with three finished recipes, one of them hostile, an unfinished one and a damaged one."""
    home.mkdir()
    write_recipe(home / "tfsvm-fig10", make_result("tfsvm-fig10"))
    write_recipe(home / "tfsvm-fig2", make_result("tfsvm-fig2"), figure=False)
    rates = make_result("rates", "2402.05738", "Rates of four optimisers")
    rates["numbers"] = rates["numbers"][:1]
    write_recipe(home / "rates", rates)
    hostile = make_result("hostile")
    make_hostile(hostile)
    write_recipe(home / "hostile", hostile, hostile_trials(), figure=False)
    (home / "cones").mkdir()
    write_config(home / "cones", "cones")
    damaged = write_recipe(home / "flow", make_result("flow"), figure=False)
    (damaged / "result.json").write_text('{"schema_version": 1, "kind": "reproduce", "name": 3}', encoding="utf-8")
    (home / "of somebody else").mkdir()
    (home / "of somebody else" / "notes.txt").write_text("not a run", encoding="utf-8")
    return home
