"""Certified minimum-norm solvers for token selection."""

from attsvm.solvers.solution import Ray, Solution, Status
from attsvm.solvers.solve import solve

__all__ = ["Ray", "Solution", "Status", "solve"]
