"""Models on a GPU: the numbers of the CPU, bfloat16 within its rounding, FlexAttention, torch.compile, generation.

Each test runs on the CPU too, where what it compares differs by less.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attsvm.attention import HierarchicalAttention, KeyValueCache, attend, attend_window, sliding_window_mask
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
    Seq2Seq,
    Seq2SeqConfig,
    Vision,
    VisionConfig,
    from_pretrained,
    generate,
    save_pretrained,
)

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EACH = pytest.mark.parametrize("device", ["cpu", CUDA])

D_VOCAB, N_LAYERS = 50, 2
SIZES: dict[str, Any] = {"d_vocab": D_VOCAB, "d_model": 64, "n_layers": N_LAYERS, "n_heads": 4, "d_mlp": 96}
LLAMA: dict[str, Any] = {
    "n_kv_heads": 2,
    "activation": "swiglu",
    "norm": "rms",
    "attention_bias": False,
    "mlp_bias": False,
    "positions": "rotary",
    "tied": False,
}
T5: dict[str, Any] = {"positions": "relative", "place": "pre", "norm": "rms", "bias": False, "scale": 1.0}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Products of float32 in float32, not TF32: what is compared here is rounding."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def ids(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(4, D_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def seeded(model: nn.Module, *, scale: float = 0.3) -> nn.Module:
    """The model with weights that are always the same, and large enough that its tokens differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def decoder(**options: Any) -> Decoder:
    model = seeded(Decoder(DecoderConfig(**{**SIZES, "n_ctx": 96, **options})))
    assert isinstance(model, Decoder)
    return model


LEFT = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])
MODELS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "bert": (lambda: Encoder(EncoderConfig(**SIZES, pooled=True)), (ids(),), {"attention_mask": LEFT}),
    "gpt2": (lambda: Decoder(DecoderConfig(**SIZES, n_ctx=16)), (ids(),), {"attention_mask": LEFT}),
    "llama": (lambda: Decoder(DecoderConfig(**SIZES, n_ctx=16, **LLAMA)), (ids(),), {"attention_mask": LEFT}),
    "original": (lambda: Seq2Seq(Seq2SeqConfig(**SIZES)), (ids(), ids(2, 5)), {"attention_mask": LEFT}),
    "t5": (lambda: Seq2Seq(Seq2SeqConfig(**SIZES, **T5)), (ids(), ids(2, 5)), {"attention_mask": LEFT}),
    "vit": (
        lambda: Vision(VisionConfig(image_size=8, patch_size=4, d_model=64, n_heads=4, n_layers=2, d_mlp=96)),
        (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)),),
        {},
    ),
    "lstm": (lambda: LSTMLanguageModel(LSTMConfig(d_vocab=D_VOCAB, d_model=16)), (ids(),), {"attention_mask": LEFT}),
    "lstm-attention": (
        lambda: LSTMSeq2Seq(LSTMSeq2SeqConfig(d_vocab=D_VOCAB, d_model=16, bidirectional=True)),
        (ids(), ids(2, 5)),
        {"attention_mask": LEFT},
    ),
}


def on(device: str, given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.to(device)
    if isinstance(given, dict):
        return {name: on(device, value) for name, value in given.items()}
    return tuple(on(device, value) for value in given)


def close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    """Relative to the largest number, as errors of sums are."""
    difference = float((found.detach().cpu().double() - exact.detach().cpu().double()).abs().max())
    largest = float(exact.detach().abs().max())
    assert difference <= tolerance * largest, (difference, largest)


@EACH
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_float64(name: str, device: str) -> None:
    make, arguments, options = MODELS[name]
    model = seeded(make(), scale=0.1)
    exact_model = copy.deepcopy(model).double()
    results = []
    for one, place, dtype in ((exact_model, "cpu", torch.float64), (model.to(device), device, torch.float32)):
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in arguments)
        output = one(*on(place, inputs), **on(place, options), **({} if name == "lstm" else {"weights": True}))
        output.hidden.square().mean().backward()
        gradients = {key: p.grad for key, p in one.named_parameters() if p.grad is not None}
        results.append((output, gradients))
    (exact, exact_gradients), (found, gradients) = results
    close(found.hidden, exact.hidden, 1e-5)
    assert gradients.keys() == exact_gradients.keys() != set()
    # Biases of keys have no gradient but rounding, so that all are held to the largest of all.
    largest = max(float(gradient.abs().max()) for gradient in exact_gradients.values())
    for key, gradient in gradients.items():
        assert float((gradient.cpu().double() - exact_gradients[key]).abs().max()) <= 1e-4 * largest, key
    for kind, patterns in (exact.weights or {}).items():
        for ours, theirs in zip(found.weights[kind], patterns, strict=True):
            close(ours, theirs, 1e-5)


