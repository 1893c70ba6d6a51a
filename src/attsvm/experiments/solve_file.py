"""``attsvm solve``: a problem from a file, its certified solution and how the gap closed as records."""

from __future__ import annotations

import contextlib
import datetime
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attsvm.data import FileProblem, read_problem
from attsvm.errors import AttSVMError, InvalidInputError, RecordError
from attsvm.experiments.processes import Processes
from attsvm.experiments.solve_summary import summary_of
from attsvm.records import (
    SCHEMA_VERSION,
    RunFolder,
    package_versions,
    read_arrays,
    source_commit,
    write_arrays,
)
from attsvm.selection import Norm
from attsvm.solvers import Solution, Status, solve

__all__ = ["GapProgress", "SolveConfig", "SolveFolder", "solve_file"]

GapProgress = Callable[[int, float], None]
"""Called with (iterations, gap)."""

FINAL = {"optimal", "local", "infeasible"}
"""Statuses after which there is nothing to go on with."""

_NORMS: dict[str, Norm] = {"fro": "fro", "nuc": "nuc", "op": "op"}

_LIMITS = ("tol", "method", "max_seconds", "max_iterations", "max_bytes")
"""Options that may change when a run goes on."""


class SolveConfig(BaseModel):
    """Settings of ``attsvm solve``; a run folder keeps them in ``config.json``.

    Attributes
    ----------
    file
        The ``.npz`` or ``.safetensors`` file; see :func:`attsvm.data.read_problem`.
    norm
        ``"fro"``, ``"nuc"``, ``"op"`` or a number p >= 1, as text.
    penalty
        Price of a unit of slack; None for the hard margin.
    rank, tol, method, max_seconds, max_iterations, max_bytes
        As in :func:`attsvm.solve`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file: str = Field(min_length=1)
    norm: str = "fro"
    penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    rank: int | None = Field(default=None, ge=1)
    tol: float = Field(default=1e-6, gt=0, lt=1)
    method: Literal["auto", "coordinate", "newton", "splitting", "primal-dual"] = "auto"
    max_seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_iterations: int | None = Field(default=None, ge=0)
    max_bytes: int | None = Field(default=None, ge=2**20)

    @classmethod
    def checked(cls, **values: Any) -> SolveConfig:
        """Build a configuration; raises InvalidInputError with one sentence for the first bad value."""
        if values.get("penalty") == math.inf:
            values["penalty"] = None
        try:
            config = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = "--" + str(first["loc"][0]).replace("_", "-")
            wanted = first["msg"].replace("Input should be", "must be")
            raise InvalidInputError(f"solve: {name} {wanted}, got {first['input']!r}.") from error
        config.norm_value  # noqa: B018  (raises for what is no norm)
        return config

    @property
    def norm_value(self) -> Norm:
        """The norm as :func:`attsvm.solve` takes it."""
        if self.norm in _NORMS:
            return _NORMS[self.norm]
        with contextlib.suppress(ValueError):
            if float(self.norm) >= 1:
                return float(self.norm)
        raise InvalidInputError(f"solve: --norm must be fro, nuc, op or a number p >= 1, got {self.norm!r}.")


class SolveFolder(RunFolder):
    """A run folder with the solution in it.

    Parameters
    ----------
    path
        The folder.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.solution_file = self.path / "solution.safetensors"
        self.best_file = self.checkpoint / "best.safetensors"

    def clear(self) -> None:
        """Remove the records, the solution with them."""
        super().clear()
        self.solution_file.unlink(missing_ok=True)

    def holds(self, config: SolveConfig) -> bool:
        """Whether the folder holds a run of these settings, limits aside."""
        try:
            record = self.read_config()
        except RecordError:
            return False
        held = record.get("config")
        return record.get("kind") == "solve" and isinstance(held, dict) and _lasting(held) == _lasting(config)

    @property
    def is_final(self) -> bool:
        """Whether the run in the folder came to an end that going on cannot better."""
        if not self.is_complete:
            return False
        try:
            status = self.read_result().get("status")
        except RecordError:
            return True
        return set(status if isinstance(status, list) else [status]) <= FINAL


def _lasting(config: SolveConfig | dict[str, Any]) -> dict[str, Any]:
    """The settings that say which problem it is."""
    settings = config if isinstance(config, dict) else config.model_dump(mode="json")
    return {key: value for key, value in settings.items() if key not in _LIMITS}


