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


@dataclass(frozen=True, kw_only=True)
class Named:
    """A problem and its smallest Frobenius and nuclear norms; inf where no matrix exists."""

    build: Callable[[], TokenSelection]
    fro: float
    nuc: float
    digits: float = 1e-9
    """Relative accuracy of the numbers above."""

    def value(self, norm: str) -> float:
        """The known answer."""
        return {"fro": self.fro, "nuc": self.nuc}[norm]


def select(tokens: Any, queries: Any, selected: Any, **options: Any) -> TokenSelection:
    """A problem from nested lists."""
    return TokenSelection(np.array(tokens, dtype=float), np.array(queries, dtype=float), np.array(selected), **options)


E1, E2, ZERO = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]

NAMED: dict[str, Named] = {
    "one row": Named(build=lambda: select([[E1, ZERO]], [E1], [0]), fro=1.0, nuc=1.0),
    "margin 3": Named(build=lambda: select([[E1, ZERO]], [E1], [0], margin=3.0), fro=3.0, nuc=3.0),
    "two orthogonal rows of one query": Named(
        build=lambda: select([[ZERO, [-1.0, 0.0], [0.0, -1.0]]], [E1], [0]), fro=math.sqrt(2), nuc=math.sqrt(2)
    ),
    "the identity matrix": Named(
        build=lambda: select([[E1, ZERO], [E2, ZERO]], [E1, E2], [0, 0]), fro=math.sqrt(2), nuc=2.0
    ),
    "a margin for each token": Named(
        build=lambda: select([[ZERO, [-1.0, 0.0], [0.0, -1.0]]], [E1], [0], margin=np.array([[[1.0, 3.0, 4.0]]])),
        fro=5.0,
        nuc=5.0,
    ),
    "a row that asks for 0": Named(
        build=lambda: select([[ZERO, [-1.0, 0.0], [1.0, -1.0]]], [E1], [0], margin=np.array([[[1.0, 1.0, 0.0]]])),
        fro=math.sqrt(2),
        nuc=math.sqrt(2),
    ),
    "collinear, the end is selected": Named(
        build=lambda: select([[ZERO, E1, [2.0, 0.0]]], [E1], [2]), fro=1.0, nuc=1.0
    ),
    "collinear, the middle is selected": Named(
        build=lambda: select([[ZERO, E1, [2.0, 0.0]]], [E1], [1]), fro=math.inf, nuc=math.inf
    ),
    "opposite wishes": Named(
        build=lambda: select([[E1, ZERO], [ZERO, E1]], [E1, E1], [0, 0]), fro=math.inf, nuc=math.inf
    ),
    "zero query": Named(build=lambda: select([[E1, ZERO], [E1, ZERO]], [E1, ZERO], [0, 0]), fro=math.inf, nuc=math.inf),
    "one token": Named(build=lambda: select([[E1]], [E1], [0]), fro=0.0, nuc=0.0),
    "all tokens identical": Named(build=lambda: select([[E1, E1, E1]], [E1], [1]), fro=0.0, nuc=0.0),
    "no query asks": Named(build=lambda: select([[E1, ZERO]], [E1], [-1]), fro=0.0, nuc=0.0),
    "a duplicate of the selected": Named(build=lambda: select([[E1, E1, ZERO]], [E1], [0]), fro=1.0, nuc=1.0),
    "two selected": Named(
        build=lambda: select([[E1, E2, ZERO]], [E1], [[[True, True, False]]]), fro=math.sqrt(2), nuc=math.sqrt(2)
    ),
    "two selected that cannot be tied": Named(
        build=lambda: select([[E1, [2.0, 0.0], ZERO]], [E1], [[[True, True, False]]]), fro=math.inf, nuc=math.inf
    ),
    "offsets halve the task": Named(
        build=lambda: select([[E1, ZERO]], [E1], [0], offsets=np.array([[0.5, 0.0]])), fro=0.5, nuc=0.5
    ),
    "offsets do it all": Named(
        build=lambda: select([[E1, ZERO]], [E1], [0], offsets=np.array([[2.0, 0.0]])), fro=0.0, nuc=0.0
    ),
    "a tie against an offset": Named(
        build=lambda: select([[E1, ZERO]], [E1], [[[True, True]]], offsets=np.array([[0.0, 2.0]])),
        fro=2.0,
        nuc=2.0,
    ),
    "causal": Named(
        build=lambda: TokenSelection.sequence(np.array([[E1, E2]]), np.array([[0, 0]]), causal=True),
        fro=math.sqrt(0.5),
        nuc=math.sqrt(0.5),
    ),
    "figure one": Named(build=lambda: figure_one()[0], fro=1.52636008, nuc=1.87260443, digits=1e-8),
    "sphere, seed 0": Named(build=lambda: sphere_problem(6, 8, 10, 0), fro=2.90737389, nuc=4.34879012, digits=1e-8),
}
