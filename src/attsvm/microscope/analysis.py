"""The max-margin analysis of every head, one durable record each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from attsvm.microscope.calls import ModuleInfo
from attsvm.microscope.heads import Space, head_problem
from attsvm.microscope.sampled import SHOWN, TRAIN, ModuleSample
from attsvm.microscope.soft import split_soft
from attsvm.microscope.solutions import NullSolution, SolutionSettings, solve_head, solve_null
from attsvm.microscope.twin import twin_arrays
from attsvm.records import read_arrays, read_json, write_arrays, write_json
from attsvm.threads import one_thread

if TYPE_CHECKING:
    from attsvm.microscope.residual import ResidualHead

__all__ = ["HeadJob", "analyse_heads", "read_head", "wanted_solutions"]

Array = npt.NDArray[Any]
HeadNorm = Literal["fro", "nuc"]
Wanted = tuple[tuple[Space, HeadNorm], ...]


def wanted_solutions(space: str, *, has_residual: bool) -> Wanted:
    """Which problems a head is solved for; the first is the one that stands for it.

    The nuclear norm in residual space takes several times as long as everything else together, so it is left out unless
    that space is asked for.
    """
    if space == "residual":
        return (("residual", "fro"), ("residual", "nuc")) if has_residual else ()
    score: Wanted = (("score", "fro"), ("score", "nuc"))
    return (("residual", "fro"), *score) if space == "auto" and has_residual else score


@dataclass(frozen=True, kw_only=True)
class HeadJob:
    """One head to analyse.

    Attributes
    ----------
    index
        Of its module.
    info
        The module.
    head
        From 0.
    residual
        The head's matrices, or None where there is no residual space.
    first_residual
        Those of the module's head 0.
    wanted
        Space and norm of every solution.
    """

    index: int
    info: ModuleInfo
    head: int
    residual: ResidualHead | None
    first_residual: ResidualHead | None
    wanted: Wanted

    @property
    def label(self) -> str:
        """``L5.H3``."""
        return self.info.label(self.head)


def analyse_heads(
    jobs: Iterable[HeadJob],
    samples: Path,
    folder: Path,
    *,
    shown: Sequence[int],
    settings: SolutionSettings,
) -> Iterator[str]:
    """Solve heads one after another, and write ``<label>.json`` and ``<label>.safetensors`` of each.

    Parameters
    ----------
    jobs
        The heads; those of one module are best together.
    samples
        Folder of the modules' samples.
    folder
        Gets the records.
    shown
        Windows of the sample that the page shows.
    settings
        Limits of the solves.

    Yields
    ------
    str
        The label of each head that is done.
    """
    module: _Module | None = None
    for job in jobs:
        if module is None or module.index != job.index:
            module = _Module(job, samples, folder, settings)
        with one_thread():
            _analyse_one(job, module, folder, shown, settings)
        yield job.label


class _Module:
    """What the heads of one module share: the sample, and in residual space the solution of one random matrix.

    There all heads have the same tokens and queries and singular values that are much alike, so that one random matrix
    stands for all; it has those of the module's first head, whichever head comes first here.
    """

    def __init__(self, job: HeadJob, samples: Path, folder: Path, settings: SolutionSettings) -> None:
        self.index = job.index
        self.sample = ModuleSample.load(samples / f"{job.index}.safetensors", job.info)
        self._first = job.first_residual
        self._folder = folder
        self._settings = settings

    def null(self, space: Space, norm: HeadNorm) -> NullSolution | None:
        """The solution of the shared random matrix; None in score space, where each head has its own."""
        if space == "score" or not self._settings.null:
            return None
        path = self._folder / f"null-{self.index}-{norm}.safetensors"
        if not path.exists():
            posed = head_problem(self.sample, 0, space=space, part=TRAIN, residual=self._first)
            seed = (self._settings.seed, self.index)
            found = None if posed is None else solve_null(posed, norm, self._settings, seed=seed)
            W = np.zeros((0, 0)) if found is None else found.W.numpy()
            recovery = np.array([np.nan if found is None else found.recovery])
            write_arrays(path, {"W": W, "recovery": recovery})
        kept = read_arrays(path)
        return (
            None
            if not kept["W"].size
            else NullSolution(W=torch.from_numpy(kept["W"]), recovery=kept["recovery"].item())
        )


def _analyse_one(job: HeadJob, module: _Module, folder: Path, shown: Sequence[int], settings: SolutionSettings) -> None:
    sample = module.sample
    arrays = _selected(sample, job.head)
    found = [
        solution
        for space, norm in job.wanted
        if (
            solution := solve_head(
                sample,
                job.head,
                space=space,
                norm=norm,
                residual=job.residual,
                settings=settings,
                null=module.null(space, norm),
            )
        )
        is not None
    ]
    spectra: dict[str, Any] = {}
    if found:
        spectra = {f"{one.space}.{one.norm}": one.spectrum for one in found if one.spectrum}
        spectra["own"] = found[0].own_spectrum
        arrays |= {f"W.{one.space}.{one.norm}": one.W.astype(np.float32) for one in found if one.W is not None}
        if found[0].W is not None:
            arrays |= twin_arrays(sample, job.head, found[0], shown=shown, residual=job.residual)
    space: Space = "score" if job.residual is None else "residual"
    soft = None
    if job.wanted:
        soft = split_soft(sample, job.head, space=space, residual=job.residual, max_seconds=settings.max_seconds)
    write_arrays(folder / f"{job.label}.safetensors", arrays)
    record = {"solutions": [solution.record() for solution in found], "spectra": spectra}
    write_json(folder / f"{job.label}.json", record | {"soft": None if soft is None else soft.record()})


def _selected(sample: ModuleSample, head: int) -> dict[str, Array]:
    """The key that every sampled query selects, to compare heads with one another."""
    info = sample.info
    kv = head // (info.n_heads // info.n_kv_heads)
    chosen = np.full(len(sample.window), -1, dtype=np.int32)
    for window in np.unique(sample.window):
        mine = np.flatnonzero(sample.window == window)
        keys = sample.k[kv, sample.start[window] : sample.start[window + 1]]
        logits = sample.scale * sample.q[head, mine] @ keys.T
        part = slice(0, len(keys))
        if sample.offsets is not None:
            logits = logits + sample.offsets[head if sample.offsets.shape[0] > 1 else 0][mine, part]
        allowed = sample.allowed[head if sample.allowed.shape[0] > 1 else 0][mine, part]
        logits = np.where(allowed, logits, -np.inf)
        # A query whose largest score is the model's sink selects no token.
        least = -np.inf if sample.sinks is None else sample.sinks[head]
        chosen[mine] = np.where(allowed.any(1) & (logits.max(1) > least), logits.argmax(1), -1)
    judged = sample.part != SHOWN
    order = np.lexsort((sample.position[judged], sample.window[judged]))
    return {"selected": chosen[judged][order]}


def read_head(folder: Path, label: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """The record and the arrays that :func:`analyse_heads` left of one head."""
    record: dict[str, Any] = read_json(folder / f"{label}.json")
    return record, read_arrays(folder / f"{label}.safetensors")
