"""Words, sentences, documents: against loops over ragged lists, and what empty ones are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attsvm.attention.hierarchical import AdditivePooling, HierarchicalAttention
from attsvm.errors import InvalidInputError

LENGTHS = [[3, 1, 5], [2], [4, 0, 2, 1], []]
"""Words in each sentence of each document; one sentence is empty, and one document has none."""

D, C, S, T = 6, 4, 4, 5


@pytest.fixture
def model() -> HierarchicalAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HierarchicalAttention(D, d_context=C).double()


def ragged(filler: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.full((len(LENGTHS), S, T, D), filler, dtype=torch.float64)
    mask = torch.zeros(len(LENGTHS), S, T, dtype=torch.bool)
    for b, sentences in enumerate(LENGTHS):
        for j, length in enumerate(sentences):
            tokens[b, j, :length] = torch.randn(length, D, generator=generator, dtype=torch.float64)
            mask[b, j, :length] = True
    return tokens, mask


def pool(layer: AdditivePooling, vectors: list[Tensor]) -> tuple[Tensor, list[float]]:
    """The formula, a token at a time."""
    exponentials = [
        math.exp(float(layer.context @ torch.tanh(layer.projection.weight @ h + layer.projection.bias)))
        for h in vectors
    ]
    weights = [one / sum(exponentials) for one in exponentials]
    return sum((w * h for w, h in zip(weights, vectors)), torch.zeros(D, dtype=torch.float64)), weights


@torch.no_grad()
def test_ragged_documents_equal_loops_over_lists(model: HierarchicalAttention) -> None:
    tokens, mask = ragged()
    found = model(tokens, mask)
    for b, lengths in enumerate(LENGTHS):
        sentences, at = [], []
        for j, length in enumerate(lengths):
            vector, weights = pool(model.words, list(tokens[b, j, :length]))
            torch.testing.assert_close(found.sentences[b, j], vector, rtol=0, atol=1e-12)
            wanted = torch.tensor(weights + [0.0] * (T - length), dtype=torch.float64)
            torch.testing.assert_close(found.word_weights[b, j], wanted, rtol=0, atol=1e-12)
            if length:
                sentences.append(vector)
                at.append(j)
        document, weights = pool(model.sentences, sentences)
        torch.testing.assert_close(found.output[b], document, rtol=0, atol=1e-12)
        wanted = torch.zeros(S, dtype=torch.float64)
        wanted[at] = torch.tensor(weights, dtype=torch.float64)
        torch.testing.assert_close(found.sentence_weights[b], wanted, rtol=0, atol=1e-12)


def test_weights_sum_to_one_where_anything_is_allowed_and_to_zero_elsewhere(model: HierarchicalAttention) -> None:
    tokens, mask = ragged()
    found = model(tokens, mask)
    there = mask.any(-1)
    torch.testing.assert_close(found.word_weights.sum(-1), there.double())
    torch.testing.assert_close(found.sentence_weights.sum(-1), there.any(-1).double())
    torch.testing.assert_close(found.token_weights().sum((1, 2)), there.any(-1).double())
    assert bool((found.word_weights[~mask] == 0).all() and (found.sentence_weights[~there] == 0).all())
    assert torch.equal(found.output[3], torch.zeros(D, dtype=torch.float64))


@pytest.mark.parametrize("filler", [1e30, math.nan, math.inf])
def test_what_stands_in_the_padding_changes_nothing(model: HierarchicalAttention, filler: float) -> None:
    slopes = []
    for value in (0.0, filler):
        tokens, mask = ragged(value)
        tokens.requires_grad_()
        found = model(tokens, mask)
        slopes.append((found.output, *torch.autograd.grad(found.output.square().sum(), [tokens, *model.parameters()])))
    for plain, filled in zip(*slopes):
        torch.testing.assert_close(filled, plain, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences(model: HierarchicalAttention) -> None:
    tokens, mask = ragged()
    tokens = tokens.requires_grad_()
    names, parameters = zip(*model.named_parameters())

    def work(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values)), (x, mask)).output

    assert torch.autograd.gradcheck(work, (tokens, *parameters))


def test_words_of_empty_sentences_send_no_gradient(model: HierarchicalAttention) -> None:
    tokens, mask = ragged()
    tokens.requires_grad_()
    slope = torch.autograd.grad(model(tokens, mask).output.sum(), tokens)[0]
    assert bool((slope[~mask] == 0).all())
    assert bool((slope[mask] != 0).any(-1).all())


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_no_nan_arises_on_the_way_back(model: HierarchicalAttention) -> None:
    tokens, mask = ragged()
    with torch.autograd.detect_anomaly():
        model(tokens.requires_grad_(), mask).output.sum().backward()
    assert bool(torch.isfinite(tokens.grad).all())


def test_no_mask_means_every_word(model: HierarchicalAttention) -> None:
    tokens = ragged()[0]
    whole = model(tokens, torch.ones(tokens.shape[:3], dtype=torch.bool))
    for one, other in zip(model(tokens), whole):
        assert torch.equal(one, other)


def test_a_sentence_mask_leaves_a_sentence_out_and_still_pools_it(model: HierarchicalAttention) -> None:
    tokens, mask = ragged()
    keep = torch.ones(len(LENGTHS), S, dtype=torch.bool)
    keep[0, 1] = False
    found, plain = model(tokens, mask, sentence_mask=keep), model(tokens, mask)
    assert found.sentence_weights[0, 1].item() == 0.0
    assert torch.equal(found.word_weights, plain.word_weights)
    removed = mask.clone()
    removed[0, 1] = False
    torch.testing.assert_close(found.output, model(tokens, removed).output)
    assert not torch.equal(found.output[0], plain.output[0])


class Reversed(nn.Module):
    """Hands back the sentences with their sign turned, and NaN for empty ones."""

    def forward(self, sentences: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[..., None], -sentences, math.nan)


def test_an_encoder_stands_between_the_levels(model: HierarchicalAttention) -> None:
    tokens, mask = ragged()
    plain = model(tokens, mask)
    model.encoder = Reversed()
    found = model(tokens, mask)
    torch.testing.assert_close(found.sentences, plain.sentences)
    torch.testing.assert_close(found.output, model.sentences(-plain.sentences, mask.any(-1)).output)


def test_half_precision_has_weights_in_float32(model: HierarchicalAttention) -> None:
    tokens, mask = ragged()
    wanted = model(tokens, mask)
    found = model.bfloat16()(tokens.bfloat16(), mask)
    assert found.output.dtype == torch.bfloat16
    assert found.word_weights.dtype == torch.float32
    torch.testing.assert_close(found.word_weights.sum(-1), mask.any(-1).float())
    torch.testing.assert_close(found.output.double(), wanted.output, rtol=0.05, atol=0.05)


def test_it_learns_which_word_decides() -> None:
    """The target is the first coordinate of the one word that the second marks: of either sign, so it must be found."""
    n = 256
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, head = HierarchicalAttention(D), nn.Linear(D, 1)
        tokens = torch.randn(n, S, T, D)
        place = torch.randint(S * T, (n,))
        marked = torch.zeros(n, S * T, dtype=torch.bool).scatter(1, place[:, None], True).view(n, S, T)
        tokens[..., 1] = 4.0 * marked
        targets = tokens[..., 0][marked]
        optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.mse_loss(head(model(tokens).output)[:, 0], targets).backward()
            optimizer.step()
    with torch.no_grad():
        found = model(tokens)
        error = nn.functional.mse_loss(head(found.output)[:, 0], targets)
    assert float(error) < 0.1 * float(targets.var())
    assert float(found.token_weights()[marked].mean()) > 0.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tokens": torch.ones(2, 3, 4, D + 1)}, "tokens must be floating point of shape"),
        ({"tokens": torch.ones(2, 3, D)}, "tokens must be"),
        ({"tokens": torch.ones(2, 3, 4, D).int()}, "tokens must be"),
        ({"mask": torch.ones(2, 3, 5, dtype=torch.bool)}, r"mask must be booleans of shape \(2, 3, 4\)"),
        ({"mask": torch.ones(2, 3, 4)}, "mask must be booleans"),
        ({"sentence_mask": torch.ones(2, 4, dtype=torch.bool)}, r"sentence_mask must be booleans of shape \(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"HierarchicalAttention: {message}"):
        HierarchicalAttention(D)(**{"tokens": torch.ones(2, 3, 4, D), **arguments})


def test_sizes_must_be_positive() -> None:
    with pytest.raises(InvalidInputError, match="d_model must be at least 1, got 0"):
        HierarchicalAttention(0)
    with pytest.raises(InvalidInputError, match="d_context must be at least 1, got 0"):
        HierarchicalAttention(3, d_context=0)
    with pytest.raises(InvalidInputError, match="AdditivePooling: mask must be"):
        AdditivePooling(3)(torch.ones(2, 4, 3), torch.ones(2, 3, dtype=torch.bool))
