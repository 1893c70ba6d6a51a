"""Means over a corpus against loops over single rows, and what must not change them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm.errors import InvalidInputError, RecordError
from attsvm.microscope import accumulate, measures
from attsvm.microscope.accumulate import Accumulator
from attsvm.microscope.calls import AttentionCall, ModuleInfo
from attsvm.microscope.kinds import KIND_KEYS
from attsvm.microscope.measures import MEASURES
from attsvm.microscope.windows import Batch
from unit.microscope.slow_measures import batch_of, call_of, module, reference_text

KEYS = [entry.key for entry in MEASURES]
SCALE = 0.7


class Toy:
    """A corpus of random texts: ids of few kinds so that some repeat, special tokens at both ends, queries and keys."""

    def __init__(self, info: ModuleInfo, lengths: tuple[int, ...] = (7, 1, 12, 2, 9, 5), seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.info = info
        self.ids: dict[str, list[list[int]]] = {}
        self.special: dict[str, list[list[bool]]] = {}
        for shift, side in enumerate(dict.fromkeys((info.query_side, info.key_side))):
            sizes = [max(1, length - shift) for length in lengths]
            self.ids[side] = [torch.randint(3, 8, (n,), generator=generator).tolist() for n in sizes]
            self.special[side] = [[n > 1 and i in (0, n - 1) for i in range(n)] for n in sizes]
            for ids, special in zip(self.ids[side], self.special[side], strict=True):
                for i, mark in enumerate(special):
                    ids[i] = (1 if i == 0 else 2) if mark else ids[i]
        H, G, d = info.n_heads, info.n_kv_heads, info.d_head
        self.q = [self._draw(H, len(ids), d, generator) for ids in self.ids[info.query_side]]
        self.k = [self._draw(G, len(ids), d, generator) for ids in self.ids[info.key_side]]

    @staticmethod
    def _draw(heads: int, n: int, d: int, generator: torch.Generator) -> Tensor:
        scales = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)[:heads, None, None]
        return torch.randn(heads, n, d, generator=generator, dtype=torch.float64) * scales

    def piece(
        self, windows: list[int], *, left: bool = False, extra: int = 0, **parts: Any
    ) -> tuple[AttentionCall, Batch]:
        sides = {
            side: ([self.ids[side][w] for w in windows], [self.special[side][w] for w in windows]) for side in self.ids
        }
        batch = batch_of(windows, sides, left=left, extra=extra)  # type: ignore[arg-type]
        q, k = [self.q[w] for w in windows], [self.k[w] for w in windows]
        mask = batch.real[self.info.key_side][:, None, None, :]
        if self.info.kind == "decoder":
            mask = mask & torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool).tril()
        return call_of(self.info, q, k, left=left, extra=extra, scale=SCALE, mask=mask, **parts), batch

    def run(
        self,
        pieces: list[list[int]],
        *,
        left: bool = False,
        extra: int = 0,
        sinks: Tensor | None = None,
        **settings: Any,
    ) -> Accumulator:
        sums = Accumulator([self.info], **settings)
        for windows in pieces:
            sums.add(*self.piece(windows, left=left, extra=extra, sinks=sinks))
        return sums

    def slow(
        self, head: int, *, sinks: Tensor | None = None, **settings: Any
    ) -> tuple[list[list[dict[str, Any]]], Counter[int]]:
        """Rows of every text, and how often each id is selected."""
        info, texts, counts = self.info, [], Counter()
        for w, ids in enumerate(self.ids[info.query_side]):
            group = info.n_heads // info.n_kv_heads
            logits = SCALE * self.q[w][head] @ self.k[w][head // group].T
            if info.kind == "decoder":
                logits = logits.masked_fill(~torch.ones(logits.shape, dtype=torch.bool).tril(), -math.inf)
            rows, selected = reference_text(
                info,
                ids,
                self.ids[info.key_side][w],
                self.special[info.query_side][w],
                self.special[info.key_side][w],
                logits.tolist(),
                sink=None if sinks is None else float(sinks[head]),
                **settings,
            )
            texts.append(rows)
            counts.update(selected)
        return texts, counts


MODULES = {
    "encoder": module(),
    "decoder": module(kind="decoder"),
    "cross": module(kind="cross", query_side="target", key_side="source", prefixed=True),
    "grouped": module(kind="decoder", n_heads=2, n_kv_heads=1),
}
WHOLE = [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("special", ["keep", "drop"])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_against_loops(name: str, with_sinks: bool, special: str, left: bool) -> None:
    info = MODULES[name]
    toy = Toy(info)
    sinks = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)[: info.n_heads] if with_sinks else None
    settings: dict[str, Any] = {"special": special, "separators": (4,)}
    sums = toy.run(WHOLE, left=left, extra=2, sinks=sinks, **settings)
    found, chance, top = sums.finish(), sums.chance(), sums.top_tokens(most=3)
    for head, label in enumerate(info.labels):
        texts, counts = toy.slow(head, sinks=sinks, **settings)
        rows = [row for text in texts for row in text]
        for key in KEYS:
            defined = [row[key] for row in rows if row.get(key) is not None]
            estimate = found[label][key]
            if not defined:
                assert estimate is None, key
                continue
            assert estimate is not None, key
            assert estimate.n == len(defined), key
            assert estimate.mean == pytest.approx(math.fsum(defined) / len(defined), rel=1e-11, abs=1e-12), key
        for kind in KIND_KEYS:
            levels = [row[f"{kind} chance"] for row in rows if f"{kind} chance" in row]
            expected = math.fsum(levels) / len(levels) if levels else None
            assert chance[label][kind] == (None if expected is None else pytest.approx(expected, rel=1e-12))
        ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:3]
        total = sum(counts.values())
        assert top[label] == [(token, pytest.approx(count / total)) for token, count in ranked]


@pytest.mark.parametrize("special", ["keep", "drop"])
@pytest.mark.parametrize("name", MODULES)
def test_padding_and_batches_change_nothing(name: str, special: str) -> None:
    toy = Toy(MODULES[name])
    one = toy.run(WHOLE, special=special)
    others = [
        toy.run(WHOLE, special=special, left=True, extra=3),
        toy.run([[5], [3], [1], [0], [2], [4]], special=special),
        toy.run([[4, 0], [2, 5, 1], [3]], special=special, left=True),
    ]
    for other in others:
        same(one, other, 1e-9)


def same(one: Accumulator, other: Accumulator, tol: float) -> None:
    assert one.top_tokens() == other.top_tokens()
    first, second = one.finish(), other.finish()
    for label, values in first.items():
        for key, value in values.items():
            got = second[label][key]
            if value is None or got is None:
                assert value is got, (label, key)
                continue
            assert value.n == got.n
            for mine, theirs in ((value.mean, got.mean), (value.low, got.low), (value.high, got.high)):
                assert mine == theirs if mine is None else theirs == pytest.approx(mine, rel=0, abs=tol), (label, key)
        for kind, level in one.chance()[label].items():
            assert level == other.chance()[label][kind] or other.chance()[label][kind] == pytest.approx(level, abs=tol)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(MODULES["decoder"])
    one = toy.run(WHOLE)
    monkeypatch.setattr(accumulate, "BLOCK_BYTES", 4000)
    call, _ = toy.piece(WHOLE[0])
    assert len(list(accumulate._row_blocks(call))) > 3
    same(one, toy.run(WHOLE), 1e-12)


def test_the_call_is_left_as_it_was() -> None:
    toy = Toy(MODULES["encoder"])
    call, batch = toy.piece(WHOLE[0])
    before = (call.q.clone(), call.k.clone(), call.logits())
    Accumulator([toy.info], special="drop").add(call, batch)
    assert all(torch.equal(old, new) for old, new in zip(before, (call.q, call.k, call.logits()), strict=True))


def test_special_tokens_that_are_dropped_are_as_if_the_text_had_none() -> None:
    """Encoders alone: the distance and places of the tokens that remain are those among themselves plus one."""
    toy = Toy(MODULES["encoder"], lengths=(8, 6))
    bare = Toy(MODULES["encoder"], lengths=(8, 6))
    for side in ("source",):
        bare.ids[side] = [ids[1:-1] for ids in toy.ids[side]]
        bare.special[side] = [marks[1:-1] for marks in toy.special[side]]
    bare.q, bare.k = [q[:, 1:-1] for q in toy.q], [k[:, 1:-1] for k in toy.k]
    same(toy.run([[0, 1]], special="drop"), bare.run([[0, 1]]), 1e-12)


def test_texts_of_several_windows_are_one_text() -> None:
    toy = Toy(MODULES["encoder"])
    texts = [0, 1, 0, 2, 2, 2]
    sums = toy.run([[2, 1], [5, 3], [0, 4]], texts=texts)
    values = sums.finish()["L0.H1"]["margin"]
    rows, _ = toy.slow(1)
    y, n = np.zeros(3), np.zeros(3)
    for text, window in zip(texts, rows, strict=True):
        defined = [row["margin"] for row in window if row.get("margin") is not None]
        y[text], n[text] = y[text] + sum(defined), n[text] + len(defined)
    assert n.tolist() == [19, 0, 16]
    mean = y.sum() / n.sum()
    deviation = math.sqrt(2 / 1 * ((y - mean * n) ** 2).sum()) / n.sum()
    assert values is not None
    assert values.high == pytest.approx(mean + 12.706204736 * deviation, rel=1e-9)
    assert not sums._sums[toy.info.name].open


def test_texts_that_are_not_complete_count_with_what_is_there() -> None:
    toy = Toy(MODULES["encoder"])
    part = toy.run([[0, 2]], texts=[0, 0, 1, 1, 2, 2])
    alone = toy.run([[0, 2]])
    same(part, alone, 1e-12)
    assert len(part._sums[toy.info.name].open) == 2


def test_one_text_has_no_interval() -> None:
    toy = Toy(MODULES["encoder"])
    for sums in (toy.run([[2]]), toy.run([[0, 2]], texts=[0] * 6)):
        margin = sums.finish()["L0.H0"]["margin"]
        assert margin is not None
        assert margin.low is None
        assert margin.high is None


def test_nothing_yet() -> None:
    sums = Accumulator([MODULES["cross"]])
    assert set(sums.finish()["cross.L0.H2"].values()) == {None}
    assert sums.top_tokens()["cross.L0.H2"] == []
    assert set(sums.chance()["cross.L0.H0"].values()) == {None}


@pytest.mark.parametrize("texts", [None, [0, 0, 1, 1, 2, 2]])
def test_goes_on_from_its_arrays(texts: list[int] | None) -> None:
    toy = Toy(MODULES["decoder"])
    half = toy.run([[0, 2], [5]], texts=texts)
    arrays = half.arrays()
    assert all(isinstance(value, np.ndarray) and value.dtype != object for value in arrays.values())
    later = Accumulator.from_arrays([toy.info], arrays, texts=texts)
    for windows in ([1, 3], [4]):
        later.add(*toy.piece(windows))
        half.add(*toy.piece(windows))
    same(later, half, 0.0)
    same(later, toy.run(WHOLE, texts=texts), 1e-12)


@pytest.mark.parametrize("texts", [None, [0, 0, 1, 1, 2, 2]])
def test_merge_is_the_same_as_all_in_one(texts: list[int] | None) -> None:
    toy = Toy(MODULES["decoder"])
    mine, theirs = toy.run([[0, 3], [5]], texts=texts), toy.run([[1, 2, 4]], texts=texts)
    mine.merge(theirs)
    same(mine, toy.run(WHOLE, texts=texts), 1e-12)
    with pytest.raises(InvalidInputError, match="other windows"):
        mine.merge(theirs)
    with pytest.raises(InvalidInputError, match="same modules"):
        mine.merge(toy.run([[1]], special="drop"))


def test_arrays_of_others_are_refused() -> None:
    toy = Toy(MODULES["decoder"])
    arrays = toy.run(WHOLE).arrays()
    with pytest.raises(RecordError, match="same modules"):
        Accumulator.from_arrays([toy.info], arrays, special="drop")
    with pytest.raises(RecordError, match="complete"):
        Accumulator.from_arrays([toy.info], {key: arrays[key] for key in ("header", "ids")})


def test_bad_calls_are_refused() -> None:
    toy = Toy(MODULES["encoder"])
    call, batch = toy.piece([0, 2])
    sums = Accumulator([toy.info], texts=[0, 1, 2])
    sums.add(call, batch)
    with pytest.raises(InvalidInputError, match="a second time"):
        sums.add(call, batch)
    with pytest.raises(InvalidInputError, match="below 3"):
        sums.add(*toy.piece([4]))
    with pytest.raises(InvalidInputError, match="given at the start"):
        Accumulator([module("other")]).add(call, batch)
    with pytest.raises(InvalidInputError, match=r"\(2, 12, 12\) as the batch, got \(1, 7, 7\)"):
        Accumulator([toy.info]).add(toy.piece([0])[0], batch)
    with pytest.raises(InvalidInputError, match="special"):
        Accumulator([toy.info], special="drops")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_given_weights_with_zeros_keep_their_keys_for_chance(kind: str) -> None:
    """A one-hot pattern hides which keys were allowed; chance comes from where the tokens stand."""
    info = module(kind=kind, tier="given", n_heads=1, n_kv_heads=1)
    batch = batch_of([0], {"source": ([[5, 6, 7, 8]], [[False] * 4])})
    given = torch.eye(4).roll(1, 0)[None, None].clone()
    given[0, 0, 0] = torch.eye(4)[0]
    sums = Accumulator([info])
    sums.add(AttentionCall(info=info, q=torch.empty(0), k=torch.empty(0), given=given), batch)
    values, chance = sums.finish()["L0.H0"], sums.chance()["L0.H0"]
    assert values["previous"] is not None
    assert values["previous"].mean == 1
    assert values["margin"] is None
    assert chance["previous"] == pytest.approx(0.25 if kind == "encoder" else (1 / 2 + 1 / 3 + 1 / 4) / 3)


def test_texts_of_one_token_and_rows_without_a_key() -> None:
    """All keys masked by the model itself, in every row of a text, beside a text of one token."""
    info = module(n_heads=1, n_kv_heads=1)
    batch = batch_of([0, 1], {"source": ([[5], [6, 7]], [[False], [False, False]])})
    q = torch.zeros(2, 1, 2, 4)
    mask = torch.tensor([[True, False], [False, False]])[:, None, None, :]
    sums = Accumulator([info])
    sums.add(AttentionCall(info=info, q=q, k=q, mask=mask), batch)
    values = sums.finish()["L0.H0"]
    assert values["top_probability"] is not None
    assert (values["top_probability"].n, values["top_probability"].mean) == (1, 1)
    assert values["sink_mass"] is not None
    assert values["sink_mass"].n == 1
    assert values["margin"] is None
    assert values["same_position"] is None
    assert sums.top_tokens()["L0.H0"] == [(5, 1.0)]


def test_sums_do_not_grow_with_the_corpus() -> None:
    toy = Toy(MODULES["encoder"], lengths=(6,) * 60)
    sums = toy.run([[w, w + 1] for w in range(0, 20, 2)])
    before = {key: value.size for key, value in sums.arrays().items()}
    for w in range(20, 60, 2):
        sums.add(*toy.piece([w, w + 1]))
    after = {key: value.size for key, value in sums.arrays().items()}
    assert {key for key in after if after[key] != before[key]} <= {"0.seen"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_and_keys_of_half_precision_are_measured_in_float32(dtype: torch.dtype) -> None:
    toy = Toy(MODULES["grouped"])
    toy.q, toy.k = [q.to(dtype) for q in toy.q], [k.to(dtype) for k in toy.k]
    half = toy.run(WHOLE)
    toy.q, toy.k = [q.double() for q in toy.q], [k.double() for k in toy.k]
    same(half, toy.run(WHOLE), 1e-4)


def test_logits_that_are_no_numbers_name_the_module() -> None:
    toy = Toy(MODULES["encoder"])
    toy.q[2][1, 3] = math.nan
    with pytest.raises(InvalidInputError, match=r"layer: .* NaN"):
        toy.run(WHOLE)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_code_for_other_devices_measures_the_same(monkeypatch: pytest.MonkeyPatch, name: str, device: str) -> None:
    toy = Toy(MODULES[name])
    expected = toy.run(WHOLE)
    monkeypatch.setattr(measures, "_compiled", measures._vectorised)
    call, batch = toy.piece(WHOLE[0])
    sums = Accumulator([toy.info])
    sums.add(replace(call, q=call.q.to(device), k=call.k.to(device), mask=call.mask.to(device)), batch)  # type: ignore[union-attr]
    same(expected, sums, 1e-11)