@EACH
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_bfloat16_stays_within_its_rounding(options: dict[str, Any], backend: str, device: str) -> None:
    """Every result of an operation is rounded by a relative 2^-8 at most.

    A block has at most 16 such results in a row: norm, query, key, rotation, logits, weights, mean of values, output,
    sum; norm, gate, activation, up, product, down, sum. Outside of the blocks there are the embedding, the last norm
    and the head. Norms undo any growth in between, so errors add up at worst: (16 n_layers + 3) 2^-8.
    """
    model = decoder(**options, backend=backend).bfloat16()
    exact = decoder(**{**options, "backend": "eager"})
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    wanted = exact(ids(), attention_mask=LEFT)
    found = model.to(device)(ids().to(device), attention_mask=LEFT.to(device))
    assert found.logits is not None
    assert wanted.logits is not None
    assert found.logits.dtype == torch.bfloat16
    bound = (16 * N_LAYERS + 3) * 2.0**-8
    for ours, theirs in ((found.hidden, wanted.hidden), (found.logits, wanted.logits)):
        real, other = theirs[LEFT], ours.cpu().float()[LEFT]
        error = float((other - real).norm() / real.norm())
        assert 0 < error <= bound, error


@EACH
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_a_model_on_flex_attention(options: dict[str, Any], device: str) -> None:
    exact = decoder(**options, backend="eager").double()(ids(2, 40))
    model = decoder(**options, backend="flex").to(device)
    close(model(ids(2, 40).to(device)).hidden, exact.hidden, 1e-5)
    padded = torch.arange(40)[None] >= torch.tensor([[7], [0]])
    wanted = decoder(**options, backend="eager").double()(ids(2, 40), attention_mask=padded)
    found = model(ids(2, 40).to(device), attention_mask=padded.to(device), weights=True)
    close(found.hidden[padded.to(device)], wanted.hidden[padded], 1e-5)
    assert [tuple(pattern.shape) for pattern in found.weights["decoder"]] == [(2, 4, 40, 40)] * N_LAYERS


def compiled(model: nn.Module, device: str) -> Any:
    """Compiled as one graph; on the CPU without a compiler of C, which tells of breaks all the same."""
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager" if device == "cpu" else "inductor")


@EACH
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_a_compiled_forward_has_no_break(options: dict[str, Any], device: str) -> None:
    model = decoder(**options).to(device)
    fast = compiled(model, device)
    for length in (9, 12):  # the second time with a length that varies
        x = ids(2, length).to(device)
        close(fast(x).logits, model(x).logits, 1e-5)
    close(
        fast(ids().to(device), attention_mask=LEFT.to(device)).logits,
        model(ids().to(device), attention_mask=LEFT.to(device)).logits,
        1e-5,
    )


@EACH
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_a_compiled_step_has_no_break(options: dict[str, Any], device: str) -> None:
    model = decoder(**options).to(device)
    ours, plain = KeyValueCache(32), KeyValueCache(32)
    for cache in (ours, plain):
        model(ids().to(device), cache=cache)
    step = compiled(model, device)
    for k in range(12):
        token = ids(2, 1, seed=k).to(device)
        close(step(token, cache=ours).logits, model(token, cache=plain).logits, 1e-5)


