"""Scaled dot-product attention: the formula, the kernels, gradients, empty rows, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attsvm.attention.functional import _open_empty_rows, attend
from attsvm.attention.masks import causal_mask
from attsvm.errors import InvalidInputError, UnsupportedError

SHAPES = [(2, 4, 4, 5, 5), (2, 4, 2, 3, 7), (1, 6, 1, 1, 9), (2, 2, 2, 6, 4), (1, 3, 3, 1, 1)]
"""B, H, Hkv, Tq, Tk."""


def draw(shape: tuple[int, int, int, int, int], *, dtype: torch.dtype = torch.float32, d: int = 8) -> list[Tensor]:
    B, H, G, Tq, Tk = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = [(B, H, Tq, d), (B, G, Tk, d), (B, G, Tk, d)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def options(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Every kind of mask and bias; row 0 of the first sequence may see nothing in some."""
    B, H, _, Tq, Tk = shape
    generator = torch.Generator().manual_seed(1)
    some = torch.rand(B, H, Tq, Tk, generator=generator) < 0.6
    some[0, :, 0] = False
    padding = torch.ones(B, 1, 1, Tk, dtype=torch.bool)
    padding[0, ..., Tk // 2 :] = False
    bias = torch.randn(1, H, Tq, Tk, generator=generator).to(dtype)
    return [
        {},
        {"causal": True},
        {"mask": some},
        {"mask": padding, "causal": True},
        {"mask": some[0, 0]},
        {"mask": some[0]},
        {"bias": bias},
        {"bias": bias[0, 0], "causal": True, "scale": 0.3},
        {"bias": bias, "mask": some, "causal": True},
        {"mask": torch.zeros(B, 1, 1, Tk, dtype=torch.bool)},
    ]


def by_hand(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """One weight after the other, in Python floats."""
    (B, H, Tq, _), (G, Tk) = q.shape, k.shape[1:3]
    scale = given.get("scale") or 1 / math.sqrt(q.shape[3])
    mask = given.get("mask", torch.ones((), dtype=torch.bool)).expand(B, H, Tq, Tk)
    bias = given.get("bias", torch.zeros(())).expand(B, H, Tq, Tk)
    output, weights = torch.zeros(B, H, Tq, v.shape[3]), torch.zeros(B, H, Tq, Tk)
    for b, h, i in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(Tq)).tolist():
        g = h // (H // G)
        seen = [t for t in range(Tk) if bool(mask[b, h, i, t]) and (not given.get("causal") or t <= Tk - Tq + i)]
        powers = {t: math.exp(scale * float(q[b, h, i] @ k[b, g, t]) + float(bias[b, h, i, t])) for t in seen}
        for t in seen:
            weights[b, h, i, t] = powers[t] / sum(powers.values())
            output[b, h, i] += weights[b, h, i, t] * v[b, g, t]
    return output, weights


@pytest.mark.parametrize("shape", SHAPES)
def test_both_backends_compute_the_formula(shape: tuple[int, int, int, int, int]) -> None:
    q, k, v = draw(shape)
    for given_ in options(shape):
        output, weights = by_hand(q, k, v, **given_)
        eager = attend(q, k, v, backend="eager", weights=True, **given_)
        fused = attend(q, k, v, backend="sdpa", **given_)
        assert eager.weights is not None
        torch.testing.assert_close(eager.weights, weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(eager.output, output, rtol=0, atol=2e-6)
        torch.testing.assert_close(fused.output, eager.output, rtol=0, atol=1e-6)
        assert fused.weights is None


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gradients_by_differences(shape: tuple[int, int, int, int, int], backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in draw(shape, dtype=torch.float64, d=3))
    for given_ in options(shape, torch.float64):
        bias = given_.pop("bias", None)
        inputs = (q, k, v) if bias is None else (q, k, v, bias.clone().requires_grad_())

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, given_: Any = given_) -> Tensor:
            return attend(q, k, v, bias=bias, backend=backend, **given_).output

        assert torch.autograd.gradcheck(call, inputs)


def test_gradients_of_the_backends_agree_in_float32() -> None:
    for given_ in options(SHAPES[1]):
        gradients = []
        for backend in ("eager", "sdpa"):
            inputs = [x.requires_grad_() for x in draw(SHAPES[1])]
            attend(*inputs, backend=backend, **given_).output.square().sum().backward()
            gradients.append([x.grad for x in inputs])
        for eager, fused in zip(*gradients):
            torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["mask", "bias", "causal"])
