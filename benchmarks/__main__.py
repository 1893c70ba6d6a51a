"""``python -m benchmarks``: all rows or some, results in ``benchmarks/results/``."""

from __future__ import annotations

from benchmarks.solvers import main

main()
