"""Measures of single rows against loops in plain floats, on patterns whose values are known and on random ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.microscope import measures
from attsvm.microscope.measures import KINDS, MEASURES, NOTHING, ROW_MEASURES, SINK, measure_rows
from unit.microscope.slow_measures import reference_measures

NINF = -math.inf
KEYS = [entry.key for entry in ROW_MEASURES]


def rows_of(logits: list[list[float]], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(logits, dtype=dtype)[None, None]


def places(n_queries: int, n_keys: int) -> dict[str, Tensor]:
    return {"query_places": torch.arange(n_queries)[None], "key_places": torch.arange(n_keys)[None]}


def value(rows: measures.Rows, key: str, row: int = 0) -> float:
    return float(rows.values[KEYS.index(key), 0, 0, row])


def test_one_hot_row() -> None:
    rows = measure_rows(rows_of([[0.0, 1000.0, 0.0]]), **places(1, 3))
    expected = {"top_probability": 1, "entropy": 0, "tokens_90": 1, "selected_set": 1, "margin": 1000, "distance": 1}
    assert {key: value(rows, key) for key in expected} == expected
    assert value(rows, "dropped_mass") == value(rows, "mass_bound") == value(rows, "near_ties") == 0
    assert rows.selected.tolist() == [[[1]]]


@pytest.mark.parametrize("n, needed", [(1, 1), (2, 1.8), (9, 8.1), (10, 9), (11, 9.9), (20, 18), (1000, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_row(n: int, needed: float, dtype: torch.dtype) -> None:
    rows = measure_rows(rows_of([[0.25] * n], dtype), **places(1, n))
    assert value(rows, "tokens_90") == pytest.approx(needed, rel=1e-6)
    assert value(rows, "selected_set") == n
    assert value(rows, "entropy") == pytest.approx(math.log(n), abs=1e-6)
    assert value(rows, "distance") == pytest.approx((n - 1) / 2, rel=1e-6)
    if n == 1:
        assert all(math.isnan(value(rows, key)) for key in ("margin", "mass_bound", "near_ties"))
    else:
        assert value(rows, "near_ties") == 1
        assert value(rows, "mass_bound") == pytest.approx(1 - 1 / n)
        assert value(rows, "dropped_mass") == pytest.approx(1 - 1 / n)


def test_a_row_that_may_attend_to_nothing_is_undefined_and_weighs_nothing() -> None:
    rows = measure_rows(rows_of([[NINF, NINF], [0.0, NINF]]), **places(2, 2))
    assert rows.values[:, 0, 0, 0].isnan().all()
    assert rows.weights[0, 0].tolist() == [[0, 0], [1, 0]]
    assert rows.n_keys.flatten().tolist() == [0, 1]
    assert rows.selected.flatten().tolist() == [NOTHING, 0]


def test_the_sink_is_a_key_without_a_token() -> None:
    logits = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    rows = measure_rows(logits, torch.tensor([3.0, -3.0]), **places(1, 2))
    assert rows.selected.flatten().tolist() == [SINK, 0]
    assert rows.n_keys.flatten().tolist() == [3, 3]
    assert rows.sink is not None
    torch.testing.assert_close(rows.weights.sum(-1) + rows.sink, torch.ones(1, 2, 1, dtype=torch.float64))
    margins = rows.values[KEYS.index("margin")].flatten()
    torch.testing.assert_close(margins, torch.tensor([3.0, 0.0], dtype=torch.float64))


def test_a_row_with_only_the_sink_selects_it() -> None:
    rows = measure_rows(rows_of([[NINF, NINF]]), torch.tensor([0.0]), **places(1, 2))
    assert rows.selected.flatten().tolist() == [SINK]
    assert value(rows, "top_probability") == 1
    assert math.isnan(value(rows, "distance"))


def random_logits(seed: int, dtype: torch.dtype, n_keys: int = 37) -> Tensor:
    """Soft, hard and tied rows, rows with many masked keys, one with one key, one with none."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 24, n_keys, generator=generator, dtype=torch.float64)
    logits *= torch.logspace(-2, 2, 24, dtype=torch.float64)[:, None]
    logits[:, :, 4] = logits[:, :, 4].round()
    logits[:, :, 5] = (2 * logits[:, :, 5]).round() * math.log(2)
    logits[torch.rand(logits.shape, generator=generator) < 0.2] = NINF
    logits[:, :, 7] = NINF
    logits[:, :, 8, 1:], logits[:, :, 8, 0] = NINF, 0.5
    return logits.to(dtype)


