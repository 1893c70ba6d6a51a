"""Named problems whose answers are known, and the random data of the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attsvm.selection import TokenSelection


class Sphere(NamedTuple):
    """Random data on the unit sphere, with a linear head."""

    tokens: Tensor  # (n, T, d)
    queries: Tensor  # (n, d)
    scores: Tensor  # (n, T)
    best: Tensor  # (n,)


def unit_sphere(n: int, T: int, d: int, seed: int) -> Sphere:
    """Head, labels, tokens, queries, drawn in this order in float32 and then taken as float64."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(d, generator=g)
    v = v / v.norm()
    labels = 2.0 * (torch.randn(n, generator=g) > 0).float() - 1.0
    X = torch.randn(n, T, d, generator=g)
    X = X / X.norm(dim=-1, keepdim=True)
    Z = torch.randn(n, d, generator=g)
    Z = Z / Z.norm(dim=-1, keepdim=True)
    scores = (X.double() @ v.double()) * labels.double()[:, None]
    return Sphere(X.double(), Z.double(), scores, scores.argmax(1))


def sphere_problem(n: int, T: int, d: int, seed: int) -> TokenSelection:
    """The best token of each sequence is selected."""
    data = unit_sphere(n, T, d, seed)
    return TokenSelection(data.tokens, data.queries, data.best)


def figure_one() -> tuple[TokenSelection, Tensor]:
    """Two sequences of five tokens in the plane, and their scores: the data of the paper's first figure."""
    g = torch.Generator().manual_seed(3)
    v = torch.randn(2, generator=g)
    v = v / v.norm()
    X = 0.5 * torch.randn(2, 5, 2, generator=g)
    X[0, 0] = torch.tensor([1.0, 0.5])
    X[1, 0] = torch.tensor([1.0, -0.5])
    X[:, 1:] += torch.tensor([-1.0, 0.0])
    Z = torch.randn(2, 2, generator=g)
    Z = Z / Z.norm(dim=-1, keepdim=True)
    scores = X.double() @ v.double()
    return TokenSelection.from_scores(X.double(), Z.double(), scores), scores
