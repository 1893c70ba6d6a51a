"""The data that benchmarks run on."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from attsvm.data import default_model_path, embed_text, load_sample
from attsvm.selection import TokenSelection

__all__ = ["expanded_rows", "minilm_head", "planted", "unit_sphere"]


def unit_sphere(n: int, T: int, d: int, seed: int) -> TokenSelection:
    """Random tokens and queries on the unit sphere; the best token for a random head and random labels is selected.

    Drawn in float32 in this order: head (d,), labels (n,), tokens (n, T, d), queries (n, d); then float64.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(d, generator=generator)
    v = v / v.norm()
    labels = 2.0 * (torch.randn(n, generator=generator) > 0).float() - 1.0
    X = torch.randn(n, T, d, generator=generator)
    X = X / X.norm(dim=-1, keepdim=True)
    Z = torch.randn(n, d, generator=generator)
    Z = Z / Z.norm(dim=-1, keepdim=True)
    scores = (X.double() @ v.double()) * labels.double()[:, None]
    return TokenSelection.from_scores(X.double(), Z.double(), scores)


def planted(n_constraints: int, d: int = 64, T: int = 64, seed: int = 0) -> TokenSelection:
    """About ``n_constraints`` rows that a random head W satisfies: one query a sequence, Gaussian tokens and queries.

    The selected token of a query z is moved along W z until it is one standard deviation ahead of the next best.
    """
    n = max(1, round(n_constraints / (T - 1)))
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d, d, generator=generator, dtype=torch.float64)
    X = torch.randn(n, T, d, generator=generator, dtype=torch.float64)
    Z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    ahead = Z @ W.T
    ahead = ahead / ahead.norm(dim=-1, keepdim=True)
    scores = (X @ ahead[..., None]).squeeze(-1)
    two = scores.topk(2, dim=-1)
    chosen = two.indices[:, 0]
    X[torch.arange(n), chosen] += (1.0 - (two.values[:, 0] - two.values[:, 1])).clamp(min=0.0)[:, None] * ahead
    return TokenSelection(X.numpy(), Z.numpy(), chosen.numpy())


def minilm_head(n_queries: int = 600, *, per_sentence: int | None = 4, layer: int = 0, head: int = 0) -> TokenSelection:
    """What a head of MiniLM selects in the sample text: each query keeps the token that the head attends to most.

    Parameters
    ----------
    n_queries
        Number of queries; sentences are taken until there are as many.
    per_sentence
        Queries of a sentence, evenly spaced tokens of it; None for all its tokens.
    layer, head
        The head. Tokens and queries are what goes into its layer, and a constant 1 for its biases (d = 385).
    """
    share = per_sentence or 10
    texts = list(load_sample().texts)[: math.ceil(n_queries / share)]
    text = embed_text(texts, layer=layer)
    X = torch.nn.functional.pad(torch.from_numpy(text.tokens), (0, 1), value=1.0).double()
    real = torch.from_numpy(text.allowed | text.special)
    weights = load_file(default_model_path() / "model.safetensors")
    d_head = 32
    own = slice(head * d_head, (head + 1) * d_head)

    def projected(name: str) -> torch.Tensor:
        place = f"encoder.layer.{layer}.attention.self.{name}"
        matrix = torch.cat([weights[f"{place}.weight"], weights[f"{place}.bias"][:, None]], 1)
        return X @ matrix[own].double().T

    scores = (projected("query") @ projected("key").mT).masked_fill(~real[:, None, :], -torch.inf)
    best = torch.full(real.shape, -1)
    left = n_queries
    for i, length in enumerate(real.sum(-1).tolist()):
        count = min(left, length if per_sentence is None else min(per_sentence, length))
        asking = torch.linspace(0, length - 1, count).round().long()
        best[i, asking] = scores[i, asking].argmax(-1)
        left -= count
    used = (best >= 0).any(-1)
    may = real[used, None, :].expand(-1, real.shape[1], -1)
    return TokenSelection(X[used].numpy(), X[used].numpy(), best[used].numpy(), allowed=may.numpy())


def expanded_rows(problem: TokenSelection) -> NDArray[np.float64]:
    """The rows ``(x_selected - x_t) z^T`` of a problem with one selected token a query, as (R, d * d) features."""
    t = problem.tensors
    X, Z = t.tokens.numpy(), t.queries.numpy()
    i, q, token = t.asked.numpy().nonzero()
    own = t.selected.numpy().argmax(-1)[i, q]
    rows = (X[i, own] - X[i, token])[:, :, None] * Z[i, q][:, None, :]
    return np.ascontiguousarray(rows.reshape(len(i), -1))
