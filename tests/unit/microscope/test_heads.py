"""Heads as problems: logits are the head's, selections are its own, and solutions are judged by what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm.microscope import soft as soft_heads
from attsvm.microscope.calls import AttentionCall, ModuleInfo
from attsvm.microscope.heads import NEAR_TIE, head_problem
from attsvm.microscope.residual import ResidualHead
from attsvm.microscope.result import _values_of
from attsvm.microscope.sampled import HELD_OUT, TRAIN, ModuleSample, SampleCollector
from attsvm.microscope.soft import split_soft
from attsvm.microscope.solutions import (
    SolutionSettings,
    effective_number,
    effective_rank,
    numerical_rank,
    solve_head,
)
from attsvm.microscope.twin import twin_arrays
from attsvm.selection import correlation

H, KV, D_HEAD, D = 4, 2, 5, 12


def info(kind: Any = "decoder") -> ModuleInfo:
    return ModuleInfo(
        name="layers.0.attn",
        kind=kind,
        layer=0,
        n_heads=H,
        n_kv_heads=KV,
        d_head=D_HEAD,
        query_side="source",
        key_side="source",
        tier="interface",
        prefixed=False,
    )


def windows(generator: torch.Generator, n: int = 12, **extra: Any) -> tuple[ModuleSample, list[AttentionCall], Tensor]:
    """A causal module with biases, some windows of different length, and all their calls."""
    W_Q = torch.randn(D + 1, H * D_HEAD, generator=generator)
    W_K = torch.randn(D + 1, KV * D_HEAD, generator=generator)
    collector, calls = SampleCollector(info()), []
    for number in range(n):
        T = 4 + number % 3
        x = torch.randn(1, T, D, generator=generator)
        one = torch.cat([x, torch.ones(1, T, 1)], -1)
        q = (one @ W_Q).view(1, T, H, D_HEAD).transpose(1, 2)
        k = (one @ W_K).view(1, T, KV, D_HEAD).transpose(1, 2)
        call = AttentionCall(
            info=info(),
            q=q,
            k=k,
            scale=D_HEAD**-0.5,
            mask=torch.ones(T, T, dtype=torch.bool).tril()[None, None],
            query_input=x,
            key_input=x,
            **{name: make(T) for name, make in extra.items()},
        )
        parts = torch.full((T,), HELD_OUT if number % 4 == 3 else TRAIN)
        collector.add(call, torch.arange(T), parts, torch.ones(T, dtype=torch.bool))
        calls.append(call)
    return collector.finish(), calls, torch.cat([W_Q, W_K], 1)


def residual(weights: Tensor, head: int) -> ResidualHead:
    W_Q = weights[:, head * D_HEAD : (head + 1) * D_HEAD].double()
    start = H * D_HEAD + (head // (H // KV)) * D_HEAD
    W_K = weights[:, start : start + D_HEAD].double()
    return ResidualHead(W_K=W_K, W_Q=W_Q, scale=D_HEAD**-0.5)


def test_logits_are_the_heads(generator: torch.Generator) -> None:
    sample, calls, weights = windows(generator)
    for head in range(H):
        for space, found in (("score", None), ("residual", residual(weights, head))):
            posed = head_problem(sample, head, space=space, part=TRAIN, residual=found)
            assert posed is not None
            logits = posed.problem.logits(posed.own)
            for (sequence, query), row in np.ndenumerate(posed.rows):
                if row < 0:
                    assert not posed.problem.tensors.selected[sequence, query].any()
                    continue
                wanted = calls[sample.window[row]].logits()[0, head, sample.position[row]].double()
                torch.testing.assert_close(logits[sequence, query, : len(wanted)], wanted, rtol=1e-5, atol=1e-5)


def test_queries_select_what_the_head_ranks_first(generator: torch.Generator) -> None:
    sample, calls, _ = windows(generator)
    posed = head_problem(sample, 1, space="score", part=TRAIN)
    assert posed is not None
    assert posed.queries == int((sample.part == TRAIN).sum())
    asked = 0
    for (sequence, query), row in np.ndenumerate(posed.rows):
        if row < 0:
            continue
        position = sample.position[row]
        logits = calls[sample.window[row]].logits()[0, 1, position]
        if position == 0:  # the first token of a causal text has nothing to choose from
            assert posed.selected[sequence, query] == -1
        else:
            assert posed.selected[sequence, query] == int(logits.argmax())
            asked += 1
    assert asked > 20
    assert posed.near_ties == 0


def test_near_ties_select_nothing(generator: torch.Generator) -> None:
    sample, _, _ = windows(generator)
    level = replace(sample, q=sample.q * 1e-6)
    assert head_problem(level, 0, space="score", part=TRAIN) is None
    some = sample.q.copy()
    some[:, 2] *= NEAR_TIE * 1e-3
    posed = head_problem(replace(sample, q=some), 0, space="score", part=TRAIN)
    assert posed is not None
    assert posed.near_ties == 1


def test_many_queries_of_one_window_are_the_same_problem(generator: torch.Generator) -> None:
    """A window with more queries than share a sequence is repeated; nothing else may change."""
    collector = SampleCollector(info())
    T = 40
    q, k = torch.randn(1, H, T, D_HEAD, generator=generator), torch.randn(1, KV, T, D_HEAD, generator=generator)
    every = torch.ones(T, dtype=torch.bool)
    collector.add(AttentionCall(info=info(), q=q, k=k), torch.arange(T), torch.full((T,), TRAIN), every)
    posed = head_problem(collector.finish(), 3, space="score", part=TRAIN)
    assert posed is not None
    assert posed.rows.shape == (3, 16)
    assert sorted(posed.rows[posed.rows >= 0]) == list(range(T))
    logits = q[0, 3].double() @ k[0, 1].double().T
    assert posed.selected[torch.from_numpy(posed.rows >= 0)].tolist() == logits.argmax(-1).tolist()


def test_offsets_ask_for_no_more_than_the_head_reaches(generator: torch.Generator) -> None:
    sample, calls, _ = windows(generator, offsets=lambda T: 3.0 * torch.randn(H, T, T, generator=generator))
    posed = head_problem(sample, 2, space="score", part=TRAIN)
    assert posed is not None
    assert bool((posed.problem.margins(posed.own) >= posed.problem.tensors.margin - 1e-12).all())
    row = int(posed.rows[0, 1])
    wanted = calls[0].logits()[0, 2, sample.position[row]].double()
    torch.testing.assert_close(posed.problem.logits(posed.own)[0, 1, : len(wanted)], wanted, rtol=1e-5, atol=1e-5)
    solved = solve_head(sample, 2, space="score", norm="fro")
    assert solved is not None
    assert solved.status == "OPTIMAL"
    assert solved.size is not None
    assert solved.size <= float(torch.linalg.norm(posed.own)) * (1 + 1e-6)


def test_a_sink_is_one_more_key(generator: torch.Generator) -> None:
    sinks = torch.tensor([500.0, -50.0, 0.5, 0.0])
    sample, calls, _ = windows(generator, sinks=lambda T: sinks)
    always = head_problem(sample, 0, space="score", part=TRAIN)
    assert always is not None
    chosen = always.selected[torch.from_numpy(always.rows >= 0)]
    lengths = sample.start[1:] - sample.start[:-1]
    assert chosen.tolist() == lengths[sample.window[always.rows[always.rows >= 0]]].tolist()
    posed = head_problem(sample, 2, space="score", part=TRAIN)
    assert posed is not None
    for (sequence, query), row in np.ndenumerate(posed.rows):
        if row >= 0:
            logits = torch.cat([calls[sample.window[row]].logits()[0, 2, sample.position[row]], sinks[2:3]])
            assert posed.selected[sequence, query] in (-1, int(logits.argmax()))


def test_the_solution_separates_and_is_judged(generator: torch.Generator) -> None:
    sample, _, weights = windows(generator, n=24)
    for space, found in (("score", None), ("residual", residual(weights, 0))):
        solved = solve_head(sample, 0, space=space, norm="fro", residual=found, settings=SolutionSettings(seed=3))
        posed = head_problem(sample, 0, space=space, part=TRAIN, residual=found)
        asked = head_problem(sample, 0, space=space, part=HELD_OUT, residual=found)
        assert solved is not None
        assert posed is not None
        assert asked is not None
        assert solved.W is not None
        W = torch.from_numpy(solved.W)
        assert float(posed.problem.margins(W).min()) >= 1 - 1e-9
        assert solved.status == "OPTIMAL"
        assert solved.size == pytest.approx(float(torch.linalg.norm(W)))
        assert solved.correlation == pytest.approx(float(correlation(W, posed.own)))
        # The head's own matrix, scaled to margin 1, separates too, and is no smaller.
        own = posed.own / posed.problem.margins(posed.own).min()
        assert solved.size <= float(torch.linalg.norm(own)) * (1 + 1e-9)
        wanted = asked.selected
        agreed = (asked.problem.logits(W).argmax(-1) == wanted)[wanted >= 0].double().mean()
        assert solved.heldout == pytest.approx(float(agreed))
        assert solved.heldout_n == int((wanted >= 0).sum())
        assert 0 < solved.n_support < solved.n_constraints
        assert len(solved.support) == solved.n_support
        assert solved.own_rank == D_HEAD
        assert solved.null_correlation is not None
        assert solved.recovery is not None
        assert abs(solved.null_correlation) < solved.recovery


def test_a_head_that_is_its_own_solution_is_recovered() -> None:
    """Queries e_i and keys e_j, each query selecting its own axis: W is a multiple of the centred identity."""
    k = torch.eye(D_HEAD)[None, None].expand(1, KV, D_HEAD, D_HEAD)
    q = k[:, :1].expand(1, H, D_HEAD, D_HEAD)
    collector = SampleCollector(info("encoder"))
    everything = torch.ones(D_HEAD, dtype=torch.bool)
    collector.add(
        AttentionCall(info=info("encoder"), q=q, k=k), torch.arange(D_HEAD), torch.zeros(D_HEAD).long(), everything
    )
    solved = solve_head(collector.finish(), 0, space="score", norm="fro")
    assert solved is not None
    assert solved.W is not None
    centred = np.eye(D_HEAD) - 1.0 / D_HEAD
    np.testing.assert_allclose(solved.W, centred, atol=1e-6)
    assert solved.n_support == D_HEAD * (D_HEAD - 1)


def test_the_same_seed_draws_the_same_null(generator: torch.Generator) -> None:
    sample, _, _ = windows(generator)
    first, again, other = (
        solve_head(sample, 0, space="score", norm="nuc", settings=SolutionSettings(seed=seed)) for seed in (1, 1, 2)
    )
    assert first is not None
    assert again is not None
    assert other is not None
    assert (first.recovery, first.null_correlation) == (again.recovery, again.null_correlation)
    assert first.recovery != other.recovery


def test_the_twin_is_the_solution_at_the_heads_own_size(generator: torch.Generator) -> None:
    sample, calls, _ = windows(generator)
    solved = solve_head(sample, 0, space="score", norm="fro")
    assert solved is not None
    assert solved.W is not None
    arrays = twin_arrays(sample, 0, solved, shown=[1])
    q, k = calls[1].q[0, 0].double(), calls[1].k[0, 0].double()
    W = torch.from_numpy(solved.W)
    W = W * sample.scale * D_HEAD**0.5 / torch.linalg.norm(W)
    T = len(q)
    weights = (q @ W.T @ k.T).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    kept = (arrays["0.weight"] / 255.0) ** 2
    for row in range(T):
        for place, key in enumerate(arrays["0.index"][row]):
            assert kept[row, place] == pytest.approx(float(weights[row, key]), abs=0.005)
    mine = solved.support[np.isin(solved.support[:, 0], np.flatnonzero(sample.window == 1))]
    assert {tuple(row) for row in arrays["0.support"]} == {(sample.position[row], key) for row, key in mine}


@pytest.mark.parametrize("fixed", ["sinks", "offsets"])
def test_the_twin_keeps_its_size_where_something_fixes_it(generator: torch.Generator, fixed: str) -> None:
    # Keys that the head attends to although something else weighs on the same scale.
    made = {"sinks": lambda T: torch.full((H,), 0.5), "offsets": lambda T: torch.linspace(0, 1, T).expand(1, H, T, T)}
    sample, _, _ = windows(generator, **{fixed: made[fixed]})
    solved = solve_head(sample, 0, space="score", norm="fro")
    assert solved is not None
    assert solved.W is not None
    posed = head_problem(sample, 0, space="score", part=TRAIN)
    assert posed is not None
    weights = posed.problem.logits(torch.from_numpy(solved.W)).softmax(-1)
    compared = 0
    for window in range(len(sample.start) - 1):
        arrays = twin_arrays(sample, 0, solved, shown=[window])
        for (sequence, query), row in np.ndenumerate(posed.rows):
            if row >= 0 and sample.window[row] == window:
                keys = arrays["0.index"][sample.position[row]]
                kept = (arrays["0.weight"][sample.position[row]] / 255.0) ** 2
                np.testing.assert_allclose(kept, weights[sequence, query, keys].numpy(), atol=0.005)
                compared += 1
    assert compared == posed.queries


def test_the_split_is_orthogonal_and_kept_tokens_are_level(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, _, weights = windows(generator, n=6)
    soft = replace(sample, q=0.3 * sample.q)
    found = residual(weights, 0)
    found = replace(found, scale=0.3 * found.scale)
    split = split_soft(soft, 0, space="residual", residual=found)
    assert split is not None
    assert 1 < split.kept < 6
    assert 0 < split.finite_share < 1
    assert 0 < split.dimension <= split.queries * 5
    # In score space many pairs fill all 25 dimensions: no direction is left.
    many, _, _ = windows(generator, n=24)
    monkeypatch.setattr(soft_heads, "MOST_QUERIES", 64)
    assert split_soft(replace(many, q=0.05 * many.q), 0, space="score") is None


def test_a_saved_sample_is_the_same(generator: torch.Generator, tmp_path: Any) -> None:
    sample, _, _ = windows(generator, offsets=lambda T: torch.zeros(1, T, T), sinks=lambda T: torch.zeros(H))
    sample.save(tmp_path / "0.safetensors")
    back = ModuleSample.load(tmp_path / "0.safetensors", info())
    for name, value in vars(sample).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(back, name), value)
        else:
            assert getattr(back, name) == value


def test_ranks() -> None:
    assert numerical_rank(np.array([2.0, 1.0, 1e-9])) == 2
    assert effective_rank(np.array([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(np.array([1.0, 0.0])) == pytest.approx(1.0)


def test_queries_that_fail_together_count_less() -> None:
    generator = np.random.default_rng(0)
    window = np.repeat(np.arange(40), 5)
    alone = (generator.random(200) < 0.7).astype(float)
    together = np.repeat((generator.random(40) < 0.7).astype(float), 5)
    assert effective_number(alone, window) == pytest.approx(200, rel=0.3)
    # Five queries that always agree tell as much as one; the 39 of 40 is that of the sample variance.
    assert effective_number(together, window) == pytest.approx(39, rel=1e-12)
    assert effective_number(np.ones(10), np.arange(10)) == 10
    assert effective_number(alone[:5], window[:5]) == 5


def test_the_interval_of_held_out_agreement_takes_windows_as_the_sample(generator: torch.Generator) -> None:
    sample, _, _ = windows(generator, n=24)
    solved = solve_head(sample, 0, space="score", norm="fro")
    assert solved is not None
    assert solved.heldout_effective_n is not None
    assert 0 < solved.heldout_effective_n <= solved.heldout_n

    def width(effective: float) -> float:
        record = solved.record() | {"heldout": 0.6, "heldout_n": 100, "heldout_effective_n": effective}
        value = _values_of(record)["score.fro.heldout"]
        assert value is not None
        assert value["low"] < 0.6 < value["high"]
        return float(value["high"] - value["low"])

    assert width(100.0) == pytest.approx(0.189, abs=0.002)  # Wilson's of 60 in 100
    assert width(25.0) > 1.8 * width(100.0)
