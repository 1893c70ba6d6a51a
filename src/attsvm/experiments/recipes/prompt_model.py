"""The prompt-vector model of the first paper: logits x^T p, one trained vector p for all sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attsvm.dynamics import descend
from attsvm.experiments.recipes.recipe import Paper
from attsvm.selection import TokenSelection
from attsvm.solvers import solve

__all__ = [
    "PAPER",
    "PROMPT_QUERY",
    "Margin",
    "Paths",
    "cosine",
    "max_margin",
    "prompt_problem",
    "train_in_single_precision",
    "train_prompts",
]

PAPER = Paper(
    title="Max-Margin Token Selection in Attention Mechanism",
    authors="Tarzanagh, Li, Zhang, Oymak",
    year=2023,
    arxiv="2306.13596",
)

PROMPT_QUERY = 0
"""The coordinate that is 1 in every query: W z is then one column of W, which is p."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Paths:
    """Runs from B starts: the records of p (B, records, d), and the end: selected (B, n), probabilities (B, n, T)."""

    p: Tensor
    selected: Tensor
    probabilities: Tensor


@dataclass(frozen=True, kw_only=True)
class Margin:
    """A max-margin prompt vector and half its squared norm, which is what the published code printed."""

    p: list[float]
    half: float


def prompt_problem(tokens: Tensor, selected: Sequence[int] | Tensor, margin: float | Tensor = 1.0) -> TokenSelection:
    """The problem whose W z is p, for tokens (n, T, d)."""
    queries = torch.zeros(tokens.shape[0], tokens.shape[-1], dtype=torch.float64)
    queries[:, PROMPT_QUERY] = 1.0
    return TokenSelection(tokens, queries, torch.as_tensor(selected), margin=margin)


def max_margin(tokens: Tensor, selected: Sequence[int] | Tensor, margin: float | Tensor = 1.0) -> Margin:
    """The shortest p with ``p^T (x_selected - x_t) >= margin``."""
    solution = solve(prompt_problem(tokens, selected, margin), tol=1e-10)
    p = solution.W[:, PROMPT_QUERY]
    return Margin(p=p.tolist(), half=0.5 * float(p @ p))


def train_prompts(
    tokens: Tensor, scores: Tensor, starts: Tensor, *, record_steps: Sequence[int], **options: Any
) -> Paths:
    """Train p on tokens (n, T, d) with scores (n, T) or (B, n, T) from each of the starts (B, d).

    ``record_steps`` ascend; the last one is the length of the runs.
    """
    B, n = len(starts), len(tokens)
    one = prompt_problem(tokens, torch.zeros(n, dtype=torch.int64))
    batch = TokenSelection(
        tokens.expand(B, *tokens.shape).contiguous(),
        one.queries.expand(B, *one.queries.shape).contiguous(),
        torch.zeros(B, n, dtype=torch.int64),
    )
    trajectory = descend(
        batch,
        scores.expand(B, *scores.shape[-2:]).contiguous(),
        parameterization="p",
        init=starts,
        steps=record_steps[-1],
        record_steps=record_steps,
        **options,
    )
    return Paths(
        p=trajectory.W[..., PROMPT_QUERY],
        selected=trajectory.selected.squeeze(-1),
        probabilities=trajectory.probabilities.squeeze(-2),
    )


def cosine(p: Tensor, direction: Sequence[float] | Tensor) -> Tensor:
    """Cosine of vectors (..., d) with one direction (d,); NaN where the vector is 0."""
    direction = torch.as_tensor(direction, dtype=torch.float64)
    cosines: Tensor = (p @ direction) / (torch.linalg.vector_norm(p, dim=-1) * torch.linalg.vector_norm(direction))
    return cosines


def train_in_single_precision(
    tokens: Tensor, scores: Tensor, starts: Tensor, *, steps: int, floor: float = 1e-9
) -> Tensor:
    """The published way, ends (B, d): float32, step 0.1, logistic loss, ``floor`` added to the norm of the gradient.

    It stands still once 1 minus a probability rounds to 0; :func:`train_prompts` does not.
    """
    X, gamma, p = tokens.float(), scores.float(), starts.float()
    for _ in range(steps):
        s = torch.softmax(torch.einsum("ntd,bd->bnt", X, p), -1)
        f = (s * gamma).sum(-1, keepdim=True)
        slope = -torch.sigmoid(-f) * gamma / len(X)
        change = s * (slope - (s * slope).sum(-1, keepdim=True))
        gradient = torch.einsum("ntd,bnt->bd", X, change)
        p = p - 0.1 * gradient / (torch.linalg.vector_norm(gradient, dim=-1, keepdim=True) + floor)
    end: Tensor = p.double()
    return end