def solve_file(
    config: SolveConfig,
    folder: SolveFolder,
    *,
    command: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: GapProgress | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Solve the problem of a file and leave its records in ``folder``.

    Parameters
    ----------
    config
        The settings.
    folder
        Where the records go; the same in every process.
    command
        How to run it again, for the record.
    resume
        Go on from the last checkpoint in the folder, if there is one.
    overwrite
        Whether the records of an earlier run may be replaced.
    progress
        Called at every check of the gap, but not for a batch, which has no one gap.
    processes
        The processes that share the work; the first of them writes. Default: this one alone.

    Returns
    -------
    dict
        The content of ``result.json``. What fell short of the tolerance, and what has no solution, is in its
        ``status``; neither is an exception.

    Raises
    ------
    InvalidInputError
        If the file or an option cannot be used, or the folder holds another run and ``overwrite`` is False.
    RecordError
        If the folder or the checkpoint cannot be read or written, or another process uses the folder.
    """
    processes = processes or Processes()
    began = time.monotonic()
    is_new = not folder.path.exists()
    with processes.working(), contextlib.ExitStack() as held:
        data = processes.together(lambda: read_problem(config.file, rank=processes.rank, size=processes.size))
        processes.together(lambda: _take(folder, config, data, held, processes, resume=resume, overwrite=overwrite))
        run = _Run(config, folder, data, processes, progress, _about(config, folder, data, command), overwrite)
        if resume:
            processes.together(run.read_checkpoint)
        read = time.monotonic()
        try:
            solution = run.solve()
        except AttSVMError:
            if is_new and processes.is_first and not run.has_begun:  # an option was wrong: no folder is left behind
                folder.discard()
            raise
        seconds = {"reading": read - began, "solving": time.monotonic() - read, "total": time.monotonic() - began}
        return run.finish(solution, seconds)


def _take(
    folder: SolveFolder,
    config: SolveConfig,
    data: FileProblem,
    held: contextlib.ExitStack,
    processes: Processes,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make sure that the folder may be used, and hold it; the first process does so for all."""
    if not processes.is_first:
        return
    if folder.path.exists():
        _check_folder(folder, config, data, resume=resume, overwrite=overwrite)
    held.enter_context(folder.lock())


def _check_folder(
    folder: SolveFolder, config: SolveConfig, data: FileProblem, *, resume: bool, overwrite: bool
) -> None:
    if not folder.path.is_dir():
        raise InvalidInputError(f"solve: --output-dir must be a folder, got the file {folder.path}.")
    where = f"solve: --output-dir {folder.path}"
    if folder.holds_other_files:
        raise InvalidInputError(f"{where} must be new, or a run of attsvm; it holds other files.")
    if overwrite or not folder.config_file.exists():
        return
    if not folder.holds(config):
        raise InvalidInputError(
            f"{where} holds a run of another file or with other settings; choose another folder or add --overwrite."
        )
    if not resume:
        if folder.is_final:
            raise InvalidInputError(f"{where} holds a finished run; choose another folder or add --overwrite.")
        raise InvalidInputError(
            f"{where} holds an unfinished run; add --resume to go on with it, or --overwrite to replace it."
        )
    if folder.read_config().get("content_hash") != data.content_hash:
        raise InvalidInputError(
            f"{where} holds a run of {data.source} as it was before its arrays changed; "
            "choose another folder or add --overwrite."
        )


def _about(config: SolveConfig, folder: SolveFolder, data: FileProblem, command: str) -> dict[str, Any]:
    """What ``config.json`` and ``result.json`` both say."""
    return {
        "kind": "solve",
        "name": folder.path.name,
        "command": command,
        "versions": package_versions("torch", "numpy", "numba", "safetensors"),
        "commit": source_commit(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "content_hash": data.content_hash,
    }


class _Run:
    """A solve and its records, in one of the processes that share it."""

    def __init__(
        self,
        config: SolveConfig,
        folder: SolveFolder,
        data: FileProblem,
        processes: Processes,
        progress: GapProgress | None,
        about: dict[str, Any],
        overwrite: bool,
    ) -> None:
        self.config, self.folder, self.data, self.processes = config, folder, data, processes
        self.progress = progress if processes.is_first else None
        self.about, self.overwrite = about, overwrite
        self.has_begun = False
        self.start: Solution | None = None
        self.earlier: list[dict[str, Any]] = []

    @property
    def is_batch(self) -> bool:
        """Whether the file holds many problems."""
        return self.data.problem.is_batch

    def read_checkpoint(self) -> None:
        """Find where to begin: the last checkpoint, or the answer of a run that came to a limit."""
        path = next((one for one in (self.folder.best_file, self.folder.solution_file) if one.exists()), None)
        if path is None or self.is_batch:
            return
        arrays = read_arrays(path)
        d = self.data.problem.shape[-1]
        shapes = {"W": (d, d), "duals": self._whole_shape, "equality_duals": self._whole_shape}
        if any(name not in arrays or arrays[name].shape != shape for name, shape in shapes.items()):
            raise RecordError(f"{path} is not a checkpoint of this problem; --overwrite begins anew.")
        mine = slice(self.processes.rank, None, self.processes.size)
        duals, ties = arrays["duals"][mine], arrays["equality_duals"][mine]
        self.start = Solution(
            W=arrays["W"],
            status=Status.INTERRUPTED,
            upper_bound=math.inf,
            lower_bound=0.0,
            duals=duals,
            equality_duals=ties,
            support=duals > 0,
            margin=0.0,
            norm=self.config.norm_value,
            iterations=0,
            seconds=0.0,
            method="checkpoint",
        )
        if self.folder.metrics_file.exists():
            self.earlier = self.folder.read_metrics()

    @property
    def _whole_shape(self) -> tuple[int, ...]:
        return (self.data.total, *self.data.problem.tensors.selected.shape[1:])

    def begin(self) -> None:
        """Make the folder that of this run, unfinished; not before the solver has taken what it was given."""
        if self.processes.is_first and not self.has_begun:
            if self.overwrite:
                self.folder.clear()
                self.folder.create()
            self.folder.result_file.unlink(missing_ok=True)
            self.folder.write_config({**self.about, "config": self.config.model_dump(mode="json")})
        self.has_begun = True

    def solve(self) -> Solution:
        """Solve, alone or as one of several."""
        config = self.config
        alone = self.is_batch or self.processes.size == 1
        return solve(
            self.data.problem,
            config.norm_value,
            rank=config.rank,
            penalty=math.inf if config.penalty is None else config.penalty,
            tol=config.tol,
            max_seconds=config.max_seconds,
            max_iterations=config.max_iterations,
            max_bytes=config.max_bytes,
            method=config.method,
            center=self.data.center,
            warm_start=self.start,
            on_failure="ignore",
            progress=self._tell,
            checkpoint=None if self.is_batch else self._keep,
            process_group=None if alone else self.processes.group,
        )

    def _tell(self, iterations: int, gap: float) -> None:
        self.begin()
        # The problems of a batch are not in step.
        self.processes.heed_interrupt(together=not self.is_batch)
        if self.progress is not None and not self.is_batch:
            self.progress(iterations, gap)

    def _keep(self, best: Solution) -> None:
        """Write a checkpoint: W and all multipliers, in the order of the file, so that any number of processes fits."""
        arrays = self._arrays(best)
        if self.processes.is_first:
            write_arrays(self.folder.best_file, arrays)
            self.folder.write_metrics(self._metrics(best))

    def _arrays(self, solution: Solution) -> dict[str, Any]:
        """The arrays of the answer; whole in the first process."""

        def whole(value: Any) -> Any:
            return self.processes.joined(value, self.data.total)

        arrays = {
            "W": whole(solution.W) if self.is_batch else solution.W,
            "duals": whole(solution.duals),
            "equality_duals": whole(solution.equality_duals),
        }
        rays = solution.ray if self.is_batch else (solution.ray,)
        if any(ray is not None for one in self.processes.everywhere(tuple(rays)) for ray in one):
            zero = np.zeros(solution.duals.shape[1:] if self.is_batch else solution.duals.shape)
            for name, part in (("ray", "weights"), ("equality_ray", "equality_weights")):
                parts = [zero if ray is None else getattr(ray, part) for ray in rays]
                arrays[name] = whole(np.stack(parts) if self.is_batch else parts[0])
        return arrays

    def _metrics(self, solution: Solution) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``; iterations go on counting where an earlier part of the run ended."""
        before = self.earlier[-1]["iteration"] if self.earlier else 0
        names = ("iteration", "gap", "upper_bound", "lower_bound")
        rows = [dict(zip(names, entry, strict=False)) for entry in solution.history]
        return self.earlier + [{**row, "iteration": before + row["iteration"]} for row in rows]

    def finish(self, solution: Solution, seconds: dict[str, float]) -> dict[str, Any]:
        """Write the records, ``result.json`` last; return its content."""
        self.begin()
        arrays = self._arrays(solution)
        result = {
            **self.about,
            "seconds": seconds,
            "source": self.data.source,
            "norm": solution.norm if isinstance(solution.norm, str) else f"{solution.norm:g}",
            "penalty": self.config.penalty,
            "tol": self.config.tol,
            **summary_of(self.data, solution, self.processes),
            "resumed": self.start is not None,
        }
        if self.processes.is_first:
            self.folder.write_metrics(self._metrics(solution))
            write_arrays(self.folder.solution_file, arrays)
            self.folder.write_result(result)
            shutil.rmtree(self.folder.checkpoint, ignore_errors=True)
        return {"schema_version": SCHEMA_VERSION, **result}