def test_a_row_that_sees_nothing_is_zero_and_sends_no_gradient(backend: str, how: str) -> None:
    Tq, Tk = (4, 3) if how == "causal" else (3, 3)
    q, k, v = (x.requires_grad_() for x in draw((1, 2, 2, Tq, Tk)))
    given_: dict[str, Any] = {"causal": True}
    if how != "causal":
        mask = torch.ones(3, 3, dtype=torch.bool)
        mask[0] = False
        given_ = {"mask": mask} if how == "mask" else {"bias": torch.zeros(3, 3).masked_fill(~mask, -torch.inf)}
    for weights in (False, True):
        result = attend(q, k, v, backend=backend, weights=weights, **given_)
        assert torch.equal(result.output[:, :, 0], torch.zeros(1, 2, 8))
        assert bool((result.output[:, :, 1:] != 0).all())
        gradients = torch.autograd.grad(result.output.sum(), (q, k, v))
        assert all(bool(g.isfinite().all()) for g in gradients)
        assert torch.equal(gradients[0][:, :, 0], torch.zeros(1, 2, 8))
        if result.weights is not None:
            assert torch.equal(result.weights[:, :, 0], torch.zeros(1, 2, Tk))


def test_a_masked_key_has_weight_zero_however_high_its_logit() -> None:
    # A finite stand-in for -inf, as -1e4, would let the first key through here.
    q, k, v = torch.ones(1, 1, 1, 1), torch.tensor([[[[1e6], [-1e6]]]]), torch.tensor([[[[1.0], [2.0]]]])
    for backend in ("eager", "sdpa"):
        output = attend(q, k, v, mask=torch.tensor([False, True]), backend=backend).output
        assert output.item() == 2.0


def test_weights_come_with_every_backend() -> None:
    q, k, v = draw(SHAPES[0])
    for backend in ("auto", "eager", "sdpa"):
        weights = attend(q, k, v, backend=backend, weights=True).weights
        assert weights is not None
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))


def test_half_precision_keeps_the_softmax_in_float32() -> None:
    q, k, v = draw((1, 2, 2, 4, 300), dtype=torch.bfloat16)
    result = attend(q, k, v, weights=True)
    assert result.weights is not None
    assert (result.output.dtype, result.weights.dtype) == (torch.bfloat16, torch.float32)
    exact = attend(q.double(), k.double(), v.double(), weights=True)
    torch.testing.assert_close(result.weights.double(), exact.weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.output.double(), exact.output, rtol=2**-8, atol=1e-6)  # one rounding to bfloat16


