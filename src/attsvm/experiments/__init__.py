"""Whole experiments: from data to records on disk."""

from attsvm.experiments.config import VerifyConfig
from attsvm.experiments.processes import Processes, join_processes
from attsvm.experiments.reproduce import ReproduceFolder, check_options, reproduce, state_of
from attsvm.experiments.solve_file import SolveConfig, SolveFolder, solve_file
from attsvm.experiments.verify import verify

__all__ = [
    "Processes",
    "ReproduceFolder",
    "SolveConfig",
    "SolveFolder",
    "VerifyConfig",
    "check_options",
    "join_processes",
    "reproduce",
    "solve_file",
    "state_of",
    "verify",
]
