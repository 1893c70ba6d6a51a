"""What one attention module leaves of a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.microscope.calls import ModuleInfo
from attsvm.microscope.kinds import KIND_KEYS
from attsvm.microscope.measures import MEASURES
from attsvm.microscope.statistics import RatioMoments

__all__ = ["ModuleSums"]

Array = np.ndarray[Any, Any]


class ModuleSums:
    """The sums of one module: H heads, M measures, V token ids."""

    def __init__(self, info: ModuleInfo) -> None:
        self.H = info.n_heads
        self.moments = RatioMoments.zeros((self.H, len(MEASURES)))
        self.chances = np.zeros((2, self.H, len(KIND_KEYS)))
        self.tokens = np.zeros((self.H, 0), dtype=np.int64)
        self.seen = np.zeros(0, dtype=bool)
        self.open: dict[int, tuple[int, Array, Array]] = {}

    def has_seen(self, windows: Array) -> bool:
        """Whether one of these windows was measured."""
        return bool(self.seen[windows[windows < self.seen.size]].any())

    def see(self, windows: tuple[int, ...], limit: int | None) -> None:
        """Remember windows, and refuse those that were there."""
        given = np.array(windows, dtype=np.int64)
        if limit is not None and (given >= limit).any():
            raise InvalidInputError(
                f"add: windows must be below {limit}, the number of texts given, got {given.max()}."
            )
        if self.has_seen(given) or np.unique(given).size < given.size:
            raise InvalidInputError("add: windows must be new to the module, got one a second time.")
        self._grow(int(given.max()) + 1)
        self.seen[given] = True

    def _grow(self, size: int) -> None:
        if size > self.seen.size:
            self.seen = np.concatenate([self.seen, np.zeros(max(size, 2 * self.seen.size) - self.seen.size, bool)])

    def widen(self, columns: int) -> None:
        """Make room for the counts of more ids."""
        if columns > self.tokens.shape[1]:
            more = max(columns, 2 * self.tokens.shape[1]) - self.tokens.shape[1]
            self.tokens = np.concatenate([self.tokens, np.zeros((self.H, more), dtype=np.int64)], 1)

    def count(self, selected: Tensor, columns: Tensor) -> None:
        """Count the selected tokens (B, H, R); columns (B, Tk)."""
        if not columns.numel():
            return
        B, H, _ = selected.shape
        own = columns[:, None].expand(B, H, -1).gather(-1, selected.clamp(min=0))
        heads = torch.arange(H)[None, :, None].expand_as(own)
        taken = (selected >= 0) & (own >= 0)
        V = self.tokens.shape[1]
        flat = (heads * V + own)[taken].numpy()
        self.tokens += np.bincount(flat, minlength=H * V).reshape(H, V)

    def add_chance(self, chance: Tensor, asking: Tensor) -> None:
        """Chance levels (7, B, H, R) of single queries, NaN for none."""
        level = chance.masked_fill(~asking[:, None], torch.nan)
        self.chances[0] += level.nansum((1, 3)).T.cpu().numpy()
        self.chances[1] += (~level.isnan()).sum((1, 3)).T.cpu().numpy()

    def put(self, text: int, windows: int, y: Array, n: Array, complete: int) -> None:
        """Add windows of a text that has several."""
        count, old_y, old_n = self.open.pop(text, (0, np.zeros_like(y), np.zeros_like(n)))
        count, y, n = count + windows, old_y + y, old_n + n
        if count == complete:
            self.moments.add(y[None], n[None])
        else:
            self.open[text] = (count, y, n)

    def merge(self, other: ModuleSums, to: Array, complete: Mapping[int, int]) -> None:
        """Add other windows; ``to`` says which column here each of its columns is, ``complete`` is windows by text."""
        self.moments.sums += other.moments.sums
        self.chances += other.chances
        known = min(to.size, other.tokens.shape[1])
        self.tokens[:, to[:known]] += other.tokens[:, :known]
        self._grow(other.seen.size)
        self.seen[: other.seen.size] |= other.seen
        for text, (count, y, n) in other.open.items():
            self.put(text, count, y, n, complete[text])

    def all_moments(self) -> RatioMoments:
        """Moments with the texts that are not complete."""
        moments = RatioMoments(self.moments.sums.copy())
        for _, y, n in self.open.values():
            moments.add(y[None], n[None])
        return moments

    def arrays(self, columns: int) -> dict[str, Array]:
        """Everything, with the counts of so many ids."""
        texts = sorted(self.open)
        empty = np.zeros((0, self.H, len(MEASURES)))
        return {
            "moments": self.moments.sums,
            "chances": self.chances,
            "tokens": self.tokens[:, :columns].copy(),
            "seen": self.seen.astype(np.uint8),
            "open": np.array([(text, self.open[text][0]) for text in texts], dtype=np.int64).reshape(-1, 2),
            "open_y": np.stack([self.open[text][1] for text in texts]) if texts else empty,
            "open_n": np.stack([self.open[text][2] for text in texts]) if texts else empty,
        }

    @classmethod
    def from_arrays(cls, info: ModuleInfo, arrays: Mapping[str, Array], prefix: str) -> ModuleSums:
        """What :meth:`arrays` gave, under a prefix."""
        new = cls(info)
        new.moments = RatioMoments(arrays[f"{prefix}moments"].copy())
        new.chances = arrays[f"{prefix}chances"].copy()
        new.tokens = arrays[f"{prefix}tokens"].copy()
        new.seen = arrays[f"{prefix}seen"].astype(bool)
        for (text, count), y, n in zip(
            arrays[f"{prefix}open"].tolist(), arrays[f"{prefix}open_y"], arrays[f"{prefix}open_n"], strict=True
        ):
            new.open[text] = (count, y.copy(), n.copy())
        return new
