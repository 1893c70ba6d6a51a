"""What a run starts from: its data in float64, its parameters, and a head that has been looked at."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attsvm.dynamics.arguments import read_labels
from attsvm.dynamics.heads import Called, Head
from attsvm.dynamics.layer import Data, TokenStore, probabilities
from attsvm.dynamics.parameters import (
    Diagonal,
    Parameters,
    based_queries,
    each,
    initial_diagonal,
    initial_parameters,
    initial_prompt,
    prompt_basis,
)
from attsvm.dynamics.run import Run
from attsvm.errors import InvalidInputError
from attsvm.selection.arrays import Array
from attsvm.selection.problem import TokenSelection
from attsvm.selection.reading import read_scores

__all__ = ["Start", "begin", "final_scores", "fingerprint", "linear_scores", "read_data", "require_slope"]


@dataclass(frozen=True, kw_only=True)
class Start:
    """The parameterisation and its start, as the user gave them."""

    parameterization: str
    rank: int | None
    init: Any
    seed: int


def read_data(problem: TokenSelection, scores: Array | None, labels: Array | None) -> tuple[Data, Tensor]:
    """The data and the tokens, all in float64 with a batch axis; queries that take no part are 0.

    Parameters
    ----------
    problem
        A single problem or a batch.
    scores
        Of a fixed linear head; None for scores of 0.
    labels
        For another head; default +1.
    """
    t = problem.tensors
    checked = torch.zeros(t.allowed.shape) if scores is None else read_scores(scores, t.allowed, where="descend")
    signs = read_labels(labels, t.allowed.any(-1))

    def batched(part: Tensor) -> Tensor:
        part = part if part.dtype == torch.bool else part.to(torch.float64)
        return part if problem.is_batch else part.unsqueeze(0)

    X, Z, allowed = batched(t.tokens), batched(t.queries), batched(t.allowed)
    active = allowed.any(-1)
    data = Data(
        store=TokenStore(X, allowed),
        queries=torch.where(active.unsqueeze(-1), Z, torch.zeros_like(Z)),
        allowed=allowed,
        active=active,
        offsets=None if t.offsets is None else batched(t.offsets),
        scores=batched(checked.to(X.device)),
        labels=batched(signs),
    )
    return data, X


def linear_scores(data: Data, tokens: Tensor, v: Tensor) -> Tensor:
    """Scores (B, n, Q, T) of a linear head v (B, d) on tokens (B, n, T, d), 0 where nothing is allowed."""
    assert data.labels is not None
    values = each(torch.matmul, tokens, v).unsqueeze(2)
    return torch.where(data.allowed, data.labels.unsqueeze(-1) * values, torch.zeros((), dtype=values.dtype))


def begin(data: Data, start: Start, *, turns: bool) -> tuple[Data, Parameters | Diagonal]:
    """The parameters before the first step, and the data with queries as these see them.

    Parameters
    ----------
    data
        With the queries as they are.
    start
        What was asked for.
    turns
        Whether the queries may be kept in a basis of their span.
    """
    B, _, _, d = data.queries.shape
    device = data.queries.device
    generator = torch.Generator().manual_seed(start.seed)
    if start.parameterization == "p":
        prompt = initial_prompt(start.init, z=prompt_basis(data.queries, data.active), generator=generator)
        return data._replace(queries=data.active.to(torch.float64).unsqueeze(-1)), prompt
    if start.parameterization == "diagonal":
        return data, initial_diagonal(start.init, batch=B, d=d, generator=generator, device=device)
    queries, basis = based_queries(data.queries) if turns else (data.queries, None)
    parameters = initial_parameters(
        start.init,
        parameterization=start.parameterization,
        batch=B,
        d=d,
        rank=d if start.rank is None else start.rank,
        basis=basis,
        generator=generator,
        device=device,
    )
    return data._replace(queries=queries), parameters


def require_slope(head: Head, tokens: Tensor, data: Data, attention: Parameters | Diagonal) -> None:
    """Refuse a head that is not finite at the start, or whose slope is 0 wherever one looks."""
    pooled = data.store.pool(probabilities(data, attention.keys(data.queries)))
    value, slope = head(pooled)
    finite = torch.isfinite(value) & torch.isfinite(slope).all(-1)
    if not bool((finite | ~data.active).all()):
        raise InvalidInputError(
            "descend: head must be finite, with a finite slope, at the tokens that attention pools at the start; "
            "it gives NaN or infinity."
        )
    if not bool((slope != 0).any()) and not bool((head(tokens)[1] != 0).any()):
        raise InvalidInputError("descend: head must not be constant; its slope is 0 at every token.")


def final_scores(run: Run, tokens: Tensor, attention: Tensor) -> Tensor:
    """Scores (B, n, Q, T) at the end: of the linear head, or the local ones of another head."""
    if run.v is not None:
        return linear_scores(run.data, tokens, run.v)
    if run.head is None:
        return run.data.scores
    assert run.data.labels is not None
    _, slope = run.head(run.data.store.pool(attention))
    values = run.data.labels.unsqueeze(-1) * run.data.store.logits(slope)
    return torch.where(run.data.allowed, values, torch.zeros_like(values))


def fingerprint(tokens: Tensor, run: Run) -> str:
    """A hash of all that decides the run's numbers; a callable is told by its outputs on the tokens."""
    about = (run.loss.name, repr(run.optimizer), run.steps, run.planned, type(run.head).__name__)
    digest = hashlib.sha256(repr(about).encode())
    start = run.attention
    parts = [tokens, run.rate, *run.data[1:], *run.parts, start.basis, start.outside]
    if isinstance(run.head, Called):
        parts.append(run.head(tokens)[0])
    elif run.head is not None:
        parts += [torch.as_tensor(value) for value in vars(run.head).values()]
    for tensor in parts:
        if tensor is None:
            continue
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()
