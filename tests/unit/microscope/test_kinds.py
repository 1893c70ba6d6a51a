"""Kinds of heads: constructed patterns score 1, uniform attention scores its chance level, and names follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attsvm.microscope.accumulate import Accumulator
from attsvm.microscope.calls import AttentionCall, ModuleInfo
from attsvm.microscope.kinds import KIND_KEYS, head_kind, kind_pairs, places_of
from attsvm.microscope.statistics import Estimate
from attsvm.microscope.windows import Batch
from unit.microscope.slow_measures import batch_of, module

CLS, SEP = 1, 2
#     0    1  2  3  4  5  6  7  8  9
IDS = [CLS, 5, 6, 7, 5, 6, 8, 8, 5, SEP]
SPECIAL = [True, *[False] * 8, True]
# By query: 4 -> 2, after the 5 at 1; 5 -> 3, after the 6 at 2; 7 -> 7, after the 8 at 6; 8 -> 2 and 5, after both 5.
CAUSAL_INDUCTION = {4: [2], 5: [3], 7: [7], 8: [2, 5]}
INDUCTION = {1: [5, 9], 2: [6], 4: [2, 9], 5: [3], 6: [8], 8: [2, 5]}


def text(left: int = 0, right: int = 0) -> Batch:
    batch = batch_of([0], {"source": ([IDS], [SPECIAL])})
    pad = (left, right)
    return Batch(
        windows=(0,),
        inputs={},
        ids={"source": torch.nn.functional.pad(batch.ids["source"], pad, value=-1)},
        real={"source": torch.nn.functional.pad(batch.real["source"], pad, value=False)},
        special={"source": torch.nn.functional.pad(batch.special["source"], pad, value=False)},
    )


def one(kind: str = "encoder", **changes: object) -> ModuleInfo:
    return module(kind=kind, n_heads=1, n_kv_heads=1, d_head=16, **changes)


def keys_of(
    kind: str, info: ModuleInfo, batch: Batch, special: str = "keep", separators: tuple[int, ...] = ()
) -> dict[int, list[int]]:
    """Keys of each query that has some."""
    found: dict[int, list[int]] = {}
    pairs = kind_pairs(places_of(batch, info, special=special, separators=separators))
    for number, row, key in zip(pairs.kind.tolist(), pairs.row.tolist(), pairs.key.tolist(), strict=True):
        if KIND_KEYS[number] == kind:
            found.setdefault(row, []).append(key)
    return found


def logits_call(info: ModuleInfo, batch: Batch, logits: Tensor) -> AttentionCall:
    """A call whose logits are given, through offsets; the mask is the model's own."""
    T = logits.shape[-1]
    mask = batch.real["source"][:, None, None, :]
    if info.kind == "decoder":
        mask = mask & torch.ones(T, T, dtype=torch.bool).tril()
    q = torch.zeros(1, 1, T, info.d_head, dtype=torch.float64)
    return AttentionCall(info=info, q=q, k=q, mask=mask, offsets=logits[None, None])


def test_induction_keys_are_those_of_the_definition() -> None:
    assert keys_of("induction", one("decoder"), text()) == CAUSAL_INDUCTION
    assert keys_of("induction", one("encoder"), text()) == INDUCTION


def test_keys_of_the_other_kinds() -> None:
    info = one()
    assert keys_of("same_token", info, text()) == {1: [4, 8], 2: [5], 4: [1, 8], 5: [2], 6: [7], 7: [6], 8: [1, 4]}
    assert keys_of("separator", info, text()) == {i: [9] for i in range(10)}
    assert keys_of("separator", info, text(), separators=(6,)) == {i: [2, 5, 9] for i in range(10)}
    assert keys_of("first", info, text()) == {i: [0] for i in range(10)}
    assert keys_of("previous", info, text()) == {i: [i - 1] for i in range(1, 10)}
    assert keys_of("next", info, text()) == {i: [i + 1] for i in range(9)}


def test_special_tokens_that_are_dropped_are_in_no_kind() -> None:
    info = one()
    assert keys_of("separator", info, text(), special="drop") == {}
    assert keys_of("first", info, text(), special="drop") == {i: [1] for i in range(1, 9)}
    assert keys_of("previous", info, text(), special="drop") == {i: [i - 1] for i in range(2, 9)}
    assert keys_of("induction", info, text(), special="drop") == {1: [5], 2: [6], 4: [2], 5: [3], 6: [8], 8: [2, 5]}


