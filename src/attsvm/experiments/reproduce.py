"""``attsvm reproduce``: the trials of a recipe, computed so that none can be lost, and what they say together."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from attsvm.errors import AttSVMError, InvalidInputError, RecordError
from attsvm.experiments.processes import Processes
from attsvm.experiments.recipes import Recipe, Record, Summary
from attsvm.experiments.recipes.plotting import draw_figure, house
from attsvm.experiments.trial_plan import Chunk, Plan, Shares
from attsvm.experiments.trial_records import ChunkFile, read_chunks
from attsvm.records import RunFolder, dumps, package_versions, remove_halves, source_commit, write_bytes
from attsvm.threads import one_thread

__all__ = ["ReproduceFolder", "TrialProgress", "check_options", "reproduce", "state_of"]

TrialProgress: TypeAlias = Callable[[int, int, float | None], None]
"""Called with (trials done, trials in all, seconds left); None while nothing is known of the time."""

State: TypeAlias = Literal["new", "unfinished", "finished", "other settings"]

T = TypeVar("T")

TICK = 0.2
"""Seconds between two looks at the workers, at Ctrl-C and at the other processes."""


class ReproduceFolder(RunFolder):
    """A run folder with trials and a figure in it.

    Parameters
    ----------
    path
        The folder.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.trials_file = self.path / "trials.jsonl"
        self.svg_file = self.path / "figure.svg"
        self.png_file = self.path / "figure.png"

    @property
    def is_complete(self) -> bool:
        """True when the result and what goes with it are there."""
        return all(path.exists() for path in (self.result_file, self.trials_file, self.svg_file, self.png_file))

    @property
    def chunk_files(self) -> list[Path]:
        """The files of finished chunks, one of each process that wrote any."""
        return sorted(self.checkpoint.glob("trials-*.jsonl"))

    def clear(self) -> None:
        """Remove the records, trials and figure with them."""
        super().clear()
        for path in (self.trials_file, self.svg_file, self.png_file):
            path.unlink(missing_ok=True)

    def settings(self) -> Any:
        """The settings of the run in the folder; None for no run of this kind, or a damaged record."""
        try:
            record = self.read_config()
        except RecordError:
            return None
        return record.get("config") if record.get("kind") == "reproduce" else None


def state_of(recipe: Recipe, folder: ReproduceFolder, *, trials: int | None = None, seed: int | None = None) -> State:
    """How far the run of a recipe with these options is in a folder."""
    plan = Plan.checked(recipe, trials=trials, seed=seed)
    if not folder.config_file.exists():
        return "new"
    if folder.settings() != plan.settings:
        return "other settings"
    return "finished" if folder.is_complete else "unfinished"


