"""Trials that are computed in parts, by many or by one, end in the same bytes; whatever stands in the way is named."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from attsvm.errors import AttSVMError, InvalidInputError, RecordError, UnsupportedError
from attsvm.experiments import ReproduceFolder, reproduce, state_of
from attsvm.experiments.processes import Processes
from attsvm.experiments.recipes import Case, Recipe, Record
from attsvm.experiments.trial_plan import Plan, Shares
from attsvm.records import remove_halves
from cli.toy_recipe import CASES, recipe, run

FINAL = ("trials.jsonl", "result.json", "figure.svg", "figure.png")

SCAN = recipe(name="toy-scan", scan=60, trials=12)


def final(folder: ReproduceFolder) -> dict[str, bytes]:
    return {name: (folder.path / name).read_bytes() for name in FINAL}


def trials_in(folder: ReproduceFolder) -> list[Record]:
    return [json.loads(line) for line in folder.trials_file.read_text().splitlines()]


class Counting:
    """The toy's trials; counts the chunks, and fails at one of them."""

    def __init__(self, fail_at: int | None = None, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fail_at, self.error = fail_at, error or ValueError("it diverged")

    def __call__(self, case: Case, seeds: Sequence[int]) -> list[Record]:
        self.calls.append((case.name, seeds[0]))
        if len(self.calls) - 1 == self.fail_at:
            raise self.error
        return run(case, seeds)


@pytest.fixture
def folder(tmp_path: Path) -> ReproduceFolder:
    return ReproduceFolder(tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], dict[str, bytes]]:
    """What an uninterrupted run with one worker leaves."""
    known: dict[str, dict[str, bytes]] = {}

    def of(one: Recipe) -> dict[str, bytes]:
        if one.name not in known:
            folder = ReproduceFolder(tmp_path_factory.mktemp("whole") / "run")
            reproduce(one, folder, workers=1)
            known[one.name] = final(folder)
        return known[one.name]

    return of


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("one", [recipe(), SCAN], ids=["all trials", "scan"])
def test_any_number_of_workers_gives_the_same_bytes(
    folder: ReproduceFolder, whole: Any, one: Recipe, workers: int
) -> None:
    reproduce(one, folder, workers=workers)
    assert final(folder) == whole(one)


@pytest.mark.parametrize("one", [recipe(), SCAN], ids=["all trials", "scan"])
@pytest.mark.parametrize("fail_at", [0, 1, 3, 6])
@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_finished_is_not_computed_again(
    folder: ReproduceFolder, whole: Any, one: Recipe, fail_at: int, workers: int
) -> None:
    first, second = Counting(fail_at), Counting()
    settings = {key: getattr(one, key) for key in ("name", "scan", "trials")}
    with pytest.raises(AttSVMError, match="diverged"):
        reproduce(recipe(**settings, run=first), folder, workers=workers)
    assert state_of(one, folder) == "unfinished"
    reproduce(recipe(**settings, run=second), folder, workers=workers)
    failed = first.calls[fail_at]
    assert set(first.calls) & set(second.calls) == {failed}
    assert final(folder) == whole(one)
    assert state_of(one, folder) == "finished"


def test_a_finished_run_is_left_as_it_is(folder: ReproduceFolder) -> None:
    result = reproduce(recipe(), folder)
    again = Counting()
    assert reproduce(recipe(run=again), folder) == result
    assert again.calls == []
    assert reproduce(recipe(run=again), folder, overwrite=True) == result
    assert len(again.calls) == 8


def test_checkpoint_left_after_the_result_is_removed(folder: ReproduceFolder) -> None:
    reproduce(recipe(), folder)
    folder.checkpoint.mkdir()
    (folder.checkpoint / "trials-0.jsonl").write_text("left")
    reproduce(recipe(), folder)
    assert not folder.checkpoint.exists()


