"""Random data in the draw order of the published code: float32 from a generator with the seed, then float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attsvm.selection import TokenSelection

__all__ = ["Draws", "draw_unit_sphere"]


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
        members.append((tokens.double(), queries.double(), labels.double(), v.double()))
    tokens, queries, labels, v = (torch.stack(parts) for parts in zip(*members, strict=True))
    scores = torch.einsum("bntd,bd->bnt", tokens, v) * labels.unsqueeze(-1)
    return Draws(tokens=tokens, queries=queries, labels=labels, v=v, scores=scores)
