"""Whole experiments: from data to records on disk."""

from attsvm.experiments.config import VerifyConfig
from attsvm.experiments.processes import Processes, join_processes
from attsvm.experiments.solve_file import SolveConfig, SolveFolder, solve_file
from attsvm.experiments.verify import verify

__all__ = [
    "Processes",
    "SolveConfig",
    "SolveFolder",
    "VerifyConfig",
    "join_processes",
    "solve_file",
    "verify",
]