@pytest.mark.parametrize("lost", FINAL)
def test_run_without_one_of_its_files_is_not_finished(folder: ReproduceFolder, whole: Any, lost: str) -> None:
    reproduce(recipe(), folder)
    (folder.path / lost).unlink()
    assert state_of(recipe(), folder) == "unfinished"
    reproduce(recipe(), folder)
    assert final(folder) == whole(recipe())


def test_records_are_those_of_the_seeds(folder: ReproduceFolder) -> None:
    reproduce(recipe(), folder, trials=7, seed=100)
    found = trials_in(folder)
    assert [(record["case"], record["trial"]) for record in found] == [
        (case.name, seed) for case in CASES for seed in range(100, 107)
    ]
    for record in found:
        alone = torch.rand(3, generator=torch.Generator().manual_seed(record["trial"]), dtype=torch.float64)
        scale = {"a=1": 1.0, "a=2": 2.0}[record["case"]]
        assert record["curve"] == (alone * scale).tolist()


def test_scan_keeps_the_shortest_run_of_seeds(folder: ReproduceFolder) -> None:
    reproduce(SCAN, folder, workers=4)
    for case in CASES:
        # The same, one seed at a time.
        expected, accepted = [], 0
        for seed in range(60):
            record = run(case, [seed])[0]
            expected.append(seed)
            accepted += record["accepted"]
            if accepted == 12:
                break
        assert [record["trial"] for record in trials_in(folder) if record["case"] == case.name] == expected


def test_scan_that_runs_out_says_so(folder: ReproduceFolder) -> None:
    result = reproduce(recipe(scan=14, trials=12), folder)
    # Half of the numbers in [0, 1] are above one half.
    short = result["cases"][0]
    assert short["trials"] == 14
    assert short["accepted"] < 12
    assert any(
        "14 seeds" in note and f"{short['accepted']} trials were accepted, not 12" in note for note in result["notes"]
    )
    assert len([record for record in trials_in(folder) if record["case"] == "a=1"]) == 14


def test_more_wanted_trials_raise_the_limit_of_a_scan_in_proportion() -> None:
    assert Plan.checked(SCAN).limits == (60, 60)
    assert Plan.checked(SCAN, trials=6).limits == (60, 60)
    assert Plan.checked(SCAN, trials=30).limits == (150, 150)


def test_a_case_may_have_its_own_number_of_trials(folder: ReproduceFolder) -> None:
    cases = (CASES[0], Case(name="a=2", values={"scale": 2.0}, trials=4))
    result = reproduce(recipe(cases=cases), folder)
    assert [case["trials"] for case in result["cases"]] == [10, 4]
    assert Plan.checked(recipe(cases=cases), trials=5).wanted == (5, 5)


def test_numbers_come_with_their_verdicts(folder: ReproduceFolder) -> None:
    result = reproduce(recipe(), folder)
    assert [number["verdict"] for number in result["numbers"]] == ["met", "differs", "not published"]
    assert result["counts"] == {"trials": 20, "accepted": 20, "met": 1, "differs": 1, "not_published": 1}
    assert result["notes"] == ["A note."]
    assert result["paper"]["arxiv"] == "2401.00001"


def test_times_and_versions_are_in_the_config_alone(folder: ReproduceFolder) -> None:
    reproduce(recipe(), folder, command="attsvm reproduce toy")
    config = folder.read_config()
    assert config["command"] == "attsvm reproduce toy"
    assert config["computing_seconds"] > 0
    assert {"torch", "matplotlib"} <= set(config["versions"])
    text = b"".join(final(folder).values())
    assert b"seconds" not in text
    assert config["created"][:10].encode() not in text


def test_progress_counts_trials_and_estimates_the_time_left(folder: ReproduceFolder) -> None:
    told: list[tuple[int, int, float | None]] = []
    reproduce(SCAN, folder, progress=lambda *news: told.append(news))
    assert {total for _, total, _ in told} == {24}
    assert told[-1][:2] == (24, 24)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][2] == 0.0


