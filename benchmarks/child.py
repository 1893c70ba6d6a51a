"""One solution in a process of its own, for its memory: ``python -m benchmarks.child '{"problem": ..., ...}'``."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attsvm.selection import TokenSelection
from benchmarks import problems
from benchmarks.harness import TOL, describe, sizes_of, solved, timed, warm_up

__all__ = ["in_child"]

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS: dict[str, Callable[..., TokenSelection]] = {"planted": problems.planted, "minilm_head": problems.minilm_head}


def in_child(problem: str, arguments: dict[str, Any], *, limit: float, repeats: int = 1) -> dict[str, Any]:
    """Build a problem in a fresh process, solve it there, and return the sizes, our side of a row, and the memory.

    Parameters
    ----------
    problem, arguments
        A function of ``benchmarks.problems`` and what it is called with.
    limit
        Seconds for one solution.
    repeats
        Number of timed solutions, at most; memory is that of the first.

    Raises
    ------
    RuntimeError
        If the process ended in another way than it should, such as for want of memory.
    """
    order = json.dumps({"problem": problem, "arguments": arguments, "limit": limit, "repeats": repeats})
    command = [sys.executable, "-m", "benchmarks.child", order]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{problem} {arguments}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _measured(problem: str, arguments: dict[str, Any], limit: float, repeats: int) -> dict[str, Any]:
    warm_up()
    selection = PROBLEMS[problem](**arguments)
    earlier = _peak_bytes()
    _return_freed()
    _forget_peak()
    before = _resident_bytes()

    def work() -> Any:
        return solved(selection, tol=TOL, max_seconds=limit)

    solution, seconds = timed(work, repeats=1)
    during = _peak_bytes()
    if repeats > 1:
        solution, more = timed(work, repeats=repeats - 1)
        seconds += more
    t = selection.tensors
    return {
        "sizes": sizes_of(selection),
        "ours": describe(selection, solution, seconds),
        "memory": {
            "tokens_bytes": t.tokens.numel() * t.tokens.element_size(),
            "before_bytes": before,
            "peak_bytes": max(earlier, during),
            "peak_bytes_while_solving": during,
            "extra_bytes": max(0, during - before),
        },
    }


def _status(name: str) -> int | None:
    """A number of bytes of ``/proc/self/status``, where there is one."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None


def _peak_bytes() -> int:
    """Largest resident size since :func:`_forget_peak`, or of the life of the process where that does nothing."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    # On some systems this counts what the parent held before it became this process, and it is in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident_bytes() -> int:
    """Resident size now; the peak so far where that is not known."""
    now = _status("VmRSS")
    return _peak_bytes() if now is None else now


def _return_freed() -> None:
    """Give freed memory back to the system: what the solver takes from it would not show."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    """Start the count of the largest resident size anew, so that building the problem does not hide the solver."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_measured(**json.loads(sys.argv[1]))))
