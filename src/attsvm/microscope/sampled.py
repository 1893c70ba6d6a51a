"""What the sampled windows leave of one attention module: enough to pose every head of it as a problem."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attsvm.errors import RecordError
from attsvm.microscope.calls import AttentionCall, ModuleInfo
from attsvm.records import read_arrays, write_arrays

__all__ = ["HELD_OUT", "SHOWN", "TRAIN", "ModuleSample", "SampleCollector"]

Array = npt.NDArray[Any]

TRAIN, HELD_OUT, SHOWN = 0, 1, 2
"""Parts of the sample: queries that pose the problem, that judge its solution, and that are only looked at."""


@dataclass(frozen=True, kw_only=True)
class ModuleSample:
    """Keys of all sampled windows, one after another, and the sampled queries.

    N sampled queries, S keys in all windows together, T keys in the longest window.

    Attributes
    ----------
    info
        The module.
    k
        (n_kv_heads, S, d_head) float32.
    q
        (H, N, d_head) float32.
    start
        (windows + 1,): keys of window w are ``start[w]`` to ``start[w + 1]``.
    window, position, part
        (N,): the window of a query, counted within the sample; its position there; :data:`TRAIN`,
        :data:`HELD_OUT` or :data:`SHOWN`.
    allowed
        (1 or H, N, T) booleans.
    offsets
        (1 or H, N, T) float32, or None.
    sinks
        (H,) or None.
    key_input, query_input
        (S, d), (N, d): what the projections were given; None where the module does not tell.
    scale, softcap
        As in :class:`~attsvm.microscope.calls.AttentionCall`.
    """

    info: ModuleInfo
    k: Array
    q: Array
    start: Array
    window: Array
    position: Array
    part: Array
    allowed: Array
    offsets: Array | None = None
    sinks: Array | None = None
    key_input: Array | None = None
    query_input: Array | None = None
    scale: float = 1.0
    softcap: float | None = None

    def save(self, path: Path) -> None:
        """Write the arrays to a safetensors file, in one step."""
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        arrays["scale"] = np.array([self.scale, np.nan if self.softcap is None else self.softcap])
        write_arrays(path, arrays)

    @classmethod
    def load(cls, path: Path, info: ModuleInfo) -> ModuleSample:
        """Read what :meth:`save` wrote.

        Raises
        ------
        RecordError
            If the file is damaged or of another module.
        """
        arrays = read_arrays(path)
        missing = {"k", "q", "start", "window", "position", "part", "allowed", "scale"} - arrays.keys()
        if missing or arrays["q"].shape[0] != info.n_heads:
            raise RecordError(f"{path} is not the sample of {info.name}.")
        scale, softcap = arrays.pop("scale").tolist()
        return cls(info=info, **arrays, scale=scale, softcap=None if np.isnan(softcap) else softcap)


_ARRAYS = (
    *("k", "q", "start", "window", "position", "part", "allowed"),
    *("offsets", "sinks", "key_input", "query_input"),
)


class SampleCollector:
    """Gathers the sample of one module, window by window.

    Parameters
    ----------
    info
        The module.
    """

    def __init__(self, info: ModuleInfo) -> None:
        self.info = info
        self._rows: dict[str, list[Tensor]] = {name: [] for name in _GATHERED}
        self._lengths: list[int] = []
        self._last: AttentionCall | None = None

    def add(self, call: AttentionCall, positions: Tensor, parts: Tensor, keys: Tensor) -> None:
        """Take one window, which was run alone.

        Parameters
        ----------
        call
            Of a batch of one.
        positions
            (N,) sampled query positions.
        parts
            (N,): the part of each.
        keys
            (Tk,) booleans: keys that may be attended at all; padding and dropped special tokens are False.
        """
        H, T = self.info.n_heads, call.key_length
        allowed = keys.expand(1, 1, len(positions), T)
        if call.mask is not None:
            whole = call.mask[(None,) * (4 - call.mask.ndim)].expand(1, call.mask.shape[-3], call.query_length, T)
            allowed = whole[:, :, positions] & keys
        gathered = {
            "k": call.k[0],
            "q": call.q[0][:, positions],
            "position": positions,
            "part": parts,
            "window": torch.full_like(positions, len(self._lengths)),
            "allowed": allowed[0],
        }
        if call.offsets is not None:
            offsets = call.offsets[(None,) * (4 - call.offsets.ndim)]
            gathered["offsets"] = offsets.expand(1, offsets.shape[1], call.query_length, T)[0][:, positions]
        if call.key_input is not None and call.query_input is not None:
            gathered |= {"key_input": call.key_input[0], "query_input": call.query_input[0][positions]}
        assert all(part.shape[0] in (1, H, self.info.n_kv_heads) for part in (gathered["k"], gathered["allowed"]))
        for name, value in gathered.items():
            self._rows[name].append(value.detach().cpu().clone())
        self._lengths.append(T)
        self._last = call

    def finish(self) -> ModuleSample:
        """The sample, with the rows of all windows padded to the longest."""
        assert self._last is not None
        longest = max(self._lengths)
        made: dict[str, Any] = {}
        for name, rows in self._rows.items():
            if not rows:
                continue
            if name in ("allowed", "offsets"):
                heads = max(part.shape[0] for part in rows)
                rows = [_padded(part, heads, longest) for part in rows]
            joined = torch.cat(rows, dim=0 if rows[0].ndim == 1 or name.endswith("_input") else 1)
            made[name] = (joined.float() if joined.is_floating_point() else joined).numpy()
        sinks = self._last.sinks
        return ModuleSample(
            info=self.info,
            **made,
            start=np.concatenate([[0], np.cumsum(self._lengths)]),
            sinks=None if sinks is None else sinks.detach().float().cpu().numpy(),
            scale=self._last.scale,
            softcap=self._last.softcap,
        )


_GATHERED = ("k", "q", "position", "part", "window", "allowed", "offsets", "key_input", "query_input")


def _padded(part: Tensor, heads: int, length: int) -> Tensor:
    """(1 or H, N, T) with all heads where any window has them, and rows as long as the longest window's."""
    return torch.nn.functional.pad(part.expand(heads, *part.shape[1:]), (0, length - part.shape[-1]))
