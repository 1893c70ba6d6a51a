"""Train one attention layer and record the path of its key-query matrix."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attsvm.dynamics.layer import Data, Gradient, TokenStore, gradient, probabilities
from attsvm.dynamics.losses import Loss, find_loss
from attsvm.dynamics.optimizers import Step, find_optimizer
from attsvm.dynamics.parameters import Parameters, initial_parameters, query_basis
from attsvm.dynamics.trajectory import Trajectory
from attsvm.errors import AttSVMError, InvalidInputError, RecordError, UnsupportedError
from attsvm.records import read_arrays, write_arrays
from attsvm.selection.arrays import Array
from attsvm.selection.problem import TokenSelection
from attsvm.selection.reading import read_scores
from attsvm.threads import threads_for

__all__ = ["descend", "record_steps"]

Progress = Callable[[int, int, float], None]
"""Called with (step, steps, loss) every 20 steps and at the end."""

PROGRESS_EVERY = 20
CHECKPOINT_EVERY = 500


def descend(
    problem: TokenSelection,
    scores: Array,
    *,
    parameterization: Literal["W", "KQ"] = "W",
    rank: int | None = None,
    head: str = "linear",
    loss: str = "logistic",
    optimizer: str = "ngd",
    learning_rate: float = 0.1,
    steps: int = 2000,
    init: Any = "zeros",
    record_every: int | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Trajectory:
    r"""Train one attention layer with a fixed linear head by gradient descent on the key-query matrix.

    Minimises $\frac1n \sum_{i,q} \ell(\gamma_{iq}^\top \mathrm{softmax}(X_i W z_{iq} + b_{iq}))$ over W, or over K and
    Q with $W = K Q^\top$.

    Parameters
    ----------
    problem
        Tokens, queries, what is allowed, and offsets. Its ``selected`` plays no part. A batch trains B layers at once.
    scores
        $\gamma$ (n, T) or (n, Q, T): label times the head's value of each token; with a leading B for a batch.
    parameterization
        ``"W"`` or ``"KQ"``.
    rank
        Columns m of K and Q; default d. Only for ``"KQ"``.
    head
        ``"linear"``: the scores say it all.
    loss
        ``"logistic"``, ``"exponential"`` or ``"correlation"``.
    optimizer
        ``"ngd"``: each matrix moves by ``learning_rate`` along its normalised gradient, computed so that it does not
        underflow. ``"gd"``: plain gradient descent.
    learning_rate
        > 0 and finite.
    steps
        >= 0.
    init
        ``"zeros"``, ``"normal"``, an array (d, d), or a pair (K, Q); see
        :func:`attsvm.dynamics.parameters.initial_parameters`.
    record_every
        Record every so many steps; default about 40 records at growing distances. The last step is always recorded.
    seed
        For the random part of ``init``.
    checkpoint
        A safetensors file to which the run is saved every 500 steps, and on Ctrl-C; if it exists, the run goes on from
        there, to the identical result.
    progress
        Called with (step, steps, loss) every 20 steps and at the end.

    Returns
    -------
    Trajectory
        Computed in float64; arrays have the problem's kind and dtype.

    Raises
    ------
    InvalidInputError
        If an argument is not what it must be.
    RecordError
        If the checkpoint is damaged or belongs to another run.
    AttSVMError
        If the run diverges to a value that is not finite.

    Notes
    -----
    A step costs two passes over the tokens and products of the queries with the trained matrices.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898.

    Examples
    --------
    >>> problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0])
    >>> trajectory = descend(problem, [[1.0, 0.0]], steps=100)
    >>> str(trajectory.verdict), float(trajectory.correlation(trajectory.solution())[-1])
    ('global', 1.0)
    """
    _check(problem, parameterization, rank, head, learning_rate, steps, record_every, seed)
    rule, step = find_loss(loss, where="descend"), find_optimizer(optimizer, where="descend")
    data, basis, scores_ = _prepare(problem, scores)
    n, Q, T, d = problem.shape
    columns = d if rank is None else rank
    start = initial_parameters(
        init,
        parameterization=parameterization,
        batch=len(problem),
        d=d,
        rank=columns,
        basis=basis,
        generator=torch.Generator().manual_seed(seed),
        device=data.queries.device,
    )
    planned = record_steps(steps, record_every)
    run = _Run(data=data, loss=rule, step=step, rate=learning_rate, steps=steps, planned=planned, parameters=start)
    if checkpoint is not None:
        run.restore(checkpoint, fingerprint=_fingerprint(problem, run, loss, optimizer))
    r = data.queries.shape[-1]
    with threads_for(4.0 * len(problem) * n * Q * (T * d + d * r)):
        run.go(progress)
    return _trajectory(problem, scores_, run, parameterization)


def record_steps(steps: int, every: int | None) -> list[int]:
    """The steps to record: every so many, or 0, 1, 2, ... at distances that grow by a fifth; and the last."""
    if every is not None:
        return sorted({*range(0, steps + 1, every), steps})
    planned, place = [0], 1.0
    while place < steps:
        planned.append(round(place))
        place = max(place + 1.0, 1.2 * place)
    return sorted({*planned, steps})


def _check(
    problem: Any,
    parameterization: Any,
    rank: Any,
    head: Any,
    learning_rate: Any,
    steps: Any,
    record_every: Any,
    seed: Any,
) -> None:
    if not isinstance(problem, TokenSelection):
        raise InvalidInputError(f"descend: problem must be a TokenSelection, got {type(problem).__name__}.")
    if parameterization not in ("W", "KQ"):
        raise InvalidInputError(f'descend: parameterization must be "W" or "KQ", got {parameterization!r}.')
    if rank is not None and parameterization == "W":
        raise InvalidInputError('descend: rank must be None for parameterization="W"; it belongs to "KQ".')
    if rank is not None and not _is_integer(rank, least=1):
        raise InvalidInputError(f"descend: rank must be an integer >= 1, got {rank!r}.")
    if head != "linear":
        raise UnsupportedError(f'descend: head must be "linear" in this version, got {head!r}.')
    if not (isinstance(learning_rate, (int, float)) and 0 < learning_rate < math.inf):
        raise InvalidInputError(f"descend: learning_rate must be > 0 and finite, got {learning_rate!r}.")
    if not _is_integer(steps, least=0):
        raise InvalidInputError(f"descend: steps must be an integer >= 0, got {steps!r}.")
    if record_every is not None and not _is_integer(record_every, least=1):
        raise InvalidInputError(f"descend: record_every must be an integer >= 1 or None, got {record_every!r}.")
    if not (_is_integer(seed, least=0) and seed < 2**63):
        raise InvalidInputError(f"descend: seed must be an integer in [0, 2**63), got {seed!r}.")


def _is_integer(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _prepare(problem: TokenSelection, scores: Array) -> tuple[Data, Tensor | None, Tensor]:
    """Everything in float64 with a batch axis, queries in the basis of their span."""
    t = problem.tensors
    checked = read_scores(scores, t.allowed, where="descend")
    tokens, queries, allowed, offsets, values = (
        None if part is None else part if problem.is_batch else part.unsqueeze(0)
        for part in (t.tokens, t.queries, t.allowed, t.offsets, checked)
    )
    assert tokens is not None
    assert queries is not None
    assert allowed is not None
    assert values is not None
    X, Z = tokens.to(torch.float64), queries.to(torch.float64)
    active = allowed.any(-1)
    Z = torch.where(active.unsqueeze(-1), Z, torch.zeros_like(Z))
    basis = query_basis(Z)
    data = Data(
        store=TokenStore(X, allowed),
        queries=Z if basis is None else Z @ basis.unsqueeze(1),
        allowed=allowed,
        active=active,
        offsets=None if offsets is None else offsets.to(torch.float64),
        scores=values.to(torch.float64),
    )
    return data, basis, checked.to(torch.float64)


@dataclass(kw_only=True)
class _Run:
    """A run under way: what it is trained on and by, where it stands, and what it has recorded."""

    data: Data
    loss: Loss
    step: Step
    rate: float
    steps: int
    planned: list[int]
    parameters: Parameters
    done: int = 0
    records: list[tuple[Tensor, ...]] = field(default_factory=list)
    last: Gradient | None = None
    stalled: Tensor | None = None
    path: Path | None = None
    fingerprint: str = ""

    def go(self, progress: Progress | None) -> None:
        """Take the remaining steps; save on the way, and on Ctrl-C."""
        due = iter(self.planned[len(self.records) :])
        wanted = next(due, None)
        try:
            while True:
                g = gradient(self.data, self.parameters.keys(self.data.queries), self.loss)
                if self.done == wanted:
                    self._record(g)
                    wanted = next(due, None)
                if progress is not None and (self.done % PROGRESS_EVERY == 0 or self.done == self.steps):
                    progress(self.done, self.steps, float(g.loss.mean()))
                self.last = g
                if self.done == self.steps:
                    break
                self._advance(g)
                if self.done % CHECKPOINT_EVERY == 0:
                    self.save()
            self.save()
        except KeyboardInterrupt:
            self.save()
            raise

    def _advance(self, g: Gradient) -> None:
        before = self.parameters.tensors
        changes = self.step(self.parameters.slopes(g, self.data.queries), g.log_scale, self.rate)
        after = tuple(value + change for value, change in zip(before, changes, strict=True))
        done, stalled = self.done + 1, self.stalled
        if done == self.steps:
            moved = [(new != old).flatten(1).any(-1) for new, old in zip(after, before, strict=True)]
            stalled = ~torch.stack(moved).any(0)
        # One statement: Ctrl-C finds a step either taken or not, never half of one in the checkpoint.
        self.parameters, self.done, self.stalled = self.parameters.replaced(after), done, stalled

    def _record(self, g: Gradient) -> None:
        W = self.parameters.matrix()
        if not bool(torch.isfinite(W).all()) or not bool(torch.isfinite(g.loss).all()):
            raise AttSVMError(f"descend: the run left the range of float64 at step {self.done}; lower learning_rate.")
        self.records.append((W.clone(), g.loss, torch.linalg.vector_norm(W, dim=(-2, -1)), g.mass))

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write the state to the checkpoint, if there is one."""
        if self.path is None:
            return
        arrays = {f"parameter.{i}": value.cpu().numpy() for i, value in enumerate(self.parameters.tensors)}
        arrays["done"] = np.array([self.done])
        if self.stalled is not None:
            arrays["stalled"] = self.stalled.cpu().numpy()
        for i, name in enumerate(("W", "loss", "norm", "mass")):
            parts = [record[i] for record in self.records]
            arrays[f"record.{name}"] = torch.stack(parts).cpu().numpy() if parts else np.zeros(0)
        arrays["fingerprint"] = np.frombuffer(self.fingerprint.encode(), dtype=np.uint8)
        write_arrays(self.path, arrays)

    def restore(self, path: Path, *, fingerprint: str) -> None:
        """Go on from the checkpoint at ``path``, if it exists; save to it from now on."""
        self.path, self.fingerprint = path, fingerprint
        if not path.exists():
            return
        saved = read_arrays(path)
        if saved.get("fingerprint", np.zeros(0, np.uint8)).tobytes() != fingerprint.encode():
            raise RecordError(f"{path} belongs to a run with other data or settings; remove it to start anew.")
        device = self.data.queries.device
        tensors = tuple(
            torch.from_numpy(saved[f"parameter.{i}"]).to(device) for i in range(len(self.parameters.tensors))
        )
        self.parameters = self.parameters.replaced(tensors)
        self.done = int(saved["done"][0])
        self.stalled = torch.from_numpy(saved["stalled"]).to(device) if "stalled" in saved else None
        columns = [torch.from_numpy(saved[f"record.{name}"]).to(device) for name in ("W", "loss", "norm", "mass")]
        self.records = [tuple(column[k] for column in columns) for k in range(len(columns[0]))]


