"""``attsvm solve``: what it writes, how it is interrupted and goes on, and what it says of mistakes."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm import TokenSelection, solve
from attsvm.selection import certify, check_ray
from cli.commands import Commands, strict_json
from cli.data import result_at
from cli.problems import D, N, T, solution_at, some_problem, write_problem

LONG = ("solve", "problem.npz", "--method", "coordinate", "--tol", "1e-13", "-o", "run")
"""Thousands of sweeps."""


def selection(**changes: Any) -> TokenSelection:
    arrays = {**some_problem(), **changes}
    return TokenSelection(arrays["tokens"], arrays["queries"], arrays["selected"])


# ------------------------------------------------------------------------------------------------------- what it writes


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_solution_and_its_certificate(attsvm: Commands, suffix: str) -> None:
    write_problem(attsvm.home / f"problem.{suffix}")
    done = attsvm("solve", f"problem.{suffix}", "--json")
    assert done.code == 0, done.err
    run = attsvm.home / "runs" / "problem"
    result, arrays = result_at(run), solution_at(run)
    assert done.json == {**result, "run": "runs/problem"}
    assert (result["kind"], result["status"], result["n_sequences"]) == ("solve", "optimal", N)
    assert result["n_constraints"] == N * (T - 1)
    assert result["gap"] <= result["tol"] == 1e-6
    assert not (run / "checkpoint").exists()
    proof = certify(selection(), arrays["W"], arrays["duals"], arrays["equality_duals"])
    assert proof.upper_bound == pytest.approx(result["upper_bound"], rel=1e-12)
    assert proof.lower_bound == pytest.approx(result["lower_bound"], rel=1e-12)
    assert "gap" in done.err
    assert "smallest Frobenius norm" in done.err


@pytest.mark.parametrize(("norm", "options"), [("nuc", ()), ("fro", ("--penalty", "0.05")), ("2", ())])
def test_norms_and_slack(attsvm: Commands, norm: str, options: tuple[str, ...]) -> None:
    write_problem(attsvm.home / "problem.npz")
    done = attsvm("solve", "problem.npz", "--norm", norm, *options, "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    expected = solve(
        selection(), norm if norm == "nuc" else "fro", penalty=float(options[1]) if options else np.inf, tol=1e-6
    )
    assert done.json["upper_bound"] == pytest.approx(expected.upper_bound, rel=2e-6)
    assert done.json["norm"] == ("nuc" if norm == "nuc" else "fro")
    assert done.json["penalty"] == (0.05 if options else None)


def test_curve_of_the_gap(attsvm: Commands) -> None:
    write_problem(attsvm.home / "problem.npz")
    assert attsvm("solve", "problem.npz", "-o", "run", "--method", "coordinate").code == 0
    lines = (attsvm.home / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [strict_json(line) for line in lines]
    steps = [row["iteration"] for row in rows]
    assert steps == sorted(set(steps))
    assert len(rows) > 3
    assert rows[-1]["gap"] <= 1e-6 < rows[0]["gap"]


def test_a_proof_that_names_the_guilty_sequence(attsvm: Commands) -> None:
    write_problem(attsvm.home / "problem.npz", guilty=17)
    done = attsvm("solve", "problem.npz", "-o", "run", "--json")
    assert done.code == 3
    assert re.search(r"Sequences in the proof[^:]*: 17\b", done.err.splitlines()[-1])
    assert done.json["ray_sequences"][0] == 17
    assert done.json["status"] == "infeasible"
    assert done.json["lower_bound"] is None
    arrays = solution_at(attsvm.home / "run")
    assert check_ray(selection(**some_problem(guilty=17)), arrays["ray"], arrays["equality_ray"]).valid


def test_nothing_asked(attsvm: Commands) -> None:
    write_problem(attsvm.home / "problem.npz", selected=np.full(N, -1))
    done = attsvm("solve", "problem.npz", "-o", "run")
    assert done.code == 0
    assert "no constraints, so W = 0" in done.err
    assert not solution_at(attsvm.home / "run")["W"].any()
    assert result_at(attsvm.home / "run")["margin"] is None


@pytest.mark.parametrize("kind", ["float16", "float32", "integers", "one dimension"])
def test_unusual_tokens_have_a_certified_solution_in_float64(attsvm: Commands, kind: str) -> None:
    arrays = some_problem()
    if kind == "integers":
        arrays["tokens"] = np.round(3 * arrays["tokens"]).astype(np.int8)
    elif kind == "one dimension":
        tokens = np.array([[[1.0], [0.0]], [[0.0], [-3.0]]])
        arrays = {"tokens": tokens, "queries": np.array([[2.0], [1.0]]), "selected": np.array([0, 0])}
    else:
        arrays = {**arrays, "tokens": arrays["tokens"].astype(kind), "queries": arrays["queries"].astype(kind)}
    write_problem(attsvm.home / "problem.npz", **arrays)
    assert attsvm("solve", "problem.npz", "-o", "run", "--tol", "1e-9").code == 0
    found = solution_at(attsvm.home / "run")
    assert found["W"].dtype == np.float64
    wide = {key: value.astype(np.float64) if key != "selected" else value for key, value in arrays.items()}
    assert certify(selection(**wide), found["W"], found["duals"]).gap <= 1e-9


def test_a_batch(attsvm: Commands) -> None:
    arrays = {key: value.reshape(4, N // 4, *value.shape[1:]) for key, value in some_problem(guilty=20).items()}
    write_problem(attsvm.home / "problem.npz", **arrays)
    done = attsvm("solve", "problem.npz", "-o", "run", "--json")
    assert done.code == 3
    assert done.json["status"] == ["optimal"] * 3 + ["infeasible"]
    assert done.json["ray_sequences"] == [None] * 3 + [[2]]
    assert "3 optimal, 1 infeasible" in done.err
    found = solution_at(attsvm.home / "run")
    assert found["W"].shape == (4, D, D)
    assert found["ray"].shape == found["duals"].shape == (4, N // 4, 1, T)
    first = {key: value[0] for key, value in arrays.items()}
    assert certify(selection(**first), found["W"][0], found["duals"][0]).gap <= 1e-6


# ------------------------------------------------------------------------------------------------- interrupted, and on


def slowly_with_checkpoints() -> None:
    """Let every check take a while and leave a checkpoint."""
    import time

    import attsvm.solvers
    from attsvm.cli.terminal import Bars

    assert attsvm.solvers
    sys.modules["attsvm.solvers.solve"].CHECKPOINT_SECONDS = 0.0
    tell = Bars.tell

    def slow(self: Any, *arguments: Any) -> None:
        tell(self, *arguments)
        time.sleep(0.2)

    Bars.tell = slow


def begin(attsvm: Commands, *options: str) -> Any:
    """Start a long run, and wait for its first checkpoint with a known gap."""
    write_problem(attsvm.home / "problem.npz")
    running = attsvm.start(*LONG, *options, before=slowly_with_checkpoints)
    curve = attsvm.home / "run" / "metrics.jsonl"
    running.until(lambda: curve.exists() and any(json.loads(line)["gap"] for line in curve.read_text().splitlines()))
    return running


def first_new_gap(run: Path, before: int) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(rows[before]["gap"])


def test_kill_and_resume(attsvm: Commands) -> None:
    running = begin(attsvm)
    running.signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    run = attsvm.home / "run"
    assert not (run / "result.json").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    attsvm("solve", *LONG[1:], "-q").failed(2, "run", "unfinished", "--resume")
    done = attsvm("solve", "problem.npz", "-o", "run", "--resume", "--json")
    assert done.code == 0, done.err
    assert done.json["resumed"] is True
    # It begins where the checkpoint was, not where a new run begins.
    gaps = [row["gap"] for row in rows if row["gap"] is not None]
    assert first_new_gap(run, len(rows)) < gaps[0]
    assert {path.name for path in run.iterdir()} >= {"result.json", "solution.safetensors"}
    assert not (run / "checkpoint").exists()


def test_ctrl_c_leaves_the_best_so_far(attsvm: Commands) -> None:
    running = begin(attsvm, "--json")
    running.signal(signal.SIGINT)
    done = running.wait()
    assert done.code == 130
    assert "interrupted" in done.err.splitlines()[-1]
    run = attsvm.home / "run"
    assert done.json["status"] == result_at(run)["status"] == "interrupted"
    found = solution_at(run)
    proof = certify(selection(), found["W"], found["duals"])
    assert proof.upper_bound == pytest.approx(done.json["upper_bound"], rel=1e-12)
    again = attsvm("solve", "problem.npz", "-o", "run", "--resume", "--json", "-q")
    assert (again.code, again.json["status"], again.json["resumed"]) == (0, "optimal", True)


def test_a_limit_is_said_and_can_be_lifted(attsvm: Commands) -> None:
    write_problem(attsvm.home / "problem.npz")
    done = attsvm(*LONG, "--max-iterations", "8", "--json")
    assert done.code == 1
    assert "before the tolerance" in done.err.splitlines()[-1]
    assert done.json["status"] == "iteration_limit"
    again = attsvm(*LONG[:2], "-o", "run", "--resume", "--json")
    assert (again.code, again.json["status"]) == (0, "optimal")
    assert attsvm("solve", "problem.npz", "--max-seconds", "0", "-o", "other", "-q").code == 1


def test_resume_without_a_run_begins_one(attsvm: Commands) -> None:
    write_problem(attsvm.home / "problem.npz")
    done = attsvm("solve", "problem.npz", "--resume", "--json")
    assert (done.code, done.json["resumed"]) == (0, False)
    assert attsvm("solve", "problem.npz", "--json").json["run"] == "runs/problem-2"


def test_resume_finds_the_unfinished_run(attsvm: Commands) -> None:
    write_problem(attsvm.home / "problem.npz")
    assert attsvm("solve", "problem.npz", "-q").code == 0
    assert attsvm("solve", "problem.npz", "-q", "--max-iterations", "1", "--tol", "1e-12").code == 1
    assert attsvm("solve", "problem.npz", "--resume", "--json").json["run"] == "runs/problem-2"


def test_resume_refuses_another_problem(attsvm: Commands) -> None:
    begin(attsvm).signal(signal.SIGKILL)
    attsvm(*LONG, "--norm", "nuc", "--resume").failed(2, "--output-dir", "other settings")
    write_problem(attsvm.home / "problem.npz", guilty=3)
    attsvm(*LONG, "--resume").failed(2, "--output-dir", "arrays changed")


def test_damaged_checkpoint_is_named(attsvm: Commands) -> None:
    running = begin(attsvm)
    running.signal(signal.SIGKILL)
    running.wait()
    (attsvm.home / "run" / "checkpoint" / "best.safetensors").write_bytes(b"half")
    attsvm(*LONG, "--resume", "-q").failed(1, "checkpoint/best.safetensors")


# ------------------------------------------------------------------------------------------------------------- mistakes

FILES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no tokens": ({"tokens": None}, ("tokens", "'queries', 'selected'")),
    "tokens of two axes": ({"tokens": np.ones((N, D))}, ("tokens", "(n, T, d)", f"({N}, {D})")),
    "no sequences": ({"tokens": np.ones((0, T, D))}, ("tokens", "empty")),
    "NaN in tokens": ({"tokens": np.full((N, T, D), np.nan)}, ("tokens", "finite", "nan")),
    "complex tokens": ({"tokens": np.ones((N, T, D)) + 0j}, ("tokens", "real", "complex128")),
    "text": ({"tokens": np.full((N, T, D), "x")}, ("tokens", "real", "<U1")),
    "objects": ({"tokens": np.array([{}], dtype=object)}, ("Python objects", "never read")),
    "tokens twice": ({"X": np.ones((N, T, D))}, ("tokens", "once", "tokens and X")),
    "queries of another size": ({"queries": np.ones((N, D + 1))}, ("queries", f"d = {D}")),
    "infinite query": ({"queries": np.full((N, D), np.inf)}, ("queries", "finite", "inf")),
    "no selection": ({"selected": None}, ("selected", "scores", "'tokens'")),
    "both selections": ({"scores": np.ones((N, T))}, ("selected", "scores", "both")),
    "selected out of range": ({"selected": np.full(N, 9)}, ("selected", f"[0, {T})", "9 at sequence 0")),
    "selected as floats": ({"selected": np.zeros(N)}, ("selected", "integers", "float64")),
    "too few selected": ({"selected": np.zeros(3, dtype=int)}, ("selected", f"({N}, 1)")),
    "selected and masked": ({"allowed": np.arange(T) > 5}, ("allowed",)),
    "allowed of other values": ({"allowed": np.full((N, T), 2)}, ("allowed", "boolean")),
    "a sequence all masked": ({"allowed": np.arange(N)[:, None] * np.ones(T) > 0}, ("allowed", "sequence 0")),
    "lengths too long": ({"lengths": np.full(N, T + 1)}, ("lengths", f"[1, {T}]", f"{T + 1} at sequence 0")),
    "lengths as floats": ({"lengths": np.ones(N)}, ("lengths", "integers")),
    "offsets of another size": ({"offsets": np.ones((N, T + 1))}, ("offsets", f"({N}, {T})", f"({N}, {T + 1})")),
    "NaN in offsets": ({"offsets": np.full((N, T), np.nan)}, ("offsets", "finite")),
    "negative margin": ({"margin": np.array(-1.0)}, ("margin", ">= 0", "-1")),
    "center of another size": ({"center": np.eye(3)}, ("center", f"({D}, {D})", "(3, 3)")),
    "NaN in the center": ({"center": np.full((D, D), np.nan)}, ("center", "finite")),
    "causal alone": ({"causal": np.array(True)}, ("causal", "sequence")),
    "sequence with queries": ({"sequence": np.array(True)}, ("queries", "sequence")),
    "sequence of what": ({"sequence": np.array([1, 0])}, ("sequence", "one value")),
    "unknown key": ({"offset": np.ones((N, T))}, ("'offset'", "offsets")),
}


@pytest.mark.parametrize("case", FILES)
def test_unusable_file(attsvm: Commands, case: str) -> None:
    changes, words = FILES[case]
    write_problem(attsvm.home / "problem.npz", **changes)
    attsvm("solve", "problem.npz", "--json").failed(2, "solve: ", *words)
    assert not (attsvm.home / "runs").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.npz", None, ("missing.npz", "does not exist")),
        ("problem.csv", b"x", ("problem.csv", ".npz", ".safetensors")),
        ("problem.npz", b"", ("problem.npz", "archive")),
        ("problem.npz", b"PK\x03\x04" + b"x" * 50, ("problem.npz", "archive")),
        ("problem.safetensors", b"x" * 100, ("problem.safetensors", "safetensors file")),
    ],
)
def test_no_such_file_or_a_damaged_one(
    attsvm: Commands, name: str, content: bytes | None, words: tuple[str, ...]
) -> None:
    if content is not None:
        (attsvm.home / name).write_bytes(content)
    attsvm("solve", name).failed(2, *words)
    assert not (attsvm.home / "runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--norm", "0.5"), ("--norm", "fro, nuc, op", "'0.5'")),
        (("--norm", "nan"), ("--norm", "'nan'")),
        (("--norm", "euclid"), ("--norm", "'euclid'")),
        (("--penalty", "0"), ("--penalty", "greater than 0")),
        (("--penalty", "nan"), ("--penalty", "nan")),
        (("--tol", "0"), ("--tol", "greater than 0")),
        (("--tol", "1"), ("--tol", "less than 1")),
        (("--rank", "0"), ("--rank", "got 0")),
        (("--rank", "2"), ("rank", "nuc")),
        (("--norm", "nuc", "--rank", "2", "--penalty", "1"), ("rank", "soft margin")),
        (("--method", "splitting"), ("method", "coordinate")),
        (("--max-seconds", "-1"), ("--max-seconds", "-1")),
        (("--max-iterations", "-1"), ("--max-iterations", "-1")),
        (("--max-bytes", "10"), ("--max-bytes", "1048576")),
        (("--resume", "--overwrite"), ("--resume", "--overwrite")),
    ],
)
def test_unusable_option(attsvm: Commands, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    write_problem(attsvm.home / "problem.npz")
    attsvm("solve", "problem.npz", *options, "-o", "run").failed(2, *words)
    assert [path.name for path in attsvm.home.iterdir()] == ["problem.npz"]


def records(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_a_finished_run_is_not_lost(attsvm: Commands) -> None:
    write_problem(attsvm.home / "problem.npz")
    assert attsvm("solve", "problem.npz", "-o", "run").code == 0
    before = records(attsvm.home / "run")
    attsvm("solve", "problem.npz", "-o", "run").failed(2, "--output-dir", "finished", "--overwrite")
    attsvm("solve", "problem.npz", "-o", "run", "--overwrite", "--rank", "2").failed(2, "rank")
    attsvm("solve", "typo.npz", "-o", "run", "--overwrite").failed(2, "typo.npz")
    attsvm("verify", "--model", "none", "-o", "run").failed(2, "--output-dir", "run", "finished")
    attsvm("report", "run").failed(1, "run")
    assert records(attsvm.home / "run") == before
    assert attsvm("solve", "problem.npz", "-o", "run", "--overwrite").code == 0


def test_a_folder_of_others(attsvm: Commands) -> None:
    write_problem(attsvm.home / "problem.npz")
    (attsvm.home / "out").mkdir()
    (attsvm.home / "out" / "thesis.tex").write_text("mine")
    attsvm("solve", "problem.npz", "-o", "out", "--overwrite").failed(2, "--output-dir", "other files")
    attsvm("solve", "problem.npz", "-o", "problem.npz").failed(2, "--output-dir", "file")
    assert (attsvm.home / "out" / "thesis.tex").read_text() == "mine"


def fill_the_disk() -> None:
    """Let writing the solution fail with ENOSPC."""
    import errno
    import os

    fsync = os.fsync

    def full(handle: int) -> None:
        if "solution" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    os.fsync = full


def test_no_space_on_the_disk(attsvm: Commands) -> None:
    write_problem(attsvm.home / "problem.npz")
    attsvm("solve", "problem.npz", "-o", "run", "-q", before=fill_the_disk).failed(
        1, "solution.safetensors", "No space left"
    )
    assert not (attsvm.home / "run" / "result.json").exists()
    assert attsvm("solve", "problem.npz", "-o", "run", "--resume", "-q").code == 0
