"""Heads solved by several processes of one thread each.

Threads of one process would wait for each other: a solve is many short steps. A process takes heads from its own end of
the list, claims each, and leaves its record; what is there already is left alone. So the processes need to know nothing
of each other, and a run that was killed goes on with what is missing.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from attsvm.errors import AttSVMError
from attsvm.microscope.analysis import HeadJob, analyse_heads
from attsvm.microscope.calls import ModuleInfo
from attsvm.microscope.residual import ResidualHead
from attsvm.microscope.solutions import SolutionSettings
from attsvm.records import read_arrays, read_json, write_arrays, write_json

__all__ = ["solve_heads", "work"]

FEW = 6
"""Heads for which starting processes takes longer than it saves."""

_START = """
import sys
from pathlib import Path
from attsvm.microscope.workers import work
work(Path(sys.argv[1]), *map(int, sys.argv[2:]))
"""
"""What a process runs; the environment has set its threads."""

_JOBS, _CLAIMS = "jobs.json", "claims"
_RESIDUAL = ("W_K", "W_Q")


def solve_heads(
    jobs: Sequence[HeadJob],
    samples: Path,
    folder: Path,
    *,
    shown: Sequence[int],
    settings: SolutionSettings,
    tell: Callable[[float, float, str], None],
) -> None:
    """Solve every head that has no record yet, with as many processes as torch has threads.

    Parameters
    ----------
    jobs
        The heads, module by module.
    samples
        Folder of the modules' samples.
    folder
        Gets the records.
    shown
        Windows of the sample that the page shows.
    settings
        Limits of the solves.
    tell
        Called with heads done, their number, and the last label.

    Raises
    ------
    AttSVMError
        If a process ended before its work was done.
    """
    left = [job for job in jobs if not _record(folder, job).exists()]
    done = len(jobs) - len(left)
    tell(done, len(jobs), "")
    count = min(torch.get_num_threads(), len(left) // FEW)
    if count < 2:
        for label in analyse_heads(left, samples, folder, shown=shown, settings=settings):
            done += 1
            tell(done, len(jobs), label)
        return
    _write_jobs(left, samples, folder, shown, settings)
    _run(count, left, folder, lambda more, label: tell(done + more, len(jobs), label))
    shutil.rmtree(folder / _CLAIMS, ignore_errors=True)


def _run(count: int, left: Sequence[HeadJob], folder: Path, tell: Callable[[int, str], None]) -> None:
    """Start the processes, watch the records appear, and end the processes however this ends."""
    environment = dict.fromkeys(
        ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
    )
    # Files, for a pipe that nobody reads fills up.
    said = [tempfile.TemporaryFile() for _ in range(count)]  # noqa: SIM115, closed where they are read
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _START, str(folder), str(rank), str(count), str(os.getpid())],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said[rank],
            start_new_session=True,
        )
        for rank in range(count)
    ]
    waiting = {job.label: job for job in left}
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.2)
            _tell_new(waiting, len(left), folder, tell)
            if any(process.returncode for process in processes):
                break
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        messages = [_last_words(process, file) for process, file in zip(processes, said, strict=True)]
    _tell_new(waiting, len(left), folder, tell)
    if waiting:
        message = next(filter(None, messages), "it was killed")
        raise AttSVMError(f"inspect: a process that solves heads ended early: {message}")


def _last_words(process: subprocess.Popen[bytes], file: IO[bytes]) -> str:
    """The last line that a process wrote to stderr, once it has ended."""
    process.wait()
    with file:
        file.seek(0)
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _tell_new(waiting: dict[str, HeadJob], total: int, folder: Path, tell: Callable[[int, str], None]) -> None:
    for label in [label for label, job in waiting.items() if _record(folder, job).exists()]:
        del waiting[label]
        tell(total - len(waiting), label)


def _record(folder: Path, job: HeadJob) -> Path:
    return folder / f"{job.label}.json"


def _write_jobs(
    left: Sequence[HeadJob], samples: Path, folder: Path, shown: Sequence[int], settings: SolutionSettings
) -> None:
    """Everything that a process needs to know."""
    shutil.rmtree(folder / _CLAIMS, ignore_errors=True)
    (folder / _CLAIMS).mkdir()
    modules = {}
    for job in left:
        modules[str(job.index)] = dataclasses.asdict(job.info)
        for name, one in (("first", job.first_residual), (job.label, job.residual)):
            if one is not None:
                arrays = {part: getattr(one, part).numpy() for part in _RESIDUAL}
                write_arrays(_matrices(folder, job.index, name), arrays)
    listed = [{"index": job.index, "head": job.head, "wanted": job.wanted} for job in left]
    about = {"samples": str(samples.resolve()), "shown": list(shown), "settings": dataclasses.asdict(settings)}
    scales = {str(job.index): None if job.residual is None else job.residual.scale for job in left}
    write_json(folder / _JOBS, {**about, "modules": modules, "jobs": listed, "scales": scales})


def _matrices(folder: Path, index: int, name: str) -> Path:
    return folder / f"residual-{index}-{name}.safetensors"


def work(folder: Path, rank: int, count: int, parent: int) -> None:
    """Solve heads that nobody has claimed until none is left, or the process that started this one is gone.

    Parameters
    ----------
    folder
        Where the list of heads lies and the records go.
    rank, count
        Which process of how many this is.
    parent
        Process id of the one that started it.
    """
    plan: dict[str, Any] = read_json(folder / _JOBS)
    names = {field.name for field in dataclasses.fields(ModuleInfo)}
    modules = {
        int(index): ModuleInfo(**{name: value for name, value in info.items() if name in names})
        for index, info in plan["modules"].items()
    }
    done = analyse_heads(
        _claimed(plan, modules, folder, rank, count, parent),
        Path(plan["samples"]),
        folder,
        shown=plan["shown"],
        settings=SolutionSettings(**plan["settings"]),
    )
    for _ in done:
        pass


def _claimed(
    plan: dict[str, Any], modules: dict[int, ModuleInfo], folder: Path, rank: int, count: int, parent: int
) -> Iterator[HeadJob]:
    """Heads in an order that begins elsewhere for each process, each claimed by making a file of its name."""
    jobs = plan["jobs"]
    start = rank * len(jobs) // count
    order = [*jobs[start:], *jobs[:start]]
    for job in reversed(order) if rank % 2 else order:
        if os.getppid() != parent:
            return  # before a claim, which would keep the processes of the next try from this head
        info, scale = modules[job["index"]], plan["scales"][str(job["index"])]
        label = info.label(job["head"])
        try:
            (folder / _CLAIMS / label).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield HeadJob(
            index=job["index"],
            info=info,
            head=job["head"],
            residual=_read_residual(folder, job["index"], label, scale),
            first_residual=_read_residual(folder, job["index"], "first", scale),
            wanted=tuple((space, norm) for space, norm in job["wanted"]),
        )


def _read_residual(folder: Path, index: int, name: str, scale: float | None) -> ResidualHead | None:
    if scale is None:
        return None
    arrays = read_arrays(_matrices(folder, index, name))
    return ResidualHead(**{part: torch.from_numpy(arrays[part]) for part in _RESIDUAL}, scale=scale)
