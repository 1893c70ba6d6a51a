"""Measures of all heads over a corpus, from calls that come one batch after another.

Nothing is kept but sums: for each head and measure six numbers over the texts that are complete, the sums of texts of
which some window is still to come, and how often each token was selected. Blocks of logits are made a few rows at a
time, so that no more than :data:`BLOCK_BYTES` of them live at once (or those of one row, where that is more).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attsvm.errors import InvalidInputError, RecordError
from attsvm.microscope.calls import AttentionCall, ModuleInfo
from attsvm.microscope.kinds import KIND_KEYS, Pairs, Places, kind_mass, kind_pairs, places_of
from attsvm.microscope.measures import MEASURES, NOTHING, measure_rows
from attsvm.microscope.module_sums import ModuleSums
from attsvm.microscope.statistics import Estimate
from attsvm.microscope.windows import Batch

__all__ = ["BLOCK_BYTES", "Accumulator"]

Array = np.ndarray[Any, Any]

BLOCK_BYTES = 4 * 2**20
"""Logits of this size are reduced at once: few enough to stay near the processor, many enough to be worth a call."""

_MOST_PAIRS = 2**20
"""Pairs of queries and keys that are kept from one module to the next of a batch."""

_FIRST, _SEPARATOR = KIND_KEYS.index("first"), KIND_KEYS.index("separator")
_LARGEST = np.array([np.inf if entry.largest is None else entry.largest for entry in MEASURES])


class Accumulator:
    """Running sums of all measures.

    The order of the calls and the way in which windows share batches change results by rounding only.

    Parameters
    ----------
    modules
        Modules that will call.
    special
        ``"keep"``: special tokens are queries and keys as any other. ``"drop"``: they are neither, and weights are
        taken in proportion over the rest.
    texts
        The text that each window of the corpus is from; intervals take texts as the sample. None: each window is a
        text.
    separators
        Ids that count as separators though they are not special.
    """

    def __init__(
        self,
        modules: Sequence[ModuleInfo],
        *,
        special: str = "keep",
        texts: Sequence[int] | None = None,
        separators: Collection[int] = (),
    ) -> None:
        if special not in ("keep", "drop"):
            raise InvalidInputError(f"Accumulator: special must be 'keep' or 'drop', got {special!r}.")
        self.modules = tuple(modules)
        self.special = special
        self.texts = None if texts is None else tuple(texts)
        self.separators = frozenset(separators)
        self._windows_of = Counter(self.texts or ())
        self._sums = {info.name: ModuleSums(info) for info in self.modules}
        self._columns: dict[int, int] = {}
        self._glance: _Glance | None = None

    def add(self, call: AttentionCall, batch: Batch) -> None:
        """Measure one module on one batch.

        Parameters
        ----------
        call
            What the module computed. Not modified.
        batch
            The windows it was computed for.

        Raises
        ------
        InvalidInputError
            If the module is unknown, the sizes of call and batch differ, or a window was measured before.
        """
        info = call.info
        sums = self._sums.get(info.name)
        if sums is None:
            raise InvalidInputError(f"add: call must be of a module given at the start, got {info.name}.")
        call = _ready(call)
        if self._glance is None or not self._glance.serves(batch, call.q.device):
            self._glance = _Glance(batch, call.q.device, self.special, self.separators)
        places = self._glance.places(info)
        _check_sizes(call, places, batch)
        sums.see(batch.windows, None if self.texts is None else len(self.texts))
        columns = self._glance.columns(info, self._columns)
        sums.widen(len(self._columns))
        y = np.zeros((len(batch.windows), info.n_heads, len(MEASURES)))
        n = np.zeros_like(y)
        for rows in _row_blocks(call):
            values, chance, selected = _measure_block(call, places, self._glance.pairs(info, rows), rows)
            _sum_up(values, places.asking[:, rows], y, n)
            sums.add_chance(chance, places.asking[:, rows])
            sums.count(selected, columns)
        self._close(sums, batch.windows, y, n)

    def _close(self, sums: ModuleSums, windows: tuple[int, ...], y: Array, n: Array) -> None:
        """Windows that are whole texts go to the moments at once, others when the text is complete."""
        texts = windows if self.texts is None else [self.texts[window] for window in windows]
        whole = np.array([self.texts is None or self._windows_of[text] == 1 for text in texts], dtype=bool)
        sums.moments.add(y[whole], n[whole])
        for place in np.flatnonzero(~whole):
            text = texts[place]
            sums.put(text, 1, y[place], n[place], self._windows_of[text])

    def merge(self, other: Accumulator) -> None:
        """Add what another accumulator measured on other windows of the same corpus.

        Parameters
        ----------
        other
            Made with the same arguments. Not modified.

        Raises
        ------
        InvalidInputError
            If it was made with others, or both have measured the same window.
        """
        if self._header() != other._header():
            raise InvalidInputError("merge: other must have the same modules, texts, separators and special.")
        for name, theirs in other._sums.items():
            if self._sums[name].has_seen(np.flatnonzero(theirs.seen)):
                raise InvalidInputError(f"merge: other must hold other windows, got one twice in {name}.")
        for token in other._columns:
            self._columns.setdefault(token, len(self._columns))
        to = np.array([self._columns[token] for token in other._columns], dtype=np.int64)
        for name, theirs in other._sums.items():
            mine = self._sums[name]
            mine.widen(len(self._columns))
            mine.merge(theirs, to, self._windows_of)

    def finish(self) -> dict[str, dict[str, Estimate | None]]:
        """Estimates of every measure of every head; None where no query defines it.

        More windows may be added afterwards. Texts of which windows are missing count with what is there.

        Returns
        -------
        dict
            By label of the head and key of the measure.
        """
        found: dict[str, dict[str, Estimate | None]] = {}
        for info in self.modules:
            columns = self._sums[info.name].all_moments().estimates(_LARGEST)
            for head, label in enumerate(info.labels):
                found[label] = {
                    entry.key: _estimate(*(float(column[head, at]) for column in columns))
                    for at, entry in enumerate(MEASURES)
                }
        return found

    def chance(self) -> dict[str, dict[str, float | None]]:
        """Chance level of each kind, by label of the head: what uniform attention of the same queries would score."""
        found: dict[str, dict[str, float | None]] = {}
        for info in self.modules:
            total, n = self._sums[info.name].chances
            for head, label in enumerate(info.labels):
                found[label] = {
                    kind: float(total[head, at] / n[head, at]) if n[head, at] else None
                    for at, kind in enumerate(KIND_KEYS)
                }
        return found

    def top_tokens(self, most: int = 10) -> dict[str, list[tuple[int, float]]]:
        """Token ids that each head selects most often, with their shares of the queries that select a token.

        Parameters
        ----------
        most
            How many; the smaller id comes first among equals.
        """
        ids = np.array(list(self._columns), dtype=np.int64)
        found: dict[str, list[tuple[int, float]]] = {}
        for info in self.modules:
            counts = self._sums[info.name].tokens[:, : len(ids)]
            # Modules that look at another text have not seen the ids that came last.
            seen = ids[: counts.shape[1]]
            for head, label in enumerate(info.labels):
                order = np.lexsort((seen, -counts[head]))[:most]
                total = max(int(counts[head].sum()), 1)
                found[label] = [(int(ids[at]), float(counts[head, at] / total)) for at in order if counts[head, at]]
        return found

    def arrays(self) -> dict[str, Array]:
        """Everything as arrays, from which :meth:`from_arrays` goes on."""
        arrays: dict[str, Array] = {
            "header": np.frombuffer(self._header(), dtype=np.uint8).copy(),
            "ids": np.array(list(self._columns), dtype=np.int64),
        }
        for number, info in enumerate(self.modules):
            parts = self._sums[info.name].arrays(len(self._columns))
            arrays |= {f"{number}.{key}": value for key, value in parts.items()}
        return arrays

    @classmethod
    def from_arrays(
        cls,
        modules: Sequence[ModuleInfo],
        arrays: Mapping[str, Array],
        *,
        special: str = "keep",
        texts: Sequence[int] | None = None,
        separators: Collection[int] = (),
    ) -> Accumulator:
        """Take up what :meth:`arrays` gave.

        Parameters
        ----------
        modules
            As they were.
        arrays
            From :meth:`arrays`.
        special, texts, separators
            As they were.

        Raises
        ------
        RecordError
            If the arrays are of other arguments, or incomplete.
        """
        new = cls(modules, special=special, texts=texts, separators=separators)
        if "header" not in arrays or arrays["header"].tobytes() != new._header():
            raise RecordError("from_arrays: arrays must be of the same modules, texts, separators and special.")
        try:
            new._columns = {int(token): at for at, token in enumerate(arrays["ids"])}
            for number, info in enumerate(new.modules):
                new._sums[info.name] = ModuleSums.from_arrays(info, arrays, f"{number}.")
        except KeyError as error:
            raise RecordError(f"from_arrays: arrays must be complete, got none named {error}.") from error
        return new

    def _header(self) -> bytes:
        """What must be equal for sums to be added up."""
        return json.dumps(
            {
                "modules": [(info.name, info.n_heads) for info in self.modules],
                "measures": [entry.key for entry in MEASURES],
                "special": self.special,
                "separators": sorted(self.separators),
                "texts": self.texts,
            }
        ).encode()


class _Glance:
    """What all modules of a forward have in common: places, pairs and columns of one batch."""

    def __init__(self, batch: Batch, device: torch.device, special: str, separators: Collection[int]) -> None:
        self.special, self.separators = special, separators
        self._batch, self._device = batch, device
        self._here = replace(
            batch,
            ids={side: value.to(device) for side, value in batch.ids.items()},
            real={side: value.to(device) for side, value in batch.real.items()},
            special={side: value.to(device) for side, value in batch.special.items()},
        )
        self._places: dict[tuple[Any, ...], Places] = {}
        self._pairs: dict[tuple[Any, ...], Pairs] = {}
        self._columns: dict[str, Tensor] = {}

    def serves(self, batch: Batch, device: torch.device) -> bool:
        return self._batch is batch and self._device == device

    def places(self, info: ModuleInfo) -> Places:
        key = _sides(info)
        if key not in self._places:
            self._places[key] = places_of(self._here, info, special=self.special, separators=self.separators)
        return self._places[key]

    def pairs(self, info: ModuleInfo, rows: slice) -> Pairs:
        key = (*_sides(info), rows.start, rows.stop)
        if key in self._pairs:
            return self._pairs[key]
        pairs = kind_pairs(self.places(info), rows)
        if sum(len(kept.kind) for kept in self._pairs.values()) + len(pairs.kind) <= _MOST_PAIRS:
            self._pairs[key] = pairs
        return pairs

    def columns(self, info: ModuleInfo, known: dict[int, int]) -> Tensor:
        """(B, Tk): column of each key's id among the counts, -1 for padding; new ids get new columns."""
        if info.key_side not in self._columns:
            ids, inverse = torch.unique(self._batch.ids[info.key_side].cpu(), return_inverse=True)
            own = [known.setdefault(token, len(known)) if token >= 0 else -1 for token in ids.tolist()]
            self._columns[info.key_side] = torch.tensor(own, dtype=torch.int64)[inverse]
        return self._columns[info.key_side]