# Damage.


def interrupted(folder: ReproduceFolder) -> Path:
    """A run that failed after three chunks; its file of finished chunks."""
    with pytest.raises(AttSVMError):
        reproduce(recipe(run=Counting(3)), folder, workers=1)
    path = folder.checkpoint / "trials-0.jsonl"
    assert len(path.read_bytes().splitlines()) == 4
    return path


def test_a_torn_line_is_dropped_wherever_it_ends(folder: ReproduceFolder, whole: Any) -> None:
    path = interrupted(folder)
    content = path.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1
    for cut in (0, 1, content.index(b"\n"), last, last + 1, (last + len(content)) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        again = Counting()
        reproduce(recipe(run=again), folder, workers=1)
        assert len(again.calls) == 8 - max(content[:cut].count(b"\n") - 1, 0)
        assert final(folder) == whole(recipe())
        folder.result_file.unlink()
        folder.create()


def test_other_damage_is_named_and_loses_nothing(folder: ReproduceFolder, whole: Any) -> None:
    path = interrupted(folder)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for number in (1, 2, 4):
        before = sum(len(line) for line in lines[: number - 1])
        for at in range(before, before + len(lines[number - 1]) - 1, 37):
            damaged = bytearray(content)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(RecordError, match=rf"trials-0\.jsonl, line {number}, is damaged") as caught:
                reproduce(recipe(), folder)
            assert "--overwrite" in str(caught.value)
            assert path.read_bytes() == damaged
    path.write_bytes(content)
    reproduce(recipe(), folder)
    assert final(folder) == whole(recipe())


@pytest.mark.parametrize("content", ["something else\n", '{"checksum": "", "content": 3}\n', "\n"])
def test_a_foreign_file_is_named(folder: ReproduceFolder, content: str) -> None:
    interrupted(folder)
    (folder.checkpoint / "trials-7.jsonl").write_text(content)
    with pytest.raises(RecordError, match=r"trials-7\.jsonl, line 1, is damaged or not of attsvm"):
        reproduce(recipe(), folder)


def test_chunks_of_other_settings_are_named(folder: ReproduceFolder, tmp_path: Path) -> None:
    path = interrupted(folder)
    other = ReproduceFolder(tmp_path / "other")
    with pytest.raises(AttSVMError):
        reproduce(recipe(run=Counting(3)), other, workers=1, seed=5)
    path.write_bytes((other.checkpoint / "trials-0.jsonl").read_bytes())
    with pytest.raises(RecordError, match=r"trials-0\.jsonl, line 1, is that of a run with other settings"):
        reproduce(recipe(), folder)


def test_a_file_in_use_is_named(folder: ReproduceFolder) -> None:
    import fcntl

    path = interrupted(folder)
    with path.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(RecordError, match=r"trials-0\.jsonl is in use by another attsvm process"):
            reproduce(recipe(), folder)


def test_no_space_keeps_what_was_finished(folder: ReproduceFolder, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills in the middle of the third line."""
    write, lines = os.write, []

    def short(handle: int, content: bytes) -> int:
        if content.startswith(b'{"checksum"'):
            lines.append(content)
            if len(lines) == 4:
                return write(handle, content[:20])
        elif len(lines) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, content)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", short)
        with pytest.raises(RecordError, match=r"trials-0\.jsonl could not be written: No space left on device\."):
            reproduce(recipe(), folder, workers=1)
    assert (folder.checkpoint / "trials-0.jsonl").read_bytes() == b"".join(lines[:3])
    again = Counting()
    reproduce(recipe(run=again), folder, workers=1)
    assert len(again.calls) == 6
    assert final(folder) == whole(recipe())


@pytest.mark.parametrize("name", [*FINAL, "config.json"])
def test_no_space_for_a_final_file(
    folder: ReproduceFolder, whole: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == name and (folder.path / "trials.jsonl").exists() == (name != "trials.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(RecordError, match=rf"{name} could not be written: No space left"):
            reproduce(recipe(), folder)
    again = Counting()
    reproduce(recipe(run=again), folder)
    assert again.calls == [], "the trials were all there"
    assert final(folder) == whole(recipe())


# What a recipe may do wrong.


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("the loss\ndiverged"), "ValueError: the loss diverged"),
        (InvalidInputError("descend: scores must be finite."), "descend: scores must be finite."),
        (MemoryError(), "out of memory; fewer --workers need less."),
        (AssertionError(), "AssertionError: no reason given"),
    ],
)
def test_a_trial_that_fails_is_named(folder: ReproduceFolder, error: Exception, words: str) -> None:
    with pytest.raises(AttSVMError) as caught:
        reproduce(recipe(run=Counting(5, error)), folder, workers=1)
    assert str(caught.value) == f"reproduce: toy, case a=2, seeds 3 to 5: {words}"
    assert not isinstance(caught.value, InvalidInputError), "it is not the user's mistake"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{}], r"zip\(\) argument 2 is shorter"),
        ([{"value": torch.zeros(2)}] * 3, "Tensor is not JSON serializable"),
        ([1, 2, 3], "TypeError"),
    ],
)
def test_records_that_are_none(folder: ReproduceFolder, records: list[Any], words: str) -> None:
    with pytest.raises(AttSVMError, match=f"toy, case a=1, seeds 0 to 2: .*{words}"):
        reproduce(recipe(run=lambda case, seeds: records), folder, workers=1)


@pytest.mark.parametrize(("part", "words"), [("summarize", "the summary"), ("draw", "the figure")])
def test_failure_after_the_trials_keeps_them(folder: ReproduceFolder, whole: Any, part: str, words: str) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(AttSVMError, match=f"reproduce: toy, {words} of its trials: ZeroDivisionError"):
        reproduce(recipe(**{part: fail}), folder)
    again = Counting()
    reproduce(recipe(run=again), folder)
    assert again.calls == []
    assert final(folder) == whole(recipe())


def test_the_failure_of_one_worker_lets_the_others_finish_their_chunk(folder: ReproduceFolder) -> None:
    met = threading.Barrier(2)

    def one_fails(case: Case, seeds: Sequence[int]) -> list[Record]:
        met.wait(10)
        if seeds[0] == 0:
            raise ValueError("it diverged")
        threading.Event().wait(0.5)
        return run(case, seeds)

    with pytest.raises(AttSVMError, match="diverged"):
        reproduce(recipe(run=one_fails), folder, workers=2)
    again = Counting()
    reproduce(recipe(run=again), folder)
    assert ("a=1", 3) not in again.calls
    assert len(again.calls) == 7


# Options and folders.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trials": 0}, "--trials must be at least 1, got 0"),
        ({"trials": -3}, "--trials must be at least 1, got -3"),
        ({"seed": -1}, r"--seed must be .* in \[0, 2147483647\], got -1 to 8"),
        ({"seed": 2**31 - 5}, "got 2147483643 to 2147483652"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(folder: ReproduceFolder, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        reproduce(recipe(), folder, **options)
    assert not folder.path.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trials": 9}, "a run with --trials 10, not 9"),
        ({"seed": 4}, "a run with --seed 0, not 4"),
    ],
)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_other_settings_need_overwrite(
    folder: ReproduceFolder, options: dict[str, Any], words: str, finished: bool
) -> None:
    if finished:
        reproduce(recipe(), folder)
    else:
        interrupted(folder)
    assert state_of(recipe(), folder, **options) == "other settings"
    with pytest.raises(InvalidInputError, match=f"{words}; choose another folder or add --overwrite"):
        reproduce(recipe(), folder, **options)
    reproduce(recipe(), folder, **options, overwrite=True)
    assert state_of(recipe(), folder, **options) == "finished"


def test_another_version_is_another_run(folder: ReproduceFolder) -> None:
    interrupted(folder)
    config = folder.read_config()
    config["config"]["attsvm"] = "0.0.1"
    folder.write_config(config)
    with pytest.raises(InvalidInputError, match=r"a run with attsvm 0\.0\.1, not"):
        reproduce(recipe(), folder)


@pytest.mark.parametrize("content", ['{"schema_version": 1, "kind": "verify"}', "{", "[]"])
def test_other_runs_and_damaged_configs_need_overwrite(folder: ReproduceFolder, content: str) -> None:
    folder.path.mkdir()
    folder.config_file.write_text(content)
    with pytest.raises(InvalidInputError, match="a run of another kind or a damaged record"):
        reproduce(recipe(), folder)


def test_other_files_are_never_touched(folder: ReproduceFolder) -> None:
    folder.path.mkdir()
    (folder.path / "thesis.tex").write_text("mine")
    with pytest.raises(InvalidInputError, match="it holds other files"):
        reproduce(recipe(), folder, overwrite=True)
    assert [path.name for path in folder.path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(folder: ReproduceFolder) -> None:
    folder.path.write_text("")
    with pytest.raises(InvalidInputError, match="must be a folder, and is a file"):
        reproduce(recipe(), folder)


def test_a_folder_in_use_is_left_alone(folder: ReproduceFolder) -> None:
    with folder.lock(), pytest.raises(RecordError, match="is in use by another attsvm process"):
        reproduce(recipe(), folder)


def test_without_matplotlib_nothing_is_computed(folder: ReproduceFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    counting = Counting()
    with pytest.raises(UnsupportedError, match=r"matplotlib, which is not installed: pip install 'attsvm\[plot\]'"):
        reproduce(recipe(run=counting), folder)
    assert counting.calls == []
    assert not folder.path.exists()


def test_the_users_style_of_matplotlib_has_no_say(folder: ReproduceFolder, whole: Any) -> None:
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "svg.hashsalt": "other"}):
        reproduce(recipe(), folder)
    assert final(folder) == whole(recipe())


# Who computes what.


def test_a_scan_claims_no_more_than_it_may_need() -> None:
    one = recipe(scan=60, trials=6, cases=CASES[:1])
    shares = Shares(Plan.checked(one), {}, Processes())
    first = [shares.next() for _ in range(2)]
    assert [chunk.number for chunk in first if chunk] == [0, 1]
    for chunk in first:
        assert chunk
        shares.finished(chunk, 3)
    assert shares.next() is None
    assert shares.trials_done() == 6


def test_a_scan_goes_to_the_next_case_while_the_first_may_have_enough() -> None:
    one = recipe(scan=60, trials=3)
    shares = Shares(Plan.checked(one), {}, Processes())
    chunks = [shares.next() for _ in range(3)]
    assert [(chunk.case, chunk.number) for chunk in chunks if chunk] == [(0, 0), (1, 0), (0, 1)]


def test_what_is_missing_before_finished_chunks_comes_first() -> None:
    one = recipe(scan=60, trials=6, cases=CASES[:1])
    shares = Shares(Plan.checked(one), {(0, 0): 2, (0, 2): 3, (0, 4): 3}, Processes())
    taken = []
    while (chunk := shares.next()) is not None:
        taken.append(chunk.number)
        shares.finished(chunk, 0)
    # Chunk 3 is needed, as 0, 1 and 2 have five; with 4 there are enough, so that 5 is not.
    assert taken == [1, 3]


def test_halves_of_dead_processes_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".report.html.{pid}.part" for pid in (dead.pid, os.getpid(), 1, 10**30, "x")]
    for name in (*names, "mine.part", ".hidden"):
        (tmp_path / name).write_text("")
    remove_halves(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names[1], names[2], "mine.part", ".hidden"}
