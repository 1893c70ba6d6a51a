"""docs/models.md describes the commands, the settings and the families as they are, and its commands run."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from attsvm.models import GenerationConfig
from attsvm.models.pretrained import FAMILY_HOMES
from cli.commands import Commands

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^attsvm (.+)$", TEXT, re.MULTILINE)
SMALL = ("--quick", "--lengths", "8,16", "--seeds", "1", "--steps", "1", "--quiet")  # the last length counts


def rows_of(heading: str) -> set[str]:
    """The names in the first column of a table."""
    table = TEXT.split(f"| {heading} |")[1].split("\n\n")[0]
    first = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    return {name for row in first for name in re.findall(r"`(\w+)`", row)}


def test_every_setting_of_generation_is_in_its_table() -> None:
    assert rows_of("`GenerationConfig`") == {field.name for field in fields(GenerationConfig)}


def test_every_family_is_in_its_table() -> None:
    assert rows_of("`model_type` in `config.json`") == set(FAMILY_HOMES)


def test_there_are_commands_of_each_kind() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"generate", "translate", "compare-rnn"}


@pytest.mark.parametrize("command", [one for one in COMMANDS if not one.startswith("compare-rnn")])
def test_texts_of_models(attsvm: Commands, command: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from cli.test_generate import WORDS, save_model

    sizes = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": None}
    save_model(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_positions=96, n_embd=16, n_layer=2, n_head=2)),
        attsvm.home / "smollm2",
    )
    sizes = {"vocab_size": len(WORDS), "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    save_model(
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
        attsvm.home / "t5",
    )
    (attsvm.home / "prompts.txt").write_text("the cat\na mouse\n", encoding="utf-8")
    done = attsvm(*shlex.split(command))
    assert done.code == 0, done.err
    if "--json" in command:
        assert [one["prompt"] for one in json.loads(done.out)["outputs"]] == ["the cat", "a mouse"]
    else:
        assert "a second" in done.err


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith("compare-rnn")])
def test_the_comparison(attsvm: Commands, command: str) -> None:
    done = attsvm(*shlex.split(command), *SMALL, "--json")
    assert (done.code, done.err) == (0, "")
    distances = re.findall(r"--distances (\S+)", command)[0].split(",")
    assert done.json["distances"] == [int(distance) for distance in distances]
    written = re.findall(r"^\| (\d+) \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", TEXT, re.MULTILINE)
    assert set(written) >= set(distances)
    assert (attsvm.home / done.json["run"] / "figure.png").exists()
