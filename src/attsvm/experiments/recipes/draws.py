"""Random data in the draw order of the published code: float32 from a generator with the seed, then float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attsvm.selection import TokenSelection

__all__ = ["Draws", "draw_layer_init", "draw_unit_sphere"]

LAYER_SEEDS = 1_000_000
"""Added to the seed of a trial for the seed of its layers, so that layers and data are not the same numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """A batch of B data sets.

    Attributes
    ----------
    tokens
        (B, n, T, d).
    queries
        (B, n, d).
    labels
        (B, n) of -1 and +1.
    v
        (B, d), the linear head.
    scores
        (B, n, T), label times head times token.
    """

    tokens: Tensor
    queries: Tensor
    labels: Tensor
    v: Tensor
    scores: Tensor

    @property
    def optimal(self) -> Tensor:
        """(B, n): the token of highest score."""
        return self.scores.argmax(-1)

    def problem(self, selected: Tensor | None = None) -> TokenSelection:
        """The batch of problems that selects ``selected`` (B, n), by default the optimal tokens."""
        return TokenSelection(self.tokens, self.queries, self.optimal if selected is None else selected)


def draw_unit_sphere(seeds: Sequence[int], *, n: int, T: int, d: int, self_attention: bool = False) -> Draws:
    """Head, labels, tokens and queries on the unit sphere, drawn in this order, one generator a seed.

    With ``self_attention`` the query of a sequence is its first token, and none is drawn.
    """
    members = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        v = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=-1)
        labels = 2.0 * (torch.randn(n, generator=generator) > 0) - 1.0
        tokens = torch.nn.functional.normalize(torch.randn(n, T, d, generator=generator), dim=-1)
        queries = tokens[:, 0]
        if not self_attention:
            queries = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
        X, v, labels = tokens.double(), v.double(), labels.double()
        # Member by member: a product over the batch rounds differently in batches of different sizes.
        members.append((X, queries.double(), labels, v, (X @ v) * labels.unsqueeze(-1)))
    tokens, queries, labels, v, scores = (torch.stack(parts) for parts in zip(*members, strict=True))
    return Draws(tokens=tokens, queries=queries, labels=labels, v=v, scores=scores)


def draw_layer_init(seeds: Sequence[int], *, d: int, count: int) -> tuple[Tensor, ...]:
    """``count`` matrices (B, d, d) as linear layers start: entries U(-1/sqrt d, 1/sqrt d), one generator a seed.

    The published runs leave this draw unseeded.
    """
    members = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(LAYER_SEEDS + seed)
        members.append((2.0 * torch.rand(count, d, d, generator=generator).double() - 1.0) * d**-0.5)
    return torch.stack(members, 1).unbind(0)
