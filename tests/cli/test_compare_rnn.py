"""``attsvm compare-rnn``: its tables and records, and what it says of bad input."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from cli.commands import Commands

QUICK = ("compare-rnn", "--quick", "--seeds", "1", "--steps", "2")
MODELS = {"lstm", "lstm-seq2seq", "lstm-attention", "transformer"}


@pytest.fixture(scope="module")
def finished(shared: Commands) -> Commands:
    assert shared(*QUICK, "-o", "run").code == 0
    return shared


def test_tables_for_people(finished: Commands) -> None:
    done = finished(*QUICK, "-o", "run")
    assert (done.code, done.out) == (0, "")
    for words in ("µs per token", "One more token", "Accuracy of copies", "Transformer", "verdict", "Run: run"):
        assert words in done.err
    assert max(map(len, done.err.splitlines())) <= 120


def test_json_is_the_record(finished: Commands) -> None:
    done = finished(*QUICK, "-o", "run", "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.json["run"] == "run"
    assert set(done.json["copying"]) == set(done.json["timing"]["whole"]) == MODELS
    assert {one["verdict"] for one in done.json["numbers"]} <= {"met", "differs", None}


def test_an_interrupted_run_goes_on(attsvm: Commands) -> None:
    long = ("compare-rnn", "--quick", "--steps", "60", "--seeds", "1", "-o", "run")
    lines = attsvm.home / "run" / "metrics.jsonl"
    running = attsvm.start(*long)
    running.until(lines.exists)
    running.signal(signal.SIGINT)
    running.wait().failed(130, "interrupted", "goes on where it ended")
    kept = lines.read_bytes()
    assert attsvm(*long, "--quiet").code == 0
    assert lines.read_bytes().startswith(kept)
    assert os.path.exists(attsvm.home / "run" / "result.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lengths", "8,x"), ("--lengths", "8,x")),
        (("--distances", "32,8"), ("--distances", "32,8")),
        (("--seeds", "0"), ("--seeds", "got 0")),
        (("--device", "abacus"), ("--device", "abacus")),
        (("--d-model", "7"), ("--d-model", "got 7")),
    ],
)
def test_bad_options_leave_nothing(attsvm: Commands, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    attsvm("compare-rnn", "--quick", *options, "-o", "run").failed(2, *words)
    assert not (attsvm.home / "run").exists()


def test_other_settings_are_refused(finished: Commands) -> None:
    finished(*QUICK, "--seed", "5", "-o", "run").failed(2, "--output-dir run", "--overwrite")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--lengths", "8"), 2, ("--lengths", "at least 2")),
        (("--lengths", ""), 2, ("--lengths", "whole numbers")),
        (("--lengths", "16,8"), 2, ("--lengths", "must rise")),
        (("--distances", "4,8"), 2, ("--distances", "at least 5")),
        (("--seed", "-1"), 2, ("--seed", "got -1")),
        pytest.param(
            ("--device", "cuda"),
            3,
            ("--device cuda", "torch finds none"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_more_options_are_refused_by_name(
    attsvm: Commands, options: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    attsvm("compare-rnn", "--quick", *options, "-o", "run").failed(code, *words)
    assert not (attsvm.home / "run").exists()


def test_a_file_is_no_run_folder(attsvm: Commands) -> None:
    (attsvm.home / "run").write_text("mine", encoding="utf-8")
    attsvm(*QUICK, "-o", "run").failed(2, "--output-dir run", "must be a folder")
    assert (attsvm.home / "run").read_text(encoding="utf-8") == "mine"
