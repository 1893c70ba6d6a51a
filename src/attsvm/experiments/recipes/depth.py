"""Attention layers in depth: is each layer of a trained stack the max-margin separator of its own selections?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attsvm.dynamics.stack import StackLayer, StackPath, descend_stack
from attsvm.experiments.recipes.draws import draw_unit_sphere
from attsvm.experiments.recipes.recipe import Case, Number, Paper, Recipe, Record, Summary, Table
from attsvm.selection import TokenSelection, correlation
from attsvm.solvers import Status, solve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attsvm.experiments.recipes.plotting import Curve

__all__ = ["RECIPE"]

PAPER = Paper(title="attsvm: beyond the papers", authors="the attsvm developers", year=2026, arxiv="")

SIZES = {"n": 4, "T": 5, "d": 20, "steps": 1000, "rate": 0.05, "scale": 0.1}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"residual": 0, "mlp": 0},
    "residual": {"residual": 1, "mlp": 0},
    "MLP": {"residual": 0, "mlp": 40},
    "residual + MLP": {"residual": 1, "mlp": 40},
}

SINGLE = "1 layer"

CASES = (
    Case(name=SINGLE, values={**SIZES, "depth": 1, **VARIANTS["plain"]}),
    *(
        Case(name=f"{depth} layers, {name}", values={**SIZES, "depth": depth, **variant})
        for depth in (2, 4)
        for name, variant in VARIANTS.items()
    ),
)

QUANTITIES = ("used", "used_null", "all", "all_null")
"""Correlations of a layer with the SVM of its selections and, as a null, of random ones; of the queries in use, and of
all queries."""


def run(case: Case, seeds: Sequence[int]) -> list[Record]:
    """Train the stacks of a chunk together, then solve the problem of each layer."""
    at = case.values
    data = draw_unit_sphere(seeds, n=at["n"], T=at["T"], d=at["d"], self_attention=True)
    path = descend_stack(
        data.tokens,
        data.labels,
        data.v,
        depth=at["depth"],
        residual=bool(at["residual"]),
        mlp=at["mlp"] or None,
        learning_rate=at["rate"],
        steps=at["steps"],
        init_scale=at["scale"],
        seeds=list(seeds),
        record_steps=[0],
    )
    layers = [_examined(layer, index, seeds) for index, layer in enumerate(path.layers)]
    return [_record(path, layers, i) for i in range(len(seeds))]


def _record(path: StackPath, layers: Sequence[Sequence[Record]], i: int) -> Record:
    record: Record = {"loss": [float(path.loss[i, 0]), float(path.loss[i, -1])], "norm": path.norms[i, -1].tolist()}
    for name in layers[0][i]:
        record[name] = [layer[i][name] for layer in layers]
    return record


def _examined(layer: StackLayer, index: int, seeds: Sequence[int]) -> list[Record]:
    """One layer of all stacks of a chunk."""
    B, n, Q = layer.selected.shape
    T = layer.tokens.shape[-2]
    draws = [torch.Generator().manual_seed(1000 * seed + index) for seed in seeds]
    random = torch.stack([torch.randint(0, T, (n, Q), generator=generator) for generator in draws])
    top = layer.probabilities.amax(-1)
    distinct = (layer.merged() == torch.arange(T)).to(torch.float64).mean((-2, -1))
    found: list[Record] = [
        {
            "mass": float(top[i][layer.used[i]].mean()),
            "in_use": float(layer.used[i].to(torch.float64).mean()),
            "distinct": float(distinct[i]),
        }
        for i in range(B)
    ]
    for name in QUANTITIES:
        chosen = random if name.endswith("_null") else None
        problem = layer.problem(selected=chosen, used_only=name.startswith("used"))
        for record, (status, value) in zip(found, _compared(problem, layer.W), strict=True):
            record[name] = value
            record[f"{name}_status"] = status
    return found


def _compared(problem: TokenSelection, W: Tensor) -> list[tuple[str, float]]:
    """Status of the Frobenius SVM of each member, and the correlation of W with it; NaN where there is none."""
    solution = solve(problem, "fro", on_failure="ignore")
    asked = problem.tensors.asked.flatten(1).any(1).tolist()
    values = correlation(W, solution.W).tolist()
    return [
        ("empty", math.nan) if not asks else (status.value, value if status is Status.OPTIMAL else math.nan)
        for asks, status, value in zip(asked, solution.status, values, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------- the page


def _of(records: Sequence[Record], name: str) -> list[Record]:
    return [record for record in records if record["case"] == name]


def _depth(case: Case) -> int:
    return int(case.values["depth"])


def _values(runs: Sequence[Record], name: str, layer: int) -> list[float]:
    return [one[name][layer] for one in runs if one[name][layer] is not None]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean."""
    if len(values) < 2:
        return None
    middle = math.fsum(values) / len(values)
    variance = math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def _weakest(records: Sequence[Record], case: Case) -> float | None:
    """The smallest mean correlation of a layer, queries in use."""
    runs = _of(records, case.name)
    means = [_mean(_values(runs, "used", layer)) for layer in range(_depth(case))]
    return min((mean for mean in means if mean is not None), default=None)


