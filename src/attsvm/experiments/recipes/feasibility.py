"""Which selections can be separated: always for d >= max(T - 1, n), and mostly far below (2308.16898)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attsvm.experiments.recipes import plotting
from attsvm.experiments.recipes.draws import draw_unit_sphere
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table
from attsvm.experiments.recipes.tfsvm import PAPER, of_case, proportion, share, solved
from attsvm.selection import TokenSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE"]

KNOWN = {
    (6, 8): {2: (0.00, 0.02), 3: (0.52, 0.47), 4: (1.0, 1.0)},
    (8, 6): {2: (0.00, 0.00), 3: (0.26, 0.20), 4: (1.00, 0.97), 5: (1.0, 1.0)},
    (10, 5): {2: (0.01, 0.00), 3: (0.07, 0.11), 4: (0.87, 0.95), 5: (1.0, 1.0)},
}
"""(n, T) -> d -> feasible shares of 100 problems in cross- and in self-attention."""

SEQUENCES = {
    (2, 4): {2: (0.30, 0.03), 3: (1.0, 0.62), 4: (1.0, 1.0)},
    (1, 8): {2: (0.03, 0.0), 3: (0.55, 0.12), 4: (0.95, 0.75), 5: (1.0, 1.0)},
    (3, 3): {2: (0.60, 0.05), 3: (1.0, 0.70), 4: (1.0, 1.0)},
}
"""(n, T) -> d -> feasible shares of 40 problems where every token is a query, causal and not."""

KNOWN_TRIALS, SEQUENCE_TRIALS = 100, 40
EVERY = ((2, 3, 2), (3, 3, 3), (2, 4, 3))
"""(n, T, d) with d = max(T - 1, n) for which all T^n selections are tried."""

PER_TOKEN = ("causal", "full")
SELECTION_SEEDS = 2_000_000
"""Added to the seed of a trial for the draw of its selected tokens."""


def _needed(case: Case) -> int:
    """The dimension from which on every selection is separable."""
    n, T = int(case.values["n"]), int(case.values["T"])
    return max(T - 1, n * T if case.values["attention"] in PER_TOKEN else n)


def _cases() -> list[Case]:
    cases = []
    for known, kinds in ((KNOWN, ("cross", "self")), (SEQUENCES, PER_TOKEN)):
        for (n, T), rows in known.items():
            for d in (*rows, max(T - 1, n if kinds[0] == "cross" else n * T)):
                cases += [_case(kind, n, T, d) for kind in kinds]
    return [*cases, *(_case(f"every {kind}", *sizes) for sizes in EVERY for kind in ("cross", "self"))]


def _case(attention: str, n: int, T: int, d: int) -> Case:
    values = {"attention": attention, "n": n, "T": T, "d": d}
    return Case(name=f"{attention}, n={n}, T={T}, d={d}", values=values, trials=25 if "every" in attention else None)


def _run(case: Case, seeds: Sequence[int]) -> list[Record]:
    n, T, d, attention = (case.values[key] for key in ("n", "T", "d", "attention"))
    draws = draw_unit_sphere(seeds, n=n, T=T, d=d, self_attention="self" in attention)
    if "every" in attention:
        choices = torch.tensor(list(itertools.product(range(T), repeat=n)))
        shares = [_feasible(X, Z, choices).double().mean() for X, Z in zip(draws.tokens, draws.queries, strict=True)]
        return [{"feasible": float(one)} for one in shares]
    if attention in PER_TOKEN:
        causal = attention == "causal"
        chosen = torch.stack([_random_tokens(seed, n, T, causal=causal) for seed in seeds])
        problem = TokenSelection.sequence(draws.tokens, chosen, causal=causal)
    else:
        # With n rows of T equal lengths: one selected token for each sequence.
        chosen = torch.stack([_random_tokens(seed, n, T, causal=False)[:, 0] for seed in seeds])
        problem = draws.problem(chosen)
    return [{"feasible": bool(one)} for one in solved(problem, "fro")[1]]


def _random_tokens(seed: int, n: int, T: int, *, causal: bool) -> Tensor:
    """For each token (n, T) one that it selects; not a later one if ``causal``."""
    generator = torch.Generator().manual_seed(SELECTION_SEEDS + seed)
    ends = torch.arange(1, T + 1) if causal else torch.full((T,), T)
    return (torch.rand(n, T, generator=generator, dtype=torch.float64) * ends).long()


def _feasible(tokens: Tensor, queries: Tensor, choices: Tensor) -> Tensor:
    """Whether each of ``choices`` (B, n) can be separated for tokens (n, T, d)."""
    count = len(choices)
    problem = TokenSelection(tokens.expand(count, -1, -1, -1), queries.expand(count, -1, -1), choices)
    return solved(problem, "fro")[1]


def _summarize(records: Sequence[Record]) -> Summary:
    numbers = []
    for case in RECIPE.cases:
        mine = of_case(records, case.name)
        ours = share(mine, "feasible") if "every" not in case.name else _mean_share(mine)
        text = f"feasible: {case.name}"
        expected, trials = _expected(case)
        if case.values["d"] >= _needed(case):
            numbers.append(Number(text=text, ours=ours, published=1.0, low=1.0, high=1.0, source="feasibility theorem"))
        elif expected is not None:
            numbers.append(proportion(text, ours, len(mine), expected, trials))
    return Summary(
        sentence="Every selection is separable from d = max(T - 1, n) on, as the theorem says, and most random "
        "ones far below that.",
        numbers=numbers,
        tables=[_table(records)],
        notes=[
            "Random selections on random tokens and queries on the unit sphere. The theorem holds for data in general "
            "position, in cross-attention and in self-attention with one query a sequence.",
            "Where every token is a query (causal: it sees itself and earlier tokens), n counts queries, n T of them.",
            "'every' tries all T^n selections of a problem at the theorem's dimension.",
        ],
    )


def _mean_share(records: Sequence[Record]) -> float | None:
    return sum(record["feasible"] for record in records) / len(records) if records else None


def _expected(case: Case) -> tuple[float | None, int]:
    n, T, d, attention = (case.values[key] for key in ("n", "T", "d", "attention"))
    per_token = attention in PER_TOKEN
    rows = (SEQUENCES if per_token else KNOWN).get((n, T), {})
    if d not in rows or "every" in attention:
        return None, 0
    place = (PER_TOKEN if per_token else ("cross", "self")).index(attention)
    return rows[d][place], SEQUENCE_TRIALS if per_token else KNOWN_TRIALS


def _table(records: Sequence[Record]) -> Table:
    rows = []
    for case in RECIPE.cases:
        mine = of_case(records, case.name)
        values = [case.values[key] for key in ("attention", "n", "T", "d")]
        rows.append([*values, _needed(case), len(mine), _mean_share(mine)])
    columns = ["attention", "n", "T", "d", "sufficient d", "problems", "feasible"]
    return Table(title="Feasible shares", columns=columns, rows=rows)


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    axes = plotting.panels(figure, 1, 2, sharey=True)
    for ax, known, kinds in ((axes[0], KNOWN, ("cross", "self")), (axes[1], SEQUENCES, PER_TOKEN)):
        for (n, T), color in zip(known, plotting.PALETTE, strict=False):
            for kind, dash in zip(kinds, ("-", "--"), strict=True):
                cases = [case for case in RECIPE.cases if case.name.startswith(f"{kind}, n={n}, T={T},")]
                points = [(case.values["d"], _mean_share(of_case(records, case.name))) for case in cases]
                shown = [(d, value) for d, value in points if value is not None]
                if shown:
                    ax.plot(*zip(*shown, strict=True), dash, marker="o", color=color, label=f"{kind}, n={n}, T={T}")
        title = "One query a sequence" if kinds[0] == "cross" else "Every token is a query"
        plotting.style(ax, title, "d", "share of separable selections" if kinds[0] == "cross" else "")


RECIPE = Recipe(
    name="feasibility",
    title="Which selections can be separated",
    about=(
        "Random selections of random tokens: the share that some W separates, over d, in cross-attention, "
        "self-attention and with every token as a query; and all selections of small problems at the dimension from "
        "which on the theorem promises separability."
    ),
    paper=PAPER,
    cases=_cases(),
    trials=KNOWN_TRIALS,
    run=_run,
    summarize=_summarize,
    draw=_draw,
)
