"""Generation: exhaustive search, stopping, drawing, streaming, attention of each step, and bad arguments."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from attsvm.errors import InvalidInputError
from attsvm.models.decoder import Decoder, DecoderConfig
from attsvm.models.generation import GenerationConfig, generate


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(1)
    config = DecoderConfig(d_vocab=5, d_model=16, n_layers=2, n_heads=2, d_mlp=32, n_ctx=12)
    decoder = Decoder(config).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(6.0)
    return decoder


def score(model: Decoder, prompt: list[int], new: tuple[int, ...]) -> float:
    """Sum of the log-probabilities of the new tokens."""
    ids = torch.tensor([[*prompt, *new]])
    logs = torch.log_softmax(model(ids).logits[0], -1).detach()
    return float(sum(logs[len(prompt) + k - 1, token] for k, token in enumerate(new)))


def test_wide_beams_find_the_best_of_all_sequences(model: Decoder) -> None:
    config = GenerationConfig(max_new_tokens=3, beams=125, length_penalty=0.0)
    found = generate(model, [[1, 2], [3]], config)
    for prompt, tokens, value in zip([[1, 2], [3]], found.tokens, found.scores.tolist(), strict=True):
        best = max(itertools.product(range(5), repeat=3), key=lambda new: score(model, prompt, new))
        assert tuple(tokens) == best
        assert math.isclose(value, score(model, prompt, best), rel_tol=1e-9)
    assert not bool(found.ended.any())


def test_greedy_scores_are_those_of_its_tokens(model: Decoder) -> None:
    found = generate(model, [[1, 2], [3]], GenerationConfig(max_new_tokens=6))
    for prompt, tokens, value in zip([[1, 2], [3]], found.tokens, found.scores.tolist(), strict=True):
        assert math.isclose(value, score(model, prompt, tuple(tokens)), rel_tol=1e-9)


def test_ends_and_stops(model: Decoder) -> None:
    whole = generate(model, [[1, 2]], GenerationConfig(max_new_tokens=8)).tokens[0]
    at_end = generate(model, [[1, 2]], GenerationConfig(max_new_tokens=8, eos_ids=(whole[2],)))
    assert at_end.tokens[0] == whole[: whole.index(whole[2]) + 1]
    assert at_end.ended.tolist() == [True]
    pair = (whole[3], whole[4])
    stopped = generate(model, [[1, 2]], GenerationConfig(max_new_tokens=8, stop=(pair,))).tokens[0]
    assert tuple(stopped[-2:]) == pair
    assert stopped == whole[: len(stopped)]


def test_the_end_of_the_context_ends_a_sequence(model: Decoder) -> None:
    found = generate(model, [[1] * 10], GenerationConfig(max_new_tokens=50))
    assert len(found.tokens[0]) == 3  # two more positions to read, and what follows the last
    assert found.ended.tolist() == [False]
    with pytest.raises(InvalidInputError, match="ids must fit into the context of 12 positions, got a prompt of 13"):
        generate(model, [[1] * 13])


def test_the_seed_decides_what_is_drawn(model: Decoder) -> None:
    def draw(seed: int) -> list[list[int]]:
        return generate(model, [[1], [2, 3]], GenerationConfig(max_new_tokens=8, temperature=2.0, seed=seed)).tokens

    assert draw(0) == draw(0)
    assert len({str(draw(seed)) for seed in range(5)}) > 1
    cold = GenerationConfig(max_new_tokens=8, temperature=1e-4)
    assert (
        generate(model, [[1], [2, 3]], cold).tokens
        == generate(model, [[1], [2, 3]], GenerationConfig(max_new_tokens=8)).tokens
    )


def test_tokens_stream_as_they_come(model: Decoder) -> None:
    seen: list[tuple[int, list[int]]] = []
    whole = generate(model, [[1, 2]], GenerationConfig(max_new_tokens=5)).tokens[0]
    end = whole[1]
    found = generate(
        model,
        [[1, 2], [3]],
        GenerationConfig(max_new_tokens=5, eos_ids=(end,)),
        on_token=lambda step, tokens: seen.append((step, tokens.tolist())),
    )
    assert [step for step, _ in seen] == list(range(len(seen)))
    for b in range(2):
        assert [tokens[b] for _, tokens in seen if tokens[b] >= 0] == found.tokens[b]


def test_attention_of_each_step(model: Decoder) -> None:
    found = generate(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=3), weights=True)
    assert found.weights is not None
    assert [tuple(step["decoder"][1].shape) for step in found.weights] == [(1, 2, 3, 3), (1, 2, 1, 4), (1, 2, 1, 5)]
    together = model(torch.tensor([[1, 2, 3, *found.tokens[0][:2]]]), weights=True).weights
    torch.testing.assert_close(found.weights[2]["decoder"][1][0, :, 0], together["decoder"][1][0, :, -1])


def test_prompts_may_be_arrays(model: Decoder) -> None:
    config = GenerationConfig(max_new_tokens=3)
    expected = generate(model, [[1, 2], [3, 4]], config).tokens
    assert generate(model, np.array([[1, 2], [3, 4]]), config).tokens == expected  # type: ignore[arg-type]
    assert generate(model, list(torch.tensor([[1, 2], [3, 4]])), config).tokens == expected  # type: ignore[arg-type]


def test_no_room_is_made_beyond_the_context(model: Decoder) -> None:
    found = generate(model, [[1, 2]], GenerationConfig(max_new_tokens=10**12))
    assert len(found.tokens[0]) == 11


def test_training_mode_comes_back(model: Decoder) -> None:
    model.train()
    generate(model, [[1]], GenerationConfig(max_new_tokens=1))
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"temperature": -1.0}, "temperature must be >= 0 and finite, got -1.0"),
        ({"top_k": 0}, "top_k must be an integer >= 1 or None, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0 and finite"),
        ({"lookup": -1}, "lookup must be an integer >= 0, got -1"),
        ({"lookup": True}, "lookup must be an integer >= 0, got True"),
        ({"beams": 0}, "beams must be an integer >= 1"),
        ({"beams": 2, "temperature": 1.0}, "temperature must be 0 with beams"),
        ({"stop": ((),)}, "stop must hold sequences of at least one token"),
        ({"stop": ("x",)}, "stop must be sequences of integers, got \\('x',\\)"),
        ({"stop": (5,)}, "stop must be sequences of integers, got \\(5,\\)"),
        ({"stop": ((2**63,),)}, "stop must be sequences of integers"),
        ({"stop": None}, "stop must be sequences of integers, got None"),
        ({"eos_ids": 2}, "eos_ids must be a sequence of integers or None, got 2"),
        ({"eos_ids": (1.0,)}, "eos_ids must be a sequence of integers or None"),
        ({"temperature": "1"}, "temperature must be >= 0 and finite, got '1'"),
        ({"temperature": None}, "temperature must be >= 0 and finite, got None"),
        ({"top_p": "all"}, r"top_p must be in \(0, 1\], got 'all'"),
        ({"repetition_penalty": [1.0]}, "repetition_penalty must be > 0 and finite"),
        ({"length_penalty": "long"}, "length_penalty must be finite, got 'long'"),
        ({"seed": 0.5}, "seed must be an integer below .* got 0.5"),
        ({"seed": 2**64}, "seed must be an integer below 2\\*\\*63"),
    ],
)
def test_bad_settings(given: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        GenerationConfig(**given)  # type: ignore[arg-type]


def test_bad_prompts(model: Decoder) -> None:
    with pytest.raises(InvalidInputError, match="prompts of at least one token, got none in prompt 1"):
        generate(model, [[1], []])
    with pytest.raises(InvalidInputError, match="ids must be integers"):
        generate(model, torch.ones(1, 2))
    with pytest.raises(InvalidInputError, match=r"attention_mask must be \(B, T\) = \(1, 2\), got \(1, 3\)"):
        generate(model, torch.ones(1, 2, dtype=torch.int64), attention_mask=torch.ones(1, 3))
    with pytest.raises(InvalidInputError, match="attention_mask must be None where ids are lists"):
        generate(model, [[1]], attention_mask=torch.ones(1, 1))
    with pytest.raises(InvalidInputError, match="model must be a Decoder or a Seq2Seq, got Linear"):
        generate(torch.nn.Linear(2, 2), [[1]])  # type: ignore[arg-type]
