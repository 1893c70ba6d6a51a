"""What the fork server imports; it also solves one problem, so that the compiled kernels are loaded once."""

# ruff: noqa: F401
from __future__ import annotations

from contextlib import suppress

import torch

import attsvm.cli.main
from attsvm import TokenSelection, solve

with suppress(ImportError):
    from transformers import AutoModel, AutoTokenizer, BertModel

# A process that has used several threads cannot be forked safely.
torch.set_num_threads(1)
for _norm in ("fro", "nuc"):
    solve(TokenSelection([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.2]]], [[1.0, 0.5]], [0]), norm=_norm)
