"""``python -m benchmarks``: all benchmarks, results in ``benchmarks/results/``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent

sys.path.insert(0, str(HERE))
sys.argv = [str(HERE / "solvers.py"), *sys.argv[1:]]
runpy.run_path(str(HERE / "solvers.py"), run_name="__main__")
