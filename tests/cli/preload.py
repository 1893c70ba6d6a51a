"""What the fork server imports; it also solves one problem, so that the compiled kernels are loaded once."""

from __future__ import annotations

import torch

import attsvm.cli.main  # noqa: F401
from attsvm import TokenSelection, solve

# A process that has used several threads cannot be forked safely.
torch.set_num_threads(1)
for _norm in ("fro", "nuc"):
    solve(TokenSelection([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.2]]], [[1.0, 0.5]], [0]), norm=_norm)
