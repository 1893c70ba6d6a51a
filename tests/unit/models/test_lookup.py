"""Prompt lookup: what is guessed, how much, and that the tokens of generation stay what they are."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attsvm.attention.cache import KeyValueCache
from attsvm.models.decoder import Decoder, DecoderConfig
from attsvm.models.generation import GenerationConfig, generate
from attsvm.models.lookup import Lookup, cost_of
from attsvm.models.seq2seq import Seq2Seq, Seq2SeqConfig

NEW = 24


def _decoder(**options: Any) -> DecoderConfig:
    return DecoderConfig(d_vocab=7, d_model=16, n_layers=2, n_heads=4, d_mlp=24, n_ctx=32, **options)


def _seq2seq(**options: Any) -> Seq2SeqConfig:
    return Seq2SeqConfig(d_vocab=7, d_model=16, n_heads=2, n_layers=2, d_mlp=24, start_id=0, **options)


MODELS = {
    "gpt2": lambda: Decoder(_decoder()),
    "llama": lambda: Decoder(_decoder(norm="rms", activation="swiglu", positions="rotary", n_kv_heads=2)),
    "bart": lambda: Seq2Seq(_seq2seq(positions="learned", n_ctx=32)),
    "t5": lambda: Seq2Seq(_seq2seq(positions="relative", norm="rms", place="pre")),
}


@pytest.fixture(scope="module", params=[(name, seed) for name in MODELS for seed in range(2)], ids=str)
def model(request: pytest.FixtureRequest) -> Decoder | Seq2Seq:
    """A random model whose text is neither one token for ever nor without repetition."""
    name, seed = request.param
    torch.manual_seed(seed)
    made = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return made


def passes(model: Decoder | Seq2Seq, config: GenerationConfig, prompt: list[int], **options: Any) -> tuple[Any, int]:
    """What is generated, and in how many passes of the decoder."""
    block = (model.blocks if isinstance(model, Decoder) else model.decoder.blocks)[0]
    calls: list[int] = []
    handle = block.register_forward_hook(lambda *_: calls.append(1))
    found = generate(model, [prompt], config, **options)
    handle.remove()
    return found, len(calls)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7, "seed": 3},
        {"eos_ids": (4,)},
        {"stop": ((2, 3), (5,))},
        {"max_new_tokens": 1},
        {"max_new_tokens": 32},
    ],
    ids=str,
)
def test_tokens_scores_and_their_order_are_the_same(model: Decoder | Seq2Seq, options: dict[str, Any]) -> None:
    given = {"max_new_tokens": NEW, "eos_ids": (), **options}
    for prompt in ([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [6, 5, 3]):
        plain, steps = passes(model, GenerationConfig(**given, lookup=0), prompt)
        assert steps == len(plain.tokens[0])
        for lookup in (2, 16):
            told: list[Any] = []
            found, fewer = passes(
                model,
                GenerationConfig(**given, lookup=lookup),
                prompt,
                on_token=lambda *new, told=told: told.append(new),
            )
            assert found.tokens == plain.tokens
            assert found.ended.tolist() == plain.ended.tolist()
            torch.testing.assert_close(found.scores, plain.scores, rtol=1e-9, atol=1e-9)
            assert [(step, int(tokens[0])) for step, tokens in told] == list(enumerate(found.tokens[0]))
            assert fewer <= steps


def test_a_text_that_repeats_takes_fewer_passes() -> None:
    torch.manual_seed(0)
    model = MODELS["gpt2"]().double().eval()
    assert isinstance(model, Decoder)
    with torch.no_grad():  # each token is followed by the next one, whatever stands before
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        model.positions.weight.zero_()
        model.tokens.weight.copy_(torch.eye(7, 16))
    successor = torch.nn.Linear(16, 7, bias=False).double()
    with torch.no_grad():
        successor.weight.copy_(torch.eye(7, 16).roll(1, 0))
    model.head = successor
    found, steps = passes(model, GenerationConfig(max_new_tokens=30, lookup=8), [0, 1])
    assert found.tokens[0] == [(2 + k) % 7 for k in range(30)]
    assert steps < 14
    assert passes(model, GenerationConfig(max_new_tokens=30, lookup=0), [0, 1])[1] == 30


def test_other_ways_of_generation_are_left_alone(model: Decoder | Seq2Seq) -> None:
    prompts = [[1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [6, 5, 3]]
    plain = [
        generate(model, [one], GenerationConfig(max_new_tokens=12, eos_ids=(), lookup=0)).tokens[0] for one in prompts
    ]
    on = GenerationConfig(max_new_tokens=12, eos_ids=(), lookup=8)
    assert generate(model, prompts, on).tokens == plain
    assert [generate(model, [one], on, use_cache=False).tokens[0] for one in prompts] == plain
    found = generate(model, prompts[:1], on, weights=True)
    assert found.tokens[0] == plain[0]
    assert found.weights is not None
    assert len(found.weights) == 12


def test_the_longest_and_then_the_latest_place_is_continued() -> None:
    assert Lookup([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], most=1).guess(5) == [9]
    assert Lookup([2, 3, 9, 2, 3, 8, 2, 3], most=1).guess(5) == [8]
    assert Lookup([1, 2, 3, 4], most=3).guess(5) == []


@given(st.integers(1, 6), st.integers(1, 20))
def test_a_period_goes_on_beyond_the_end_of_the_text(period: int, most: int) -> None:
    lookup = Lookup([k % period for k in range(4 * period + 8)], most=most)
    begin = 4 * period + 8
    guessed = lookup.guess(most)
    assert guessed == [(begin + k) % period for k in range(len(guessed))]
    assert guessed


def test_guesses_become_more_where_they_are_right_and_none_where_they_are_wrong() -> None:
    lookup, lengths = Lookup([0, 1, 2] * 3, most=8), []
    for step in range(30):
        lengths.append(len(lookup.guess(100)))
        lookup.append(step % 3)
    assert lengths[0] < 8
    assert lengths[-1] == 8
    draw = random.Random(0)
    lookup = Lookup([draw.randrange(4) for _ in range(100)], most=8)
    spent = 0.0
    for _ in range(300):
        spent += cost_of(len(lookup.guess(100))) - 1.0
        lookup.append(4 + draw.randrange(10**9) if draw.random() < 0.5 else draw.randrange(4))
    assert spent < 0.02 * 300


def test_no_more_is_guessed_than_there_is_room_for() -> None:
    for room in range(4):
        assert len(Lookup([1, 2, 3] * 5, most=8).guess(room)) <= room


@torch.no_grad()
def test_wrong_guesses_are_forgotten_without_a_copy_of_the_rest() -> None:
    cache = KeyValueCache(8)
    k = torch.arange(5.0).view(1, 1, 5, 1)
    before, _ = cache.update(0, k, k)
    cache.truncate(3, keep_room=True)
    assert cache.length == 3
    after, _ = cache.update(0, k[:, :, :2] + 7.0, k[:, :, :2])
    assert after.flatten().tolist() == [0.0, 1.0, 2.0, 7.0, 8.0]
    assert after.data_ptr() == before.data_ptr()
