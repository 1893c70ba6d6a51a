"""Attention that skips work, against torch's dense kernel under the same mask; and how its cost grows with the length.

Forward passes in float32, one example, 8 heads of size 64. The lengths and the dense kernel take turns, so that the
pace of the machine cancels. Memory is that of processes of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attsvm.attention.masks import bigbird_mask, sliding_window_mask
from attsvm.attention.sparse import attend_blocks, attend_window
from benchmarks.child import _forget_peak, _peak_bytes, _resident_bytes, _return_freed
from benchmarks.harness import at_least, at_most, stopwatch
from benchmarks.record import Row

__all__ = ["PATTERNS", "Pattern", "sparse"]

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What may be attended.

    Attributes
    ----------
    attend
        ``(q, k, v, size)``: ours.
    mask
        ``(T, size)``: the same as booleans (T, T).
    size
        Window, or tokens in a block; and that of a quick run.
    target
        How many times as long dense attention should take at the second length.
    """

    attend: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    mask: Callable[[int, int], Tensor]
    size: tuple[int, int]
    target: float


def _window(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    return attend_window(q, k, v, window=size, causal=True).output


def _bigbird(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    layout = bigbird_mask(q.shape[2] // size, block_size=1)
    return attend_blocks(q, k, v, layout=layout, block_size=size).output


PATTERNS = {
    "window": Pattern(
        attend=_window,
        mask=lambda T, size: sliding_window_mask(T, window=size, causal=True),
        size=(256, 16),
        target=4.0,
    ),
    # Eight blocks in a row of 128 are 1 / 16 of the work; the global rows are as long as dense ones.
    "bigbird": Pattern(
        attend=_bigbird, mask=lambda T, size: bigbird_mask(T, block_size=size), size=(64, 16), target=4.0
    ),
}


def draw(T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, 8, T, 64)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, T, 64, generator=generator) for _ in range(3))
    return q, k, v


def sparse(name: str) -> Callable[[bool], Row]:
    """A row: time at two lengths, dense attention at the longer, memory at both and at twice the longer."""
    pattern = PATTERNS[name]

    def run(quick: bool) -> Row:
        short, long = (256, 512) if quick else (4096, 8192)
        size = pattern.size[quick]
        inputs = {T: draw(T) for T in (short, long)}
        mask = pattern.mask(long, size)
        ours = {T: partial(pattern.attend, *inputs[T], size) for T in inputs}
        dense = partial(scaled_dot_product_attention, *inputs[long], attn_mask=mask)
        wanted = dense()
        gap = float((ours[long]() - wanted).norm() / wanted.norm())
        seconds, theirs = _in_turns(ours, dense, rounds=1 if quick else 5)
        memory = {str(T): _in_child(name, T, size) for T in (short, long, 2 * long)}
        ratio = median(theirs) / median(seconds[long])
        shared: Row = {"status": "done", "objective": None, "iterations": 1, "stopped": False}
        extra = [one["extra_bytes"] for one in memory.values()]
        return {
            "dtype": "float32",
            "sizes": {"T": [short, long], "size": size, "heads": 8, "d_head": 64},
            "ours": {
                "solver": f"attsvm, {name}",
                **shared,
                "gap": gap,
                "seconds": median(seconds[long]),
                "spread": [min(seconds[long]), max(seconds[long])],
            },
            "peer": {
                "solver": "scaled_dot_product_attention with a mask",
                **shared,
                "gap": 0.0,
                "seconds": median(theirs),
                "spread": [min(theirs), max(theirs)],
            },
            "ratio": ratio,
            "seconds": {str(T): median(spent) for T, spent in seconds.items()},
            "memory": memory,
            "checks": [
                at_least("times as long as ours", ratio, pattern.target),
                at_most("time at twice the length, over time", median(seconds[long]) / median(seconds[short]), 2.5),
                at_most("memory at twice the length, over memory", extra[2] / max(extra[1], 1), 2.5),
                at_most("gap", gap, 1e-6),
            ],
        }

    return run


def _in_turns(
    ours: Mapping[int, Callable[[], Tensor]], dense: Callable[[], Tensor], *, rounds: int
) -> tuple[dict[int, list[float]], list[float]]:
    """Wall times of ours at each length, thrice a round, and of the dense kernel, once."""
    seconds: dict[int, list[float]] = {T: [] for T in ours}
    theirs = []
    for _ in range(rounds):
        for _ in range(3):
            for T, work in ours.items():
                seconds[T].append(stopwatch(work)[1])
        theirs.append(stopwatch(dense)[1])
    return seconds, theirs


def _in_child(name: str, T: int, size: int) -> Row:
    """How much a process grows while it attends once."""
    order = json.dumps({"name": name, "T": T, "size": size})
    command = [sys.executable, "-m", "benchmarks.attention", order]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"attention {order}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    answer: Row = json.loads(done.stdout.splitlines()[-1])
    return answer


@torch.no_grad()
def _measured(name: str, T: int, size: int) -> Row:
    pattern = PATTERNS[name]
    # What the first call of a kernel takes for itself does not count.
    pattern.attend(*draw(4 * size), size)
    inputs = draw(T)
    _return_freed()
    _forget_peak()
    before = _resident_bytes()
    pattern.attend(*inputs, size)
    peak = _peak_bytes()
    return {
        "inputs_bytes": sum(x.numel() * x.element_size() for x in inputs),
        "before_bytes": before,
        "peak_bytes": peak,
        "extra_bytes": max(0, peak - before),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_measured(**json.loads(sys.argv[1]))))
