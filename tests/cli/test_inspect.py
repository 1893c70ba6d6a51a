"""``attsvm inspect``: records and a page, a run that goes on, and mistakes that end in one sentence."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.commands import Commands

pytest.importorskip("transformers")

from attsvm.microscope import HeadAtlas
from unit.microscope.tiny_tokenizers import tiny, trained

TEXT = "The black cat ate the mouse."
SMALL = ("--max-queries", "20")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "path" / "to" / "model"
    tokenizer = trained("bert")
    tiny("bert", d_vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_documented_command(attsvm: Commands, model: Path) -> None:
    (attsvm.home / "path").symlink_to(model.parents[1])
    done = attsvm("inspect", "path/to/model", "--text", TEXT, "--output-dir", "runs/inspect")
    assert done.code == 0, done.err
    assert done.out == ""
    assert "path/to/model: 8 heads, 1 texts" in done.err
    assert "Report: runs/inspect/report.html" in done.err
    names = {path.name for path in (attsvm.home / "runs" / "inspect").iterdir()}
    assert names == {
        ".lock",
        "arrays.safetensors",
        "config.json",
        "report.html",
        "result.json",
        "solutions.safetensors",
    }
    page = (attsvm.home / "runs" / "inspect" / "report.html").read_text(encoding="utf-8")
    assert "path/to/model" in page
    again = attsvm("report", "runs/inspect")
    assert (again.code, again.out) == (0, "runs/inspect/report.html\n")
    assert (attsvm.home / "runs" / "inspect" / "report.html").read_text(encoding="utf-8") == page
    assert HeadAtlas.load(attsvm.home / "runs" / "inspect").labels[-1] == "L1.H3"


def test_one_object_on_stdout(attsvm: Commands, model: Path) -> None:
    (attsvm.home / "texts.csv").write_text("text,label\nA quick fox.,1\nA lazy dog.,0\n", encoding="utf-8")
    options = ("--heads", "L0.H1,L1.H2", "--json", "--quiet", *SMALL)
    done = attsvm("inspect", str(model), "texts.csv", *options)
    assert (done.code, done.err) == (0, "")
    assert [head["label"] for head in done.json["heads"]] == ["L0.H1", "L1.H2"]
    assert done.json["corpus"]["n_texts"] == 2
    assert done.json["run"] == "runs/inspect-model"
    # A finished run is left alone: the next one has a folder of its own.
    assert attsvm("inspect", str(model), "texts.csv", *options).json["run"] == "runs/inspect-model-2"


def test_the_sample_is_the_default(attsvm: Commands, model: Path) -> None:
    done = attsvm("inspect", str(model), "-n", "3", "--max-queries", "0", "--layers", "1", "--json")
    assert done.code == 0, done.err
    assert done.json["corpus"]["n_texts"] == 3
    assert {head["layer"] for head in done.json["heads"]} == {1}
    assert done.json["primary"] is None


def slow_solving() -> None:
    import time

    from attsvm.cli.terminal import Bars

    tell = Bars.tell

    def slowly(self: Any, name: str, done: float, *arguments: Any) -> None:
        tell(self, name, done, *arguments)
        if name == "solve" and done >= 2:
            time.sleep(0.3)

    Bars.tell = slowly  # type: ignore[method-assign]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on(attsvm: Commands, model: Path, number: int) -> None:
    run = ("inspect", str(model), "--text", TEXT, "-t", "A fox.", "-t", "Lazy dogs.", *SMALL, "-o", "run")
    heads = attsvm.home / "run" / "checkpoint" / "heads"
    running = attsvm.start(*run, before=slow_solving)
    running.until(lambda: len(list(heads.glob("L*.json"))) >= 2)
    running.signal(number)
    ended = running.wait()
    if number == signal.SIGINT:
        assert ended.code == 130
        assert "inspect: interrupted; the same command with --output-dir run goes on" in ended.err
    else:
        assert ended.code == -number
    assert not (attsvm.home / "run" / "result.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in heads.glob("L*.json")}
    running = attsvm.start(*run, before=slow_solving)
    running.until(lambda: len(list(heads.glob("L*.json"))) > len(kept))
    assert {name: (heads / name).stat().st_mtime_ns for name in kept} == kept
    assert running.wait().code == 0
    assert attsvm(*run[:-1], "whole").code == 0
    one, other = (HeadAtlas.load(attsvm.home / name) for name in ("run", "whole"))
    for name, array in other.arrays.items():
        np.testing.assert_array_equal(one.arrays[name], array)
    for head, same in zip(one.record["heads"], other.record["heads"], strict=True):
        assert head["values"] == same["values"]


BAD: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    # options after MODEL, exit code, words of the message
    "an empty text": (("--text", " "), 2, ("text", "empty")),
    "no such file": (("texts.txt",), 2, ("texts.txt",)),
    "two sources": (("data.csv", "--text", "a"), 2, ("DATA", "--text")),
    "a folder without pictures": (("folder",), 2, ("folder of pictures",)),
    "a picture for a reader": (("picture.png",), 2, ("picture",)),
    "a column of no table": (("--text", "a", "--text-column", "text"), 2, ("--text-column",)),
    "odd layers": (("--text", TEXT, "--layers", "0-"), 2, ("--layers", "'0-'")),
    "no such layer": (("--text", TEXT, "--layers", "7"), 2, ("layers", "[0, 2)", "7")),
    "no such head": (("--text", TEXT, "--heads", "L5.H9"), 2, ("heads", "L0.H0 to L1.H3", "L5.H9")),
    "a target for an encoder": (("--text", TEXT, "--target", "a"), 2, ("target",)),
    "targets that do not fit": (("--text", TEXT, "--target", "a", "--target", "b"), 2, ("targets", "bert")),
    "a file that is not there": (("nowhere.txt",), 2, ("DATA", "nowhere.txt")),
    "a table that is not there": (("nowhere.csv",), 2, ("DATA", "nowhere.csv")),
    "a text in place of a file": (("word " * 80,), 2, ("DATA", "--text")),
    "no batch": (("--text", TEXT, "--batch-size", "0"), 2, ("batch_size", "0")),
    "no device": (("--text", TEXT, "--device", "gpu9"), 2, ("device", "gpu9")),
    "another tokenizer": (("--text", TEXT, "--tokenizer", "nowhere"), 2, ("nowhere",)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence(attsvm: Commands, model: Path, case: str) -> None:
    options, code, words = BAD[case]
    (attsvm.home / "data.csv").write_text("text\na\n", encoding="utf-8")
    (attsvm.home / "folder").mkdir()
    (attsvm.home / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    attsvm("inspect", str(model), *options, "-o", "run").failed(code, *words)
    assert not (attsvm.home / "run").exists()


def test_models_that_cannot_be_read(attsvm: Commands, tmp_path: Path) -> None:
    import transformers

    attsvm("inspect", "nobody/nothing-at-all", "--text", TEXT).failed(2, "nobody/nothing-at-all")
    (tmp_path / "empty").mkdir()
    attsvm("inspect", str(tmp_path / "empty"), "--text", TEXT).failed(2, "config.json")
    config = transformers.LongformerConfig(
        vocab_size=120,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        attention_window=[4],
    )
    transformers.LongformerModel(config).save_pretrained(tmp_path / "longformer")
    trained("bert").save_pretrained(tmp_path / "longformer")
    attsvm("inspect", str(tmp_path / "longformer"), "--text", TEXT).failed(3, "windows", "from_attentions")


def test_the_model_is_not_overwritten(attsvm: Commands, model: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for option in ((), ("--overwrite",)):
        done = attsvm("inspect", str(model), "--text", TEXT, *SMALL, "-o", str(model), *option)
        done.failed(2, "output_dir", "holds other files")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_options_are_named_as_they_are_typed(attsvm: Commands, model: Path) -> None:
    done = attsvm("inspect", str(model), "--text", TEXT, "--shown", "-1", "-o", "run")
    assert done.code == 2
    assert "--shown" in done.err
