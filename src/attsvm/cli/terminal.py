"""What the commands show: progress bars in a terminal, plain lines elsewhere, messages always on stderr."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Bars", "complain", "say"]

PLAIN_EVERY = 5.0
"""Seconds between two plain lines of one task."""


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"attsvm: {message}", file=sys.stderr)


def say(message: str) -> None:
    """A message for people, on stderr."""
    print(message, file=sys.stderr)


class Bars:
    """Progress of several tasks, told from any thread.

    Parameters
    ----------
    quiet
        Show nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True)
        self._shown = not quiet
        self._lively = not quiet and self._console.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}
        self._lock = threading.Lock()
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._lively,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def tell(self, task: str, done: float, total: float, note: str) -> None:
        """Show that ``done`` of ``total`` of ``task`` is done."""
        with self._lock:
            if self._lively:
                if task not in self._tasks:
                    self._tasks[task] = self._progress.add_task(task, total=total, note="")
                self._progress.update(self._tasks[task], completed=done, total=total, note=note)
            elif self._shown:
                now = time.monotonic()
                if done >= total or now - self._told.get(task, 0.0) > PLAIN_EVERY:
                    self._told[task] = now
                    say(f"{task}: {done:g} of {total:g}{', ' + note if note else ''}")