@pytest.mark.parametrize("kind", KIND_KEYS)
@pytest.mark.parametrize("module_kind", ["encoder", "decoder"])
def test_padding_shifts_keys_and_no_more(kind: str, module_kind: str) -> None:
    info = one(module_kind)
    plain = keys_of(kind, info, text())
    assert keys_of(kind, info, text(left=3, right=2)) == {i + 3: [j + 3 for j in js] for i, js in plain.items()}


def test_two_texts_share_no_places() -> None:
    info = one("cross", query_side="target", key_side="source")
    batch = batch_of([0], {"source": ([IDS], [SPECIAL]), "target": ([[5, 9]], [[False, False]])})
    found = {kind: keys_of(kind, info, batch) for kind in KIND_KEYS}
    assert {kind for kind, keys in found.items() if keys} == {"first", "same_token", "separator"}
    assert found["same_token"] == {0: [1, 4, 8]}


# A decoder never sees the next token.
CASES = [(kind, "encoder") for kind in KIND_KEYS] + [(kind, "decoder") for kind in KIND_KEYS if kind != "next"]


@pytest.mark.parametrize("kind, module_kind", CASES)
@pytest.mark.parametrize("pad", [(0, 0), (3, 0), (0, 2)])
def test_a_head_that_attends_to_a_kind_scores_one_and_has_its_name(
    kind: str, module_kind: str, pad: tuple[int, int]
) -> None:
    info, batch = one(module_kind), text(*pad)
    T = batch.ids["source"].shape[1]
    logits = torch.zeros(T, T, dtype=torch.float64)
    for i, keys in keys_of(kind, info, batch).items():
        logits[i, keys] = 200.0
    sums = Accumulator([info])
    sums.add(logits_call(info, batch, logits), batch)
    values, chance = sums.finish()["L0.H0"], sums.chance()["L0.H0"]
    value = values[kind]
    assert value is not None
    assert value.mean == pytest.approx(1.0, abs=1e-12)
    # Some keys are of several kinds, such as the last separator, which follows a token that stood before.
    assert head_kind(values, chance) == kind


@pytest.mark.parametrize("module_kind", ["encoder", "decoder"])
def test_uniform_attention_scores_chance_and_is_mixed(module_kind: str) -> None:
    info, batch = one(module_kind), text(2, 1)
    T = batch.ids["source"].shape[1]
    sums = Accumulator([info])
    sums.add(logits_call(info, batch, torch.zeros(T, T, dtype=torch.float64)), batch)
    values, chance = sums.finish()["L0.H0"], sums.chance()["L0.H0"]
    for kind in KIND_KEYS:
        value = values[kind]
        assert (value is None) == (chance[kind] is None) == (kind == "next" and module_kind == "decoder")
        if value is not None:
            assert value.mean == pytest.approx(chance[kind], abs=1e-12)
    if module_kind == "encoder":
        assert chance["previous"] == pytest.approx(0.1)
    assert head_kind(values, chance) == "mixed"


def estimate(mean: float, low: float | None = None) -> Estimate:
    return Estimate(mean=mean, low=low, high=None, n=9)


def test_names() -> None:
    chance = dict.fromkeys(KIND_KEYS, 0.1) | {"separator": 0.5, "next": None}
    assert head_kind({"previous": estimate(0.6), "first": estimate(0.5)}, chance) == "previous"
    # 0.7 of 1 is 40 % of the way from a chance of 0.5; 0.55 is half of the way from 0.1.
    assert head_kind({"separator": estimate(0.7), "first": estimate(0.55)}, chance) == "first"
    assert head_kind({"previous": estimate(0.36)}, chance) == "mixed"
    assert head_kind({"previous": estimate(0.38)}, chance) == "previous"
    assert head_kind({"previous": estimate(0.9, low=0.05), "first": estimate(0.6, low=0.4)}, chance) == "first"
    assert head_kind({"next": estimate(1.0), "first": None}, chance) == "mixed"
    assert head_kind({}, {}) == "mixed"
    assert head_kind({"first": estimate(1.0)}, {"first": 1.0}) == "mixed"
