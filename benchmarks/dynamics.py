"""Runs of gradient descent: a batch at once, against the papers' way, an autograd loop that trains one trial at a time.

Both sides take the same steps: the same data, losses, starts and normalised gradients in float64. Once attention is
saturated, autograd's gradient loses its digits and finally underflows, so they are compared after few steps.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attsvm import TokenSelection, descend
from benchmarks.harness import at_least, at_most, stopwatch, timed
from benchmarks.record import Row

__all__ = ["TARGET", "descent"]

ROOT = Path(__file__).resolve().parents[1]

TARGET = 100.0
"""How many times as long the loop should take."""

RATE = 0.1

EARLY = 100
"""Steps after which both sides are compared."""

Kind = Literal["W", "KQ"]


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Random trials: tokens (B, n, T, d) and queries (B, n, d) on the unit sphere, labels (B, n), heads v (B, d)."""

    X: Tensor
    Z: Tensor
    Y: Tensor
    v: Tensor

    @classmethod
    def draw(cls, count: int, *, n: int = 6, T: int = 8, d: int = 10) -> Trials:
        """Independent trials, one seed each."""
        drawn = []
        for seed in range(count):
            generator = torch.Generator().manual_seed(seed)
            parts = (torch.randn(*shape, generator=generator) for shape in ((n, T, d), (n, d), (n,), (d,)))
            X, Z, Y, v = (part.double() for part in parts)
            drawn.append((X / X.norm(dim=-1, keepdim=True), Z / Z.norm(dim=-1, keepdim=True), Y.sign(), v / v.norm()))
        X, Z, Y, v = (torch.stack(part) for part in zip(*drawn, strict=True))
        return cls(X=X, Z=Z, Y=Y, v=v)

    def scores(self) -> Tensor:
        """Label times the head's value of each token (B, n, T)."""
        return torch.einsum("bntd,bd->bnt", self.X, self.v) * self.Y[..., None]

    def batch(self) -> TokenSelection:
        """All trials; the selected tokens play no part."""
        return TokenSelection(self.X, self.Z, self.scores().argmax(-1))


def start(kind: Kind, d: int) -> Any:
    """Where both sides start: W = 0, or K small and Q = 0."""
    if kind == "W":
        return torch.zeros(d, d, dtype=torch.float64)
    K = 0.01 * torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return K, torch.zeros_like(K)


class Attention(nn.Module):
    """One attention layer with a fixed linear head, as plainly as it can be written."""

    def __init__(self, kind: Kind, v: Tensor) -> None:
        super().__init__()
        self.v = v
        first, *second = start(kind, len(v)) if kind == "KQ" else (start(kind, len(v)),)
        self.key = self._layer(first.T if second else first)
        self.query = self._layer(second[0].T) if second else None

    @staticmethod
    def _layer(weight: Tensor) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        layer.weight.data = weight.clone()
        return layer

    def forward(self, X: Tensor, Z: Tensor) -> Tensor:
        """The outputs (n,)."""
        tokens, queries = (X, self.key(Z)) if self.query is None else (self.key(X), self.query(Z))
        logits = (tokens @ queries.unsqueeze(-1)).squeeze(-1)
        attention = torch.softmax(logits, dim=-1)
        return torch.einsum("nt,ntd->nd", attention, X) @ self.v

    def matrix(self) -> Tensor:
        """W (d, d)."""
        weight = self.key.weight.detach()
        return weight if self.query is None else weight.T @ self.query.weight.detach()


def train_one(trials: Trials, b: int, kind: Kind, steps: int) -> Attention:
    """Train one trial: loss, backward, gradients over their norms, a step of SGD."""
    model = Attention(kind, trials.v[b])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    X, Z, Y = trials.X[b], trials.Z[b], trials.Y[b]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.softplus(-Y * model(X, Z)).mean()
        torch.autograd.backward(loss)
        for parameter in model.parameters():
            assert parameter.grad is not None
            norm = parameter.grad.norm()
            if norm > 0:
                parameter.grad /= norm
        optimizer.step()
    return model


def train_all(trials: Trials, kind: Kind, steps: int) -> Any:
    """The same for all trials at once."""
    init = start(kind, trials.X.shape[-1])
    return descend(trials.batch(), trials.scores(), parameterization=kind, steps=steps, learning_rate=RATE, init=init)


def descent(kind: Kind) -> Callable[[bool], Row]:
    """A row: 100 runs of 2,000 steps."""

    def run(quick: bool) -> Row:
        count, steps, sample = (4, 200, 2) if quick else (100, 2000, 5)
        trials = Trials.draw(count)
        apart = _apart(trials, kind, sample)
        train_all(trials, kind, steps)
        seconds: list[float] = []
        alone: list[float] = []
        # The two take turns, so that the pace of the machine cancels.
        for b in range(sample):
            trajectory, spent = timed(partial(train_all, trials, kind, steps), repeats=1 if quick else 3)
            seconds += spent
            alone.append(stopwatch(partial(train_one, trials, b, kind, steps))[1])
        memory = _in_child(kind, count, steps)
        shared: Row = {"status": "done", "gap": apart, "iterations": steps, "stopped": False}
        loss = float(np.mean(np.asarray(trajectory.loss)[:, -1]))
        ours = {"solver": "attsvm descend, all trials at once", "objective": loss, **shared, "seconds": median(seconds)}
        ours["spread"] = [min(seconds), max(seconds)]
        peer = {"solver": "loop of torch autograd, a trial at a time", "objective": None, **shared}
        peer |= {"seconds": count * median(alone), "scaled_from": sample}
        ratio = peer["seconds"] / ours["seconds"]
        return {
            "sizes": {"runs": count, "steps": steps, "n": 6, "T": 8, "d": 10},
            "ours": ours,
            "peer": peer,
            "ratio": ratio,
            "memory": memory,
            "checks": [
                at_least("times as long as ours", ratio, TARGET),
                at_most("gap", apart, 1e-9),
                at_most("GiB at the peak of the process", memory["peak_bytes"] / 2**30, 4.0),
            ],
        }

    return run


def _apart(trials: Trials, kind: Kind, sample: int) -> float:
    """The largest distance of the matrices of both sides after few steps, relative to their size."""
    ours = train_all(trials, kind, EARLY).W[:, -1]
    theirs = torch.stack([train_one(trials, b, kind, EARLY).matrix() for b in range(sample)])
    return float(((ours[:sample] - theirs).norm(dim=(-2, -1)) / theirs.norm(dim=(-2, -1))).max())


def _in_child(kind: Kind, count: int, steps: int) -> Row:
    """Largest resident size of a process that does nothing else."""
    order = json.dumps({"kind": kind, "count": count, "steps": steps})
    command = [sys.executable, "-m", "benchmarks.dynamics", order]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"descent {order}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    answer: Row = json.loads(done.stdout.splitlines()[-1])
    return answer


def _measured(kind: Kind, count: int, steps: int) -> Row:
    train_all(Trials.draw(count), kind, steps)
    # In bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_measured(**json.loads(sys.argv[1]))))
