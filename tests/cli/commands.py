"""Run the command line in processes of their own, which start in milliseconds because a server has imported torch.

``multiprocessing``'s fork server does the importing once; each command is a child of it with its own working directory,
environment, standard streams and signals. What only a fresh interpreter can show is tested with ``fresh``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds after which a command that hangs is killed."""

SMALL = ("--model", "none", "--d-model", "16", "-n", "12", "--steps", "60")
"""Options of a run that takes less than a second."""

_SERVER = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the server, if it does not run yet; it finds modules where this process does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    _SERVER.set_forkserver_preload(["cli.preload"])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code (minus the signal's number if one ended it), stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout as the one JSON object it must be, in strict JSON."""
        return strict_json(self.out)

    def failed(self, code: int, *words: str) -> None:
        """Assert that it ended with ``code`` and one sentence on stderr that holds all ``words``, and nothing else."""
        assert self.code == code, f"exit code {self.code}, stderr: {self.err}"
        assert "Traceback" not in self.err
        assert self.out == ""
        lines = [line for line in self.err.splitlines() if line.startswith("attsvm: ")]
        assert len(lines) == 1, self.err
        assert self.err.endswith(lines[0] + "\n"), self.err
        assert [word for word in words if word not in lines[0]] == [], lines[0]


@dataclass
class Running:
    """A command under way."""

    process: Any
    out: Path
    err: Path

    def wait(self) -> Outcome:
        """Wait for its end."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the command hung: {self.err.read_text()}")
        code = self.process.exitcode
        outcome = Outcome(code, *(path.read_text(encoding="utf-8") for path in (self.out, self.err)))
        assert "Traceback" not in outcome.err, outcome.err
        return outcome

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait until ``reached``; the command must still run then."""
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert self.process.is_alive(), f"ended too early: {self.err.read_text()}"
            assert time.monotonic() < deadline, f"never came there: {self.err.read_text()}"
            time.sleep(0.002)


@dataclass
class Commands:
    """Runs ``attsvm`` in the folder ``home``."""

    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    count: int = 0
    started: list[Any] = field(default_factory=list)

    def start(
        self,
        *arguments: str,
        cwd: Path | None = None,
        threads: int = 2,
        before: Any = None,
        environment: Mapping[str, str] | None = None,
    ) -> Running:
        """Start ``attsvm ARGUMENTS``; ``before`` (a module-level function) is called first in its process."""
        self.count += 1
        streams = self.home.parent / f"{self.home.name}-streams"
        streams.mkdir(exist_ok=True)
        out, err = streams / f"{self.count}.out", streams / f"{self.count}.err"
        process = _SERVER.Process(
            target=_command,
            args=(
                arguments,
                str(cwd or self.home),
                str(out),
                str(err),
                {**self.environment, **(environment or {})},
                threads,
                before,
            ),
            daemon=True,
        )
        out.touch()
        err.touch()
        start_server()
        process.start()
        self.started.append(process)
        return Running(process, out, err)

    def close(self) -> None:
        """End what a failed test left running."""
        for process in self.started:
            process.kill()
            process.join()

    def __call__(self, *arguments: str, **options: Any) -> Outcome:
        """Run ``attsvm ARGUMENTS`` to its end."""
        return self.start(*arguments, **options).wait()

    def fresh(self, *arguments: str, **environment: str) -> Outcome:
        """Run ``python -m attsvm ARGUMENTS`` in a new interpreter, without network."""
        done = subprocess.run(
            [sys.executable, "-m", "attsvm", *arguments],
            cwd=self.home,
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def _command(
    arguments: tuple[str, ...],
    cwd: str,
    out: str,
    err: str,
    environment: dict[str, str],
    threads: int,
    before: Callable[[], None] | None,
) -> None:
    """In the child: take the place of ``attsvm ARGUMENTS``."""
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    import torch

    from attsvm.cli.main import run

    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(threads)
    sys.argv = ["attsvm", *arguments]
    if before is not None:
        before()
    run()


def strict_json(text: str) -> Any:
    """Parse JSON that knows no NaN and no infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)
