"""The two passes over the texts: one measures every head on all of them, one keeps the sampled windows."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attsvm.microscope.accumulate import Accumulator
from attsvm.microscope.calls import AttentionCall, ModuleInfo, Side
from attsvm.microscope.capture import captured
from attsvm.microscope.listening import evaluating
from attsvm.microscope.loading import Loaded
from attsvm.microscope.plan import SamplePlan
from attsvm.microscope.sampled import HELD_OUT, SHOWN, TRAIN, SampleCollector
from attsvm.microscope.windows import Batch, Corpus, PaddingSide, Special, batches
from attsvm.records import read_arrays, write_arrays

__all__ = ["measure", "sample", "shown_arrays"]

Array = npt.NDArray[Any]
Tell = Callable[[float, float], None]

CHECKPOINT_SECONDS = 15.0


def measure(
    loaded: Loaded,
    corpus: Corpus,
    modules: Collection[ModuleInfo],
    *,
    batch_size: int,
    special: Special,
    checkpoint: Path,
    tell: Tell,
    padding_side: PaddingSide | None = None,
) -> Accumulator:
    """Run all windows and reduce every module's attention as it is computed.

    Parameters
    ----------
    loaded
        Model and tokenizer.
    corpus
        The texts, in windows.
    modules
        Which modules to measure.
    batch_size
        Windows that run at once.
    special
        ``"keep"`` or ``"drop"`` special tokens.
    checkpoint
        File that keeps the sums so far; a pass that was interrupted goes on from it.
    tell
        Called with windows done and their number.
    padding_side
        ``"left"`` or ``"right"``; default what the tokenizer says.
    """
    texts = [window.text for window in corpus.windows]
    sums = Accumulator(list(modules), special=special, texts=texts)
    done = 0
    if checkpoint.exists():
        arrays = read_arrays(checkpoint)
        done = int(arrays.pop("windows_done")[0])
        sums = Accumulator.from_arrays(list(modules), arrays, special=special, texts=texts)
    saved = time.monotonic()
    seen, total = 0, len(corpus.windows)
    with _Listening(loaded, {info.name for info in modules}) as listening:
        for batch in batches(loaded, corpus, range(total), batch_size=batch_size, padding_side=padding_side):
            seen += len(batch.windows)
            if seen <= done:
                continue
            listening.run(batch, sums.add)
            tell(seen, total)
            if time.monotonic() - saved > CHECKPOINT_SECONDS and seen < total:
                write_arrays(checkpoint, {**sums.arrays(), "windows_done": np.array([seen])})
                saved = time.monotonic()
    write_arrays(checkpoint, {**sums.arrays(), "windows_done": np.array([seen])})
    return sums


def sample(
    loaded: Loaded,
    corpus: Corpus,
    plan: SamplePlan,
    modules: dict[int, ModuleInfo],
    *,
    special: Special,
    folder: Path,
    tell: Tell,
) -> None:
    """Run the sampled windows one by one, and write what they leave of each module.

    A window that runs alone gives the same numbers whatever else is in the corpus and however it is batched.

    Parameters
    ----------
    loaded
        Model and tokenizer.
    corpus
        The texts, in windows.
    plan
        Which windows and queries.
    modules
        The modules to keep, by their index.
    special
        ``"keep"`` or ``"drop"`` special tokens.
    folder
        Gets ``<index>.safetensors`` of every module and ``shown.safetensors``, which comes last.
    tell
        Called with windows done and their number.
    """
    collectors = {info.name: SampleCollector(info) for info in modules.values()}
    index_of = {info.name: index for index, info in modules.items()}
    shown: dict[str, Array] = {}
    with _Listening(loaded, set(collectors), inputs_too=True) as listening:
        for number, window in enumerate(plan.windows):
            (batch,) = batches(loaded, corpus, [window], batch_size=1)
            place = plan.shown.index(window) if window in plan.shown else None

            def keep(call: AttentionCall, batch: Batch, window: int = window, place: int | None = place) -> None:
                info = call.info
                keys = _usable(batch, info.key_side, special)
                positions, parts = _positions(plan, info, window, _usable(batch, info.query_side, special), place)
                collectors[info.name].add(call, positions, parts, keys)
                if place is not None:
                    shown.update(shown_arrays(call, f"shown.{place}.{index_of[info.name]}"))

            listening.run(batch, keep)
            tell(number + 1, len(plan.windows))
    for name, collector in collectors.items():
        collector.finish().save(folder / f"{index_of[name]}.safetensors")
    write_arrays(folder / "shown.safetensors", shown)


class _Listening:
    """The model with its attention captured for many forward passes; opening that anew for each would cost more."""

    def __init__(self, loaded: Loaded, names: Collection[str], *, inputs_too: bool = False) -> None:
        self._loaded = loaded
        self._on_call: Callable[[AttentionCall], None] | None = None
        self._stack = ExitStack()
        self._capture = captured(loaded.model, self._heard, modules=names, inputs_too=inputs_too)

    def __enter__(self) -> _Listening:
        self._stack.enter_context(torch.inference_mode())
        self._stack.enter_context(evaluating(self._loaded.model))
        self._stack.enter_context(self._capture)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _heard(self, call: AttentionCall) -> None:
        assert self._on_call is not None
        self._on_call(call)

    def run(self, batch: Batch, on_call: Callable[[AttentionCall, Batch], None]) -> None:
        """One forward pass."""
        self._on_call = lambda call: on_call(call, batch)
        self._loaded.model(**batch.inputs)


def _usable(batch: Batch, side: Side, special: Special) -> torch.Tensor:
    """(T,) tokens of the one window that are queries and keys."""
    real = batch.real[side][0]
    return real & ~batch.special[side][0] if special == "drop" else real


def _positions(
    plan: SamplePlan, info: ModuleInfo, window: int, usable: torch.Tensor, place: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled query positions of a window with their parts; of a shown window all, so that its twin can be drawn."""
    parts = {position: TRAIN for where, position in plan.train.get(info.query_side, ()) if where == window}
    parts |= {position: HELD_OUT for where, position in plan.heldout.get(info.query_side, ()) if where == window}
    if place is not None:
        parts = {position: parts.get(position, SHOWN) for position in range(len(usable))}
    kept = sorted(position for position in parts if bool(usable[position]))
    return torch.tensor(kept, dtype=torch.int64), torch.tensor([parts[p] for p in kept], dtype=torch.int64)