def test_values_may_have_another_size_than_keys() -> None:
    q, k, _ = draw(SHAPES[1])
    v = torch.randn(2, 2, 7, 3, generator=torch.Generator().manual_seed(0))
    eager, fused = (attend(q, k, v, backend=backend).output for backend in ("eager", "sdpa"))
    assert eager.shape == (2, 4, 3, 3)
    torch.testing.assert_close(eager, fused, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_dropout_drops_weights_and_keeps_their_mean(backend: str) -> None:
    q, k = torch.zeros(1, 1, 2000, 2), torch.zeros(1, 1, 4, 2)
    v = torch.eye(4)[None, None]
    torch.manual_seed(0)
    output = attend(q, k, v, dropout=0.25, backend=backend).output
    torch.testing.assert_close(output.unique(), torch.tensor([0.0, 0.25 / 0.75]))
    # 8000 draws: the standard error of the share that is dropped is 0.005.
    assert abs(float((output == 0).float().mean()) - 0.25) < 0.02


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_causal_is_the_causal_mask(n_queries: int, n_keys: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 2, n_queries, 4, generator=generator)
    k, v = torch.randn(2, 1, 2, n_keys, 4, generator=generator)
    for backend in ("eager", "sdpa"):
        causal = attend(q, k, v, causal=True, backend=backend).output
        masked = attend(q, k, v, mask=causal_mask(n_queries, n_keys), backend=backend).output
        torch.testing.assert_close(causal, masked, rtol=0, atol=1e-6)


def test_empty_rows_on_kernels_that_do_not_know_them() -> None:
    """Elsewhere than on the CPU such rows are opened before the kernel and emptied after it."""
    q, k, v = draw(SHAPES[1])
    for given_ in options(SHAPES[1]):
        mask = given_.get("mask", torch.ones(1, 1, 1, 1, dtype=torch.bool)).expand(2, 4, 3, 7)
        for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
            opened, empty = _open_empty_rows(form)
            seen = opened if opened.dtype == torch.bool else opened == 0
            assert bool(seen.any(-1).all())
            assert torch.equal(seen & ~empty, mask)
            given_bias = {"mask": opened} if opened.dtype == torch.bool else {"bias": opened}
            output = attend(q, k, v, **given_bias).output.masked_fill(empty, 0.0)
            torch.testing.assert_close(output, attend(q, k, v, mask=mask, weights=True).output, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    shape, tolerance = (2, 4, 2, 200, 200), 2e-5 if dtype == torch.float32 else 2e-2
    q, k, v = draw(shape, dtype=dtype, d=64)
    for given_ in options(shape, dtype):
        there = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in given_.items()}
        outputs, gradients = [], []
        for device, how, arguments in (("cpu", "eager", given_), ("cuda", backend, there)):
            double = device == "cpu"
            inputs = [(x.double() if double else x).to(device).requires_grad_() for x in (q, k, v)]
            output = attend(*inputs, backend=how, **arguments).output
            outputs.append(output.cpu().double())
            gradients.append([g.cpu().double() for g in torch.autograd.grad(output.square().sum(), inputs)])
        torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
        for ours, exact in zip(gradients[1], gradients[0]):
            torch.testing.assert_close(ours, exact, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_on_a_gpu_without_a_break() -> None:
    q, k, v = (x.cuda() for x in draw((2, 4, 2, 64, 64), d=64))
    for given_ in ({"causal": True}, {"mask": torch.ones(64, 64, dtype=torch.bool).tril().cuda()}):
        compiled = torch.compile(attend, fullgraph=True)
        torch.testing.assert_close(
            compiled(q, k, v, **given_).output, attend(q, k, v, **given_).output, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("which", [0, 3, 8, 9])
def test_flex_computes_the_formula(which: int) -> None:
    q, k, v = draw(SHAPES[1])
    given_ = options(SHAPES[1])[which]
    flex, eager = (attend(q, k, v, backend=backend, **given_).output for backend in ("flex", "eager"))
    torch.testing.assert_close(flex, eager, rtol=0, atol=1e-6)


def test_what_flex_cannot_do_is_said() -> None:
    q, k, v = draw(SHAPES[1])
    with pytest.raises(UnsupportedError, match='backend "flex" has no dropout'):
        attend(q, k, v, backend="flex", dropout=0.1)
    with pytest.raises(UnsupportedError, match='backend "flex" has no gradient on the CPU'):
        attend(q.requires_grad_(), k, v, backend="flex")
    with torch.no_grad():
        assert attend(q, k, v, backend="flex").output.shape == q.shape


BAD: list[tuple[str, dict[str, Any]]] = [
    ("q must be floating point of shape", {"q": torch.zeros(4, 3, 8)}),
    ("k must be floating point of shape", {"k": torch.zeros(1, 2, 5, 8, dtype=torch.long)}),
    ("q, k and v must have one dtype", {"v": torch.zeros(1, 2, 5, 8, dtype=torch.float64)}),
    ("k must have the batch size and d_head of q", {"k": torch.zeros(1, 2, 5, 7)}),
    ("k must have the batch size and d_head of q", {"k": torch.zeros(2, 2, 5, 8)}),
    ("v must have the batch, heads and length of k", {"v": torch.zeros(1, 2, 4, 8)}),
    ("heads of q must be a multiple .* got 4 and 3", {"k": torch.zeros(1, 3, 5, 8), "v": torch.zeros(1, 3, 5, 8)}),
    ("at least one key", {"k": torch.zeros(1, 2, 0, 8), "v": torch.zeros(1, 2, 0, 8)}),
    ("mask must be boolean .* got torch.float32; additive logits go to bias", {"mask": torch.zeros(3, 5)}),
    ("mask must be boolean .* got torch.int64", {"mask": torch.zeros(3, 5, dtype=torch.long)}),
    (r"mask must broadcast to .* \(1, 4, 3, 5\), got shape \(5, 3\)", {"mask": torch.zeros(5, 3, dtype=torch.bool)}),
    ("mask must broadcast to", {"mask": torch.zeros((), dtype=torch.bool)}),
    ("mask must broadcast to", {"mask": torch.zeros(1, 1, 1, 3, 5, dtype=torch.bool)}),
    ("bias must broadcast to", {"bias": torch.zeros(2, 1, 3, 5)}),
    ("bias must be floating point", {"bias": torch.zeros(3, 5, dtype=torch.bool)}),
    ("backend must be one of auto, eager, sdpa, flex, got 'flash'", {"backend": "flash"}),
    (r"dropout must be in \[0, 1\), got 1.0", {"dropout": 1.0}),
]


@pytest.mark.parametrize("message, changes", BAD)
def test_what_does_not_fit_is_named(message: str, changes: dict[str, Any]) -> None:
    given_ = {"q": torch.zeros(1, 4, 3, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8), **changes}
    with pytest.raises(InvalidInputError, match=message):
        attend(**given_)
