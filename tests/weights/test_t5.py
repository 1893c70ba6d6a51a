"""A T5 with real weights against transformers: logits, patterns, padding, generation, written and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attsvm.models import GenerationConfig, Seq2Seq, from_pretrained, generate, save_pretrained
from weights.parity import check_double, check_single

pytestmark = pytest.mark.reference
transformers = pytest.importorskip("transformers")

NEW = 64
SOURCES = [
    "summarize: The committee met on Tuesday to discuss the new library. Several members objected to its cost, but the "
    "chairman said that the town could afford it, and the plan was approved by a vote of nine to three.",
    "translate English to German: The house is small.",
    "Answer the question. Context: Marie Curie was born in Warsaw in 1867. Question: Where was Marie Curie born?",
]
TARGETS = ["The committee approved the new library.", "Das Haus ist klein.", "in Warsaw"]
KINDS = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}


def read_theirs(folder: Path, dtype: torch.dtype = torch.float32, kernel: str = "sdpa") -> Any:
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation=kernel, local_files_only=True
    ).eval()
    # Past the end too: 64 tokens of each source.
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def tokenizer(t5: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(t5, local_files_only=True)


@pytest.fixture(scope="module")
def theirs(t5: Path) -> Any:
    return read_theirs(t5)


@pytest.fixture(scope="module")
def ours(t5: Path) -> Seq2Seq:
    model = from_pretrained(t5)
    assert isinstance(model, Seq2Seq)
    return model


@pytest.fixture(scope="module")
def batch(tokenizer: Any) -> dict[str, Tensor]:
    source, target = (tokenizer(texts, padding=True, return_tensors="pt") for texts in (SOURCES, TARGETS))
    start = torch.zeros(len(TARGETS), 1, dtype=torch.int64)
    return {
        "input_ids": source["input_ids"],
        "attention_mask": source["attention_mask"],
        "decoder_input_ids": torch.cat([start, target["input_ids"]], 1),
    }


def our_logits(model: Seq2Seq, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"], batch["decoder_input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits is not None
    return logits


def test_the_head_is_its_own(theirs: Any, ours: Seq2Seq) -> None:
    assert not torch.equal(theirs.lm_head.weight, theirs.shared.weight)
    assert ours.head is not None
    assert torch.equal(ours.head.weight, theirs.lm_head.weight)
    assert ours.n_parameters == ours.config.n_parameters == theirs.num_parameters() == 76_961_152


@torch.no_grad()
def test_logits(t5: Path, theirs: Any, ours: Seq2Seq, batch: dict[str, Tensor]) -> None:
    exact = read_theirs(t5, torch.float64)(**batch).logits
    check_double(our_logits(from_pretrained(t5, dtype=torch.float64), batch), exact)
    check_single(our_logits(ours, batch), theirs(**batch).logits, exact)


@torch.no_grad()
def test_patterns_of_all_layers(t5: Path, ours: Seq2Seq, batch: dict[str, Tensor]) -> None:
    expected = read_theirs(t5, kernel="eager")(**batch, output_attentions=True, use_cache=False)
    found = ours(batch["input_ids"], batch["decoder_input_ids"], attention_mask=batch["attention_mask"], weights=True)
    assert found.weights is not None
    for kind, name in KINDS.items():
        patterns = getattr(expected, name)
        assert len(found.weights[kind]) == len(patterns) == 8
        for one, other in zip(found.weights[kind], patterns):
            assert one.shape[:2] == (3, 6)
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_on_either_side(t5: Path, batch: dict[str, Tensor]) -> None:
    model = from_pretrained(t5, dtype=torch.float64)
    real = batch["attention_mask"].bool()
    assert not bool(real.all())
    left = {**batch, "attention_mask": real.flip(1)}
    left["input_ids"] = torch.zeros_like(batch["input_ids"])
    left["input_ids"][real.flip(1)] = batch["input_ids"][real]
    expected = torch.cat(
        [
            our_logits(model, {"input_ids": ids[None, keep], "attention_mask": None, "decoder_input_ids": target[None]})
            for ids, keep, target in zip(batch["input_ids"], real, batch["decoder_input_ids"])
        ]
    )
    for one in (batch, left):
        check_double(our_logits(model, one), expected)


@pytest.mark.parametrize("use_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_greedy_tokens(theirs: Any, ours: Seq2Seq, tokenizer: Any, use_cache: bool) -> None:
    prompts = [tokenizer(text)["input_ids"] for text in SOURCES]
    expected = [
        theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)[0, 1:].tolist() for ids in prompts
    ]
    assert {len(tokens) for tokens in expected} == {NEW}
    config = GenerationConfig(max_new_tokens=NEW, eos_ids=())
    assert generate(ours, prompts, config, use_cache=use_cache).tokens == expected


def test_what_it_answers(ours: Seq2Seq, tokenizer: Any) -> None:
    """The conversion gave a model that knows: these answers follow from no structure alone."""
    questions = [SOURCES[2], "What is the capital of Germany?"]
    found = generate(ours, [tokenizer(text)["input_ids"] for text in questions], GenerationConfig(max_new_tokens=10))
    answers = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found.tokens]
    assert answers == ["in Warsaw", "berlin"]
    assert bool(found.ended.all())


@torch.no_grad()
def test_there_and_back(theirs: Any, ours: Seq2Seq, batch: dict[str, Tensor], tmp_path: Path) -> None:
    save_pretrained(ours, tmp_path)
    again, report = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, local_files_only=True
    )
    assert not any(report.values()), report
    assert torch.equal(again.eval()(**batch).logits, theirs(**batch).logits)
