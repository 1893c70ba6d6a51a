"""A run under way: its steps, its records, and the checkpoint it can go on from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attsvm.dynamics.compiled import Compiled
from attsvm.dynamics.flow import GradientFlow
from attsvm.dynamics.heads import Head
from attsvm.dynamics.layer import Data, Gradient, gradient
from attsvm.dynamics.losses import Loss
from attsvm.dynamics.optimizers import Optimizer, Parts, Polyak, Slopes
from attsvm.dynamics.parameters import Diagonal, Parameters
from attsvm.errors import AttSVMError, RecordError
from attsvm.records import read_arrays, write_arrays

__all__ = ["MembersDivergedError", "Progress", "Run"]

Progress = Callable[[int, int, float], None]
"""Called with (step, steps, loss) every 20 steps and at the end."""

PROGRESS_EVERY = 20
CHECKPOINT_EVERY = 500

_log = logging.getLogger(__name__)


class MembersDivergedError(AttSVMError):
    """Some members of a run left the range of float64; their places are ``members``."""

    def __init__(self, message: str, members: tuple[int, ...]) -> None:
        super().__init__(message)
        self.members = members


@dataclass(kw_only=True)
class Run:
    """What is trained on what and by what, where it stands, and what it has recorded."""

    data: Data
    loss: Loss
    optimizer: Optimizer
    rate: Tensor  # (B,)
    steps: int
    planned: list[int]
    attention: Parameters | Diagonal
    head: Head | None = None
    v: Tensor | None = None  # (B, d): a linear head that is trained as well
    single: bool = False
    state: Parts = ()
    done: int = 0
    records: list[dict[str, Tensor]] = field(default_factory=list)
    last: Gradient | None = None
    recorded: tuple[Parts, Gradient] | None = None
    stalled: Tensor | None = None
    compiled: Compiled | None = None
    path: Path | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        self.state = self.optimizer.init(self.parts)

    @property
    def parts(self) -> Parts:
        """The trained tensors."""
        return self.attention.tensors if self.v is None else (*self.attention.tensors, self.v)

    def go(self, progress: Progress | None) -> None:
        """Take the remaining steps; save on the way, and on Ctrl-C."""
        due = iter(self.planned[len(self.records) :])
        wanted = next(due, None)
        try:
            while True:
                g, slopes = self._evaluate(self.parts)
                self._require_finite(g, look=self.done == wanted)
                if self.done == wanted:
                    self._record(g)
                    wanted = next(due, None)
                if progress is not None and (self.done % PROGRESS_EVERY == 0 or self.done == self.steps):
                    progress(self.done, self.steps, float(g.loss.mean()))
                self.last = g
                if self.done == self.steps:
                    break
                if self.compiled is not None:
                    self._jump(self._next_stop(wanted, told=progress is not None))
                else:
                    self._advance(slopes)
                if self.done % CHECKPOINT_EVERY == 0:
                    self.save()
            self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        self._tell_stalled()

    def rewind(self) -> bool:
        """Go back to the last record of this process, if there is one."""
        if self.recorded is None:
            return False
        parts, self.last = self.recorded
        self.attention, self.v = self.attention.replaced(parts), None if self.v is None else parts[-1]
        return True

    def _evaluate(self, parts: Parts) -> tuple[Gradient, Slopes]:
        """The gradient at other values of the trained tensors."""
        queries = self.data.queries
        attention = self.attention.replaced(parts)
        v = None if self.v is None else parts[-1]
        gap = isinstance(self.optimizer, Polyak)
        g = gradient(self.data, attention.keys(queries), self.loss, head=self.head, v=v, gap=gap)
        values = attention.slopes(g, queries)
        logs = (g.log_scale,) * len(values)
        if g.head is not None and g.head_log is not None:
            values, logs = (*values, g.head), (*logs, g.head_log)
        return g, Slopes(values, logs, g.gap)

    def _advance(self, slopes: Slopes) -> None:
        before = self.parts
        after, state = self.optimizer.step(
            before, slopes, self.state, self.rate, lambda parts: self._evaluate(parts)[1]
        )
        done, stalled = self.done + 1, self.stalled
        if done == self.steps:
            moved = [(new != old).flatten(1).any(-1) for new, old in zip(after, before, strict=True)]
            stalled = ~torch.stack(moved).any(0)
        attention, v = self.attention.replaced(after), None if self.v is None else after[-1]
        # One statement: Ctrl-C finds a step either taken or not, never half of one in the checkpoint.
        self.attention, self.v, self.state, self.done, self.stalled = attention, v, state, done, stalled

    def _next_stop(self, wanted: int | None, *, told: bool) -> int:
        """The next step at which something but a step is done."""
        stops = [self.steps, (self.done // CHECKPOINT_EVERY + 1) * CHECKPOINT_EVERY]
        if wanted is not None:
            stops.append(wanted)
        if told:
            stops.append((self.done // PROGRESS_EVERY + 1) * PROGRESS_EVERY)
        return min(stops)

    def _jump(self, done: int) -> None:
        """Take all steps up to ``done`` in compiled code."""
        assert self.compiled is not None
        end = self.compiled.advance(self.parts, self.state, done - self.done)
        stalled = ~end.moved if done == self.steps else self.stalled
        attention, v = self.attention.replaced(end.parts), None if self.v is None else end.parts[-1]
        # One statement, as in _advance.
        self.attention, self.v, self.state, self.done, self.stalled = attention, v, end.state, done, stalled

    def _record(self, g: Gradient) -> None:
        W = self.attention.matrix()
        record = {"W": W.clone(), "loss": g.loss, "norm": torch.linalg.vector_norm(W, dim=(-2, -1)), "mass": g.mass}
        if self.v is not None:
            record["head"] = self.v
        if isinstance(self.optimizer, GradientFlow):
            record["log_time"] = self.state[0]
        self.records.append(record)
        self.recorded = self.parts, g

    def _require_finite(self, g: Gradient, *, look: bool) -> None:
        """Refuse to go on from a loss or a gradient that is not a number."""
        looked = (g.loss, g.log_scale, *(self.parts if look else ()))
        if all(bool(torch.isfinite(part.sum())) or bool(torch.isfinite(part).all()) for part in looked):
            return
        good = torch.isfinite(g.loss) & torch.isfinite(g.log_scale)
        whole = torch.stack([torch.isfinite(part).flatten(1).all(-1) for part in self.parts]).all(0)
        members = tuple((~(good & whole)).nonzero().flatten().tolist())
        who = "the run" if self.single else f"problem {members[0]} of the batch"
        if len(members) > 1:
            who = f"problems {', '.join(map(str, members[:8]))}{', …' if len(members) > 8 else ''} of the batch"
        why = "left the range of float64"
        advice = "; lower learning_rate" if self.done else "; look at init and the head"
        if self.loss.name == "log" and bool(whole.all()):
            why = "reached an output <= 0"
            advice = ', where loss="log" has no value; every query needs a token of score > 0 that it attends to'
        raise MembersDivergedError(f"descend: {who} {why} by step {self.done}{advice}.", members)

    def _tell_stalled(self) -> None:
        if self.stalled is not None and bool(self.stalled.any()):
            members = self.stalled.nonzero().flatten().tolist()
            who = "the run" if self.single else f"{len(members)} of {len(self.stalled)} runs ({members[0]} first)"
            _log.warning(
                "descend: %s stalled: the last step changed nothing, because the gradient is 0 or smaller than float64 "
                "can add to the trained tensors.",
                who,
            )

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write the state to the checkpoint, if there is one."""
        if self.path is None:
            return
        arrays = {f"parameter.{i}": value.cpu().numpy() for i, value in enumerate(self.parts)}
        arrays |= {f"state.{i}": value.cpu().numpy() for i, value in enumerate(self.state)}
        arrays["done"] = np.array([self.done])
        if self.stalled is not None:
            arrays["stalled"] = self.stalled.cpu().numpy()
        for name in self.records[0] if self.records else ():
            arrays[f"record.{name}"] = torch.stack([record[name] for record in self.records]).cpu().numpy()
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

        def named(kind: str, count: int) -> Parts:
            return tuple(torch.from_numpy(saved[f"{kind}.{i}"]).to(device) for i in range(count))

        parts, self.state = named("parameter", len(self.parts)), named("state", len(self.state))
        self.attention, self.v = self.attention.replaced(parts), None if self.v is None else parts[-1]
        self.done = int(saved["done"][0])
        self.stalled = torch.from_numpy(saved["stalled"]).to(device) if "stalled" in saved else None
        columns = {
            name.removeprefix("record."): torch.from_numpy(value).to(device)
            for name, value in saved.items()
            if name.startswith("record.")
        }
        count = len(columns["W"]) if columns else 0
        self.records = [{name: column[k] for name, column in columns.items()} for k in range(count)]
