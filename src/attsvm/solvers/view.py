"""What the loop asks of the rows: values, combinations and sums, of one process or of all of a group.

With a group every process holds the rows of its own sequences. Matrices (p, q) are the same everywhere: a combination
is the sum over all processes, one all-reduce of p x q numbers, whatever the number of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attsvm.errors import AttSVMError
from attsvm.solvers import coordinate
from attsvm.solvers.rows import Floats, Rows

__all__ = ["RowView"]


@dataclass(frozen=True, kw_only=True)
class RowView:
    """The rows of this process, and sums over those of all processes.

    Attributes
    ----------
    rows
        The rows of this process.
    group
        The ``torch.distributed`` group that shares the problem, or None.
    """

    rows: Rows
    group: Any = None

    def values(self, W: Floats) -> Floats:
        """``<A_r, W>`` (R,) for the rows of this process."""
        return coordinate.values(self.rows, W)

    def combine(self, dual: Floats) -> Floats:
        """``sum(dual_r A_r)`` (p, q) over the rows of all processes."""
        combination = coordinate.combine(self.rows, dual)
        if self.group is None:
            return combination
        return self.shared(torch.from_numpy(combination)).numpy()

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return value if self.group is None else float(self.shared(torch.tensor(value, dtype=torch.float64)))

    def most(self, value: float) -> float:
        """The largest value over all processes."""
        if self.group is None:
            return float(value)
        from torch import distributed

        largest = torch.tensor(float(value), dtype=torch.float64)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, self.group)
        return float(largest)

    def gathered(self, mine: Floats) -> Floats:
        """The arrays (k_i, …) of all processes, one after the other; the same on every process."""
        if self.group is None:
            return mine
        from torch import distributed

        pieces: list[Any] = [None] * distributed.get_world_size(self.group)
        distributed.all_gather_object(pieces, mine, self.group)
        return np.concatenate(pieces)

    def shared(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; an error that names the process where a number is not finite."""
        from torch import distributed

        mine = bool(torch.isfinite(value).all())
        distributed.all_reduce(value, distributed.ReduceOp.SUM, self.group)
        if not math.isfinite(float(value.sum())):
            flags = torch.zeros(distributed.get_world_size(self.group), device=value.device)
            flags[distributed.get_rank(self.group)] = not mine
            distributed.all_reduce(flags, distributed.ReduceOp.SUM, self.group)
            guilty = ", ".join(map(str, flags.nonzero().flatten().tolist()))
            raise AttSVMError(f"solve: the numbers of process {guilty} are not finite; all processes stop.")
        return value
