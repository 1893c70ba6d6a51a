"""Named problems whose answers are known, and the random data of the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
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
    """A problem whose answers are known in every norm.

    Attributes
    ----------
    build
        Makes the problem.
    W
        A matrix that is a minimiser in every norm at once, or None where none exists.
    soft
        With slack at the price 0.5: what the best multipliers promise (the sum of multiplier x right-hand side), and
        their combination of the rows. The best in every norm is a multiple of them, by a factor of at most 1.
    hard_values, soft_values
        Where no such matrix or multipliers are known: the values by norm, from the reference solver.
    digits
        Relative accuracy of the values.
    """

    build: Callable[[], TokenSelection]
    W: Any = None
    soft: tuple[float, Any] | None = None
    hard_values: dict[Any, float] = field(default_factory=dict)
    soft_values: dict[Any, float] = field(default_factory=dict)
    digits: float = 1e-9

    @property
    def feasible(self) -> bool:
        """Whether a matrix satisfies every row."""
        return self.W is not None or bool(self.hard_values)

    def value(self, norm: Any) -> float:
        """The known answer with a hard margin; inf where no matrix exists."""
        if not self.feasible:
            return math.inf
        return self.hard_values[norm] if self.W is None else size(np.array(self.W), norm)

    def soft_value(self, norm: Any) -> float:
        """The known answer with slack at the price 0.5."""
        if self.soft is None:
            return self.soft_values[norm]
        promise, combination = self.soft
        slope = size(np.array(combination), DUAL[norm])
        factor = min(1.0, promise / slope**2) if slope else 0.0
        return factor * promise - 0.5 * (factor * slope) ** 2


DUAL = {"fro": "fro", "nuc": "op", "op": "nuc", 1.0: math.inf, 1.5: 3.0, 3.0: 1.5, math.inf: 1.0}
"""The dual of each norm that is tested."""


def size(matrix: np.ndarray, norm: Any) -> float:
    """A norm of a matrix by its definition."""
    s = np.linalg.svd(matrix, compute_uv=False)
    named = {"fro": np.linalg.norm(s), "nuc": s.sum(), "op": s.max()}
    return float(named[norm] if norm in named else np.linalg.norm(matrix.ravel(), norm))


def select(tokens: Any, queries: Any, selected: Any, **options: Any) -> TokenSelection:
    """A problem from nested lists."""
    return TokenSelection(np.array(tokens, dtype=float), np.array(queries, dtype=float), np.array(selected), **options)


E1, E2, ZERO = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]

NOTHING = [ZERO, ZERO]
ONE = [[1.0, 0.0], [0.0, 0.0]]
HALF = [[0.5, 0.0], [0.0, 0.0]]


def row(first: float, second: float) -> list[list[float]]:
    """A matrix that looks at the first coordinate of the query alone."""
    return [[first, 0.0], [second, 0.0]]


NAMED: dict[str, Named] = {
    "one row": Named(build=lambda: select([[E1, ZERO]], [E1], [0]), W=ONE, soft=(0.5, HALF)),
    "margin 3": Named(build=lambda: select([[E1, ZERO]], [E1], [0], margin=3.0), W=row(3, 0), soft=(1.5, HALF)),
    "two orthogonal rows of one query": Named(
        build=lambda: select([[ZERO, [-1.0, 0.0], [0.0, -1.0]]], [E1], [0]), W=row(1, 1), soft=(1.0, row(0.5, 0.5))
    ),
    "the identity matrix": Named(
        build=lambda: select([[E1, ZERO], [E2, ZERO]], [E1, E2], [0, 0]), W=np.eye(2), soft=(1.0, 0.5 * np.eye(2))
    ),
    "a margin for each token": Named(
        build=lambda: select([[ZERO, [-1.0, 0.0], [0.0, -1.0]]], [E1], [0], margin=np.array([[[1.0, 3.0, 4.0]]])),
        W=row(3, 4),
        soft=(3.5, row(0.5, 0.5)),
    ),
    "a row that asks for 0": Named(
        build=lambda: select([[ZERO, [-1.0, 0.0], [1.0, -1.0]]], [E1], [0], margin=np.array([[[1.0, 1.0, 0.0]]])),
        W=row(1, 1),
        soft=(0.5, row(0.25, 0.25)),
    ),
    "collinear, the end is selected": Named(
        build=lambda: select([[ZERO, E1, [2.0, 0.0]]], [E1], [2]), W=ONE, soft_values=dict.fromkeys(DUAL, 0.375)
    ),
    "collinear, the middle is selected": Named(build=lambda: select([[ZERO, E1, [2.0, 0.0]]], [E1], [1])),
    "opposite wishes": Named(build=lambda: select([[E1, ZERO], [ZERO, E1]], [E1, E1], [0, 0])),
    "zero query": Named(build=lambda: select([[E1, ZERO], [E1, ZERO]], [E1, ZERO], [0, 0])),
    "one token": Named(build=lambda: select([[E1]], [E1], [0]), W=NOTHING, soft=(0.0, NOTHING)),
    "all tokens identical": Named(build=lambda: select([[E1, E1, E1]], [E1], [1]), W=NOTHING, soft=(0.0, NOTHING)),
    "no query asks": Named(build=lambda: select([[E1, ZERO]], [E1], [-1]), W=NOTHING, soft=(0.0, NOTHING)),
    "a duplicate of the selected": Named(build=lambda: select([[E1, E1, ZERO]], [E1], [0]), W=ONE, soft=(0.5, HALF)),
    "two selected": Named(
        build=lambda: select([[E1, E2, ZERO]], [E1], [[[True, True, False]]]), W=row(1, 1), soft=(0.5, row(0.25, 0.25))
    ),
    "two selected that cannot be tied": Named(
        build=lambda: select([[E1, [2.0, 0.0], ZERO]], [E1], [[[True, True, False]]])
    ),
    "offsets halve the task": Named(
        build=lambda: select([[E1, ZERO]], [E1], [0], offsets=np.array([[0.5, 0.0]])), W=HALF, soft=(0.25, HALF)
    ),
    "offsets do it all": Named(
        build=lambda: select([[E1, ZERO]], [E1], [0], offsets=np.array([[2.0, 0.0]])), W=NOTHING, soft=(0.0, NOTHING)
    ),
    "a tie against an offset": Named(
        build=lambda: select([[E1, ZERO]], [E1], [[[True, True]]], offsets=np.array([[0.0, 2.0]])),
        W=row(2, 0),
        soft=(4.0, row(2, 0)),
    ),
    "causal": Named(
        build=lambda: TokenSelection.sequence(np.array([[E1, E2]]), np.array([[0, 0]]), causal=True),
        W=[[0.0, 0.5], [0.0, -0.5]],
        soft=(0.5, [[0.0, 0.5], [0.0, -0.5]]),
    ),
    "figure one": Named(
        build=lambda: figure_one()[0],
        hard_values={
            "fro": 1.52636008,
            "nuc": 1.87260443,
            "op": 1.129455666,
            1.0: 2.607050903,
            1.5: 1.836806304,
            3.0: 1.255741351,
            math.inf: 0.893098520,
        },
        soft_values={
            "fro": 1.022161218,
            "nuc": 1.608321662,
            "op": 0.613062329,
            1.0: 2.371170035,
            1.5: 1.437779364,
            3.0: 0.721330684,
            math.inf: 0.398812483,
        },
        digits=2e-8,
    ),
    "sphere, seed 0": Named(
        build=lambda: sphere_problem(6, 8, 10, 0),
        hard_values={
            "fro": 2.90737389,
            "nuc": 4.34879012,
            "op": 1.565943801,
            1.0: 15.528013847,
            1.5: 5.317354118,
            3.0: 1.530198188,
            math.inf: 0.401750912,
        },
        soft_values={
            "fro": 3.789150891,
            "nuc": 6.648086490,
            "op": 1.226089993,
            1.0: 15.636004251,
            1.5: 8.784390734,
            3.0: 1.170753247,
            math.inf: 0.080701898,
        },
        digits=2e-8,
    ),
}
