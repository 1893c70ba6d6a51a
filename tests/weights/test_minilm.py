"""all-MiniLM-L6-v2 against transformers: hidden states, patterns, padding, gradients, written and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attsvm.models import Encoder, ModelOutput, from_pretrained, save_pretrained
from weights.parity import check_double, check_single, distance

pytestmark = pytest.mark.reference
transformers = pytest.importorskip("transformers")

TEXTS = [
    "The black cat ate the mouse.",
    "Attention weighs every other word of the sentence by what it asks for.",
    "Yes.",
]


def read_theirs(folder: Path, dtype: torch.dtype = torch.float32, kernel: str = "sdpa") -> Any:
    return transformers.AutoModel.from_pretrained(
        folder, dtype=dtype, attn_implementation=kernel, local_files_only=True
    ).eval()


def read_ours(folder: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    model = from_pretrained(folder, dtype=dtype)
    assert isinstance(model, Encoder)
    return model


@pytest.fixture(scope="module")
def batch(minilm: Path) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm, local_files_only=True)
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


def run(model: Encoder, batch: dict[str, Tensor], **options: Any) -> ModelOutput:
    return model(
        batch["input_ids"], attention_mask=batch["attention_mask"], segments=batch["token_type_ids"], **options
    )


def rows(pattern: Tensor, real: Tensor) -> Tensor:
    """What the real tokens of a batch attend to: (tokens, H, k)."""
    return pattern.transpose(1, 2)[real]


@torch.no_grad()
def test_hidden_states(minilm: Path, batch: dict[str, Tensor]) -> None:
    real = batch["attention_mask"].bool()
    assert not bool(real.all())
    exact, theirs = (read_theirs(minilm, dtype)(**batch) for dtype in (torch.float64, torch.float32))
    double, single = (run(read_ours(minilm, dtype), batch) for dtype in (torch.float64, torch.float32))
    check_double(double.hidden[real], exact.last_hidden_state[real])
    check_single(single.hidden[real], theirs.last_hidden_state[real], exact.last_hidden_state[real])
    assert double.pooled is not None
    assert single.pooled is not None
    check_double(double.pooled, exact.pooler_output)
    check_single(single.pooled, theirs.pooler_output, exact.pooler_output)


@torch.no_grad()
def test_patterns_of_all_layers(minilm: Path, batch: dict[str, Tensor]) -> None:
    expected = read_theirs(minilm, kernel="eager")(**batch, output_attentions=True).attentions
    found = run(read_ours(minilm), batch, weights=True).weights
    assert found is not None
    assert len(found["encoder"]) == len(expected) == 6
    # Padding asks too, but has other positions here; nothing reads what it gets.
    real = batch["attention_mask"].bool()
    for one, other in zip(found["encoder"], expected):
        torch.testing.assert_close(rows(one, real), rows(other, real), rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_on_either_side(minilm: Path, batch: dict[str, Tensor]) -> None:
    model, real = read_ours(minilm, torch.float64), batch["attention_mask"].bool()
    left = {name: torch.zeros_like(tensor) for name, tensor in batch.items()}
    for name, tensor in batch.items():
        left[name][real.flip(1)] = tensor[real]
    expected = [model(ids[keep][None]).hidden[0] for ids, keep in zip(batch["input_ids"], real)]
    for one, mask in ((batch, real), (left, real.flip(1))):
        found = run(model, one).hidden
        for row, alone in enumerate(expected):
            check_double(found[row, mask[row]], alone)


def test_gradients(minilm: Path, batch: dict[str, Tensor]) -> None:
    """Of the loss that pulls each sentence towards the first, in the embedding that all gradients pass through."""
    theirs, ours = read_theirs(minilm), read_ours(minilm)
    pairs = {
        "embeddings.word_embeddings.weight": "tokens.weight",
        "encoder.layer.0.attention.self.query.weight": "blocks.0.attention.query.weight",
        "encoder.layer.5.output.dense.weight": "blocks.5.mlp.down.weight",
    }
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    share = (batch["attention_mask"] / batch["attention_mask"].sum(1, keepdim=True)).unsqueeze(-1)
    for hidden in (run(ours, batch).hidden, theirs(**batch).last_hidden_state):
        sentences = (hidden * share).sum(1)
        (sentences[1:] - sentences[0]).square().sum().backward()
    for name, own in pairs.items():
        gradient, other = found[own].grad, expected[name].grad
        assert gradient is not None
        assert distance(gradient, other) <= 1e-4 * float(other.abs().max()), name


@torch.no_grad()
def test_there_and_back(minilm: Path, tmp_path: Path) -> None:
    ours, before = read_ours(minilm), read_theirs(minilm)
    assert ours.n_parameters == ours.config.n_parameters == before.num_parameters() == 22_713_216
    save_pretrained(ours, tmp_path)
    again, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True, local_files_only=True)
    assert not any(report.values()), report
    for name, tensor in before.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