@pytest.mark.parametrize("compute", ["_compiled", "_vectorised"])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("n_keys", [1, 2, 37])
def test_against_loops(monkeypatch: pytest.MonkeyPatch, compute: str, with_sinks: bool, n_keys: int) -> None:
    monkeypatch.setattr(measures, "_compiled", getattr(measures, compute))
    logits = random_logits(3, torch.float64, n_keys)
    B, H, R, T = logits.shape
    sinks = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64) if with_sinks else None
    query_places, key_places = torch.arange(R).expand(B, R), torch.arange(T).expand(B, T)
    rows = measure_rows(logits, sinks, query_places=query_places, key_places=key_places)
    for b in range(B):
        for h in range(H):
            for i in range(R):
                row = logits[b, h, i].tolist()
                sink = None if sinks is None else (float(rows.sink[b, h, i]), float(sinks[h]))  # type: ignore[index]
                slow = reference_measures(
                    rows.weights[b, h, i].tolist(), row, sink=sink, distances=[abs(i - j) for j in range(T)]
                )
                for at, key in enumerate(KEYS):
                    fast, expected = float(rows.values[at, b, h, i]), slow.get(key)
                    assert (
                        math.isnan(fast) if expected is None else fast == pytest.approx(expected, rel=1e-11, abs=1e-11)
                    ), key


@pytest.mark.parametrize("seed", range(3))
def test_float32_is_float64_to_rounding(seed: int) -> None:
    logits = random_logits(seed, torch.float32)
    single, double = (measure_rows(part, **places_of_all(logits)) for part in (logits, logits.double()))
    # Weights of float32 are off by 2^-24 of their size and that of the largest logit's rounding; logits reach 300.
    torch.testing.assert_close(single.values, double.values, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(single.selected, double.selected)


def places_of_all(logits: Tensor) -> dict[str, Tensor]:
    B, _, R, T = logits.shape
    return {"query_places": torch.arange(R).expand(B, R), "key_places": torch.arange(T).expand(B, T)}


def test_tokens_90_counts_the_last_key_in_part() -> None:
    rows = measure_rows(rows_of([[math.log(p) for p in (0.6, 0.2, 0.15, 0.05)]]))
    assert value(rows, "tokens_90") == pytest.approx(2 + 0.1 / 0.15)


def test_the_bound_holds_whatever_the_logits() -> None:
    rows = measure_rows(
        random_logits(1, torch.float64), torch.zeros(3), **places_of_all(random_logits(1, torch.float64))
    )
    dropped, bound = rows.values[KEYS.index("dropped_mass")], rows.values[KEYS.index("mass_bound")]
    known = ~bound.isnan()
    assert known.any()
    assert (dropped[known] <= bound[known] + 1e-12).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(InvalidInputError, match="finite or minus infinity"):
        measure_rows(rows_of([[0.0, bad]]))


def test_without_places_there_is_no_distance() -> None:
    assert math.isnan(value(measure_rows(rows_of([[0.0, 1.0]])), "distance"))


def test_every_measure_is_told_apart_and_explained() -> None:
    assert len({entry.key for entry in MEASURES}) == len({entry.title for entry in MEASURES}) == len(MEASURES)
    assert all(entry.explanation.endswith(".") and entry.unit for entry in MEASURES)
    assert set(KINDS) < set(MEASURES)
    assert measures.measure("margin").largest is None
    assert measures.measure("sink_mass").largest == 1
    with pytest.raises(InvalidInputError, match="key must be one of"):
        measures.measure("warmth")