def _fingerprint(problem: TokenSelection, run: _Run, loss: str, optimizer: str) -> str:
    """A hash of all that decides the run's numbers."""
    digest = hashlib.sha256(repr((loss, optimizer, run.rate, run.steps, run.planned)).encode())
    start = run.parameters
    for tensor in (problem.tensors.tokens, *run.data[1:], *start.tensors, start.basis, start.outside):
        if tensor is None:
            continue
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()


def _trajectory(problem: TokenSelection, scores: Tensor, run: _Run, parameterization: str) -> Trajectory:
    """Put the records into the problem's kind and shape."""
    g = run.last
    assert g is not None
    single = not problem.is_batch
    selected = torch.where(run.data.active, g.selected, torch.full_like(g.selected, -1))
    attention = probabilities(run.data, run.parameters.keys(run.data.queries))
    columns = [torch.stack([record[i] for record in run.records], 1) for i in range(4)]
    factors = run.parameters.factors()
    stalled = run.stalled if run.stalled is not None else torch.zeros(len(problem), dtype=torch.bool)

    def out(value: Tensor) -> Any:
        return problem.kind.back(value[0] if single else value)

    return Trajectory(
        steps=problem.kind.back(torch.tensor(run.planned)),
        W=out(columns[0]),
        loss=out(columns[1]),
        norm=out(columns[2]),
        attention_mass=out(columns[3]),
        selected=out(selected),
        probabilities=out(attention),
        K=None if factors is None else out(factors[0]),
        Q=None if factors is None else out(factors[1]),
        problem=problem.with_selected(selected[0] if single else selected),
        scores=scores,
        parameterization=parameterization,
        stalled=bool(stalled[0]) if single else out(stalled),
    )
