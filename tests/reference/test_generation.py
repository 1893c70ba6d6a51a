"""Generation against transformers: greedy, penalties, beams, cut-offs, on tiny random models and real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from attsvm.models.generation import GenerationConfig, _choose, generate  # noqa: E402
from attsvm.models.pretrained import from_pretrained  # noqa: E402

pytestmark = pytest.mark.reference

NEW = 64
SIZES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=60, n_positions=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=96,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=60,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=60,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=96,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    ),
}
PROMPTS = [[5, 9, 11, 30, 7], [4, 8], [21, 22, 23]]


@pytest.fixture(scope="module", params=list(SIZES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model of transformers with spread-out logits, and ours with its weights."""
    torch.manual_seed(0)
    theirs = SIZES[request.param]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, from_pretrained(folder)


def their_tokens(theirs: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """New tokens of each prompt alone, so that no padding is involved."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, use_cache=True, max_new_tokens=NEW, **options
        )[0].tolist()
        found.append(out[1:] if theirs.config.is_encoder_decoder else out[len(prompt) :])
    return found


def without_padding(tokens: list[int], eos: int = 2) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_are_the_same(pair: tuple[Any, Any], use_cache: bool) -> None:
    theirs, ours = pair
    expected = their_tokens(theirs, PROMPTS, do_sample=False)
    found = generate(ours, PROMPTS, GenerationConfig(max_new_tokens=NEW), use_cache=use_cache)
    assert found.tokens == [without_padding(one) for one in expected]


@pytest.mark.parametrize("lookup", [0, 3, 12])
def test_greedy_tokens_of_one_prompt_are_the_same(pair: tuple[Any, Any], lookup: int) -> None:
    theirs, ours = pair
    expected = their_tokens(theirs, PROMPTS, do_sample=False)
    config = GenerationConfig(max_new_tokens=NEW, lookup=lookup)
    assert [generate(ours, [one], config).tokens[0] for one in PROMPTS] == [without_padding(one) for one in expected]


def test_greedy_with_a_penalty_for_repetition(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    expected = their_tokens(theirs, PROMPTS, do_sample=False, repetition_penalty=1.3)
    found = generate(ours, PROMPTS, GenerationConfig(max_new_tokens=NEW, repetition_penalty=1.3))
    assert found.tokens == [without_padding(one) for one in expected]


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 1.0), (3, 0.0), (3, 1.6)])
def test_beams_are_the_same(pair: tuple[Any, Any], beams: int, penalty: float) -> None:
    theirs, ours = pair
    expected = their_tokens(theirs, PROMPTS, do_sample=False, num_beams=beams, length_penalty=penalty)
    found = generate(ours, PROMPTS, GenerationConfig(max_new_tokens=NEW, beams=beams, length_penalty=penalty))
    assert found.tokens == [without_padding(one) for one in expected]


def test_right_and_left_padding_are_the_same(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    left = torch.tensor([[5, 9, 11, 30, 7], [4, 4, 4, 4, 8]])
    right = torch.tensor([[5, 9, 11, 30, 7], [4, 8, 9, 9, 9]])
    masks = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    config = GenerationConfig(max_new_tokens=20)
    found = [generate(ours, ids, config, attention_mask=m).tokens for ids, m in zip((left, right), masks, strict=True)]
    assert found[0] == found[1] == generate(ours, PROMPTS[:2], config).tokens


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (None, 0.7), (8, 0.5), (None, 0.05)])
def test_the_same_tokens_are_cut(top_k: int | None, top_p: float) -> None:
    logits = 3.0 * torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
    warped = logits.clone()
    if top_k is not None:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    drawing = torch.Generator().manual_seed(0)
    config = GenerationConfig(temperature=1.0, top_k=top_k, top_p=top_p)
    drawn = torch.stack(
        [_choose(logits, torch.zeros(4, 1, dtype=torch.int64), config, drawing) for _ in range(4000)], 1
    )
    chances = warped.softmax(-1)
    for row in range(4):
        share = torch.bincount(drawn[row], minlength=40) / 4000
        assert bool((share[chances[row] == 0] == 0).all())
        assert float((share - chances[row]).abs().max()) < 0.04  # five standard deviations of a share of a half
