"""The comparison with recurrent networks: what it measures, what it concludes, and that nothing measured is lost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attsvm.errors import InvalidInputError, RecordError
from attsvm.experiments import compare_rnn as module
from attsvm.experiments import rnn_measurements
from attsvm.experiments.compare_rnn import MODELS, CompareConfig, CompareFolder, compare_rnn

SMALL = CompareConfig.checked(**{**CompareConfig.quick(), "seeds": 1, "steps": 2})
N_CELLS = 2 + 2 * len(MODELS)


def model_of(name: str, d_model: int = 16) -> Any:
    generator = torch.Generator().manual_seed(0)
    return rnn_measurements.make_model(SMALL, name, generator, d_model=d_model, n_ctx=64)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> CompareFolder:
    folder = CompareFolder(tmp_path_factory.mktemp("runs") / "run")
    compare_rnn(SMALL, folder)
    return folder


# ------------------------------------------------------------------------------------------------------- measurements


@pytest.mark.parametrize("distance", [5, 6, 20])
def test_every_token_comes_again_after_the_distance(distance: int) -> None:
    ids, payload = rnn_measurements.copy_batch(
        torch.Generator().manual_seed(0), n=50, distance=distance, payload=4, symbols=7
    )
    assert ids.shape == (50, distance + 3)
    assert (ids[:, distance - 1] == 8).all()
    assert (ids[:, 4 : distance - 1] == 7).all()
    for place in range(4):
        assert (payload[:, place] == ids[:, place]).all()
        if place < 3:
            assert (ids[:, distance + place] == ids[:, place]).all()
    assert payload.unique().tolist() == list(range(7))


@pytest.mark.parametrize("d_model", [16, 64])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_about_equally_large(name: str, d_model: int) -> None:
    wanted = model_of("transformer", d_model).n_parameters
    assert model_of(name, d_model).n_parameters == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_one_token_at_a_time_is_the_whole_sequence(name: str) -> None:
    """What is timed in the two ways is the same function."""
    model, ids = model_of(name).double(), torch.randint(16, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = rnn_measurements._predict(model, ids, 5)
        step = rnn_measurements._reader(model, ids[:, :5])
        single = torch.cat([step(ids[:, t : t + 1]) for t in range(5, 12)], 1)
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-12)


def test_times_and_sizes() -> None:
    measured = rnn_measurements.time_models(SMALL, 16)
    assert all(set(values) == set(MODELS) for values in measured.values())
    assert all(value > 0 for values in measured.values() for value in values.values())
    assert measured["dependent_steps"] == {"lstm": 16, "lstm-seq2seq": 16, "lstm-attention": 16, "transformer": 2}
    assert measured["flops"]["lstm"] == model_of("lstm").config.flops(16)
    assert measured["flops"]["lstm-attention"] == model_of("lstm-attention").config.flops(8, 8)


def test_attention_learns_to_copy_and_the_same_seed_gives_the_same() -> None:
    config = CompareConfig.checked(
        **{**CompareConfig.quick(), "d_model": 32, "symbols": 4, "steps": 150, "learning_rate": 1e-2}
    )
    accuracy = {name: rnn_measurements.copy_accuracy(config, name, 12, 0) for name in ("transformer", "lstm-attention")}
    assert min(accuracy.values()) > 0.9
    short = CompareConfig.checked(**{**CompareConfig.quick(), "steps": 5})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    results = [rnn_measurements.copy_accuracy(short, "lstm", 6, seed) for seed in (3, 3, 4)]
    assert results[0] == results[1] != results[2]
    assert (torch.get_rng_state() == before).all()


# --------------------------------------------------------------------------------------------------------- conclusions


def verdicts(whole: dict[str, list[float]], single: dict[str, list[float]]) -> dict[str, str]:
    config = CompareConfig.checked(lengths=(100, 1000))
    return {one.text: one.verdict for one in module._time_numbers(config, {"whole": whole, "single": single})}


def test_linear_and_quadratic_times_are_told_apart() -> None:
    flat, rising = {name: [1e-6, 1e-6] for name in MODELS}, {name: [1e-6, 1e-5] for name in MODELS}
    powers = [one.ours for one in module._time_numbers(SMALL, {"whole": rising, "single": flat})[:2]]
    assert powers == pytest.approx([1 + torch.tensor(10.0).log2().item()] * 2)  # twice the length, tenfold per token
    as_claimed = verdicts({**flat, "transformer": [1e-6, 9e-6]}, {**rising, "lstm": [1e-6, 1e-6]})
    assert list(as_claimed.values())[:5] == ["met"] * 5
    otherwise = verdicts({**flat, "lstm": [1e-6, 9e-6]}, {**flat, "lstm": [1e-6, 9e-6]})
    assert list(otherwise.values())[:5] == ["differs"] * 5


def test_who_forgets() -> None:
    copying = {
        "lstm": [[1.0, 0.9], [0.1, 0.2]],
        "lstm-seq2seq": [[1.0, 1.0], [0.6, 0.8]],
        "lstm-attention": [[1.0, 1.0], [1.0, 0.8]],
        "transformer": [[0.5, 0.5], [1.0, 1.0]],
    }
    numbers = module._copy_numbers(SMALL, copying)
    assert [one.verdict for one in numbers] == ["met", "met", "met", "differs", "met", "differs", "differs", "met"]
    assert [one.ours for one in numbers] == pytest.approx([0.95, 1.0, 1.0, 0.5, 0.15, 0.7, 0.9, 1.0])


# -------------------------------------------------------------------------------------------------------------- records


def test_what_is_left_on_disk(finished: CompareFolder) -> None:
    result = finished.read_result()
    assert {path.name for path in finished.path.iterdir()} == {
        ".lock",
        "config.json",
        "figure.png",
        "figure.svg",
        "metrics.jsonl",
        "result.json",
    }
    assert len(finished.read_metrics()) == N_CELLS
    assert result["settings"] == finished.settings() == SMALL.model_dump(mode="json")
    for name in MODELS:
        assert len(result["timing"]["whole"][name]) == len(SMALL.lengths)
        assert [len(values) for values in result["copying"][name]] == [1, 1]
    assert compare_rnn(SMALL, finished) == result


@pytest.mark.parametrize("after", [0, 1, 5, N_CELLS - 1])
def test_a_run_that_ended_goes_on(
    tmp_path: Path, finished: CompareFolder, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    folder, measured = CompareFolder(tmp_path / "run"), []

    def stop(done: int, total: int, note: str) -> None:
        assert total == N_CELLS
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_rnn(SMALL, folder, progress=stop)
    assert not folder.is_complete
    kept = folder.read_metrics() if after else []
    assert len(kept) == after
    measure = module._measure
    monkeypatch.setattr(module, "_measure", lambda config, cell: measured.append(cell) or measure(config, cell))
    result = compare_rnn(SMALL, folder)
    assert len(measured) == N_CELLS - after
    assert folder.read_metrics()[:after] == kept
    assert result["copying"] == finished.read_result()["copying"]


def test_other_settings_are_refused_unless_overwritten(tmp_path: Path) -> None:
    folder, other = CompareFolder(tmp_path / "run"), SMALL.model_copy(update={"steps": 3})
    compare_rnn(SMALL, folder)
    before = folder.read_metrics()
    with pytest.raises(InvalidInputError, match="--overwrite"):
        compare_rnn(other, folder)
    assert folder.read_metrics() == before
    assert compare_rnn(other, folder, overwrite=True)["settings"]["steps"] == 3


def test_foreign_folder_and_damaged_records(tmp_path: Path, finished: CompareFolder) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="other files"):
        compare_rnn(SMALL, CompareFolder(tmp_path / "mine"), overwrite=True)
    with pytest.raises(InvalidInputError, match="is a file"):
        compare_rnn(SMALL, CompareFolder(tmp_path / "mine" / "notes.txt"))
    damaged = CompareFolder(tmp_path / "damaged")
    damaged.create()
    damaged.config_file.write_bytes(finished.config_file.read_bytes())
    for line in (
        b"{\n",
        b'{"cell": ["time", 999, "", 0]}\n',
        b'{"accuracy": 1.0}\n',
        b'{"cell": ["copy", 6, "lstm", 0]}\n',
    ):
        damaged.metrics_file.write_bytes(line)
        with pytest.raises(RecordError, match=r"metrics\.jsonl, line 1,"):
            compare_rnn(SMALL, damaged)


def test_without_matplotlib_all_but_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = CompareFolder(tmp_path / "run")
    compare_rnn(SMALL, folder)
    assert folder.is_complete
    assert not folder.svg_file.exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lengths": (8,)}, "--lengths"),
        ({"lengths": (1, 8)}, "--lengths must rise from at least 2, got 1,8"),
        ({"distances": (4, 8)}, "--distances must rise from at least 5, got 4,8"),
        ({"distances": (16, 8)}, "got 16,8"),
        ({"d_model": 30}, "--d-model must be a multiple of 8, twice the heads, got 30"),
        ({"timed_d_model": 12}, "--timed-d-model"),
        ({"seeds": 0}, "--seeds must be greater than or equal to 1, got 0"),
        ({"device": "tpu"}, "--device"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        CompareConfig.checked(**values)
