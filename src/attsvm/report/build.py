"""From a run folder to the content of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attsvm.errors import RecordError
from attsvm.records import RunFolder
from attsvm.report.page import (
    Certificate,
    Curves,
    Histogram,
    Page,
    Parameterization,
    Sentence,
    Spectra,
    TokenValues,
)
from attsvm.report.schema import ParameterizationResult, VerifyResult, read_result
from attsvm.report.text import visible, visible_token

__all__ = ["histogram", "read_page", "significant"]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

_BINS = 32
_TOKEN_ARRAYS = ("margins", "trained_margins", "probabilities", "duals", "support")
_ORDER = ("W", "KQ")
_REQUIRED_MARGIN = 1.0


def read_page(path: Path | str) -> Page:
    """Read a run folder of ``attsvm verify``.

    Parameters
    ----------
    path
        The folder; it must hold ``result.json`` and ``arrays.safetensors``.

    Raises
    ------
    RecordError
        If a file is missing or damaged, or the arrays do not fit the sentences.
    """
    folder = RunFolder(path)
    result = read_result(folder)
    arrays = folder.read_arrays()
    _check_shapes(folder, result, arrays)
    return Page(
        **{name: getattr(result, name) for name in _SHARED},
        n_sequences=result.n_sequences if result.n_sequences is not None else len(result.sequences),
        parameterizations=[
            _parameterization(key, result.parameterizations[key], result, arrays)
            for key in _ORDER
            if key in result.parameterizations
        ],
        sentences=_sentences(result, arrays),
        settings=_settings(folder),
    )


_SHARED = (
    *("name", "created", "command", "seed", "commit", "verdict", "versions", "seconds", "data"),
    *("n_queries", "n_constraints", "n_merged", "d_model", "comparison"),
)


def _check_shapes(folder: RunFolder, result: VerifyResult, arrays: Arrays) -> None:
    """Refuse arrays that belong to other sentences; every later step may then index freely."""
    rows = len(result.sequences)
    longest = max((len(sequence.tokens) for sequence in result.sequences), default=0)
    per_token = {"allowed", "scores"} | {f"{key}.{name}" for key in _ORDER for name in _TOKEN_ARRAYS}
    for name, array in arrays.items():
        fits = array.ndim == 2 and array.shape[0] == rows and array.shape[1] >= longest
        if name in per_token and not fits:
            raise RecordError(
                f"{folder.arrays_file}: {name} has shape {array.shape}, but {folder.result_file} has "
                f"{rows} sequences of up to {longest} tokens."
            )
        if name.endswith(".selected") and array.shape != (rows,):
            raise RecordError(f"{folder.arrays_file}: {name} has shape {array.shape}, expected ({rows},).")


def _settings(folder: RunFolder) -> dict[str, str]:
    """Flatten ``config.json``; empty when the run left none."""
    if not folder.config_file.exists():
        return {}
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[visible(prefix)] = visible(str(value))

    walk("", folder.read_config())
    return flat


def significant(array: Array, digits: int = 4) -> Array:
    """Round to significant digits, which keeps the page small; infinities and zeros stay."""
    values = np.asarray(array, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        magnitude = np.where(np.isfinite(values) & (values != 0), np.floor(np.log10(np.abs(values))), 0.0)
    # Powers above 10^300 would overflow; such values are shown as they are.
    exponent = digits - 1 - magnitude
    scale = np.power(10.0, np.clip(np.abs(exponent), 0, 300))
    up, down = np.round(values * scale) / scale, np.round(values / scale) * scale
    rounded: Array = np.where(exponent >= 0, up, down)
    return rounded


def _plain(row: Array) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in row.tolist()]


def _rows(array: Array | None, lengths: list[int]) -> list[list[float | None]]:
    """Cut the padding off each row; None for every token when the array is absent."""
    if array is None:
        return [[None] * length for length in lengths]
    return [_plain(row[:length]) for row, length in zip(significant(array), lengths, strict=True)]


def _sentences(result: VerifyResult, arrays: Arrays) -> list[Sentence]:
    lengths = [len(sequence.tokens) for sequence in result.sequences]
    scores = _rows(arrays.get("scores"), lengths)
    allowed = arrays.get("allowed")
    return [
        Sentence(
            text=sequence.text,
            label=sequence.label,
            tokens=[visible_token(token) for token in sequence.tokens],
            optimal=_position(sequence.optimal, length),
            n_tokens=length if sequence.n_tokens is None else sequence.n_tokens,
            scores=scores[row],
            masked=[] if allowed is None else np.flatnonzero(~allowed[row, :length].astype(bool)).tolist(),
            joined=joined_tokens(sequence.text, sequence.tokens),
        )
        for row, (sequence, length) in enumerate(zip(result.sequences, lengths, strict=True))
    ]


def joined_tokens(text: str, tokens: Sequence[str]) -> list[int]:
    """Positions of the tokens that stand in the text right behind the token before them, with no space between.

    Examples
    --------
    >>> joined_tokens("a monotonous film", ["[CLS]", "a", "mono", "ton", "ous", "film"])
    [3, 4]
    """
    joined, end = [], -1
    for position, token in enumerate(tokens):
        place = text.find(token, max(end, 0)) if token else -1
        if place < 0:
            continue  # special tokens do not stand in the text
        if place == end:
            joined.append(position)
        end = place + len(token)
    return joined


def _position(index: int | None, length: int) -> int | None:
    """Token index, or None when the query asks nothing (recorded as null or -1)."""
    return index if index is not None and 0 <= index < length else None


def _parameterization(
    key: str, record: ParameterizationResult, result: VerifyResult, arrays: Arrays
) -> Parameterization:
    own = {name.removeprefix(f"{key}."): array for name, array in arrays.items() if name.startswith(f"{key}.")}
    names = Parameterization.__dataclass_fields__.keys() & ParameterizationResult.model_fields.keys()
    shared = {name: getattr(record, name) for name in sorted(names - {"ray_sequences"})}
    return Parameterization(
        **shared,
        key=key,
        ray_sequences=[index for index in record.ray_sequences or [] if 0 <= index < len(result.sequences)],
        curves=_curves(record),
        certificate=_certificate(own),
        values=_token_values(record, result, own),
        histogram=histogram(own.get("margins"), own.get("trained_margins")),
        spectra=_spectra(own),
    )


def _curves(record: ParameterizationResult) -> Curves:
    steps = record.steps
    curves = {
        name: (getattr(record, f"{name}_curve") + [None] * len(steps))[: len(steps)]
        for name in ("correlation", "correlation_other", "attention_mass", "norm", "loss")
    }
    return Curves(steps=steps, **curves)


def _token_values(record: ParameterizationResult, result: VerifyResult, own: Arrays) -> list[TokenValues]:
    lengths = [len(sequence.tokens) for sequence in result.sequences]
    named = {name: _rows(own.get(name), lengths) for name in _TOKEN_ARRAYS if name != "support"}
    selected = _selected(record, own, lengths)
    support = own.get("support")
    return [
        TokenValues(
            selected=selected[row],
            **{name: rows[row] for name, rows in named.items()},
            support=[] if support is None else np.flatnonzero(support[row, :length]).tolist(),
            smallest_margin=_smallest(named["margins"][row]),
            smallest_trained_margin=_smallest(named["trained_margins"][row]),
            attention=_at(named["probabilities"][row], selected[row]),
        )
        for row, length in enumerate(lengths)
    ]


def _selected(record: ParameterizationResult, own: Arrays, lengths: list[int]) -> list[int | None]:
    if "selected" in own:
        indices: list[int | None] = own["selected"].tolist()
    else:
        indices = [None if item is None else item.index for item in record.selected]
        indices += [None] * (len(lengths) - len(indices))
    return [_position(index, length) for index, length in zip(indices, lengths, strict=False)]


def _smallest(row: list[float | None]) -> float | None:
    return min((value for value in row if value is not None), default=None)


def _at(row: list[float | None], index: int | None) -> float | None:
    return None if index is None else row[index]


def _certificate(own: Arrays) -> Certificate:
    margins, duals = own.get("margins"), own.get("duals")
    if margins is None:
        return Certificate()
    asked = np.isfinite(margins)
    smallest = float(margins[asked].min()) if asked.any() else None
    if duals is None:
        return Certificate(smallest_margin=smallest)
    active = (duals > 0) & asked
    return Certificate(
        smallest_margin=smallest,
        slackness=float(np.abs(margins[active] - _REQUIRED_MARGIN).max()) if active.any() else None,
        n_positive_duals=int(active.sum()),
        dual_sum=float(duals[active].sum(dtype=np.float64)),
    )


def _spectra(own: Arrays) -> Spectra | None:
    def scaled(name: str) -> list[float]:
        values = own.get(name, np.zeros(0)).astype(np.float64)
        values = np.sort(values[np.isfinite(values)])[::-1]
        return [] if not values.size or values[0] <= 0 else significant(values / values[0]).tolist()

    spectra = Spectra(
        solution=scaled("singular_values"),
        other=scaled("other_singular_values"),
        trained=scaled("trained_singular_values"),
    )
    return spectra if spectra.solution or spectra.other or spectra.trained else None


def _bin_width(span: float) -> float:
    """Round ``span / _BINS`` up to 1, 2 or 5 times a power of ten, so that the margin 1 falls on an edge."""
    raw = max(span, 1e-6) / _BINS
    power = 10.0 ** math.floor(math.log10(raw))
    return next((step * power for step in (1, 2, 5) if step * power >= raw), 10 * power)


def histogram(margins: Array | None, trained: Array | None) -> Histogram | None:
    """Count the margins of the solution and of the trained matrix in common bins.

    Parameters
    ----------
    margins, trained
        (n, T), with +inf where nothing is asked. Either may be absent.

    Returns
    -------
    Histogram or None
        None when there is no margin at all. The bins end at the 99th percentile.
    """
    parts = [np.zeros(0) if part is None else part[np.isfinite(part)].astype(np.float64) for part in (margins, trained)]
    pooled = np.concatenate(parts)
    if not pooled.size:
        return None
    low, high = min(float(pooled.min()), _REQUIRED_MARGIN), max(float(np.quantile(pooled, 0.99)), _REQUIRED_MARGIN)
    width = _bin_width(high - low)
    first = math.floor(low / width + 1e-6)
    bins = max(1, math.ceil(high / width - 1e-6) - first)

    def count(values: Array) -> list[int]:
        # A margin of 1 up to rounding belongs to the bin that starts at 1.
        places = np.floor(values / width + 1e-4).astype(np.int64) - first
        return np.bincount(np.clip(places, 0, bins - 1), minlength=bins).tolist()  # type: ignore[no-any-return]

    return Histogram(
        edges=[round((first + index) * width, 12) for index in range(bins + 1)],
        solution=count(parts[0]),
        trained=count(parts[1]),
        n_solution=parts[0].size,
        n_trained=parts[1].size,
        n_below=int((parts[1] < _REQUIRED_MARGIN - 1e-6).sum()),
        n_overflow=int((pooled > (first + bins) * width * (1 + 1e-9)).sum()),
    )
