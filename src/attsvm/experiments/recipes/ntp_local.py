"""Next-token prediction, squared loss: training turns to the SVM of the tokens it keeps, not to that of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attsvm.dynamics import descend
from attsvm.experiments.recipes import plotting
from attsvm.experiments.recipes.next_token import PAPER, SIZES, Corpora, draw_corpora
from attsvm.experiments.recipes.recipe import Case, Number, Recipe, Record, Summary, Table
from attsvm.experiments.recipes.tfsvm import mean, share
from attsvm.selection import TokenSelection, correlation, graph_selection
from attsvm.solvers import selected_from_probabilities, solve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RECIPE"]

RATE = 0.1
STEPS = (*range(0, 200, 20), *range(200, 1000, 50), *range(1000, 2001, 100))

SELECTED_ABOVE, MASKED_BELOW = 1e-2, 9e-3

LOCAL = (0.9989, 0.9921, 0.9995, 0.9970, 0.9986, 0.9994, 0.9992, 0.9958, 0.9993, 0.9995)
GLOBAL = (0.2638, 0.7472, 0.5056, 0.7847, 0.8280, 0.9488, 0.9337, 0.4100, 0.5195, 0.5212)
"""Correlations at the end of the published runs, with the SVM of the tokens that are kept and with the Graph-SVM."""


def _run(case: Case, seeds: Sequence[int]) -> list[Record]:
    data = draw_corpora(seeds, unused_layers=2)
    problem = TokenSelection(data.tokens, data.queries, data.hits.argmax(-1))
    run = descend(
        problem,
        head=_label_probability(data),
        labels=torch.ones(data.labels.shape, dtype=torch.float64),
        loss="squared",
        learning_rate=RATE,
        steps=STEPS[-1],
        init=data.init,
        record_steps=STEPS,
    )
    attention = data.attention(run.W[:, -1])
    sets = selected_from_probabilities(attention, SELECTED_ABOVE, MASKED_BELOW)
    local = solve(problem.with_selected(sets.selected), tol=1e-9, on_failure="ignore")
    # What a token still holds beyond the ones that are kept: a run that still moves has more than a millionth.
    leaving = attention.masked_fill(sets.selected, 0.0).amax((-2, -1))
    records = []
    for b in range(len(seeds)):
        graph_svm = solve(graph_selection(data.embeddings[b], data.ids[b], data.labels[b]), tol=1e-9).W
        chosen = sets.selected[b] & (data.hits[b] > 0)
        records.append(
            {
                "local": correlation(run.W[b], local.W[b]).tolist(),
                "global": correlation(run.W[b], graph_svm).tolist(),
                "kept": int(sets.selected[b].sum()),
                "labels": int(chosen.any(-1).sum()),
                "ambiguous": bool(sets.ambiguous[b].any()),
                "leaving": float(leaving[b]),
                "norm": float(run.norm[b, -1]),
            }
        )
    return records


def _label_probability(data: Corpora) -> Callable[[Tensor], Tensor]:
    """The head: softmax over all K tokens of the inner products with the pooled token, read at the label."""
    labels, classes = data.labels.unsqueeze(-1), data.embeddings.mT.unsqueeze(1)

    def head(pooled: Tensor) -> Tensor:
        p = torch.softmax(pooled @ classes, -1)  # (B, n, 1, K)
        return p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    return head


def _summarize(records: Sequence[Record]) -> Summary:
    own, other = _at_end(records, "local"), _at_end(records, "global")
    gap = None if own is None or other is None else own - other
    numbers = [
        Number(
            text=f"correlation of W with the SVM of the kept tokens, step {STEPS[-1]}, mean",
            ours=own,
            published=float(np.mean(LOCAL)),
            low=0.9965,
            high=0.9995,
            source="output of the published notebook",
        ),
        Number(
            text=f"correlation of W with the Graph-SVM, step {STEPS[-1]}, mean",
            ours=other,
            published=float(np.mean(GLOBAL)),
            # The standard error of the published mean is .07.
            low=0.646 - 0.07,
            high=0.646 + 0.07,
            source="output of the published notebook",
        ),
        Number(
            text="by how much the first is larger",
            ours=gap,
            published=float(np.mean(LOCAL) - np.mean(GLOBAL)),
            low=0.2,
            source="output of the published notebook",
        ),
        Number(text="runs with a probability between the thresholds", ours=share(records, "ambiguous")),
    ]
    rows = []
    for record in records:
        if (place := record["trial"]) < len(LOCAL):
            ends = (record["local"][-1], LOCAL[place], record["global"][-1], GLOBAL[place])
            rows.append([place, *ends, record["kept"], record["labels"], record["leaving"]])
    columns = ["data set", "corr. kept tokens", "published", "corr. Graph-SVM", "published", "tokens kept"]
    columns += ["sequences that keep their label", "largest other probability"]
    return Summary(
        sentence="With a loss that is not convex in the attention, the tokens that training keeps define its "
        "direction, not the graph of the data.",
        numbers=numbers,
        tables=[Table(title=f"Each published data set, step {STEPS[-1]}", columns=columns, rows=rows)],
        notes=[
            "The classifier is the embedding matrix, and the probability in the loss the softmax of its six outputs; "
            "the other reading, the plain output of the classifier at the label, keeps 8 to 11 tokens and turns to the "
            "Graph-SVM (correlation .95 to .98), so it is not what was run.",
            "The data sets and initial layers are the published ones, drawn from one generator with seed 1 in the "
            "published order; trials from 100 on have a generator each.",
            "The published step divides the gradient by its norm plus 2.2e-16 and so slows down at ||W|| of 70 to 100; "
            "ours goes on and comes closer to the SVM in those runs. The lowest correlations, of data sets 1 and 7, "
            "are runs in which a token is still on its way out; there the two steps agree.",
        ],
    )


def _at_end(records: Sequence[Record], field: str) -> float | None:
    return mean(records, lambda record: record[field][-1])


def _draw(figure: Figure, records: Sequence[Record]) -> None:
    left, right = plotting.panels(figure, 1, 2)
    for field, label in (("local", "SVM of the kept tokens"), ("global", "Graph-SVM")):
        plotting.band(left, STEPS, [record[field] for record in records], label, limits=(-1.0, 1.0))
    plotting.mark_published(left, [STEPS[-1]] * 2, [float(np.mean(LOCAL)), float(np.mean(GLOBAL))])
    plotting.style(left, "Mean over the data sets", "step", "correlation with W")
    for field, label in (("local", "SVM of the kept tokens"), ("global", "Graph-SVM")):
        known = [(record["trial"], record[field][-1]) for record in records if record[field][-1] is not None]
        right.plot([trial for trial, _ in known], [end for _, end in known], "o", label=label)
    here = [place for place in range(len(LOCAL)) if place in {record["trial"] for record in records}]
    plotting.mark_published(right, here, [LOCAL[place] for place in here])
    plotting.mark_published(right, here, [GLOBAL[place] for place in here], "")
    plotting.style(right, "Each data set", "data set", f"correlation at step {STEPS[-1]}")


RECIPE = Recipe(
    name="ntp-local",
    title="Other losses: the direction of the tokens that training keeps",
    about=(
        "The data of ntp-global with the squared loss (1 - p)^2 of the probability p that a classifier with the "
        "embeddings as rows gives the label; 2,000 normalised gradient steps of 0.1 on W from a default linear layer. "
        "Tokens with more than 1e-2 of the attention at the end are kept; W is compared with the SVM that selects "
        "them, and with the Graph-SVM of the data."
    ),
    paper=PAPER,
    cases=[Case(name="squared loss", values={**SIZES, "loss": "squared", "learning_rate": RATE})],
    trials=10,
    chunk=10,
    run=_run,
    summarize=_summarize,
    draw=_draw,
)
