"""Problems in files, for ``attsvm solve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

N, T, D = 24, 6, 8


def some_problem(*, guilty: int | None = None, n: int = N) -> dict[str, Any]:
    """Random sequences, whose tokens can be separated; with ``guilty``, all but that one.

    The guilty sequence selects a token in the middle of two others, which no matrix puts above both.
    """
    rng = np.random.default_rng(5)
    tokens, queries = rng.standard_normal((n, T, D)), rng.standard_normal((n, D))
    # A matrix that the selection follows, so that it exists.
    logits = np.einsum("ntd,de,ne->nt", tokens, rng.standard_normal((D, D)), queries)
    selected = logits.argmax(1)
    if guilty is not None:
        tokens[guilty, 2] = 2 * tokens[guilty, 0] - tokens[guilty, 1]
        selected[guilty] = 0
    return {"tokens": tokens, "queries": queries, "selected": selected}


def write_problem(path: Path, *, guilty: int | None = None, n: int = N, **changes: Any) -> Path:
    """Write a problem with some keys changed; None leaves a key out."""
    content = {**some_problem(guilty=guilty, n=n), **changes}
    arrays = {key: np.asarray(value) for key, value in content.items() if value is not None}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file(arrays, path)
    return path


def solution_at(run: Path) -> dict[str, np.ndarray]:
    """The arrays of a solution."""
    arrays: dict[str, np.ndarray] = load_file(run / "solution.safetensors")
    return arrays
