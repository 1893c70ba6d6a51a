"""The main job: train attention, solve the max-margin problems, and record whether the two agree."""

from __future__ import annotations

import datetime
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from attsvm.dynamics import LinearHead, Trajectory, descend, fit_head, pool
from attsvm.errors import AttSVMError, InvalidInputError, RecordError
from attsvm.experiments.comparison import compare_optimizers
from attsvm.experiments.config import VerifyConfig
from attsvm.experiments.optimizer_names import NamedOptimizer
from attsvm.experiments.sequences import Sequences, load_sequences
from attsvm.experiments.summary import Finding, arrays_of, metrics_of, result_of, summarize
from attsvm.records import SCHEMA_VERSION, RunFolder, package_versions, source_commit, write_arrays
from attsvm.selection import TokenSelection, token_scores
from attsvm.solvers import Solution
from attsvm.threads import one_thread

__all__ = ["Progress", "verify"]

Progress = Callable[[str, float, float, str], None]
"""Called with (task, done, total, note); tasks are "embed", "train W", "solve W", "train KQ", "solve KQ"."""

OTHER_TOLERANCE = 1e-4
"""Gap of the solution in the other norm, which only serves to compare directions."""


def verify(
    config: VerifyConfig,
    folder: RunFolder,
    *,
    command: str = "",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the job and leave its records in ``folder``; an unfinished run of the same settings goes on.

    Parameters
    ----------
    config
        The settings.
    folder
        Where the records go.
    command
        How to run it again, for the record.
    overwrite
        Whether the records of an earlier run may be replaced.
    progress
        Called as work goes on, from several threads.

    Returns
    -------
    dict
        The content of ``result.json``.

    Raises
    ------
    InvalidInputError
        If the data cannot be used, or the folder holds another run and ``overwrite`` is False.
    RecordError
        If the folder cannot be written, or another process uses it.
    KeyboardInterrupt
        On Ctrl-C, after a checkpoint was written.
    """
    is_new = not folder.path.exists()
    _check_folder(folder, config, overwrite)
    with folder.lock():
        began = time.monotonic()
        versions = package_versions("torch", "numpy", "numba", "transformers", "safetensors")
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        about = {"kind": "verify", "name": folder.path.name, "command": command, "seed": config.seed}
        about |= {"versions": versions, "commit": source_commit(), "created": created}
        settings = {**about, "config": config.model_dump(mode="json")}
        report = progress or (lambda task, done, total, note: None)
        if is_new:
            folder.write_config(settings)
        try:
            sequences = load_sequences(config, progress=lambda done, total: report("embed", done, total, ""))
            embedded = time.monotonic()
            task = _task(sequences, config)
        except AttSVMError:
            if is_new:  # nothing was computed: a mistake in the command leaves no folder behind
                folder.discard()
            raise
        # Only now, so that a mistake in the command costs no earlier run.
        if overwrite:
            folder.clear()
            folder.create()
        folder.write_config(settings)
        runs = _run_all(task, config, folder, report)
        comparison = _compare(task, runs, config, folder, report)
        findings = {run.name: summarize(run.trajectory, run.own, run.other) for run in runs}
        seconds = {
            "embedding": embedded - began,
            "training": sum(run.train_seconds for run in runs),
            "solving": sum(run.solve_seconds for run in runs),
            "total": time.monotonic() - began,
        }
        shown = result_of(sequences, task.problem, findings, config)
        result = {**about, "seconds": seconds, **shown, "comparison": comparison}
        _write(folder, sequences, task.scores, findings, result)
        return {"schema_version": SCHEMA_VERSION, **result}


def _check_folder(folder: RunFolder, config: VerifyConfig, overwrite: bool) -> None:
    """Make sure that the folder is new, or holds an unfinished run of these settings, or may be overwritten."""
    if not folder.path.exists():
        return
    if not folder.path.is_dir():
        raise InvalidInputError(f"verify: --output-dir must be a folder, got the file {folder.path}.")
    if folder.holds_other_files:
        raise InvalidInputError(
            f"verify: --output-dir {folder.path} must be new, or a run of attsvm; it holds other files."
        )
    if overwrite:
        return
    if folder.is_complete:
        raise InvalidInputError(
            f"verify: --output-dir {folder.path} holds a finished run; choose another folder or add --overwrite."
        )
    if folder.config_file.exists() and _settings(folder) != config.model_dump(mode="json"):
        raise InvalidInputError(
            f"verify: --output-dir {folder.path} holds an unfinished run with other settings; "
            "choose another folder or add --overwrite."
        )


def _settings(folder: RunFolder) -> Any:
    """The settings of the unfinished run; a damaged record counts as other settings."""
    try:
        return folder.read_config().get("config")
    except RecordError:
        return None


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is trained: a problem that selects the optimal tokens, scores (n, T), and the head if it is trained too."""

    problem: TokenSelection
    scores: torch.Tensor
    labels: torch.Tensor | None = None
    head: LinearHead | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What ``descend`` is given beside the problem."""
        if self.head is None:
            return {"scores": self.scores}
        return {"head": self.head, "labels": self.labels}


def _task(sequences: Sequences, config: VerifyConfig) -> _Task:
    tokens = torch.from_numpy(sequences.tokens)
    allowed = torch.from_numpy(sequences.allowed)
    queries = torch.from_numpy(sequences.queries)
    if sequences.scores is not None:
        if config.head == "trained":
            raise InvalidInputError(
                "verify: --head must be absent for data with scores, which stand for it, got trained."
            )
        scores = torch.from_numpy(sequences.scores)
        return _Task(problem=TokenSelection.from_scores(tokens, queries, scores, allowed=allowed), scores=scores)
    assert sequences.labels is not None
    labels = torch.from_numpy(sequences.labels)
    pooled = pool(tokens, allowed)
    if not pooled.any():
        raise InvalidInputError(
            f"verify: {sequences.about['source']} must have a sequence whose mean token is not 0, or scores; "
            "no head can be fitted to zeros."
        )
    v = fit_head(pooled, labels, method="ridge" if config.head == "trained" else config.head)
    scores = token_scores(tokens, v, labels)
    problem = TokenSelection.from_scores(tokens, queries, scores, allowed=allowed)
    if config.head != "trained":
        return _Task(problem=problem, scores=scores)
    return _Task(problem=problem, scores=scores, labels=labels, head=LinearHead(v, trained=True))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One parameterisation: its path and the solutions in both norms."""

    name: str
    trajectory: Trajectory
    own: Solution
    other: Solution
    train_seconds: float
    solve_seconds: float


def _run_all(task: _Task, config: VerifyConfig, folder: RunFolder, report: Progress) -> list[_Run]:
    """All parameterisations, each in a thread with one core; Ctrl-C stops them all after a checkpoint."""
    stop = threading.Event()
    names = list(dict.fromkeys(config.parameterizations))
    with ThreadPoolExecutor(max_workers=min(len(names), torch.get_num_threads())) as workers:
        try:
            jobs = [workers.submit(_run_one, name, task, config, folder, report, stop) for name in names]
            # A short wait at a time, so that Ctrl-C is heard.
            while wait(jobs, timeout=0.2).not_done:
                if any(job.done() and job.exception() for job in jobs):
                    stop.set()
        except KeyboardInterrupt:
            stop.set()  # leaving the block waits for the workers, which stop at their next report
            raise
    failures = [error for error in (job.exception() for job in jobs) if error is not None]
    # A run that was stopped because the other failed is not the reason.
    failures.sort(key=lambda error: isinstance(error, KeyboardInterrupt))
    if failures:
        raise failures[0]
    return [job.result() for job in jobs]


def _run_one(
    name: str,
    task: _Task,
    config: VerifyConfig,
    folder: RunFolder,
    report: Progress,
    stop: threading.Event,
) -> _Run:
    """Train one parameterisation, then solve for the tokens that it selected, all on one core."""

    def tell(task: str, done: float, total: float, note: str) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        report(f"{task} {name}", done, total, note)

    with one_thread():
        began = time.monotonic()
        trajectory = _train(
            task,
            config,
            config.named_optimizers[0],
            parameterization="W" if name == "W" else "KQ",
            checkpoint=folder.checkpoint / f"{name}.safetensors",
            progress=lambda done, total, loss: tell("train", done, total, f"loss {loss:.4f}"),
        )
        trained = time.monotonic()
        solutions = {}
        for part, (norm, tol) in enumerate(_norms(trajectory, config.tol)):
            solutions[norm] = trajectory.solution(
                norm,
                tol=tol,
                # Norms of the entries take long in hundreds of dimensions.
                max_seconds=None if norm in ("fro", "nuc") else config.max_seconds,
                progress=lambda iteration, gap, part=part: tell("solve", part, 2, f"gap {gap:.1e}"),
            )
            if stop.is_set():
                raise KeyboardInterrupt
            tell("solve", part + 1, 2, f"gap {solutions[norm].gap:.1e}")
    own, other = solutions.values()
    return _Run(
        name=name,
        trajectory=trajectory,
        own=own,
        other=other,
        train_seconds=trained - began,
        solve_seconds=time.monotonic() - trained,
    )


def _train(
    task: _Task,
    config: VerifyConfig,
    chosen: NamedOptimizer,
    *,
    parameterization: Literal["W", "KQ"],
    checkpoint: Path,
    progress: Callable[[int, int, float], None],
) -> Trajectory:
    return descend(
        task.problem,
        parameterization=parameterization,
        rank=config.rank if parameterization == "KQ" else None,
        loss=config.loss,
        optimizer=chosen.optimizer,
        learning_rate=chosen.rate_for(config.learning_rate, task.problem.shape[-1]),
        steps=config.steps,
        seed=config.seed,
        checkpoint=checkpoint,
        progress=progress,
        **task.given,
    )


def _compare(
    task: _Task, runs: list[_Run], config: VerifyConfig, folder: RunFolder, report: Progress
) -> dict[str, Any] | None:
    """The table of optimisers and norms, if one is asked for."""
    norms = config.table_norms
    if not norms:
        return None
    optimizers = config.named_optimizers
    first = optimizers[0].name
    rows = {first if run.name == "W" else f"{first}, (K, Q)": run.trajectory for run in runs}

    def train(chosen: NamedOptimizer) -> Trajectory:
        return _train(
            task,
            config,
            chosen,
            parameterization="W",
            checkpoint=folder.checkpoint / f"optimizer-{chosen.name}.safetensors",
            progress=lambda done, total, loss: report(f"train {chosen.name}", done, total, f"loss {loss:.4f}"),
        )

    return compare_optimizers(
        optimizers,
        norms,
        train,
        folder,
        trained=rows,
        max_seconds=config.max_seconds,
        tell=lambda done, total, note: report("compare", done, total, note),
    )


def _norms(trajectory: Trajectory, tol: float) -> list[tuple[Any, float]]:
    """The parameterisation's own norm first, then the other."""
    own = trajectory.own_norm
    return [(own, tol), ("nuc" if own == "fro" else "fro", max(tol, OTHER_TOLERANCE))]


def _write(
    folder: RunFolder, sequences: Sequences, scores: torch.Tensor, findings: dict[str, Finding], result: dict[str, Any]
) -> None:
    """Write the records; ``result.json``, which says that the run is complete, comes last."""
    folder.write_metrics(metrics_of(findings))
    arrays = {"allowed": sequences.allowed, "scores": scores.numpy()}
    for name, finding in findings.items():
        arrays |= {f"{name}.{key}": value for key, value in arrays_of(finding).items()}
    write_arrays(folder.arrays_file, arrays)
    folder.write_result(result)
    shutil.rmtree(folder.checkpoint, ignore_errors=True)
