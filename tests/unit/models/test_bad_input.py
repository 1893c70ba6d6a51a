"""Whatever a user gets wrong in a call ends in one sentence that names it; test_bad_models.py has the files."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attsvm.attention import KeyValueCache, MultiHeadAttention, check_padding
from attsvm.errors import InvalidInputError
from attsvm.models import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    GenerationConfig,
    LSTMConfig,
    LSTMLanguageModel,
    LSTMSeq2Seq,
    LSTMSeq2SeqConfig,
    RotaryScaling,
    Seq2Seq,
    Seq2SeqConfig,
    Vision,
    VisionConfig,
    generate,
)

D_VOCAB, N_CTX, PAD = 20, 12, 0
SIZES: dict[str, Any] = {"d_vocab": D_VOCAB, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_mlp": 12}
TEXT: dict[str, Any] = {**SIZES, "n_ctx": N_CTX}
IMAGE: dict[str, Any] = {"image_size": 4, "patch_size": 2, "d_model": 8, "n_heads": 2, "n_layers": 1, "d_mlp": 32}
PADDED = torch.tensor([[PAD, PAD, 3], [4, 5, 6]])  # on the left, as for generation
REAL = PADDED != PAD
WHOLE = torch.tensor([[3, 4, 5], [6, 7, 8]])
NO_TOKENS = torch.zeros(1, 0, dtype=torch.long)


def encoder() -> Encoder:
    return Encoder(EncoderConfig(**TEXT, pad_id=PAD)).eval()


def decoder(**options: Any) -> Decoder:
    return Decoder(DecoderConfig(**{**TEXT, "pad_id": PAD, **options})).eval()


def seq2seq(**options: Any) -> Seq2Seq:
    return Seq2Seq(Seq2SeqConfig(**{**SIZES, "n_ctx": N_CTX, "pad_id": PAD, "start_id": 1, "eos_id": 2, **options}))


def after(length: int) -> Any:
    """A decoder's call with so many tokens in the cache."""
    model, cache = decoder(), KeyValueCache()
    model(torch.ones(1, length, dtype=torch.long), cache=cache)
    return lambda: model(torch.ones(1, N_CTX - length + 1, dtype=torch.long), cache=cache)


