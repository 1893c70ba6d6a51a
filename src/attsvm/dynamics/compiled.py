"""Many small attention runs in compiled code.

A step of a small problem costs torch mostly the calls of its operations. Here each member of a batch is read into the
cache, takes all its steps there in compiled code, and is written back. It never sees the others, so that it gets the
same numbers, to the bit, alone and in any batch; and a run is a function of its parameters and the optimiser's state,
so that it may be cut anywhere. The formulas are those of :mod:`attsvm.dynamics.layer` and
:mod:`attsvm.dynamics.optimizers`, to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attsvm.dynamics import small_layout as layout
from attsvm.dynamics.heads import Head, Quadratic, ReLU
from attsvm.dynamics.layer import Data
from attsvm.dynamics.optimizers import (
    Adam,
    GradientDescent,
    MirrorDescent,
    Momentum,
    NormalisedDescent,
    Optimizer,
    Parts,
    Polyak,
    SignDescent,
)
from attsvm.dynamics.parameters import Diagonal, Parameters

__all__ = ["LARGEST", "Compiled", "Outcome", "compiled_pays"]

LARGEST = 500_000
"""Size ``n Q T d`` of a problem beyond which torch gains on it: it still takes three times as long there."""

SHARE = 2e6
"""Products for which another thread pays."""

PATIENCE = 1e9
"""Products, about half a second, that are done in one piece: only between pieces can a run be interrupted."""

_LOSSES = {
    "logistic": layout.LOGISTIC,
    "exponential": layout.EXPONENTIAL,
    "correlation": layout.CORRELATION,
    "squared": layout.SQUARED,
    "log": layout.LOGARITHM,
}
_OPTIMIZERS: dict[type, int] = {
    GradientDescent: layout.PLAIN,
    NormalisedDescent: layout.NORMALISED,
    Polyak: layout.POLYAK,
    Momentum: layout.MOMENTUM,
    Adam: layout.ADAM,
    SignDescent: layout.SIGN,
    MirrorDescent: layout.MIRROR,
}


class Outcome(NamedTuple):
    """Where a run stands after some steps."""

    parts: Parts
    state: Parts
    loss: Tensor  # (B,)
    selected: Tensor  # (B, n, Q) index of the most probable token
    mass: Tensor  # (B,) mean probability of that token
    log_scale: Tensor  # (B,) logarithm of the scale of the gradient in the key-query matrix
    moved: Tensor  # (B,) whether the last of the steps changed anything


def compiled_pays(
    data: Data, *, loss: str, optimizer: Optimizer, head: Head | None = None, v: Tensor | None = None
) -> bool:
    """Whether a run is small enough, on the CPU, and made of parts that are compiled.

    Parameters
    ----------
    data
        What it is trained on.
    loss
        Name of the loss.
    optimizer
        Everything but the gradient flow is compiled; Polyak's step for a fixed linear head.
    head
        None for a linear head; torch callables are not compiled.
    v
        A linear head that is trained as well.
    """
    B, n, _, d = data.store.shape
    Q, T = data.allowed.shape[2:]
    fits = 0 < n * Q * T * d <= LARGEST and B > 0
    known = loss in _LOSSES and type(optimizer) in _OPTIMIZERS and (head is None or type(head) in (Quadratic, ReLU))
    fixed = head is None and v is None
    return fits and known and data.queries.device.type == "cpu" and (fixed or not isinstance(optimizer, Polyak))


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A batch of runs, made ready for compiled code."""

    arrays: tuple[layout.Floats, ...]  # the fields of small_run.Batch
    sizes: dict[str, int]  # what small_layout.room asks for
    shape: tuple[int, int, int]  # B, n, Q
    optimizer: Optimizer
    hyper: layout.Floats
    tensors: int  # trained tensors, without the head
    threads: int

    @classmethod
    def ready(
        cls,
        data: Data,
        tokens: Tensor,
        attention: Parameters | Diagonal,
        *,
        rate: Tensor,
        loss: str,
        optimizer: Optimizer,
        head: Head | None = None,
        v: Tensor | None = None,
    ) -> Compiled:
        """Bring a run for which :func:`compiled_pays` into the form that the compiled code reads.

        Parameters
        ----------
        data, tokens
            What it is trained on; tokens (B, n, T, d).
        attention
            The parameterisation; its values play no part.
        rate
            (B,) learning rates.
        loss, optimizer, head, v
            As for :func:`compiled_pays`.
        """
        B, n, Q, T = data.allowed.shape
        bias = torch.zeros_like(data.scores) if data.offsets is None else data.offsets
        bias = bias.masked_fill(~data.allowed, -math.inf)
        labels = torch.ones(B, n, Q) if data.labels is None else data.labels
        kind, code, matrix, penalty = _codes(attention, head, v, tokens)
        m = 1 if attention.tensors[-1].ndim == 2 else attention.tensors[-1].shape[-1]
        flat = (tokens, data.queries.flatten(1, 2), bias.flatten(1, 2), data.scores.flatten(1, 2), labels.flatten(1, 2))
        sizes = {"n": n, "Q": Q, "T": T, "d": tokens.shape[-1], "r": data.queries.shape[-1], "m": m}
        sizes |= {"h": matrix.shape[1], "kind": kind, "head": code, "loss": _LOSSES[loss]}
        return cls(
            arrays=tuple(map(_array, (*flat, matrix, penalty.expand(B), rate.expand(B)))),
            sizes=sizes | {"rule": _OPTIMIZERS[type(optimizer)]},
            shape=(B, n, Q),
            optimizer=optimizer,
            hyper=_hyper(optimizer),
            tensors=len(attention.tensors),
            threads=torch.get_num_threads(),
        )

    def advance(self, parts: Parts, state: Parts, steps: int) -> Outcome:
        """Take so many steps, which may be none; the arguments stay as they are.

        Parameters
        ----------
        parts, state
            The trained tensors, and the state that ``optimizer.init`` makes of them, or those of an outcome.
        steps
            >= 0.
        """
        from attsvm.dynamics.small_run import Batch, Results, State

        B, n, Q = self.shape
        values, means, squares, scales, counts = self._taken_apart(parts, state)
        loss, mass, log_scale = np.zeros(B), np.zeros(B), np.zeros(B)
        selected, moved = np.zeros((B, n * Q), dtype=np.int64), np.zeros(B, dtype=np.bool_)
        work = []
        for own in self._shares(steps):
            value, mean, square = (tuple(array[own] for array in three) for three in (values, means, squares))
            changing = State(value, mean, square, scales[own], counts[own])
            results = Results(loss[own], mass[own], log_scale[own], selected[own], moved[own])
            work.append((Batch(*(array[own] for array in self.arrays)), changing, results))
        workers = min(self.threads, len(work))
        if workers == 1:
            for share in work:
                self._run(share, steps)
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda share: self._run(share, steps), work))
        parts, state = self._put_together(parts, state, values, means, squares, scales, counts)
        measured = (loss, selected.reshape(B, n, Q), mass, log_scale, moved)
        return Outcome(parts, state, *map(torch.from_numpy, measured))

    def _shares(self, steps: int) -> list[slice]:
        """The members that are done in one piece."""
        B, s = self.shape[0], self.sizes
        work = 2.0 * B * (steps + 1) * s["n"] * s["Q"] * s["d"] * (s["T"] + s["r"])
        count = min(B, max(1, min(self.threads, int(work / SHARE)), math.ceil(work / PATIENCE)))
        ends = [B * k // count for k in range(count + 1)]
        return [slice(begin, end) for begin, end in itertools.pairwise(ends)]

    def _run(self, share: tuple[Any, ...], steps: int) -> None:
        """Compiled code, which lets other threads run; each share has a workspace of its own."""
        from attsvm.dynamics.small_run import run

        run(*share, self.hyper, steps, *layout.room(**self.sizes))

    # ------------------------------------------------------------ tensors to arrays and back

    def _taken_apart(self, parts: Parts, state: Parts) -> tuple[Any, ...]:
        """Arrays of small_run.State, none shared with the arguments."""
        B = self.shape[0]
        nothing = tuple(np.zeros((B, 1, 1)) for _ in range(3))
        values = self._three(parts)
        scales, counts = np.zeros((B, 3)), np.zeros(B)
        if isinstance(self.optimizer, Adam):
            counts[:] = state[0].numpy()
            self._set(scales, state[3::3])
            return values, self._three(state[1::3]), self._three(state[2::3]), scales, counts
        if isinstance(self.optimizer, Momentum):
            self._set(scales, state[1::2])
            return values, self._three(state[::2]), nothing, scales, counts
        return values, nothing, nothing, scales, counts

    def _three(self, parts: Sequence[Tensor]) -> tuple[layout.Floats, layout.Floats, layout.Floats]:
        """Left, turned; right; and head, each (B, ., .): what is missing is a 0, for a head the one that is fixed."""
        left, *others = parts[: self.tensors]
        right = others[0] if others else torch.zeros(self.shape[0], 1, 1)
        head = parts[self.tensors].unsqueeze(1) if len(parts) > self.tensors else torch.from_numpy(self.arrays[5])
        if self.sizes["kind"] == layout.DIAGONAL:
            return _array(left.unsqueeze(1), copy=True), _array(right.unsqueeze(1), copy=True), _array(head, copy=True)
        return _array(left.mT, copy=True), _array(right, copy=True), _array(head, copy=True)

    def _set(self, scales: layout.Floats, logs: Sequence[Tensor]) -> None:
        for k, log in enumerate(logs):
            scales[:, 2 if k == self.tensors else k] = log.numpy()

    def _put_together(
        self,
        parts: Parts,
        state: Parts,
        values: Any,
        means: Any,
        squares: Any,
        scales: layout.Floats,
        counts: layout.Floats,
    ) -> tuple[Parts, Parts]:
        """The way back from :meth:`_taken_apart`."""
        new = self._back(values, parts)
        places = [2 if k == self.tensors else k for k in range(len(parts))]
        logs = [torch.from_numpy(scales[:, k].copy()) for k in places]
        if isinstance(self.optimizer, Adam):
            both = zip(self._back(means, parts), self._back(squares, parts), logs, strict=True)
            return new, (torch.from_numpy(counts), *(tensor for three in both for tensor in three))
        if isinstance(self.optimizer, Momentum):
            both_ = zip(self._back(means, parts), logs, strict=True)
            return new, tuple(tensor for two in both_ for tensor in two)
        return new, state

    def _back(self, arrays: Sequence[layout.Floats], parts: Parts) -> Parts:
        left, right, head = (torch.from_numpy(array) for array in arrays)
        if self.sizes["kind"] == layout.DIAGONAL:
            three = (left.squeeze(1), right.squeeze(1), head.squeeze(1))
        else:
            three = (left.mT.contiguous(), right, head.squeeze(1))
        return (*three[: self.tensors], *(three[2:] if len(parts) > self.tensors else ()))


def _codes(attention: Any, head: Head | None, v: Tensor | None, tokens: Tensor) -> tuple[int, int, Tensor, Tensor]:
    """Parameterisation and head as numbers, the head's matrix (B, h, d), and its penalty."""
    kind = layout.FULL if len(attention.tensors) == 1 else layout.FACTORS
    if isinstance(attention, Diagonal):
        kind = layout.DIAGONAL
    zero = torch.zeros((), dtype=torch.float64)
    if isinstance(head, ReLU):
        return kind, layout.RELU, head.V.mT, zero
    if isinstance(head, Quadratic):
        return kind, layout.QUADRATIC, head.v.unsqueeze(1), zero + head.penalty
    if v is not None:
        return kind, layout.TRAINED, v.unsqueeze(1), zero
    return kind, layout.FIXED, torch.zeros(len(tokens), 1, tokens.shape[-1], dtype=torch.float64), zero


def _hyper(optimizer: Optimizer) -> layout.Floats:
    """What an optimiser can be set to, in the order in which the compiled code reads it."""
    hyper = np.zeros(3)
    if isinstance(optimizer, Momentum):
        hyper[0] = optimizer.beta
    elif isinstance(optimizer, Adam):
        hyper[:] = optimizer.beta1, optimizer.beta2, optimizer.epsilon
    elif isinstance(optimizer, MirrorDescent):
        hyper[:2] = optimizer.p, optimizer.normalised
    return hyper


def _array(tensor: Tensor, *, copy: bool = False) -> layout.Floats:
    """Contiguous float64; with ``copy`` never the memory of the tensor."""
    array = tensor.detach().numpy()
    return np.array(array, dtype=np.float64, order="C") if copy else np.ascontiguousarray(array, dtype=np.float64)
