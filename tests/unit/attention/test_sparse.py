"""Windows and blocks, against dense attention under the same mask."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from attsvm.attention import chunks
from attsvm.attention.functional import attend
from attsvm.attention.masks import bigbird_mask, global_local_mask, sliding_window_mask
from attsvm.attention.sparse import attend_blocks, attend_window
from attsvm.errors import InvalidInputError

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}

FUSED = {torch.float32: 4.0, torch.float64: 1.0}
"""How far gradients may be off for the fused kernel: in float32 torch's own, dense, is 4 times as far as formulas."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The specification: all logits, then the mask; rows with nothing allowed are 0."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    alive = allowed.any(-1, keepdim=True)
    logits = logits.masked_fill(~allowed & alive, -math.inf)
    weights = torch.where(alive, logits.softmax(-1), 0.0)
    return weights @ v, weights


def window_mask(T: int, window: int, *, causal: bool, dilation: int = 1, centre: tuple[int, ...] = ()) -> Tensor:
    """Written pair by pair."""
    allowed = torch.zeros(T, T, dtype=torch.bool)
    for i, t in itertools.product(range(T), repeat=2):
        near = abs(i - t) < window * dilation and (i - t) % dilation == 0
        allowed[i, t] = (near or i in centre or t in centre) and (t <= i or not causal)
    return allowed


