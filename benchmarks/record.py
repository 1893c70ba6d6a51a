"""The record of the rows: one JSON file that is written anew after every row, and what is printed of it."""

from __future__ import annotations

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Row", "kept", "load", "markdown", "table"]

Row = dict[str, Any]
"""Name, sizes, ``ours`` and ``peer`` (objective, gap, seconds, iterations, ...), their ratio, and ``checks``."""

PACKAGES = ("torch", "numpy", "numba", "scikit-learn", "cvxpy", "clarabel", "osqp", "scs", "piqp", "transformers")


def conditions(*, quick: bool, dtype: str = "float64", threads: int = 1) -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "threads": threads,
        "dtype": dtype,
        "device": "cpu",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "quick": quick,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def load(path: Path) -> list[Row]:
    """The rows of a record; none where there is no file."""
    if not path.exists():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def kept(path: Path, row: Row, order: list[str], *, quick: bool) -> Row:
    """Put a row into the record in place of an earlier one of that name; other rows stay. Returns it as it is kept."""
    met = all(check["met"] for check in row["checks"])
    measured = conditions(quick=quick, dtype=row.get("dtype", "float64"), threads=row.get("threads", 1))
    row = _finite({**row, "met": met, "conditions": measured})
    rows = {**{one["name"]: one for one in load(path) if one["name"] in order}, row["name"]: row}
    record = {"benchmark": "solvers", "rows": [rows[name] for name in order if name in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved, so that an interrupt leaves the old record or the new one.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return row


def _finite(value: Any) -> Any:
    """JSON knows no infinity: a bound that nobody proved is null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(row: Row) -> str:
    """A row for the terminal."""
    lines = [f"-- {row['name']}: {row['title']}, {_sizes(row)}"]
    for side in [row["ours"], *([row["peer"]] if "peer" in row else []), *row.get("other_peers", [])]:
        spent = (">" if side["stopped"] else "") + f"{side['seconds']:.4f}"
        lines.append(
            f"{side['solver']:<64} {side['status']:<14}{_shown(side['objective'], '14.8f')}"
            f"{_shown(side['gap'], '10.1e')}{side['iterations']:>10}{spent:>12} s"
        )
    for check in row["checks"]:
        word = "met" if check["met"] else "MISSED"
        lines.append(f"   {check['quantity']}: {_shown(check['value'], '.4g')} ({_target(check)}): {word}")
    return "\n".join(lines)


def _target(check: dict[str, Any]) -> str:
    return f"at least {check['at_least']:g}" if "at_least" in check else f"at most {check['at_most']:g}"


def _sizes(row: Row) -> str:
    return " ".join(f"{name}={_number(value)}" for name, value in row["sizes"].items() if (name, value) != ("Q", 1))


def _number(value: Any) -> str:
    if isinstance(value, list):
        return f"{_number(value[0])} to {_number(value[-1])}"
    return f"{value:,}"


def _shown(value: float | None, how: str) -> str:
    """A number, or a dash of its width."""
    if value is None:
        return format("-", ">" + how.partition(".")[0])
    return format(value, how)


def _seconds(side: Row) -> str:
    value = side["seconds"]
    text = f"{value:.0f}" if value >= 100 else f"{value:.2g}"
    return ("> " if side["stopped"] else "") + f"{text} s"


def markdown(rows: list[Row]) -> str:
    """The results for the documentation: one table, one line for each row, and the versions."""
    lines = [
        "| problem | attsvm | gap | peer | its gap | its time | measured | target | met |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, peer = row["ours"], row.get("peer")
        theirs = [peer["solver"], _shown(peer["gap"], ".0e"), _seconds(peer)] if peer else ["", "", ""]
        checks = [check for check in row["checks"] if check["quantity"] != "gap" or not check["met"] or peer is None]
        measured = "; ".join(f"{check['quantity']}: {_short(check['value'])}" for check in checks)
        target = "; ".join(_target(check) for check in checks)
        cells = [
            f"{row['title']}: {_sizes(row)}",
            _seconds(ours),
            _shown(ours["gap"], ".0e"),
            *theirs,
            measured,
            target,
            "yes" if row["met"] else "**no**",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_versions(rows)]) + "\n"


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0e}" if 0 < abs(value) < 1e-3 else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _versions(rows: list[Row]) -> list[str]:
    """One line for each set of conditions that rows were measured under, mostly one."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        where = row["conditions"]
        packages = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
        threads = "one thread" if where["threads"] == 1 else f"{where['threads']} threads"
        text = f"{where['machine']}, {threads} of {where['cores']} cores, Python {where['python']}, {packages}"
        groups.setdefault(text, []).append(row["name"])
    if len(groups) == 1:
        return [f"Measured on {text}." for text in groups]
    return [f"{', '.join(names)}: measured on {text}." for text, names in groups.items()]
