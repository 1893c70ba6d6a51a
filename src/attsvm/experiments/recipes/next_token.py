"""What the recipes of 2403.08081 share: the paper, and its data sets.

The published notebooks draw everything from one generator with seed 1: ten data sets in turn, each until its graph has
a cycle, then the layer that is trained, then layers that are drawn and set to zero. Drawn in the same order the stream
gives the same data sets, so that not only means but single runs can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attsvm.experiments.recipes.recipe import Paper
from attsvm.selection import TokenPriorityGraph

__all__ = ["PAPER", "SIZES", "Corpora", "draw_corpora"]

PAPER = Paper(
    title="Mechanics of Next Token Prediction with Self-Attention",
    authors="Li, Huang, Ildiz, Rawat, Oymak",
    year=2024,
    arxiv="2403.08081",
)

SIZES = {"n": 6, "T": 4, "K": 6, "d": 8}

STREAM_SEED = 1
STREAM_LENGTH = 100
"""Data sets that come from the published stream; later seeds have a generator each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpora:
    """A batch of B data sets.

    Attributes
    ----------
    embeddings
        (B, K, d), unit rows.
    ids
        (B, n, T), distinct within a sequence; the last is the query.
    labels
        (B, n), each out of its sequence.
    init
        (B, d, d), the layer before training.
    """

    embeddings: Tensor
    ids: Tensor
    labels: Tensor
    init: Tensor

    @property
    def tokens(self) -> Tensor:
        """(B, n, T, d)."""
        return torch.stack([E[ids] for E, ids in zip(self.embeddings, self.ids, strict=True)])

    @property
    def queries(self) -> Tensor:
        """(B, n, d): the embeddings of the last ids."""
        return self.tokens[:, :, -1]

    @property
    def hits(self) -> Tensor:
        """(B, n, T): 1 where the token is the label."""
        return (self.ids == self.labels.unsqueeze(-1)).double()

    def graph(self, b: int) -> TokenPriorityGraph:
        """The priorities of one data set."""
        return TokenPriorityGraph(self.ids[b], self.labels[b], d_vocab=self.embeddings.shape[1])

    def together(self) -> Tensor:
        """(B, n, T, T) booleans: two tokens of a sequence are in one component of the graph of its last token."""
        sets = []
        for b in range(len(self.ids)):
            graph = self.graph(b)
            of_token = [[graph.component(ids[-1], token) for token in ids] for ids in graph.sequences]
            sets.append([[[one == other for other in parts] for one in parts] for parts in of_token])
        return torch.tensor(sets)

    def with_label(self) -> Tensor:
        """(B, n, T) booleans: the token is in the component of its label."""
        return (self.together() & (self.hits > 0).unsqueeze(-2)).any(-1)

    def attention(self, W: Tensor) -> Tensor:
        """Probabilities (B, n, T) at W (B, d, d)."""
        keys = self.queries @ W.mT
        return torch.softmax((self.tokens @ keys.unsqueeze(-1)).squeeze(-1), -1)


def draw_corpora(seeds: Sequence[int], *, unused_layers: int) -> Corpora:
    """The data sets with these numbers, n=6 T=4 K=6 d=8, each with a cycle.

    Parameters
    ----------
    seeds
        Below 100: places in the published stream, from 0. From 100 on: seeds of generators.
    unused_layers
        Layers that the published code draws after each data set and then sets to zero: 1 in the notebook on global
        convergence, 2 in that on local convergence.
    """
    last = max((seed for seed in seeds if seed < STREAM_LENGTH), default=-1)
    stream, found = torch.Generator().manual_seed(STREAM_SEED), {}
    for place in range(last + 1):
        found[place] = _draw(stream)
        for _ in range(unused_layers):
            _draw_layer(stream)
    for seed in seeds:
        if seed not in found:
            found[seed] = _draw(torch.Generator().manual_seed(seed))
    embeddings, ids, labels, init = (torch.stack(parts) for parts in zip(*(found[seed] for seed in seeds), strict=True))
    return Corpora(embeddings=embeddings, ids=ids, labels=labels, init=init)


def _draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, ids, labels and a layer."""
    n, T, K, d = SIZES.values()
    while True:
        E = torch.nn.functional.normalize(torch.randn(K, d, generator=generator).double(), dim=-1)
        ids = torch.multinomial(torch.ones(K).expand(n, K), T, replacement=False, generator=generator)
        labels = torch.multinomial(torch.ones(K), n, replacement=True, generator=generator)
        for i in range(n):
            if not bool((ids[i] == labels[i]).any()):
                labels[i] = ids[i, torch.randint(T, (1,), generator=generator)]
        if not TokenPriorityGraph(ids, labels, d_vocab=K).is_acyclic:
            return E, ids, labels, _draw_layer(generator)


def _draw_layer(generator: torch.Generator) -> Tensor:
    """A linear layer as torch starts it: entries U(-1/sqrt d, 1/sqrt d) in float32."""
    d = SIZES["d"]
    bound = 1.0 / math.sqrt(d)
    return torch.empty(d, d).uniform_(-bound, bound, generator=generator).double()
