"""The main job: train attention, solve the max-margin problems, and record whether the two agree."""

from __future__ import annotations

import datetime
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from attsvm.dynamics import Trajectory, descend, fit_head, pool
from attsvm.errors import AttSVMError, InvalidInputError, RecordError
from attsvm.experiments.config import VerifyConfig
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
            problem, scores = _problem(sequences, config)
        except AttSVMError:
            if is_new:  # nothing was computed: a mistake in the command leaves no folder behind
                folder.discard()
            raise
        # Only now, so that a mistake in the command costs no earlier run.
        if overwrite:
            folder.clear()
            folder.create()
        folder.write_config(settings)
        runs = _run_all(problem, scores, config, folder, report)
        findings = {run.name: summarize(run.trajectory, run.own, run.other) for run in runs}
        seconds = {
            "embedding": embedded - began,
            "training": sum(run.train_seconds for run in runs),
            "solving": sum(run.solve_seconds for run in runs),
            "total": time.monotonic() - began,
        }
        result = {**about, "seconds": seconds, **result_of(sequences, problem, scores, findings, config)}
        _write(folder, sequences, scores, findings, result)
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


def _problem(sequences: Sequences, config: VerifyConfig) -> tuple[TokenSelection, torch.Tensor]:
    """The problem whose selected tokens are the optimal ones, and the scores (n, T)."""
    tokens = torch.from_numpy(sequences.tokens)
    allowed = torch.from_numpy(sequences.allowed)
    if sequences.scores is not None:
        scores = torch.from_numpy(sequences.scores)
    else:
        assert sequences.labels is not None
        labels = torch.from_numpy(sequences.labels)
        pooled = pool(tokens, allowed)
        if not pooled.any():
            raise InvalidInputError(
                f"verify: {sequences.about['source']} must have a sequence whose mean token is not 0, or scores; "
                "no head can be fitted to zeros."
            )
        v = fit_head(pooled, labels, method=config.head)
        scores = token_scores(tokens, v, labels)
    queries = torch.from_numpy(sequences.queries)
    return TokenSelection.from_scores(tokens, queries, scores, allowed=allowed), scores


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One parameterisation: its path and the solutions in both norms."""

    name: str
    trajectory: Trajectory
    own: Solution
    other: Solution
    train_seconds: float
    solve_seconds: float


def _run_all(
    problem: TokenSelection, scores: torch.Tensor, config: VerifyConfig, folder: RunFolder, report: Progress
) -> list[_Run]:
    """All parameterisations, each in a thread with one core; Ctrl-C stops them all after a checkpoint."""
    stop = threading.Event()
    names = list(dict.fromkeys(config.parameterizations))
    with ThreadPoolExecutor(max_workers=min(len(names), torch.get_num_threads())) as workers:
        try:
            jobs = [workers.submit(_run_one, name, problem, scores, config, folder, report, stop) for name in names]
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
    problem: TokenSelection,
    scores: torch.Tensor,
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
        trajectory = descend(
            problem,
            scores,
            parameterization="W" if name == "W" else "KQ",
            rank=config.rank if name == "KQ" else None,
            loss=config.loss,
            optimizer=config.optimizer,
            learning_rate=config.learning_rate,
            steps=config.steps,
            seed=config.seed,
            checkpoint=folder.checkpoint / f"{name}.safetensors",
            progress=lambda done, total, loss: tell("train", done, total, f"loss {loss:.4f}"),
        )
        trained = time.monotonic()
        solutions = {}
        for part, (norm, tol) in enumerate(_norms(trajectory, config.tol)):
            solutions[norm] = trajectory.solution(
                norm,
                tol=tol,
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
