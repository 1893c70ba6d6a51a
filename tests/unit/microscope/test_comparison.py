"""Two inspections beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm.errors import InvalidInputError, RecordError
from attsvm.microscope.comparison import compare_runs
from report.fake_atlas import T5, Arrays, Result, write_atlas


def test_a_run_does_not_differ_from_itself(tmp_path: Path) -> None:
    run = write_atlas(tmp_path / "run")
    found = compare_runs(run, run)
    assert found["matched"] == 12
    assert found["shown"] == {"compared": 2, "same_tokens": 2}
    for head in found["heads"]:
        assert head["first"] == head["second"]
        assert head["same_selections"] == 1.0
        assert {each["difference"] for each in head["differences"]} == {0.0}
        assert not any(each["apart"] for each in head["differences"])
    assert all(measure["mean_absolute"] == 0.0 for measure in found["measures"])


def test_differences_and_their_order(tmp_path: Path) -> None:
    def change(result: Result, arrays: Arrays) -> None:
        margin, entropy = (result["heads"][5]["values"][key] for key in ("margin", "entropy"))
        margin |= {key: margin[key] + 100.0 for key in ("mean", "low", "high")}
        entropy["mean"] -= 0.001

    first = write_atlas(tmp_path / "a")
    second = write_atlas(tmp_path / "b", None, change)
    found = compare_runs(first, second)
    top = found["heads"][0]
    assert (top["first"], top["second"]) == ("L1.H1", "L1.H1")
    assert [each["measure"] for each in top["differences"][:2]] == ["margin", "entropy"]
    margin, entropy = top["differences"][:2]
    assert margin["difference"] == pytest.approx(100.0)
    assert margin["apart"]
    assert 0.9 < margin["relative"] <= 1.0
    assert entropy["difference"] == pytest.approx(-0.001)
    assert not entropy["apart"]
    assert {each["difference"] for head in found["heads"][1:] for each in head["differences"]} == {0.0}
    by_key = {measure["key"]: measure for measure in found["measures"]}
    assert by_key["margin"]["largest"] == {"first": "L1.H1", "second": "L1.H1", "difference": pytest.approx(100.0)}
    assert by_key["margin"]["mean"] == pytest.approx(100.0 / 12)
    assert by_key["margin"]["apart"] == 1


def test_heads_without_a_partner(tmp_path: Path) -> None:
    first = write_atlas(tmp_path / "a", stacks=(("encoder", 3, 4),))
    second = write_atlas(tmp_path / "b", stacks=(("encoder", 2, 5),))
    found = compare_runs(first, second)
    assert found["matched"] == 8
    assert found["only_first"] == ["L2.H0", "L2.H1", "L2.H2", "L2.H3"]
    assert found["only_second"] == ["L0.H4", "L1.H4"]


def test_models_of_one_kind_each_are_matched_by_layer_and_number(tmp_path: Path) -> None:
    encoder = write_atlas(tmp_path / "a", stacks=(("encoder", 2, 4),))
    decoder = write_atlas(tmp_path / "b", stacks=(("decoder", 2, 4),))
    assert compare_runs(encoder, decoder)["matched"] == 8
    pair = write_atlas(tmp_path / "c", stacks=T5)
    found = compare_runs(encoder, pair)
    assert [(head["first"], head["second"]) for head in sorted(found["heads"], key=lambda head: head["first"])][:2] == [
        ("L0.H0", "encoder.L0.H0"),
        ("L0.H1", "encoder.L0.H1"),
    ]
    assert len(found["only_second"]) == 16


def test_same_selections(tmp_path: Path) -> None:
    def other(result: Result, arrays: Arrays) -> None:
        chosen = arrays["shown.0.0.selected"]
        chosen[1] = np.where(np.arange(14) < 7, (chosen[1] + 1) % 14, chosen[1])
        arrays["shown.1.0.selected"][1, :4] = -1
        result["shown"][1]["source"]["tokens"][3] = "other"

    first = write_atlas(tmp_path / "a")
    second = write_atlas(tmp_path / "b", None, other)
    found = compare_runs(first, second)
    assert found["shown"] == {"compared": 2, "same_tokens": 1}
    heads = {head["first"]: head for head in found["heads"]}
    assert (heads["L0.H1"]["same_selections"], heads["L0.H1"]["n_queries"]) == (0.5, 14)
    assert heads["L0.H0"]["same_selections"] == 1.0


def test_some_heads_only(tmp_path: Path) -> None:
    """The arrays of a run of some heads hold these alone."""

    def keep(result: Result, arrays: Arrays) -> None:
        result["modules"] = result["modules"][1:]
        result["modules"][0]["heads"], result["modules"][1]["heads"] = [1, 3], [2]
        kept = {1: [1, 3], 2: [2]}
        result["heads"] = [head for head in result["heads"] if head["head"] in kept.get(head["module"], [])]
        for name in list(arrays):
            parts = name.split(".")
            if parts[0] == "shown":
                whole = arrays.pop(name)
                if int(parts[2]) in kept:
                    arrays[name] = whole[kept[int(parts[2])]]
        del arrays["similarity"]

    whole, part = write_atlas(tmp_path / "a"), write_atlas(tmp_path / "b", None, keep)
    found = compare_runs(whole, part)
    assert sorted(head["second"] for head in found["heads"]) == ["L1.H1", "L1.H3", "L2.H2"]
    assert [head["same_selections"] for head in found["heads"]] == [1.0] * 3


def test_values_that_are_not_known(tmp_path: Path) -> None:
    def forget(result: Result, arrays: Arrays) -> None:
        for head in result["heads"]:
            head["values"]["margin"] = None
        result["heads"][0]["values"]["entropy"] = {"mean": 1.0, "low": None, "high": None, "n": 3}
        result["heads"][1]["values"] = {}

    first, second = write_atlas(tmp_path / "a"), write_atlas(tmp_path / "b", None, forget)
    found = compare_runs(first, second)
    assert "margin" not in {measure["key"] for measure in found["measures"]}
    heads = {head["first"]: head for head in found["heads"]}
    assert heads["L0.H1"]["differences"] == []
    assert heads["L0.H1"]["relative"] == 0.0
    (entropy,) = [each for each in heads["L0.H0"]["differences"] if each["measure"] == "entropy"]
    assert entropy["apart"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stacks": (("cross", 1, 2), ("decoder", 1, 2))}, "heads in common, got L0.H0 to L2.H3 and cross.L0.H0"),
        ({"values": False}, "measures in common"),
    ],
)
def test_nothing_in_common(tmp_path: Path, changes: Any, words: str) -> None:
    first, second = write_atlas(tmp_path / "a"), write_atlas(tmp_path / "b", **changes)
    with pytest.raises(InvalidInputError, match=f"compare: runs must have {words}"):
        compare_runs(first, second)


def test_other_records(tmp_path: Path) -> None:
    run = write_atlas(tmp_path / "run")
    with pytest.raises(RecordError):
        compare_runs(run, tmp_path / "absent")