def _sides(info: ModuleInfo) -> tuple[str, str, bool]:
    return info.query_side, info.key_side, info.kind == "decoder"


def _row_blocks(call: AttentionCall) -> Iterator[slice]:
    """Ranges of queries whose logits fit into :data:`BLOCK_BYTES`."""
    source = call.given if call.given is not None else call.q
    row = source.shape[0] * call.info.n_heads * max(call.key_length, 1) * max(source.element_size(), 4)
    step = max(1, BLOCK_BYTES // row)
    for start in range(0, call.query_length, step):
        yield slice(start, min(start + step, call.query_length))


def _ready(call: AttentionCall) -> AttentionCall:
    """The same call with a key of its own for each query head, so that no block copies them again.

    Devices other than CUDA's may lack float64 or sorting: from them it comes to the processor.
    """
    source = call.q if call.given is None else call.given
    device = source.device if source.device.type == "cuda" else torch.device("cpu")
    names = ("mask", "offsets", "sinks", "given")
    parts = {name: value.to(device) for name in names if (value := getattr(call, name)) is not None}
    if call.given is not None:
        return replace(call, q=call.q.to(device), k=call.k.to(device), **parts)
    info = replace(call.info, n_kv_heads=call.info.n_heads)
    k = call.k.to(device, torch.promote_types(call.k.dtype, torch.float32))
    k = k.repeat_interleave(call.info.n_heads // call.info.n_kv_heads, dim=1)
    return replace(call, info=info, q=call.q.to(device), k=k.contiguous(), **parts)


def _check_sizes(call: AttentionCall, places: Places, batch: Batch) -> None:
    expected = (len(batch.windows), places.asking.shape[1], places.kept.shape[1])
    got = ((call.given if call.given is not None else call.q).shape[0], call.query_length, call.key_length)
    if expected != got:
        raise InvalidInputError(
            f"add: call of {call.info.name} must have (windows, queries, keys) {expected} as the batch, got {got}."
        )


def _measure_block(call: AttentionCall, places: Places, pairs: Pairs, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Measures (M, B, H, R), chance levels (7, B, H, R) and selected keys (B, H, R) of some queries.

    Rows that are no queries of the text are computed along, and left out by whoever sums.
    """
    logits = call.logits(rows)
    kept = places.kept[:, None, None, :]
    if not bool(kept.all()):
        logits.masked_fill_(~kept, -torch.inf)
    query_places, key_places = (places.queries[:, rows], places.keys) if places.own else (None, None)
    try:
        found = measure_rows(logits, call.sinks, query_places=query_places, key_places=key_places)
    except InvalidInputError as error:
        raise InvalidInputError(f"{call.info.name}: {error}") from error
    alive = found.n_keys > 0
    allowed, n_keys = logits, found.n_keys
    if call.given is not None:
        # A weight that was rounded to 0 still belongs to a key that may be attended.
        before = places.keys[:, None, None, :] <= places.queries[:, None, rows, None]
        allowed = ((kept & before) if places.causal else kept).expand_as(logits)
        n_keys = allowed.sum(-1) * alive
    kinds = kind_mass(pairs, found.weights, allowed, n_keys)
    sink_mass = kinds.mass[_FIRST] if found.sink is None else kinds.mass[_FIRST] + found.sink
    masses = torch.stack([sink_mass, kinds.mass[_SEPARATOR]]).masked_fill(~alive, torch.nan)
    of_kinds = kinds.mass.masked_fill(kinds.chance.isnan(), torch.nan)
    selected = found.selected.masked_fill(~places.asking[:, None, rows], NOTHING)
    return torch.cat([found.values.to(masses), masses, of_kinds]), kinds.chance, selected.cpu()


def _sum_up(values: Tensor, asking: Tensor, y: Array, n: Array) -> None:
    """Add rows of values (M, B, H, R) to the sums (B, H, M) of their windows."""
    values = values.masked_fill(~asking[:, None], torch.nan)
    y += values.nansum(-1).permute(1, 2, 0).cpu().numpy()
    n += (~values.isnan()).sum(-1).permute(1, 2, 0).cpu().numpy()


def _estimate(mean: float, low: float, high: float, n: float) -> Estimate | None:
    if n == 0:
        return None
    one_text = low != low
    return Estimate(mean=mean, low=None if one_text else low, high=None if one_text else high, n=int(n))
