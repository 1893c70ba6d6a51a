"""The solvers against generic ones, in one process, on one thread, with warm-up and data preparation off the clock.

Both sides are held to a relative gap of 1e-6 by the same judge: the upper bound of a peer's matrix is certified in
float64 as ours is, and set against our lower bound, so that a peer need not prove its accuracy. A peer runs with ever
smaller tolerances until it is accurate, and only the last of these runs counts. One that needs more than its limit is
stopped: its time, and the ratio, are then lower limits. Rows about memory run in processes of their own.
"""

from __future__ import annotations

import argparse
import time
import traceback
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.record import kept, load, markdown, table

RESULTS = Path(__file__).resolve().parent / "results" / "solvers.json"


def main() -> None:
    """Run, print a table, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to run, such as growth or 'fro-*'; others stay")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the rows go (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--markdown", action="store_true", help="print the table of a record; runs nothing")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the figures of a record; runs nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(load(arguments.json)), end="")
    if arguments.plots is not None:
        from benchmarks.plot import draw  # matplotlib is needed for this alone

        for path in draw(load(arguments.json), arguments.plots):
            print(f"written: {path}")
    if not (arguments.markdown or arguments.plots):
        _run(parser, arguments)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.quick and arguments.json == RESULTS:
        parser.error("--quick needs --json: its rows are no results")
    import torch

    from benchmarks.rows import ROWS  # the peers take seconds to import

    if arguments.list:
        print("\n".join(f"{row.name:<24}{row.title}" for row in ROWS))
        return
    patterns = arguments.only or ["*"]
    idle = [pattern for pattern in patterns if not any(fnmatchcase(row.name, pattern) for row in ROWS)]
    if idle:
        parser.error(f"no row is called {', '.join(idle)}; --list names them")
    torch.set_num_threads(1)
    order, failed = [row.name for row in ROWS], []
    for row in ROWS:
        if not any(fnmatchcase(row.name, pattern) for pattern in patterns):
            continue
        began = time.perf_counter()
        try:
            found = {"name": row.name, "title": row.title, **row.run(arguments.quick)}
        except Exception:
            # One row that fails, such as a peer that is not installed or out of memory, does not cost the others.
            failed.append(row.name)
            traceback.print_exc()
            continue
        found = kept(arguments.json, found, order, quick=arguments.quick)
        print(table(found), f"   ({time.perf_counter() - began:.0f} s in all)", sep="\n", flush=True)
    print(f"written: {arguments.json}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