def margin(model: Decoder, prompt: Tensor, new: list[int]) -> float:
    """How far the first choice was above the second, at least, over the scale of the logits."""
    whole = torch.cat([prompt, torch.tensor(new)])[None, :-1]
    logits = model(whole).logits[0, len(prompt) - 1 :]
    first, second = logits.topk(2, -1).values.T
    return float(((first - second) / logits.abs().amax(-1)).min())


@EACH
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_cpu(options: dict[str, Any], device: str) -> None:
    prompts = [ids(1, length, seed=length)[0].tolist() for length in (7, 4)]
    model = decoder(**options)
    settings = GenerationConfig(max_new_tokens=64)
    wanted = generate(model, prompts, settings, use_cache=False)
    for prompt, new in zip(prompts, wanted.tokens, strict=True):
        assert margin(model, torch.tensor(prompt), new) > 1e-5, "a tie, which rounding may decide: another seed"
    found = generate(model.to(device), prompts, settings, weights=True)
    assert found.tokens == wanted.tokens
    assert len(set(found.tokens[0])) > 3
    close(found.scores, wanted.scores, 1e-5)
    assert found.weights is not None
    assert found.weights[0]["decoder"][0].device.type == device


@EACH
@pytest.mark.parametrize(
    "settings", [{}, {"beams": 3}, {"repetition_penalty": 1.3}], ids=["greedy", "beams", "penalty"]
)
@torch.no_grad()
def test_answers_are_those_of_the_cpu(settings: dict[str, Any], device: str) -> None:
    model = seeded(Seq2Seq(Seq2SeqConfig(**SIZES, **T5, n_ctx=32, pad_id=0, start_id=1, eos_id=2)))
    config = GenerationConfig(max_new_tokens=12, **settings)
    sources = [ids(1, 6)[0].tolist(), ids(1, 3)[0].tolist()]
    wanted = generate(model, sources, config, use_cache=False)
    found = generate(model.to(device), sources, config)
    assert found.tokens == wanted.tokens
    close(found.scores, wanted.scores, 1e-5)


@EACH
@torch.no_grad()
def test_what_is_drawn_is_drawn_on_the_device(device: str) -> None:
    model = decoder().to(device)
    config = GenerationConfig(max_new_tokens=20, temperature=1.5, top_k=10, top_p=0.9, seed=3)
    first, second = (generate(model, ids(2, 3).tolist(), config).tokens for _ in range(2))
    assert first == second


@EACH
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
@torch.no_grad()
def test_a_loaded_model_moves(name: str, device: str, tmp_path: Path) -> None:
    """With all that it needs: angles of rotary positions are no weights, but go along, in float32."""
    make, arguments, options = MODELS[name]
    model = seeded(make(), scale=0.1)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, dtype=torch.bfloat16).to(device)
    assert {buffer.dtype for buffer in loaded.buffers()} <= {torch.float32}
    close(
        loaded.float()(*on(device, arguments), **on(device, options)).hidden, model(*arguments, **options).hidden, 0.1
    )
    save_pretrained(loaded, tmp_path / "back")
    assert {p.device.type for p in from_pretrained(tmp_path / "back").parameters()} == {"cpu"}


@EACH
@torch.no_grad()
def test_attention_that_skips_work(device: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 70, 16, generator=torch.Generator().manual_seed(0)).unbind()
    mask = sliding_window_mask(70, window=9, causal=True)
    exact = attend(q.double(), k.double(), v.double(), mask=mask, weights=True)
    found = attend_window(*on(device, (q, k, v)), window=9, causal=True, weights=True)
    close(found.output, exact.output, 1e-5)
    assert found.weights is not None
    assert exact.weights is not None
    close(found.weights.dense(), exact.weights, 1e-5)
    layer = HierarchicalAttention(16)
    tokens, real = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(1)), torch.ones(2, 3, 5).bool()
    wanted = layer(tokens, real)
    there = layer.to(device)(tokens.to(device), real.to(device))
    close(there.output, wanted.output, 1e-5)