def heads(build: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    return lambda: build(**options)


# What is wrong, the call, and words that the sentence must have.
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    # a mask of the wrong meaning
    "inverse, encoder": (lambda: encoder()(PADDED, attention_mask=~REAL), "True exactly on the padding .*~attention"),
    "inverse, decoder": (lambda: decoder()(PADDED, attention_mask=~REAL), "True exactly on the padding .*~attention"),
    "inverse, padded with the end": (
        lambda: decoder(pad_id=None, eos_id=PAD)(PADDED, attention_mask=~REAL),
        "True exactly on the padding .*~attention",
    ),
    "inverse, several ends": (
        lambda: decoder(pad_id=None, eos_id=(9, PAD))(PADDED, attention_mask=~REAL),
        "True exactly on the padding .*~attention",
    ),
    "inverse, no padding": (lambda: decoder()(WHOLE, attention_mask=WHOLE == PAD), "False everywhere. Hint: pass ~att"),
    "inverse, source": (
        lambda: seq2seq()(PADDED, WHOLE, attention_mask=~REAL),
        "True exactly on the padding .*~attention",
    ),
    "inverse, target": (lambda: seq2seq()(WHOLE, PADDED, decoder_mask=~REAL), "decoder_mask.*True exactly on the pad"),
    "inverse, by hand": (lambda: check_padding(~REAL, PADDED, PAD), "True only on padding .* it is inverted"),
    "inverse, generation": (
        lambda: generate(decoder(), PADDED, attention_mask=~REAL),
        "generate: .* True exactly on the padding .*~attention",
    ),
    "inverse, padded with the end, generation": (
        lambda: generate(decoder(pad_id=None, eos_id=PAD), PADDED, attention_mask=~REAL),
        "generate: .* True exactly on the padding .*~attention",
    ),
    "inverse, sources": (
        lambda: generate(seq2seq(), PADDED, attention_mask=~REAL),
        "generate: .* True exactly on the padding .*~attention",
    ),
    "mask as a list, generation": (
        lambda: generate(decoder(), WHOLE, attention_mask=[[1, 1, 1]]),  # type: ignore[arg-type]
        "generate: attention_mask must be a tensor, got list",
    ),
    "numbers as a mask, generation": (
        lambda: generate(decoder(), WHOLE, attention_mask=2 * WHOLE),
        "generate: attention_mask must hold 0 and 1",
    ),
    "additive": (
        lambda: encoder()(PADDED, attention_mask=torch.zeros(2, 3).masked_fill(~REAL, -torch.inf)),
        "must hold 0 and 1",
    ),
    "mask of another shape": (lambda: decoder()(WHOLE, attention_mask=REAL.T), r"\(B, T\) = \(2, 3\), got \(3, 2\)"),
    "mask as a list": (
        lambda: decoder()(WHOLE, attention_mask=[[1, 1, 1]]),
        "attention_mask must be a tensor, got list",
    ),
    # a batch of unequal lengths without a mask
    "no mask, encoder": (lambda: encoder()(PADDED), r"attention_mask must be given .*ids != 0"),
    "no mask, decoder": (lambda: decoder()(PADDED), r"attention_mask must be given .*ids != 0"),
    "no mask, source": (lambda: seq2seq()(PADDED, WHOLE), r"attention_mask must be given .*ids != 0"),
    "no mask, all rows padded": (
        lambda: encoder()(torch.tensor([[3, 4, PAD, PAD], [5, 6, 7, PAD]])),
        "attention_mask must be given for sequences of unequal lengths",
    ),
    "no mask, generation": (lambda: generate(decoder(), PADDED), r"attention_mask must be given .*ids != 0"),
    "no mask, generation without a cache": (
        lambda: generate(decoder(), PADDED, use_cache=False),
        r"attention_mask must be given .*ids != 0",
    ),
    # longer than the context
    "long, encoder": (lambda: encoder()(torch.ones(1, 13, dtype=torch.long)), "context of 12 positions, got 13"),
    "long, decoder": (lambda: decoder()(torch.ones(1, 13, dtype=torch.long)), "context of 12 positions, got 13"),
    "long, with the cache": (lambda: after(5)(), "context of 12 positions, got 8 after 5 in the cache"),
    "long, source": (lambda: seq2seq()(torch.ones(1, 13, dtype=torch.long), WHOLE), "context of 12 .* got 13"),
    "long, target": (
        lambda: seq2seq()(WHOLE[:1], torch.ones(1, 13, dtype=torch.long)),
        "decoder_ids must fit into the context of 12 positions, got 13",
    ),
    "long, prompt": (lambda: generate(decoder(), [[1] * 13]), "context of 12 positions, got a prompt of 13"),
    "another image size": (
        lambda: Vision(VisionConfig(**IMAGE))(torch.zeros(1, 3, 8, 8)),
        r"\(B, 3, 4, 4\), got \(1, 3, 8, 8\)",
    ),
    # another vocabulary
    "vocabulary, encoder": (lambda: encoder()(torch.tensor([[20]])), r"in \[0, 20\), the vocabulary, got 20"),
    "vocabulary, decoder": (
        lambda: decoder()(torch.tensor([[-1]])),
        r"in \[0, 20\), .* got -1. Hint: is the tokenizer",
    ),
    "vocabulary, target": (lambda: seq2seq()(WHOLE[:1], torch.tensor([[99]])), r"decoder_ids must be in \[0, 20\)"),
    "vocabulary, prompt": (lambda: generate(decoder(), [[1, 99]]), r"in \[0, 20\), the vocabulary, got 99"),
    "vocabulary, LSTM": (
        lambda: LSTMLanguageModel(LSTMConfig(d_vocab=9, d_model=4))(torch.tensor([[9]])),
        r"ids must lie in \[0, 9\), got 9",
    ),
    # heads that do not divide
    "heads, layer": (heads(MultiHeadAttention, d_model=8, n_heads=3), r"n_heads must divide d_model \(8\).*got 3"),
    "heads, encoder": (heads(EncoderConfig, **{**TEXT, "n_heads": 3}), r"n_heads must divide d_model \(8\).*got 3"),
    "heads, decoder": (heads(DecoderConfig, **{**TEXT, "n_heads": 3}), r"n_heads must divide d_model \(8\).*got 3"),
    "heads, source": (heads(Seq2SeqConfig, **{**SIZES, "n_heads": 3}), r"n_heads must divide d_model \(8\).*got 3"),
    "heads, target": (heads(Seq2SeqConfig, **SIZES, n_decoder_heads=5), r"n_heads must divide d_model \(8\).*got 5"),
    "heads, vision": (heads(VisionConfig, **{**IMAGE, "n_heads": 3}), "n_heads must divide d_model.* n_heads 3"),
    "key-value heads": (
        heads(DecoderConfig, **{**TEXT, "n_heads": 4}, n_kv_heads=3),
        r"n_kv_heads must divide .* got 3",
    ),
    "no heads": (heads(DecoderConfig, **TEXT, n_kv_heads=0), "n_kv_heads must be >= 1, got 0"),
    "half a head": (heads(Seq2SeqConfig, **{**SIZES, "n_heads": 2.0}), "n_heads must be an integer, got 2.0"),
    # nothing to go on from
    "empty prompt": (lambda: generate(decoder(), [[1], []]), "at least one token, got none in prompt 1"),
    "no prompts": (lambda: generate(decoder(), []), "at least one token"),
    "prompt of padding": (
        lambda: generate(decoder(), PADDED, attention_mask=torch.zeros(2, 3)),
        "at least one token, got none in prompt 0",
    ),
    "prompts without a list": (
        lambda: generate(decoder(), [1, 2, 3]),
        "a list of tokens for each prompt, got 1 in place 0",
    ),  # type: ignore[list-item]
    "texts": (lambda: generate(decoder(), ["text"]), "list of tokens .* got 'text' in place 0. Hint: .* tokenizer"),
    "what a tokenizer returns": (
        lambda: generate(decoder(), {"input_ids": [[1]]}),  # type: ignore[arg-type]
        "list of tokens for each prompt, got 'input_ids'",
    ),
    "one number": (lambda: generate(decoder(), 5), "ids must be .* or lists of tokens, got int"),  # type: ignore[arg-type]
    "no integers": (lambda: generate(decoder(), [[1], [2, 1.5]]), "ids must hold integers .* got 1.5 in prompt 1"),  # type: ignore[list-item]
    "booleans": (lambda: generate(decoder(), [[True]]), "ids must hold integers .* got True in prompt 0"),
    "words": (lambda: generate(decoder(), [["the"]]), "ids must hold integers .* got 'the' in prompt 0"),  # type: ignore[list-item]
    "beyond integers": (lambda: generate(decoder(), [[2**63]]), "ids must hold integers .* got 9223372036854775808"),
    "empty, encoder": (lambda: encoder()(NO_TOKENS), "at least one token"),
    "empty, target": (lambda: seq2seq()(WHOLE[:1], NO_TOKENS), "decoder_ids must hold at least one token"),
    "empty, LSTM": (
        lambda: LSTMSeq2Seq(LSTMSeq2SeqConfig(d_vocab=9, d_model=4))(NO_TOKENS, WHOLE[:1]),
        "at least one token",
    ),
    # a model or an argument of another kind
    "no generator": (lambda: generate(encoder(), [[1]]), "model must be a Decoder or a Seq2Seq, got Encoder"),  # type: ignore[arg-type]
    "no parameters": (lambda: generate("gpt2", [[1]]), "model must be a Decoder or a Seq2Seq, got str"),  # type: ignore[arg-type]
    "settings": (lambda: generate(decoder(), [[1]], {"beams": 2}), "config must be a GenerationConfig .* got dict"),  # type: ignore[arg-type]
    "no head": (lambda: generate(decoder(head=False, tied=False), [[1]]), "model must have a head"),
    "ids as a list": (lambda: decoder()([[1, 2]]), "ids must be a tensor of integers .* got list"),
    "ids as a list, LSTM": (
        lambda: LSTMLanguageModel(LSTMConfig(d_vocab=9, d_model=4))([[1]]),  # type: ignore[arg-type]
        "must be a tensor of integers .* got list",
    ),
    "no logits": (lambda: decoder()(WHOLE, last_logits=0), "last_logits must be an integer of at least 1 .* got 0"),
    "logits of less than none": (lambda: seq2seq()(WHOLE, WHOLE, last_logits=-2), "last_logits must be .* got -2"),
    "dropout": (heads(DecoderConfig, **TEXT, dropout=1.5), r"dropout must be in \[0, 1\), got 1.5"),
    "epsilon": (heads(VisionConfig, **IMAGE, norm_eps=-1.0), "norm_eps must be at least 0, got -1.0"),
    "end": (heads(Seq2SeqConfig, **SIZES, eos_id="</s>"), "eos_id must be an integer, several .* got '</s>'"),
    "scaling": (
        lambda: RotaryScaling(factor=8.0, low_frequency_factor=4.0, high_frequency_factor=1.0, original_n_ctx=8),
        r"high_frequency_factor must be above low_frequency_factor \(4.0\), got 1.0",
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_wrong_call_is_one_sentence(what: str) -> None:
    call, words = CALLS[what]
    with pytest.raises(InvalidInputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert re.match(r"\w+( \(decoder_mask\))?: ", str(caught.value)), "the sentence begins with who says it"


# --------------------------------------------------------------------------------------- what only looks like a mistake


class PadOnly(nn.Module):
    """A head that always chooses one token."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, hidden: Tensor) -> Tensor:
        logits = hidden.new_zeros(*hidden.shape[:-1], D_VOCAB)
        logits[..., self.token] = 1.0
        return logits


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompts", [[[1, 2], [3]], [[1, 2], [3, 4]]])
def test_a_model_that_generates_padding_goes_on(prompts: list[list[int]], use_cache: bool) -> None:
    """Its tokens were taken for padding under an inverse mask, or without one."""
    model = decoder(tied=False)
    model.head = PadOnly(PAD)  # type: ignore[assignment]
    found = generate(model, prompts, GenerationConfig(max_new_tokens=3), use_cache=use_cache)
    assert found.tokens == [[PAD] * 3] * 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_rest_of_a_row_that_was_stopped_is_no_padding(use_cache: bool) -> None:
    """Rows that have ended are filled with token 0, beside others that go on."""
    torch.manual_seed(0)
    model = decoder(tied=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)
    prompts = [[1, 2], [3, 4], [5, 6], [7, 8]]
    free = generate(model, prompts, GenerationConfig(max_new_tokens=5), use_cache=use_cache).tokens
    ending = free[0][0]
    assert any(row[0] != ending for row in free), "all rows end at once: another seed"
    settings = GenerationConfig(max_new_tokens=5, stop=((ending,),))
    stopped = generate(model, prompts, settings, use_cache=use_cache).tokens
    for row, whole in zip(stopped, free, strict=True):
        assert row == whole[: whole.index(ending) + 1] if ending in whole else row == whole


def test_what_is_right_passes() -> None:
    mask = torch.tensor([[True, False, False], [True, True, True]])
    end = decoder(pad_id=None, eos_id=9)
    assert end(torch.tensor([[9, 9, 9], [9, 4, 5]]), attention_mask=mask).logits is not None
    same = torch.tensor([[3, 4, PAD], [5, 6, PAD]])  # of equal lengths, whatever is behind them
    assert encoder()(same).hidden.isfinite().all()
    assert decoder()(PADDED, attention_mask=REAL.long()).hidden.isfinite().all()
