"""What the recipes of 2308.16898 share: the paper, solutions of whole batches, and verdicts on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attsvm.experiments.recipes.recipe import Number, Paper, Record
from attsvm.selection import TokenSelection
from attsvm.selection.geometry import is_locally_optimal, support_tokens
from attsvm.selection.norms import Norm
from attsvm.solvers import solve

__all__ = [
    "COMPUTED",
    "PAPER",
    "Outcome",
    "judged",
    "mean",
    "of_case",
    "proportion",
    "share",
    "solved",
]

PAPER = Paper(
    title="Transformers as Support Vector Machines",
    authors="Tarzanagh, Li, Thrampoulidis, Oymak",
    year=2023,
    arxiv="2308.16898",
)

COMPUTED = "independent computation"
"""Source of a number that the paper does not print: another program computed it from the same seeds."""


def solved(problem: TokenSelection, norm: Norm, *, tol: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Max-margin matrices W (B, d, d) of a batch, and where there is one (B,); W is 0 where there is none."""
    if len(problem) == 0:
        d = problem.shape[-1]
        return torch.zeros(0, d, d, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)
    solution = solve(problem, norm, tol=tol, on_failure="ignore")
    return solution.W, torch.tensor([bound < math.inf for bound in solution.upper_bound])


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """Where the runs of a batch ended; every field is (B,) but W (B, d, d).

    Attributes
    ----------
    W
        The max-margin matrices of the selections that the runs ended on.
    feasible
        Whether there is one.
    optimal
        Every query selects its token of highest score.
    local
        The selection is feasible and locally optimal; an optimal one always is.
    all_support
        All unselected tokens are support tokens.
    """

    W: Tensor
    feasible: Tensor
    optimal: Tensor
    local: Tensor
    all_support: Tensor


def judged(problem: TokenSelection, scores: Tensor, norm: Norm) -> Outcome:
    """Judge the selections of a batch by scores (B, n, T)."""
    # Support tokens are told by margins within 1e-4: more digits than the default tolerance has.
    W, feasible = solved(problem, norm, tol=1e-9)
    t, values = problem.tensors, scores.unsqueeze(-2)
    best = values.masked_fill(~t.allowed, -math.inf).amax(-1, keepdim=True)
    return Outcome(
        W=W,
        feasible=feasible,
        optimal=(t.selected & (values >= best)).any(-1).flatten(1).all(-1),
        local=is_locally_optimal(t, values, W) & feasible,
        all_support=(support_tokens(t, W) | ~t.asked).flatten(1).all(-1) & feasible,
    )


def of_case(records: Sequence[Record], case: str) -> list[Record]:
    """The records of one case."""
    return [record for record in records if record["case"] == case]


def mean(records: Sequence[Record], value: str | Callable[[Record], Any]) -> float | None:
    """Mean of a field (or of a function) over the records that have one; None where none has."""
    read = value if callable(value) else lambda record: record.get(value)
    known = [float(one) for one in map(read, records) if one is not None]
    return sum(known) / len(known) if known else None


def share(records: Sequence[Record], field: str) -> float | None:
    """Share of the records in which a field is true; None without records."""
    return mean(records, lambda record: bool(record[field]))


def proportion(
    text: str,
    ours: float | None,
    trials: int,
    expected: float,
    published_trials: int,
    *,
    source: str = COMPUTED,
    published: float | None = None,
) -> Number:
    """A share that should agree with another one up to chance: both counts are binomial, three deviations are allowed.

    Parameters
    ----------
    text
        What it is.
    ours, trials
        Our share, and its number of trials.
    expected, published_trials
        The share to compare with, and its number of trials.
    source
        Where ``expected`` comes from.
    published
        ``expected``, if it is in the paper.
    """
    # One success and one failure more keep the deviation away from 0 at shares of 0 and 1.
    p = (expected * published_trials + 1.0) / (published_trials + 2.0)
    slack = 3.0 * math.sqrt(p * (1.0 - p) * (1.0 / max(trials, 1) + 1.0 / published_trials))
    low, high = max(0.0, expected - slack), min(1.0, expected + slack)
    return Number(text=text, ours=ours, published=published, low=low, high=high, source=source)