def shown_arrays(call: AttentionCall, prefix: str) -> dict[str, Array]:
    """What the page draws of one module and window: weights in eight bits, selected keys, margins.

    A weight p is kept as the nearest integer to ``255 sqrt(p)``, so that small weights survive. A sink of the model is
    one more key: a query that gives it most selects no token, and margins are to it, too.

    Parameters
    ----------
    call
        Of a batch of one.
    prefix
        Beginning of the names.
    """
    weights = call.weights()[0]
    logits = call.logits()[0]
    n_keys = logits.shape[-1]
    pattern = (255.0 * weights.sqrt()).round().to(torch.uint8)
    if call.sinks is not None:
        logits = torch.cat([logits, call.sinks.to(logits)[:, None, None].expand(*logits.shape[:-1], 1)], -1)
    best = logits.topk(min(2, logits.shape[-1]), -1)
    on_key = torch.isfinite(best.values[..., 0]) & (best.indices[..., 0] < n_keys)
    selected = torch.where(on_key, best.indices[..., 0], -1).int()
    margin = best.values[..., 0] - best.values[..., 1] if logits.shape[-1] > 1 else torch.inf - 0.0 * logits[..., 0]
    margin = torch.where(torch.isfinite(margin), margin, torch.inf).float()
    found = {"pattern": pattern, "selected": selected, "margin": margin}
    return {f"{prefix}.{name}": value.cpu().numpy() for name, value in found.items()}
