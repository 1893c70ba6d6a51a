"""The data that the commands are run on, in every format, and what their records are compared by."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from cli.commands import strict_json

ROWS = (
    ("A warm, funny film that never drags.", "good"),
    ("Dull from the first scene to the last.", "bad"),
    ("The cast is superb and the story moves.", "good"),
    ("Nothing here works; a waste of time!", "bad"),
    ("I laughed, I cried, I want to see it again.", "good"),
    ("Flat jokes, flat acting, flat ending.", "bad"),
    ("Beautiful pictures and a clever plot", "good"),
    ("The plot makes no sense at all", "bad"),
)

FAST = ("--model", "none", "--d-model", "16", "--steps", "60")
"""Options under which a run takes a fraction of a second."""


def write_csv(path: Path, rows: Sequence[Sequence[Any]] = ROWS, columns: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([columns, *rows])
    return path


def write_tsv(path: Path) -> Path:
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Sequence[Sequence[Any]] = ROWS) -> Path:
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_parquet(path: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    texts, labels = zip(*ROWS, strict=True)
    parquet.write_table(pyarrow.table({"text": list(texts), "label": list(labels)}), path)
    return path


def some_arrays() -> dict[str, np.ndarray]:
    """Six sequences of five tokens in seven dimensions; the last token of the last one is padding."""
    rng = np.random.default_rng(3)
    allowed = np.ones((6, 5), dtype=bool)
    allowed[-1, -1] = False
    return {
        "X": rng.standard_normal((6, 5, 7)),
        "z": rng.standard_normal((6, 7)),
        "y": np.array([1, -1, 1, -1, 1, -1]),
        "allowed": allowed,
    }


def write_npz(path: Path, **changes: Any) -> Path:
    np.savez(path, **{key: value for key, value in {**some_arrays(), **changes}.items() if value is not None})
    return path


def write_safetensors(path: Path) -> Path:
    save_file(some_arrays(), path)
    return path


def result_at(run: Path) -> dict[str, Any]:
    """``result.json`` of a run, which must be strict JSON."""
    result: dict[str, Any] = strict_json((run / "result.json").read_text(encoding="utf-8"))
    return result


def arrays_at(run: Path) -> dict[str, np.ndarray]:
    """All arrays of a run."""
    arrays: dict[str, np.ndarray] = load_file(run / "arrays.safetensors")
    return arrays


def lasting(record: Any) -> Any:
    """A record without what depends on when, where and by which command it was made."""
    if isinstance(record, dict):
        passing = {"created", "seconds", "solve_seconds", "command", "name", "run", "source"}
        return {key: lasting(value) for key, value in record.items() if key not in passing}
    return [lasting(item) for item in record] if isinstance(record, list) else record


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs left the same numbers to the last bit."""
    assert lasting(result_at(one)) == lasting(result_at(other))
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    first, second = arrays_at(one), arrays_at(other)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype, name
        assert array.tobytes() == second[name].tobytes(), name