def check_options(
    recipe: Recipe,
    folder: ReproduceFolder,
    *,
    trials: int | None = None,
    seed: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Raise InvalidInputError where :func:`reproduce` would not begin with these options."""
    plan = Plan.checked(recipe, trials=trials, seed=seed)
    if workers is not None and workers < 1:
        raise InvalidInputError(f"reproduce: --workers must be at least 1, got {workers}.")
    _check_folder(plan, folder, overwrite)


def reproduce(
    recipe: Recipe,
    folder: ReproduceFolder,
    *,
    trials: int | None = None,
    seed: int | None = None,
    workers: int | None = None,
    processes: Processes | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: TrialProgress | None = None,
) -> dict[str, Any]:
    """Run the trials of a recipe and leave its records, figure and numbers in ``folder``.

    Every finished chunk of trials is on disk before the next begins. A run that ended in any way goes on when it is
    called again, and ends in the same bytes, whatever the number of workers and processes; only ``config.json`` has
    dates and times. A folder with a finished run of the same settings is left as it is.

    Parameters
    ----------
    recipe
        What to compute.
    folder
        Where the records go; the same in every process.
    trials, seed
        Trials of each case, and the seed of the first. Default: those of the recipe.
    workers
        Threads of this process, each on one core. Default: its share of the cores.
    processes
        The processes that share the trials; the first of them writes the result. Default: this one alone.
    overwrite
        Whether the records of an earlier run may be replaced.
    command
        How to run it again, for the record.
    progress
        Called several times a second.

    Returns
    -------
    dict
        The content of ``result.json``.

    Raises
    ------
    InvalidInputError
        If an option cannot be used, or the folder holds something else and ``overwrite`` is False.
    UnsupportedError
        If matplotlib is absent.
    RecordError
        If the folder cannot be written, is in use, or a record in it is damaged.
    AttSVMError
        If a trial fails; the message says which recipe, case and seeds. Finished trials stay.
    """
    plan = Plan.checked(recipe, trials=trials, seed=seed)
    with house():  # without matplotlib nothing is computed
        pass
    processes = processes or Processes()

    def check() -> None:
        if processes.is_first:  # which may change the folder before the others have looked at it
            check_options(recipe, folder, trials=trials, seed=seed, workers=workers, overwrite=overwrite)

    with processes.working(), contextlib.ExitStack() as held:
        processes.together(check)
        if not overwrite and processes.everywhere(_is_done(plan, folder) if processes.is_first else None)[0]:
            return folder.read_result()
        run = _Run(plan, folder, processes, workers or _cores(processes), progress)
        processes.together(lambda: run.begin(held, overwrite, command))
        run.compute()
        processes.everywhere(None)  # by now all have closed the files that the first reads
        processes.together(run.finish)
        return folder.read_result()


def _cores(processes: Processes) -> int:
    """The cores that this process may use, divided among the processes of the job."""
    # Not every system says which cores those are.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes.size)


def _is_done(plan: Plan, folder: ReproduceFolder) -> bool:
    """Whether there is nothing left to do; what a run that was killed at its very end left behind is removed."""
    if not (folder.is_complete and folder.settings() == plan.settings):
        return False
    remove_halves(folder.path)
    if folder.checkpoint.exists():
        with contextlib.suppress(RecordError), folder.lock():
            shutil.rmtree(folder.checkpoint, ignore_errors=True)
    return True


def _check_folder(plan: Plan, folder: ReproduceFolder, overwrite: bool) -> None:
    """Make sure that the folder may be used for this run."""
    where = f"reproduce: --output-dir {folder.path}"
    if not folder.path.exists():
        return
    if not folder.path.is_dir():
        raise InvalidInputError(f"{where} must be a folder, and is a file.")
    if folder.holds_other_files:
        raise InvalidInputError(f"{where} must be new, or a run of attsvm; it holds other files.")
    if not overwrite and folder.config_file.exists() and folder.settings() != plan.settings:
        raise InvalidInputError(
            f"{where} holds {_other(folder.settings(), plan.settings)}; choose another folder or add --overwrite."
        )


def _other(held: Any, wanted: Mapping[str, Any]) -> str:
    """What a run with other settings is, in words."""
    if not isinstance(held, dict) or held.get("recipe") != wanted["recipe"]:
        return "a run of another kind or a damaged record"
    for key, word in (("attsvm", "attsvm"), ("first_seed", "--seed")):
        if held.get(key) != wanted[key]:
            return f"a run with {word} {held.get(key)}, not {wanted[key]}"
    counts = [[case.get("trials") for case in settings["cases"]] for settings in (held, wanted)]
    if counts[0] != counts[1]:
        few, many = (", ".join(str(one) for one in dict.fromkeys(count)) for count in counts)
        return f"a run with --trials {few}, not {many}"
    return "a run with other settings of the recipe"


class _Run:
    """The computation of a plan, in one of the processes that share it."""

    def __init__(
        self,
        plan: Plan,
        folder: ReproduceFolder,
        processes: Processes,
        workers: int,
        progress: TrialProgress | None,
    ) -> None:
        self.plan, self.folder, self.processes, self.workers = plan, folder, processes, workers
        self.progress = progress if processes.is_first else None
        self._stop = threading.Event()
        self._told = -1
        self._failure: AttSVMError | None = None

    def begin(self, held: contextlib.ExitStack, overwrite: bool, command: str) -> None:
        """Hold the folder and make it that of this run; the first process does so for all."""
        if not self.processes.is_first:
            return
        held.enter_context(self.folder.lock())
        if overwrite:
            self.folder.clear()
            self.folder.create()
        self.folder.result_file.unlink(missing_ok=True)
        if not self.folder.config_file.exists():
            about = {
                "kind": "reproduce",
                "name": self.plan.recipe.name,
                "command": command,
                "versions": package_versions("torch", "numpy", "numba", "matplotlib"),
                "commit": source_commit(),
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            self.folder.write_config({**about, "config": self.plan.settings})

    def compute(self) -> None:
        """Compute the chunks that are missing."""
        known: dict[tuple[int, int], int] = {}

        def read() -> None:
            if self.processes.is_first:
                known.update({key: self._accepted(chunk["records"]) for key, chunk in self._read().items()})

        self.processes.together(read)
        shares = Shares(self.plan, self.processes.everywhere(known)[0], self.processes)
        path = self.folder.checkpoint / f"trials-{self.processes.rank}.jsonl"
        with contextlib.ExitStack() as opened:
            file = self.processes.together(lambda: opened.enter_context(ChunkFile(path, self.plan.digest)))
            threads = [
                threading.Thread(target=self._work, args=(shares, file), name=f"reproduce-{number}", daemon=True)
                for number in range(self.workers)
            ]
            try:
                for thread in threads:
                    thread.start()
                self._watch(threads, shares)
            finally:
                self._stop.set()

    def _work(self, shares: Shares, file: ChunkFile) -> None:
        """What one thread does: chunk after chunk, on one core."""
        try:
            with one_thread():
                while not self._stop.is_set() and (chunk := shares.next()) is not None:
                    began = time.monotonic()
                    records = _records_of(self.plan, chunk)
                    line = {
                        "case": chunk.case,
                        "number": chunk.number,
                        "first_seed": chunk.seeds.start,
                        "records": records,
                        "seconds": time.monotonic() - began,
                    }
                    if file.append(line):
                        shares.finished(chunk, self._accepted(records))
        except AttSVMError as error:
            self._failure = self._failure or error

    def _watch(self, threads: Sequence[threading.Thread], shares: Shares) -> None:
        """Wait for the workers of all processes; after a failure each finishes its chunk, after Ctrl-C none does."""
        began, before = time.monotonic(), shares.trials_done()
        while True:
            alive = [thread for thread in threads if thread.is_alive()]
            if alive:
                alive[0].join(TICK)
            self.processes.heed_interrupt(together=True)
            seen = self.processes.everywhere((bool(alive), self._failure))
            if self.progress is not None:
                self._tell(shares.trials_done(), before, time.monotonic() - began)
            failures = [failure for _, failure in seen if failure is not None]
            if failures:
                self._stop.set()
            if not any(busy for busy, _ in seen):
                break
        if failures:
            raise failures[0]

    def _tell(self, done: int, before: int, seconds: float) -> None:
        assert self.progress is not None
        if done == self._told == self.plan.total:  # said already
            return
        self._told = done
        rate = (done - before) / seconds if seconds > 0 else 0.0
        self.progress(done, self.plan.total, (self.plan.total - done) / rate if rate > 0 else None)

    def _accepted(self, records: Sequence[Record]) -> int:
        return sum(self.plan.accepts(record) for record in records)

    def _read(self) -> dict[tuple[int, int], dict[str, Any]]:
        """The finished chunks of all processes, by (case, number)."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for path in self.folder.chunk_files:
            for line, content in enumerate(read_chunks(path, self.plan.digest), start=2):
                if not _belongs(content, self.plan):
                    raise RecordError(f"{path}, line {line}, does not belong to this run; --overwrite begins anew.")
                found.setdefault((content["case"], content["number"]), content)
        return found

    def finish(self) -> None:
        """Write what the trials say, ``result.json`` last; the first process does so."""
        if not self.processes.is_first:
            return
        found = self._read()
        kept = [
            self.plan.prefix(case, {at: chunk["records"] for (one, at), chunk in found.items() if one == case})
            for case in range(len(self.plan.recipe.cases))
        ]
        records = [record for case in kept for record in case]
        write_bytes(self.folder.trials_file, "".join(dumps(record) + "\n" for record in records).encode())
        summary = _of_trials(self.plan.recipe, "the summary", lambda: self.plan.recipe.summarize(records))
        _of_trials(self.plan.recipe, "the figure", lambda: draw_figure(self.plan.recipe, records, self.folder.path))
        seconds = sum(chunk["seconds"] for chunk in found.values())
        self.folder.write_config({**self.folder.read_config(), "computing_seconds": seconds})
        self.folder.write_result(_result(self.plan, kept, summary))
        shutil.rmtree(self.folder.checkpoint, ignore_errors=True)


def _belongs(content: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a line is a chunk of this plan."""
    case, number = content.get("case"), content.get("number")
    if not (isinstance(case, int) and 0 <= case < len(plan.recipe.cases) and isinstance(number, int)):
        return False
    if not 0 <= number < plan.chunks_of(case):
        return False
    seeds = plan.chunk(case, number).seeds
    return content.get("first_seed") == seeds.start and len(content.get("records", ())) == len(seeds)


def _records_of(plan: Plan, chunk: Chunk) -> list[Record]:
    """Compute one chunk; the records are as they will be read back."""
    recipe, case, seeds = plan.recipe, plan.recipe.cases[chunk.case], chunk.seeds
    where = f"reproduce: {recipe.name}, case {case.name}, seeds {seeds.start} to {seeds[-1]}"
    try:
        records = recipe.run(case, seeds)
        named = [{"case": case.name, "trial": seed, **record} for seed, record in zip(seeds, records, strict=True)]
        plain: list[Record] = json.loads(dumps(named))
    except MemoryError as error:
        raise AttSVMError(f"{where}: out of memory; fewer --workers need less.") from error
    except Exception as error:
        # Whatever it is, the trial is named, and the recipes after this one go on.
        raise AttSVMError(f"{where}: {_reason(error)}") from error
    return plain


def _of_trials(recipe: Recipe, what: str, work: Callable[[], T]) -> T:
    """Do what needs all trials; a failure names the recipe."""
    try:
        return work()
    except RecordError:  # no space for the figure
        raise
    except Exception as error:
        raise AttSVMError(f"reproduce: {recipe.name}, {what} of its trials: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error in one line; its kind is said where it is none of ours."""
    text = " ".join(str(error).split()) or "no reason given"
    return text if isinstance(error, AttSVMError) else f"{type(error).__name__}: {text}"


def _result(plan: Plan, kept: Sequence[Sequence[Record]], summary: Summary) -> dict[str, Any]:
    """The content of ``result.json``: nothing in it depends on when, where or in how many parts it was computed."""
    recipe = plan.recipe
    cases, short = [], []
    for case, wanted, records in zip(recipe.cases, plan.wanted, kept, strict=True):
        accepted = sum(plan.accepts(record) for record in records)
        cases.append({"name": case.name, "values": dict(case.values), "trials": len(records), "accepted": accepted})
        if accepted < wanted:
            short.append(
                f"Case {case.name}: among the {len(records)} seeds that were tried, {accepted} trials were accepted, "
                f"not {wanted}; the numbers are from these."
            )
    numbers = [{**dataclasses.asdict(number), "verdict": number.verdict} for number in summary.numbers]
    verdicts = [number["verdict"] for number in numbers]
    return {
        "kind": "reproduce",
        "name": recipe.name,
        "title": recipe.title,
        "about": recipe.about,
        "paper": dataclasses.asdict(recipe.paper),
        "settings": plan.settings,
        "cases": cases,
        "sentence": summary.sentence,
        "numbers": numbers,
        "tables": [dataclasses.asdict(table) for table in summary.tables],
        "notes": [*summary.notes, *short],
        "counts": {
            "trials": sum(len(records) for records in kept),
            "accepted": sum(case["accepted"] for case in cases),
            **{name.replace(" ", "_"): verdicts.count(name) for name in ("met", "differs", "not published")},
        },
    }
