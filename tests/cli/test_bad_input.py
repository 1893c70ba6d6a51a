"""A user's mistake ends in one sentence that names it and an exit code; no traceback, and no folder left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.commands import SMALL, Commands
from cli.data import FAST, result_at, some_arrays, write_csv, write_jsonl, write_npz

NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")


def arrays(**changes: Any) -> Callable[[Path], Any]:
    return lambda path: write_npz(path, **changes)


def rows(*labels: Any) -> Callable[[Path], Any]:
    return lambda path: write_csv(path, [(f"text {number}", label) for number, label in enumerate(labels)])


def written(content: str | bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def with_nan(key: str, value: float) -> Callable[[Path], Any]:
    array = some_arrays()[key].copy()
    array[0, 1] = value
    return arrays(**{key: array})


FILES: dict[str, tuple[str, Callable[[Path], Any], tuple[str, ...], tuple[str, ...]]] = {
    # name of the case: file, how it is written, further options, words of the message
    "a directory": ("data.csv", Path.mkdir, (), ("data.csv", "directory")),
    "no suffix": ("data", written("text,label\n"), (), ("'data'", ".csv")),
    "another suffix": ("data.xlsx", written("x"), (), ("data.xlsx", ".csv", ".npz")),
    "a pickle": ("data.pkl", written(b"\x80\x04N."), (), ("data.pkl",)),
    "empty csv": ("data.csv", written(""), (), ("data.csv", "empty")),
    "empty jsonl": ("data.jsonl", written(""), (), ("data.jsonl",)),
    "empty npz": ("data.npz", written(""), (), ("data.npz",)),
    "empty parquet": ("data.parquet", written(""), (), ("data.parquet",)),
    "header only": ("data.csv", written("text,label\n"), (), ("data.csv", "at least one row")),
    "not UTF-8": ("data.csv", written(b"text,label\nb\xe9,1\n"), (), ("data.csv", "UTF-8", "line 2")),
    "broken JSON line": ("data.jsonl", written('{"text": "a", "label": 1}\n{"text":\n'), (), ("data.jsonl", "line 2")),
    "a JSON number": ("data.jsonl", written("3\n"), (), ("data.jsonl", "object", "line 1")),
    "one label": ("data.csv", rows("good", "good", "good"), (), ("label", "exactly two", "'good'")),
    "three labels": ("data.csv", rows("a", "b", "c", "a"), (), ("label", "exactly two", "'a', 'b', 'c'")),
    "no labels": ("data.csv", rows("", ""), (), ("at least one row",)),
    "missing text column": ("data.csv", rows(0, 1), ("--text-column", "body"), ("text_column", "'body'", "'text'")),
    "missing label column": ("data.csv", rows(0, 1), ("--label-column", "y"), ("label_column", "'y'", "'label'")),
    "one column twice": ("data.csv", rows(0, 1), ("--label-column", "text"), ("label_column", "two columns")),
    "unusual columns": ("data.csv", written("a,b\nx,1\n"), (), ("text_column", "'a', 'b'")),
    "columns of arrays": ("data.npz", arrays(), ("--text-column", "text"), ("text_column", "arrays")),
    "no tokens": ("data.npz", arrays(X=None), (), ("X", "tokens")),
    "no labels or scores": ("data.npz", arrays(y=None), (), ("y", "scores")),
    "two axes": ("data.npz", arrays(X=np.ones((6, 5))), (), ("X", "(n, T, d)", "(6, 5)")),
    "no sequences": ("data.npz", arrays(X=np.ones((0, 5, 7))), (), ("X", "empty")),
    "no tokens in a sequence": ("data.npz", arrays(X=np.ones((6, 0, 7))), (), ("X", "empty")),
    "queries of another size": ("data.npz", arrays(z=np.ones((6, 8))), (), ("z", "(6, 7)", "(6, 8)")),
    "labels of another number": ("data.npz", arrays(y=np.ones(5)), (), ("y", "(6,)", "(5,)")),
    "three label values": ("data.npz", arrays(y=np.array([0, 1, 2, 0, 1, 2])), (), ("y", "exactly two")),
    "NaN in tokens": ("data.npz", with_nan("X", np.nan), (), ("X", "finite", "nan", "(0, 1, 0)")),
    "infinity in queries": ("data.npz", with_nan("z", np.inf), (), ("z", "finite", "inf")),
    "a sequence all masked": ("data.npz", arrays(allowed=np.zeros((6, 5), dtype=bool)), (), ("allowed", "none at 0")),
    "complex tokens": ("data.npz", arrays(X=some_arrays()["X"] + 0j), (), ("X", "real")),
    "objects": ("data.npz", arrays(X=np.array([{}], dtype=object)), (), ("Python objects", "never read")),
    "not safetensors": ("data.safetensors", written("x" * 100), (), ("data.safetensors",)),
    "tokens that are all zero": ("data.npz", arrays(X=np.zeros((6, 5, 7))), (), ("data.npz", "not 0")),
}


@pytest.mark.parametrize("case", FILES)
def test_unusable_file(attsvm: Commands, case: str) -> None:
    name, write, options, words = FILES[case]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    write(attsvm.home / name)
    attsvm("verify", name, *FAST, *options, "--json").failed(2, *words)
    runs = attsvm.home / "runs"
    assert not runs.exists() or list(runs.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "-1"), ("--steps", "-1")),
        (("--steps", "0"), ("--steps", "greater than or equal to 1", "got 0")),
        (("--learning-rate", "0"), ("--learning-rate", "greater than 0")),
        (("--lr", "-0.1"), ("--learning-rate", "-0.1")),
        (("--lr", "nan"), ("--learning-rate", "nan")),
        (("--lr", "inf"), ("--learning-rate", "finite")),
        (("--tol", "2"), ("--tol", "less than 1", "got 2")),
        (("--tol", "0"), ("--tol", "greater than 0")),
        (("--tol", "nan"), ("--tol", "nan")),
        (("--rank", "0"), ("--rank", "got 0")),
        (("-n", "1"), ("--n-sequences", "got 1")),
        (("--seed", "-1"), ("--seed", "got -1")),
        (("--d-model", "0"), ("--d-model", "got 0")),
        (("--max-tokens", "2"), ("--max-tokens", "got 2")),
        (("--batch-size", "0"), ("--batch-size", "got 0")),
        (("--model", ""), ("--model",)),
        (("--text-column", "text"), ("text_column", "sample")),
        (("missing.csv",), ("missing.csv", "does not exist")),
        (("no/such/folder/data.npz",), ("data.npz", "does not exist")),
        (("x" * 4000 + ".csv",), ("File name too long",)),
    ],
)
def test_unusable_option(attsvm: Commands, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    attsvm("verify", *SMALL, *options).failed(2, *words)


def test_unknown_model_folder(attsvm: Commands) -> None:
    attsvm("verify", "-n", "4", "--model", "./nowhere").failed(2, "model", "'./nowhere'")


def test_unknown_model_name(attsvm: Commands) -> None:
    pytest.importorskip("huggingface_hub")
    attsvm("verify", "-n", "4", "--model", "nobody/nothing").failed(2, "model", "'nobody/nothing'", "HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [(None, 2, ("config.json",)), ("config.json", 2, ()), ("pytorch_model.bin", 2, ()), ("a file", 2, ())],
)
def test_folder_that_is_no_model(attsvm: Commands, file: str | None, code: int, words: tuple[str, ...]) -> None:
    pytest.importorskip("transformers")
    model = attsvm.home / "model"
    if file == "a file":
        model.write_text("x")
    else:
        model.mkdir()
        if file is not None:
            (model / file).write_text("{}")
    attsvm("verify", "-n", "4", "--model", "model").failed(code, "model", *words)
    assert not list(attsvm.home.glob("runs/*"))


def hide_encoders() -> None:
    """Make the extras look as if they were not installed."""
    from attsvm.data import model_files

    model_files.find_spec = lambda name: None


def test_without_the_default_encoder(attsvm: Commands) -> None:
    done = attsvm("verify", before=hide_encoders)
    done.failed(3, "default text encoder", "attsvm[demo]", "--model none")


def test_too_little_memory(attsvm: Commands) -> None:
    attsvm("verify", "--model", "none", "-n", "4", "--d-model", str(10**14)).failed(1, "out of memory")


def test_diverging_run(attsvm: Commands) -> None:
    write_npz(attsvm.home / "a.npz")
    attsvm("verify", "a.npz", "--steps", "30", "--lr", "1e300", "-q").failed(1, "learning_rate", "float64")


# ------------------------------------------------------------------------------------------------- the output directory


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_output_dir_is_a_file(attsvm: Commands) -> None:
    (attsvm.home / "out").write_text("mine")
    attsvm("verify", *SMALL, "-o", "out").failed(2, "--output-dir", "out", "file")
    attsvm("verify", *SMALL, "-o", "out/run").failed(1, "out/run", "could not be created")
    assert (attsvm.home / "out").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_output_dir_holds_other_files(attsvm: Commands, overwrite: tuple[str, ...]) -> None:
    (attsvm.home / "out").mkdir()
    (attsvm.home / "out" / "thesis.tex").write_text("mine")
    attsvm("verify", *SMALL, "-o", "out", *overwrite).failed(2, "--output-dir", "out", "other files")
    assert snapshot(attsvm.home) == {"out/thesis.tex": b"mine"}


def test_finished_run_is_not_overwritten(attsvm: Commands) -> None:
    assert attsvm("verify", *SMALL, "-o", "run").code == 0
    before = snapshot(attsvm.home / "run")
    attsvm("verify", *SMALL, "-o", "run").failed(2, "--output-dir", "run", "finished", "--overwrite")
    attsvm("verify", *SMALL, "--seed", "5", "-o", "run").failed(2, "--output-dir", "--overwrite")
    assert snapshot(attsvm.home / "run") == before


def test_overwrite_with_a_mistake_costs_no_earlier_run(attsvm: Commands) -> None:
    """The records used to be removed before the data was looked at."""
    assert attsvm("verify", *SMALL, "-o", "run").code == 0
    before = snapshot(attsvm.home / "run")
    attsvm("verify", "tpyo.csv", *SMALL, "-o", "run", "--overwrite").failed(2, "tpyo.csv")
    write_npz(attsvm.home / "zero.npz", X=np.zeros((6, 5, 7)))
    attsvm("verify", "zero.npz", "-o", "run", "--overwrite").failed(2, "zero.npz")
    assert snapshot(attsvm.home / "run") == before


def test_mistake_in_an_empty_folder_does_not_take_it(attsvm: Commands) -> None:
    """The settings of the mistaken command used to stay, and the right command met 'other settings'."""
    (attsvm.home / "out").mkdir()
    write_csv(attsvm.home / "reviews.csv")
    attsvm("verify", "review.csv", *FAST, "-o", "out").failed(2, "review.csv")
    assert attsvm("verify", "reviews.csv", *FAST, "-o", "out").code == 0


@pytest.mark.parametrize("arguments", [("..",), (".",), ("", "-o", "new/.."), ("missing.csv", "-o", "new/../")])
def test_mistake_with_dots_removes_no_file(attsvm: Commands, arguments: tuple[str, ...]) -> None:
    """``attsvm verify ..`` used to take ``runs/..`` for a new run folder and, failing, to empty the current one."""
    (attsvm.home / "thesis.tex").write_text("mine")
    (attsvm.home / "config.json").write_text("{}")
    done = attsvm("verify", *arguments, *SMALL)
    assert done.code == 2
    assert snapshot(attsvm.home) == {"thesis.tex": b"mine", "config.json": b"{}"}


def test_unfinished_run_with_other_settings(attsvm: Commands) -> None:
    write_npz(attsvm.home / "a.npz")
    options = ("a.npz", "--steps", "30", "-o", "run", "-q")
    attsvm("verify", *options, "--lr", "1e300").failed(1, "learning_rate")
    attsvm("verify", *options).failed(2, "--output-dir", "run", "unfinished", "other settings", "--overwrite")
    assert attsvm("verify", *options, "--overwrite").code == 0


def test_unfinished_run_on_data_that_changed(attsvm: Commands) -> None:
    write_csv(attsvm.home / "reviews.csv")
    options = ("reviews.csv", *FAST, "-o", "run", "-q")
    assert attsvm("verify", *options, before=end_while_solving).code == -9
    write_jsonl(attsvm.home / "other.jsonl")
    write_csv(attsvm.home / "reviews.csv", [("Another text", 0), ("and one more", 1)])
    attsvm("verify", *options).failed(1, "checkpoint", "other data")
    assert attsvm("verify", *options, "--overwrite").code == 0
    assert result_at(attsvm.home / "run")["n_sequences"] == 2


def end_while_solving() -> None:
    """Let the process kill itself when it starts to solve."""
    import signal

    from attsvm.dynamics import Trajectory

    Trajectory.solution = lambda *a, **b: os.kill(os.getpid(), signal.SIGKILL)


def wait_before_solving() -> None:
    """Hold the run, and its folder, until a file named "go" is there."""
    import time

    from attsvm.dynamics import Trajectory

    solve = Trajectory.solution

    def late(self: Any, *arguments: Any, **options: Any) -> Any:
        while not os.path.exists("go"):
            time.sleep(0.01)
        return solve(self, *arguments, **options)

    Trajectory.solution = late


def test_two_processes_in_one_folder(attsvm: Commands) -> None:
    first = attsvm.start("verify", *SMALL, "-o", "run", before=wait_before_solving)
    first.until(lambda: "train" in first.err.read_text())
    attsvm("verify", *SMALL, "-o", "run").failed(1, "run", "in use")
    attsvm("verify", *SMALL, "-o", "run", "--overwrite").failed(1, "run", "in use")
    attsvm("verify", *SMALL, "--seed", "9", "-o", "run").failed(2, "run", "other settings")
    assert attsvm("verify", *SMALL, "--seed", "9").code == 0, "another folder is free"
    (attsvm.home / "go").touch()
    assert first.wait().code == 0
    assert result_at(attsvm.home / "run")["seed"] == 0


@NOT_ROOT
def test_file_without_permission(attsvm: Commands) -> None:
    write_csv(attsvm.home / "reviews.csv").chmod(0)
    attsvm("verify", "reviews.csv", *FAST).failed(2, "reviews.csv", "Permission denied")


@NOT_ROOT
def test_read_only_parent(attsvm: Commands) -> None:
    attsvm.home.chmod(0o555)
    try:
        attsvm("verify", *SMALL).failed(1, "runs/movie-reviews", "Permission denied")
    finally:
        attsvm.home.chmod(0o755)


def fill_the_disk_at(*names: str) -> None:
    """Let writing to the disk fail with ENOSPC once a file of one of these names is written."""
    import errno

    fsync = os.fsync

    def full(handle: int) -> None:
        if any(name in os.readlink(f"/proc/self/fd/{handle}") for name in names):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    os.fsync = full


def fill_at_config() -> None:
    fill_the_disk_at("config.json")


def fill_at_checkpoint() -> None:
    fill_the_disk_at("KQ.safetensors")


def fill_at_arrays() -> None:
    fill_the_disk_at("arrays.safetensors")


def fill_at_report() -> None:
    fill_the_disk_at("report.html")


@pytest.mark.parametrize(
    ("fill", "file"),
    [
        (fill_at_config, "config.json"),
        (fill_at_checkpoint, "KQ.safetensors"),
        (fill_at_arrays, "arrays.safetensors"),
        (fill_at_report, "report.html"),
    ],
)
def test_no_space_on_the_disk(attsvm: Commands, fill: Callable[[], None], file: str) -> None:
    attsvm("verify", *SMALL, "-o", "run", "-q", before=fill).failed(1, file, "No space left")
    run = attsvm.home / "run"
    assert not list(run.rglob("*.part"))
    assert not (run / file).exists()
    if file == "report.html":
        assert attsvm("report", "run").code == 0
    else:
        assert attsvm("verify", *SMALL, "-o", "run").code == 0, "with space again the same command goes on"