def summarize(records: Sequence[Record]) -> Summary:
    """Correlations for each variant, depth and layer, with a null."""
    by_name = {case.name: case for case in CASES}
    single = _weakest(records, by_name[SINGLE])
    numbers = [
        Number(
            text="1 layer: correlation of W with the SVM of its selections",
            ours=single,
            low=0.98,
            high=1.0,
            source="the case of arXiv:2308.16898, normalised descent",
        )
    ]
    for case in CASES[1:]:
        text = f"{case.name}: smallest mean correlation of a layer, queries in use"
        numbers.append(Number(text=text, ours=_weakest(records, case)))
    nulls = [value for case in CASES for layer in range(_depth(case)) for value in _null(records, case, layer)]
    numbers.append(
        Number(
            text="SVMs of random selections: mean correlation over all layers",
            ours=_mean(nulls),
            low=-0.1,
            high=0.1,
            source="no relation expected",
        )
    )
    two, four = (_weakest(records, by_name[f"{depth} layers, residual"]) for depth in (2, 4))
    sentence = (
        f"With residual connections every layer of a trained stack turns to the SVM of the selections that the "
        f"read-out depends on: correlation at least {_shown(two)} in two layers and {_shown(four)} in four, where the "
        f"SVM of random selections has {_shown(_mean(nulls))}."
    )
    return Summary(sentence=sentence, numbers=numbers, tables=(_table(records), _states(records)), notes=NOTES)


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _null(records: Sequence[Record], case: Case, layer: int) -> list[float]:
    return _values(_of(records, case.name), "used_null", layer)


NOTES = (
    "This is an experiment of attsvm; nothing was published to compare with. n=4 sequences of T=5 unit tokens in d=20 "
    "dimensions (every selection by all queries can be separated in the first layer), random labels and read-out; "
    "normalised descent on every W, 1000 steps of 0.05 from small random matrices.",
    "A query is in use when the read-out depends on its output: it belongs to the first token of the last layer, or a "
    "query in use of the next layer gives its token more than 5 % of the probability (with residuals also the token "
    "itself). The other queries get next to no gradient, so that the SVM of all queries asks for margins that "
    "training has no reason to make; the correlation with it is lower for that reason.",
    "Tokens that became copies (closer than 1 % of the size of a token) count as one. Without residuals the tokens of "
    "a sequence become copies of a few, and in the end of one: deep layers then have nothing left to select, and where "
    "no constraint is left a layer has no correlation (status empty). Copies also share the probability of the token "
    "that they are, so that the attention paid to one of them stays low.",
    "The networks between the layers are random and not trained. Where they stand, attention saturates later, and "
    "correlations after the same number of steps are lower.",
)


def _table(records: Sequence[Record]) -> Table:
    rows: list[list[str | float | int | None]] = []
    for case in CASES:
        runs = _of(records, case.name)
        for layer in range(_depth(case)):
            row: list[str | float | int | None] = [case.name, layer + 1, len(runs)]
            for name in QUANTITIES:
                values = _values(runs, name, layer)
                row += [_mean(values), _error(values)]
            rows.append(row)
    columns = ["stack", "layer", "trials"]
    for name in ("in use", "in use, null", "all", "all, null"):
        columns += [name, "s.e."]
    return Table(title="Correlation of each layer with the SVM of selections", columns=columns, rows=rows)


def _states(records: Sequence[Record]) -> Table:
    """How the solves ended, and how far the attention of each layer went."""
    rows: list[list[str | float | int | None]] = []
    for case in CASES:
        runs = _of(records, case.name)
        for layer in range(_depth(case)):
            ends = [one["used_status"][layer] for one in runs]
            counts = [ends.count(name) for name in ("optimal", "infeasible", "empty")]
            shares = [_mean(_values(runs, name, layer)) for name in ("mass", "in_use", "distinct", "norm")]
            others = len(ends) - sum(counts)
            rows.append([case.name, layer + 1, *counts, others, *shares])
    columns = ("stack", "layer", "optimal", "infeasible", "empty", "other", "attention", "in use", "distinct", "norm")
    return Table(title="Status of the SVM of the queries in use, and the layers", columns=columns, rows=rows)


def draw(figure: Figure, records: Sequence[Record]) -> None:
    """Bars of the correlations of each layer, queries in use and all, beside the null."""
    from attsvm.experiments.recipes.plotting import bars, panels, style

    axes = panels(figure, 2, 1, width=9.0, height=3.2)
    for ax, depth in zip(axes, (2, 4), strict=True):
        cases = [case for case in CASES if _depth(case) == depth]
        places = [(case, layer) for case in cases for layer in range(depth)]
        series: dict[str, Curve] = {}
        errors: dict[str, Curve] = {}
        for name, label in (("used", "queries in use"), ("all", "all queries"), ("used_null", "random selections")):
            found = [_values(_of(records, case.name), name, layer) for case, layer in places]
            series[label], errors[label] = [_mean(values) for values in found], [_error(values) for values in found]
        bars(ax, [_label(case, layer) for case, layer in places], series, errors=errors)
        ax.set_ylim(-0.25, 1.05)
        style(ax, f"{depth} layers", "", "correlation with the SVM", legend="outside" if depth == 4 else False)


def _label(case: Case, layer: int) -> str:
    variant = case.name.split(", ")[1]
    return f"{variant}\n{layer + 1}" if layer == 0 else f"\n{layer + 1}"


RECIPE = Recipe(
    name="depth",
    title="Stacked attention layers and the SVM of each layer's own selections",
    about=(
        "Two and four attention layers, with and without residual connections and fixed random MLPs, trained by "
        "normalised gradient descent on every key-query matrix. At the end each layer's own input tokens and "
        "selections define a selection problem, and the layer's matrix is compared with its Frobenius SVM; the null is "
        "the SVM of random selections."
    ),
    paper=PAPER,
    cases=CASES,
    trials=50,
    run=run,
    summarize=summarize,
    draw=draw,
    chunk=25,
)