def padding(B: int, T: int) -> Tensor:
    """Padding on the right, on the left (longer than some windows), and in the middle."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, T - T // 3 :] = False
    mask[1, : T // 2] = False
    mask[2, T // 4 : T // 3] = False
    return mask


def agree(found: Tensor, wanted: Tensor, *, times: float = 1.0) -> None:
    # Rounding is a part of the largest terms, wherever they cancel: the unit is the largest entry, or 1.
    tol = times * TOLERANCES[found.dtype] * max(1.0, float(wanted.detach().abs().max()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=tol)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("centre", [(), (0, 17)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [1, 4, 9, 200])
def test_window_equals_dense_attention(
    window: int, causal: bool, dilation: int, centre: tuple[int, ...], padded: bool
) -> None:
    B, H, T = 3, 2, 41
    q, k, v = draw(B, 2 * H, T, 4), draw(B, H, T, 4, seed=1), draw(B, H, T, 5, seed=2)
    mask = padding(B, T) if padded else None
    allowed = window_mask(T, window, causal=causal, dilation=dilation, centre=centre)[None, None]
    allowed = allowed & mask[:, None, None] if mask is not None else allowed
    output, weights = dense(q, k, v, allowed)
    options = {"window": window, "causal": causal, "dilation": dilation, "global_tokens": centre, "mask": mask}
    for chunk in (None, 1, 4, 7):
        found = attend_window(q, k, v, **options, chunk=chunk)
        agree(found.output, output)
        assert found.weights is None
        found = attend_window(q, k, v, **options, chunk=chunk, weights=True)
        agree(found.output, output)
        agree(found.weights.dense(), weights)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_gradients_of_a_window_are_those_of_dense_attention(dtype: torch.dtype, causal: bool, weights: bool) -> None:
    B, H, T, centre = 3, 2, 150, (3, 80)
    inputs = [draw(B, H, T, 8, seed=seed, dtype=dtype).requires_grad_() for seed in range(3)]
    slope, mask = draw(B, H, T, 8, seed=4, dtype=dtype), padding(B, T)
    options = {"window": 20, "causal": causal, "global_tokens": centre, "mask": mask, "scale": 0.7}
    found = attend_window(*inputs, **options, weights=weights).output
    allowed = window_mask(T, 20, causal=causal, centre=centre) & mask[:, None, None]
    wanted = dense(*inputs, allowed, scale=0.7)[0]
    agree(found, wanted)
    for mine, theirs in zip(torch.autograd.grad(found, inputs, slope), torch.autograd.grad(wanted, inputs, slope)):
        agree(mine, theirs, times=1.0 if weights else FUSED[dtype])


def test_the_layout_of_the_band_is_the_documented_one() -> None:
    T, window, dilation = 12, 3, 2
    q, k, v = (draw(1, 1, T, 4, seed=seed) for seed in range(3))
    found = attend_window(q, k, v, window=window, dilation=dilation, global_tokens=[5], weights=True).weights
    full = dense(q, k, v, window_mask(T, window, causal=False, dilation=dilation, centre=(5,)))[1][0, 0]
    assert found.band.shape == (1, 1, T, 2 * window - 1)
    assert found.left == window - 1
    for i in range(T):
        for s in range(2 * window - 1):
            key = i + (s - found.left) * dilation
            there = 0 <= key < T and key != 5 and i != 5
            assert float(found.band[0, 0, i, s]) == pytest.approx(float(full[i, key]) if there else 0.0, abs=1e-14)
        assert float(found.columns[0, 0, i, 0]) == pytest.approx(0.0 if i == 5 else float(full[i, 5]), abs=1e-14)
    agree(found.rows[0, 0, 0], full[5])


def test_the_band_of_a_long_sequence_stays_a_band() -> None:
    q = draw(1, 1, 3000, 4, dtype=torch.float32)
    found = attend_window(q, q, q, window=16, causal=True, weights=True).weights
    assert found.band.shape == (1, 1, 3000, 16)
    torch.testing.assert_close(found.band.sum(-1), torch.ones(1, 1, 3000))
    assert bool((found.band[0, 0, 0, :15] == 0).all())


def test_a_row_that_sees_only_padding_is_zero_and_sends_no_gradient() -> None:
    q, k, v = (draw(1, 1, 40, 4, seed=seed).requires_grad_() for seed in range(3))
    mask = torch.arange(40)[None] >= 20
    for weights in (False, True):
        found = attend_window(q, k, v, window=5, causal=True, mask=mask, weights=weights)
        assert bool((found.output[0, 0, :20] == 0).all())
        assert bool((found.output[0, 0, 20:] != 0).all())
        slopes = torch.autograd.grad(found.output.sum(), (q, k, v))
        assert all(bool(torch.isfinite(slope).all()) and bool((slope[0, 0, :20] == 0).all()) for slope in slopes)


def test_a_mask_with_the_axes_of_attend_is_taken_too() -> None:
    q, mask = draw(3, 1, 30, 4), padding(3, 30)
    one = attend_window(q, q, q, window=4, mask=mask).output
    assert torch.equal(one, attend_window(q, q, q, window=4, mask=mask[:, None, None]).output)


def expand(blocks: Tensor, size: int, Tq: int, Tk: int) -> Tensor:
    return blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)[:Tq, :Tk]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("Tq, Tk, size", [(40, 40, 8), (37, 50, 8), (50, 37, 8), (5, 5, 8), (23, 23, 1)])
def test_blocks_equal_dense_attention(
    Tq: int, Tk: int, size: int, causal: bool, padded: bool, dtype: torch.dtype
) -> None:
    B, H = 3, 2
    q = draw(B, 2 * H, Tq, 4, dtype=dtype).requires_grad_()
    k, v = (draw(B, H, Tk, 4, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    blocks = draw(-(-Tq // size), -(-Tk // size), seed=3) > 0
    # One row with nothing, one with everything.
    blocks[-1], blocks[0] = False, True
    mask = padding(B, Tk) if padded else None
    allowed = expand(blocks, size, Tq, Tk)[None, None]
    if causal:
        allowed = allowed & torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq)
    allowed = allowed & mask[:, None, None] if mask is not None else allowed
    output, weights = dense(q, k, v, allowed)
    slope = draw(*output.shape, seed=5, dtype=dtype)
    for wanted in (False, True):
        found = attend_blocks(q, k, v, layout=blocks, block_size=size, causal=causal, mask=mask, weights=wanted)
        agree(found.output, output)
        mine = torch.autograd.grad(found.output, (q, k, v), slope)
        theirs = torch.autograd.grad(output, (q, k, v), slope, retain_graph=True)
        for one, other in zip(mine, theirs):
            agree(one, other, times=1.0 if wanted else FUSED[dtype])
    agree(found.weights.dense(), weights)


def test_no_block_at_all_gives_zeros() -> None:
    q = draw(1, 1, 10, 4)
    found = attend_blocks(q, q, q, layout=torch.zeros(3, 3, dtype=torch.bool), block_size=4, weights=True)
    assert torch.equal(found.output, torch.zeros_like(q))
    assert torch.equal(found.weights.dense(), torch.zeros(1, 1, 10, 10, dtype=q.dtype))


def test_only_chosen_blocks_are_computed() -> None:
    q = draw(1, 1, 64, 4)
    blocks = bigbird_mask(16, block_size=1, n_random=1)
    found = attend_blocks(q, q, q, layout=blocks, block_size=4, weights=True).weights
    assert sum(part.weights.numel() for part in found.parts) == 16 * int(blocks.sum())
    causal = attend_blocks(q, q, q, layout=blocks, block_size=4, causal=True, weights=True).weights
    assert sum(part.weights.numel() for part in causal.parts) == 16 * int(blocks.tril().sum())


def test_values_in_blocks_that_are_not_chosen_are_never_read() -> None:
    q, v = draw(1, 1, 32, 4), draw(1, 1, 32, 4, seed=1)
    blocks = torch.eye(4, dtype=torch.bool)
    blocks[:, 2] = False
    v[:, :, 16:24] = math.nan
    assert bool(torch.isfinite(attend_blocks(q, q, v, layout=blocks, block_size=8).output).all())


def test_masks_and_the_attention_that_skips_them_mean_the_same() -> None:
    T, size = 75, 5
    q, k, v = (draw(2, 2, T, 4, seed=seed) for seed in range(3))
    for causal, dilation, centre in itertools.product((True, False), (1, 2), ([], [4, 60])):
        allowed = global_local_mask(T, window=7, dilation=dilation, causal=causal, global_tokens=centre)
        found = attend_window(q, k, v, window=7, dilation=dilation, causal=causal, global_tokens=torch.tensor(centre))
        agree(found.output, attend(q, k, v, mask=allowed, backend="eager").output)
    layout = bigbird_mask(T // size, block_size=1, seed=3)
    allowed = bigbird_mask(T, block_size=size, seed=3)
    assert not bool(allowed.all())
    for causal in (True, False):
        found = attend_blocks(q, k, v, layout=layout, block_size=size, causal=causal)
        agree(found.output, attend(q, k, v, mask=allowed, causal=causal, backend="eager").output)


def test_a_length_whose_dense_weights_no_machine_holds() -> None:
    T = 100_000
    q = draw(1, 1, T, 2, dtype=torch.float32).requires_grad_()
    v = torch.arange(T, dtype=torch.float32).view(1, 1, T, 1)
    found = attend_window(0.0 * q, q, v, window=3, causal=True).output
    torch.testing.assert_close(found[0, 0, 2:, 0], v[0, 0, 1:-1, 0])
    assert torch.autograd.grad(found.sum(), q)[0].shape == q.shape
    layout = sliding_window_mask(T // 50, window=1)
    found = attend_blocks(0.0 * q, q, v, layout=layout, block_size=50).output
    torch.testing.assert_close(found[0, 0, :, 0], v[0, 0, :, 0].view(-1, 50).mean(1).repeat_interleave(50))


@pytest.mark.parametrize("slab_bytes", [1, 3000, 2**40])
def test_the_size_of_a_call_changes_nothing(slab_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (draw(2, 2, 90, 4, seed=seed).requires_grad_() for seed in range(3))
    allowed, mask = window_mask(90, 6, causal=False, centre=(7,)), torch.arange(90) < torch.tensor([[90], [60]])
    wanted, weights = dense(q, k, v, allowed & mask[:, None, None])
    slopes = torch.autograd.grad(wanted.square().sum(), (q, k, v))
    monkeypatch.setattr(chunks, "SLAB_BYTES", slab_bytes)
    found = attend_window(q, k, v, window=6, global_tokens=[7], mask=mask, weights=True, chunk=8)
    agree(found.output, wanted)
    agree(found.weights.dense(), weights)
    for mine, theirs in zip(torch.autograd.grad(found.output.square().sum(), (q, k, v)), slopes):
        agree(mine, theirs)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = [draw(1, 2, 11, 3, seed=seed).requires_grad_() for seed in range(3)]
    layout = draw(3, 3, seed=9) > 0

    def windowed(*x: Tensor) -> Tensor:
        return attend_window(*x, window=2, dilation=2, global_tokens=[4], chunk=2).output

    def blocked(*x: Tensor) -> Tensor:
        return attend_blocks(*x, layout=layout, block_size=4, causal=True).output

    assert torch.autograd.gradcheck(windowed, inputs)
    assert torch.autograd.gradcheck(blocked, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_is_near(dtype: torch.dtype) -> None:
    q, k, v = (draw(1, 2, 70, 8, seed=seed) for seed in range(3))
    wanted = attend_window(q, k, v, window=9, causal=True).output
    found = attend_window(*(x.to(dtype) for x in (q, k, v)), window=9, causal=True).output
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"window": 2.5}, "window must be an integer"),
        ({"dilation": 0}, "dilation must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"global_tokens": [9]}, r"global_tokens must lie in \[0, 8\), got 9"),
        ({"global_tokens": [0.5]}, "global_tokens must be a list of places"),
        ({"global_tokens": [[1]]}, "global_tokens must be a list of places"),
        ({"mask": torch.ones(2, 7, dtype=torch.bool)}, r"mask must be booleans of shape \(2, 8\)"),
        ({"mask": torch.ones(2, 8)}, "mask must be booleans"),
        ({"q": torch.ones(2, 3, 8, 4)}, "heads of q must be a multiple"),
        ({"q": torch.ones(2, 8, 4)}, "q must be floating point of shape"),
        ({"q": torch.ones(2, 2, 0, 4)}, "q must hold at least one token"),
        ({"k": torch.ones(2, 2, 8, 5)}, "k must have the batch size and d_head"),
        ({"k": torch.ones(2, 2, 9, 4), "v": torch.ones(2, 2, 9, 4)}, "k must have the length of q, 8, got 9"),
        ({"v": torch.ones(2, 2, 9, 4)}, "v must have the batch, heads and length"),
        ({"v": torch.ones(2, 2, 8, 4).double()}, "of one dtype"),
    ],
)
def test_window_refuses_what_it_cannot_use(changed: dict[str, object], message: str) -> None:
    arguments = {"q": torch.ones(2, 2, 8, 4), "k": torch.ones(2, 2, 8, 4), "v": torch.ones(2, 2, 8, 4), "window": 2}
    with pytest.raises(InvalidInputError, match=f"attend_window: .*{message}"):
        attend_window(**{**arguments, **changed})


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"block_size": 0}, "block_size must be"),
        ({"layout": torch.ones(2, 2)}, "layout must be booleans"),
        ({"layout": torch.ones(2, 3, dtype=torch.bool)}, r"layout must be booleans of shape \(2, 2\)"),
    ],
)
def test_blocks_refuse_what_they_cannot_use(changed: dict[str, object], message: str) -> None:
    x = torch.ones(1, 1, 8, 4)
    arguments = {"q": x, "k": x, "v": x, "layout": torch.ones(2, 2, dtype=torch.bool), "block_size": 4}
    with pytest.raises(InvalidInputError, match=f"attend_blocks: .*{message}"):
        attend_blocks(**{**arguments, **changed})
